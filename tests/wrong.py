# ruff: noqa: E501 (a table of replacements)
"""One solution of the assignment, written from the docstrings alone, and what is typically wrong with others.

SOLUTION: the ten functions. WRONG: (function, what is wrong, what of its text is replaced by what); each must fail the
task that its function belongs to (test_assignment.py).
"""

SOLUTION = {
    "merge_axis": """
def merge_axis(x, size, keep, axis):
    if x.dim() != 4 or not torch.is_floating_point(x) or x.shape[:3] != size.shape:
        raise ValueError(f"x of shape {tuple(x.shape)} and type {x.dtype}, size of shape {tuple(size.shape)}")
    if axis != 1 and axis != 2:
        raise ValueError(f"there is no axis {axis} to merge")
    n = x.shape[axis]
    if keep < 1 or keep > n:
        raise ValueError(f"cannot keep {keep} of {n} tokens")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    t, s = x.to(wide).movedim(axis, 2), size.to(wide).movedim(axis, 2)  # (B, lines, n, C), (B, lines, n)
    B, lines, _, C = t.shape
    length = t.square().sum(-1).sqrt()
    a, b = length[:, :, :-1], length[:, :, 1:]
    product = (t[:, :, :-1] * t[:, :, 1:]).sum(-1)
    some, none = (a > 0) & (b > 0), (a == 0) & (b == 0)
    cosine = torch.where(some, product / torch.where(some, a * b, 1), none.to(wide))
    order = torch.argsort(cosine, dim=-1, stable=True)
    start = torch.zeros(B, lines, n, dtype=torch.int64, device=x.device)
    run = torch.cumsum(start.scatter(-1, order[..., : keep - 1] + 1, 1), -1)
    total = torch.zeros(B, lines, keep, dtype=wide, device=x.device).scatter_add(-1, run, s)
    index = run[..., None].expand(B, lines, n, C)
    summed = torch.zeros(B, lines, keep, C, dtype=wide, device=x.device).scatter_add(2, index, t * s[..., None])
    merged = summed / total[..., None]
    line = torch.arange(lines, device=x.device)[:, None]
    parent = line * keep + run if axis == 2 else run * lines + line
    merged, total, parent = merged.movedim(2, axis), total.movedim(2, axis), parent.movedim(2, axis)
    return merged.to(x.dtype), total.to(size.dtype), parent
""",
    "merge_plan": """
def merge_plan(H, W, keep, steps):
    if H < 1 or W < 1 or steps < 2 or not (0 < keep <= 1):
        raise ValueError(f"H {H}, W {W}, keep {keep}, steps {steps}")
    plan, h, w = [], H, W
    for step in range(steps if keep < 1 else 0):
        along_w = step % 2 == 0
        turns = (steps + 1) // 2 if along_w else steps // 2
        done = (step // 2 + 1) / turns
        share = 1 - done * (1 - math.sqrt(keep))
        if along_w:
            w = max(int(W * share + 0.5), 1)
        else:
            h = max(int(H * share + 0.5), 1)
        plan.append((2 if along_w else 1, h, w))
    return plan
""",
    "follow": """
def follow(token, parent):
    return torch.gather(parent.reshape(len(parent), -1), 1, token)
""",
    "low_pass": """
def low_pass(x, cutoff, dim=1):
    if not torch.is_floating_point(x) or x.dim() == 0 or x.shape[dim] == 0 or not (0 <= cutoff <= 1):
        raise ValueError(f"x of shape {tuple(x.shape)} and type {x.dtype}, cutoff {cutoff}")
    x = x.to(torch.float32)
    n = x.shape[dim]
    passed = int(cutoff * (n // 2) + 0.5)
    if passed == n // 2:
        return x
    waves = torch.fft.rfft(x.movedim(dim, -1))
    mask = (torch.arange(waves.shape[-1], device=x.device) <= passed).to(torch.float32)
    return torch.fft.irfft(waves * mask, n=n).movedim(-1, dim)
""",
    "spectral_score": """
def spectral_score(x, cutoff=0.5):
    if x.dim() != 3:
        raise ValueError(f"x of shape {tuple(x.shape)}")
    removed = x.to(torch.float32) - low_pass(x, cutoff)
    return torch.linalg.vector_norm(removed, dim=-1)
""",
    "spectral_prune": """
def spectral_prune(x, keep, cutoff=0.5, channels=64):
    if x.dim() != 3 or keep < 0 or keep > x.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)}, keep {keep}")
    if keep == 0:
        return torch.zeros(x.shape[0], 0, dtype=torch.int64, device=x.device)
    token = x.to(torch.float32)
    if token.shape[-1] > channels:
        token = token @ projection(token.shape[-1], channels, x.device)
    length = token.norm(dim=-1, keepdim=True)
    token = token / length.clamp(min=torch.finfo(torch.float32).tiny)
    score = (spectral_score(token, cutoff) * 2**14).round()
    order = torch.argsort(-score, dim=1, stable=True)
    return torch.sort(order[:, :keep], dim=1).values
""",
    "inherit": """
def inherit(size, kept):
    B, N = size.shape
    at = torch.arange(N, device=size.device).expand(B, N).contiguous()
    border = (kept[:, :-1] + kept[:, 1:]) / 2  # up to here the left one is as near
    heir = torch.searchsorted(border.contiguous(), at.to(border.dtype))
    wide = size.to(torch.float32) if size.dtype in (torch.float16, torch.bfloat16) else size
    out = torch.zeros(kept.shape, dtype=wide.dtype, device=size.device)
    return out.scatter_add(1, heir, wide).to(size.dtype)
""",
    "SmallPruner.gather": """
def gather(self, number, layer, args, kwargs):
    (self.hidden,) = args
    allowed = math.floor(self.fractions[number] * int(self.is_image.sum()) + 0.5)
    left = [i for i in self.index.tolist() if self.is_image[i]]
    if allowed < len(left):
        chosen = {left[c] for c in spectral_prune(self.hidden[:, left], allowed)[0].tolist()}
        self.index = torch.tensor([i for i in self.index.tolist() if i in chosen or not self.is_image[i]])
    self.kept.append(self.index)
    rotary = tuple(t[:, self.index] for t in kwargs["position_embeddings"])
    more = {"position_embeddings": rotary, "position_ids": None, "attention_mask": None}
    return (self.hidden[:, self.index],), kwargs | more
""",
    "SmallPruner.scatter": """
def scatter(self, layer, args, output):
    whole = self.hidden.clone()
    whole[:, self.index] = output
    return whole
""",
    "run_layer": """
def run_layer(plain, number, pruner, hidden, **kwargs):
    prompt, cache = kwargs.pop("prompt"), kwargs[CACHE]
    move(hidden.device, prompt, *prompt.pictures)
    prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)
    prompt.layers.append(prompt.size)
    short = hidden if prompt.index is None else prompt.gather(hidden)
    store = None if cache is None else cache.layers[number]
    if store is not None:
        store.expect(prompt)
    elif prompt.weigh:
        kwargs["key_channels"] = prompt.channels
    kwargs["attention_mask"] = prompt.mask(store, short, pruner.decoder.config)
    kwargs["position_ids"] = None
    if prompt.index is None:
        return plain(short, **kwargs)
    rotary = [t.to(hidden.device).expand(len(hidden), -1, -1) for t in kwargs["position_embeddings"]]
    kwargs["position_embeddings"] = tuple(prompt.gather(t) for t in rotary)
    new = plain(short, **kwargs)
    out = hidden.reshape(-1, hidden.shape[-1]).clone()
    out[prompt.index] = new.reshape(len(prompt.index), -1)
    return out.view(hidden.shape)
""",
}

# function, and below it a line for each mistake: "what is wrong: old => new"; && between several, \n for a new line.
TABLE = r"""
merge_axis
    no similarity below 0: none.to(wide)) => none.to(wide)).clamp(min=0)
    an epsilon in the cosine: a * b, 1) => a * b, 1).clamp(min=1e-8)
    dot products: product / torch.where(some, a * b, 1) => product
    zero tokens are like anything: (a == 0) & (b == 0) => (a == 0) | (b == 0)
    topk, which is not stable: order = torch.argsort(cosine, dim=-1, stable=True) => order = torch.topk(cosine, n - 1, dim=-1, largest=False).indices
    ties cut the higher index: torch.argsort(cosine, dim=-1, stable=True) => n - 2 - torch.argsort(cosine.flip(-1), dim=-1, stable=True)
    unweighted means: t * s[..., None])\n    merged = summed / total[..., None] => t)\n    merged = summed / torch.zeros_like(total).scatter_add(-1, run, torch.ones_like(s))[..., None]
    computed in the tokens' dtype: wide = torch.float64 if x.dtype == torch.float64 else torch.float32 => wide = x.dtype
    parent of H counts columns first: else run * lines + line => else line * keep + run
    the sizes' input is written to: return merged => size += 0 * size + (keep < n)\n    return merged
    a loop over samples:     wide = torch.float64 if =>     if len(x) > 1:\n        parts = [merge_axis(x[b : b + 1], size[b : b + 1], keep, axis) for b in range(len(x))]\n        return tuple(torch.cat(p) for p in zip(*parts))\n    wide = torch.float64 if
    a table of all pairs:     some, none = =>     product = (t @ t.transpose(-1, -2)).diagonal(1, -2, -1)\n    some, none =
    reads whether there are zeros:     some, none = =>     if (a == 0).any():\n        a = a + 0\n    some, none =
    dot products in the tokens' dtype: product = (t[:, :, :-1] * t[:, :, 1:]).sum(-1) => product = (t[:, :, :-1] * t[:, :, 1:]).sum(-1).to(x.dtype).to(wide)
merge_plan
    halves are rounded to even: int(W * share + 0.5) => round(W * share)
    both axes have as many turns: (steps + 1) // 2 if along_w else steps // 2 => (steps + 1) // 2
    equal factors instead of equal portions: share = 1 - done * (1 - math.sqrt(keep)) => share = math.sqrt(keep) ** done
follow
    all follow the first sample: parent.reshape(len(parent), -1) => parent[:1].expand_as(parent).reshape(len(parent), -1)
low_pass
    high frequencies pass: <= passed) => >= passed)
    halves to even: int(cutoff * (n // 2) + 0.5) => round(cutoff * (n // 2))
    no identity: if passed == n // 2:\n        return x\n => NOTHING
    half precision comes back:     x = x.to(torch.float32) =>     dtype = x.dtype\n    x = x.to(torch.float32)  &&  movedim(-1, dim)\n => movedim(-1, dim).to(dtype)\n
    a matrix instead of an FFT:     waves = torch.fft.rfft =>     torch.eye(n, device=x.device)\n    waves = torch.fft.rfft
spectral_score
    what passes is scored: x.to(torch.float32) - low_pass(x, cutoff) => low_pass(x, cutoff)
    in half precision: x.to(torch.float32) - low_pass(x, cutoff) => (x - low_pass(x, cutoff).to(x.dtype)).to(torch.float32)
spectral_prune
    not ascending: torch.sort(order[:, :keep], dim=1).values => order[:, :keep]
    no rounding: .round() => NOTHING
    an epsilon in the norm: torch.finfo(torch.float32).tiny => 1e-6
    a loop over samples:     token = x.to(torch.float32) =>     if len(x) > 1:\n        return torch.cat([spectral_prune(one[None], keep, cutoff, channels) for one in x])\n    token = x.to(torch.float32)
inherit
    pruned sizes are lost: out.scatter_add(1, heir, wide) => wide.gather(1, kept)
    ties to the later: border = (kept[:, :-1] + kept[:, 1:]) / 2 => border = (kept[:, :-1] + kept[:, 1:] - 1) / 2
    sums in half precision: wide = size.to(torch.float32) if => wide = size.half() if size.dtype == torch.float32 else size.to(torch.float32) if
SmallPruner.gather
    shares of what is left: int(self.is_image.sum()) => int(self.is_image[self.index].sum())
    rounded to even: math.floor(self.fractions[number] * int(self.is_image.sum()) + 0.5) => round(self.fractions[number] * int(self.is_image.sum()))
    text goes to the end: torch.tensor([i for i in self.index.tolist() if i in chosen or not self.is_image[i]]) => torch.tensor([*sorted(chosen), *[i for i in self.index.tolist() if not self.is_image[i]]])
    positions are renumbered: t[:, self.index] for t => t[:, : len(self.index)] for t
    position ids are left in: "position_ids": None,  => NOTHING
    the mask is left in: , "attention_mask": None => NOTHING
SmallPruner.scatter
    the input is written to: self.hidden.clone() => self.hidden
    rows come back at the front: whole[:, self.index] = output => whole[:, : output.shape[1]] = output
run_layer
    a scheme of its own: pruner.config.prune) => spectral_prune)
    pruned after it gathered:     prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)\n => NOTHING  &&      store = None =>     prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)\n    store = None
    the cache of the first layer: cache.layers[number] => cache.layers[0]
    the mask of the whole sequence: prompt.mask(store, short, => prompt.mask(store, hidden,
    position ids are left in:     kwargs["position_ids"] = None\n => NOTHING
    rotary positions are renumbered: prompt.gather(t) for t in rotary => t[:, : short.shape[1]] for t in rotary
    the input is written to: .clone() => NOTHING
"""

WRONG, name = [], ""
for line in TABLE.strip().split("\n"):
    if line.startswith(" "):
        what, _, changes = line.lstrip().replace(r"\n", "\n").replace("NOTHING", "").partition(": ")
        WRONG.append((name, what, [tuple(pair.split(" => ")) for pair in changes.split("  &&  ")]))
    else:
        name = line
