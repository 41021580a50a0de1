# ruff: noqa: E501 (a table of replacements)
"""One solution of the assignment, written from the docstrings alone, and what is typically wrong with others.

SOLUTION: the nine functions. WRONG: (function, what is wrong, then pairs of what of its text is replaced, and by what);
each must fail the task that its function belongs to (test_assignment.py).
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
    some = (a > 0) & (b > 0)
    none = (a == 0) & (b == 0)
    cosine = torch.where(some, product / torch.where(some, a * b, 1), none.to(wide))
    order = torch.argsort(cosine, dim=-1, stable=True)
    start = torch.zeros(B, lines, n, dtype=torch.int64, device=x.device)
    start = start.scatter(-1, order[..., : keep - 1] + 1, 1)
    run = torch.cumsum(start, -1)
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
    if keep == 1:
        return plan
    for step in range(steps):
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
    flat = parent.reshape(len(parent), -1)
    return torch.gather(flat, 1, token)
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
    "Prompt.prune": """
def prune(self, hidden, fraction, choose):
    B, S, C = hidden.shape
    rows, size, changed = hidden.reshape(B * S, C), self.size.to(hidden.device).reshape(-1), False
    for group in self.pictures:
        keep, left = int(group.count * fraction + 0.5), group.where.shape[1]
        if keep >= left:
            continue
        at = group.where.to(hidden.device)
        kept = choose(rows[at], keep)
        old = size[at]
        size = size.index_put((at,), torch.zeros_like(old))
        group.where = at.gather(1, kept)
        if keep > 0:
            size = size.index_put((group.where,), inherit(old, kept))
        changed = True
    if changed or self.size.device != hidden.device:
        self.size = size.view(B, S)
        self.select()
""",
    "run_layer": """
def run_layer(layer, plain, number, pruner, hidden, **kwargs):
    prompt = kwargs.pop("prompt")
    prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)
    short = hidden if prompt.index is None else take(hidden, prompt.index)
    changed = enter(layer, number, prompt, short, kwargs)
    new = plain(short, **(kwargs | changed))
    if prompt.ragged:
        new = torch.where(prompt.here.unsqueeze(-1) > 0, new, short)
    return new if prompt.index is None else put(hidden, prompt.index, new)
""",
}


WRONG = [
    # ---- merge_axis
    ("merge_axis", "absolute similarity", "none.to(wide))", "none.to(wide)).abs()"),
    ("merge_axis", "no similarity below 0", "none.to(wide))", "none.to(wide)).clamp(min=0)"),
    ("merge_axis", "an epsilon in the cosine", "a * b, 1)", "a * b, 1).clamp(min=1e-8)"),
    ("merge_axis", "dot products", "product / torch.where(some, a * b, 1)", "product"),
    ("merge_axis", "the most similar are cut", "order[..., : keep - 1] + 1", "order.flip(-1)[..., : keep - 1] + 1"),
    ("merge_axis", "a run starts one early", "order[..., : keep - 1] + 1", "order[..., : keep - 1]"),
    ("merge_axis", "zero tokens are unlike each other", "none = (a == 0) & (b == 0)", "none = (a < 0) & (b == 0)"),
    ("merge_axis", "zero tokens are like anything", "(a == 0) & (b == 0)", "(a == 0) | (b == 0)"),
    ("merge_axis", "topk, which is not stable", "order = torch.argsort(cosine, dim=-1, stable=True)",
     "order = torch.topk(cosine, n - 1, dim=-1, largest=False).indices"),
    ("merge_axis", "ties cut the higher index", "torch.argsort(cosine, dim=-1, stable=True)",
     "n - 2 - torch.argsort(cosine.flip(-1), dim=-1, stable=True)"),
    ("merge_axis", "unweighted means", "t * s[..., None])\n    merged = summed / total[..., None]",
     "t)\n    merged = summed / torch.zeros_like(total).scatter_add(-1, run, torch.ones_like(s))[..., None]"),
    ("merge_axis", "sums instead of means", "merged = summed / total[..., None]", "merged = summed"),
    ("merge_axis", "sizes of runs are counts", ".scatter_add(-1, run, s)", ".scatter_add(-1, run, torch.ones_like(s))"),
    ("merge_axis", "computed in the tokens' dtype", "wide = torch.float64 if x.dtype == torch.float64 else torch.float32",
     "wide = x.dtype"),
    ("merge_axis", "similarity in half precision", "t.square().sum(-1).sqrt()",
     "(t.to(x.dtype) if x.dtype == torch.bfloat16 else t).square().sum(-1).sqrt().to(wide)"),
    ("merge_axis", "sizes in the tokens' dtype", "size.to(wide).movedim", "size.to(x.dtype).to(wide).movedim"),
    ("merge_axis", "float64 by way of float32", "torch.float64 if x.dtype == torch.float64 else torch.float32",
     "torch.float32"),
    ("merge_axis", "sizes come back in another dtype", "total.to(size.dtype), parent", "total, parent"),
    ("merge_axis", "parent is the run of the line", "line * keep + run if axis == 2 else run * lines + line", "run"),
    ("merge_axis", "parent of H counts columns first", "else run * lines + line", "else line * keep + run"),
    ("merge_axis", "parent is int32", "total.to(size.dtype), parent", "total.to(size.dtype), parent.int()"),
    ("merge_axis", "gradients of tokens are lost", "t, s = x.to(wide)", "t, s = x.detach().to(wide)"),
    ("merge_axis", "gradients of sizes are lost", "size.to(wide).movedim", "size.detach().to(wide).movedim"),
    ("merge_axis", "the sizes' input is written to", "return merged", "size += 0 * size + (keep < n)\n    return merged"),
    ("merge_axis", "the tokens' input is written to", "return merged", "x.data.neg_()\n    return merged"),
    ("merge_axis", "a global seed is set", "B, lines, _, C = t.shape", "B, lines, _, C = t.shape\n    torch.manual_seed(0)"),
    ("merge_axis", "random numbers break ties", "order = torch.argsort(cosine", "cosine = cosine + 1e-7 * torch.rand("
     "cosine.shape, device=x.device)\n    order = torch.argsort(cosine"),
    ("merge_axis", "the third sample is the first", "t, s = x.to(wide)", "if len(x) > 2:\n        x = torch.cat([x[:2], "
     "x[:1], x[3:]])\n    t, s = x.to(wide)"),
    ("merge_axis", "long lines are cut in the middle", "some = (a > 0) & (b > 0)",
     "some = (a > 0) & (b > 0)\n    product[:, :, 63:64] = -2 * a[:, :, 63:64] * b[:, :, 63:64]"),
    ("merge_axis", "lines beyond 40 are not normalised", "product / torch.where(some, a * b, 1)",
     "product / torch.where(some & (torch.arange(n - 1, device=x.device) < 40), a * b, 1)"),
    ("merge_axis", "view of what may not be contiguous", "t, s = x.to(wide).movedim(axis, 2)",
     "x.view(-1)\n    t, s = x.to(wide).movedim(axis, 2)"),
    ("merge_axis", "a loop over samples", "    wide = torch.float64 if", "    if len(x) > 1:\n        parts = [merge_axis("
     "x[b : b + 1], size[b : b + 1], keep, axis) for b in range(len(x))]\n        return tuple(torch.cat(p) for p in "
     "zip(*parts))\n    wide = torch.float64 if"),
    ("merge_axis", "a loop over lines", "    length = t", "    t = torch.stack([t[:, i] for i in range(lines)], 1)\n"
     "    length = t"),
    ("merge_axis", "a table of all pairs", "    some = (a > 0)", "    product = (t @ t.transpose(-1, -2)).diagonal(1, -2, "
     "-1)\n    some = (a > 0)"),
    ("merge_axis", "reads whether there are zeros", "    some = (a > 0)", "    if (a == 0).any():\n        a = a + 0\n"
     "    some = (a > 0)"),
    ("merge_axis", "made on the CPU", "dtype=torch.int64, device=x.device)", "dtype=torch.int64)"),
    ("merge_axis", "a RuntimeError", "raise ValueError(f\"cannot keep", "raise RuntimeError(f\"cannot keep"),
    ("merge_axis", "keep is clamped", "if keep < 1 or keep > n:", "keep = min(keep, n)\n    if keep < 1:"),
    ("merge_axis", "an error that does not say what", "{keep} of {n} tokens", "so many of {n} tokens"),
    # ---- merge_plan, follow
    ("merge_plan", "H first", "along_w = step % 2 == 0", "along_w = step % 2 == 1"),
    ("merge_plan", "each axis shrinks to keep", "1 - math.sqrt(keep)", "1 - keep"),
    ("merge_plan", "halves are rounded to even", "int(W * share + 0.5)", "round(W * share)"),
    ("merge_plan", "rounded down", "int(H * share + 0.5)", "int(H * share)"),
    ("merge_plan", "an axis vanishes", "max(int(H * share + 0.5), 1)", "int(H * share + 0.5)"),
    ("merge_plan", "both axes have as many turns", "(steps + 1) // 2 if along_w else steps // 2", "(steps + 1) // 2"),
    ("merge_plan", "steps without effect are left out", "        plan.append(", "        if (h, w) != (plan[-1][1:] if plan "
     "else (H, W)):\n            plan.append("),
    ("merge_plan", "equal factors instead of equal portions", "share = 1 - done * (1 - math.sqrt(keep))",
     "share = math.sqrt(keep) ** done"),
    ("merge_plan", "a plan for keep = 1", "if keep == 1:", "if keep > 1:"),
    ("merge_plan", "NaN passes", "not (0 < keep <= 1)", "keep <= 0 or keep > 1"),
    ("merge_plan", "one step passes", "steps < 2", "steps < 1"),
    ("merge_plan", "floats", "plan.append((2 if along_w else 1, h, w))", "plan.append((2 if along_w else 1, float(h), w))"),
    ("follow", "all follow the first sample", "parent.reshape(len(parent), -1)",
     "parent[:1].expand_as(parent).reshape(len(parent), -1)"),
    ("follow", "columns first", "parent.reshape", "parent.transpose(1, 2).reshape"),
    ("follow", "the tokens before are forgotten", "torch.gather(flat, 1, token)",
     "flat[:, : token.shape[1]].clone()"),
    ("follow", "written into the tokens", "return torch.gather(flat, 1, token)",
     "return token.copy_(torch.gather(flat, 1, token))"),
    ("follow", "int32", "torch.gather(flat, 1, token)", "torch.gather(flat, 1, token).int()"),
    ("follow", "a loop over samples", "torch.gather(flat, 1, token)",
     "torch.stack([row[at] for row, at in zip(flat, token)])"),
    # ---- low_pass, spectral_score
    ("low_pass", "high frequencies pass", "<= passed)", ">= passed)"),
    ("low_pass", "one too few", "<= passed)", "< passed)"),
    ("low_pass", "rounded down", "int(cutoff * (n // 2) + 0.5)", "int(cutoff * (n // 2))"),
    ("low_pass", "halves to even", "int(cutoff * (n // 2) + 0.5)", "round(cutoff * (n // 2))"),
    ("low_pass", "DC is one of the cutoff's", "int(cutoff * (n // 2) + 0.5)", "max(0, int(cutoff * (n // 2 + 1) - 0.5))"),
    ("low_pass", "no identity", "if passed == n // 2:\n        return x\n", ""),
    ("low_pass", "odd lengths lose a value", "n=n)", "n=n - n % 2 if n > 150 else n)"),
    ("low_pass", "along the last dimension", "x.movedim(dim, -1)", "x.movedim(max(dim, 1) if x.dim() > 1 else dim, -1)"),
    ("low_pass", "no gradient", "x = x.to(torch.float32)", "x = x.detach().to(torch.float32)"),
    ("low_pass", "half precision comes back", "    x = x.to(torch.float32)", "    dtype = x.dtype\n    x = x.to(torch.float32)",
     "movedim(-1, dim)\n", "movedim(-1, dim).to(dtype)\n"),
    ("low_pass", "an FFT in half precision", "x = x.to(torch.float32)", "x = x.to(torch.float32)\n    x = x.bfloat16().float()"),
    ("low_pass", "a matrix instead of an FFT", "    waves = torch.fft.rfft", "    torch.eye(n, device=x.device)\n    waves = "
     "torch.fft.rfft"),
    ("low_pass", "a loop over channels", "    waves = torch.fft.rfft(x.movedim(dim, -1))", "    waves = torch.stack(["
     "torch.fft.rfft(row) for row in x.movedim(dim, -1).unbind(0)]) if x.dim() > 1 else torch.fft.rfft(x)"),
    ("low_pass", "a soft edge", "(torch.arange(waves.shape[-1], device=x.device) <= passed).to(torch.float32)",
     "torch.sigmoid((passed + 0.5 - torch.arange(waves.shape[-1], device=x.device)) * 8.0)"),
    ("low_pass", "NaN passes", "not (0 <= cutoff <= 1)", "cutoff < 0 or cutoff > 1"),
    ("low_pass", "the wrong error", "raise ValueError", "raise TypeError"),
    ("spectral_score", "what passes is scored", "x.to(torch.float32) - low_pass(x, cutoff)", "low_pass(x, cutoff)"),
    ("spectral_score", "the square of the norm", "torch.linalg.vector_norm(removed, dim=-1)", "removed.square().sum(-1)"),
    ("spectral_score", "the largest channel", "torch.linalg.vector_norm(removed, dim=-1)", "removed.abs().amax(-1)"),
    ("spectral_score", "another default", "cutoff=0.5", "cutoff=0.25"),
    ("spectral_score", "windowed", "removed = x", "x = x * torch.hann_window(x.shape[1] + 2, device=x.device)[1:-1, None]\n"
     "    removed = x"),
    ("spectral_score", "in half precision", "x.to(torch.float32) - low_pass(x, cutoff)",
     "(x - low_pass(x, cutoff).to(x.dtype)).to(torch.float32)"),
    ("spectral_score", "no gradient", "return torch", "removed = removed.detach()\n    return torch"),
    # ---- spectral_prune
    ("spectral_prune", "the lowest", "torch.argsort(-score", "torch.argsort(score"),
    ("spectral_prune", "not ascending", "torch.sort(order[:, :keep], dim=1).values", "order[:, :keep]"),
    ("spectral_prune", "not stable", "order = torch.argsort(-score, dim=1, stable=True)",
     "order = torch.topk(score, keep, dim=1).indices"),
    ("spectral_prune", "ties to the higher index", "torch.argsort(-score, dim=1, stable=True)",
     "score.shape[1] - 1 - torch.argsort(-score.flip(1), dim=1, stable=True)"),
    ("spectral_prune", "no rounding", ".round()", ""),
    ("spectral_prune", "rounded too coarsely", "* 2**14).round()", "* 2**6).round()"),
    ("spectral_prune", "no norm", "token = token / length.clamp(min=torch.finfo(torch.float32).tiny)", "pass"),
    ("spectral_prune", "an epsilon in the norm", "torch.finfo(torch.float32).tiny", "1e-6"),
    ("spectral_prune", "one norm for all", "token.norm(dim=-1, keepdim=True)", "token.norm(dim=(1, 2), keepdim=True)"),
    ("spectral_prune", "norm in half precision", "token.norm(dim=-1, keepdim=True)",
     "token.to(x.dtype).norm(dim=-1, keepdim=True).to(torch.float32)"),
    ("spectral_prune", "projected in half precision", "token @ projection(token.shape[-1], channels, x.device)",
     "(x @ projection(token.shape[-1], channels, x.device).to(x.dtype)).to(torch.float32)"),
    ("spectral_prune", "no projection", "if token.shape[-1] > channels:", "if False:"),
    ("spectral_prune", "always a projection", "token.shape[-1] > channels:", "token.shape[-1] >= channels:"),
    ("spectral_prune", "norm before the projection", "    if token.shape[-1] > channels:",
     "    token = token / token.norm(dim=-1, keepdim=True).clamp(min=1e-30)\n    if token.shape[-1] > channels:\n"
     "        return torch.sort(torch.argsort(-spectral_score(token @ projection(token.shape[-1], channels, x.device), "
     "cutoff), dim=1)[:, :keep]).values\n    if token.shape[-1] > channels:"),
    ("spectral_prune", "a fresh random projection", "projection(token.shape[-1], channels, x.device)",
     "torch.randn(token.shape[-1], channels, device=x.device)"),
    ("spectral_prune", "the cutoff is not handed on", "spectral_score(token, cutoff)", "spectral_score(token)"),
    ("spectral_prune", "the mean of the samples decides", "order = torch.argsort(",
     "score = score.mean(0, keepdim=True).expand_as(score)\n    order = torch.argsort("),
    ("spectral_prune", "noise on the scores", "(spectral_score(token, cutoff) * 2**14)",
     "(spectral_score(token, cutoff) * 2**14 + 0.6 * torch.rand(token.shape[:2], device=x.device))"),
    ("spectral_prune", "keep = 0 needs a token", "keep < 0 or", "keep < 0 or x.shape[1] == 0 or"),
    ("spectral_prune", "negative keep passes", "keep < 0 or", ""),
    ("spectral_prune", "a loop over samples", "    token = x.to(torch.float32)", "    if len(x) > 1:\n        return "
     "torch.cat([spectral_prune(one[None], keep, cutoff, channels) for one in x])\n    token = x.to(torch.float32)"),
    # ---- inherit
    ("inherit", "pruned sizes are lost", "out.scatter_add(1, heir, wide)", "wide.gather(1, kept)"),
    ("inherit", "ties to the later", "border = (kept[:, :-1] + kept[:, 1:]) / 2", "border = (kept[:, :-1] + kept[:, 1:] - 1) / 2"),
    ("inherit", "to the kept one before", "(kept[:, :-1] + kept[:, 1:]) / 2", "(kept[:, 1:] - 1).float()"),
    ("inherit", "borders of the first sample", "border.contiguous()", "border[:1].expand_as(border).contiguous()"),
    ("inherit", "sums in half precision", "wide = size.to(torch.float32) if", "wide = size.half() if size.dtype == torch.float32 "
     "else size.to(torch.float32) if"),
    ("inherit", "sums in float32", "size.to(torch.float32) if size.dtype in (torch.float16, torch.bfloat16) else size",
     "size.to(torch.float32)"),
    ("inherit", "another dtype", "wide).to(size.dtype)", "wide)"),
    ("inherit", "no gradient", "    wide = ", "    size = size.detach()\n    wide = "),
    ("inherit", "the input is written to", "    return out", "    size.zero_()\n    return out"),
    ("inherit", "a loop over the kept", "    return out.scatter_add(1, heir, wide)", "    parts = [torch.where(heir == k, "
     "wide, 0).sum(1, dtype=wide.dtype) for k in range(kept.shape[1])]\n    return torch.stack(parts, 1)"),
    ("inherit", "all of equal shares", "out.scatter_add(1, heir, wide)",
     "(out + (wide.sum(1, keepdim=True) // kept.shape[1]))"),
    # ---- Prompt.prune
    ("Prompt.prune", "fractions of what is left", "int(group.count * fraction + 0.5)",
     "int(group.where.shape[1] * fraction + 0.5)"),
    ("Prompt.prune", "rounded down", "int(group.count * fraction + 0.5)", "int(group.count * fraction)"),
    ("Prompt.prune", "rounded to even", "int(group.count * fraction + 0.5)", "round(group.count * fraction)"),
    ("Prompt.prune", "pruned tokens keep their sizes", "torch.zeros_like(old)", "old"),
    ("Prompt.prune", "sizes are not inherited", "inherit(old, kept)", "old.gather(1, kept)"),
    ("Prompt.prune", "sizes become ones", "inherit(old, kept)", "torch.ones_like(kept, dtype=old.dtype)"),
    ("Prompt.prune", "asked although all stay", "if keep >= left:", "if keep > left:"),
    ("Prompt.prune", "one is always left", "int(group.count * fraction + 0.5), group", "max(1, int(group.count * fraction + "
     "0.5)), group"),
    ("Prompt.prune", "chosen in float32", "choose(rows[at], keep)", "choose(rows[at].float(), keep)"),
    ("Prompt.prune", "chosen by half precision", "choose(rows[at], keep)", "choose(rows[at].bfloat16(), keep)"),
    ("Prompt.prune", "only the first group", "        changed = True", "        changed = True\n        break"),
    ("Prompt.prune", "where is not updated", "group.where = at.gather(1, kept)", "pass"),
    ("Prompt.prune", "the chosen are taken for positions", "at.gather(1, kept)", "kept"),
    ("Prompt.prune", "sizes are written in place", "size = size.index_put((at,), torch.zeros_like(old))",
     "size.index_put_((at,), torch.zeros_like(old))"),
    ("Prompt.prune", "select is forgotten", "        self.select()", "        pass"),
    ("Prompt.prune", "gradients of sizes are lost", "inherit(old, kept)", "inherit(old.detach(), kept)"),
    ("Prompt.prune", "all pictures are one", "kept = choose(rows[at], keep)",
     "kept = choose(rows[at].mean(0, keepdim=True), keep).expand(len(at), keep)"),
    ("Prompt.prune", "a loop over pictures", "kept = choose(rows[at], keep)",
     "kept = torch.cat([choose(rows[one][None], keep) for one in at])"),
    ("Prompt.prune", "reads what it prunes", "        changed = True", "        changed = bool((old > -1).all())"),
    # ---- run_layer
    ("run_layer", "the layer runs on everything", "short = hidden if prompt.index is None else take(hidden, prompt.index)",
     "short = hidden"),
    ("run_layer", "the fractions of another layer", "pruner.fractions[number]", "pruner.fractions[max(0, number - 1)]"),
    ("run_layer", "a scheme of its own", "pruner.config.prune)", "spectral_prune)"),
    ("run_layer", "pruned after it gathered", "    prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)\n", "",
     "    changed = enter(", "    prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)\n    changed = enter("),
    ("run_layer", "pruned rows are zero", "put(hidden, prompt.index, new)", "put(torch.zeros_like(hidden), prompt.index, new)"),
    ("run_layer", "rows come back at the front", "put(hidden, prompt.index, new)",
     "torch.cat([new, hidden[:, new.shape[1] :]], 1)"),
    ("run_layer", "the short sequence is returned", "put(hidden, prompt.index, new)", "new"),
    ("run_layer", "fillers are updated", "if prompt.ragged:", "if False:"),
    ("run_layer", "fillers become zero", "new, short)\n", "new, 0)\n"),
    ("run_layer", "pruned rows are detached", "put(hidden, prompt.index, new)", "put(hidden.detach(), prompt.index, new)"),
    ("run_layer", "the layer's rows are detached", "take(hidden, prompt.index)", "take(hidden.detach(), prompt.index)"),
    ("run_layer", "the cache of the first layer", "enter(layer, number,", "enter(layer, 0,"),
    ("run_layer", "the cache is told twice", "    new = plain(", "    enter(layer, number, prompt, short, kwargs)\n    new = plain("),
    ("run_layer", "mask and positions of the whole sequence", "prompt, short, kwargs)", "prompt, hidden, kwargs)"),
    ("run_layer", "what transformers handed on", "(kwargs | changed)", "(changed | kwargs)"),
    ("run_layer", "rotary positions are renumbered", "(kwargs | changed)",
     "(changed | {key: kwargs[key] for key in kwargs if key not in changed} | {'position_embeddings': tuple(t[:, : short.shape"
     "[1]].expand(len(short), -1, -1) for t in kwargs['position_embeddings'])})"),
    ("run_layer", "the output is added", "put(hidden, prompt.index, new)", "put(hidden, prompt.index, new + short)"),
    ("run_layer", "the input is written to", "return new if", "hidden.data[:, :1] += 1\n    return new if"),
    ("run_layer", "in half precision", "put(hidden, prompt.index, new)",
     "put(hidden, prompt.index, new.bfloat16().to(hidden.dtype))"),
]  # fmt: skip
