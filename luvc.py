"""LUVC in one file: vision-language models made faster without training, by dropping visual tokens.

A reference implementation of *Towards Lossless Ultimate Vision Token Compression for VLMs* (Zheng, Huang,
Jiang, Hu, Chen; arXiv 2512.09010) on stock Hugging Face transformers:

    with LUVC(model):                      # any supported VLM, in place
        model.generate(**inputs)           # your own code, unchanged

A picture becomes hundreds of visual tokens, and the LLM pays for each of them in every layer. LUVC has two
units. The **Orthogonal Iterative Merger** (OIM) merges neighbouring tokens inside the vision encoder, along
one spatial axis at a time. The **Spectrum Pruning Unit** (SPU) prunes visual tokens inside the LLM, layer
after layer, until none are left at the last one; it scores them with a low-pass filter instead of attention,
so no attention map is ever needed and FlashAttention keeps working. What is left weighs in attention as much
as what it stands for.

Only the paper's abstract and short summaries were available to us. What it states and what we choose is
listed in README.md ("The ledger"); a choice of ours is marked `Our choice` where it is made.

How to read: top to bottom. Sections 1 and 2 are the algorithms: pure functions that need only torch, made to
be copied. Section 3 holds the settings, section 4 hooks both units into a model (LLaVA, Qwen2-VL, Qwen2.5-VL,
Qwen3-VL, InternVL, Idefics3 and SmolVLM; LLaVA-NeXT and LLaVA-OneVision with the pruner alone), section 5
runs it.

Symbols, in shapes and names:
    B   batch                            N   visual tokens of one picture
    H W token grid of one picture        K   tokens kept
    C   channels                         S   sequence length of one forward call of the LLM
    L   layers of the LLM                P   positions that the KV cache has seen before this call

What this file does not do: other families (`LAYOUTS` is the place), static or quantised KV caches, layers
with sliding windows or linear attention, cropping the cache (assisted decoding), training with gradient
checkpointing, 4-D attention masks made by the caller. All of these are refused with an error that says so.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# ======================================================================================================
# 1. Merging: the Orthogonal Iterative Merger (needs only torch)
# ======================================================================================================


def merge_axis(x: Tensor, size: Tensor, keep: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge neighbouring tokens along one axis of the grid until `keep` are left on it.

    Every line of the axis is cut at its `keep - 1` sharpest boundaries, where the cosine similarity of two
    neighbours is lowest; on a tie the lower index is cut. Each run between two cuts becomes its size-weighted
    mean. All lines lose the same number of tokens, so the grid stays a rectangle, and the work is one sort of
    each short line, one `cumsum` and one `index_add`, where global matching compares all pairs of tokens.

    Args:
        x: (B, H, W, C) floating, the tokens. Zero tokens are legal: a zero token has similarity 1 to another
            zero token and 0 to anything else.
        size: (B, H, W), how many original tokens each token stands for, > 0 (not checked: reading the values
            would wait for the GPU). All ones to begin with.
        keep: tokens left on the axis, in [1, length of the axis].
        axis: 1 merges along H, 2 along W.

    Returns:
        x: as `x`, with `keep` tokens on the axis; same dtype, accumulated in float32 or better.
        size: as `size`, likewise; the sizes of a line sum to what they summed to before.
        parent: (B, H, W) int64, the index on that axis of the output token that each input token went into.

    Raises:
        ValueError: wrong rank or dtype, a `size` of another shape, `axis` or `keep` out of range.

    Source: iterative merging, orthogonal in the spatial axes, is the paper's; the rule is our choice.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)}, {x.dtype}, must be (B, H, W, C) and floating")
    if size.shape != x.shape[:3]:
        raise ValueError(f"size has shape {tuple(size.shape)}; for this x it must be {tuple(x.shape[:3])}")
    if axis not in (1, 2):
        raise ValueError(f"axis={axis} must be 1 (merge along H) or 2 (merge along W)")
    if not 1 <= keep <= x.shape[axis]:
        raise ValueError(f"keep={keep} must lie in [1, {x.shape[axis]}], the length of axis {axis}")

    if axis == 1:  # merging along H is merging along W of the transposed grid
        x, size, parent = merge_axis(x.transpose(1, 2), size.transpose(1, 2), keep, axis=2)
        return x.transpose(1, 2), size.transpose(1, 2), parent.transpose(1, 2)

    B, H, W, C = x.shape
    if keep == W:
        return x, size, torch.arange(W, device=x.device).expand(B, H, W)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    token, mass = x.to(accumulate), size.to(accumulate)

    # How alike are neighbours? The floor only guards 0 / 0; two zero tokens are alike by definition.
    norm = torch.linalg.vector_norm(token, dim=-1)  # (B, H, W)
    dot = torch.linalg.vecdot(token[:, :, :-1], token[:, :, 1:])  # (B, H, W - 1)
    similar = dot / (norm[:, :, :-1] * norm[:, :, 1:]).clamp(min=torch.finfo(accumulate).tiny)
    similar = similar.masked_fill((norm[:, :, :-1] == 0) & (norm[:, :, 1:] == 0), 1.0)

    # Boundary i lies between tokens i and i + 1: a run starts at i + 1. Stable, so ties cut the lower index.
    cut = similar.sort(dim=-1, stable=True).indices[..., : keep - 1]
    starts = torch.zeros(B, H, W, dtype=torch.int64, device=x.device).scatter_(-1, cut + 1, 1)
    parent = starts.cumsum(-1)  # 0 0 1 1 1 2 ...: how many runs have started before or at this token

    # A run becomes one token: nothing is thrown away here, only averaged.
    total = mass.new_zeros(B, H, keep).scatter_add_(-1, parent, mass)
    row = torch.arange(B * H, device=x.device).view(B, H, 1) * keep + parent  # of all tokens that are left
    weighted = (token * mass[..., None]).flatten(0, 2)
    merged = token.new_zeros(B * H * keep, C).index_add_(0, row.flatten(), weighted)
    return merged.view(B, H, keep, C).div_(total[..., None]).to(x.dtype), total.to(size.dtype), parent


def merge_plan(H: int, W: int, keep: float, steps: int) -> list[tuple[int, int, int]]:
    """Which axis merges at which step, and the grid after each step: a list of (axis, H, W).

    The axes alternate W, H, W, H. Each axis shrinks to the square root of `keep` (a single step: W alone, to
    `keep`), in equal portions over its steps, to the nearest whole number of tokens and never below one.

    >>> merge_plan(24, 24, keep=0.25, steps=4)
    [(2, 24, 18), (1, 18, 18), (2, 18, 12), (1, 12, 12)]

    Args:
        H, W: the grid before merging, in tokens.
        keep: fraction of the H * W tokens that is left, in (0, 1]; 1 gives an empty plan.
        steps: number of merges, >= 1.

    Raises:
        ValueError: an argument out of its range.

    Source: "iterative" and "orthogonal" are the paper's; order, fractions and portions are our choice.
    """
    if H < 1 or W < 1 or steps < 1:
        raise ValueError(f"H={H}, W={W} and steps={steps} must each be at least 1")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must lie in (0, 1]")
    if keep == 1:
        return []
    portions = {2: (steps + 1) // 2, 1: steps // 2}  # how often each axis has its turn
    fraction = {2: keep if steps == 1 else math.sqrt(keep), 1: math.sqrt(keep)}
    full, plan, now = {1: H, 2: W}, [], {1: H, 2: W}
    for step in range(steps):
        axis, turn = (2, 1)[step % 2], step // 2 + 1
        left = 1 - (1 - fraction[axis]) * turn / portions[axis]
        now[axis] = max(1, math.floor(full[axis] * left + 0.5))
        plan.append((axis, now[1], now[2]))
    return plan


def follow(token: Tensor, parent: Tensor, axis: int) -> Tensor:
    """Which token of the merged grid each original patch is in after one more merge.

    Args:
        token: (B, N) int64, for each original patch the flat index (row * W + column) of its token so far.
        parent: (B, H, W) int64 as returned by `merge_axis`, on the grid so far.
        axis: the axis that was merged, 1 or 2.

    Returns:
        (B, N) int64, the flat index of its token on the new grid.

    Source: our choice (bookkeeping).
    """
    W = parent.shape[2]
    moved = parent.flatten(1).gather(1, token)  # the new index on the merged axis
    row, column = token // W, token % W
    if axis == 1:
        return moved * W + column
    columns = parent[:1, :1, -1] + 1  # the last token is in the last run; on the device, so no waiting for it
    return row * columns + moved


def centres(token: Tensor, tokens: int, W: int) -> Tensor:
    """Where merged tokens are: the mean place of the patches that are in them.

    Args:
        token: (B, N) int64, the merged token that each original patch is in, as `follow` returns it.
        tokens: how many merged tokens there are.
        W: columns of the original grid.

    Returns:
        (B, tokens, 2) float32: row and column.

    Source: our choice; the rotary position of a merged token in an encoder that has such.
    """
    B, N = token.shape
    patch = torch.arange(N, device=token.device)
    place = torch.stack([patch // W, patch % W], dim=-1).float().expand(B, N, 2)
    count = place.new_zeros(B, tokens).scatter_add_(1, token, place.new_ones(B, N))
    index = token[..., None].expand(B, N, 2)
    return place.new_zeros(B, tokens, 2).scatter_add_(1, index, place) / count[..., None]


def home_slots(token: Tensor, tokens: int, W: int) -> Tensor:
    """One original patch for each merged token: of its own patches the one nearest its centre of mass.

    Its own, so that no two tokens claim the same patch: the centre of a bent group can lie outside of it.

    Args:
        token, tokens, W: as for `centres`.

    Returns:
        (B, tokens) int64: the flat index of the representing patch; on a tie the lowest.

    Source: our choice. The LLM needs a position for each token that is left (see section 4).
    """
    B, N = token.shape
    patch = torch.arange(N, device=token.device).expand(B, N)
    place = torch.stack([patch // W, patch % W], dim=-1).float()  # (B, N, 2): row and column
    own_centre = centres(token, tokens, W).gather(1, token[..., None].expand(B, N, 2))
    distance = (place - own_centre).square().sum(-1)  # (B, N)
    nearest = distance.new_full((B, tokens), torch.inf).scatter_reduce_(1, token, distance, "amin")
    candidate = torch.where(distance == nearest.gather(1, token), patch, N)
    return patch.new_full((B, tokens), N).scatter_reduce_(1, token, candidate, "amin")


# ======================================================================================================
# 2. Pruning: the Spectrum Pruning Unit (needs only torch)
# ======================================================================================================


def low_pass(x: Tensor, cutoff: float, dim: int = 1) -> Tensor:
    """Keep the slow part of a sequence: DC and the lowest `cutoff` of the other frequencies of the real FFT.

    A sequence of N values has N // 2 frequencies beside DC; the lowest `cutoff` * (N // 2) of them pass, to
    the nearest whole number. `cutoff` 1 is the identity, 0 leaves the mean.

    Args:
        x: floating, any shape with at least one value along `dim`.
        cutoff: fraction of the frequencies that pass, in [0, 1].
        dim: the dimension to filter along.

    Returns:
        float32, the shape of `x`.

    Raises:
        ValueError: `x` not floating or without values along `dim`, or `cutoff` outside [0, 1].

    Source: that the filter is a low-pass one is the paper's; the transform and the cutoff are our choice.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[dim] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}, {x.dtype}, must be floating, not empty on dim={dim}")
    if not 0 <= cutoff <= 1:
        raise ValueError(f"cutoff={cutoff} must lie in [0, 1]")
    N = x.shape[dim]
    passed = 1 + math.floor(cutoff * (N // 2) + 0.5)
    if passed == N // 2 + 1:
        return x.float()
    spectrum = torch.fft.rfft(x.float(), dim=dim)  # N values -> N // 2 + 1 frequencies, number 0 is DC
    spectrum.narrow(dim, passed, spectrum.shape[dim] - passed).zero_()
    return torch.fft.irfft(spectrum, n=N, dim=dim)


def spectral_score(x: Tensor, cutoff: float, keep: str = "detail") -> Tensor:
    """Score each token by what a low-pass filter along the tokens makes of it; no attention, no similarities.

    A token that the filter reproduces from its neighbours is redundant; what it removes is detail that would
    be lost with the token. The score does not depend on position: shifting tokens in a circle shifts scores.

    Args:
        x: (B, N, C) floating, the visual tokens of one picture in sequence order, N >= 1.
        cutoff: as for `low_pass`.
        keep: "detail" scores what the filter removes, "smooth" what it passes (the ablation).

    Returns:
        (B, N) float32, >= 0: the norm over the channels. What is below the rounding error of the FFT counts
        as 0, so that tokens which the filter explains completely tie.

    Raises:
        ValueError: wrong rank, `keep` unknown, or what `low_pass` raises.

    Source: the low-pass filter and position invariance are the paper's; scoring the residual is our choice.
    The README has the measurement of both directions.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, N, C)")
    if keep not in ("detail", "smooth"):
        raise ValueError(f'keep={keep!r} must be "detail" or "smooth"')
    slow = low_pass(x, cutoff)
    score = (slow if keep == "smooth" else x.float() - slow).norm(dim=-1)
    rounding = 8 * torch.finfo(torch.float32).eps * x.float().norm(dim=-1).amax(dim=1, keepdim=True)
    return score.masked_fill(score <= rounding, 0.0)


def spectral_prune(
    x: Tensor, keep: int, cutoff: float, score: str = "detail", normalize: bool = True
) -> Tensor:
    """Positions of the `keep` tokens with the highest spectral score.

    Args:
        x: (B, N, C) floating, the visual tokens of one picture in sequence order.
        keep: how many are kept, in [0, N].
        cutoff, score: as for `spectral_score`.
        normalize: bring every token to norm 1 first. Big models have a few tokens of huge norm that would
            otherwise ring through the filter; and a layer normalises its input as well.

    Returns:
        (B, keep) int64, ascending; ties go to the lower index.

    Raises:
        ValueError: `keep` outside [0, N], or what `spectral_score` raises.

    Source: pruning by a low-pass filter is the paper's; `normalize` is our choice.
    """
    if x.ndim != 3 or not 0 <= keep <= x.shape[1]:
        raise ValueError(f"keep={keep} must lie in [0, N] for x of shape (B, N, C), here {tuple(x.shape)}")
    if keep == 0:  # also when N is 0, where there is nothing to filter
        return torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    if normalize:
        x = nn.functional.normalize(x.float(), dim=-1)  # a zero token stays zero
    order = spectral_score(x, cutoff, score).sort(dim=1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=1).values


def inherit(size: Tensor, kept: Tensor) -> Tensor:
    """Pass the sizes of pruned tokens on: each to the nearest token that is kept, on a tie to the earlier.

    Args:
        size: (B, N), how many original tokens each token stands for.
        kept: (B, K) int64, the tokens that stay, ascending, without repeats, K >= 1.

    Returns:
        (B, K): the sizes of the tokens that stay; a row sums to what it summed to before.

    Source: our choice (see `LUVCConfig.sizes`).
    """
    middle = (kept[:, :-1] + kept[:, 1:]) // 2  # the last token that is nearer to its left neighbour
    starts = torch.zeros_like(size, dtype=torch.int64).scatter_(1, middle + 1, 1)
    heir = starts.cumsum(1)  # 0 0 1 1 1 2 ...: the kept token that each token's size goes to
    return size.new_zeros(kept.shape).scatter_add_(1, heir, size)


# ======================================================================================================
# 3. Settings
# ======================================================================================================


@functools.lru_cache(maxsize=32)
def projection(C: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(C, channels): random, and the same in every call.

    A random projection nearly keeps lengths (Johnson and Lindenstrauss, 1984), and the filter is linear: so
    what the filter removes has nearly the same length in the projection. Source: our choice, see README.
    """
    with torch.inference_mode(False):  # whoever asks first may run inference, who comes next may train
        numbers = torch.randn(C, channels, generator=torch.Generator().manual_seed(0), device="cpu")
        return (numbers / math.sqrt(channels)).to(device, dtype)


@dataclass(frozen=True)
class LUVCConfig:
    """What is merged and pruned, checked when it is made.

    Every default is our choice: the paper's numbers were not available. See the README for the measurements.

    Raises:
        ValueError: a value outside its range, NaN included.
    """

    vision_keep: float = 0.5625
    """Fraction of the grid that leaves the encoder, in (0, 1]; 24 x 24 become 18 x 18. 1.0: merger off."""

    vision_steps: int = 2
    """Merges inside the encoder, along W, H, W, ..., spread evenly over its blocks; at most one per block."""

    llm_keep: float | Sequence[float] | None = None
    """Fraction of a picture's visual tokens that each decoder layer processes, counted from what the encoder
    delivered. None: linear, from 1 at the first layer to 0 at the last. A float: the same in all layers. A
    sequence: one fraction per layer, each in [0, 1], never increasing. 1.0: pruner off."""

    cutoff: float = 0.5
    """Fraction of the frequencies that the pruner's low-pass filter lets pass, in [0, 1]."""

    score: str | Callable[[Tensor, int], Tensor] = "detail"
    """"detail" keeps what the filter removes, "smooth" what it passes. For ablations and for schemes of your
    own: a function (x (B, N, C), keep) -> (B, keep) ascending positions, as `spectral_prune` returns them."""

    sizes: bool = True
    """Let a token weigh as much in the LLM's attention as the patches that it stands for: those merged into
    it, and those pruned next to it. False: every token weighs the same."""

    normalize: bool = True
    """Bring every token to norm 1 before the filter. False: the raw hidden states."""

    channels: int = 64
    """Tokens of more channels than this are scored in a random projection to so many (see `projection`). What
    scoring costs then hardly depends on the width of the LLM."""

    merge: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]] = merge_axis
    """The function that merges along one axis, for ablations; its contract is that of `merge_axis`."""

    def __post_init__(self):
        if not 0 < self.vision_keep <= 1:
            raise ValueError(f"vision_keep={self.vision_keep} must lie in (0, 1]; 1.0 turns the merger off")
        if not isinstance(self.vision_steps, int) or self.vision_steps < 1:
            raise ValueError(f"vision_steps={self.vision_steps} must be a whole number of at least 1")
        if not 0 <= self.cutoff <= 1:
            raise ValueError(f"cutoff={self.cutoff} must lie in [0, 1]")
        if not callable(self.score) and self.score not in ("detail", "smooth"):
            raise ValueError(f'score={self.score!r} must be "detail", "smooth" or a function (x, keep)')
        if not isinstance(self.channels, int) or self.channels < 1:
            raise ValueError(f"channels={self.channels} must be a whole number of at least 1")
        if not callable(self.merge):
            raise ValueError(f"merge={self.merge!r} must be a function with the contract of merge_axis")
        if self.llm_keep is None:
            return
        if isinstance(self.llm_keep, Sequence) and not isinstance(self.llm_keep, str):
            object.__setattr__(self, "llm_keep", tuple(self.llm_keep))  # the caller's list stays the caller's
        fractions = self.llm_keep if isinstance(self.llm_keep, tuple) else (self.llm_keep,)
        if not fractions or not all(isinstance(f, (int, float)) and 0 <= f <= 1 for f in fractions):
            raise ValueError(f"llm_keep={self.llm_keep} must be None or in [0, 1]; 1.0 turns the pruner off")
        for layer, (before, after) in enumerate(itertools.pairwise(fractions), start=1):
            if after > before:
                raise ValueError(f"llm_keep rises from {before} to {after} at layer {layer}; it must not")

    def fractions(self, layers: int) -> list[float]:
        """`llm_keep` spelled out: the fraction of the visual tokens for each of `layers` decoder layers.

        Raises:
            ValueError: a sequence of another length, or fewer than 2 layers for the linear schedule.
        """
        if self.llm_keep is None:
            if layers < 2:
                raise ValueError(f"the linear schedule needs at least 2 layers, not {layers}; set llm_keep")
            return [1 - layer / (layers - 1) for layer in range(layers)]
        if isinstance(self.llm_keep, tuple):
            if len(self.llm_keep) != layers:
                raise ValueError(f"llm_keep has {len(self.llm_keep)} fractions for {layers} decoder layers")
            return list(self.llm_keep)
        return [float(self.llm_keep)] * layers

    def prune(self, x: Tensor, keep: int) -> Tensor:
        """Positions (B, keep) that these settings keep of the tokens x (B, N, C)."""
        if callable(self.score):
            return self.score(x, keep)
        if keep and x.shape[2] > self.channels:
            x = x @ projection(x.shape[2], self.channels, x.device, x.dtype)
        return spectral_prune(x, keep, self.cutoff, self.score, self.normalize)


# ======================================================================================================
# 4. The wrapper: both units inside a Hugging Face VLM
# ======================================================================================================
#
# One idea keeps this small: *logical* and *physical* sequence. Everything outside the layers keeps seeing the
# logical sequence: input_ids, attention mask, position ids, logits, cache length, hidden_states. Each decoder
# layer physically processes a subset: gather the rows that are kept, run the layer as it is, scatter its
# output back. A pruned token just stops being updated and rides along in the residual stream.
#
#     logical   | t t v v v v v v v v t t t |      t text, v visual
#     layer 0   | t t v v v v v v v v t t t |
#     layer 5   | t t v . v . . v v . t t t |      what the layer computes is a shorter causal sequence;
#     last one  | t t . . . . . . . . t t t |      rotary positions are those of the logical sequence
#
# The encoder has fewer places to hide. After the projector each merged token is written into one of the slots
# that it stands for (`home_slots`), so that the number of placeholders in the prompt stays what model and
# processor expect. The other slots are *dead*: no decoder layer ever processes them, not even the first.
# Instead of a feature a dead slot holds a *signpost*, how far away its token's slot is. Signposts instead of
# a list kept somewhere, because features travel: `generate` computes them ahead, and repeats them for beams.

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.vision_utils import get_vision_window_index  # noqa: E402

# ---- 4.1 Layouts: where the parts of a family of models are ------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What LUVC has to know about a model. A new family is a function that fills this in, in `LAYOUTS`.

    A *slot* is a placeholder in input_ids, to be replaced by one visual token. It stands for `unit` x `unit`
    patches of the encoder, which patch mergers and pixel shuffles join behind it. The merger merges whole
    slots, each patch with the patch in the same corner of the neighbour: so grids of patches stay even, and
    two equal slots merge into what each of them was. (Our choice.)
    """

    base: nn.Module  # its forward sees input_ids
    decoder: nn.Module  # the LLM without its head
    vision: nn.Module  # the vision encoder
    blocks: Sequence[nn.Module]  # of the vision encoder
    projector: nn.Module  # encoder channels -> LLM channels, one row per slot
    visual_ids: tuple[int, ...]  # the placeholders: pictures, then videos
    used_blocks: int  # how many blocks run before the features are taken
    H: int = 0  # slots of one picture or tile; 0: `grid_thw` says it in every call
    W: int = 0
    unit: int = 1  # a slot is unit x unit patches
    prefix: int = 0  # tokens in front of the grid inside the encoder (CLS)
    slots_prefix: int = 0  # how many of these also reach the LLM
    packed: bool = False  # (patches, C), slot by slot, rotary positions; else (tiles, prefix + patches, C)
    square: bool = False  # the model takes the square root of the number of patches for the side of the grid
    clips: bool = False  # a video is one run of placeholders, frame after frame, instead of a run per frame
    deepstack: Sequence[nn.Module] = ()  # projectors of features for the LLM's first layers
    no_merger: str = ""  # why merging is refused

    @property
    def slots(self) -> int:
        """Placeholders of one picture or tile in input_ids; 0: they differ."""
        return 0 if self.packed or self.no_merger else self.slots_prefix + self.H * self.W


def blocks_before(layer: int, blocks: Sequence[nn.Module]) -> int:
    """How many blocks run before hidden_states[layer]: [0] are the embeddings, [i] is from block i - 1."""
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer} must be a single layer")
    return layer % (len(blocks) + 1)


def llava_layout(model: nn.Module) -> Layout:
    """LLaVA, LLaVA-NeXT, LLaVA-OneVision: CLIP or SigLIP tower, one feature layer, with or without CLS."""
    config, base = model.config, model.base_model
    vision, clip = config.vision_config, "clip_vision_model"
    if vision.model_type not in (clip, "siglip_vision_model"):
        raise ValueError(f"vision tower {vision.model_type!r} is not supported; for LLaVA, CLIP or SigLIP")
    prefix, full = int(vision.model_type == clip), config.vision_feature_select_strategy == "full"
    if not full and not prefix:
        raise ValueError('vision_feature_select_strategy="default" drops CLS; SigLIP has none, so set "full"')
    blocks = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder.layers
    side, tiles = vision.image_size // vision.patch_size, config.model_type != "llava"
    return Layout(
        base=base,
        decoder=base.language_model,
        vision=base.vision_tower,
        blocks=blocks,
        projector=base.multi_modal_projector,
        visual_ids=(config.image_token_id, getattr(config, "video_token_id", config.image_token_id)),
        used_blocks=blocks_before(config.vision_feature_layer, blocks),
        H=side,
        W=side,
        prefix=prefix,
        slots_prefix=prefix if full else 0,
        no_merger="it crops, shrinks or rearranges its tiles after the projector" if tiles else "",
    )


def internvl_layout(model: nn.Module) -> Layout:
    """InternVL: tiles with CLS; a pixel shuffle makes one slot of 2 x 2 patches."""
    config, base, vision = model.config, model.base_model, model.config.vision_config
    unit, blocks = round(1 / config.downsample_ratio), base.vision_tower.encoder.layer
    return Layout(
        base=base,
        decoder=base.language_model,
        vision=base.vision_tower,
        blocks=blocks,
        projector=base.multi_modal_projector,
        visual_ids=(config.image_token_id,),
        used_blocks=blocks_before(config.vision_feature_layer, blocks),
        H=vision.image_size[0] // vision.patch_size[0] // unit,
        W=vision.image_size[1] // vision.patch_size[1] // unit,
        unit=unit,
        prefix=1,
        square=True,
    )


def idefics_layout(model: nn.Module) -> Layout:
    """Idefics3, SmolVLM: SigLIP-like tower without CLS; a pixel shuffle inside of the connector."""
    config, base, vision = model.config, model.base_model, model.config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    return Layout(
        base=base,
        decoder=base.text_model,
        vision=base.vision_model,
        blocks=base.vision_model.encoder.layers,
        projector=base.connector,
        visual_ids=(config.image_token_id,),
        used_blocks=len(base.vision_model.encoder.layers),
        H=side,
        W=side,
        unit=config.scale_factor,
        square=True,
    )


def qwen_layout(model: nn.Module) -> Layout:
    """Qwen2-VL, Qwen2.5-VL (some blocks attend within windows), Qwen3-VL (DeepStack, a run per frame)."""
    config, base = model.config, model.base_model
    return Layout(
        base=base,
        decoder=base.language_model,
        vision=base.visual,
        blocks=base.visual.blocks,
        projector=base.visual.merger,
        visual_ids=(config.image_token_id, config.video_token_id),
        used_blocks=len(base.visual.blocks),
        unit=config.vision_config.spatial_merge_size,
        packed=True,
        clips=config.model_type != "qwen3_vl",
        deepstack=getattr(base.visual, "deepstack_merger_list", ()),
    )


LAYOUTS: dict[str, Callable[[nn.Module], Layout]] = {
    **dict.fromkeys(["llava", "llava_next", "llava_onevision"], llava_layout),
    "internvl": internvl_layout,
    **dict.fromkeys(["idefics3", "smolvlm"], idefics_layout),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], qwen_layout),
}
DECODERS = {"llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}


def find_layout(model: nn.Module) -> Layout:
    """The layout of a model.

    Raises:
        ValueError: the model is of no supported family, or uses something that LUVC cannot work with.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind!r} is an encoder-decoder: its LLM has no visual tokens; use a decoder-only VLM"
        )
    text = config.get_text_config() if config is not None else None
    sliding = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
    kinds = set(getattr(text, "layer_types", None) or sliding)
    if kinds != {"full_attention"}:
        kinds = sorted(kinds - {"full_attention"})
        raise ValueError(f"{kind!r} has decoder layers of kind {kinds}; use a model with full attention only")
    if kind not in LAYOUTS:
        raise ValueError(f"{kind!r} is not supported; use a VLM of the families {sorted(LAYOUTS)}")
    layout = LAYOUTS[kind](model)
    text = layout.decoder.config
    if text.model_type not in DECODERS:
        raise ValueError(f"decoder {text.model_type!r} is not supported; use one of {sorted(DECODERS)}")
    attention = text._attn_implementation
    if attention == "flex_attention" or attention not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(f"attention {attention!r} is not supported; use sdpa, flash_attention_2 or eager")
    return layout


# ---- 4.2 What one call of the vision encoder merges --------------------------------------------------


class Grids:
    """The pictures of one call of the vision encoder, and how far they are merged.

    Args:
        layout, config: of the model, of LUVC.
        shapes: one (n, H, W) per picture: n frames or tiles that share a grid of H x W slots.
        device: where the encoder is.
    """

    def __init__(self, layout: Layout, config: LUVCConfig, shapes: list[tuple[int, int, int]], device):
        self.layout, self.config, self.shapes = layout, config, shapes
        self.plans = [merge_plan(H, W, config.vision_keep, config.vision_steps) for _, H, W in shapes]
        self.size = [torch.ones(shape, device=device) for shape in shapes]
        self.token = [torch.arange(H * W, device=device).expand(n, -1) for n, H, W in shapes]
        self.arrange()
        self.full_order = self.order

    def arrange(self) -> None:
        """Where frames and windows end in a packed sequence, and in which order windows want the slots."""
        self.order, layout = None, self.layout
        if not layout.packed or not any(self.plans):  # without merging the model's own will do
            return
        shapes, patches = [tuple(size.shape) for size in self.size], layout.unit**2
        frames = [h * w * patches for n, h, w in shapes for _ in range(n)]
        device, vision = self.size[0].device, layout.vision
        ends = torch.tensor([0, *itertools.accumulate(frames)], dtype=torch.int32, device=device)
        self.frame_ends = ends, max(frames)
        if hasattr(vision, "fullatt_block_indexes"):
            thw = torch.tensor([(n, h * layout.unit, w * layout.unit) for n, h, w in shapes])
            order, ends = get_vision_window_index(thw, layout.unit, vision.window_size, vision.patch_size)
            self.order, self.window_ends = order.to(device), (ends.to(device), int(ends.diff().max()))

    def split(self, x: Tensor, unit: int, prefix: int) -> list[Tensor]:
        """Tokens as the model has them -> one grid (n, h, w, unit * unit * C) per picture."""
        if self.layout.packed:
            x = x.reshape(-1, unit * unit * x.shape[-1])
            if self.order is not None:
                x = x[self.order.argsort()]
            parts = x.split([size.numel() for size in self.size])
            return [part.view(*size.shape, -1) for part, size in zip(parts, self.size, strict=True)]
        n, h, w = self.size[0].shape
        if x.shape[1] != prefix + h * w * unit * unit:
            raise ValueError(
                f"the encoder has {x.shape[1]} tokens where merging leaves {prefix + h * w * unit * unit}; "
                "feature layer, feature strategy and picture size must be those of the model's config"
            )
        x = x[:, prefix:].reshape(n, h, unit, w, unit, -1)
        return [x.transpose(2, 3).reshape(n, h, w, -1)]

    def join(self, grids: list[Tensor], unit: int, head: Tensor) -> Tensor:
        """The inverse of `split`; `head` holds the tokens of the prefix, which only tiles have."""
        if self.layout.packed:
            x = torch.cat([grid.flatten(0, 2) for grid in grids])
            x = x if self.order is None else x[self.order]
            return x.reshape(len(x) * unit * unit, -1)
        n, h, w, _ = grids[0].shape
        x = grids[0].reshape(n, h, w, unit, unit, -1).transpose(2, 3)
        return torch.cat([head, x.reshape(n, h * w * unit * unit, -1)], dim=1)

    def merge(self, hidden: Tensor, step: int) -> Tensor:
        """One step of the plan, for all pictures: encoder tokens -> fewer encoder tokens."""
        unit, prefix = self.layout.unit, self.layout.prefix
        grids = self.split(hidden, unit, prefix)
        for i, x in enumerate(grids):
            axis, *left = self.plans[i][step]
            size, token = self.size[i].to(x.device), self.token[i].to(x.device)
            grids[i], self.size[i], parent = self.config.merge(x, size, left[axis - 1], axis)
            self.token[i] = follow(token, parent, axis)
        self.arrange()
        return self.join(grids, unit, hidden[:, :prefix])

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the merged tokens: a position is the mean over the patches that were merged."""
        unit, at = self.layout.unit, []
        corner = torch.cartesian_prod(*[torch.arange(unit, device=hidden.device)] * 2).view(-1, 2)
        for size, token, (_, _, W) in zip(self.size, self.token, self.shapes, strict=True):
            centre = centres(token.to(hidden.device), size[0].numel(), W)  # (n, h * w, 2), in slots
            at.append((centre[:, :, None] * unit + corner).flatten(0, 1))  # (slots, corners, 2), in patches
        at = torch.cat(at)
        at = at if self.order is None else at[self.order]
        return self.layout.vision.rotary_pos_emb(hidden, at.flatten(0, 1))

    def deliver(self, features: Tensor) -> Tensor:
        """One row per merged token -> one row per slot: tokens in their home slots, signposts elsewhere."""
        prefix = self.layout.slots_prefix
        grids = self.split(features, 1, prefix)
        for i, (n, H, W) in enumerate(self.shapes):
            x, token = grids[i].flatten(1, 2), self.token[i].to(features.device)  # (n, h * w, C), (n, H * W)
            home = home_slots(token, x.shape[1], W)
            away = home.gather(1, token) - torch.arange(H * W, device=x.device)
            # Two digits of base 256, which every floating dtype holds exactly.
            digits = torch.stack([away.div(256, rounding_mode="floor"), away.remainder(256)], dim=-1)
            slots = nn.functional.pad(digits.to(x.dtype), (0, x.shape[2] - 2))  # (n, H * W, C)
            slots = slots.scatter(1, home[..., None].expand_as(x), x)
            grids[i] = slots.view(n, H, W, -1)
        self.order = self.full_order
        return self.join(grids, 1, features[:, :prefix])

    def spread(self, features: Tensor) -> Tensor:
        """DeepStack: one row per merged token -> one row per slot, each that of its token so far."""
        grids = self.split(features, 1, 0)
        for i, (n, H, W) in enumerate(self.shapes):
            token = self.token[i].to(features.device)[..., None].expand(-1, -1, features.shape[-1])
            grids[i] = grids[i].flatten(1, 2).gather(1, token).view(n, H, W, -1)
        return self.join(grids, 1, features[:0])


def read_signposts(embeds: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """What `Grids.deliver` wrote: which positions are alive, and how many slots each one stands for.

    Args:
        embeds: (B, S, C), the input of the LLM.
        visual: (B, S) bool, the slots.

    Returns:
        alive: (B, S) bool, False for dead slots.
        size: (B, S) float32, 1 for text, 0 for dead slots.
    """
    alive = ~visual | (embeds[..., 2:] != 0).any(-1)
    away = (embeds[..., 0].float() * 256 + embeds[..., 1].float()).masked_fill(alive, 0.0)
    home = torch.arange(embeds.shape[1], device=embeds.device) + away.long()
    return alive, torch.zeros_like(away).scatter_add_(1, home, torch.ones_like(away))


# ---- 4.3 What one forward call of the LLM processes --------------------------------------------------


class Positions:
    """Which logical positions of one forward call each decoder layer processes, for each sample of a batch.

    Padding is never processed. Visual positions that stand together in a prompt are cut into pictures, tiles
    or frames; each loses the same fraction of its tokens, and is filtered by itself. How *many*
    positions are processed is known on the host from the start, so no layer has to wait for the device;
    *which* ones is decided on the device, when a layer's input is there.

    Args:
        visual: (B, S) integer, 1 for slots of pictures, 2 for slots of clips, 0 for text.
        real: (B, S) bool, False for padding.
        alive: (B, S) bool, False for the dead slots that merging leaves.
        size: (B, S) float, how many slots each position stands for.
        slots: of one picture or tile, where all have equally many; else 0.
        frames: how many frames each clip has, in the order of the prompt.
        fractions: of a picture's visual tokens, one per decoder layer.
        start: positions seen before, P.

    Raises:
        ValueError: a prompt that ends with a picture, if anything is pruned or merged.
    """

    def __init__(
        self,
        visual: Tensor,
        real: Tensor,
        alive: Tensor,
        size: Tensor,
        slots: int,
        frames: Sequence[int],
        fractions: list[float],
        start: int,
    ):
        (B, self.S), device, frames = visual.shape, visual.device, iter(frames)
        # Here the host waits for the device, once; all that follows in this constructor happens on the host.
        visual, real, alive = torch.stack([t.to(torch.int8) for t in (visual * real, real, alive)]).cpu()
        pieces: dict[int, list[tuple[int, Tensor]]] = {}  # how many tokens -> (sample, their positions)
        for b in range(B):
            at = visual[b].nonzero()[:, 0]
            for run in at.tensor_split((at.diff() > 1).nonzero()[:, 0] + 1) if len(at) else ():
                if run[-1] == real[b].nonzero()[-1] and (fractions[-1] < 1 or not alive.all()):
                    # A prompt's last position speaks the next word, so it has to live to the last layer.
                    raise ValueError(f"sample {b} ends with a picture; put text behind it")
                parts = len(run) // slots if slots and len(run) % slots == 0 else 1
                for piece in run.tensor_split(next(frames, 1) if visual[b, run[0]] == 2 else parts):
                    piece = piece[alive[b, piece].bool()]
                    pieces.setdefault(len(piece), []).append((b, piece))
        pieces.pop(0, None)
        self.fractions, self.start = fractions, start
        self.texts = ((visual == 0) & (real == 1)).sum(1).tolist()
        self.slots = (visual > 0).sum(1).tolist()
        self.delivered = list(pieces)  # pictures that deliver equally many tokens are one group
        self.samples = [[b for b, _ in group] for group in pieces.values()]
        self.rows = [torch.tensor(samples, device=device)[:, None] for samples in self.samples]
        self.where = [torch.stack([p for _, p in group]).to(device) for group in pieces.values()]
        self.keep = ((visual == 0) & (real == 1)).to(device)  # (B, S) bool: what the current layer processes
        for rows, where in zip(self.rows, self.where, strict=True):
            self.keep[rows, where] = True
        self.size = nn.functional.pad(size, (0, 1), value=1.0)  # (B, S + 1): a spare column for fillers
        self.index: list[Tensor | None] = []  # what `select` returned, per layer so far
        self.sizes: list[Tensor] = []  # (B, K or S): what each of these stands for, per layer so far
        self.visual: list[list[int]] = []  # visual tokens processed, per layer so far and sample
        self.totals: list[int] = []  # positions processed by the latest layer, per sample

    def select(self, hidden: Tensor, prune: Callable[[Tensor, int], Tensor]) -> Tensor | None:
        """Prune for the next layer, whose logical input is `hidden` (B, S, C).

        Returns:
            (B, K) int64, the positions that it processes, ascending, filled up at the end with S where a
            sample has fewer than others; None if it processes every position of every sample. Noted in
            `index`, `sizes` (a pruned token passes its size on in the same layer) and `visual`.
        """
        layer, device = len(self.index), hidden.device
        self.keep, self.size, changed = self.keep.to(device), self.size.to(device), layer == 0
        self.visual.append([0] * len(self.texts))
        for g, (rows, where) in enumerate(zip(self.rows, self.where, strict=True)):
            keep = math.floor(self.fractions[layer] * self.delivered[g] + 0.5)
            for b in self.samples[g]:
                self.visual[-1][b] += keep
            if keep == where.shape[1]:
                continue
            changed, rows, where = True, rows.to(device), where.to(device)
            kept = prune(hidden[rows, where], keep)  # (pictures, keep)
            self.keep[rows, where] = False
            self.rows[g], self.where[g] = rows, where.gather(1, kept)
            self.keep[rows, self.where[g]] = True
            if keep:
                self.size[rows, self.where[g]] = inherit(self.size[rows, where], kept)
        if changed:
            self.totals = [text + visual for text, visual in zip(self.texts, self.visual[-1], strict=True)]
            every = torch.arange(self.S, device=device)
            index = torch.where(self.keep, every, self.S).sort(dim=1).values[:, : max(self.totals)]
            self.index.append(None if min(self.totals) == self.S else index)
            self.sizes.append(self.size.gather(1, index))
        else:  # as in the layer before, which may be on another device
            self.index.append(None if self.index[-1] is None else self.index[-1].to(device))
            self.sizes.append(self.sizes[-1].to(device))
        return self.index[-1]

    def ragged(self) -> bool:
        """Do the samples differ in how many positions the latest layer processes?"""
        return len(set(self.totals)) > 1

    def kept(self, what: str) -> list[list[Tensor]]:
        """Per layer and sample, 1-D and in order: the "positions" that were processed, or their "sizes"."""
        every, answer = torch.arange(self.S, device=self.keep.device).expand(len(self.texts), -1), []
        for index, sizes in zip(self.index, self.sizes, strict=True):
            index = every if index is None else index
            values = index + self.start if what == "positions" else sizes
            answer.append([v[i < self.S] for v, i in zip(values, index, strict=True)])
        return answer


# ---- 4.4 The KV cache, and attention in which tokens have sizes --------------------------------------

EXTRA = 8  # channels that a key gets for its size; one would do, but kernels want head sizes in steps of 8


def stored(layer) -> int:
    """Columns of keys and values that one layer of a KV cache holds."""
    return layer.keys.shape[-2] if layer.is_initialized else 0


class PrunedLayer(DynamicLayer):
    """The KV cache of one decoder layer: it says how many positions were seen, not how many it stored.

    Masks and rotary positions are computed from the logical length; the keys hold only what this layer
    processed. All state lives in the caller's cache object, so two conversations cannot mix, and beams
    reorder it together.
    """

    is_croppable = False

    def __init__(self, sized: bool = False):
        super().__init__()
        self.seen = 0  # logical length
        self.real = None  # (B, stored) bool, False for fillers; None as long as there are none
        self.sized = sized  # keys carry sizes, see `sized_attention`
        self.bias = None  # (B, columns): log(size) / scale of the keys that come next; None: all of size 1

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def extend(self, columns: int, positions: int, real: Tensor | None) -> None:
        """Note that the layer is about to store `columns` columns for `positions` positions."""
        self.seen += positions
        if real is None and self.real is None:
            return
        known = real if real is not None else self.real
        before = known.new_ones(len(known), stored(self)) if self.real is None else self.real
        after = known.new_ones(len(known), columns) if real is None else real
        self.real = torch.cat([before, after], dim=1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.sized:
            key_states, value_states = (nn.functional.pad(t, (0, EXTRA)) for t in (key_states, value_states))
            if self.bias is not None:
                key_states[..., -EXTRA] = self.bias[:, None].to(key_states.dtype)
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = self.real = None
        self.is_initialized, self.seen = False, 0

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("LUVC cannot crop its KV cache, as assisted and prompt-lookup decoding would")

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
        if self.real is not None:
            self.real = function(self.real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices.to(t.device)])


def sized_attention(module, query, key, value, attention_mask, **kwargs):
    """Any attention of transformers, in which a key of size s weighs as much as s equal keys of size 1.

    That is softmax(q . k * scale + log s). The sum rides along in the product, as one more channel of each
    head, [q, 1] . [k, log(s) / scale], so that fused kernels see ordinary queries and keys. (The other new
    channels of a key hold zeros.) Our choice: without it, whatever reads proportions of a picture is misled
    by what was merged or pruned.
    """
    ours, channels = module.config, query.shape[-1]
    query = nn.functional.pad(query, (0, EXTRA), value=1.0)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(ours.plain._attn_implementation, eager)
    module.config = ours.plain  # functions look up there which kernel they are to use
    try:
        output, weights = plain(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = ours
    return output[..., :channels], weights


ALL_ATTENTION_FUNCTIONS.register("luvc", sized_attention)

# ---- 4.5 The wrapper itself --------------------------------------------------------------------------


@dataclass
class Report:
    """What LUVC did in the latest prefill, summed over the batch. `print` it.

    `flops_left` is the fraction of the LLM's prefill arithmetic that is left. A decoder layer whose linear
    maps hold M weights, with attention of width A (heads times head size), costs, for n positions behind p
    stored ones,

        2 * M * n  +  4 * A * (n * p + n * (n + 1) / 2)         (a multiply-add counts as two)

    floating-point operations per sample. The fraction sums this over all decoder layers, for the positions
    that were processed and for all that are not padding. Embedding, encoder, output head and the channels
    that sizes add to the keys are not counted.
    """

    vision_tokens: list[int]  # per encoder block, of the pictures encoded last, CLS not counted
    visual_tokens: list[int]  # per decoder layer
    positions: list[int]  # per decoder layer, text included, padding not
    visual_full: int  # visual tokens per decoder layer of the plain model
    positions_full: int  # positions per decoder layer of the plain model
    kv_bytes: int  # keys and values as stored after the latest forward
    kv_bytes_full: int  # what the plain model would have stored
    flops_left: float

    def __str__(self) -> str:
        plain = f"{self.visual_full} and {self.positions_full}"
        lines = [f"vision tokens, per encoder block: {', '.join(map(str, self.vision_tokens))}"]
        lines.append(f"decoder layer, visual tokens, all positions (plain: {plain})")
        for layer, (visual, every) in enumerate(zip(self.visual_tokens, self.positions, strict=True)):
            lines.append(f"{layer:5d} {visual:6d} {every:6d} {'#' * round(60 * every / self.positions_full)}")
        lines.append(f"KV cache {self.kv_bytes:,} bytes, plain {self.kv_bytes_full:,}")
        return "\n".join([*lines, f"LLM prefill FLOPs left {self.flops_left:.1%}"])


def replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Give a module another forward. Returns the function that takes it back."""
    had_own, plain = "forward" in module.__dict__, module.forward
    module.forward = forward

    def undo():
        if had_own:  # accelerate wraps in the same way when it spreads a model over devices
            module.forward = plain
        else:
            del module.forward

    return undo


class LUVC:
    """Hook merging and pruning into a model, in place and reversibly.

        with LUVC(model) as luvc:
            model.generate(**inputs)       # or model(...), or a pipeline: nothing else changes
        print(luvc.report())

    No attention map is read, and no mask is made where transformers would make none for the shorter sequence,
    so the flash kernels run. With everything off (`vision_keep=1.0, llm_keep=1.0`) results are bit-identical.

    A second turn on the same KV cache works. It sees all text of the first turn and, in each layer, the
    visual tokens that this layer kept: all in the first, none in the last. Where the picture stands
    before the question, as usual, these do not depend on the question: a second one finds what the first one
    found. Pruned tokens never come back. A new picture in the second turn is seen as in the first.

    Args:
        model: a Hugging Face VLM of a supported family (`LAYOUTS`).
        config: the settings.

    Raises:
        ValueError: an unsupported model, or settings that do not fit it (number of layers or encoder blocks).
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig()):
        self.model, self.config, self.layout = model, config, find_layout(model)
        layout, steps = self.layout, config.vision_steps if config.vision_keep < 1 else 0
        self.fractions = config.fractions(len(layout.decoder.layers))
        if steps and layout.no_merger:
            kind = model.config.model_type
            raise ValueError(f"{kind!r} cannot merge: {layout.no_merger}; set vision_keep=1.0 to prune only")
        if steps > layout.used_blocks:
            raise ValueError(f"vision_steps={steps} must be at most {layout.used_blocks}, one per block")
        if steps == 1 and layout.square:
            raise ValueError("vision_steps=1 merges along W alone, but this model needs a square grid; set 2")
        # Our choice: the merges are spread evenly over the blocks. Block -> step of the plan.
        self.merges = {(step + 1) * layout.used_blocks // (steps + 1): step for step in range(steps)}
        self.off = not steps and all(fraction == 1 for fraction in self.fractions)
        # Which layers hold tokens of unequal size. The first, if nothing was merged, holds every token; the
        # last may hold none at all.
        self.sized = [config.sizes and 0 < f and (f < 1 or steps > 0) for f in self.fractions]
        self._undo: list[Callable[[], None]] = []  # how to take the hooks out again
        self._call = None, None  # input_ids and video_grid_thw of the call that is running
        self._grids: Grids | None = None  # the latest pictures in the encoder
        self._now: Positions | None = None  # the prefill that is running
        self._prefill: Positions | None = None  # the latest prefill
        self._past: list[int] = []  # columns that were stored before it, per layer
        self._kv: dict[int, tuple[int, int]] = {}  # layer -> bytes (stored, plain), latest call
        self._no_cache: DynamicCache | None = None  # stands in where the caller wants no KV cache

    # -- hooks in, hooks out

    def attach(self) -> "LUVC":
        """Put the hooks in.

        Raises:
            ValueError: this or another LUVC is attached to the model already, or the model is compiled.
        """
        if getattr(self.model, "_luvc", None) is not None:
            raise ValueError("a LUVC is attached to this model already; detach() it first")
        modules = list(self.model.modules())
        if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modules):
            raise ValueError("the model is compiled; LUVC's hooks need eager mode: use the model from before")
        self.model._luvc, layout = self, self.layout
        handles = [
            layout.base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            layout.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            layout.vision.register_forward_pre_hook(self._before_vision, with_kwargs=True),
        ]
        # Packed tokens come with positions: every block from the first merge on has to get the new ones.
        later = range(min(self.merges, default=layout.used_blocks), layout.used_blocks)
        for number in later if layout.packed else self.merges:
            hook = functools.partial(self._before_block, number)
            handles.append(layout.blocks[number].register_forward_pre_hook(hook, with_kwargs=True))
        if self.merges:
            deliver, spread = (lambda *a: self._grids.deliver(a[-1])), (lambda *a: self._grids.spread(a[-1]))
            handles.append(layout.projector.register_forward_hook(deliver))
            handles += [module.register_forward_hook(spread) for module in layout.deepstack]
        self._undo = [handle.remove for handle in handles]
        # What torch.compile made of the model before does not see hooks, but it does see another forward.
        self._undo.append(replace_forward(layout.base, torch.compiler.disable(layout.base.forward)))
        for number, layer in enumerate(layout.decoder.layers):
            self._undo.append(self._wrap(number, layer))
        return self

    def detach(self) -> None:
        """Take the hooks out: the model is what it was before `attach`. Without effect if not attached."""
        for undo in self._undo:
            undo()
        self._undo, self._call, self._now = [], (None, None), None
        if getattr(self.model, "_luvc", None) is self:
            del self.model._luvc

    def __enter__(self) -> "LUVC":
        return self.attach()

    def __exit__(self, *exception) -> None:
        self.detach()

    def _wrap(self, number: int, layer: nn.Module) -> Callable[[], None]:
        # A layer is wrapped at `forward`, inside of its hooks. transformers collects hidden_states by hooks
        # on the layers: these have to see the logical sequence on both sides, which a pre-hook of ours would
        # take away.
        plain, attention = layer.forward, layer.self_attn
        plain_config = attention.config

        def forward(hidden_states, *args, **kwargs):
            return self._run_layer(number, plain, hidden_states, *args, **kwargs)

        restore = replace_forward(layer, forward)

        def undo():
            attention.config = plain_config
            restore()

        if self.sized[number]:  # a config of its own for this module: nothing else sees another attention
            attention.config = copy.copy(plain_config)
            attention.config._attn_implementation, attention.config.plain = "luvc", plain_config
        return undo

    # -- the vision encoder

    def _before_vision(self, module, args, kwargs):
        layout, unit = self.layout, self.layout.unit
        pixels = args[0] if args else kwargs["pixel_values"]
        shapes = [(len(pixels), layout.H, layout.W)]
        if layout.packed:
            thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
            shapes = [(t, h // unit, w // unit) for t, h, w in thw.tolist()]
        self._grids = Grids(layout, self.config, shapes, pixels.device)

    def _before_block(self, number, module, args, kwargs):
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        grids, layout = self._grids, self.layout
        if any(isinstance(mask, Tensor) for mask in (*rest, kwargs.get("attention_mask"))):
            raise ValueError("a tile has padding, which cannot be merged; split pictures into whole tiles")
        if number in self.merges:
            hidden = grids.merge(hidden, self.merges[number])
            grids.cos_sin = grids.rotary(hidden) if layout.packed else None
        if layout.packed:  # where frames or windows end, and which position each token has
            full = grids.order is None or number in layout.vision.fullatt_block_indexes
            ends, longest = grids.frame_ends if full else grids.window_ends
            kwargs |= {"cu_seqlens": ends, "position_embeddings": grids.cos_sin}
            if kwargs.get("max_seqlen") is not None:  # FlashAttention asks for it
                kwargs["max_seqlen"] = longest
        return (hidden, *rest), kwargs

    # -- the LLM

    def _before_base(self, module, args, kwargs):
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if ids is None and embeds is not None and embeds.shape[1] > 1 and not self.off:
            raise ValueError("LUVC finds the pictures by input_ids; pass these instead of inputs_embeds")
        self._call = ids, kwargs.get("video_grid_thw") if self.layout.clips else None

    def _before_decoder(self, module, args, kwargs):
        """Decide what this forward call processes, and let the KV cache count logical positions."""
        embeds, mask, cache = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "past_key_values"))
        (ids, clips), self._call, self._now, self._kv = self._call, (None, None), None, {}
        if embeds is None:  # the LLM alone, with ids of its own
            embeds = module.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        if not self.off:
            if module.training and getattr(module, "gradient_checkpointing", False):
                raise ValueError("LUVC cannot train under gradient checkpointing; disable it, or detach()")
            if mask is not None and getattr(mask, "ndim", 0) != 2:
                raise ValueError(
                    "LUVC needs the 2-D attention_mask (B, P + S) of the padding, or none; static KV caches "
                    "come with another, so use a DynamicCache, the default"
                )
            use_cache = kwargs.get("use_cache")
            if cache is None and (module.config.use_cache if use_cache is None else use_cache):
                cache = kwargs["past_key_values"] = DynamicCache(config=module.config)
            if cache is None:
                self._no_cache = DynamicCache(config=module.config)
            self._adopt(cache if cache is not None else self._no_cache)
        B, S = embeds.shape[:2]
        if S > 1:  # a single token was just generated: no picture, no padding, no need to wait for the device
            real = every = torch.ones(B, S, dtype=torch.bool, device=embeds.device)
            visual = torch.zeros(B, S, dtype=torch.int64, device=embeds.device)
            if ids is not None:
                *_, video = each = self.layout.visual_ids
                visual = torch.isin(ids, torch.tensor(each, device=ids.device)).long()
                visual = (visual + (ids == video) * self.layout.clips).to(embeds.device)
            if getattr(mask, "ndim", 0) == 2:
                real = mask[:, -S:].to(embeds.device, torch.bool)
            alive, size = read_signposts(embeds, visual > 0) if self.merges else (every, every.float())
            start = cache.get_seq_length() if cache is not None else 0
            frames = () if clips is None else clips[:, 0].tolist()
            self._now = Positions(visual, real, alive, size, self.layout.slots, frames, self.fractions, start)
            self._prefill, self._past = self._now, []
        return args, kwargs

    def _adopt(self, cache) -> None:
        """Make the cache count logical positions: its layers change, so the caller's object keeps working."""
        if cache.layers and all(isinstance(layer, PrunedLayer) for layer in cache.layers):
            if [layer.sized for layer in cache.layers] != self.sized:
                raise ValueError("this KV cache was filled by a LUVC with other settings; begin anew")
            return
        kinds = {type(layer).__name__ for layer in cache.layers}
        if not isinstance(cache, DynamicCache) or kinds - {"DynamicLayer"}:
            kind = f"{type(cache).__name__} of {sorted(kinds)}"
            raise ValueError(f"the KV cache, a {kind}, is not supported; use a DynamicCache, the default")
        if cache.get_seq_length():
            raise ValueError("this KV cache was filled without LUVC; begin anew with LUVC attached")
        cache.layers = [PrunedLayer(sized) for sized in self.sized]

    def _run_layer(self, number: int, plain: Callable, hidden: Tensor, *args, **kwargs) -> Tensor:
        """Gather, run, scatter: one decoder layer on the positions that it processes.

        Args:
            number: which layer.
            plain: the layer's own forward.
            hidden: (B, S, C), the logical sequence.
            kwargs: what transformers hands to a layer: attention_mask, position_embeddings (cos, sin), each
                (B or 1, S, head size), position_ids, past_key_values.

        Returns:
            (B, S, C): processed positions updated, all others as they came. `select` says which ones are
            processed (a filler has index S), `_mask` makes the mask and tells the KV cache what will come. In
            a prefill, a layer in `sized` gets its cache's `bias`: log(size) / scale of what it processes.
        """
        now, cache = self._now, kwargs.get("past_key_values")
        index = now.select(hidden, self.config.prune) if now is not None else None
        if self.off:
            known = cache is not None and len(cache.layers) > number
            self._past.append(stored(cache.layers[number]) if known else 0)
            output = plain(hidden, *args, **kwargs)
            self._count(number, cache)
            return output
        kwargs["past_key_values"] = cache if cache is not None else self._no_cache
        store = kwargs["past_key_values"].layers[number]
        if now is not None:
            self._past.append(stored(store))
        store.bias = None
        if now is not None and self.sized[number]:
            store.bias = now.sizes[number].log() / self.layout.decoder.layers[number].self_attn.scaling
        if index is None:
            kwargs["attention_mask"] = self._mask(hidden, store, real=None)
            output = plain(hidden, *args, **kwargs)
        else:
            B, S, _ = hidden.shape
            rows = torch.arange(B, device=hidden.device)[:, None]
            padded = nn.functional.pad(hidden, (0, 0, 0, 1))  # fillers read and write a spare row at the end
            x = padded[rows, index]  # (B, S, C) -> (B, K, C)
            kwargs["attention_mask"] = self._mask(x, store, real=index < S if now.ragged() else None)
            # Rotary positions stay those of the logical sequence. position_ids go: FlashAttention would take
            # the gaps in them for the seams of several sequences packed into one.
            at = index.clamp(max=S - 1)
            cos_sin = (t.to(hidden.device).expand(B, -1, -1) for t in kwargs["position_embeddings"])
            kwargs |= {"position_embeddings": tuple(t[rows, at] for t in cos_sin), "position_ids": None}
            padded[rows, index] = plain(x, *args, **kwargs).to(hidden.device)
            output = padded[:, :S]
        self._count(number, cache)
        if cache is None:
            store.reset()
        return output

    def _count(self, number: int, cache) -> None:
        """Note the bytes that a layer's KV cache holds, and what the plain model's would."""
        if cache is not None:
            layer, head = cache.layers[number], self.layout.decoder.layers[number].self_attn.head_dim
            columns, channels = layer.keys.shape[-2:]
            held = layer.keys.nbytes + layer.values.nbytes
            self._kv[number] = held, held * head * layer.get_seq_length() // (columns * channels)

    def _mask(self, x: Tensor, store: PrunedLayer, real: Tensor | None) -> Tensor | None:
        """The attention mask of one layer, as transformers makes it for the physical sequence.

        That sequence is an ordinary causal one: what was stored, then `x`, in logical order. Fillers stand at
        the end of `x`, where causality hides them from all real positions; so a first prefill needs no mask,
        even of samples of different lengths. They are masked only once something follows them.
        """
        Q, past, fillers_before = x.shape[1], stored(store), store.real is not None
        store.extend(Q, self._now.S if self._now is not None else Q, real)
        hide = store.real if fillers_before else None
        if Q == 1 and hide is None:
            return None
        config = self.layout.decoder.config
        return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=len(x),
            q_length=Q,
            kv_length=past + Q,
            q_offset=past,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=hide,
            allow_is_causal_skip=hide is None,
            dtype=x.dtype,
            device=x.device,
            config=config,
            use_vmap=False,
        )

    # -- what happened

    def _latest(self, what):
        if what is None:
            raise ValueError("nothing happened yet: call the model with a picture while LUVC is attached")
        return what

    @property
    def kept(self) -> list[list[Tensor]]:
        """`kept[layer][sample]`: the logical positions that a decoder layer processed in the latest prefill.

        1-D int64, ascending, counted from the beginning of the KV cache; padding is not among them.
        ValueError before the first prefill.
        """
        return self._latest(self._prefill).kept("positions")

    @property
    def sizes(self) -> list[list[Tensor]]:
        """`sizes[layer][sample]`: how many slots each position of `kept` stands for, 1-D float32; text 1."""
        return self._latest(self._prefill).kept("sizes")

    @property
    def groups(self) -> list[Tensor]:
        """For each picture, tile or frame encoded last: (H * W,) int64, the merged token of each slot.

        ValueError before the first picture.
        """
        return [one for token in self._latest(self._grids).token for one in token]

    def report(self) -> Report:
        """Numbers of the latest prefill, and of the KV cache after the latest forward call; see `Report`.

        Raises:
            ValueError: there was no prefill yet.
        """
        now, layout, vision = self._latest(self._prefill), self.layout, []
        if self._grids is not None:
            now_at = [(n, H * W) for n, H, W in self._grids.shapes]
            for block in range(len(layout.blocks)):
                if block in self.merges:
                    steps = [plan[self.merges[block]] for plan in self._grids.plans]
                    now_at = [(n, h * w) for (n, _), (_, h, w) in zip(now_at, steps, strict=True)]
                vision.append(sum(n * slots for n, slots in now_at) * layout.unit**2)

        def flops(layer, n, p):
            weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
            width = layout.decoder.config.num_attention_heads * layer.self_attn.head_dim
            return 2 * weights * n + 4 * width * (n * p + n * (n + 1) / 2)

        plain = [text + slots for text, slots in zip(now.texts, now.slots, strict=True)]
        left = whole = 0.0
        for layer, visual, past in zip(layout.decoder.layers, now.visual, self._past, strict=True):
            left += sum(flops(layer, text + v, past) for text, v in zip(now.texts, visual, strict=True))
            whole += sum(flops(layer, n, now.start) for n in plain)
        return Report(
            vision_tokens=vision,
            visual_tokens=[sum(visual) for visual in now.visual],
            positions=[sum(visual) + sum(now.texts) for visual in now.visual],
            visual_full=sum(now.slots),
            positions_full=sum(plain),
            kv_bytes=sum(held for held, _ in self._kv.values()),
            kv_bytes_full=sum(full for _, full in self._kv.values()),
            flops_left=left / whole,
        )


# ======================================================================================================
# 5. The command line: one question about one picture, with and without LUVC
# ======================================================================================================

HERE = Path(__file__).resolve().parent
EXAMPLE_PROMPT = "what colour is the striped thing?"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def fractions(text: str) -> float | tuple[float, ...]:
    """What --llm-keep may be: a number, or numbers with commas between them."""
    numbers = tuple(float(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def check_device(device: str) -> None:
    """Raises ValueError if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name, or no such hardware
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); --device cpu can") from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    default = LUVCConfig()
    parser = OneLineParser(prog="luvc.py", description="Ask a VLM about a picture, with and without LUVC.")
    add = parser.add_argument
    add("--model", default="toy", help="checkpoint folder or hub name (default: the toy beside this file)")
    add("--image", default=HERE / "toy" / "example.png", help="picture file (default: the toy's example)")
    add("--prompt", default=EXAMPLE_PROMPT, help="(default: %(default)r)")
    add("--vision-keep", type=float, default=default.vision_keep, metavar="F", help="as in LUVCConfig")
    add("--llm-keep", type=fractions, default=default.llm_keep, metavar="F|F,F,...", help="as in LUVCConfig")
    add("--cutoff", type=float, default=default.cutoff, metavar="F", help="as in LUVCConfig")
    add("--max-new-tokens", type=int, default=16, metavar="N")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--attn", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    add("--json", action="store_true", help="print one JSON object instead")
    add("--bench", action="store_true", help="measure speed and memory instead: see --bench --help")
    return parser.parse_args(argv)


def load(name: str, device: str, dtype: str = "auto", attn: str = "sdpa"):
    """(model, processor) of a checkpoint folder or hub name; only safetensors, never code that comes along.

    Raises:
        ValueError: a device, an attention or a checkpoint that is not there.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import is_flash_attn_2_available

    check_device(device)
    if attn == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError("--attn flash_attention_2: flash-attn is not installed (see requirements.txt)")
    path = HERE / "toy" if name == "toy" else Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"--model {name}: the folder holds no checkpoint (no config.json)")
    where, safe = path if path.is_dir() else name, {"use_safetensors": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, attn_implementation=attn, **safe
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--model {name}: {str(error).strip()}") from error
    return model.to(device).eval(), processor


def encode(processor, picture, prompt: str):
    """Model inputs for one picture and one question, through the processor's chat template if it has one."""
    text = f"<image>\n{prompt}"
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


@torch.inference_mode()
def time_once(model, inputs, tokens: int = 4) -> tuple[float, float]:
    """(milliseconds of one prefill, vision encoder included; milliseconds per decoded token), greedy."""

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    start = now()
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    prefill, start = now() - start, now()
    for _ in range(tokens):
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    return prefill, (now() - start) / tokens


def ask(args: argparse.Namespace) -> tuple[dict, str]:
    """One question with and without LUVC: (the object that --json prints, the same as text)."""
    from PIL import Image
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own lines on stderr say what is going on
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    config = LUVCConfig(vision_keep=args.vision_keep, llm_keep=args.llm_keep, cutoff=args.cutoff)
    try:
        picture = Image.open(args.image).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"--image {args.image}: no such file") from error
    except OSError as error:
        raise ValueError(f"--image {args.image}: not a picture that can be read") from error
    print(f"loading {args.model} ...", file=sys.stderr)
    model, processor = load(args.model, args.device, args.dtype, args.attn)
    luvc = LUVC(model, config)
    inputs = encode(processor, picture, args.prompt).to(model.device, model.dtype)

    def answer():
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    full = answer()
    with luvc:
        less, report = answer(), luvc.report()
    print("timing, plain and LUVC in turns ...", file=sys.stderr)
    times = []
    for _ in range(9):
        plain = time_once(model, inputs)
        with luvc:
            times.append((*plain, *time_once(model, inputs)))
    # The first two rounds warm up. Columns: prefill and per token, plain and LUVC.
    medians = (statistics.median(column) for column in zip(*times[2:], strict=True))
    plain_ms, plain_token, luvc_ms, luvc_token = medians
    result = {
        "model": args.model,
        "prompt": args.prompt,
        "answer_full": full,
        "answer_luvc": less,
        "same_answer": full == less,
        "vision_tokens": report.vision_tokens,
        "visual_tokens": report.visual_tokens,
        "positions": report.positions,
        "prefill_ms_full": plain_ms,
        "prefill_ms_luvc": luvc_ms,
        "speedup": plain_ms / luvc_ms,
        "kv_bytes_full": report.kv_bytes_full,
        "kv_bytes_luvc": report.kv_bytes,
        "flops_left": report.flops_left,
    }
    text = (
        f"{args.prompt}\n  plain: {full}\n  LUVC:  {less}\n\n{report}\n"
        f"prefill {plain_ms:.1f} -> {luvc_ms:.1f} ms ({plain_ms / luvc_ms:.2f}x), vision encoder included; "
        f"per decoded token {plain_token:.1f} -> {luvc_token:.1f} ms; {model.device}, {model.dtype}"
    )
    return result, text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one line about what was wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--bench" in argv:  # has options of its own
        from toy.bench import main as bench

        argv.remove("--bench")
        return bench(argv)
    try:
        args = parse_arguments(argv)
        result, text = ask(args)
    except ValueError as error:
        print(f"luvc.py: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    print(json.dumps(result) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
