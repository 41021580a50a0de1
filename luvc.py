"""LUVC in one file: vision-language models made faster without training, by dropping visual tokens.

A reference implementation of *Towards Lossless Ultimate Vision Token Compression for VLMs* (Zheng, Huang, Jiang,
Hu, Chen; arXiv 2512.09010) on stock Hugging Face transformers:

    with LUVC(model):                      # any supported VLM, in place
        model.generate(**inputs)           # your own code, unchanged

A picture becomes hundreds of visual tokens, and the LLM pays for each of them in every layer. LUVC has two units.
The **Orthogonal Iterative Merger** (OIM) merges neighbouring tokens inside the vision encoder, along one spatial
axis at a time. The **Spectrum Pruning Unit** (SPU) prunes visual tokens inside the LLM, layer after layer, until
none are left at the last one; it scores them with a low-pass filter instead of attention, so no attention map is
ever needed and FlashAttention keeps working.

Only the paper's abstract and short summaries were available to us. What it states and what we choose is listed in
README.md ("The ledger"); a choice of ours is marked `Our choice` where it is made.

How to read: top to bottom. Sections 1 and 2 are the algorithms: pure functions that need only torch, made to be
copied. Section 3 holds the settings, section 4 hooks both units into a model, section 5 is the command line.

Symbols, in shapes and names:
    B   batch                            N   visual tokens of one picture
    H W token grid of one picture        K   tokens kept
    C   channels                         S   sequence length of one forward call of the LLM
    L   layers of the LLM                P   positions that the KV cache has seen before this call

What this file does not do: other layouts than LLaVA's (`LAYOUTS` is the place), static or quantised KV caches,
sliding-window attention, cropping the cache (assisted decoding), training with gradient checkpointing, 4-D
attention masks made by the caller. All of these are refused with an error that says so.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

# ======================================================================================================
# 1. Merging: the Orthogonal Iterative Merger (needs only torch)
# ======================================================================================================


def merge_axis(x: Tensor, size: Tensor, keep: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge neighbouring tokens along one axis of the grid until `keep` are left on it.

    Every line of the axis is cut at its `keep - 1` sharpest boundaries, where the cosine similarity of two
    neighbours is lowest; on a tie the lower index is cut. Each run between two cuts becomes its size-weighted mean.
    All lines lose the same number of tokens, so the grid stays a rectangle, and the work is one sort of each short
    line, one `cumsum` and one `scatter_add`, where global matching compares all pairs of tokens.

    Args:
        x: (B, H, W, C) floating, the tokens. Zero tokens are legal: a zero token has similarity 1 to another zero
            token and 0 to anything else.
        size: (B, H, W), how many original tokens each token stands for, > 0 (not checked: reading the values
            would wait for the GPU). All ones to begin with.
        keep: tokens left on the axis, in [1, length of the axis].
        axis: 1 merges along H, 2 along W.

    Returns:
        x: as `x`, with `keep` tokens on the axis; same dtype, accumulated in float32 or better.
        size: as `size`, likewise; the sizes of a line sum to what they summed to before.
        parent: (B, H, W) int64, the index on that axis of the output token that each input token went into.

    Raises:
        ValueError: wrong rank, a dtype that is not floating, a `size` of another shape, `axis` or `keep` out of range.

    Source: that merging is iterative and orthogonal in the spatial axes is the paper's; the rule is our choice.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating of shape (B, H, W, C)")
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

    # Boundary i lies between tokens i and i + 1, so a run starts at i + 1. Stable, so that ties cut the lower index.
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
    B, H, W = parent.shape
    moved = parent.flatten(1).gather(1, token)  # the new index on the merged axis
    row, column = token // W, token % W
    if axis == 1:
        return moved * W + column
    keep = parent[0, 0, -1] + 1 if parent.numel() else 0  # the last token is in the last run: no host sync needed
    return row * keep + moved


def home_slots(token: Tensor, tokens: int, W: int) -> Tensor:
    """One original patch to represent each merged token: of its own patches the one nearest its centre of mass.

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

    A sequence of N values has N // 2 frequencies beside DC; the lowest `cutoff` * (N // 2) of them pass, to the
    nearest whole number. `cutoff` 1 is the identity, 0 leaves the mean.

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
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating, with values along dim={dim}")
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

    A token that the filter reproduces from its neighbours is redundant; what it removes is detail that would be
    lost with the token. Shifting the tokens in a circle shifts the scores: the score does not depend on position.

    Args:
        x: (B, N, C) floating, the visual tokens of one picture in sequence order, N >= 1.
        cutoff: as for `low_pass`.
        keep: "detail" scores what the filter removes, "smooth" what it passes (the ablation).

    Returns:
        (B, N) float32, >= 0: the norm over the channels. What is below the rounding error of the FFT counts as
        0, so that tokens which the filter explains completely tie.

    Raises:
        ValueError: wrong rank, `keep` unknown, or what `low_pass` raises.

    Source: the low-pass filter and position invariance are the paper's; scoring the residual is our choice (the
    README has the measurement of both directions).
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, N, C)")
    if keep not in ("detail", "smooth"):
        raise ValueError(f'keep={keep!r} must be "detail" or "smooth"')
    slow = low_pass(x, cutoff)
    score = (slow if keep == "smooth" else x.float() - slow).norm(dim=-1)
    rounding = 8 * torch.finfo(torch.float32).eps * x.float().norm(dim=-1).amax(dim=1, keepdim=True)
    return score.masked_fill(score <= rounding, 0.0)


def spectral_prune(x: Tensor, keep: int, cutoff: float, score: str = "detail", normalize: bool = True) -> Tensor:
    """Positions of the `keep` tokens with the highest spectral score.

    Args:
        x: (B, N, C) floating, the visual tokens of one picture in sequence order.
        keep: how many are kept, in [0, N].
        cutoff, score: as for `spectral_score`.
        normalize: bring every token to norm 1 first. Big models have a few tokens of huge norm; without this they
            would ring through the filter and score everywhere, and the layer normalises its input as well.

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
    """What is merged and pruned, checked when it is made. The defaults and `LUVCConfig()` are the same.

    Every default is our choice: the paper's numbers were not available. See the README for the measurements.

    Raises:
        ValueError: a value outside its range, NaN included.
    """

    vision_keep: float = 0.5625
    """Fraction of the grid that leaves the encoder, in (0, 1]. 0.5625 is 3/4 along each axis. 1.0: merger off."""

    vision_steps: int = 2
    """Merges inside the encoder, alternating W, H, spread evenly over its blocks; >= 1 and at most its blocks."""

    llm_keep: float | Sequence[float] | None = None
    """Fraction of a picture's visual tokens that each decoder layer processes, counted from what the encoder
    delivered. None: linear, from 1 at the first layer to 0 at the last. A float: the same in all layers. A
    sequence: one fraction per layer, each in [0, 1], never increasing. 1.0: pruner off."""

    cutoff: float = 0.5
    """Fraction of the frequencies that the pruner's low-pass filter lets pass, in [0, 1]."""

    score: str | Callable[[Tensor, int], Tensor] = "detail"
    """"detail" keeps what the filter removes, "smooth" what it passes. For ablations and for schemes of your own:
    a function (x (B, N, C), keep) -> (B, keep) ascending positions, as `spectral_prune` returns them."""

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
            raise ValueError(f'score={self.score!r} must be "detail", "smooth" or a function (x, keep) -> positions')
        if not callable(self.merge):
            raise ValueError(f"merge={self.merge!r} must be a function with the contract of merge_axis")
        if self.llm_keep is None:
            return
        if isinstance(self.llm_keep, Sequence) and not isinstance(self.llm_keep, str):
            object.__setattr__(self, "llm_keep", tuple(self.llm_keep))  # hashable, and the caller's list stays his
        fractions = self.llm_keep if isinstance(self.llm_keep, tuple) else (self.llm_keep,)
        if not fractions or not all(isinstance(f, (int, float)) and 0 <= f <= 1 for f in fractions):
            raise ValueError(f"llm_keep={self.llm_keep} must be None, or fractions in [0, 1]; 1.0 turns the pruner off")
        for layer, (before, after) in enumerate(zip(fractions, fractions[1:], strict=False), start=1):
            if after > before:
                raise ValueError(
                    f"llm_keep rises from {before} to {after} at layer {layer}; a token that was pruned cannot come back"
                )

    def fractions(self, layers: int) -> list[float]:
        """`llm_keep` spelled out: the fraction of the visual tokens that each of `layers` decoder layers processes.

        Raises:
            ValueError: a sequence of another length, or fewer than 2 layers for the linear schedule.
        """
        if self.llm_keep is None:
            if layers < 2:
                raise ValueError(f"the linear schedule needs at least 2 decoder layers, not {layers}; set llm_keep")
            return [1 - layer / (layers - 1) for layer in range(layers)]
        if isinstance(self.llm_keep, tuple):
            if len(self.llm_keep) != layers:
                raise ValueError(f"llm_keep has {len(self.llm_keep)} fractions; this model has {layers} decoder layers")
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
# logical sequence: input_ids, attention mask, position ids, logits, cache length, hidden_states. Each decoder layer
# physically processes a subset: gather the rows that are kept, run the layer as it is, scatter its output back. A
# pruned token just stops being updated and rides along in the residual stream.
#
#     logical   | t t v v v v v v v v t t t |      t text, v visual
#     layer 0   | t t v v v v v v v v t t t |
#     layer 5   | t t v . v . . v v . t t t |      what the layer computes is a shorter causal sequence;
#     last one  | t t . . . . . . . . t t t |      rotary positions are those of the logical sequence
#
# The encoder has fewer places to hide: after the projector each merged token is written into one of the slots of its
# own patches (`home_slots`), so that the number of placeholders in the prompt stays what model and processor expect.
# The other slots are *dead*: they hold zeros, and no decoder layer ever processes them, not even the first. Zeros
# instead of a list kept somewhere, because features travel: `generate` computes them ahead, repeats them for beams.

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function  # noqa: E402


class PrunedLayer(DynamicLayer):
    """The KV cache of one decoder layer that says how many positions the model has seen, not how many it stored.

    Masks and rotary positions are computed from the logical length; the keys hold only what this layer processed.
    Everything lives in the cache object of the caller, so two conversations cannot mix, and beams reorder together.
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.seen = 0  # logical length
        self.real = None  # (B, stored) bool, False where a column is only a filler; None if there are no fillers

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def stored(self) -> int:
        """Columns of keys and values that this layer holds."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def extend(self, columns: int, positions: int, real: Tensor | None) -> Tensor | None:
        """Note that `columns` columns for `positions` positions are about to be stored; returns `real` for all."""
        if real is not None or self.real is not None:
            B = len(real if real is not None else self.real)
            device = (real if real is not None else self.real).device
            before = self.real if self.real is not None else torch.ones(B, self.stored(), dtype=bool, device=device)
            now = real if real is not None else torch.ones(B, columns, dtype=bool, device=device)
            self.real = torch.cat([before, now], dim=1)
        self.seen += positions
        return self.real

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = self.real = None
        self.is_initialized, self.seen = False, 0

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("LUVC cannot crop its KV cache (assisted and prompt-lookup decoding do); decode without it")

    def _batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.real is not None:
            self.real = change(self.real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._batch(lambda t: t[indices.to(t.device)])


# ---- 4.1 Layouts: where the parts of a family of models are ------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What LUVC has to know about a model. A new family needs a function that fills this in, listed in `LAYOUTS`."""

    base: nn.Module  # its forward sees input_ids
    tower: nn.Module  # the vision encoder
    blocks: Sequence[nn.Module]  # of the tower
    used_blocks: int  # how many of them run before the features are taken
    projector: nn.Module  # encoder channels -> LLM channels
    decoder: nn.Module  # the LLM without its head
    layers: Sequence[nn.Module]  # of the decoder
    image_token: int  # id of the placeholder that input_ids holds once per slot
    H: int  # token grid of one picture
    W: int
    prefix: int  # tokens in front of the grid inside the encoder (CLS)
    slots_prefix: int  # how many of these also reach the LLM
    check_feature_layer: str = ""  # named when the features have an unexpected length

    @property
    def slots(self) -> int:
        """Placeholders of one picture in input_ids: what the plain model's encoder delivers."""
        return self.slots_prefix + self.H * self.W


def llava_layout(model: nn.Module) -> Layout:
    """LLaVA: CLIP or SigLIP tower, one feature layer, with or without CLS, a Llama or Qwen2 decoder."""
    config, base = model.config, model.base_model
    vision, text = config.vision_config, config.text_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"vision tower {vision.model_type!r} is not supported; LLaVA layouts: CLIP or SigLIP")
    if text.model_type not in ("llama", "qwen2"):
        raise ValueError(f"decoder {text.model_type!r} is not supported; LLaVA layouts: Llama or Qwen2")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer={config.vision_feature_layer} must be a single layer")
    blocks = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder.layers
    side, prefix = vision.image_size // vision.patch_size, int(vision.model_type == "clip_vision_model")
    full = config.vision_feature_select_strategy == "full"
    if not full and not prefix:
        raise ValueError('vision_feature_select_strategy="default" drops a CLS token, and SigLIP has none; use "full"')
    # hidden_states[0] are the embeddings, hidden_states[i] is what block i - 1 returns.
    used = config.vision_feature_layer % (len(blocks) + 1)
    return Layout(
        base=base, tower=base.vision_tower, blocks=blocks, used_blocks=used, projector=base.multi_modal_projector,
        decoder=base.language_model, layers=base.language_model.layers, image_token=config.image_token_id,
        H=side, W=side, prefix=prefix, slots_prefix=prefix if full else 0, check_feature_layer="vision_feature_layer",
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[nn.Module], Layout]] = {"llava": llava_layout}


def find_layout(model: nn.Module) -> Layout:
    """The layout of a model.

    Raises:
        ValueError: the model is of no supported family, or uses something that LUVC cannot work with.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise ValueError(f"{kind!r} is not supported: LUVC needs a VLM of one of the families {sorted(LAYOUTS)}")
    layout = LAYOUTS[kind](model)
    attention = layout.decoder.config._attn_implementation
    if attention == "flex_attention" or attention not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(f"attention {attention!r} is not supported; load with sdpa, flash_attention_2 or eager")
    kinds = set(getattr(layout.decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"decoder layers of kind {sorted(kinds)} are not supported; only full attention is")
    return layout


# ---- 4.2 What one forward call of the LLM processes --------------------------------------------------


class Positions:
    """Which logical positions of one forward call each decoder layer processes, for every sample of the batch.

    Padding is never processed. How *many* positions are processed is known on the host from the start, so no layer
    has to wait for the GPU; *which* ones is decided on the device, when a layer's input is there.
    """

    def __init__(self, visual: Tensor, real: Tensor, alive: Tensor, slots: int, fractions: list[float], start: int):
        """
        Args:
            visual: (B, S) bool, the slots of pictures.
            real: (B, S) bool, False for padding.
            alive: (B, S) bool, False for the dead slots of merged tokens.
            slots: number of slots of one picture.
            fractions: of the visual tokens, one per decoder layer.
            start: positions seen before, P.

        Raises:
            ValueError: a picture that is not whole, or a prompt that ends with a picture.
        """
        self.start, self.fractions, (B, self.S) = start, fractions, visual.shape
        visual, self.text = visual & real, real & ~visual
        self.keep = self.text.clone()  # (B, S): what the current layer processes
        self.index: list[Tensor | None] = []  # per layer so far: (B, K) positions, S for fillers; None: all of them
        sample, slot = visual.nonzero(as_tuple=True)
        if len(slot) % slots:
            raise ValueError(
                f"{len(slot)} visual positions are no whole number of pictures of {slots}; a prompt must not be cut "
                "or prefilled in chunks within a picture"
            )
        sample, slot = sample.view(-1, slots), slot.view(-1, slots)  # (pictures, slots)
        delivered = alive[sample, slot]
        last = torch.where(real, torch.arange(self.S, device=real.device), -1).amax(dim=1)
        ends_visual = visual.gather(1, last.clamp(min=0)[:, None])[:, 0]
        # The one point where the host waits for the device; all numbers in one go.
        numbers = torch.cat([sample[:, 0], sample[:, -1], delivered.sum(1), self.text.sum(1), ends_visual.long()])
        numbers = numbers.tolist()
        R = len(slot)
        first, end, count = numbers[:R], numbers[R : 2 * R], numbers[2 * R : 3 * R]
        self.texts, ends = numbers[3 * R : 3 * R + B], numbers[3 * R + B :]
        if first != end:
            raise ValueError(f"a picture of {slots} slots is spread over two samples; is a prompt cut off?")
        if any(ends):
            raise ValueError(f"sample {ends.index(1)} ends with a picture; put text behind it, as chat templates do")
        self.pictures = [first.count(b) for b in range(B)]
        self.slots = slots
        # Pictures that delivered equally many tokens are pruned together: (samples, positions (R, n), n).
        self.groups = []
        for n in sorted(set(count)):
            rows = torch.tensor([r for r in range(R) if count[r] == n], device=slot.device)
            where = torch.where(delivered[rows], slot[rows], self.S).sort(dim=1).values[:, :n]
            self.groups.append([sample[rows, 0], where, n])
            self.keep[sample[rows, :1], where] = True
        self.owners = [[first[r] for r in range(R) if count[r] == n] for n in sorted(set(count))]
        self.visual: list[list[int]] = []  # per layer so far, per sample: visual tokens processed

    def select(self, hidden: Tensor, prune: Callable[[Tensor, int], Tensor]) -> Tensor | None:
        """Prune for the next layer, whose logical input is `hidden` (B, S, C).

        Returns:
            (B, K) int64, the positions that it processes, ascending, filled up at the end with S where a sample has
            fewer than others; None if it processes every position of every sample.
        """
        fraction, B = self.fractions[len(self.index)], len(hidden)
        visual = [0] * B
        for group, owners in zip(self.groups, self.owners, strict=True):
            samples, where, delivered = group
            keep = math.floor(fraction * delivered + 0.5)
            if keep < where.shape[1]:
                rows = samples[:, None].to(hidden.device)
                where = where.to(hidden.device)
                chosen = where.gather(1, prune(hidden[rows, where], keep))
                self.keep = self.keep.to(hidden.device)
                self.keep[rows, where] = False
                self.keep[rows, chosen] = True
                group[1] = chosen
            for owner in owners:
                visual[owner] += keep
        self.visual.append(visual)
        totals = [text + v for text, v in zip(self.texts, visual, strict=True)]
        if min(totals) == self.S:
            self.index.append(None)
        elif self.index and self.index[-1] is not None and totals == self._totals:
            self.index.append(self.index[-1])
        else:
            every = torch.arange(self.S, device=self.keep.device)
            self.index.append(torch.where(self.keep, every, self.S).sort(dim=1).values[:, : max(totals)])
        self._totals = totals
        return self.index[-1]

    @property
    def ragged(self) -> bool:
        """Do the samples differ in how many positions the latest layer processes?"""
        return min(self._totals) != max(self._totals)

    def kept(self) -> list[list[Tensor]]:
        """Per layer and sample the 1-D int64 logical positions that were processed, ascending."""
        B = len(self.texts)
        every = torch.arange(self.S, device=self.keep.device)
        rows = [every.expand(B, self.S) if index is None else index for index in self.index]
        return [[row[row < self.S] + self.start for row in index] for index in rows]


# ---- 4.3 The wrapper itself --------------------------------------------------------------------------


@dataclass
class Report:
    """What LUVC did in the latest prefill, summed over the batch. `print` it.

    `flops_left` is the fraction of the LLM's prefill arithmetic that is left. A decoder layer whose linear maps hold
    M weights, with attention of width A (heads times head size), costs for n positions that follow p stored ones

        2 * M * n  +  4 * A * (n * p + n * (n + 1) / 2)         (a multiply-add counts as two)

    floating-point operations per sample; the fraction is the sum over all decoder layers of what was processed over
    the same sum for every position that is not padding. Embedding, vision encoder and output head are not counted.
    """

    vision_tokens: list[int] = field(default_factory=list)  # per encoder block, of one picture, CLS not counted
    visual_tokens: list[int] = field(default_factory=list)  # per decoder layer
    positions: list[int] = field(default_factory=list)  # per decoder layer, text included, padding not
    visual_full: int = 0  # visual tokens per decoder layer of the plain model
    positions_full: int = 0
    kv_bytes: int = 0  # keys and values as stored after the latest forward
    kv_bytes_full: int = 0  # what the plain model would have stored
    flops_left: float = 1.0

    def __str__(self) -> str:
        def bars(numbers, full):
            return "\n".join(f"  {i:3d} {n:6d} {'#' * round(40 * n / max(full, 1))}" for i, n in enumerate(numbers))

        share = sum(self.visual_tokens) / max(1, self.visual_full * len(self.visual_tokens))
        return (
            f"vision tokens per encoder block (one picture)\n{bars(self.vision_tokens, max(self.vision_tokens or [1]))}\n"
            f"visual tokens per decoder layer (plain: {self.visual_full}), {share:.0%} of all\n"
            f"{bars(self.visual_tokens, self.visual_full)}\n"
            f"positions per decoder layer (plain: {self.positions_full})\n"
            f"{bars(self.positions, self.positions_full)}\n"
            f"KV cache {self.kv_bytes:,} bytes (plain: {self.kv_bytes_full:,}); "
            f"LLM prefill FLOPs left: {self.flops_left:.1%}"
        )


class LUVC:
    """Hook merging and pruning into a model, in place and reversibly.

        with LUVC(model) as luvc:
            model.generate(**inputs)       # or model(...), or a pipeline: nothing else changes
        print(luvc.report())

    No attention map is read, and a causal mask is made only where the samples of a batch differ in length, so the
    flash kernels run. With everything off (`vision_keep=1.0, llm_keep=1.0`) the model's results are bit-identical.

    A second turn on the same KV cache works. It sees all text of the first turn, and of its pictures what each layer
    has stored: everything in the first layers, nothing in the last. What the first turn did not take from a picture
    is harder to ask for in the second; start anew with the picture, or use a schedule that does not end at zero.
    A new picture in the second turn is seen as in the first.

    Args:
        model: a Hugging Face VLM of a supported family (`LAYOUTS`).
        config: the settings.

    Raises:
        ValueError: an unsupported model, or settings that do not fit it (number of layers or encoder blocks).
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig()):  # noqa: B008 (frozen)
        self.model, self.config, self.layout = model, config, find_layout(model)
        layout = self.layout
        self.fractions = config.fractions(len(layout.layers))
        self.plan = merge_plan(layout.H, layout.W, config.vision_keep, config.vision_steps)
        if len(self.plan) > layout.used_blocks:
            raise ValueError(f"vision_steps={config.vision_steps} exceeds the {layout.used_blocks} usable encoder blocks")
        # Our choice: the merges are spread evenly over the blocks, as early and as late as that gives.
        blocks = [(i + 1) * layout.used_blocks // (len(self.plan) + 1) for i in range(len(self.plan))]
        self.merges = dict(zip(blocks, self.plan, strict=True))  # block -> (axis, H, W) after merging before it
        self.off = not self.plan and all(f == 1 for f in self.fractions)
        self._undo: list[Callable[[], None]] = []  # how to take the hooks out again
        self._ids: Tensor | None = None  # input_ids of the forward that is running
        self._grid: tuple | None = None  # (size, token) of the pictures that the encoder is working on
        self._now: Positions | None = None  # the forward that is running
        self._prefill: Positions | None = None  # the latest one that was a prefill
        self._past: list[int] = []  # columns stored before it, per layer
        self._kv: dict[int, tuple[int, int]] = {}  # layer -> bytes (stored, plain)

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
        if self.plan:
            handles.append(layout.tower.register_forward_pre_hook(self._before_tower, with_kwargs=True))
            handles.append(layout.projector.register_forward_hook(self._after_projector))
        for block, (axis, H, W) in self.merges.items():
            hook = self._before_block(axis, H if axis == 1 else W)
            handles.append(layout.blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
        self._undo = [handle.remove for handle in handles]
        for number, layer in enumerate(layout.layers):
            self._undo.append(self._wrap(number, layer))
        return self

    def detach(self) -> None:
        """Take the hooks out: the model is what it was before `attach`. Without effect if not attached."""
        for undo in self._undo:
            undo()
        self._undo, self._ids, self._grid, self._now = [], None, None, None
        if getattr(self.model, "_luvc", None) is self:
            del self.model._luvc

    def __enter__(self) -> "LUVC":
        return self.attach()

    def __exit__(self, *exception) -> None:
        self.detach()

    def _wrap(self, number: int, layer: nn.Module) -> Callable[[], None]:
        # A layer is wrapped at `forward`, inside of its hooks. transformers collects hidden_states by hooks on the
        # layers: these have to see the logical sequence on both sides, which pre- and post-hooks of ours cannot give.
        had_own, plain = "forward" in layer.__dict__, layer.forward

        def forward(hidden_states, *args, **kwargs):
            return self._run_layer(number, plain, hidden_states, *args, **kwargs)

        def undo():
            if had_own:  # accelerate does the same when it spreads a model over devices
                layer.forward = plain
            else:
                del layer.forward

        layer.forward = forward
        return undo

    # -- the vision encoder

    def _before_tower(self, module, args, kwargs):
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        B, N = len(pixels), self.layout.H * self.layout.W
        size = torch.ones(B, self.layout.H, self.layout.W, device=pixels.device)
        self._grid = size, torch.arange(N, device=pixels.device).expand(B, N)

    def _before_block(self, axis: int, keep: int) -> Callable:
        def hook(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            size, token = (t.to(hidden.device) for t in self._grid)
            prefix, grid = hidden[:, : self.layout.prefix], hidden[:, self.layout.prefix :]
            grid, size, parent = self.config.merge(grid.unflatten(1, size.shape[1:]), size, keep, axis)
            self._grid = size, follow(token, parent, axis)
            hidden = torch.cat([prefix, grid.flatten(1, 2)], dim=1)
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": hidden}
            return (hidden, *args[1:]), kwargs

        return hook

    def _after_projector(self, module, args, features):
        """(pictures, merged tokens, C) -> (pictures, slots, C): each token in its home slot, zeros elsewhere."""
        size, token = (t.to(features.device) for t in self._grid)
        layout, tokens = self.layout, size.shape[1] * size.shape[2]
        if features.shape[1] != layout.slots_prefix + tokens:
            raise ValueError(
                f"the encoder delivered {features.shape[1]} features where merging leaves {layout.slots_prefix + tokens};"
                f" with the merger on, {layout.check_feature_layer} must be the one of the model's config"
            )
        home = home_slots(token, tokens, layout.W)[..., None].expand(-1, -1, features.shape[2])
        prefix, merged = features[:, : layout.slots_prefix], features[:, layout.slots_prefix :]
        slots = features.new_zeros(len(features), layout.H * layout.W, features.shape[2])
        return torch.cat([prefix, slots.scatter(1, home, merged)], dim=1)

    # -- the LLM

    def _before_base(self, module, args, kwargs):
        self._ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        if self._ids is None and embeds is not None and embeds.shape[1] > 1 and not self.off:
            raise ValueError("LUVC finds the pictures by input_ids; pass these instead of inputs_embeds")

    def _before_decoder(self, module, args, kwargs):
        """Decide what this forward call processes, and let the KV cache count logical positions."""
        embeds, mask, cache = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "past_key_values"))
        if embeds is None:
            embeds = module.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        ids, self._ids = self._ids, None
        if mask is not None and mask.ndim != 2 and not self.off:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; LUVC needs the 2-D mask of the padding")
        if module.training and getattr(module, "gradient_checkpointing", False) and not self.off:
            raise ValueError("LUVC cannot run under gradient checkpointing; disable it, or detach() to train")
        if cache is None and kwargs.get("use_cache", module.config.use_cache) and not self.off:
            cache = kwargs["past_key_values"] = DynamicCache(config=module.config)
        if cache is not None and not self.off:
            self._adopt(cache)
        B, S = embeds.shape[:2]
        start = cache.get_seq_length() if cache is not None else 0
        every = torch.ones(B, S, dtype=torch.bool, device=embeds.device)
        # A single token is one that was just generated: nothing to look for, and no reason to wait for the device.
        visual = ids.to(embeds.device) == self.layout.image_token if ids is not None and S > 1 else ~every
        real = mask[:, -S:].to(embeds.device, torch.bool) if mask is not None and mask.ndim == 2 and S > 1 else every
        alive = (embeds != 0).any(-1) if self.plan and S > 1 else every
        if S > 1:
            self._now = Positions(visual, real, alive, self.layout.slots, self.fractions, start)
            self._prefill, self._past = self._now, []
        else:
            self._now = None
        self._kv = {}
        return args, kwargs

    def _adopt(self, cache) -> None:
        if all(isinstance(layer, PrunedLayer) for layer in cache.layers) and cache.layers:
            return
        kinds = {type(layer).__name__ for layer in cache.layers}
        if not isinstance(cache, DynamicCache) or kinds - {"DynamicLayer"}:
            raise ValueError(
                f"a KV cache of {type(cache).__name__} {sorted(kinds)} is not supported; use a DynamicCache (the default)"
            )
        if cache.get_seq_length():
            raise ValueError("this KV cache was filled without LUVC; start the conversation with LUVC attached")
        # The layers change, not the cache: the caller's object keeps working, whether he reads it or the output's.
        cache.layers = [PrunedLayer() for _ in self.layout.layers]

    def _run_layer(self, number: int, plain: Callable, hidden: Tensor, *args, **kwargs) -> Tensor:
        """Gather, run, scatter: `plain` is the layer's own forward."""
        cache = kwargs.get("past_key_values")
        now, store = self._now, cache.layers[number] if cache is not None and not self.off else None
        index = now.select(hidden, self.config.prune) if now is not None else None
        if now is not None:
            self._past.append(store.stored() if store is not None else 0)
        if self.off:
            output = plain(hidden, *args, **kwargs)
        elif index is None:
            kwargs["attention_mask"] = self._mask(hidden, store, real=None)
            output = plain(hidden, *args, **kwargs)
        else:
            B, S, _ = hidden.shape
            index = index.to(hidden.device)
            rows = torch.arange(B, device=hidden.device)[:, None]
            padded = nn.functional.pad(hidden, (0, 0, 0, 1))  # fillers read and write the extra row at the end
            x = padded[rows, index]  # (B, S, C) -> (B, K, C)
            kwargs["attention_mask"] = self._mask(x, store, real=index < S if now.ragged else None)
            # Rotary positions stay those of the logical sequence. position_ids would tell FlashAttention, by their
            # gaps, that several sequences are packed into one.
            at = index.clamp(max=S - 1)
            kwargs["position_embeddings"] = tuple(
                t.to(hidden.device).expand(B, -1, -1)[rows, at] for t in kwargs["position_embeddings"]
            )
            kwargs["position_ids"] = None
            padded[rows, index] = plain(x, *args, **kwargs).to(hidden.device)
            output = padded[:, :S]
        if cache is not None and cache.layers[number].is_initialized:
            layer = cache.layers[number]
            stored = layer.keys.nbytes + layer.values.nbytes
            columns = max(1, layer.keys.shape[-2])
            self._kv[number] = stored, stored // columns * layer.get_seq_length()
        return output

    def _mask(self, x: Tensor, store: PrunedLayer | None, real: Tensor | None) -> Tensor | None:
        """The attention mask of one layer, as transformers makes it for the physical sequence.

        That sequence is an ordinary causal one: what was stored, then `x`, in logical order. Fillers stand at the end
        of `x`, where causality hides them from every real position, so a first prefill needs no mask even in a batch
        of different lengths; they have to be masked only once something follows them.
        """
        config, Q = self.layout.decoder.config, x.shape[1]
        past = store.stored() if store is not None else 0
        columns = store.real if store is not None else None  # before this call: fillers of earlier ones
        if store is not None:
            every = store.extend(Q, self._now.S if self._now is not None else Q, real)
            columns = every if columns is not None else None
        if Q == 1 and columns is None:
            return None
        make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
        return make(
            batch_size=len(x), q_length=Q, kv_length=past + Q, q_offset=past, kv_offset=0, dtype=x.dtype,
            mask_function=causal_mask_function, attention_mask=columns, allow_is_causal_skip=columns is None,
            device=x.device, config=config, use_vmap=False,
        )  # fmt: skip

    # -- what happened

    @property
    def kept(self) -> list[list[Tensor]]:
        """`kept[layer][sample]`: 1-D int64, ascending, the logical positions that this decoder layer processed in the
        latest prefill; padding is not among them. Positions count from the beginning of the KV cache.

        Raises:
            ValueError: there was no prefill yet.
        """
        if self._prefill is None:
            raise ValueError("nothing was prefilled yet: call the model with LUVC attached first")
        return self._prefill.kept()

    def report(self) -> Report:
        """Numbers of the latest prefill, and of the KV cache after the latest forward; see `Report`.

        Raises:
            ValueError: there was no prefill yet.
        """
        if self._prefill is None:
            raise ValueError("nothing was prefilled yet: call the model with LUVC attached first")
        layout, now, grid, vision = self.layout, self._prefill, self.layout.H * self.layout.W, []
        for block in range(len(layout.blocks)):
            if block in self.merges:
                grid = self.merges[block][1] * self.merges[block][2]
            vision.append(grid)
        plain = [text + pictures * now.slots for text, pictures in zip(now.texts, now.pictures, strict=True)]
        left = whole = 0.0
        for layer, visual, past in zip(layout.layers, now.visual, self._past, strict=True):
            weights = sum(m.weight.shape[0] * m.weight.shape[1] for m in layer.modules() if isinstance(m, nn.Linear))
            width = layout.decoder.config.num_attention_heads * layer.self_attn.head_dim

            def flops(n, p, weights=weights, width=width):
                return 2 * weights * n + 4 * width * (n * p + n * (n + 1) / 2)

            left += sum(flops(text + v, past) for text, v in zip(now.texts, visual, strict=True))
            whole += sum(flops(n, now.start) for n in plain)
        return Report(
            vision_tokens=vision,
            visual_tokens=[sum(visual) for visual in now.visual],
            positions=[sum(visual) + sum(now.texts) for visual in now.visual],
            visual_full=sum(now.pictures) * now.slots,
            positions_full=sum(plain),
            kv_bytes=sum(stored for stored, _ in self._kv.values()),
            kv_bytes_full=sum(full for _, full in self._kv.values()),
            flops_left=left / whole,
        )


# ======================================================================================================
# 5. The command line: one question about one picture, with and without LUVC
# ======================================================================================================

HERE = Path(__file__).resolve().parent
EXAMPLE_PROMPT = "what colour is the striped thing?"


class UsageError(Exception):
    """A mistake of the caller's that the command line reports in one line."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse_keep(text: str) -> float | tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def make_parser() -> argparse.ArgumentParser:
    default = LUVCConfig()
    parser = OneLineParser(prog="luvc.py", description="Ask a VLM about a picture, with and without LUVC.")
    parser.add_argument("--model", default="toy", help="folder or hub name; default: the toy beside this file")
    parser.add_argument("--image", help="picture file; default: the toy's example picture")
    parser.add_argument("--prompt", default=EXAMPLE_PROMPT, help="default: %(default)r")
    parser.add_argument("--vision-keep", type=float, default=default.vision_keep, metavar="F",
                        help="fraction of the grid that leaves the encoder; default %(default)s, 1 turns OIM off")  # fmt: skip
    parser.add_argument("--llm-keep", type=parse_keep, default=None, metavar="F|F,F,...",
                        help="fraction of visual tokens per decoder layer; default linear to 0, 1 turns SPU off")  # fmt: skip
    parser.add_argument("--cutoff", type=float, default=default.cutoff, help="of the low-pass filter; default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...; default %(default)s")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--attn", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def load(name: str, device: str, dtype: str, attn: str):
    """(model, processor) of a checkpoint folder or hub name; only safetensors, never code from the checkpoint."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import is_flash_attn_2_available

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device {device}: no such device") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    if attn == "flash_attention_2" and not is_flash_attn_2_available():
        raise UsageError("--attn flash_attention_2: flash-attn is not installed (see requirements.txt); use --attn sdpa")
    path = HERE / "toy" if name == "toy" else Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise UsageError(f"--model {name}: the folder holds no checkpoint (no config.json)")
    try:
        processor = AutoProcessor.from_pretrained(path if path.is_dir() else name, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            path if path.is_dir() else name, dtype=dtype, attn_implementation=attn,
            use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    return model.to(device).eval(), processor


def encode(processor, picture, prompt: str):
    """Model inputs for one picture and one question, through the chat template where the processor has one."""
    text = f"<image>\n{prompt}"
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


@torch.inference_mode()
def time_once(model, inputs, tokens: int) -> tuple[float, float]:
    """(milliseconds of one prefill, vision encoder included; milliseconds per decoded token), greedy."""

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    start = now()
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    prefill, start = now() - start, now()
    for _ in range(tokens):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
    return prefill, (now() - start) / tokens


def run(args) -> dict:
    """What the command line prints: both answers, and what they cost."""
    from PIL import Image, UnidentifiedImageError

    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    config = LUVCConfig(vision_keep=args.vision_keep, llm_keep=args.llm_keep, cutoff=args.cutoff)
    file = args.image or HERE / "toy" / "example.png"
    try:
        picture = Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a picture that can be read"
        raise UsageError(f"--image {file}: {reason}") from error
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
    plain_times, luvc_times = [], []
    for repeat in range(9):
        plain_times.append(time_once(model, inputs, 4))
        with luvc:
            luvc_times.append(time_once(model, inputs, 4))
        if repeat < 2:  # warming up
            plain_times.clear(), luvc_times.clear()
    (prefill_full, token_full), (prefill_luvc, token_luvc) = (
        map(statistics.median, zip(*times, strict=True)) for times in (plain_times, luvc_times)
    )
    return {
        "model": args.model, "prompt": args.prompt, "answer_full": full, "answer_luvc": less,
        "same_answer": full == less, "vision_tokens": report.vision_tokens, "visual_tokens": report.visual_tokens,
        "positions": report.positions, "prefill_ms_full": prefill_full, "prefill_ms_luvc": prefill_luvc,
        "speedup": prefill_full / prefill_luvc, "kv_bytes_full": report.kv_bytes_full,
        "kv_bytes_luvc": report.kv_bytes, "flops_left": report.flops_left,
        "token_ms_full": token_full, "token_ms_luvc": token_luvc, "report": report,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = make_parser().parse_args(argv)
        result = run(args)
    except (UsageError, ValueError) as error:
        print(f"luvc.py: error: {error}", file=sys.stderr)
        return 2
    report, token_full, token_luvc = (result.pop(k) for k in ("report", "token_ms_full", "token_ms_luvc"))
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{args.prompt}\n  plain: {result['answer_full']}\n  LUVC:  {result['answer_luvc']}\n\n{report}")
    print(
        f"prefill {result['prefill_ms_full']:.1f} -> {result['prefill_ms_luvc']:.1f} ms, encoder included "
        f"({result['speedup']:.2f}x); per decoded token {token_full:.1f} -> {token_luvc:.1f} ms ({args.device})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
