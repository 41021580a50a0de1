"""LUVC in one file: vision-language models made faster without training, by dropping image tokens.

A reference implementation of *Towards Lossless Ultimate Vision Token Compression for VLMs* (Zheng, Huang,
Jiang, Hu, Chen; arXiv 2512.09010) on stock Hugging Face transformers:

    with LUVC(model):                      # any supported VLM, in place
        model.generate(**inputs)           # your own code, unchanged

A picture becomes hundreds of image tokens, and the LLM computes each of them in every layer. LUVC has two
units. The **Orthogonal Iterative Merger** (OIM) merges neighbouring tokens inside the vision encoder, along
one spatial axis at a time. The **Spectrum Pruning Unit** (SPU) prunes image tokens inside the LLM, layer
after layer, until none are left at the last one; a low-pass filter scores them, not attention, so that no
attention map is needed and FlashAttention keeps working.

How to read. Sections 1 and 2 are pure functions; they need torch alone and are made to be copied. Section 3
has the settings and what both hooks share. Section 4 hooks pruning into the LLM: after it you know half of
the method, and the text so far works as a file of its own. Section 5 hooks merging into the encoder, section
6 says where the parts of each family of models are, section 7 puts both hooks together.

Shapes:

    B    batch                            N    image tokens of one picture
    H W  token grid of one picture        K    tokens, or positions, that are kept
    C    channels                         S    positions of one forward call of the LLM

Words:

    placeholder   an id of the prompt that stands for one image token
    picture       a run of placeholders of one kind with nothing between them; it is pruned as one signal. So
                  tiles or frames that stand side by side, without even a newline, are one picture here
    patch         a token of the vision encoder; per_side x per_side of them make an image token
    size          how many image tokens of the plain model a token stands for
    position      where in the sequence of the LLM. *Logical*: as the prompt has it. *Physical*: which row of
                  what a layer really computes
    filler        a physical position that makes a shorter sample of a batch as long as the longest one

Only the paper's abstract and summaries were available: what it states and what we choose is README's ledger,
and `Our choice` marks where a choice is made. What is not supported: README, Limits.
"""

import contextlib
import copy
import functools
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# ==== 1. Merging: the Orthogonal Iterative Merger ===========================================================
#
# Neighbours that look alike become one token: first along the rows of the grid, then along its columns, then
# along the rows again. Every line loses equally many tokens, so the grid stays a rectangle, which everything
# behind the encoder expects.
#
#     sky  sky  sky | roof  roof | tree        keep 3 of 6: cut twice, where neighbours are least alike,
#     sky | roof roof  roof  roof | tree       and average what lies between two cuts; each line by itself
#
# A mean of means would be wrong: a token that stands for five others must count five times. So every token
# carries its *size*, and means are weighted by it. A second merge then gives exactly the mean of all that a
# token stands for.
#
# The paper says "iterative", and it pays (docs/results.md, on a real encoder): many small merges, each after
# a block has looked at what the last one made, are better than two large ones at the same cost.


def merge_axis(x: Tensor, size: Tensor, keep: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge neighbouring tokens along one axis of the grid until `keep` are left on it.

    Every line of the axis is cut at its `keep - 1` sharpest boundaries: where the cosine similarity of
    two neighbours is lowest, on a tie at the lower index. Each run between two cuts becomes one token,
    the mean of its tokens weighted by their sizes, and the run's sizes add up. A zero token has no
    direction: it counts as alike (1) to another zero token, and as unlike (0) to anything else.

    The work is a sort of each short line, a `cumsum` and an `index_add`: linear in the number of
    tokens, where matching all pairs of tokens is quadratic.

    Args:
        x: (B, H, W, C) floating, the tokens.
        size: (B, H, W) > 0, integer or floating: how many original tokens each stands for; ones to begin
            with. (That they are positive is not checked: reading them would wait for the GPU.)
        keep: tokens left on the axis, in [1, length of the axis]. The whole length: nothing changes.
        axis: 1 merges along H, 2 along W.

    Returns:
        x and size with `keep` tokens on the axis, in the dtypes they came in; means and sums are made in
        float32, or in float64 if x is float64.
        parent, (B, H, W) int64: the token of the new grid that each token went into, as its flat index
        `row * columns + column`.

    Raises: ValueError for another shape or dtype, or `keep` or `axis` out of range; it names the value.
    Source: merging iteratively, orthogonally in the spatial axes, is the paper's; this rule is our choice
        (merging similar tokens, weighted by size, is ToMe's idea, arXiv 2210.09461).
    """
    if x.ndim != 4 or not x.is_floating_point() or size.shape != x.shape[:3]:
        got = f"x {tuple(x.shape)}, {x.dtype}, size {tuple(size.shape)}"
        raise ValueError(f"{got}: they must be (B, H, W, C), floating, and (B, H, W)")
    if axis not in (1, 2):
        raise ValueError(f"axis={axis} must be 1 (merge along H) or 2 (merge along W)")
    if not 1 <= keep <= x.shape[axis]:
        raise ValueError(f"keep={keep} must lie in [1, {x.shape[axis]}], the length of axis {axis}")
    B, H, W, C = x.shape
    if keep == x.shape[axis]:
        return x, size, torch.arange(H * W, device=x.device).view(H, W).expand(B, H, W)
    # Along H is along W of the transposed grid, whose flat indices are column * keep + row.
    if axis == 1:
        x, size, parent = merge_axis(x.transpose(1, 2), size.transpose(1, 2), keep, axis=2)
        parent = parent % keep * W + parent // keep
        return x.transpose(1, 2), size.transpose(1, 2), parent.transpose(1, 2)
    # In float32 or better: half precision is too coarse for similarities that differ little, and for sums.
    token = x.to(torch.promote_types(x.dtype, torch.float32))
    mass = size.to(token.dtype)

    # How alike are neighbours? One number for each boundary of a line. Where a norm is 0 the dot product is
    # 0 as well, so any positive number below it will do.
    norm = torch.linalg.vector_norm(token, dim=-1)  # (B, H, W)
    dot = torch.linalg.vecdot(token[:, :, :-1], token[:, :, 1:])  # (B, H, W - 1)
    similar = dot / (norm[:, :, :-1] * norm[:, :, 1:]).clamp(min=torch.finfo(token.dtype).tiny)
    similar = similar.masked_fill((norm[:, :, :-1] == 0) & (norm[:, :, 1:] == 0), 1.0)

    # Boundary i lies between tokens i and i + 1, so a run starts at i + 1. A stable sort keeps ties in order.
    cut = similar.sort(dim=-1, stable=True).indices[..., : keep - 1]
    starts = torch.zeros(B, H, W, dtype=torch.int64, device=x.device).scatter_(-1, cut + 1, 1)
    # 0 0 1 1 1 2 ...: how many runs of the line have started so far.
    run = starts.cumsum(-1)
    parent = torch.arange(H, device=x.device)[:, None] * keep + run

    # A run becomes one token: nothing is thrown away here, only averaged. All rows are added up at once, into
    # one long list of the tokens that are left; `flat` is where each one goes.
    total = mass.new_zeros(B, H, keep).scatter_add_(-1, run, mass)
    flat = torch.arange(B, device=x.device)[:, None, None] * (H * keep) + parent  # over the whole batch
    weighted = (token * mass[..., None]).flatten(0, 2)
    merged = token.new_zeros(B * H * keep, C).index_add_(0, flat.flatten(), weighted)
    return merged.view(B, H, keep, C).div_(total[..., None]).to(x.dtype), total.to(size.dtype), parent


def merge_plan(H: int, W: int, keep: float, steps: int) -> list[tuple[int, int, int]]:
    """Which axis merges at which step, and the grid after it: a list of (axis, H, W), empty if `keep` is 1.

    The axes alternate: W, H, W, H. Each of the two shrinks to sqrt(keep) of its length, in equal
    portions over its own steps. A length is rounded to the nearest whole number, halves up, and is
    never below one; so a step may have nothing to do. It stays in the plan.

    >>> merge_plan(24, 24, keep=0.25, steps=4)
    [(2, 24, 18), (1, 18, 18), (2, 18, 12), (1, 12, 12)]

    Args: H, W >= 1, whole numbers, the grid; keep, the fraction of its tokens that is left, in (0, 1];
        steps >= 2, one for each axis at least.
    Raises: ValueError for a value out of its range.
    Source: "iterative" and "orthogonal" are the paper's; order, fractions and portions are our choice.
    """
    if min(H, W) < 1 or steps < 2 or not 0 < keep <= 1:
        raise ValueError(f"H={H}, W={W} must be >= 1, steps={steps} >= 2, and keep={keep} in (0, 1]")
    # Lengths by axis: at the beginning, and after the steps so far.
    full, now, plan = {1: H, 2: W}, {1: H, 2: W}, []
    for step in range(steps if keep < 1 else 0):
        axis = 1 if step % 2 else 2
        turn, turns = step // 2 + 1, (steps + axis - 1) // 2  # if `steps` is odd, W has one more
        shrunk = full[axis] * (1 - (1 - math.sqrt(keep)) * turn / turns)
        now[axis] = max(1, math.floor(shrunk + 0.5))
        plan.append((axis, now[1], now[2]))
    return plan


def follow(token: Tensor, parent: Tensor) -> Tensor:
    """Where each original token is after one more merge.

    Begin with `torch.arange(H * W)`: every token is in itself. After the last merge `features[token]` gives
    every original place the token that it ended up in: that is how merging is undone.

    Args: token (B, N) int64, the token that each of N original ones is in so far, as a flat index of
        the grid; parent (B, H, W), as `merge_axis` returns it for that grid.
    Returns: (B, N) int64, flat indices of the new grid. Source: our choice (bookkeeping).
    """
    return parent.flatten(1).gather(1, token)


# ==== 2. Pruning: the Spectrum Pruning Unit =================================================================
#
# Read the tokens of a picture one after the other and they are a signal, one for each channel. Its slow
# part is what neighbours tell about a token anyway; what a low-pass filter removes is what only the
# token itself knows.
#
#     tokens       5    5    5    9    5    5    5    5      eight tokens of one channel
#     slow part   4.8  4.5  6.2  7.5  6.2  4.5  4.8  5.5     DC and two of four frequencies
#     detail      0.2  0.5  1.2  1.5  1.2  0.5  0.2  0.5     three may stay: the 9 and its neighbours
#
# Two readings of "low-pass filter" are possible: keep the tokens that the filter passes, or those that it
# does not reproduce. The second loses less, on the toy and on a real model (docs/results.md).
#
# Why one dimension, when a picture has two? After the first cut there is no grid any more, only tokens in
# their order; and a row's neighbours in it are neighbours in the picture.


def low_pass(x: Tensor, cutoff: float, dim: int = 1) -> Tensor:
    """The slow part of a sequence: DC and the lowest `cutoff` of the other frequencies of the real FFT.

    A sequence of N values has N // 2 frequencies beside DC; `cutoff` * (N // 2) of them pass, rounded to the
    nearest whole number, halves up. If all pass, the result is `x` in float32, bit by bit (no transform);
    `cutoff` 0 leaves the mean. The work is that of an FFT.

    Args: x, floating, with at least one dimension and one value along `dim`; cutoff in [0, 1]; dim, along
        which to filter.
    Returns: float32, the shape of `x`. Raises: ValueError for another dtype or `cutoff`, or an empty `dim`.
    Source: that the filter is a low-pass one is the paper's; the transform and the cutoff are our choice.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[dim] == 0 or not 0 <= cutoff <= 1:
        got = f"x of shape {tuple(x.shape)}, {x.dtype}, cutoff={cutoff}"
        raise ValueError(f"{got}: x must be floating, not empty along dim={dim}, and cutoff in [0, 1]")
    N = x.shape[dim]
    passed = 1 + math.floor(cutoff * (N // 2) + 0.5)  # DC always passes
    if passed == N // 2 + 1:
        return x.float()
    # N values -> N // 2 + 1 frequencies, number 0 is DC.
    spectrum = torch.fft.rfft(x.float(), dim=dim)
    spectrum.narrow(dim, passed, spectrum.shape[dim] - passed).zero_()
    return torch.fft.irfft(spectrum, n=N, dim=dim)


def spectral_score(x: Tensor, cutoff: float = 0.5) -> Tensor:
    """Score each image token of a picture: the norm of what a low-pass filter along the tokens removes.

    A token that the filter reproduces from its neighbours is redundant; what it removes is detail that
    would be lost with the token. Neither attention nor similarities are asked, and position does not
    matter: shifting the tokens in a circle shifts their scores.

    Args: x (B, N, C) floating, in sequence order, N >= 1; cutoff as for `low_pass`.
    Returns: (B, N) float32, >= 0. Raises: ValueError for another rank, and what `low_pass` raises.
    Source: filter and position invariance are the paper's; to score the residual, not the slow part, is our
        choice (docs/results.md has the measurement of both directions).
    """
    if x.ndim != 3:
        raise ValueError(f"x {tuple(x.shape)} must be (B, N, C)")
    return (x.float() - low_pass(x, cutoff)).norm(dim=-1)


@functools.lru_cache(maxsize=32)
def projection(C: int, channels: int, device: torch.device) -> Tensor:
    """(C, channels) float32, random, the same in every call; no global random state is read or changed.

    To so few channels lengths stay nearly what they were (Johnson and Lindenstrauss, 1984), and the filter is
    linear, so the lengths of its residuals do, too. Source: our choice.
    """
    # It stays in the cache: a later call, outside of inference mode, may want to record gradients.
    with torch.inference_mode(False):
        numbers = torch.randn(C, channels, generator=torch.Generator().manual_seed(0), device="cpu")
        return (numbers / math.sqrt(channels)).to(device)


def spectral_prune(x: Tensor, keep: int, cutoff: float = 0.5, channels: int = 64) -> Tensor:
    """Choose the `keep` tokens with the highest spectral score; on a tie the lower index.

    In this order: tokens become float32; those of more than `channels` channels are multiplied by
    `projection`, so that a score costs the same in an LLM of any width; each token is divided by its
    Euclidean norm (a zero token stays zero), so that scaling one changes nothing; `spectral_score`;
    scores are rounded to whole multiples of 2^-14. Scores that differ by rounding errors alone then
    tie, whatever kernel made the tokens.

    Args: x (B, N, C) floating, the image tokens of a picture in sequence order; keep in [0, N]; cutoff
        as for `low_pass`; channels >= 1.
    Returns: (B, keep) int64, ascending; for keep = 0 an empty one, also for N = 0.
    Raises: ValueError for another rank or `keep` out of range, and what `low_pass` raises.
    Source: the paper's unit; projection, norm 1 and ties are our choice.
    """
    if x.ndim != 3 or not 0 <= keep <= x.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} must be (B, N, C), and keep={keep} in [0, N]")
    if keep == 0:
        return torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    # Half precision would overflow at the few huge tokens that large models have.
    token = x.float()
    if x.shape[2] > channels:
        token = token @ projection(x.shape[2], channels, x.device)  # (B, N, C) -> (B, N, channels)
    # To norm 1: one token of huge norm would ring through the filter and lift all others.
    token = token / token.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    score = (spectral_score(token, cutoff) * 2**14).round()
    # A stable sort leaves ties in their order, so the lower index wins. The second sort puts those that were
    # chosen back into sequence order, in which everything behind this expects them.
    order = score.sort(dim=1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=1).values


def inherit(size: Tensor, kept: Tensor) -> Tensor:
    """Pass the sizes of pruned tokens on: each to the nearest token that is kept, on a tie to the earlier.

    So no part of the picture loses its weight in attention, whatever is pruned: the neighbour takes it over.
    Kept 1 and 4 of six tokens of size 1: token 1 gets the sizes of 0, 1 and 2, token 4 those of 3, 4 and 5.

    Args: size (B, N), any dtype, left as it is; kept (B, K) int64, ascending, K >= 1, as `spectral_prune`
        returns it.
    Returns: (B, K), the sizes of those kept, in the dtype of `size` (sums are made in that dtype, float16 and
        bfloat16 in float32); they sum to what all sizes summed to. Source: our choice.
    """
    # `middle` is the last token that is nearer to its left neighbour than to its right one.
    middle = (kept[:, :-1] + kept[:, 1:]) // 2
    starts = torch.zeros_like(size, dtype=torch.int64).scatter_(1, middle + 1, 1)
    # 0 0 1 1 1 2 ...: the kept token that each token's size goes to.
    nearest = starts.cumsum(1)
    wide = size.float() if size.dtype in (torch.float16, torch.bfloat16) else size
    return wide.new_zeros(kept.shape).scatter_add_(1, nearest, wide).to(size.dtype)


# ==== 3. What both hooks share: settings, changes that are undone, proportional attention ===================

from transformers import vision_utils  # noqa: E402
from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS  # noqa: E402

# The name of the KV cache in every forward: `cache` since transformers 5.24, `past_key_values` before.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


@dataclass(frozen=True)
class LUVCConfig:
    """What is merged and pruned. Every default is our choice; docs/results.md has the measurements."""

    vision_keep: float = 0.75
    """Fraction of the grid that leaves the encoder, in (0, 1]; 24 x 24 become 21 x 21. 1.0: merger off."""
    vision_steps: int | None = None
    """Merges inside the encoder, along W, H, W, ..., at least 2, spread evenly over its blocks, at most
    one per block. None: one before every block but the first."""
    llm_keep: float | Sequence[float] | None = None
    """Fraction of a picture's tokens that each decoder layer processes, of what the encoder delivered, in
    [0, 1]: one for all layers, or one per layer, never rising. 1.0: pruner off. None: from 0.8 at the first
    layer it falls evenly to 0.4 at the last but one, and is 0 at the last."""
    sizes: bool = True
    """Proportional attention: does a token weigh in attention by what it stands for?"""
    merge: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]] = merge_axis
    """The function that merges along one axis: the contract is that of `merge_axis`."""
    prune: Callable[[Tensor, int], Tensor] = spectral_prune
    """The function that chooses: (tokens (B, N, C), keep) -> indices (B, keep), ascending."""

    def fractions(self, layers: int) -> list[float]:
        """`llm_keep` spelled out for each decoder layer. Raises: ValueError for what it cannot be."""
        # Our choice: with the merger's 0.75, 44 % of the token-layers, the paper's 2x (docs/results.md).
        falling = [0.8 - 0.4 * n / max(1, layers - 2) for n in range(layers - 1)]
        each = [*falling, 0.0] if self.llm_keep is None else self.llm_keep
        each = list(each) if isinstance(each, Sequence) else [each] * layers
        falls = each == sorted(each, reverse=True)  # a pruned token never comes back
        if len(each) != layers or not all(0 <= fraction <= 1 for fraction in each) or not falls:
            raise ValueError(f"llm_keep={self.llm_keep}, {layers} layers: one in [0, 1] or one each, falling")
        return each


class Hook(contextlib.ExitStack):
    """Changes a model in place and takes the changes back: a stack of what undoes them.

        with Hook(model): ...                        # goes in here and comes out at the end
        hook = Hook(model).attach(); hook.detach()   # the same without a block

    No line of transformers' modelling code is copied: modules get torch's hooks, or another attribute that
    hides that of their class.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
        self.replaced: dict[tuple[nn.Module, str], object] = {}  # (module, attribute): what it is now

    def attach(self):
        """Put the hooks in; returns self. Raises: ValueError, with the model as it was."""
        if self.replaced:
            raise ValueError(f"this {type(self).__name__} is attached already; detach() it first")
        if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in self.model.modules()):
            raise ValueError("the model is compiled; LUVC needs eager mode, load the model anew")
        try:
            self.hook()
        except BaseException:  # no half-attached model
            self.close()
            raise
        return self

    def __exit__(self, *exception):
        """Take the hooks out: the model is what it was. Without effect if not attached.

        Raises: ValueError if something else was put on top, since that would be lost; nothing changes.
        """
        for (module, name), new in self.replaced.items():
            if module.__dict__.get(name) is not new:
                raise ValueError(f"undo first what was done to {type(module).__name__}.{name} since attach()")
        self.replaced = {}
        return super().__exit__(*exception)

    __enter__, detach = attach, contextlib.ExitStack.close  # which calls __exit__

    def replace(self, module: nn.Module, name: str, new) -> None:
        """Give a module another attribute; it may have one of its own: accelerate, too, replaces forwards."""
        attributes = module.__dict__  # not by setattr: a module would become a submodule
        if name in attributes:
            self.callback(attributes.__setitem__, name, attributes[name])
        else:
            self.callback(attributes.pop, name)
        attributes[name] = new
        self.replaced[module, name] = new

    def occupy(self, module: nn.Module) -> None:
        """Claim an encoder or an LLM. Raises: ValueError if another hook has it; models may share modules."""
        if "_luvc" in module.__dict__:
            raise ValueError(f"LUVC is attached to this {type(module).__name__} already; detach() it first")
        self.replace(module, "_luvc", self)

    def __reduce__(self):
        raise ValueError("a model cannot be copied or pickled while LUVC is attached; detach() it first")


def move(device: torch.device, *holders) -> None:
    """Take the tensors that these objects hold to a device: `device_map` spreads layers over several."""
    for holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(holder, name, value.to(device))


# Proportional attention is ToMe's (arXiv 2210.09461); to go on with it in the LLM is our choice. A token of
# size s stands for s tokens, so a query has to meet its key s times: softmax(q . k * scale + log s). A bias
# would need a mask, and with a mask flash kernels do not run. But the sum fits into the product, as one more
# channel of every head:
#
#     [q, 1 / scale] . [k, log s] * scale  =  q . k * scale + log s
#
# The kernel sees ordinary queries and keys. One channel would do, but kernels want head sizes in steps of 8,
# and values as wide as keys. It costs KV cache: 6 % at head size 128, 12 % at 64. With `sizes=False` none of
# this happens, and masks hide fillers (section 4) instead: skip the four functions at first reading.
EXTRA = 8


def size_channels(size: Tensor) -> Tensor:
    """What keys of these sizes (B, K) get: log(size), and zeros; (B, 1, K, EXTRA), for all heads.

    A key of size 0 (a filler, section 4) weighs exp(-1000), which is 0, and fits into half precision.
    """
    return nn.functional.pad(size.log().clamp(min=-1e3)[:, None, :, None], (0, EXTRA - 1))


def widen(x: Tensor, channels: Tensor) -> Tensor:
    """Keys, or values, (B, heads, K, D) with these channels behind them; behind values they mean nothing."""
    return torch.cat([x, channels.to(x).expand(-1, x.shape[1], -1, -1)], dim=-1)


def sized_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """Any attention of transformers, in which a key of size s weighs as much as s equal keys of size 1.

    Args: as transformers calls its attention functions, query (B, heads, K, D). A KV cache has widened keys
        and values; where there is none, `key_channels` come from the caller, or from the module.
    Returns: (B, K, heads, D), and the attention weights if the kernel gives any.
    """
    # Kernels read what they need from the module: they get the one whose config still names them.
    plain, D, channels = module.plain_attention, query.shape[-1], kwargs.pop("key_channels", None)
    eager = getattr(sys.modules[type(plain).__module__], "eager_attention_forward", None)
    attend = ATTENTIONS.get_interface(plain.config._attn_implementation, eager)
    if key.shape[-1] == D:
        channels = module.key_channels() if channels is None else channels
        key, value = widen(key, channels), widen(value, channels)
    query = nn.functional.pad(query, (0, EXTRA), value=1 / kwargs["scaling"])
    output, weights = attend(plain, query, key, value, attention_mask, **kwargs)
    return output[..., :D], weights


def weigh_keys(hook: Hook, attention: nn.Module, channels: Callable | None = None) -> None:
    """Let this attention module, and no other, use `sized_attention`; channels: () -> those of its keys."""
    config = copy.copy(attention.config)
    config._attn_implementation = "luvc"
    hook.replace(attention, "plain_attention", copy.copy(attention))
    hook.replace(attention, "key_channels", channels)
    hook.replace(attention, "config", config)


ATTENTIONS.register("luvc", sized_attention)


# ==== 4. The Pruner: LLM layers on a subset of their positions ==============================================
#
# Everything outside the layers keeps seeing the *logical* sequence: input_ids, attention mask, position ids,
# logits, cache length, hidden_states. A decoder layer *physically* processes a subset: gather what is kept,
# run the layer as it is, scatter its output back. A pruned token is no longer updated; it rides along in the
# residual stream.
#
#     logical   | t t i i i i i i i i t t t |      t text, i image token
#     layer 0   | t t i i i . . i i . t t t |
#     layer 5   | t t i . i . . i i . t t t |      what the layer computes is a shorter causal sequence;
#     last one  | t t . . . . . . . . t t t |      rotary positions are those of the logical sequence
#
# (Pruning inside the LLM is FastV's idea, arXiv 2403.06764, layer after layer PyramidDrop's, 2410.17247.)
#
# Samples of a batch may keep differently many positions. Shorter ones are filled up at their end, and the KV
# cache remembers the logical position of each column that it stores, -1 for a filler. So the mask of any
# later call is the caller's, read at these positions; where it hides nothing that is stored there is none,
# and flash kernels run. (What is masked is not processed, so it is not stored; fillers have size 0.)
#
#     _run_model     which ids are placeholders of pictures in this call?
#     _run_decoder   what can be pruned? A Prompt goes from layer to layer
#     run_layer      for each layer: prune, gather, run, scatter
#     PrunedLayer    what the layer's attention calls: the KV cache of one layer


@dataclass
class Pictures:
    """Pictures of equally many tokens. They are pruned together, each by itself."""

    count: int
    """Tokens of each that the encoder delivered: fractions are fractions of these."""
    where: Tensor
    """(n, k) int64: the tokens of each that are still kept, ascending, as `sample * S + position`."""
    samples: list[int]
    """The sample of each."""


class PrunedLayer(DynamicLayer):
    """The KV cache of one decoder layer: it says how many positions were seen, not how many it stored.

    transformers computes masks and rotary positions from that logical length.
    """

    def __init__(self):
        super().__init__()
        self.seen = 0  # logical length
        self.positions: list[Tensor] = []  # (B, columns) of each call: logical positions, -1 for a filler
        self.fillers = False  # are there any among them?
        self.prompt: Prompt | None = None  # what the next keys and values belong to

    def get_seq_length(self) -> int:
        return self.seen

    def hides(self, shown: Tensor) -> bool:
        """Does a mask, shown (B, seen + S) bool, hide anything that is stored?"""
        if not self.positions:
            return False
        self.positions = [torch.cat(self.positions, dim=1)]
        at = self.positions[0].to(shown.device)
        return bool((~shown.gather(1, at.clamp(min=0)) & (at >= 0)).any())

    def expect(self, prompt: "Prompt") -> None:
        """Say what the next keys and values belong to."""
        self.prompt, self.seen = prompt, self.seen + prompt.size.shape[1]
        self.positions.append(prompt.positions)
        self.fillers = self.fillers or prompt.fillers

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        prompt, self.prompt = self.prompt, None
        if prompt is None:
            raise ValueError("this KV cache was filled under LUVC: attach LUVC again, or begin a new one")
        if prompt.channels is not None:
            key_states, value_states = (widen(x, prompt.channels) for x in (key_states, value_states))
        return super().update(key_states, value_states)

    # Three ways to pick samples: of beams, of contrastive search, of several answers to one prompt.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.positions = [torch.cat(self.positions, dim=1)[beam_idx]]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.positions = [torch.cat(self.positions, dim=1)[indices]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.positions = [torch.cat(self.positions, dim=1).repeat_interleave(repeats, dim=0)]

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("LUVC cannot crop its KV cache, as assisted and prompt-lookup decoding would")


class Prompt:
    """What one forward call of the LLM processes, layer by layer.

    How *many* tokens each layer keeps is known on the host from the start, so no layer waits for the
    device; *which* ones is decided on the device, when a layer's input is there.

    Args:
        size: (B, S) float32, how many tokens each position stands for; 0 if it is not processed (masked, or
            another copy stands for it).
        pictures: list of `Pictures`, what can be pruned.
        text_lengths: list of int; per sample, how many positions every layer processes.
        shown: (B, start + S) bool, what the caller's mask shows, `start` positions of earlier calls first.
        masked: does it hide anything that is stored?
        weigh: proportional attention?
    """

    def __init__(self, size: Tensor, pictures: list, text_lengths: list, shown: Tensor, masked: bool, weigh):
        self.size, self.pictures, self.text_lengths, self.weigh = size, pictures, text_lengths, weigh
        self.start, self.masked = shown.shape[1] - size.shape[1], masked
        self.shown = nn.functional.pad(shown, (0, 1))  # index -1, of fillers, finds False
        self.rows = torch.arange(len(size), device=size.device)[:, None]
        self.delivered, self.layers = size, []  # sizes (B, S): before the first layer, of each layer so far
        self.select()

    def prune(self, hidden: Tensor, fraction: float, choose: Callable[[Tensor, int], Tensor]) -> None:
        """Keep `fraction` of each picture's tokens, of `hidden` (B, S, C), rounded to the nearest, halves up.

        A pruned token passes its size on (`inherit`), if any token of its picture is kept.
        """
        before = self.size
        for picture in self.pictures:
            where, keep = picture.where, math.floor(fraction * picture.count + 0.5)
            if keep < where.shape[1]:
                kept = choose(hidden.flatten(0, 1)[where], keep)  # (n, k, C) -> (n, keep)
                picture.where, size = where.gather(1, kept), self.size.flatten()
                left = inherit(size[where], kept) if keep else size.new_empty(0)
                size = size.index_fill(0, where.flatten(), 0.0)  # of a layer before: stays as it is
                self.size = size.index_copy(0, picture.where.flatten(), left.flatten()).view_as(before)
        if self.size is not before:
            self.select()

    def select(self) -> None:
        """From the sizes: which positions a layer processes, and what its KV cache has to know of them.

        Sets index, (B * K) as `sample * S + position`, ascending per sample, then fillers; None if all are
        processed; positions (B, K), logical, -1 for fillers; fillers: are there any; channels of the keys.
        """
        (B, S), lengths = self.size.shape, list(self.text_lengths)
        for picture in self.pictures:
            for sample in picture.samples:
                lengths[sample] += picture.where.shape[1]
        K = max(1, *lengths)  # if everything is masked: one filler
        self.fillers, self.index = min(lengths) < K, None
        position, size = torch.arange(S, device=self.size.device).expand(B, S), self.size
        if min(lengths) < S:  # positions of size 0 behind all others; a stable sort leaves both in order
            position = size.clamp(max=1).sort(dim=1, descending=True, stable=True).indices[:, :K]
            size = size.gather(1, position)
            self.index = (position + self.rows * S).flatten()
        self.positions = position + self.start
        if self.fillers:
            self.positions = self.positions.masked_fill(size == 0, -1)
        self.channels = size_channels(size) if self.weigh else None

    def gather(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, K, C), what is processed."""
        return x.flatten(0, 1).index_select(0, self.index).view(len(x), -1, x.shape[-1])

    def mask(self, store: PrunedLayer | None, x: Tensor, config) -> Tensor | None:
        """transformers' own mask for x (B, K, C), behind what is stored; none where a kernel needs none."""
        (B, K, _), shown, kernel = x.shape, None, config._attn_implementation
        past = store.keys.shape[-2] if store is not None and store.is_initialized else 0
        hides = past > 0 and (self.masked or (store.fillers and not self.weigh))
        if hides:
            store.positions = [torch.cat(store.positions, dim=1)]  # (B, past + K)
            shown = self.shown[self.rows, store.positions[0]]
        if K == 1 and (kernel == "sdpa" or not hides):  # a word that was generated: no causal part
            return shown[:, None, None] if hides else None
        more = {"allow_is_causal_skip": not hides, "dtype": x.dtype, "device": x.device, "config": config}
        lengths = {"batch_size": B, "q_length": K, "kv_length": past + K, "q_offset": past}
        return MASKS[kernel](attention_mask=shown, **lengths, **more)


def run_layer(plain: Callable, number: int, pruner: "Pruner", hidden: Tensor, **kwargs) -> Tensor:
    """Prune, gather, run, scatter: a decoder layer on the positions that are kept. This is the whole method.

    Args: plain, the layer's own forward; its number; pruner; hidden (B, S, C), the logical sequence; kwargs,
        what transformers hands to a layer, and the `prompt`.
    Returns: (B, S, C): what was processed updated, the rest as it came. (What stands at a filler means
        nothing: nobody reads it again.)
    """
    prompt, cache = kwargs.pop("prompt"), kwargs[CACHE]
    move(hidden.device, prompt, *prompt.pictures)
    prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)
    prompt.layers.append(prompt.size)
    x = hidden if prompt.index is None else prompt.gather(hidden)
    store = None if cache is None else cache.layers[number]
    if store is not None:
        store.expect(prompt)
    elif prompt.weigh:  # no KV cache will widen the keys
        kwargs["key_channels"] = prompt.channels
    kwargs["attention_mask"] = prompt.mask(store, x, pruner.decoder.config)
    kwargs["position_ids"] = None  # FlashAttention would take gaps in them for the seams of several sequences
    if prompt.index is not None:  # rotary positions stay those of the logical sequence
        cos_sin = torch.cat(kwargs["position_embeddings"], dim=-1).to(x.device).expand(len(x), -1, -1)
        kwargs["position_embeddings"] = prompt.gather(cos_sin).chunk(2, dim=-1)
    out = plain(x, **kwargs)
    if prompt.index is None:
        return out
    rows = hidden.to(out.device).flatten(0, 1)
    return rows.index_copy(0, prompt.index.to(out.device), out.flatten(0, 1)).view_as(hidden)


# From the model to its LLM, within one call: (input_ids, ids of placeholders). Every thread has its own.
CALL: ContextVar = ContextVar("luvc_call", default=None)


class Pruner(Hook):
    """The Spectrum Pruning Unit as a hook: `with Pruner(model): model.generate(**inputs)`.

    A second turn on the same KV cache works. It sees all text of the first turn and, in each layer, the
    image tokens that this layer kept: none in the last. Pruned tokens never come back.

    Args:
        model: a Hugging Face VLM in the layout of LLaVA: `base_model` sees input_ids and encodes pictures,
            `get_decoder()` has `layers` with `self_attn`.
        config: the settings; those of the merger are not used.
        find_copies: behind a Merger, the function of that name (section 5): of the copies of a merged token
            one is kept.
    Raises: ValueError for a decoder that cannot be pruned, and when attached for a call that would go wrong.
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig(), find_copies=None):
        super().__init__(model)
        self.config, self.find_copies, self.decoder = config, find_copies, self.model.get_decoder()
        self.fractions = config.fractions(len(self.decoder.layers))
        self.latest: Prompt | None = None  # of the latest prefill that was completed
        check_decoder(self.decoder.config)

    def hook(self) -> None:
        if min(self.fractions) == 1 and self.find_copies is None:  # nothing to do
            return
        self.occupy(self.decoder)
        for module, run in ((self.model.base_model, self._run_model), (self.decoder, self._run_decoder)):
            # What torch.compile made of the model before does not look into it.
            self.replace(module, "forward", torch.compiler.disable(functools.partial(run, module.forward)))
        for number, layer in enumerate(self.decoder.layers):
            # At `forward`, inside of the layer's hooks: with these transformers collects hidden_states.
            self.replace(layer, "forward", functools.partial(run_layer, layer.forward, number, self))
            if self.config.sizes:
                weigh_keys(self, layer.self_attn)

    def _run_model(self, plain: Callable, *args, **kwargs):
        """Note input_ids, and the kinds of pictures in this call; then the model's own forward."""
        if len(args) > 1:
            raise ValueError("LUVC finds pictures by name: pass pixel_values and masks as keyword arguments")
        encoded = kwargs | (kwargs.get("mm_encoder_outputs") or {})  # `generate` may have encoded ahead
        given, config = {name for name, value in encoded.items() if value is not None}, self.model.config
        kinds = [config.image_token_id] if given & {"pixel_values", "image_hidden_states", "image"} else []
        kinds += [config.video_token_id] if given & {"pixel_values_videos", "video"} else []
        context = copy_context()  # what is noted in it ends with this call
        context.run(CALL.set, (args[0] if args else kwargs.get("input_ids"), kinds))
        return context.run(plain, *args, **kwargs)

    def _run_decoder(self, plain: Callable, *args, **kwargs):
        """Find the pictures, let the KV cache count logical positions; then the LLM's own forward."""
        ids, kinds, decoder = args[0] if args else kwargs.get("input_ids"), [], self.decoder
        if ids is None:  # else somebody calls the LLM alone, with text
            ids, kinds = CALL.get() or (None, [])
        cache = kwargs.pop("past_key_values", kwargs.get(CACHE))
        start, mask = getattr(cache, "get_seq_length", int)(), kwargs.get("attention_mask")
        check_call(self.model, ids, mask, start, kwargs)
        (B, S), shown = ids.shape, torch.ones(len(ids), start + ids.shape[1], device=ids.device) > 0
        shown = shown if mask is None else mask[:, : start + S] != 0
        # The host waits for the device here, where transformers looks into the mask, too, and for pictures.
        masked = mask is not None and not bool(shown.all())
        here = shown[:, start:].cpu() if masked else torch.ones(B, S, dtype=torch.bool)
        size, pictures, text_lengths = shown[:, start:].float(), [], here.sum(1).tolist()
        if kinds:
            size, pictures, text_lengths = self._find_pictures(ids, kinds, here, kwargs["inputs_embeds"])
        wanted = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        cache = adopt(cache, decoder) if cache is not None or wanted else None
        # Every layer stores a part of what the first one stores.
        masked = masked and cache is not None and cache.layers[0].hides(shown)
        prompt = Prompt(size, pictures, text_lengths, shown, masked, self.config.sizes)
        output = plain(*args, **kwargs | {"attention_mask": None, CACHE: cache, "prompt": prompt})
        self.latest = prompt if S > 1 or kinds else self.latest
        return output

    def _find_pictures(self, ids: Tensor, kinds: list, here: Tensor, embeds: Tensor) -> tuple:
        """Where are the pictures of a prompt? Runs of placeholders, each of which is a signal of its own.

        Args: ids (B, S); kinds, ids of placeholders; here (B, S) bool on the host, what is not masked; embeds
            (B, S, C).
        Returns: what `Prompt` wants: sizes (B, S), a list of `Pictures`, text lengths.
        Raises: ValueError if a prompt ends with a picture.
        """
        ids, S, device, size = ids.cpu(), ids.shape[1], embeds.device, here.float().flatten()
        image = torch.isin(ids, torch.tensor(kinds)) & here  # (B, S): placeholders
        last = S - 1 - here.byte().flip(1).argmax(1)
        if image.gather(1, last[:, None]).any():
            raise ValueError("a prompt ends with a picture, but the answer begins there: add text")
        before = nn.functional.pad(ids * image, (1, 0))[:, :-1]
        where = image.flatten().nonzero()[:, 0]
        run = (image & (before != ids)).flatten().cumsum(0)[where]  # 1 1 1 2 2 ...: whose each placeholder is
        if self.find_copies is not None and len(where):
            middle, copies = self.find_copies(embeds.flatten(0, 1)[where.to(device)], run)
            size[where] = 0.0
            where, run = where[middle], run[middle]
            size[where] = copies.float()
        counts, pictures = run.bincount(), []
        for count in sorted(set(counts.tolist()) - {0}):
            group = where[counts[run] == count].view(-1, count)
            pictures.append(Pictures(count, group.to(device), (group[:, 0] // S).tolist()))
        return size.view_as(here).to(device), pictures, (here & ~image).sum(1).tolist()


def adopt(cache, decoder: nn.Module) -> DynamicCache:
    """The KV cache of a call, the caller's or a new one: from now on its layers count logical positions.

    Raises: ValueError for another kind of cache, or one that was filled without LUVC; it is as it was.
    """
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    kinds = {type(layer) for layer in cache.layers} if isinstance(cache, DynamicCache) else {type(cache)}
    if kinds - {DynamicLayer, PrunedLayer} or (kinds == {DynamicLayer} and cache.get_seq_length()):
        raise ValueError(f"{type(cache).__name__}: LUVC needs a DynamicCache, empty or filled under LUVC")
    if kinds != {PrunedLayer}:
        cache.layers = [PrunedLayer() for _ in decoder.layers]
    return cache


# Refused before anything is changed, since it would go wrong in silence. A sliding window counts stored
# columns, but a pruned layer stores fewer of them than positions. Linear attention has no keys to leave out.
# A mask made by the caller has one column per position, and so no layer's shape.


def check_decoder(config) -> None:
    """Raises: ValueError for an LLM that cannot be pruned."""
    known = ["llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text"]
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    layers, kernel = set(getattr(config, "layer_types", None) or [window]), config._attn_implementation
    runs = kernel in MASKS and kernel != "flex_attention"
    if config.model_type not in known or layers != {"full_attention"} or not runs:
        got = f"decoder {config.model_type!r}, layers of kind {sorted(layers)}, attention {kernel!r}"
        raise ValueError(f"{got}: use one of {known}, full_attention, and sdpa, flash_attention_2 or eager")


def check_call(model: nn.Module, ids: Tensor | None, mask, start: int, kwargs: dict) -> None:
    """Raises: ValueError for a call of the LLM that would go wrong."""
    if model.training:
        raise ValueError("the model is in training mode, but LUVC is for inference: model.eval()")
    if ids is None:
        raise ValueError("LUVC finds pictures by input_ids; call the model with these, not inputs_embeds")
    if mask is not None and (getattr(mask, "ndim", 0) != 2 or mask.shape[1] < start + ids.shape[1]):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        want = f"None or 2-D, of {start} + {ids.shape[1]} columns, and the KV cache a DynamicCache"
        raise ValueError(f"attention_mask {got} must be {want}")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q packs several sequences into a row; LUVC needs one per row")


# ==== 5. The Merger: vision encoders on fewer and fewer tokens ==============================================
#
# The LLM expects one feature for each placeholder, and computes positions from that. So at the end of the
# encoder a merged token is *copied* to every place that it stands for: shapes stay as they are, and whatever
# comes behind the projector (rows that are cut off, newlines, DeepStack, beams) works on as before. s equal
# keys weigh in attention what one key of size s weighs; so the Pruner keeps one of them, the middle one,
# with a size, and every layer of the LLM runs on fewer positions from the first one on.
#
#     a line of the grid       a    b    b    b    b    c        four tokens were merged into b
#     what the LLM gets        a    b    b    b    b    c
#     what its layers process  a         b              c        sizes 1 4 1
#
# Many encoders make an image token of 2 x 2 patches (`per_side` is 2). The merger merges whole image tokens,
# each patch with the patch in the same corner of the neighbour: grids stay even, and what is equal is merged
# into what it was. (All of this is our choice.)
#
#     _begin            before the encoder: how large are the pictures?
#     _before_block     before a block whose turn it is: merge, so that it runs on fewer tokens
#     _after_projector  behind a projector: a copy for every place

# The pictures in the encoder, a `Tiles`. Every thread has its own.
PICTURES: ContextVar = ContextVar("luvc_pictures", default=None)


class Grid:
    """All pictures, tiles or frames of one size in a call: n grids of H x W image tokens, merged together."""

    def __init__(self, n: int, H: int, W: int, config: LUVCConfig, steps: int, device):
        self.plan, self.done, self.rule = merge_plan(H, W, config.vision_keep, steps), 0, config.merge
        self.size = torch.ones(n, H, W, device=device)  # (n, h, w), as far as it is merged
        self.token = torch.arange(H * W, device=device).expand(n, -1)  # (n, H * W), see `follow`

    def merge(self, x: Tensor) -> Tensor:
        """The next step of the plan: (n, h, w, C) -> the same with h or w smaller."""
        axis, *shape = self.plan[self.done]
        x, self.size, parent = self.rule(x, self.size, shape[axis - 1], axis)
        self.token, self.done = follow(self.token, parent), self.done + 1
        return x

    def mean(self, x: Tensor) -> Tensor:
        """(n * H * W, C), of the image tokens at first -> (n, h, w, C), means over what was merged."""
        x, (n, h, w) = x.view(*self.token.shape, -1), self.size.shape
        index = self.token[..., None].expand_as(x)
        mean = x.new_zeros(n, h * w, x.shape[-1]).scatter_reduce(1, index, x, "mean", include_self=False)
        return mean.view(n, h, w, -1)

    def copies(self, x: Tensor) -> Tensor:
        """(n, h * w, C) -> (n, H * W, C): for each place its token."""
        if x.shape[1] != self.size[0].numel():
            raise ValueError(f"{x.shape[1]} features of a picture: layer and strategy must be the config's")
        return x.gather(1, self.token[..., None].expand(-1, -1, x.shape[-1]))


class Tiles:
    """The pictures of one call of the encoder, tiles of one size: x is (n, prefix + patches, C), row by row.

    `to_grids` and `from_grids` lead from there to (n, h, w, per_side * per_side * C) for each grid, and back.
    """

    def __init__(self, family: "Family", grids: list[Grid], shapes: list[tuple[int, int]]):
        self.family, self.grids = family, grids
        self.tokens: list[int] = []  # image tokens in each block, from the first merge on
        # The grid that each picture, tile or frame is in: `shapes` are theirs, in the order of the call.
        self.number = [[*dict.fromkeys(shapes)].index(shape) for shape in shapes]

    def to_grids(self, x: Tensor) -> list[Tensor]:
        (n, h, w), side = self.grids[0].size.shape, self.family.per_side
        x = x[:, self.family.prefix :].reshape(n, h, side, w, side, -1)
        return [x.transpose(2, 3).reshape(n, h, w, -1)]

    def from_grids(self, parts: list[Tensor], x: Tensor) -> Tensor:
        (n, h, w, _), side = parts[0].shape, self.family.per_side
        patches = parts[0].reshape(n, h, w, side, side, -1).transpose(2, 3)
        return torch.cat([x[:, : self.family.prefix], patches.reshape(n, h * w * side**2, -1)], dim=1)

    def merge(self, x: Tensor) -> Tensor:
        """The next step of the plan, for all pictures: encoder tokens -> fewer encoder tokens."""
        move(x.device, self, *self.grids)
        parts = [grid.merge(part) for grid, part in zip(self.grids, self.to_grids(x), strict=True)]
        self.arrange()
        return self.from_grids(parts, x)

    def copies(self, features: Tensor) -> Tensor:
        """What a projector made of merged tokens -> a row for each image token of the plain model."""
        move(features.device, self, *self.grids)
        prefix = self.family.prefix_tokens
        return torch.cat([features[:, :prefix], self.grids[0].copies(features[:, prefix:])], dim=1)

    def arrange(self) -> None:
        """What goes with the grids as they are by now: here the sizes, for the encoder's attention.

        Our choice; on a real encoder features come nearer to those of the full one (docs/results.md).
        """
        size = self.grids[0].size[..., None].expand(-1, -1, -1, self.family.per_side**2)
        prefix = size.new_ones(len(size), self.family.prefix, 1)
        self.channels = size_channels(self.from_grids([size], prefix)[..., 0])  # of (n, prefix + patches)

    def arguments(self, number: int, x: Tensor, kwargs: dict) -> dict:
        """What block `number` gets beside the tokens x."""
        return kwargs


class Packed(Tiles):
    """Pictures of any size in one sequence, x (patches, C), as Qwen's encoders have it: image token by image
    token, in Qwen2.5-VL in the order of windows. Blocks get rotary positions, and where frames or windows
    end; transformers' own functions work these out, for the smaller pictures that there are by now.

    Sizes do not weigh in these encoders' attention: without flash-attn transformers runs it frame by
    frame, so every frame would need channels of its own, in every block.
    """

    def __init__(self, family: "Family", grids: list[Grid], shapes: list[tuple[int, int]]):
        super().__init__(family, grids, shapes)
        side, thw, device = family.per_side, self.arrange(), grids[0].size.device
        # The encoder has frame after frame, here those of one size stand together.
        grid_of = torch.tensor(self.number).repeat_interleave(torch.tensor(shapes).prod(1))  # image tokens
        self.order = self.whole = self.order[grid_of.argsort(stable=True).argsort().to(device)]
        # Row and column of each patch: (image tokens, per_side * per_side * 2), of each grid.
        places = vision_utils.get_vision_position_ids(thw, side).view(-1, side * side * 2)
        self.places = places.to(device, torch.float32).split([grid.token.numel() for grid in grids])

    def arrange(self) -> Tensor:
        vision, side, device = self.family.vision, self.family.per_side, self.grids[0].size.device
        thw = torch.tensor([[n, h * side, w * side] for n, h, w in (grid.size.shape for grid in self.grids)])
        self.frames, self.cos_sin = vision_utils.get_vision_cu_seqlens(thw).to(device), None
        self.order = torch.arange(int(thw.prod(1).sum()) // side**2, device=device)
        if hasattr(vision, "fullatt_block_indexes"):
            sizes = vision.window_size, vision.patch_size
            order, windows = vision_utils.get_vision_window_index(thw, side, *sizes)
            self.order, self.windows = order.to(device), windows.to(device)
        return thw

    def to_grids(self, x: Tensor) -> list[Tensor]:
        x = x.reshape(len(self.order), -1)[self.order.argsort()]
        parts = x.split([grid.size.numel() for grid in self.grids])
        return [part.view(*grid.size.shape, -1) for part, grid in zip(parts, self.grids, strict=True)]

    def from_grids(self, parts: list[Tensor], x: Tensor) -> Tensor:
        rows = torch.cat([part.flatten(0, 2) for part in parts])[self.order]
        return rows.view(len(rows) * self.family.per_side**2, -1)

    def copies(self, features: Tensor) -> Tensor:
        move(features.device, self, *self.grids)
        parts = zip(self.grids, self.to_grids(features), strict=True)
        rows = [grid.copies(part.flatten(1, 2)).flatten(0, 1) for grid, part in parts]
        return torch.cat(rows)[self.whole]

    def arguments(self, number: int, x: Tensor, kwargs: dict) -> dict:
        if self.cos_sin is None:  # a position is the mean over what was merged; it need not be a whole number
            pairs = zip(self.grids, self.places, strict=True)
            means = [grid.mean(place.to(x.device)) for grid, place in pairs]
            self.cos_sin = self.family.vision.rotary_pos_emb(x, self.from_grids(means, x))
        full = number in getattr(self.family.vision, "fullatt_block_indexes", [number])
        ends = self.frames if full else self.windows
        # FlashAttention's max_seqlen stays: the plain model's longest frame is an upper bound, which will do.
        return kwargs | {"cu_seqlens": ends, "position_embeddings": self.cos_sin}


# A copy is told by its number, not by being equal: two pictures may be equal, too, or the blank parts of one,
# and then it is a matter of rounding whether their rows are. The number of a merged token stands in its first
# 32 channels, one binary digit in the last bit of each, behind a mark by which other rows (LLaVA-NeXT's
# newlines) are told from it. That changes a channel by one unit in the last place at most, which no model
# notices.
DIGITS, MARK = 32, 0x5EED
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes as a float


def number_rows(x: Tensor) -> Tensor:
    """Write mark and number (modulo 2^16) of each row of x (..., C), C >= 32, into the last bits of x.

    Source: our choice.
    """
    number = torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1) % 2**16 + (MARK << 16)
    digits = number >> torch.arange(DIGITS, device=x.device) & 1
    bits = x[..., :DIGITS].contiguous().view(INTEGERS[x.element_size()])
    numbered = torch.cat([(bits & ~1 | digits.to(bits.dtype)).view(x.dtype), x[..., DIGITS:]], dim=-1)
    return x + (numbered - x).detach()  # exactly `numbered`, with the gradients of x


def find_copies(rows: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are copies of one merged token? Those of a picture that have one number, and are equal.

    Args: rows (N, C), floating; run (N) int64, on the host: the picture of each.
    Returns: on the host, the index of the middle one of each token's rows, ascending, and how many there are
        (of an even number the first of the two middle ones). A row that something changed stands for itself,
        and parts the other rows of its token in two.
    Source: our choice.
    """
    bits = rows[:, :DIGITS].contiguous().view(INTEGERS[rows.element_size()]).long() & 1
    number = (bits << torch.arange(DIGITS, device=rows.device)).sum(-1).cpu()
    alone = ~torch.arange(len(rows))  # -1, -2, ...
    token = torch.where(number >> 16 == MARK, (run << 16) + number % 2**16, alone)
    order = token.argsort(stable=True)  # the rows of a token stand together
    sorted_rows = rows[order.to(rows.device)]
    changed = (sorted_rows[1:] != sorted_rows[:-1]).any(-1).cpu() | (token[order].diff() != 0)
    copies = nn.functional.pad(changed.cumsum(0), (1, 0)).bincount()
    middle, index = order[copies.cumsum(0) - copies + (copies - 1) // 2].sort()
    return middle, copies[index]


class Merger(Hook):
    """The Orthogonal Iterative Merger as a hook: `with Merger(model): model.generate(**inputs)`.

    Alone it makes the encoder faster; features are as many as ever, merged ones as copies.

    Args: model, a Hugging Face VLM of a supported family (`family_of`); config, the settings, of which
        those of the pruner are not used.
    Raises: ValueError for an unsupported model, or settings that do not fit its blocks.
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig()):
        super().__init__(model)
        self.config, self.family = config, family_of(self.model)
        blocks, off = len(self.family.blocks), config.vision_keep == 1
        self.steps = steps = blocks - 1 if config.vision_steps is None else config.vision_steps
        if not 0 < config.vision_keep <= 1 or not (off or 2 <= steps <= blocks):
            got = f"vision_keep={config.vision_keep}, vision_steps={steps}"
            raise ValueError(f"{got} must lie in (0, 1], and in [2, {blocks}], at most one merge per block")
        # Our choice: the merges are spread evenly over the blocks, `steps` of them before these blocks. The
        # first block always sees the whole picture: before it, tokens are pixels and no features.
        self.merges = [] if off else [(step + 1) * blocks // (steps + 1) for step in range(steps)]
        self.latest: Tiles | None = None  # the pictures that were encoded last

    def hook(self) -> None:
        if not self.merges:
            return
        family, first = self.family, self.merges[0]
        self.occupy(family.vision)
        self.callback(PICTURES.set, None)  # nothing of the model outlives the hook
        self.callback(family.vision.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        # Blocks before the first merge run as they are; the others get what fits fewer tokens.
        for number, block in enumerate(family.blocks[first:], first):
            run = functools.partial(self._before_block, number)
            self.callback(block.register_forward_pre_hook(run, with_kwargs=True).remove)
            if self.config.sizes and family.patch_size:
                weigh_keys(self, attention_of(block), lambda: PICTURES.get().channels)
        for projector in family.projectors:
            self.callback(projector.register_forward_hook(self._after_projector).remove)

    def _begin(self, vision: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the encoder: how many pictures are there, and how large are they?"""
        pixels, side, make = (*args, *kwargs.values())[0], self.family.per_side, Tiles
        if self.family.patch_size:
            edges = zip(pixels.shape[-2:], self.family.patch_size, strict=True)
            shapes = [tuple(pixel // patch // side for pixel, patch in edges)] * len(pixels)
        else:
            make, grid_thw = Packed, kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            shapes = [(h // side, w // side) for t, h, w in grid_thw.tolist() for _ in range(t)]
        counts, more = Counter(shapes), (self.config, self.steps, pixels.device)
        self.latest = make(self.family, [Grid(n, *shape, *more) for shape, n in counts.items()], shapes)
        PICTURES.set(self.latest)

    def _before_block(self, number: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of a block: merge, if it is its turn, and give it what fits fewer tokens."""
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        if any(isinstance(mask, Tensor) for mask in (*rest, kwargs.get("attention_mask"))):
            raise ValueError("a tile has padding, which cannot be merged; split pictures into whole tiles")
        pictures = PICTURES.get()
        hidden = pictures.merge(hidden) if number in self.merges else hidden
        pictures.tokens.append(sum(grid.size.numel() for grid in pictures.grids))
        return (hidden, *rest), pictures.arguments(number, hidden, kwargs)

    def _after_projector(self, projector: nn.Module, args: tuple, features: Tensor) -> Tensor:
        """Forward hook of a projector."""
        features = features.to(self.model.get_input_embeddings().weight.dtype)  # as the model does next
        return PICTURES.get().copies(number_rows(features))


# ==== 6. Families ===========================================================================================
#
# What differs between models is where their parts are, and how many patches make an image token. A family
# whose encoder has tiles of one size and a config like these needs a name in PARTS, maybe one in PREFIX; then
# a row in FAMILIES of test_luvc.py, and it gets all tests that the others have.


@dataclass(frozen=True)
class Family:
    """What the Merger needs of a model."""

    vision: nn.Module
    """The vision encoder."""
    projectors: Sequence[nn.Module]
    """Encoder channels -> LLM channels, one row per image token. (DeepStack: several.)"""
    blocks: Sequence[nn.Module]
    """Of the encoder, up to the one whose output is taken."""
    patch_size: tuple[int, int] | None = None
    """Pixels of a patch, height and width; None: pictures of any size in one sequence."""
    per_side: int = 1
    """An image token is per_side x per_side patches."""
    prefix: int = 0
    """Tokens in front of the grid inside the encoder (CLS)."""
    prefix_tokens: int = 0
    """How many of these also reach the LLM."""


# Families with the same names for their encoder and their projector.
LLAVAS = ("llava", "llava_next", "llava_onevision", "internvl")
PARTS = dict.fromkeys(LLAVAS, ("vision_tower", "multi_modal_projector"))
PARTS |= dict.fromkeys(("idefics3", "smolvlm"), ("vision_model", "connector"))
PARTS |= dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("visual", "visual.merger"))
PARTS["deepseek_vl"] = ("vision_model", "aligner")
# Encoders with a token in front of the patches, CLS, and those without one.
PREFIX = {"clip_vision_model": 1, "dinov2": 1, "internvl_vision": 1}
PREFIX |= {"siglip_vision_model": 0, "idefics3_vision": 0, "smolvlm_vision": 0}


def family_of(model: nn.Module) -> Family:
    """How this model is built. Raises: ValueError if it is of no supported family."""
    config, kind = model.config, model.config.model_type
    if kind not in PARTS:
        raise ValueError(f"{kind!r} is not supported; use one of {sorted(PARTS)}")
    vision, projector = (model.base_model.get_submodule(name) for name in PARTS[kind])
    if kind.startswith("qwen"):
        projectors = [projector, *getattr(vision, "deepstack_merger_list", ())]
        return Family(vision, projectors, vision.blocks, per_side=config.vision_config.spatial_merge_size)
    tower, layer = config.vision_config, getattr(config, "vision_feature_layer", -1)
    strategy = getattr(config, "vision_feature_select_strategy", "full")  # "default" cuts off the first token
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    prefix = PREFIX.get(tower.model_type)
    if prefix is None or not isinstance(layer, int) or (strategy == "default" and not prefix):
        got = f"encoder {tower.model_type!r}, feature layer {layer}, strategy {strategy!r}"
        raise ValueError(f"{got}: use one of {sorted(PREFIX)}, a single layer, 'full' if there is no CLS")
    encoder = getattr(vision, "vision_model", vision).encoder
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    blocks = blocks[: layer % (len(blocks) + 1)]
    # A pixel shuffle makes an image token of per_side x per_side patches.
    per_side = getattr(config, "scale_factor", None) or round(1 / getattr(config, "downsample_ratio", 1))
    patch = tower.patch_size if isinstance(tower.patch_size, Sequence) else (tower.patch_size,) * 2
    to_llm = prefix if strategy == "full" else 0
    return Family(vision, [projector], blocks, tuple(patch), per_side, prefix, to_llm)


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module of a block; DINOv2's was a module within a module before transformers 5.23."""
    attention = block.self_attn if hasattr(block, "self_attn") else block.attention
    return getattr(attention, "attention", attention)


# ==== 7. LUVC: both hooks ===================================================================================


class LUVC(Hook):
    """Merging and pruning together, in place and reversibly.

        with LUVC(model) as luvc:
            model.generate(**inputs)       # or model(...), or a pipeline: nothing else changes
        print(luvc.kept[5][0])

    With everything off (`vision_keep=1.0, llm_keep=1.0`) the model is not touched. Several threads may use an
    attached model at once. `kept` and `sizes` then speak of whichever prefill ended last, `groups` of the
    pictures that were encoded last.

    Args: model, a Hugging Face VLM of a supported family (`family_of`); config, the settings.
    Raises: ValueError for an unsupported model, or settings that do not fit its layers or blocks; when
        attached, for a call that would go wrong.
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig()):
        super().__init__(model)
        self.merger = Merger(self.model, config)
        self.pruner = Pruner(self.model, config, find_copies if self.merger.merges else None)
        self.family = self.merger.family

    def hook(self) -> None:
        self.enter_context(self.pruner)
        self.enter_context(self.merger)
        self.replaced = self.pruner.replaced | self.merger.replaced  # what `detach` checks, before it begins

    def _latest(self, hook: Hook):
        if hook.latest is None:
            raise ValueError("nothing happened yet: call the model with a picture while LUVC is attached")
        return hook.latest

    @property
    def kept(self) -> list[list[Tensor]]:
        """`kept[layer][sample]`: positions that a decoder layer processed in the latest prefill, 1-D int64.

        Ascending, counted from the beginning of the KV cache, without padding. ValueError before a prefill.
        """
        prompt = self._latest(self.pruner)
        return [[row.nonzero()[:, 0] + prompt.start for row in size] for size in prompt.layers]

    @property
    def sizes(self) -> list[list[Tensor]]:
        """`sizes[layer][sample]`: what each position of `kept` stands for, 1-D float32; text 1."""
        return [[row[row > 0] for row in size] for size in self._latest(self.pruner).layers]

    @property
    def groups(self) -> list[Tensor]:
        """For each picture, tile or frame encoded last: (H * W,) int64, the merged token of each place."""
        tiles = self._latest(self.merger)
        rows = [iter(grid.token) for grid in tiles.grids]
        return [next(rows[number]) for number in tiles.number]

    def report(self) -> str:
        """Tokens per encoder block and decoder layer in the latest prefill, summed over the batch; text."""
        prompt, pictures, lines = self._latest(self.pruner), self.merger.latest, []
        text, layers = sum(prompt.text_lengths), len(prompt.layers)
        image = [int((size > 0).sum()) - text for size in prompt.layers]
        plain = int(prompt.delivered.sum()) - text
        if pictures is not None:
            first = len(self.family.blocks) - len(pictures.tokens)  # blocks before the first merge
            tokens = [sum(grid.token.numel() for grid in pictures.grids)] * first + pictures.tokens
            lines.append(f"image tokens per encoder block: {', '.join(map(str, tokens))}")
        lines.append(f"image tokens per decoder layer, of {plain}: {', '.join(map(str, image))}")
        return "\n".join([*lines, f"image token-layers left: {sum(image) / max(1, plain * layers):.1%}"])
