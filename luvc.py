"""LUVC in one file: vision-language models made faster without training, by dropping visual tokens.

A reference implementation of *Towards Lossless Ultimate Vision Token Compression for VLMs* (Zheng, Huang,
Jiang, Hu, Chen; arXiv 2512.09010) on stock Hugging Face transformers:

    with LUVC(model):                      # any supported VLM, in place
        model.generate(**inputs)           # your own code, unchanged

A picture becomes hundreds of visual tokens, and the LLM computes each of them in every layer. LUVC has two
units. The **Orthogonal Iterative Merger** (OIM) merges neighbouring tokens inside the vision encoder, along
one spatial axis at a time. The **Spectrum Pruning Unit** (SPU) prunes visual tokens inside the LLM, layer
after layer, until none are left at the last one; a low-pass filter scores them, not attention, so that no
attention map is needed and FlashAttention keeps working.

One number runs through all of it: the *size* of a token, how many original tokens it stands for. Merging
adds sizes up, pruning passes them on to neighbours, attention weighs a token by its size. A token of size 0
is not there: that is what pruned tokens and padding are. So the sizes of a picture add up to the same in
every layer until the picture is gone, and one array of sizes says all there is to know about a layer.

How to read. Sections 1 and 2 are pure functions; they need torch alone and are made to be copied. Section 3
has the settings, and what both units share. Section 4 is the Pruner: after it you know half of the method,
and the text so far works as a file of its own. Section 5 is the Merger, section 6 the families of models.
Section 7 puts both together, and refuses what would go wrong; section 8 is the command line.

Shapes:

    B    batch                            N    visual tokens of one picture
    H W  token grid of one picture        K    tokens, or positions, that are kept
    C    channels                         S    positions of one forward call of the LLM

Words for a place, each with one meaning:

    token     a vector that stands for a part of a picture, or for a piece of text
    patch     a token of the vision encoder, before anything is merged
    slot      a placeholder of the prompt; the LLM expects one visual token for each
    position  where in the sequence of the LLM: 0 is the first one of the call or, in `kept`, of the KV cache
    flat      one number for two: row * columns + column of a grid, sample * S + position of a batch
    parent    the token of the merged grid that a token went into (flat)
    home      the slot that a merged token goes to
    dead      a slot whose token went home elsewhere: it holds a signpost, and no layer processes it
    filler    a position of size 0 that makes a shorter sample of a batch as long as the longest one

Only the paper's abstract and summaries were available: what it states and what we choose is README's ledger,
and `Our choice` marks where a choice is made. Not done here, and refused with an error that says so: other
families, static or quantised KV caches, sliding windows, linear attention, cropping the cache (assisted
decoding), continuous batching, sequences packed in a row, gradient checkpointing, 4-D attention masks.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

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
    Source: merging iteratively, orthogonally in the spatial axes, is the paper's; this rule is our choice.
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
    """Score each visual token of a picture: the norm of what a low-pass filter along the tokens removes.

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
    # Whoever asks first may run inference, who comes next may train.
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

    Args: x (B, N, C) floating, the visual tokens of a picture in sequence order; keep in [0, N]; cutoff
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
    # Half way between two kept tokens the sizes begin to go to the right one.
    # The last token that is nearer to its left neighbour.
    middle = (kept[:, :-1] + kept[:, 1:]) // 2
    starts = torch.zeros_like(size, dtype=torch.int64).scatter_(1, middle + 1, 1)
    # 0 0 1 1 1 2 ...: the kept token that each token's size goes to.
    heir = starts.cumsum(1)
    wide = size.float() if size.dtype in (torch.float16, torch.bfloat16) else size
    return wide.new_zeros(kept.shape).scatter_add_(1, heir, wide).to(size.dtype)


# ==== 3. What both units share: settings, hooks that come out again, tokens that weigh what they stand for ==

import transformers  # noqa: E402

try:
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS
    from transformers.vision_utils import get_vision_window_index
except ImportError as error:
    have = f"transformers {transformers.__version__}"
    raise ImportError(f"{have} lacks what luvc.py relies on ({error}); install 5.17 to 5.24") from None
if tuple(int(n) for n in transformers.__version__.split(".")[:2]) > (5, 24):
    warnings.warn(f"luvc.py was tested up to transformers 5.24, not {transformers.__version__}", stacklevel=2)

# What this file relies on inside of transformers; look here first when a release breaks it.
#
#   base.forward       takes input_ids by keyword or first; calls get_image_features, get_video_features and,
#                      by keywords alone, the decoder with inputs_embeds
#   get_*_features     attributes of the base. `generate` may call them ahead of it (since 5.23) and hand on
#                      what they return as mm_encoder_outputs, with lists repeated for beams; pooler_output
#                      has an entry per picture, tile, clip or sample, in the order of their placeholders
#   decoder            embed_tokens, config.use_cache; unknown keyword arguments reach every layer
#   decoder.layers[i]  (hidden, position_embeddings=(cos, sin), position_ids=, attention_mask=, cache) gives a
#                      Tensor; self_attn. hidden_states are collected by hooks around `forward`
#   self_attn          reads config._attn_implementation in each call; calls cache.update(keys, values, ...),
#                      then that attention function, with itself, query, key, value (B, heads, K, D), scaling=
#   its module         has a function eager_attention_forward
#   DynamicCache       layers with update, get_seq_length, is_initialized, keys, values, and three methods
#                      that pick samples
#   MASKS[...]         mask functions, with the keywords in `causal_mask`; causal by default
#   vision encoders    forward(pixels or hidden_states, grid_thw); blocks take hidden states first, Qwen's
#                      also cu_seqlens, max_seqlen, position_embeddings by keyword; and Qwen's
#                      rotary_pos_emb(x, positions)
#   generate           _prefill, init_continuous_batching: only to refuse what they do
#
# The name of the KV cache in every forward: `cache` since 5.24, `past_key_values` before.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


@dataclass(frozen=True)
class LUVCConfig:
    """What is merged and pruned. Every default is our choice; docs/results.md has the measurements.

    Raises: ValueError for a value outside its range, NaN included.
    """

    vision_keep: float = 0.5625
    """Fraction of the grid that leaves the encoder, in (0, 1]; 24 x 24 become 18 x 18. 1.0: merger off."""
    vision_steps: int | None = None
    """Merges inside the encoder, along W, H, W, ..., at least 2, spread evenly over its blocks, at most
    one per block. None: one before every block but the first."""
    llm_keep: float | Sequence[float] | None = None
    """Fraction of a picture's tokens that each decoder layer processes, of what the encoder delivered, in
    [0, 1]: one for all layers, or one per layer, never rising. 1.0: pruner off. None: from 2/3 at the first
    layer it falls evenly to 1/3 at the last but one, and is 0 at the last."""
    sizes: bool = True
    """Does a token weigh in attention by what it stands for? False: all tokens weigh the same."""
    merge: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]] = merge_axis
    """The function that merges along one axis: the contract is that of `merge_axis`."""
    prune: Callable[[Tensor, int], Tensor] = spectral_prune
    """The function that chooses: (tokens (B, N, C), keep) -> indices (B, keep), ascending. For ablations, say
    `functools.partial(spectral_prune, cutoff=0.25)`, and for ideas of your own."""

    def __post_init__(self):
        if not isinstance(self.vision_keep, Real) or not 0 < self.vision_keep <= 1:
            raise ValueError(f"vision_keep={self.vision_keep} must lie in (0, 1]; 1.0 turns the merger off")
        steps = 2 if self.vision_steps is None else self.vision_steps
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"vision_steps={steps} must be None, or a whole number of at least 2")
        if not callable(self.merge) or not callable(self.prune) or not isinstance(self.sizes, bool):
            got = f"merge={self.merge!r}, prune={self.prune!r}, sizes={self.sizes!r}"
            raise ValueError(f"{got}: they must be a function, a function, and True or False")
        if isinstance(self.llm_keep, Sequence) and not isinstance(self.llm_keep, str):
            # The caller's list stays the caller's.
            object.__setattr__(self, "llm_keep", tuple(self.llm_keep))
        given = (1.0,) if self.llm_keep is None else self.llm_keep
        given = given if isinstance(given, tuple) else (given,)
        if not given or not all(isinstance(f, Real) and 0 <= f <= 1 for f in given):
            raise ValueError(f"llm_keep={self.llm_keep} must be None or in [0, 1]; 1.0 turns the pruner off")
        if any(before < after for before, after in itertools.pairwise(given)):
            raise ValueError(f"llm_keep={self.llm_keep} rises, but a pruned token never comes back")

    def fractions(self, layers: int) -> list[float]:
        """`llm_keep` spelled out: the fraction for each of `layers` decoder layers.

        Raises: ValueError for a sequence of another length, or a single layer with the default schedule.
        """
        each = self.llm_keep if isinstance(self.llm_keep, tuple) else (self.llm_keep,) * layers
        if len(each) != layers or (self.llm_keep is None and layers < 2):
            raise ValueError(f"llm_keep={self.llm_keep} does not fit {layers} decoder layers: one for each")
        # Our choice: from 1 to 0 keeps a few more, and still loses more on a real model (docs/results.md).
        falling = [(2 - n / max(1, layers - 2)) / 3 for n in range(layers - 1)]
        return [*falling, 0.0] if self.llm_keep is None else [float(f) for f in each]


EAGER = "LUVC needs eager mode; compile or export a model without it, and load a compiled one anew"

# Models are changed in place, by giving modules other attributes: a `forward` that does more and then calls
# the one it replaced. An instance's attribute hides the method of its class, so taking it away again
# restores the model exactly, and no line of transformers' modelling code is copied.


class Unit:
    """Changes a model in place and takes the changes back: what `Pruner`, `Merger` and `LUVC` have in common.

        with Unit(model): ...                        # hooks go in here and come out at the end
        unit = Unit(model).attach(); unit.detach()   # the same without a block

    Whatever happens inside of the block, `detach` restores every attribute that `attach` replaced.

    Args: model, a Hugging Face model, or PEFT's wrapper around one; parts, units that come and go with this
        one; they write down their changes in its list.
    """

    def __init__(self, model: nn.Module, *parts: "Unit"):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.parts, self._changes, self._handles = parts, [], []
        for part in parts:
            part._changes, part._handles = self._changes, self._handles

    def _hook(self) -> None:
        """What the unit changes, by `replace`, `wrap`, `weigh_keys` and torch's hooks (`_handles`)."""

    def replace(self, module: nn.Module, name: str, new) -> None:
        """Give a module another attribute. It may have one of its own: accelerate, too, replaces forwards."""
        self._changes.append((module, name, new, module.__dict__.get(name)))
        # A module, too, not as a submodule: state_dict stays as it is.
        object.__setattr__(module, name, new)

    def wrap(self, owner: nn.Module, name: str, run: Callable, *more) -> None:
        """Let run(*more, plain, *args, **kwargs) stand in for a method.

        What torch.compile made of it before does not see hooks, but it does see another attribute. That
        one stays uncompiled.
        """
        plain = getattr(owner, name)
        run = functools.wraps(plain)(functools.partial(run, *more, plain))
        self.replace(owner, name, torch.compiler.disable(run, reason=EAGER))

    def weigh_keys(self, attention: nn.Module, sizes: Callable | None = None) -> None:
        """Let an attention module use `sized_attention`.

        Args: sizes, () -> (B, N) sizes of the keys, where no KV cache adds their channels.
        """
        # For this module alone: no other attention changes.
        config = copy.copy(attention.config)
        config._attn_implementation = "luvc"
        # As it was, for the kernel: these read config.
        self.replace(attention, "twin", copy.copy(attention))
        self.replace(attention, "key_sizes", sizes)
        self.replace(attention, "config", config)

    def attach(self):
        """Put the hooks in; returns self. Raises: ValueError if they are in already; nothing is changed."""
        if self._changes:
            raise ValueError(f"this {type(self).__name__} is attached already; detach() it first")
        try:
            for unit in (*self.parts, self):
                unit._hook()
        except BaseException:  # no half-attached model
            self._undo()
            raise
        return self

    def detach(self) -> None:
        """Take the hooks out: the model is what it was before `attach`. Without effect if not attached.

        Raises: ValueError if something else replaced what this did, since that would be lost.
        """
        for module, name, new, _ in self._changes:
            if module.__dict__.get(name) is not new:
                what = f"{type(module).__name__}.{name} was replaced after attach(), by accelerate perhaps"
                raise ValueError(f"{what}; undo that before detach(), and attach LUVC last")
        self._undo()

    def _undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, name, _, old in reversed(self._changes):
            object.__delattr__(module, name) if old is None else object.__setattr__(module, name, old)
        self._changes.clear(), self._handles.clear()

    def __reduce__(self):
        raise ValueError("a model cannot be copied or pickled while LUVC is attached; detach() it first")

    __enter__ = attach

    def __exit__(self, *exception) -> None:
        self.detach()


# A token of size s stands for s tokens, so a query has to meet its key s times: softmax(q . k * scale +
# log s). (Our choice: without it, whatever reads proportions of a picture is misled by what was merged
# or pruned.) A bias would need a mask, and with a mask flash kernels do not run. But the sum fits into
# the product, as one more channel of every head: [q, 1 / scale] . [k, log s] * scale. The kernel sees
# ordinary queries and keys.
#
# One channel would do, but kernels want head sizes in steps of 8, and values as wide as keys. It costs
# KV cache: 6 % at head size 128, 12 % at 64.
EXTRA = 8


def size_channels(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The additional channels of keys: log(size), and zeros.

    Args: size (B, K) >= 0. Size 1 adds nothing, as log(1) is 0. A token of size 0 is not there (padding,
        pruned, merged away): log(0) becomes a number as low as the dtype carries, low enough that the
        weight of such a key is exactly 0, but not so low that float32 products become infinite.
    Returns: (B, 1, K, EXTRA) of that dtype, the same for all heads. Source: our choice.
    """
    log = size.float().log().clamp(min=max(torch.finfo(dtype).min, -1e36)).to(dtype)
    return nn.functional.pad(log[:, None, :, None], (0, EXTRA - 1))


def widen(x: Tensor, channels: Tensor) -> Tensor:
    """Keys or values x (B, heads, K, D), with channels (B or 1, 1, K, EXTRA) behind them."""
    # Under autocast keys may have another dtype than what the LLM was given.
    if channels.dtype != x.dtype:
        channels = channels.to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    return torch.cat([x, channels.expand(*x.shape[:2], -1, -1)], dim=-1)


def sized_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """Any attention of transformers, in which a key of size s weighs as much as s equal keys of size 1.

    Args: as transformers calls its attention functions: query (B, heads, K, D), key and value with
        EXTRA channels more, if a KV cache has added them, else `weigh_keys` says their sizes; kwargs,
        `scaling` among them.
    Returns: (B, K, heads, D), and the attention weights if the kernel gives any.
    """
    # Kernels read what they need from the module, its config among it. They get the twin, which has the
    # config that names them, and not the one that named this function.
    twin, D = module.twin, query.shape[-1]
    if twin.training != module.training:
        twin.training = module.training
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ATTENTIONS.get_interface(twin.config._attn_implementation, eager)
    if module.key_sizes:
        size = module.key_sizes()
        key, value = widen(key, size_channels(size, key.dtype)), nn.functional.pad(value, (0, EXTRA))
    query = nn.functional.pad(query, (0, EXTRA), value=1 / kwargs["scaling"])
    output, weights = attend(twin, query, key, value, attention_mask, **kwargs)
    # What came out of the values' additional channels means nothing.
    return output[..., :D], weights


ATTENTIONS.register("luvc", sized_attention)


# ==== 4. The Pruner: LLM layers on a subset of their positions ==============================================
#
# One idea keeps this small: *logical* and *physical* sequence. Everything outside the layers keeps seeing
# the logical sequence: input_ids, attention mask, position ids, logits, cache length, hidden_states. A
# decoder layer physically processes a subset: gather what is kept, run the layer as it is, scatter its
# output back. A pruned token is no longer updated; it rides along in the residual stream.
#
#     logical   | t t v v v v v v v v t t t |      t text, v visual
#     layer 0   | t t v v v . . v v . t t t |
#     layer 5   | t t v . v . . v v . t t t |      what the layer computes is a shorter causal sequence;
#     last one  | t t . . . . . . . . t t t |      rotary positions are those of the logical sequence
#
# Samples of a batch may differ in how many positions they process. Shorter ones are filled up with
# *fillers*, positions of size 0, which weigh nothing: there is no mask beyond the causal one, and flash
# kernels run, in any batch.
#
# One call, step by step (the hooks stand in `Pruner`, at the end of the section):
#
#     _run_base      opens a note, CALL, and calls the model's own forward
#     _run_features  encodes the pictures; how many slots each of them has goes into the note
#     _run_decoder   reads note and mask: which positions are there, which are visual, what are their sizes
#     run_layer      for each layer: choose (`Prompt.prune`), gather, run, scatter
#     update         what the layer's attention calls: keys and values go into the cache, with their channels
#
# Compared with a prefill of one sample that drops tokens (the notebook's forty lines), three things are more:
# a cache whose layers hold different lengths (PrunedLayer), weights (sizes), and batches (fillers).
#
# State lives in four places:
#
#     Prompt        one forward call of the LLM; goes from layer to layer as a keyword argument
#     PrunedLayer   what one layer stored, from call to call; in the caller's KV cache, so that
#                   conversations cannot mix
#     CALL          from the encoder to the decoder, within one call of the model
#     signposts     how merged tokens grew, inside of the features themselves (section 5)
#
# A unit itself holds settings, hooks, and the latest Prompt for reports: threads may share it.

CALL: ContextVar = ContextVar("luvc_call", default=None)  # a dict; every thread has its own


@contextlib.contextmanager
def noted(call: dict):
    """Within the block `CALL` is `call`."""
    token = CALL.set(call)
    try:
        yield
    finally:
        CALL.reset(token)


@dataclass
class Pictures:
    """Pictures (or tiles, or frames) of equally many tokens. They are pruned together, each by itself."""

    count: int
    """Tokens of each that the encoder delivered: fractions are fractions of these."""
    where: Tensor
    """(n, k) int64: the tokens of each that are still kept, ascending, as flat positions."""
    per_sample: list[int]
    """How many of these pictures stand in each sample of the batch."""


class Prompt:
    """What one forward call of the LLM processes, layer by layer.

    How *many* tokens each layer keeps is known on the host from the start, so no layer waits for the
    device; *which* ones is decided on the device, when a layer's input is there.

    Args:
        size: (B, S) float32, how many tokens each position stands for. 0: it is not there, as padding, or
            as a placeholder whose token was merged into another one's.
        pictures: list of `Pictures`, what can be pruned.
        texts: list of int; per sample, how many positions every layer processes.
        cache: the KV cache of the call, all of its layers PrunedLayers; None if no layer will run.
        dtype: of the input of the LLM, and so of its keys and values.
        weigh: does a token weigh what it stands for, or all the same?
    """

    def __init__(self, size, pictures, texts, cache=None, dtype=torch.float32, weigh=True):
        self.size, self.pictures, self.texts, self.cache = size, pictures, texts, cache
        self.dtype, self.weigh = dtype, weigh
        self.start = cache.get_seq_length() if cache is not None else 0  # positions seen before this call
        # Of each layer so far: sizes (B, S), and how many columns its cache had stored before.
        self.layers: list[tuple[Tensor, int]] = []
        # Flash kernels want values as wide as keys. What comes out of their additional channels is cut off,
        # so there is room for a note: the eight bytes of the position, exact in every floating dtype.
        at = torch.arange(self.start, self.start + size.shape[1], device=size.device)
        self.notes = at[:, None].view(torch.uint8).to(dtype)  # (S, EXTRA)
        self.select()

    def select(self) -> None:
        """From the sizes: which positions a layer processes, and what it tells its KV cache about them.

        Sets index, (B, K) flat positions of this call, ascending per sample, then fillers; None if K is S;
        here, (B, K) their sizes; ragged, are there fillers; channels, for `PrunedLayer.update`.
        """
        # How long each sample is, the host knows from counts alone.
        (B, S), device, lengths = self.size.shape, self.size.device, list(self.texts)
        for p in self.pictures:
            lengths = [n + p.where.shape[1] * count for n, count in zip(lengths, p.per_sample, strict=True)]
        K, self.index, self.here, notes = max(lengths), None, self.size, self.notes.to(device)
        self.ragged = min(lengths) < K
        # Positions of size 0 go behind all others; a stable sort leaves both in their order.
        if K < S:
            position = (self.size == 0).byte().sort(dim=1, stable=True).indices[:, :K]  # (B, S) -> (B, K)
            self.here = self.size.gather(1, position)
            notes = notes.index_select(0, position.flatten())
            self.index = position + torch.arange(B, device=device)[:, None] * S
        weight = self.here if self.weigh else self.here > 0
        self.channels = size_channels(weight, self.dtype), notes.view(-1, 1, K, EXTRA)

    def prune(self, hidden: Tensor, fraction: float, choose: Callable[[Tensor, int], Tensor]) -> None:
        """Prune for a layer whose input is `hidden` (B, S, C).

        Of each picture's `count` tokens `fraction` stays, rounded to the nearest whole number, halves up.
        `choose` is asked only where fewer are to be kept than are left; if none is to be, with keep = 0.
        It is called once per `Pictures`, with their tokens (n, k, C) in the order of `where`. A pruned token
        passes its size on at once (`inherit`), if any token of its picture is kept; its own size is 0 then.

        What changes: `where` of those pictures and `size`, both new tensors (`layers` holds the old sizes),
        and what `select` works out from them.
        """
        device, changed = hidden.device, hidden.device != self.size.device
        if not self.pictures and not changed:
            return
        tokens, size = hidden.flatten(0, 1), self.size.flatten().to(device)
        for p in self.pictures:
            (n, k), keep = p.where.shape, math.floor(fraction * p.count + 0.5)
            if keep < k:
                # Each picture is chosen from by itself, but pictures of one length in one call.
                where, changed = p.where.to(device), True
                kept = choose(tokens.index_select(0, where.flatten()).view(n, k, -1), keep)  # (n, keep)
                before, size = size[where], size.index_fill(0, where.flatten(), 0.0)
                p.where = where.gather(1, kept)
                if keep:
                    size = size.index_copy(0, p.where.flatten(), inherit(before, kept).flatten())
        if changed:
            self.size = size.view_as(self.size)
            self.select()


class PrunedLayer(DynamicLayer):
    """The KV cache of one decoder layer: it says how many positions were seen, not how many it stored.

    transformers computes masks and rotary positions from that logical length; keys and values are those of
    the positions that this layer processed, with EXTRA channels more.
    """

    is_croppable = False

    def __init__(self, keeps: bool = True):
        super().__init__()
        # False: the caller wants no KV cache.
        self.keeps = keeps
        self.seen = 0  # logical length
        # (B, seen) bool, in layer 0: what the latest mask showed.
        self.shown: Tensor | None = None
        # For the keys and values that come next.
        self.channels: tuple[Tensor, Tensor] | None = None

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, heads, K, D). Returns all stored ones, (B, heads, n, D + EXTRA)."""
        # Not from `run_layer`: plain attention does not know the channels.
        if self.channels is None:
            raise ValueError("this KV cache was filled under LUVC: attach LUVC again, or begin a new one")
        new = widen(key_states, self.channels[0]), widen(value_states, self.channels[1])
        self.channels = None
        return super().update(*new) if self.keeps else new

    def hide(self, shown: Tensor) -> None:
        """From now on no query sees stored keys whose position is False in `shown` (B, seen) bool.

        A later mask may hide what an earlier call stored: a batch of conversations in which one sample
        ended sooner and was padded, say. Which position a column holds is noted in its values (`Prompt`).
        """
        position = self.values[:, 0, :, -EXTRA:].byte().view(torch.int64)[..., 0]  # (B, stored)
        hidden = ~shown.to(position.device).gather(1, position)  # (B, stored)
        keys = widen(self.keys[..., :-EXTRA], size_channels(torch.zeros_like(hidden), self.keys.dtype))
        self.keys = torch.where(hidden[:, None, :, None], keys, self.keys)

    # Three ways to pick samples: of beams, of contrastive search, of several answers to one prompt. Keys and
    # values carry their channels along; `shown` has to follow.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.shown = None if self.shown is None else self.shown[beam_idx.to(self.shown.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.shown = None if self.shown is None else self.shown[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.shown = None if self.shown is None else self.shown.repeat_interleave(repeats, dim=0)

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("LUVC cannot crop its KV cache, as assisted and prompt-lookup decoding would")

    # Nobody resets a dynamic cache; make a new one.
    reset = crop


def run_layer(layer: nn.Module, plain: Callable, number: int, pruner: "Pruner", hidden: Tensor, **kwargs):
    """Gather, run, scatter: one decoder layer on the positions that it processes. This is the whole method.

    Args: layer, its own forward (`plain`) and number; pruner, for its fractions and the function that
        chooses; hidden (B, S, C), the logical sequence; kwargs: what transformers hands to a layer, and
        the `prompt`.
    In this order: `Prompt.prune`; gather with `take`; `enter`; the layer, with its arguments changed as
    `enter` says; fillers (size 0) as they came; scatter with `put`.
    Returns: (B, S, C), processed positions updated, all others as they came.
    """
    prompt: Prompt = kwargs.pop("prompt")
    prompt.prune(hidden, pruner.fractions[number], pruner.config.prune)
    index = prompt.index  # (B, K), or None: all positions
    x = hidden if index is None else take(hidden, index)  # (B, S, C) -> (B, K, C)
    out = plain(x, **kwargs | enter(layer, number, prompt, x, kwargs))
    if prompt.ragged:  # a filler stays as it is
        out = torch.where(prompt.here[..., None] > 0, out, x)
    return out if index is None else put(hidden, index, out)  # (B, K, C) -> (B, S, C)


def enter(layer: nn.Module, number: int, prompt: Prompt, x: Tensor, kwargs: dict) -> dict:
    """Tell the KV cache what comes, and make the arguments that go with x (B, K, C) into the layer."""
    store = prompt.cache.layers[number]
    past = store.keys.shape[-2] if store.is_initialized else 0  # columns stored
    prompt.layers.append((prompt.size, past))
    store.seen, store.channels = store.seen + prompt.size.shape[1], prompt.channels
    # Of transformers' masks only the causal one is left, often none at all: sizes hide fillers. position_ids
    # go: FlashAttention would take gaps in them for the seams of several sequences packed into one.
    # A single word sees all that is stored.
    mask = None if x.shape[1] == 1 else causal_mask(layer.self_attn.twin.config, x, past)
    changed = {CACHE: prompt.cache, "attention_mask": mask, "position_ids": None}
    # Rotary positions stay those of the logical sequence.
    if prompt.index is not None:
        cos_sin = (t.to(x.device).expand(len(x), -1, -1) for t in kwargs["position_embeddings"])
        changed["position_embeddings"] = tuple(take(t, prompt.index) for t in cos_sin)
    return changed


def causal_mask(config, x: Tensor, past: int) -> Tensor | None:
    """The mask that transformers makes for x (B, K, C) behind `past` others; flash kernels need none."""
    make, (B, K, _) = MASKS[config._attn_implementation], x.shape
    more = {"dtype": x.dtype, "device": x.device, "config": config}
    return make(batch_size=B, q_length=K, kv_length=past + K, q_offset=past, **more)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, C) at flat positions index (B, K) -> (B, K, C)."""
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, x.shape[-1])


def put(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """x (B, S, C), with `new` (B, K, C) at flat positions index (B, K)."""
    new = new.to(x.device).flatten(0, 1)
    return x.flatten(0, 1).index_copy(0, index.flatten(), new).view_as(x)


class Pruner(Unit):
    """The Spectrum Pruning Unit as a hook: `with Pruner(model): model.generate(**inputs)`.

    A second turn on the same KV cache works. It sees all text of the first turn and, in each layer, the
    visual tokens that this layer kept: none in the last. Pruned tokens never come back.

    Args:
        model: a Hugging Face VLM in the layout of LLaVA: `base_model` sees input_ids and encodes pictures
            with `get_image_features`, `get_decoder()` has `layers` with `self_attn`.
        config: the settings; those of the merger are not used.
        tiles: {"image": placeholders of a tile, "video": of a frame}, for models whose features may hold
            several of them in one piece. By default a piece is a picture, or a clip with as many frames as
            `video_grid_thw` says.
        read_sizes: (embeds (B, S, C), visual (B, S) bool) -> (B, S) sizes, where the encoder merges.
    """

    def __init__(self, model, config: LUVCConfig = LUVCConfig(), tiles=None, read_sizes=None):
        super().__init__(model)
        self.config, self.tiles, self.read_sizes = config, tiles or {}, read_sizes
        self.base, self.decoder = self.model.base_model, self.model.get_decoder()
        self.fractions = config.fractions(len(self.decoder.layers))
        self.off = min(self.fractions) == 1 and read_sizes is None
        # Refuses calls that would go wrong; LUVC has one (section 7).
        self.guard: Callable | None = None
        self.latest: Prompt | None = None  # of the latest prefill

    def _hook(self) -> None:
        base, decoder = self.base, self.decoder
        if "_luvc" in decoder.__dict__:
            raise ValueError("LUVC or one of its units is attached to this model already; detach() it first")
        self.replace(decoder, "_luvc", self)
        for kind in ("image", "video"):
            if hasattr(base, f"get_{kind}_features"):
                self.wrap(base, f"get_{kind}_features", self._run_features, kind)
        self.wrap(base, "forward", self._run_base)
        self.wrap(decoder, "forward", self._run_decoder)
        for number, layer in enumerate(() if self.off else decoder.layers):
            # At `forward`, inside of the layer's hooks: with these transformers collects hidden_states, and
            # they have to see the logical sequence on both sides.
            self.replace(layer, "forward", functools.partial(run_layer, layer, layer.forward, number, self))
            self.weigh_keys(layer.self_attn)

    def _run_base(self, plain: Callable, *args, **kwargs):
        """Open a note for this call: input_ids, and the features of pictures and clips as they come."""
        call = {"ids": args[0] if args else kwargs.get("input_ids")}
        # Encoded ahead by the caller, or by `generate`.
        call["image"] = kwargs.get("image_hidden_states")
        for kind, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            call[kind] = getattr(output, "pooler_output", output)
        with noted(call):
            return plain(*args, **kwargs)

    def _run_features(self, kind: str, plain: Callable, *args, **kwargs):
        """Encode pictures or clips, and note what came out. A clip's features are marked with its frames."""
        call = CALL.get()
        with noted({}):  # the encoder works in a note of its own
            output = plain(*args, **kwargs)
        entries = getattr(output, "pooler_output", None)
        grid = bound(plain, args, kwargs).get("video_grid_thw")
        if grid is not None and entries is not None:
            for entry, frames in zip(entries, grid[:, 0].tolist(), strict=False):
                # On the tensor itself, so that it is repeated with it for beams.
                entry.frames = frames
        if call is not None:
            call[kind] = entries
        return output

    def _run_decoder(self, plain: Callable, *args, **kwargs):
        """Find out what is where in the prompt, and let the KV cache count logical positions."""
        # 1. What came: the note of this call, and what the mask shows.
        kwargs[CACHE] = kwargs.pop("past_key_values", kwargs.get(CACHE))
        call, cache, embeds = CALL.get(), kwargs[CACHE], kwargs.get("inputs_embeds")
        # Somebody calls the LLM alone, with text: ids do as well for what follows.
        if embeds is None:
            embeds = args[0] if args else kwargs["input_ids"]
        start = getattr(cache, "get_seq_length", int)()  # positions seen before this call
        every = shown_by(kwargs.get("attention_mask"), embeds, start + embeds.shape[1])
        shown = every[:, start:]  # (B, S) bool
        # (B, S): 0 text, 1 picture, 2 clip; None: only text.
        kinds = kinds_of(self.model.config, call, shown)
        # 2. Everything off: nothing but a record for reports is made, and nothing can be refused.
        if self.off:
            prompt = Prompt(shown.float(), [], [shown.shape[1]] * len(shown))
            prompt.start, prompt.layers = start, [(prompt.size, start)] * len(self.fractions)
            output = plain(*args, **kwargs)
        else:
            # 3. Read and check, then change: the cache counts positions, the layers get a Prompt.
            if self.guard is not None:
                self.guard(self, call, kwargs, embeds, shown, kinds)
            wanted = kwargs.get("use_cache")
            keeps = cache is not None or bool(self.decoder.config.use_cache if wanted is None else wanted)
            size, pictures, texts = read_prompt(self, call, kinds, shown, embeds, keeps)
            # All that can be refused was refused before this line.
            cache = adopt(cache, self.decoder, keeps)
            follow_mask(cache, every, start)
            kwargs |= {"attention_mask": None, CACHE: cache if keeps else None}  # the mask is in the sizes
            dtype = embeds.dtype if embeds.is_floating_point() else torch.float32
            prompt = Prompt(size, pictures, texts, cache, dtype, self.config.sizes)
            output = plain(*args, prompt=prompt, **kwargs)
            if len(prompt.layers) != len(self.fractions):
                raise ValueError(f"{len(prompt.layers)} of {len(self.fractions)} layers saw LUVC: {EAGER}")
        # 4. For reports, which must not keep a KV cache alive.
        prompt.cache, prompt.kinds = None, None if kinds is None else kinds * shown
        self.latest = prompt if kinds is not None or shown.shape[1] > 1 else self.latest
        return output


def read_prompt(pruner: Pruner, call: dict, kinds, shown: Tensor, embeds: Tensor, keeps: bool) -> tuple:
    """Sizes (B, S), pictures, and the number of positions per sample that every layer processes.

    Args: pruner, for its settings; call, the note with the features; kinds (B, S), as of `kinds_of`; shown
        (B, S) bool; embeds (B, S, C), the input of the LLM; keeps, is there a KV cache?
    Raises: ValueError if a prompt ends with a picture, where that cannot be answered.
    """
    size, (B, S) = shown.float(), shown.shape
    # A word that was generated is one position: no reason to wait for the device.
    if kinds is None:
        return size, [], [1] * B if S == 1 else shown.sum(1).tolist()
    if pruner.read_sizes is not None:
        size = size * pruner.read_sizes(embeds, kinds > 0)
    # Here, before the first layer, the host waits for the device, and never later.
    kinds, shown, alive = torch.stack([kinds, shown.to(kinds), (size > 0).to(kinds)]).cpu().long()
    # Visual tokens, one picture after the other: their flat positions, and how many each picture has.
    # Placeholders stand in the order of the features, so counting them off says where a picture ends.
    where, lengths = [], []
    for kind, name in enumerate(("image", "video"), 1):
        where.append((kinds.flatten() == kind).nonzero()[:, 0])
        lengths += lengths_of(call.get(name), pruner.tiles.get(name), len(where[-1]))
    where, number = torch.cat(where), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    # Our choice: if a prompt ends with a picture, the last token stays to the last layer, like text,
    # since the answer begins there.
    # Of each sample the last position that is shown, flat.
    last = torch.arange(B) * S + S - 1 - shown.flip(1).argmax(1)
    ends = (kinds.flatten()[last] * shown.flatten()[last]) > 0
    if ends.any() and (pruner.read_sizes is not None or not keeps):
        why = "without a KV cache" if pruner.read_sizes is None else "under the merger"
        raise ValueError(f"sample {int(ends.int().argmax())} ends with a picture, {why}: add text to it")
    # What can be pruned: visual tokens that are there. Pictures of equally many are taken together.
    pruned = (alive.flatten()[where] > 0) & ~torch.isin(where, last[ends])
    where, number = where[pruned], number[pruned]
    counts, pictures = number.bincount(), []
    for count in sorted(set(counts.tolist()) - {0}):
        group = where[counts[number] == count].view(-1, count)
        per_sample = (group[:, 0] // S).bincount(minlength=B).tolist()
        pictures.append(Pictures(count, group.to(size.device), per_sample))
    return size, pictures, (alive.sum(1) - (where // S).bincount(minlength=B)).tolist()


def lengths_of(entries, tile: int | None, total: int) -> list[int]:
    """How many placeholders each picture, tile or frame has; they are `total` all together.

    Args: entries, features per picture, clip or sample; tile, placeholders of a tile or frame, if an entry
        may hold several of them.
    """
    entries, lengths = [entry for entry in (() if entries is None else entries) if len(entry)], []
    # OneVision puts a newline behind each clip; before transformers 5.23 it was no feature of the clip.
    behind = (total - sum(map(len, entries))) // max(1, len(entries))
    for entry in entries:
        cut = tile or len(entry) // getattr(entry, "frames", 1)
        lengths += [cut] * (len(entry) // cut)
        lengths[-1] += len(entry) % cut + behind
    return lengths


def bound(function: Callable, args: tuple, kwargs: dict) -> dict:
    """Arguments by the function's own names, however they were passed."""
    return inspect.signature(function).bind(*args, **kwargs).arguments


def shown_by(mask, given: Tensor, length: int) -> Tensor:
    """(B, length) bool: the positions that a 2-D mask shows, earlier ones first; without a mask, all.

    Columns behind the sequence mean nothing, as in transformers.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        return mask[:, :length].to(given.device) != 0
    return torch.ones(len(given), length, dtype=torch.bool, device=given.device)


def kinds_of(config, call: dict | None, shown: Tensor) -> Tensor | None:
    """(B, S) int8: 1 at placeholders of pictures, 2 of clips, 0 at text; None if no features came.

    A placeholder of a kind that came without features is text.
    """
    kinds = None
    for number, kind in enumerate(("image", "video"), 1):
        if call and call["ids"] is not None and call.get(kind) is not None:
            token = getattr(config, f"{kind}_token_id")
            kinds = torch.zeros_like(shown, dtype=torch.int8) if kinds is None else kinds
            kinds = kinds.masked_fill((call["ids"] == token).to(shown.device), number)
    return kinds


def adopt(cache, decoder: nn.Module, keeps: bool) -> DynamicCache:
    """The KV cache of a call, the caller's or a new one: from now on its layers count logical positions.

    Raises: ValueError for another kind of cache, or one that was filled without LUVC; it is as it was.
    """
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    kinds = {type(layer) for layer in cache.layers} if isinstance(cache, DynamicCache) else {type(cache)}
    if kinds - {DynamicLayer, PrunedLayer}:
        raise ValueError(f"a {type(cache).__name__} is not supported; use a DynamicCache, the default")
    if kinds != {PrunedLayer}:
        if cache.get_seq_length():
            raise ValueError("this KV cache was filled without LUVC; begin anew with LUVC attached")
        cache.layers = [PrunedLayer(keeps) for _ in decoder.layers]
    return cache


def follow_mask(cache: DynamicCache, every: Tensor, start: int) -> None:
    """Hide what the mask of this call, `every` (B, start + S) bool, no longer shows of what was seen.

    Raises: ValueError if it shows what an earlier mask hid: that was never stored.
    """
    first, now = cache.layers[0], every[:, :start]
    if start and not torch.equal(now, first.shown):
        if (now & ~first.shown).any():
            raise ValueError("attention_mask shows positions that an earlier one hid; begin a new KV cache")
        for layer in cache.layers:
            layer.hide(now)
    first.shown = every


# ==== 5. The Merger: vision encoders on fewer and fewer tokens ==============================================
#
# The LLM expects one feature for each placeholder, a *slot* of the prompt, and computes positions from
# that. So slots stay as many as they are. A merged token goes to one of the slots that it stands for,
# its *home*; the others are *dead*: no layer of the LLM processes them, their size is 0. Instead of a
# feature a dead slot holds a *signpost*, how far away home is. That is no list kept somewhere, because
# features travel: `generate` computes them ahead, and repeats them for beams.
#
#     a line of slots     0    1    2    3    4    5        slots 1 to 4 were merged into one token
#     features           f0   +1   f1   -1   -2   f5        home is slot 2; slot 4 says "two back"
#     sizes               1    0    4    0    0    1        what the Pruner reads from it
#
# Many encoders make one slot of unit x unit patches. The merger merges whole slots, each patch with the
# patch in the same corner of the neighbour: grids stay even, and equal slots merge into what each of
# them was. (All of this is our choice.)
#
# One call of the encoder, step by step:
#
#     _run_vision       how large are the pictures? A `Tiles` (or `Packed`) goes into CALL
#     _before_block     before a block whose turn it is: `merge`, so that it runs on fewer tokens
#     _after_projector  `deliver`: one row per slot again, features at home, signposts elsewhere
#     read_sizes        in the decoder, by the Pruner: how many slots point to each position


@dataclass
class Grid:
    """All pictures, tiles or frames of one size, in one call of the encoder.

    They merge together, each by itself: the work grows with the number of different sizes.
    """

    numbers: list[int]
    """Which ones these are, in the order of encoding: n of them."""
    plan: list[tuple[int, int, int]]
    """(axis, H, W) at the beginning (axis 0) and after each step of `merge_plan`."""
    size: Tensor
    """(n, h, w) float32: how many slots each token of the grid stands for, as far as it is merged."""
    token: Tensor
    """(n, H * W) int64: the token that each slot is in, as a flat index of the h x w grid."""
    at: Tensor | None = None
    """(n, h * w) int64: where each token of the grid stands in a packed sequence, in slots."""


class Tiles:
    """The pictures of one call of the encoder, tiles of one size: x is (n, prefix + patches, C), row by row.

    `split` and `join` lead from the encoder's own order of tokens to one (n, h, w, unit * unit * C) per
    grid and back.

    Args: shapes, (H, W) in slots of each picture, tile or frame; unit, a slot is unit x unit patches;
        prefix, tokens in front of the grid; config; steps of the merge plan; device.
    """

    def __init__(self, shapes: list, unit: int, prefix: int, config: LUVCConfig, steps: int, device):
        self.unit, self.prefix, self.config, self.steps, self.done = unit, prefix, config, steps, 0
        self.grids: list[Grid] = []
        for H, W in dict.fromkeys(shapes):
            numbers = [i for i, shape in enumerate(shapes) if shape == (H, W)]
            plan = [(0, H, W), *(merge_plan(H, W, config.vision_keep, steps) if steps else ())]
            token = torch.arange(H * W, device=device).expand(len(numbers), -1)
            size = torch.ones(len(numbers), H, W, device=device)
            self.grids.append(Grid(numbers, plan, size, token))

    def split(self, x: Tensor, unit: int, prefix: int) -> list[Tensor]:
        """The encoder's tokens (unit: its own) or features (unit 1) -> grids of slots, without the prefix."""
        n, h, w = self.grids[0].size.shape
        if x.shape[1] != prefix + h * w * unit**2:
            raise ValueError(f"{x.shape[1]} tokens: feature layer, strategy and size must be the config's")
        x = x[:, prefix:].reshape(n, h, unit, w, unit, -1)
        return [x.transpose(2, 3).reshape(n, h, w, -1)]

    def join(self, parts: list[Tensor], unit: int, head: Tensor, whole: bool = False) -> Tensor:
        """Back to the encoder's order, behind the prefix `head`; `whole`: all slots are there again."""
        n, h, w, _ = parts[0].shape
        x = parts[0].reshape(n, h, w, unit, unit, -1).transpose(2, 3)
        return torch.cat([head, x.reshape(n, h * w * unit**2, -1)], dim=1)

    def arrange(self) -> None:
        """Called when the grids have changed: nothing to do here."""

    def arguments(self, vision: nn.Module, number: int, hidden: Tensor, kwargs: dict) -> dict:
        """What block `number` gets beside the tokens: nothing that merging changes."""
        return kwargs

    def key_sizes(self) -> Tensor:
        """(n, prefix + patches) sizes of the tokens, for the encoder's attention.

        Our choice; on a real encoder features come nearer to those of the full one (docs/results.md).
        """
        size = self.grids[0].size
        each = size[..., None].expand(*size.shape, self.unit**2)
        return self.join([each], self.unit, size.new_ones(len(size), self.prefix, 1))[..., 0]

    def merge(self, hidden: Tensor) -> Tensor:
        """The next step of the plan, for all pictures: encoder tokens -> fewer encoder tokens."""
        self.done += 1
        if all(grid.plan[self.done][1:] == grid.plan[self.done - 1][1:] for grid in self.grids):
            # Rounded away: every grid is as large as this step wants it.
            return hidden
        parts = self.split(hidden, self.unit, self.prefix)
        for i, (x, grid) in enumerate(zip(parts, self.grids, strict=True)):
            axis, *left = grid.plan[self.done]
            size, token = grid.size.to(x.device), grid.token.to(x.device)
            parts[i], grid.size, parent = self.config.merge(x, size, left[axis - 1], axis)
            grid.token = follow(token, parent)
        self.arrange()
        return self.join(parts, self.unit, hidden[:, : self.prefix])

    def deliver(self, features: Tensor, prefix: int, posts: bool) -> Tensor:
        """One row per merged token -> one row per slot: that of its token.

        With `posts`, of a token's slots only its home gets it, the middle one in reading order (of an
        even number the first of the two); the others get a signpost. DeepStack features are added to
        what is alive and need none.
        """
        if posts and self.done != self.steps:
            raise ValueError(f"{self.done} of {self.steps} merges ran, was the encoder compiled? {EAGER}")
        parts = self.split(features, 1, prefix)
        for i, (x, grid) in enumerate(zip(parts, self.grids, strict=True)):
            (_, H, W), device = grid.plan[0], x.device
            token, size = grid.token.to(device), grid.size.flatten(1).long().to(device)
            x = x.flatten(1, 2).gather(1, token[..., None].expand(-1, -1, x.shape[-1]))  # (n, H * W, C)
            if posts:
                # Sorted by token, the slots of a token stand together: home is the middle one of them.
                order, first = token.argsort(dim=1, stable=True), size.cumsum(1) - size
                home = order.gather(1, first + (size - 1) // 2).gather(1, token)  # (n, H * W): of each slot
                away = home - torch.arange(H * W, device=device)
                digits = torch.stack([away // 256, away % 256], -1)  # exact in every floating dtype
                post = nn.functional.pad(digits.to(x), (0, x.shape[2] - 2))
                x = torch.where((away == 0)[..., None], x, post)
            parts[i] = x.view(len(x), H, W, -1)
        return self.join(parts, 1, features[:, :prefix], whole=True)


class Packed(Tiles):
    """Pictures of any size in one sequence, x (patches, C), slot by slot, as Qwen's encoders have it.
    Blocks get rotary positions and where frames end; in Qwen2.5-VL some attend within windows, and
    slots stand in the order of these.

    Sizes do not weigh in these encoders' attention: without flash-attn transformers runs it frame by
    frame, so every frame would need channels of its own, in every block.
    """

    def __init__(self, vision: nn.Module, *args):
        super().__init__(*args)
        windows = hasattr(vision, "fullatt_block_indexes")
        self.window = (vision.window_size, vision.patch_size) if windows else None
        self.arrange()
        # The order of the slots before anything is merged.
        self.whole = self.back

    def arrange(self) -> None:
        """Where do the tokens of all grids stand in the sequence, and where do frames and windows end?"""
        device, unit, self.cos_sin = self.grids[0].size.device, self.unit, None
        # Pictures follow each other in the order of encoding, each in the order of its own slots or windows.
        shapes = {i: grid.size.shape[1:] for grid in self.grids for i in grid.numbers}
        frames = torch.tensor([0, *itertools.accumulate(math.prod(shapes[i]) for i in sorted(shapes))])
        lengths = {}  # of the windows of each picture, in patches
        for grid in self.grids:
            h, w = grid.size.shape[1:]
            order, windows = torch.arange(h * w), torch.tensor([0, h * w * unit**2])
            if self.window:
                patches = torch.tensor([[1, h * unit, w * unit]])
                order, windows = get_vision_window_index(patches, unit, *self.window)
            grid.at = (frames[grid.numbers][:, None] + order.argsort()).to(device)
            lengths |= dict.fromkeys(grid.numbers, windows.diff().tolist())
        self.back = torch.cat([grid.at.flatten() for grid in self.grids]).argsort()
        windows = torch.tensor([0, *itertools.accumulate(n for i in sorted(lengths) for n in lengths[i])])
        # (ends, longest) of frames, and of windows.
        both = (frames * unit**2, windows)
        self.ends = [(ends.to(device, torch.int32), int(ends.diff().max())) for ends in both]

    def split(self, x: Tensor, unit: int, prefix: int) -> list[Tensor]:
        x = x.reshape(-1, unit**2 * x.shape[-1])
        flats = (x.index_select(0, grid.at.flatten().to(x.device)) for grid in self.grids)
        return [part.view(*grid.size.shape, -1) for part, grid in zip(flats, self.grids, strict=True)]

    def join(self, parts: list[Tensor], unit: int, head: Tensor, whole: bool = False) -> Tensor:
        x = torch.cat([part.flatten(0, 2) for part in parts])
        x = x.index_select(0, (self.whole if whole else self.back).to(x.device))
        return x.reshape(len(x) * unit**2, -1)

    def rotary(self, vision: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the merged tokens: a position is the mean over the patches that were merged.

        Patches stand in squares of unit x unit, and merge with those in the same corner of other slots: so
        the mean over the slots, in patches, plus the corner. It need not be a whole number.
        """
        parts, unit, device = [], self.unit, hidden.device
        for grid in self.grids:
            (_, H, W), (n, h, w), token = grid.plan[0], grid.size.shape, grid.token.to(device)
            slot = row_and_column(H, W, device).float().expand(n, -1, -1)  # (n, H * W, 2)
            mean = slot.new_zeros(n, h * w, 2)  # of the slots of each token
            mean.scatter_reduce_(1, token[..., None].expand_as(slot), slot, "mean", include_self=False)
            corner = row_and_column(unit, unit, device)  # of the patches of a slot
            parts.append((mean[:, :, None] * unit + corner).view(n, h, w, -1))  # in patches
        at = self.join(parts, unit, hidden)
        return vision.rotary_pos_emb(hidden, at)

    def arguments(self, vision: nn.Module, number: int, hidden: Tensor, kwargs: dict) -> dict:
        """Rotary positions, and where frames or windows end, of the tokens that are left.

        The encoder worked both out for all patches, before its first block. Rotary positions change with
        the grids only, so they are made once after each merge.
        """
        self.cos_sin = self.rotary(vision, hidden) if self.cos_sin is None else self.cos_sin
        full = self.window is None or number in vision.fullatt_block_indexes
        ends, longest = self.ends[0 if full else 1]
        if kwargs.get("max_seqlen") is not None:  # FlashAttention asks for it
            kwargs["max_seqlen"] = longest
        return kwargs | {"cu_seqlens": ends, "position_embeddings": self.cos_sin}


def row_and_column(H: int, W: int, device) -> Tensor:
    """(H * W, 2): row and column of each flat index of a grid."""
    flat_index = torch.arange(H * W, device=device)
    return torch.stack([flat_index // W, flat_index % W], dim=-1)


def read_sizes(embeds: Tensor, visual: Tensor) -> Tensor:
    """What `deliver` wrote, read from the input of the LLM.

    Args: embeds (B, S, C); visual (B, S) bool, the slots.
    Returns: (B, S) float32, how many slots each position stands for; 0: a dead slot, 1: text.
    """
    # A signpost is two digits and zeros, which no projector puts out. Every slot counts for its home: a slot
    # that holds a feature for itself, a dead one for the slot that it points to.
    dead = visual & (embeds[..., 2:] == 0).all(-1)
    away = (embeds[..., 0].float() * 256 + embeds[..., 1].float()).masked_fill(~dead, 0.0)
    home = torch.arange(embeds.shape[1], device=embeds.device) + away.long()
    return torch.zeros_like(away).scatter_add_(1, home, torch.ones_like(away))


class Merger(Unit):
    """The Orthogonal Iterative Merger as a hook: `with Merger(model): model.generate(**inputs)`.

    Merged tokens need LLM layers that skip dead slots and weigh tokens by their sizes: a `Pruner` that
    prunes nothing, if no other one is given. The sizes are all that passes from the one to the other.

    Args: model, a Hugging Face VLM of a supported family (`family_of`); config, the settings, of which
        `llm_keep` is not used; pruner, one that the caller attaches together with this.
    Raises: ValueError for an unsupported model, or settings that do not fit its blocks.
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig(), pruner: Pruner | None = None):
        family = family_of(model)
        blocks = len(family.blocks)
        steps = blocks - 1 if config.vision_steps is None else config.vision_steps
        steps = steps if config.vision_keep < 1 else 0
        if steps and family.no_merger:
            raise ValueError(f"{family.no_merger}, so this model cannot merge; set vision_keep=1.0")
        if steps and not 2 <= steps <= blocks:
            raise ValueError(f"vision_steps={steps} must lie in [2, {blocks}], at most one per block")
        # Our choice: the merges are spread evenly over the blocks, `steps` of them before these blocks. The
        # first block always sees the whole picture: before it, tokens are pixels and no features.
        self.merges = {(step + 1) * blocks // (steps + 1) for step in range(steps)}
        self.config, self.family, self.steps = config, family, steps
        # The pictures that were encoded last.
        self.latest: Tiles | None = None
        own = Pruner(model, replace(config, llm_keep=1.0), family.tiles, read_sizes if steps else None)
        super().__init__(model, *(() if pruner else (own,)))

    def _hook(self) -> None:
        family = self.family
        self.wrap(family.vision, "forward", self._run_vision)
        # Nothing but the sizes of pictures is noted, for reports.
        if not self.steps:
            return
        # Blocks before the first merge run as they are; the others get what fits fewer tokens.
        for number, block in enumerate(family.blocks):
            if number >= min(self.merges):
                hook = functools.partial(self._before_block, number)
                self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                if self.config.sizes and family.side:
                    self.weigh_keys(attention_of(block), lambda: CALL.get()["pictures"].key_sizes())
        for module in (family.projector, *family.deepstack):
            hook = functools.partial(self._after_projector, module is family.projector)
            self._handles.append(module.register_forward_hook(hook))

    def _run_vision(self, plain: Callable, *args, **kwargs):
        """Encode pictures; blocks and projectors find how far they are merged in CALL."""
        family, unit, given = self.family, self.family.unit, bound(plain, args, kwargs)
        pixels = next(iter(given.values()))
        if family.side:
            shapes = [family.side] * len(pixels)
        else:
            shapes = [(h // unit, w // unit) for t, h, w in given["grid_thw"].tolist() for _ in range(t)]
        # Nothing merged: the encoder's own order will do.
        packed = self.steps and not family.side
        make = functools.partial(Packed, family.vision) if packed else Tiles
        pictures = make(shapes, unit, family.prefix, self.config, self.steps, pixels.device)
        self.latest, call = pictures, CALL.get()
        call = {} if call is None else call  # None: the encoder was called by itself
        call["pictures"] = pictures
        with noted(call):
            return plain(*args, **kwargs)

    def _before_block(self, number: int, module, args, kwargs):
        """Forward pre-hook of a block: merge, if it is its turn, and give it what fits fewer tokens."""
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        if any(isinstance(mask, Tensor) for mask in (*rest, kwargs.get("attention_mask"))):
            what = "a tile has padding, or the encoder was compiled"
            raise ValueError(f"{what}: neither can be merged; split pictures into whole tiles")
        pictures = CALL.get()["pictures"]
        if number in self.merges:
            hidden = pictures.merge(hidden)
        return (hidden, *rest), pictures.arguments(self.family.vision, number, hidden, kwargs)

    def _after_projector(self, posts: bool, module, args, features: Tensor) -> Tensor:
        """Forward hook of a projector: back to one row per slot."""
        pictures = (CALL.get() or {}).get("pictures")
        if pictures is None:
            raise ValueError("the projector was called by hand; call get_image_features, or detach() first")
        return pictures.deliver(features, self.family.prefix_slots if posts else 0, posts)


# ==== 6. Families ===========================================================================================
#
# What differs between models is where their parts are, and how large a picture is in slots. To add a
# family: find its encoder, its projector and the list of its blocks; say how many slots a picture has on
# each axis, how many patches a slot (unit), and how many tokens stand in front of the grid (prefix).
# DeepSeek-VL is the shortest example. Then add a row to FAMILIES in test_luvc.py: it gets all tests that
# the others have.


@dataclass(frozen=True)
class Family:
    """What the Merger needs of a model."""

    vision: nn.Module
    """The vision encoder."""
    projector: nn.Module
    """Encoder channels -> LLM channels, one row per slot."""
    blocks: Sequence[nn.Module]
    """Of the encoder, up to the one whose output is taken."""
    side: tuple[int, int] | None = None
    """Slots of a picture or tile, H and W; None: pictures of any size in one sequence, `grid_thw` says
    them."""
    unit: int = 1
    """A slot is unit x unit patches."""
    prefix: int = 0
    """Tokens in front of the grid inside the encoder (CLS)."""
    prefix_slots: int = 0
    """How many of these also reach the LLM."""
    deepstack: Sequence[nn.Module] = ()
    """Projectors of features for the LLM's first layers."""
    no_merger: str = ""
    """Why merging is refused."""

    tiles: dict = field(default_factory=dict)
    """Slots of a tile ("image") or frame ("video"), where features may hold several of them in one piece."""


def family_of(model: nn.Module) -> Family:
    """How this model, or the one that PEFT wraps, is built.

    Raises: ValueError if it is of no supported family.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, base = getattr(model, "config", None), getattr(model, "base_model", None)
    kind, vision = getattr(config, "model_type", type(model).__name__), getattr(config, "vision_config", None)
    if kind in ("llava", "llava_next", "llava_onevision"):
        return llava_family(kind, config, vision, base)
    if kind == "deepseek_vl":
        side = (vision.image_size // vision.patch_size,) * 2
        return Family(base.vision_model, base.aligner, blocks_of(base.vision_model), side)
    # A pixel shuffle makes a slot of 2 x 2 patches, and takes the grid for a square.
    if kind == "internvl":
        unit, blocks = round(1 / config.downsample_ratio), blocks_of(base.vision_tower)
        side = tuple(s // p // unit for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        blocks = blocks[: config.vision_feature_layer % (len(blocks) + 1)]
        return Family(base.vision_tower, base.multi_modal_projector, blocks, side, unit, prefix=1)
    if kind in ("idefics3", "smolvlm"):
        unit = config.scale_factor
        side = (vision.image_size // vision.patch_size // unit,) * 2
        tiles = {"image": math.prod(side)}  # features come sample by sample
        tower = base.vision_model
        return Family(tower, base.connector, blocks_of(tower), side, unit, tiles=tiles)
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        tower, deepstack = base.visual, getattr(base.visual, "deepstack_merger_list", ())
        return Family(tower, tower.merger, tower.blocks, unit=vision.spatial_merge_size, deepstack=deepstack)
    known = "LLaVA, DeepSeek-VL, InternVL, Idefics3, SmolVLM or Qwen-VL"
    raise ValueError(f"{kind!r} is not supported; use {known}")


def llava_family(kind: str, config, vision, base: nn.Module) -> Family:
    """LLaVA, with any of three towers, and its relatives that cut pictures into tiles."""
    tower, strategy = vision.model_type, config.vision_feature_select_strategy
    layer = config.vision_feature_layer
    prefix = int(tower in ("clip_vision_model", "dinov2"))
    if not prefix and (tower != "siglip_vision_model" or strategy != "full"):
        raise ValueError(f"tower {tower!r}, strategy {strategy!r}: use CLIP or DINOv2, or SigLIP with 'full'")
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer} must be a single layer")
    blocks, side = blocks_of(base.vision_tower), (vision.image_size // vision.patch_size,) * 2
    no_merger = "" if kind == "llava" else "tiles are rearranged after the projector"
    more = {"prefix": prefix, "prefix_slots": prefix * (strategy == "full"), "no_merger": no_merger}
    if kind == "llava_onevision":  # which halves the grids of clips
        more["tiles"] = {"video": math.ceil(side[0] / 2) ** 2}
    blocks = blocks[: layer % (len(blocks) + 1)]
    return Family(base.vision_tower, base.multi_modal_projector, blocks, side, **more)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The blocks of an encoder, which its class calls `layers` or `layer`."""
    encoder = getattr(tower, "vision_model", tower).encoder
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module of a block; DINOv2's was a module within a module before transformers 5.23."""
    attention = block.self_attn if hasattr(block, "self_attn") else block.attention
    return getattr(attention, "attention", attention)


# ==== 7. LUVC: both units, what is refused, the report ======================================================


class LUVC(Unit):
    """Merging and pruning together, in place and reversibly.

        with LUVC(model) as luvc:
            model.generate(**inputs)       # or model(...), or a pipeline: nothing else changes
        print(luvc.report())

    With everything off (`vision_keep=1.0, llm_keep=1.0`) results are bit-identical. Several threads may
    use an attached model at once. `kept`, `sizes` and `report` then speak of whichever prefill ended
    last, `groups` of the pictures that were encoded last.

    Args: model, a Hugging Face VLM of a supported family (`family_of`); config, the settings.
    Raises: ValueError for an unsupported model, or settings that do not fit its layers or blocks; when
        attached, for a call that would go wrong (`check_call`).
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig()):
        # All that can be wrong with the model or the settings is found here, before anything is changed.
        self.config, self.family = config, family_of(model)
        merges = read_sizes if config.vision_keep < 1 else None
        self.pruner = Pruner(model, config, self.family.tiles, merges)
        self.merger = Merger(model, config, self.pruner)
        super().__init__(model, self.pruner, self.merger)
        self.pruner.guard = check_call
        check_decoder(self.pruner.decoder)

    def _hook(self) -> None:
        if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in self.model.modules()):
            raise ValueError(f"the model is compiled: {EAGER}")
        if hasattr(self.model, "_prefill") and not self.pruner.off:
            self.replace(self.model, "init_continuous_batching", functools.partial(refuse, None))
            self.replace(self.model, "_prefill", functools.partial(refuse, self.model._prefill))

    def _latest(self, unit: Pruner | Merger):
        if unit.latest is None:
            raise ValueError("nothing happened yet: call the model with a picture while LUVC is attached")
        return unit.latest

    @property
    def kept(self) -> list[list[Tensor]]:
        """`kept[layer][sample]`: positions that a decoder layer processed in the latest prefill, 1-D int64.

        Ascending, counted from the beginning of the KV cache, without padding. ValueError before a prefill.
        """
        prompt = self._latest(self.pruner)
        return [[row.nonzero()[:, 0] + prompt.start for row in size] for size, _ in prompt.layers]

    @property
    def sizes(self) -> list[list[Tensor]]:
        """`sizes[layer][sample]`: how many slots each position of `kept` stands for, 1-D float32; text 1."""
        return [[row[row > 0] for row in size] for size, _ in self._latest(self.pruner).layers]

    @property
    def groups(self) -> list[Tensor]:
        """For each picture, tile or frame encoded last: (H * W,) int64, the merged token of each slot."""
        grids, found = self._latest(self.merger).grids, {}
        for grid in grids:
            found |= zip(grid.numbers, grid.token, strict=True)
        return [found[number] for number in sorted(found)]

    def report(self) -> "Report":
        """Numbers of the latest prefill, see `Report`. Raises: ValueError if there was none yet."""
        return Report.of(self._latest(self.pruner), self)


@dataclass
class Report:
    """What LUVC did in the latest prefill, summed over the batch. `print` it.

    `flops_left` is the fraction of the LLM's prefill arithmetic that is left. A decoder layer whose
    linear maps hold M weights, with attention of width A (heads times head size), costs per sample, for
    n positions behind p stored ones, 2 * M * n + 4 * A * (n * p + n * (n + 1) / 2) floating-point
    operations. Embedding, encoder, output head and the channels that sizes add to keys are not counted.
    """

    # Per encoder block, of the pictures encoded last, CLS not counted.
    vision_tokens: list[int]
    visual_tokens: list[int]  # per decoder layer
    # Per decoder layer, text included, padding not.
    positions: list[int]
    # Visual tokens per decoder layer of the plain model.
    visual_full: int
    # Positions per decoder layer of the plain model.
    positions_full: int
    # A KV cache after the prefill, in the dtype of the embeddings, all devices together.
    kv_bytes: int
    # What the plain model's holds, padding included.
    kv_bytes_full: int
    flops_left: float

    @staticmethod
    def of(prompt: Prompt, luvc: LUVC) -> "Report":
        """The report of a prefill of `luvc`."""
        decoder, family, off = luvc.pruner.decoder, luvc.family, luvc.pruner.off
        layer, config, head = decoder.layers[0], decoder.config, decoder.layers[0].self_attn.head_dim
        # Quantised linear maps are of many classes; PEFT wraps a base_layer, which would be counted twice.
        linear = (m for m in layer.modules() if hasattr(m, "in_features") and not hasattr(m, "base_layer"))
        M = sum(m.in_features * m.out_features for m in linear)
        # Index 0 is LUVC, index 1 the plain model, which processes what is shown, dead slots as well:
        # positions n (2, layers, B), behind p (2, layers, 1) stored ones.
        here = torch.stack([size.cpu() > 0 for size, _ in prompt.layers])  # (layers, B, S)
        visual = torch.zeros_like(here[0]) if prompt.kinds is None else prompt.kinds.cpu() > 0
        n = torch.stack([here, (visual | here[0]).expand_as(here)]).sum(-1).double()
        p = torch.tensor([[past for _, past in prompt.layers], [prompt.start] * len(here)])[..., None]
        flops = 2 * M * n + 4 * config.num_attention_heads * head * n * (p + (n + 1) / 2)
        B, S = visual.shape
        # What a KV cache holds: every sample of a batch as many columns as the longest one.
        columns, full = (p[0, :, 0] + n[0].amax(-1)).sum(), len(here) * (prompt.start + S)
        # Bytes of one channel of keys and values.
        each = 2 * B * config.num_key_value_heads * decoder.embed_tokens.weight.element_size()
        stored = full * head if off else int(columns) * (head + EXTRA)
        pictures, merges = luvc.merger.latest, luvc.merger.merges
        # How many merges lie before each block; a block's tokens are those of the plan after so many steps.
        steps = [sum(merge <= block for merge in merges) for block in range(len(family.blocks))]
        grids = pictures.grids if pictures else []
        slots = [sum(len(g.numbers) * math.prod(g.plan[step][1:]) for g in grids) for step in steps]
        left, plain = flops.sum((1, 2)).tolist()
        tokens = [count * family.unit**2 for count in slots], (here & visual).sum((1, 2)).tolist()
        sums = here.sum((1, 2)).tolist(), int(visual.sum()), int(n[1, 0].sum())
        return Report(*tokens, *sums, each * stored, each * full * head, left / plain)

    def __str__(self) -> str:
        """A table with a bar per decoder layer: as long as the positions that are left in it."""
        plain = f"{self.visual_full} and {self.positions_full}"
        lines = [f"vision tokens, per encoder block: {', '.join(map(str, self.vision_tokens))}"]
        lines.append(f"decoder layer, visual tokens, all positions (plain: {plain})")
        for layer, (visual, every) in enumerate(zip(self.visual_tokens, self.positions, strict=True)):
            lines.append(f"{layer:5d} {visual:6d} {every:6d} {'#' * round(60 * every / self.positions_full)}")
        lines.append(f"KV cache {self.kv_bytes:,} bytes, plain {self.kv_bytes_full:,}")
        return "\n".join([*lines, f"LLM prefill FLOPs left {self.flops_left:.1%}"])


# The rest of this section is no part of the method: it stops models and calls that would go wrong in silence.
# Why these? A sliding window counts stored columns, but a pruned layer stores fewer of them than positions.
# Linear attention has no keys to leave out. A mask made by the caller has one column per position, and so no
# layer's shape. In packed rows and under checkpointing, a layer would see another sequence than the Prompt
# says. Whatever is refused is refused before the model or the KV cache is changed.


def check_decoder(decoder: nn.Module) -> None:
    """Refuse an LLM that the Pruner cannot work with, when LUVC is made.

    Raises: ValueError that names the kind of layer, the decoder or the attention, and what is supported.
    """
    text = decoder.config
    window = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    layers = set(getattr(text, "layer_types", None) or [window])
    if layers != {"full_attention"}:
        raise ValueError(f"the LLM has layers of kind {sorted(layers)}; only full attention is supported")
    known = {"llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
    if text.model_type not in known:
        raise ValueError(f"decoder {text.model_type!r} is not supported; use one of {sorted(known)}")
    attention = text._attn_implementation
    if attention not in MASKS or attention == "flex_attention":
        raise ValueError(f"attention {attention!r} is not supported; use sdpa, flash_attention_2 or eager")


def check_call(pruner: Pruner, call: dict | None, kwargs: dict, given: Tensor, shown: Tensor, kinds) -> None:
    """Raises: ValueError for a call of the decoder that would go wrong. given: (B, S, C) embeds or (B,
    S) ids; the rest as in `Pruner._run_decoder`."""
    mask, at, S = kwargs.get("attention_mask"), kwargs.get("position_ids"), given.shape[1]
    if torch.compiler.is_exporting():
        raise ValueError(EAGER)
    if call is None and given.ndim == 3:
        raise ValueError("the LLM was called by hand with inputs_embeds; call the model, with input_ids")
    if call is not None and call["ids"] is None and S > 1:
        raise ValueError("LUVC finds the pictures by input_ids; pass these instead of inputs_embeds")
    model = pruner.model
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError("LUVC cannot train under gradient checkpointing; disable it, or detach()")
    start = getattr(kwargs[CACHE], "get_seq_length", int)()
    if mask is not None and (getattr(mask, "ndim", 0) != 2 or mask.shape[1] < start + S):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        want = f"a 2-D one of {start} + {S} columns, or none, and a DynamicCache"
        raise ValueError(f"attention_mask {got}: LUVC needs {want}")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if at is not None and S > 1:
        # Where there is padding, positions may be anything.
        text = shown.all(1, keepdim=True)
        # M-RoPE: of its rows the first, which rises in text alone.
        if at.ndim == 3:
            at, text = at[0], text if kinds is None else text & (kinds == 0)
        at = at.to(text.device) * text
        packed = packed or bool(((at < at.cummax(-1).values) & text).any())
    if packed:
        raise ValueError("position_ids begin again within a row: LUVC needs one sequence per row")


def refuse(plain: Callable | None, *args, **kwargs):
    """Stands in for ways to generate that would fail in silence, or cut pictures in two.

    Continuous batching (plain None) has a KV cache of pages, of one length for all layers. A prefill in
    chunks may begin a new one inside of a picture, and the filter needs all of it.
    """
    if plain is None or args[1].prefill_chunk_size is not None:
        raise ValueError("LUVC has neither continuous batching nor prefill_chunk_size; use plain generate()")
    return plain(*args, **kwargs)


# ==== 8. The command line: one question about one picture, with and without LUVC ============================

TOY = Path(__file__).resolve().parent / "toy"


def load(name: str, device: str, dtype: str = "auto", attn: str = "sdpa"):
    """(model, processor) of a checkpoint folder or hub name; only safetensors, no code that comes along."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # Is the device there? Asked before gigabytes are read.
    torch.empty(0, device=device)
    where, safe = TOY if name == "toy" else name, {"use_safetensors": True, "trust_remote_code": False}
    processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    make = AutoModelForImageTextToText.from_pretrained
    return make(where, dtype=dtype, attn_implementation=attn, **safe).to(device).eval(), processor


def encode(processor, picture, prompt: str):
    """Model inputs for one picture and one question, through the processor's chat template if it has one.

    Any processor of transformers will do; one without a template gets the placeholder in front.
    """
    text = f"<image>\n{prompt}"
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


def ask(args: argparse.Namespace) -> str:
    """One question with and without LUVC.

    Args: args, what `main` parsed. Returns: the text, or one JSON object, that is printed.
    Raises: whatever loading a model or a picture raises; ValueError for settings that do not fit.
    """
    from PIL import Image
    from transformers.utils import logging

    logging.disable_progress_bar()  # errors come in one line
    if args.model == "toy" and not (TOY / "config.json").is_file():
        raise ValueError("--model toy: only a checkout of the repository holds it; name another checkpoint")
    config = LUVCConfig(vision_keep=args.vision_keep, llm_keep=args.llm_keep)
    picture = Image.open(args.image).convert("RGB")
    model, processor = load(args.model, args.device, args.dtype, args.attn)
    luvc, inputs = LUVC(model, config), encode(processor, picture, args.prompt).to(model.device, model.dtype)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    @torch.inference_mode()
    def prefill() -> float:
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1).logits.sum().item()  # waits for the device
        return (time.perf_counter() - start) * 1e3

    # The answers first, then the times: plain and LUVC in turns, since machines are noisy.
    full, times = answer(), []
    with luvc:
        less, report = answer(), luvc.report()
    for _ in range(9):
        plain = prefill()
        with luvc:
            times.append((plain, prefill()))
    slow, fast = torch.tensor(times[2:]).median(dim=0).values.tolist()  # two to warm up
    if not args.json:
        text = (
            f"{args.prompt}\n  plain: {full}\n  LUVC:  {less}\n\n{report}\nprefill, vision encoder included: "
        )
        return text + f"{slow:.1f} -> {fast:.1f} ms ({slow / fast:.2f}x); {model.device}, {model.dtype}"
    result = {"model": args.model, "prompt": args.prompt, "answer_full": full, "answer_luvc": less}
    result |= {"same_answer": full == less, "kv_bytes_luvc": report.kv_bytes}
    parts = ("vision_tokens", "visual_tokens", "positions", "flops_left", "kv_bytes_full")
    result |= {part: getattr(report, part) for part in parts}
    return json.dumps(result | {"prefill_ms_full": slow, "prefill_ms_luvc": fast, "speedup": slow / fast})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one line about what was wrong."""

    def fractions(text: str) -> float | tuple[float, ...]:
        numbers = tuple(float(part) for part in text.split(","))
        return numbers[0] if len(numbers) == 1 else numbers

    def complain(message: str):
        raise ValueError(message)

    parser = argparse.ArgumentParser("luvc.py", description="Ask about a picture, with and without LUVC.")
    parser.error = complain
    add, default = parser.add_argument, LUVCConfig()
    add("--model", default="toy", help="checkpoint folder or hub name (default: the toy beside this file)")
    add("--image", default=TOY / "example.png", help="picture file (default: the toy's example)")
    add("--prompt", default="what number is on the striped thing?", help="(default: %(default)r)")
    add("--vision-keep", type=float, default=default.vision_keep, metavar="F", help="as in LUVCConfig")
    add("--llm-keep", type=fractions, default=default.llm_keep, metavar="F|F,F,...", help="as in LUVCConfig")
    add("--max-new-tokens", type=int, default=16, metavar="N")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--attn", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    add("--json", action="store_true", help="print one JSON object instead")
    try:
        print(ask(parser.parse_args(argv)))
    except (ValueError, OSError, ImportError, RuntimeError, AssertionError) as error:  # what loading raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        given = " ".join(sys.argv[1:] if argv is None else argv)
        print(f"luvc.py: error: {reason} (given: {given}; toy, cpu, sdpa always work)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
