"""LUVC in one file: vision-language models made faster without training, by dropping visual tokens.

A reference implementation of *Towards Lossless Ultimate Vision Token Compression for VLMs* (Zheng, Huang,
Jiang, Hu, Chen; arXiv 2512.09010) on stock Hugging Face transformers:

    with LUVC(model):                      # any supported VLM, in place
        model.generate(**inputs)           # your own code, unchanged

A picture becomes hundreds of visual tokens, and the LLM pays for each of them in every layer. LUVC has two
units. The **Orthogonal Iterative Merger** (OIM) merges neighbouring tokens inside the vision encoder, along
one spatial axis at a time. The **Spectrum Pruning Unit** (SPU) prunes visual tokens inside the LLM, layer
after layer, until none are left at the last one; it scores them with a low-pass filter instead of attention,
so no attention map is ever needed and FlashAttention keeps working.

Only the paper's abstract and short summaries were available to us. What it states and what we choose is
listed in README.md ("The ledger"); a choice of ours is marked `Our choice` where it is made.

How to read: top to bottom. Sections 1 and 2 are the algorithms: pure functions that need only torch, made to
be copied. Section 3 holds the settings, section 4 hooks both units into a model, section 5 runs it.

Symbols, in shapes and names:
    B   batch                            N   visual tokens of one picture
    H W token grid of one picture        K   tokens kept
    C   channels                         S   sequence length of one forward call of the LLM
    L   layers of the LLM                P   positions that the KV cache has seen before this call

What this file does not do: other layouts than LLaVA's (`LAYOUTS` is the place), static or quantised KV
caches, sliding-window attention, cropping the cache (assisted decoding), training with gradient
checkpointing, 4-D attention masks made by the caller. All of these are refused with an error that says so.
"""

import argparse
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
    each short line, one `cumsum` and one `scatter_add`, where global matching compares all pairs of tokens.

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
    norm = token.square().sum(-1).sqrt()  # (B, H, W)
    dot = (token[:, :, :-1] * token[:, :, 1:]).sum(-1)  # (B, H, W - 1)
    similar = dot / (norm[:, :, :-1] * norm[:, :, 1:]).clamp(min=torch.finfo(accumulate).tiny)
    similar = similar.masked_fill((norm[:, :, :-1] == 0) & (norm[:, :, 1:] == 0), 1.0)

    # Boundary i lies between tokens i and i + 1: a run starts at i + 1. Stable, so ties cut the lower index.
    cut = similar.sort(dim=-1, stable=True).indices[..., : keep - 1]
    starts = torch.zeros(B, H, W, dtype=torch.int64, device=x.device).scatter_(-1, cut + 1, 1)
    parent = starts.cumsum(-1)  # 0 0 1 1 1 2 ...: how many runs have started before or at this token

    # A run becomes one token: nothing is thrown away here, only averaged.
    total = mass.new_zeros(B, H, keep).scatter_add_(-1, parent, mass)
    merged = token.new_zeros(B, H, keep, C)
    merged.scatter_add_(2, parent[..., None].expand(B, H, W, C), token * mass[..., None])
    return (merged / total[..., None]).to(x.dtype), total.to(size.dtype), parent


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


def home_slots(token: Tensor, tokens: int, W: int) -> Tensor:
    """One original patch for each merged token: of its own patches the one nearest its centre of mass.

    Its own, so that no two tokens claim the same patch: the centre of a bent group can lie outside of it.

    Args:
        token: (B, N) int64, the merged token that each original patch is in, as `follow` returns it.
        tokens: how many merged tokens there are.
        W: columns of the original grid.

    Returns:
        (B, tokens) int64: the flat index of the representing patch; on a tie the lowest.

    Source: our choice. The LLM needs a position for each token that is left (see section 4).
    """
    B, N = token.shape
    patch = torch.arange(N, device=token.device).expand(B, N)
    place = torch.stack([patch // W, patch % W], dim=-1).float()  # (B, N, 2): row and column
    count = place.new_zeros(B, tokens).scatter_add_(1, token, place.new_ones(B, N))
    index = token[..., None].expand(B, N, 2)
    centre = place.new_zeros(B, tokens, 2).scatter_add_(1, index, place) / count[..., None]
    distance = (place - centre.gather(1, index)).square().sum(-1)  # (B, N)
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


# ======================================================================================================
# 3. Settings
# ======================================================================================================


@dataclass(frozen=True)
class LUVCConfig:
    """What is merged and pruned, checked when it is made.

    Every default is our choice: the paper's numbers were not available. See the README for the measurements.

    Raises:
        ValueError: a value outside its range, NaN included.
    """

    vision_keep: float = 0.84
    """Fraction of the grid that leaves the encoder, in (0, 1]; 24 x 24 become 22 x 22. 1.0: merger off."""

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

    normalize: bool = True
    """Bring every token to norm 1 before the filter. False: the raw hidden states."""

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
# The encoder has fewer places to hide: after the projector each merged token is written into one of the slots
# of its own patches (`home_slots`), so that the number of placeholders in the prompt stays what model and
# processor expect. The other slots are *dead*: they hold zeros, and no decoder layer ever processes them, not
# even the first. Zeros instead of a list kept somewhere, because features travel: `generate` computes them
# ahead, repeats them for beams.

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function  # noqa: E402


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

    def __init__(self):
        super().__init__()
        self.seen = 0  # logical length
        self.real = None  # (B, stored) bool, False for fillers; None as long as there are none

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


# ---- 4.1 Layouts: where the parts of a family of models are ------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What LUVC has to know about a model. A new family is a function that fills this in, in `LAYOUTS`."""

    base: nn.Module  # its forward sees input_ids
    blocks: Sequence[nn.Module]  # of the vision encoder
    used_blocks: int  # how many of them run before the features are taken
    projector: nn.Module  # encoder channels -> LLM channels
    decoder: nn.Module  # the LLM without its head
    image_token: int  # id of the placeholder that input_ids holds once per slot
    H: int  # token grid of one picture
    W: int
    prefix: int  # tokens in front of the grid inside the encoder (CLS)
    slots_prefix: int  # how many of these also reach the LLM

    @property
    def slots(self) -> int:
        """Placeholders of one picture in input_ids: what the plain model's encoder delivers."""
        return self.slots_prefix + self.H * self.W


def llava_layout(model: nn.Module) -> Layout:
    """LLaVA: CLIP or SigLIP tower, one feature layer, with or without CLS, a Llama or Qwen2 decoder."""
    config, base = model.config, model.base_model
    vision, text, clip = config.vision_config, config.text_config, "clip_vision_model"
    if vision.model_type not in (clip, "siglip_vision_model"):
        raise ValueError(f"vision tower {vision.model_type!r} is not supported; for LLaVA, CLIP or SigLIP")
    if text.model_type not in ("llama", "qwen2"):
        raise ValueError(f"decoder {text.model_type!r} is not supported; for LLaVA, Llama or Qwen2")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer={config.vision_feature_layer} must be a single layer")
    prefix, full = int(vision.model_type == clip), config.vision_feature_select_strategy == "full"
    if not full and not prefix:
        raise ValueError('vision_feature_select_strategy="default" drops CLS; SigLIP has none, so set "full"')
    blocks = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder.layers
    side = vision.image_size // vision.patch_size
    return Layout(
        base=base,
        blocks=blocks,
        # hidden_states[0] are the embeddings, hidden_states[i] is what block i - 1 returns.
        used_blocks=config.vision_feature_layer % (len(blocks) + 1),
        projector=base.multi_modal_projector,
        decoder=base.language_model,
        image_token=config.image_token_id,
        H=side,
        W=side,
        prefix=prefix,
        slots_prefix=prefix if full else 0,
    )


LAYOUTS: dict[str, Callable[[nn.Module], Layout]] = {"llava": llava_layout}


def find_layout(model: nn.Module) -> Layout:
    """The layout of a model.

    Raises:
        ValueError: the model is of no supported family, or uses something that LUVC cannot work with.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise ValueError(f"{kind!r} is not supported; LUVC needs a VLM of the families {sorted(LAYOUTS)}")
    layout = LAYOUTS[kind](model)
    attention = layout.decoder.config._attn_implementation
    if attention == "flex_attention" or attention not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(f"attention {attention!r} is not supported; use sdpa, flash_attention_2 or eager")
    kinds = set(getattr(layout.decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"decoder layers of kind {sorted(kinds)} are not supported; only full attention is")
    return layout


# ---- 4.2 What one forward call of the LLM processes --------------------------------------------------


class Positions:
    """Which logical positions of one forward call each decoder layer processes, for each sample of a batch.

    Padding is never processed. How *many* positions are processed is known on the host from the start, so no
    layer has to wait for the device; *which* ones is decided on the device, when a layer's input is there.

    Args:
        visual: (B, S) bool, the slots of pictures.
        real: (B, S) bool, False for padding.
        alive: (B, S) bool, False for the dead slots that merging leaves.
        slots: number of slots of one picture.
        fractions: of a picture's visual tokens, one per decoder layer.
        start: positions seen before, P.
        off: nothing is merged or pruned, so nothing has to be right about the pictures either.

    Raises:
        ValueError: a picture that is not whole, or a prompt that ends with a picture.
    """

    def __init__(
        self,
        visual: Tensor,
        real: Tensor,
        alive: Tensor,
        slots: int,
        fractions: list[float],
        start: int,
        off: bool,
    ):
        slots = 1 if off else slots
        self.fractions, self.start, self.slots, (B, self.S) = fractions, start, slots, visual.shape
        text = real & ~visual
        sample, slot = (visual & real).nonzero(as_tuple=True)
        if len(slot) % slots:
            raise ValueError(
                f"{len(slot)} visual positions are not a whole number of pictures of {slots}; "
                "a prompt must not be cut off, or prefilled in chunks, within a picture"
            )
        sample, slot = sample.view(-1, slots), slot.view(-1, slots)  # (pictures, slots)
        # In this constructor the host waits for the device (nonzero, tolist), and nowhere else.
        first, last = sample[:, 0].tolist(), sample[:, -1].tolist()
        if first != last:
            raise ValueError(f"a picture of {slots} slots is spread over two samples; is a prompt cut off?")
        self.pictures = [first.count(b) for b in range(B)]
        self.texts = text.sum(1).tolist()

        # A prompt's last position speaks the next word, so it has to stay alive to the last layer.
        end = torch.where(real, torch.arange(self.S, device=real.device), 0).amax(dim=1, keepdim=True)
        ends_visual = (visual & real).gather(1, end)[:, 0].tolist()
        if any(ends_visual) and not off:
            raise ValueError(f"sample {ends_visual.index(True)} ends with a picture; put text behind it")

        # What the encoder delivered: the slots that are alive, in order. (pictures, slots) -> (pictures, n)
        delivered = alive[sample, slot]
        counts = set(delivered.sum(1).tolist()) or {0}
        if len(counts) > 1:
            raise ValueError(f"the pictures hold {sorted(counts)} tokens; were some encoded without LUVC?")
        self.delivered = counts.pop()
        self.sample = sample[:, :1]
        self.where = torch.where(delivered, slot, self.S).sort(dim=1).values[:, : self.delivered]

        self.keep = text  # (B, S) bool: what the current layer processes
        self.keep[self.sample, self.where] = True
        self.index: list[Tensor | None] = []  # what `select` returned, per layer so far
        self.visual: list[list[int]] = []  # visual tokens processed, per layer so far and sample
        self.totals: list[int] = []  # positions processed by the latest layer, per sample

    def select(self, hidden: Tensor, prune: Callable[[Tensor, int], Tensor]) -> Tensor | None:
        """Prune for the next layer, whose logical input is `hidden` (B, S, C).

        Returns:
            (B, K) int64, the positions that it processes, ascending, filled up at the end with S where a
            sample has fewer than others; None if it processes every position of every sample.
        """
        layer, device = len(self.index), hidden.device
        self.keep, self.sample, self.where = (t.to(device) for t in (self.keep, self.sample, self.where))
        keep = math.floor(self.fractions[layer] * self.delivered + 0.5)
        changed = keep < self.where.shape[1]
        if changed:
            chosen = self.where.gather(1, prune(hidden[self.sample, self.where], keep))  # (pictures, keep)
            self.keep[self.sample, self.where] = False
            self.keep[self.sample, chosen] = True
            self.where = chosen
        self.visual.append([pictures * keep for pictures in self.pictures])
        self.totals = [text + visual for text, visual in zip(self.texts, self.visual[-1], strict=True)]
        if changed or layer == 0:
            every = torch.arange(self.S, device=device)
            index = torch.where(self.keep, every, self.S).sort(dim=1).values[:, : max(self.totals)]
            self.index.append(None if min(self.totals) == self.S else index)
        else:
            self.index.append(self.index[-1])
        return self.index[-1]

    def ragged(self) -> bool:
        """Do the samples differ in how many positions the latest layer processes?"""
        return len(set(self.totals)) > 1

    def kept(self) -> list[list[Tensor]]:
        """Per layer and sample the 1-D int64 logical positions that were processed, ascending."""
        every = torch.arange(self.S, device=self.keep.device).expand(len(self.texts), self.S)
        rows = [every if index is None else index for index in self.index]
        return [[row[row < self.S] + self.start for row in index] for index in rows]


# ---- 4.3 The wrapper itself --------------------------------------------------------------------------


@dataclass
class Report:
    """What LUVC did in the latest prefill, summed over the batch. `print` it.

    `flops_left` is the fraction of the LLM's prefill arithmetic that is left. A decoder layer whose linear
    maps hold M weights, with attention of width A (heads times head size), costs, for n positions behind p
    stored ones,

        2 * M * n  +  4 * A * (n * p + n * (n + 1) / 2)         (a multiply-add counts as two)

    floating-point operations per sample. The fraction sums this over all decoder layers, for the positions
    that were processed and for all that are not padding. Embedding, encoder and output head are not counted.
    """

    vision_tokens: list[int]  # per encoder block, of one picture, CLS not counted
    visual_tokens: list[int]  # per decoder layer
    positions: list[int]  # per decoder layer, text included, padding not
    visual_full: int  # visual tokens per decoder layer of the plain model
    positions_full: int  # positions per decoder layer of the plain model
    kv_bytes: int  # keys and values as stored after the latest forward
    kv_bytes_full: int  # what the plain model would have stored
    flops_left: float

    def __str__(self) -> str:
        def bars(title, numbers, full):
            rows = (f"  {i:3d} {n:6d} {'#' * round(40 * n / max(full, 1))}" for i, n in enumerate(numbers))
            return "\n".join([f"{title} (at most {full})", *rows])

        return "\n".join(
            [
                bars("vision tokens of one picture, per block", self.vision_tokens, max(self.vision_tokens)),
                bars("visual tokens, per decoder layer", self.visual_tokens, self.visual_full),
                bars("all positions, per decoder layer", self.positions, self.positions_full),
                f"KV cache {self.kv_bytes:,} bytes, plain {self.kv_bytes_full:,}",
                f"LLM prefill FLOPs left {self.flops_left:.1%}",
            ]
        )


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
        layout = self.layout
        self.fractions = config.fractions(len(layout.decoder.layers))
        plan = merge_plan(layout.H, layout.W, config.vision_keep, config.vision_steps)
        if len(plan) > layout.used_blocks:
            most = layout.used_blocks
            raise ValueError(f"vision_steps={config.vision_steps} must be at most {most}, one per block")
        # Our choice: the merges are spread evenly over the blocks. Block -> (axis, H, W after it).
        self.merges = {(i + 1) * layout.used_blocks // (len(plan) + 1): step for i, step in enumerate(plan)}
        self.off = not self.merges and all(fraction == 1 for fraction in self.fractions)
        self._undo: list[Callable[[], None]] = []  # how to take the hooks out again
        self._ids: Tensor | None = None  # input_ids of the forward call that is running
        self._grid: tuple[Tensor, Tensor] | None = None  # (size, token) of the latest pictures in the encoder
        self._now: Positions | None = None  # the prefill that is running
        self._prefill: Positions | None = None  # the latest prefill
        self._past: list[int] = []  # columns that were stored before it, per layer
        self._kv: dict[int, tuple[int, int]] = {}  # layer -> bytes (stored, plain), latest call

    # -- hooks in, hooks out

    def attach(self) -> "LUVC":
        """Put the hooks in.

        Raises:
            ValueError: this or another LUVC is attached to the model already.
        """
        if getattr(self.model, "_luvc", None) is not None:
            raise ValueError("a LUVC is attached to this model already; detach() it first")
        self.model._luvc, layout = self, self.layout
        handles = [
            layout.base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            layout.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]
        for block in self.merges:
            hook = self._merge_before(block)
            handles.append(layout.blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
        if self.merges:
            handles.append(layout.projector.register_forward_hook(self._after_projector))
        self._undo = [handle.remove for handle in handles]
        self._undo += [self._wrap(number, layer) for number, layer in enumerate(layout.decoder.layers)]
        return self

    def detach(self) -> None:
        """Take the hooks out: the model is what it was before `attach`. Without effect if not attached."""
        for undo in self._undo:
            undo()
        self._undo, self._ids, self._now = [], None, None
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
        had_own, plain = "forward" in layer.__dict__, layer.forward

        def forward(hidden_states, *args, **kwargs):
            return self._run_layer(number, plain, hidden_states, *args, **kwargs)

        def undo():
            if had_own:  # accelerate wraps in the same way when it spreads a model over devices
                layer.forward = plain
            else:
                del layer.forward

        layer.forward = forward
        return undo

    # -- the vision encoder

    def _merge_before(self, block: int) -> Callable:
        axis, *left = self.merges[block]  # left: H, W after this merge

        def hook(module, args, kwargs):
            args = list(args)
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args.pop(0)
            layout = self.layout
            if block == min(self.merges):  # new pictures: every patch is a token of its own, of size 1
                size = torch.ones(len(hidden), layout.H, layout.W, device=hidden.device)
                self._grid = size, torch.arange(size[0].numel(), device=hidden.device).expand(len(hidden), -1)
            size, token = (t.to(hidden.device) for t in self._grid)
            grid = hidden[:, layout.prefix :].unflatten(1, size.shape[1:])
            grid, size, parent = self.config.merge(grid, size, left[axis - 1], axis)
            self._grid = size, follow(token, parent, axis)
            return (torch.cat([hidden[:, : layout.prefix], grid.flatten(1, 2)], dim=1), *args), kwargs

        return hook

    def _after_projector(self, module, args, features):
        """(pictures, merged tokens, C) -> (pictures, slots, C): tokens in home slots, zeros elsewhere."""
        layout, (size, token) = self.layout, (t.to(features.device) for t in self._grid)
        tokens, prefix = size[0].numel(), layout.slots_prefix
        if features.shape[1] != prefix + tokens:
            raise ValueError(
                f"the encoder delivered {features.shape[1]} features where merging leaves {prefix + tokens}; "
                "vision_feature_layer and vision_feature_select_strategy must be those of the model's config"
            )
        home = home_slots(token, tokens, layout.W)[..., None].expand(-1, -1, features.shape[2])
        slots = features.new_zeros(len(features), layout.H * layout.W, features.shape[2])
        return torch.cat([features[:, :prefix], slots.scatter(1, home, features[:, prefix:])], dim=1)

    # -- the LLM

    def _before_base(self, module, args, kwargs):
        self._ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        if self._ids is None and embeds is not None and embeds.shape[1] > 1 and not self.off:
            raise ValueError("LUVC finds the pictures by input_ids; pass these instead of inputs_embeds")

    def _before_decoder(self, module, args, kwargs):
        """Decide what this forward call processes, and let the KV cache count logical positions."""
        embeds, mask, cache = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "past_key_values"))
        ids, self._ids, self._now, self._kv = self._ids, None, None, {}
        if embeds is None:  # the LLM alone, with ids of its own
            embeds = module.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        if not self.off:
            if module.training and getattr(module, "gradient_checkpointing", False):
                raise ValueError("LUVC cannot train under gradient checkpointing; disable it, or detach()")
            if cache is None and kwargs.get("use_cache", module.config.use_cache):
                cache = kwargs["past_key_values"] = DynamicCache(config=module.config)
            if cache is not None:
                self._adopt(cache)
            if mask is not None and getattr(mask, "ndim", 0) != 2:
                raise ValueError("LUVC needs the 2-D attention_mask (B, P + S) of the padding, or none")
        B, S = embeds.shape[:2]
        if S > 1:  # a single token was just generated: no picture, no padding, no need to wait for the device
            every = torch.ones(B, S, dtype=torch.bool, device=embeds.device)
            self._now = self._prefill = Positions(
                visual=ids.to(embeds.device) == self.layout.image_token if ids is not None else ~every,
                real=mask[:, -S:].to(embeds.device, torch.bool) if getattr(mask, "ndim", 0) == 2 else every,
                alive=(embeds != 0).any(-1) if self.merges else every,
                slots=self.layout.slots,
                fractions=self.fractions,
                start=cache.get_seq_length() if cache is not None else 0,
                off=self.off,
            )
            self._past = []
        return args, kwargs

    def _adopt(self, cache) -> None:
        """Make the cache count logical positions: its layers change, so the caller's object keeps working."""
        if cache.layers and all(isinstance(layer, PrunedLayer) for layer in cache.layers):
            return
        kinds = {type(layer).__name__ for layer in cache.layers}
        if not isinstance(cache, DynamicCache) or kinds - {"DynamicLayer"}:
            kind = f"{type(cache).__name__} of {sorted(kinds)}"
            raise ValueError(f"the KV cache, a {kind}, is not supported; use a DynamicCache, the default")
        if cache.get_seq_length():
            raise ValueError("this KV cache was filled without LUVC; begin anew with LUVC attached")
        cache.layers = [PrunedLayer() for _ in self.layout.decoder.layers]

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
            processed (a filler has index S), `_mask` makes the mask and tells the KV cache what will come.
        """
        now, cache = self._now, kwargs.get("past_key_values")
        store = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        index = now.select(hidden, self.config.prune) if now is not None else None
        if now is not None:
            self._past.append(stored(store) if store is not None else 0)
        if self.off:
            output = plain(hidden, *args, **kwargs)
        elif index is None:
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
        if cache is not None:
            layer = cache.layers[number]
            held = layer.keys.nbytes + layer.values.nbytes
            self._kv[number] = held, held // stored(layer) * layer.get_seq_length()
        return output

    def _mask(self, x: Tensor, store: PrunedLayer | None, real: Tensor | None) -> Tensor | None:
        """The attention mask of one layer, as transformers makes it for the physical sequence.

        That sequence is an ordinary causal one: what was stored, then `x`, in logical order. Fillers stand at
        the end of `x`, where causality hides them from all real positions; so a first prefill needs no mask,
        even of samples of different lengths. They are masked only once something follows them.
        """
        Q, past, hide = x.shape[1], 0, None
        if store is not None:
            past, fillers_before = stored(store), store.real is not None
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

    @property
    def kept(self) -> list[list[Tensor]]:
        """`kept[layer][sample]`: the logical positions that a decoder layer processed in the latest prefill.

        1-D int64, ascending, counted from the beginning of the KV cache; padding is not among them.

        Raises:
            ValueError: there was no prefill yet.
        """
        if self._prefill is None:
            raise ValueError("nothing was prefilled yet: call the model with LUVC attached first")
        return self._prefill.kept()

    @property
    def groups(self) -> Tensor:
        """(pictures, H * W) int64: the merged token that each patch of the latest pictures is in (`follow`).

        Raises:
            ValueError: nothing was merged yet, or the merger is off.
        """
        if self._grid is None:
            raise ValueError("nothing was merged yet: call the model with a picture and vision_keep < 1")
        return self._grid[1]

    def report(self) -> Report:
        """Numbers of the latest prefill, and of the KV cache after the latest forward call; see `Report`.

        Raises:
            ValueError: there was no prefill yet.
        """
        if self._prefill is None:
            raise ValueError("nothing was prefilled yet: call the model with LUVC attached first")
        layout, now, vision = self.layout, self._prefill, []
        grid = layout.H * layout.W
        for block in range(len(layout.blocks)):
            if block in self.merges:
                grid = math.prod(self.merges[block][1:])
            vision.append(grid)

        def flops(layer, n, p):
            weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
            width = layout.decoder.config.num_attention_heads * layer.self_attn.head_dim
            return 2 * weights * n + 4 * width * (n * p + n * (n + 1) / 2)

        plain = [text + pictures * now.slots for text, pictures in zip(now.texts, now.pictures, strict=True)]
        left = whole = 0.0
        for layer, visual, past in zip(layout.decoder.layers, now.visual, self._past, strict=True):
            left += sum(flops(layer, text + v, past) for text, v in zip(now.texts, visual, strict=True))
            whole += sum(flops(layer, n, now.start) for n in plain)
        return Report(
            vision_tokens=vision,
            visual_tokens=[sum(visual) for visual in now.visual],
            positions=[sum(visual) + sum(now.texts) for visual in now.visual],
            visual_full=sum(now.pictures) * now.slots,
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def keep(text: str) -> float | tuple[float, ...]:
        numbers = tuple(float(part) for part in text.split(","))
        return numbers[0] if len(numbers) == 1 else numbers

    default = LUVCConfig()
    parser = OneLineParser(prog="luvc.py", description="Ask a VLM about a picture, with and without LUVC.")
    add = parser.add_argument
    add("--model", default="toy", help="checkpoint folder or hub name (default: the toy beside this file)")
    add("--image", help="picture file (default: the toy's example)")
    add("--prompt", default=EXAMPLE_PROMPT, help="(default: %(default)r)")
    add("--vision-keep", type=float, default=default.vision_keep, metavar="F", help="as in LUVCConfig")
    add("--llm-keep", type=keep, default=default.llm_keep, metavar="F|F,F,...", help="as in LUVCConfig")
    add("--cutoff", type=float, default=default.cutoff, metavar="F", help="as in LUVCConfig")
    add("--max-new-tokens", type=int, default=16, metavar="N")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--attn", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    add("--json", action="store_true", help="print one JSON object instead")
    return parser.parse_args(argv)


def load(name: str, device: str, dtype: str = "auto", attn: str = "sdpa"):
    """(model, processor) of a checkpoint folder or hub name; only safetensors, never code that comes along.

    Raises:
        ValueError: a device, an attention or a checkpoint that is not there.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import is_flash_attn_2_available

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name, or no such hardware
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); --device cpu can") from error
    if attn == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError("--attn flash_attention_2: flash-attn is not installed (see requirements.txt)")
    path = HERE / "toy" if name == "toy" else Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"--model {name}: the folder holds no checkpoint (no config.json)")
    where = path if path.is_dir() else name
    try:
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, attn_implementation=attn, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: {error}") from error
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
    file = Path(args.image or HERE / "toy" / "example.png")
    if not file.exists():
        raise ValueError(f"--image {file}: no such file")
    try:
        picture = Image.open(file).convert("RGB")
    except OSError as error:
        raise ValueError(f"--image {file}: not a picture that can be read") from error
    print(f"loading {args.model} ...", file=sys.stderr)
    model, processor = load(args.model, args.device, args.dtype, args.attn)
    luvc = LUVC(model, config)
    inputs = encode(processor, picture, args.prompt).to(model.device, model.dtype)

    def answer():
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    full = answer()
    with luvc:
        less = answer()
        report = luvc.report()
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
