"""LUVC in one file: vision-language models made faster without training, by dropping visual tokens.

A reference implementation of *Towards Lossless Ultimate Vision Token Compression for VLMs* (Zheng, Huang,
Jiang, Hu, Chen; arXiv 2512.09010) on stock Hugging Face transformers:

    with LUVC(model):                      # any supported VLM, in place
        model.generate(**inputs)           # your own code, unchanged

A picture becomes hundreds of visual tokens, and the LLM pays for each of them in every layer. LUVC has two
units. The **Orthogonal Iterative Merger** (OIM) merges neighbouring tokens inside the vision encoder, along
one spatial axis at a time. The **Spectrum Pruning Unit** (SPU) prunes visual tokens inside the LLM, layer
after layer, until none are left at the last one; a low-pass filter scores them, not attention, so that no
attention map is needed and FlashAttention keeps working.

One number runs through all of it: the *size* of a token, how many original tokens it stands for. Merging adds
sizes up, pruning passes them on to neighbours, attention weighs a token by its size. A token of size 0 is not
there: that is what pruned tokens and padding are. So the sizes of a picture add up to the same in every layer
until the picture is gone, and one array of sizes says all there is to know about a layer.

How to read. 1 merging, 2 pruning: pure functions, torch only, made to be copied. 3 the settings. 4 pruning
inside an LLM: after it, before half of the file, you know the method. 5 merging inside the encoders of
several families of models. 6 hooks in, hooks out. 7 the command line.

    B   batch                            N   visual tokens of one picture
    H W token grid of one picture        K   tokens kept
    C   channels                         S   sequence length of one forward call of the LLM

Only the paper's abstract and summaries were available: what it states and what we choose is README's ledger,
and `Our choice` marks where a choice is made. Not done here, and refused with an error that says so: other
families, static or quantised KV caches, sliding windows, linear attention, cropping the cache (assisted
decoding), continuous batching, sequences packed in a row, gradient checkpointing, 4-D attention masks.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

# ==== 1. Merging: the Orthogonal Iterative Merger ===========================================================


def merge_axis(x: Tensor, size: Tensor, keep: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge neighbouring tokens along one axis of the grid until `keep` are left on it.

    Every line of the axis is cut at its `keep - 1` sharpest boundaries, where the cosine similarity of two
    neighbours is lowest; on a tie the lower index is cut. Each run between two cuts becomes its size-weighted
    mean. All lines lose equally many tokens, so the grid stays a rectangle. The work is a sort of each short
    line, a `cumsum` and an `index_add`: linear in the tokens, where matching all pairs of them is quadratic.

    Args:
        x: (B, H, W, C) floating, the tokens; zero tokens are legal.
        size: (B, H, W) > 0, how many original tokens each stands for; ones to begin with. (That they are
            positive is not checked: reading them would wait for the GPU.)
        keep: tokens left on the axis, in [1, length of the axis].
        axis: 1 merges along H, 2 along W.

    Returns:
        x and size with `keep` tokens on the axis, dtypes as they came, computed in float32 or better; and
        parent (B, H, W) int64: the index on that axis of the token that each input token went into.

    Raises: ValueError for another shape or dtype, `keep` or `axis` out of range.
    Source: merging iteratively, orthogonally in the spatial axes, is the paper's; this rule is our choice.
    """
    if x.ndim != 4 or not x.is_floating_point() or size.shape != x.shape[:3]:
        got = f"x {tuple(x.shape)}, {x.dtype}, size {tuple(size.shape)}"
        raise ValueError(f"{got}: they must be (B, H, W, C), floating, and (B, H, W)")
    if axis not in (1, 2):
        raise ValueError(f"axis={axis} must be 1 (merge along H) or 2 (merge along W)")
    if not 1 <= keep <= x.shape[axis]:
        raise ValueError(f"keep={keep} must lie in [1, {x.shape[axis]}], the length of axis {axis}")
    if axis == 1:  # along H is along W of the transposed grid
        merged = merge_axis(x.transpose(1, 2), size.transpose(1, 2), keep, axis=2)
        return tuple(t.transpose(1, 2) for t in merged)
    B, H, W, C = x.shape
    if keep == W:
        return x, size, torch.arange(W, device=x.device).expand(B, H, W)
    token = x.to(torch.promote_types(x.dtype, torch.float32))
    mass = size.to(token.dtype)

    # How alike are neighbours? A zero token is like another zero token (1) and unlike anything else (0).
    norm = torch.linalg.vector_norm(token, dim=-1)  # (B, H, W)
    dot = torch.linalg.vecdot(token[:, :, :-1], token[:, :, 1:])  # (B, H, W - 1)
    similar = dot / (norm[:, :, :-1] * norm[:, :, 1:]).clamp(min=torch.finfo(token.dtype).tiny)
    similar = similar.masked_fill((norm[:, :, :-1] == 0) & (norm[:, :, 1:] == 0), 1.0)

    # Boundary i lies between tokens i and i + 1, so a run starts at i + 1. Stable: ties cut the lower index.
    cut = similar.sort(dim=-1, stable=True).indices[..., : keep - 1]
    starts = torch.zeros(B, H, W, dtype=torch.int64, device=x.device).scatter_(-1, cut + 1, 1)
    parent = starts.cumsum(-1)  # 0 0 1 1 1 2 ...: how many runs have started so far

    # A run becomes one token: nothing is thrown away here, only averaged.
    total = mass.new_zeros(B, H, keep).scatter_add_(-1, parent, mass)
    row = torch.arange(B * H, device=x.device).view(B, H, 1) * keep + parent  # of all tokens that are left
    weighted = (token * mass[..., None]).flatten(0, 2)
    merged = token.new_zeros(B * H * keep, C).index_add_(0, row.flatten(), weighted)
    return merged.view(B, H, keep, C).div_(total[..., None]).to(x.dtype), total.to(size.dtype), parent


def merge_plan(H: int, W: int, keep: float, steps: int) -> list[tuple[int, int, int]]:
    """Which axis merges at which step, and the grid after it: a list of (axis, H, W), empty if `keep` is 1.

    The axes alternate W, H, W, H. Each shrinks to the square root of `keep` (in a single step: W alone, to
    `keep`), in equal portions over its steps, to the nearest whole number of tokens and never below one.

    >>> merge_plan(24, 24, keep=0.25, steps=4)
    [(2, 24, 18), (1, 18, 18), (2, 18, 12), (1, 12, 12)]

    Args: H, W >= 1, the grid; keep, the fraction of its tokens that is left, in (0, 1]; steps >= 1.
    Raises: ValueError for a value out of its range.
    Source: "iterative" and "orthogonal" are the paper's; order, fractions and portions are our choice.
    """
    if min(H, W, steps) < 1 or not 0 < keep <= 1:
        raise ValueError(f"H={H}, W={W}, steps={steps} must be at least 1, and keep={keep} in (0, 1]")
    full, plan, now = {1: H, 2: W}, [], {1: H, 2: W}
    goal = keep if steps == 1 else math.sqrt(keep)
    for step in range(steps if keep < 1 else 0):
        axis = 1 if step % 2 else 2
        turn, turns = step // 2 + 1, steps // 2 if axis == 1 else (steps + 1) // 2
        now[axis] = max(1, math.floor(full[axis] * (1 - (1 - goal) * turn / turns) + 0.5))
        plan.append((axis, now[1], now[2]))
    return plan


def follow(place: tuple[Tensor, Tensor], parent: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Where each original token is after one more merge.

    Args: place, (row, column), each (B, N) int64, of the token that each original token is in so far; parent
        (B, H, W) as `merge_axis` returns it; axis, the one that was merged.
    Returns: (row, column) on the new grid, each (B, N). Source: our choice (bookkeeping).
    """
    batch = torch.arange(len(parent), device=parent.device)[:, None]
    moved = parent[batch, place[0], place[1]]  # the new index on the axis that was merged
    return (moved, place[1]) if axis == 1 else (place[0], moved)


# ==== 2. Pruning: the Spectrum Pruning Unit =================================================================


def low_pass(x: Tensor, cutoff: float, dim: int = 1) -> Tensor:
    """The slow part of a sequence: DC and the lowest `cutoff` of the other frequencies of the real FFT.

    A sequence of N values has N // 2 frequencies beside DC; `cutoff` * (N // 2) of them pass, to the nearest
    whole number. `cutoff` 1 is the identity, 0 leaves the mean.

    Args: x, floating, with at least one value along `dim`; cutoff in [0, 1]; dim, along which to filter.
    Returns: float32, the shape of `x`. Raises: ValueError for another dtype or `cutoff`, or an empty `dim`.
    Source: that the filter is a low-pass one is the paper's; the transform and the cutoff are our choice.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[dim] == 0 or not 0 <= cutoff <= 1:
        got = f"x of shape {tuple(x.shape)}, {x.dtype}, cutoff={cutoff}"
        raise ValueError(f"{got}: x must be floating, not empty along dim={dim}, and cutoff in [0, 1]")
    N = x.shape[dim]
    passed = 1 + math.floor(cutoff * (N // 2) + 0.5)
    if passed == N // 2 + 1:
        return x.float()
    spectrum = torch.fft.rfft(x.float(), dim=dim)  # N values -> N // 2 + 1 frequencies, number 0 is DC
    spectrum.narrow(dim, passed, spectrum.shape[dim] - passed).zero_()
    return torch.fft.irfft(spectrum, n=N, dim=dim)


def spectral_score(x: Tensor, cutoff: float = 0.5, score: str = "detail") -> Tensor:
    """Score each visual token of a picture by what a low-pass filter along the tokens makes of it.

    A token that the filter reproduces from its neighbours is redundant; what it removes is detail that would
    be lost with the token. Neither attention nor similarities are asked, and position does not matter:
    shifting the tokens in a circle shifts their scores.

    Args: x (B, N, C) floating, in sequence order, N >= 1; cutoff as for `low_pass`; score, "detail" for the
        norm of what the filter removes, "smooth" for that of what it passes (the ablation).
    Returns: (B, N) float32, >= 0. Raises: ValueError for another rank or `score`, and what `low_pass` raises.
    Source: filter and position invariance are the paper's; to score the residual is our choice (README has
        the measurement of both directions).
    """
    if x.ndim != 3 or score not in ("detail", "smooth"):
        raise ValueError(f'x {tuple(x.shape)} must be (B, N, C), score={score!r} "detail" or "smooth"')
    slow = low_pass(x, cutoff)
    return (slow if score == "smooth" else x.float() - slow).norm(dim=-1)


@functools.lru_cache(maxsize=32)
def projection(C: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(C, channels), random, the same in every call: to so few channels lengths stay nearly what they were
    (Johnson and Lindenstrauss, 1984), and the filter is linear, so its residuals' as well. Our choice."""
    with torch.inference_mode(False):  # whoever asks first may run inference, who comes next may train
        numbers = torch.randn(C, channels, generator=torch.Generator().manual_seed(0), device="cpu")
        return (numbers / math.sqrt(channels)).to(device, dtype)


def spectral_prune(x: Tensor, keep: int, cutoff: float = 0.5, score: str = "detail", channels=64) -> Tensor:
    """Choose the `keep` tokens with the highest spectral score; on a tie the lower index.

    Args: x (B, N, C) floating, the visual tokens of a picture in sequence order; keep in [0, N]; cutoff and
        score as for `spectral_score`; channels: wider tokens are scored in a random projection to so many.
    Returns: (B, keep) int64, ascending. Raises: ValueError, for `keep` out of range or as the score does.
    Source: the paper's unit; norm 1, projection and ties are our choice.
    """
    if x.ndim != 3 or not 0 <= keep <= x.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} must be (B, N, C), and keep={keep} in [0, N]")
    if keep == 0:
        return torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    if x.shape[2] > channels:  # the cost of a score then hardly depends on the width of the LLM
        x = x @ projection(x.shape[2], channels, x.device, x.dtype)
    # To norm 1 first: big models have a few tokens of huge norm that would ring through the filter.
    single = torch.finfo(torch.float32)
    x = x.float() / x.float().norm(dim=-1, keepdim=True).clamp(min=single.tiny)
    value = spectral_score(x, cutoff, score)
    # In steps, so that scores tie which differ by rounding errors alone, whatever kernel made the tokens. The
    # highest score is a whole number of steps: scores that equal it must not straddle two.
    top = value.amax(dim=1, keepdim=True)
    steps = (top / (32 * single.eps)).floor().clamp(max=16384)
    value = (value / top.clamp(min=single.tiny) * steps).round()
    order = value.sort(dim=1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=1).values


def inherit(size: Tensor, kept: Tensor) -> Tensor:
    """Pass the sizes of pruned tokens on: each to the nearest token that is kept, on a tie to the earlier.

    Args: size (B, N), any dtype; kept (B, K) int64, ascending, K >= 1, as `spectral_prune` returns it.
    Returns: (B, K), the sizes of those kept; they sum to what all sizes summed to. Source: our choice.
    """
    middle = (kept[:, :-1] + kept[:, 1:]) // 2  # the last token that is nearer to its left neighbour
    starts = torch.zeros_like(size, dtype=torch.int64).scatter_(1, middle + 1, 1)
    heir = starts.cumsum(1)  # 0 0 1 1 1 2 ...: the kept token that each token's size goes to
    return size.new_zeros(kept.shape).scatter_add_(1, heir, size)


# ==== 3. Settings ===========================================================================================


@dataclass(frozen=True)
class LUVCConfig:
    """What is merged and pruned. Every default is our choice; README has the measurements.

    Raises: ValueError for a value outside its range, NaN included.
    """

    vision_keep: float = 0.5625
    """Fraction of the grid that leaves the encoder, in (0, 1]; 24 x 24 become 18 x 18. 1.0: merger off."""
    vision_steps: int = 2
    """Merges inside the encoder, along W, H, W, ..., spread evenly over its blocks; at most one per block."""
    llm_keep: float | Sequence[float] | None = None
    """Fraction of a picture's tokens that each decoder layer processes, of what the encoder delivered, in
    [0, 1]: one for all layers, or one per layer, never rising. None: linear, from 1 to 0. 1.0: pruner off."""
    sizes: bool = True
    """Does a token weigh in the LLM's attention by what it stands for? False: all tokens weigh the same."""
    merge: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]] = merge_axis
    """The function that merges along one axis: the contract is that of `merge_axis`."""
    prune: Callable[[Tensor, int], Tensor] = spectral_prune
    """The function that chooses: (tokens (B, N, C), keep) -> positions (B, keep), ascending. For ablations,
    say `functools.partial(spectral_prune, cutoff=0.25)`, and for ideas of your own."""

    def __post_init__(self):
        if not isinstance(self.vision_keep, Real) or not 0 < self.vision_keep <= 1:
            raise ValueError(f"vision_keep={self.vision_keep} must lie in (0, 1]; 1.0 turns the merger off")
        if not isinstance(self.vision_steps, int) or self.vision_steps < 1:
            raise ValueError(f"vision_steps={self.vision_steps} must be a whole number of at least 1")
        if not callable(self.merge) or not callable(self.prune) or not isinstance(self.sizes, bool):
            got = f"merge={self.merge!r}, prune={self.prune!r}, sizes={self.sizes!r}"
            raise ValueError(f"{got}: they must be a function, a function, and True or False")
        if isinstance(self.llm_keep, Sequence) and not isinstance(self.llm_keep, str):
            object.__setattr__(self, "llm_keep", tuple(self.llm_keep))  # the caller's list stays the caller's
        given = (1.0,) if self.llm_keep is None else self.llm_keep
        given = given if isinstance(given, tuple) else (given,)
        if not given or not all(isinstance(f, Real) and 0 <= f <= 1 for f in given):
            raise ValueError(f"llm_keep={self.llm_keep} must be None or in [0, 1]; 1.0 turns the pruner off")
        if any(before < after for before, after in itertools.pairwise(given)):
            raise ValueError(f"llm_keep={self.llm_keep} rises, but a pruned token never comes back")

    def fractions(self, layers: int) -> list[float]:
        """`llm_keep` spelled out: the fraction for each of `layers` decoder layers.

        Raises: ValueError for a sequence of another length, or a single layer with the linear schedule.
        """
        each = self.llm_keep if isinstance(self.llm_keep, tuple) else (self.llm_keep,) * layers
        if len(each) != layers or (self.llm_keep is None and layers < 2):
            raise ValueError(f"llm_keep={self.llm_keep} does not fit {layers} decoder layers: one for each")
        return [1 - n / (layers - 1) if f is None else float(f) for n, f in enumerate(each)]


# ==== 4. Pruning inside an LLM ==============================================================================
#
# One idea keeps this small: *logical* and *physical* sequence. Everything outside the layers keeps seeing the
# logical sequence: input_ids, attention mask, position ids, logits, cache length, hidden_states. A decoder
# layer physically processes a subset: gather what is kept, run the layer as it is, scatter its output back.
# A pruned token is no longer updated; it rides along in the residual stream.
#
#     logical   | t t v v v v v v v v t t t |      t text, v visual
#     layer 0   | t t v v v v v v v v t t t |
#     layer 5   | t t v . v . . v v . t t t |      what the layer computes is a shorter causal sequence;
#     last one  | t t . . . . . . . . t t t |      rotary positions are those of the logical sequence
#
# Samples of a batch may differ in how many positions they process. Shorter ones are filled up with positions
# of size 0, which no query sees: there is no mask beyond the causal one, and flash kernels run, in any batch.

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.vision_utils import get_vision_window_index  # noqa: E402


class Prompt:
    """What one forward call of the LLM processes: the state that `run_layer` hands from layer to layer.

    How *many* tokens each layer keeps is known on the host from the start, so no layer waits for the device;
    *which* ones is decided on the device, when a layer's input is there.

    Args:
        visual: (B, S) bool, the placeholders of pictures and clips.
        size: (B, S) float32, 0 for padding and for placeholders whose token was merged into another's.
        begins: (B, S) bool, where the next frame of a clip begins.
        cache: the KV cache of the call; fractions: of a picture's tokens, one per decoder layer.
        slots: of a tile, where a run of placeholders is to be cut into tiles; 0: a run is one picture.

    Raises: ValueError if a prompt's last position was merged away: it speaks the next word.
    """

    def __init__(self, visual: Tensor, size: Tensor, begins: Tensor, cache, fractions: list, slots: int):
        self.visual, self.size, self.cache, self.fractions = visual, size, cache, fractions
        self.start = cache.get_seq_length() if cache is not None else 0  # positions seen before this call
        self.layers: list[tuple[Tensor, int]] = []  # per layer so far: sizes (B, S), columns stored before
        self.pictures: list[tuple[int, list[int], Tensor, Tensor]] = []  # tokens, samples, rows, positions
        (B, self.S), self.texts = size.shape, [1] * len(size)
        if self.S == 1:  # a word was generated: nothing to look for, no reason to wait for the device
            return
        visual, alive, begins = torch.stack(
            [visual, size > 0, begins]
        ).cpu()  # here the host waits, never later
        groups: dict[int, list] = {}  # pictures of equally many tokens are pruned together
        for b in range(B):
            at = visual[b].nonzero()[:, 0]
            for run in at.tensor_split((at.diff() > 1).nonzero()[:, 0] + 1) if len(at) else ():
                tiles = slots and len(run) % slots == 0
                cuts = len(run) // slots if tiles else begins[b, run[1:]].nonzero()[:, 0] + 1
                for piece in run.tensor_split(cuts):
                    kept = piece[alive[b, piece]]
                    if piece[-1] == at[-1] and not alive[b, at[-1] + 1 :].any():  # nothing speaks behind it
                        if not alive[b, at[-1]]:
                            raise ValueError(f"sample {b} ends with a merged picture; put text behind it")
                        kept, visual[b, at[-1]] = kept[:-1], False  # the last token lives to the last layer
                    groups.setdefault(len(kept), []).append((b, kept))
        self.texts = (~visual & alive).sum(1).tolist()
        for tokens, group in groups.items():
            rows = torch.tensor([b for b, _ in group], device=size.device)[:, None]
            where = torch.stack([kept for _, kept in group]).to(size.device)
            self.pictures.append((tokens, [b for b, _ in group], rows, where))

    def prune(self, hidden: Tensor, choose: Callable[[Tensor, int], Tensor]) -> tuple[Tensor | None, Tensor]:
        """Prune for the next layer, whose input is `hidden` (B, S, C), with the settings' `prune`.

        Returns: index (B, K), the positions that it processes, ascending, filled up with others of size 0;
            None if K is S. And the sizes of these, (B, K): a pruned token passes its size on at once.
        """
        device, fraction, counts = hidden.device, self.fractions[len(self.layers)], list(self.texts)
        size = self.size = self.size.to(device)
        for i, (tokens, samples, rows, where) in enumerate(self.pictures):
            rows, where, keep = rows.to(device), where.to(device), math.floor(fraction * tokens + 0.5)
            for b in samples:
                counts[b] += keep
            if keep < where.shape[1]:
                size = size.clone() if size is self.size else size  # `layers` holds the old one
                kept, before = choose(take(hidden, rows, where), keep), size[rows, where]
                size[rows, where] = 0.0
                where = where.gather(1, kept)
                if keep:
                    size[rows, where] = inherit(before, kept)
            self.pictures[i] = tokens, samples, rows, where
        if size is not self.size or not self.layers:
            self.fillers, K = min(counts) < max(counts), max(counts)  # fillers: do samples differ in length?
            self.index = (size == 0).byte().sort(dim=1, stable=True).indices[:, :K] if K < self.S else None
        self.size, self.index = size, None if self.index is None else self.index.to(device)
        return self.index, size if self.index is None else size.gather(1, self.index)


EXTRA = 8  # channels that a key gets for its size; one would do, but kernels want head sizes in steps of 8


class PrunedLayer(DynamicLayer):
    """The KV cache of one decoder layer: it says how many positions were seen, not how many it stored.

    Masks and rotary positions are computed from the logical length; the keys hold only what this layer
    processed. All state lives in the caller's cache, so conversations cannot mix, and beams reorder it.
    """

    is_croppable = False

    def __init__(self, keeps: bool = True):
        super().__init__()
        self.keeps = keeps  # False: the caller wants no KV cache
        self.seen = 0  # logical length
        self.bias: Tensor | float | None = None  # (B, K): log(size) / scale of the keys that come next

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        bias, self.bias = self.bias, None
        if bias is None:  # not from `run_layer`: plain attention does not know the extra channels
            raise ValueError("this KV cache was filled under LUVC: attach LUVC again, or begin a new one")
        key_states, value_states = (nn.functional.pad(t, (0, EXTRA)) for t in (key_states, value_states))
        if isinstance(bias, Tensor):
            key_states[..., -EXTRA] = bias[:, None].to(key_states.dtype)
        return super().update(key_states, value_states) if self.keeps else (key_states, value_states)

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("LUVC cannot crop its KV cache, as assisted and prompt-lookup decoding would")

    reset = crop  # nobody resets a dynamic cache; make a new one


def sized_attention(module, query, key, value, attention_mask, **kwargs):
    """Any attention of transformers, in which a key of size s weighs as much as s equal keys of size 1.

    That is softmax(q . k * scale + log s). The sum rides along in the product, as one more channel of each
    head, [q, 1] . [k, log(s) / scale], so that fused kernels see ordinary queries and keys, and no mask. Our
    choice: without it, whatever reads proportions of a picture is misled by what was merged or pruned.
    """
    channels, plain = query.shape[-1], module.config.plain  # the module as it was, with its own config
    plain.training = module.training
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(plain.config._attn_implementation, eager)
    query = nn.functional.pad(query, (0, EXTRA), value=1.0)
    output, weights = attend(plain, query, key, value, attention_mask, **kwargs)
    return output[..., :channels], weights


ALL_ATTENTION_FUNCTIONS.register("luvc", sized_attention)


def run_layer(layer: nn.Module, plain: Callable, number: int, config: LUVCConfig, hidden: Tensor, **kwargs):
    """Gather, run, scatter: one decoder layer on the positions that it processes. This is the whole method.

    Args: layer, its own forward (`plain`) and number; hidden (B, S, C), the logical sequence; kwargs: what
        transformers hands to a layer, and the `prompt`.
    Returns: (B, S, C), processed positions updated, all others as they came.
    """
    prompt: Prompt = kwargs.pop("prompt")
    store, device = prompt.cache.layers[number], hidden.device
    past, store.seen = store.keys.shape[-2] if store.is_initialized else 0, store.seen + prompt.S
    kwargs |= {"past_key_values": prompt.cache, "attention_mask": None}
    if prompt.S == 1:  # a word that was just generated: it has size 1 and sees all that is stored
        store.bias = 0.0
        return plain(hidden, **kwargs)
    index, size = prompt.prune(hidden, config.prune)
    prompt.layers.append((prompt.size, past))
    weight = size if config.sizes else (size > 0).float()
    # The weight of a key of size 0 is e^-1000, and that is 0: nobody sees it.
    store.bias = weight.log().clamp(min=-1000) / layer.self_attn.scaling
    rows, x = torch.arange(len(hidden), device=device)[:, None], hidden
    if index is not None:
        x = take(hidden, rows, index)  # (B, S, C) -> (B, K, C)
        # Rotary positions stay those of the logical sequence. position_ids go: FlashAttention would take the
        # gaps in them for the seams of several sequences packed into one.
        cos_sin = (t.to(device).expand(len(hidden), -1, -1) for t in kwargs["position_embeddings"])
        cos_sin = tuple(take(t, rows, index) for t in cos_sin)
        kwargs |= {"position_embeddings": cos_sin, "position_ids": None}
    # Of transformers' masks only the causal one is left, often none at all: fillers are hidden by their size.
    kwargs["attention_mask"] = causal_mask(layer.self_attn.config.plain.config, x, past)
    out = plain(x, **kwargs).to(device)
    if prompt.fillers:
        out = torch.where(size[..., None] > 0, out, x)  # these stay as they are
    return out if index is None else hidden.index_put((rows, index), out)


def take(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """x[rows, index] for x (B, S, C), rows (n, 1), index (n, K), but up to ten times faster on a CPU."""
    flat = (rows * x.shape[1] + index).flatten()
    return x.flatten(0, 1).index_select(0, flat).view(*index.shape, x.shape[-1])


def causal_mask(config, x: Tensor, past: int) -> Tensor | None:
    """The mask that transformers makes for x (B, K, C) behind `past` others; flash kernels need none."""
    make, K = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation], x.shape[1]
    more = {"q_offset": past, "kv_offset": 0, "mask_function": causal_mask_function, "attention_mask": None}
    more |= {"dtype": x.dtype, "device": x.device, "config": config, "allow_is_causal_skip": True}
    return make(batch_size=len(x), q_length=K, kv_length=past + K, use_vmap=False, **more)


# ==== 5. Merging inside a vision encoder ====================================================================
#
# The LLM expects one feature for each placeholder, a *slot* of the prompt, and computes positions from that.
# So slots stay as many as they are. A merged token goes to one of the slots that it stands for, its *home*;
# the others are *dead*: no layer ever processes them, their size is 0. Instead of a feature a dead slot holds
# a signpost, how far away home is. Not a list kept somewhere, because features travel: `generate` computes
# them ahead, and repeats them for beams.
#
# Many encoders make one slot of unit x unit patches. The merger merges whole slots, each patch with the patch
# in the same corner of the neighbour: grids stay even, and equal slots merge into what each of them was.
# (All of this is our choice.)


@dataclass(frozen=True)
class Family:
    """What LUVC has to know about a model."""

    base: nn.Module  # its forward sees input_ids
    decoder: nn.Module  # the LLM without its head
    vision: nn.Module  # the vision encoder
    projector: nn.Module  # encoder channels -> LLM channels, one row per slot
    blocks: Sequence[nn.Module]  # of the vision encoder, up to the one whose output is taken
    side: tuple[int, int] | None = None  # slots of a picture or tile, H and W; None: `grid_thw` says it
    unit: int = 1  # a slot is unit x unit patches
    prefix: int = 0  # tokens in front of the grid inside the encoder (CLS)
    prefix_slots: int = 0  # how many of these also reach the LLM
    deepstack: Sequence[nn.Module] = ()  # projectors of features for the LLM's first layers
    no_merger: str = ""  # why merging is refused


def family_of(model: nn.Module) -> Family:
    """How this model is built; a new family is a new branch here.

    Raises: ValueError if it is of no supported family, or has parts that LUVC cannot work with.
    """
    config, base = getattr(model, "config", None), getattr(model, "base_model", None)
    kind, vision = getattr(config, "model_type", type(model).__name__), getattr(config, "vision_config", None)
    if kind in ("llava", "llava_next", "llava_onevision"):
        tower, strategy = vision.model_type, config.vision_feature_select_strategy
        prefix, layer = int(tower == "clip_vision_model"), config.vision_feature_layer
        if not prefix and (tower != "siglip_vision_model" or strategy != "full"):
            raise ValueError(f"tower {tower!r}, strategy {strategy!r}: use CLIP, or SigLIP with 'full'")
        layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer={layer} must be a single layer")
        parts = base.language_model, base.vision_tower, base.multi_modal_projector
        blocks = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder.layers
        blocks, side = blocks[: layer % (len(blocks) + 1)], (vision.image_size // vision.patch_size,) * 2
        more = {"side": side, "prefix": prefix, "prefix_slots": prefix * (strategy == "full")}
        more |= {"no_merger": "" if kind == "llava" else "tiles are rearranged after the projector"}
    elif kind == "internvl":  # a pixel shuffle makes a slot of 2 x 2 patches, and takes the grid for a square
        parts = base.language_model, base.vision_tower, base.multi_modal_projector
        blocks, unit = base.vision_tower.encoder.layer, round(1 / config.downsample_ratio)
        side = tuple(s // p // unit for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        blocks = blocks[: config.vision_feature_layer % (len(blocks) + 1)]
        more = {"side": side, "unit": unit, "prefix": 1}
    elif kind in ("idefics3", "smolvlm"):
        parts = base.text_model, base.vision_model, base.connector
        blocks, unit = base.vision_model.encoder.layers, config.scale_factor
        more = {"side": (vision.image_size // vision.patch_size // unit,) * 2, "unit": unit}
    elif kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        parts, blocks = (base.language_model, base.visual, base.visual.merger), base.visual.blocks
        deepstack = getattr(base.visual, "deepstack_merger_list", ())
        more = {"unit": vision.spatial_merge_size, "deepstack": deepstack}
    else:
        raise ValueError(f"{kind!r} is not supported; use LLaVA, InternVL, Idefics3, SmolVLM or Qwen-VL")
    family = Family(base, *parts, blocks, **more)
    text = family.decoder.config
    window = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    layers = set(getattr(text, "layer_types", None) or [window])
    if layers != {"full_attention"}:
        raise ValueError(f"{kind!r} has layers of kind {sorted(layers)}; only full attention is supported")
    known = {"llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
    if text.model_type not in known:
        raise ValueError(f"decoder {text.model_type!r} is not supported; use one of {sorted(known)}")
    attention = text._attn_implementation
    if attention not in ALL_MASK_ATTENTION_FUNCTIONS or attention == "flex_attention":
        raise ValueError(f"attention {attention!r} is not supported; use sdpa, flash_attention_2 or eager")
    return family


class Grids:
    """The pictures of one call of the vision encoder, and how far they are merged.

    Here: pictures or tiles of one size, x (n, prefix + patches, C), row by row. `shapes`: one (n, H, W) per
    picture, n frames or tiles of H x W slots. `split` and `join` lead from the encoder's own order of tokens
    to grids (n, h, w, unit * unit * C) and back.
    """

    def __init__(self, family: Family, config: LUVCConfig, shapes: list[tuple[int, int, int]], device):
        self.family, self.config, self.shapes = family, config, shapes
        keep = config.vision_keep, config.vision_steps
        self.plans = [[(0, H, W), *merge_plan(H, W, *keep)] for _, H, W in shapes]  # (axis, H, W) per step
        self.size = [torch.ones(shape, device=device) for shape in shapes]
        slots = [torch.arange(H * W, device=device).expand(n, -1) for n, H, W in shapes]
        self.place = [(slot // W, slot % W) for slot, (_, _, W) in zip(slots, shapes, strict=True)]
        self.arrange(shapes)

    def arrange(self, shapes: list[tuple[int, int, int]]) -> None:
        """Called when the grids have changed: nothing to do here."""

    def arguments(self, number: int, hidden: Tensor, kwargs: dict) -> dict:
        """What block `number` gets beside the tokens: nothing that merging changes."""
        return kwargs

    def split(self, x: Tensor, unit: int, prefix: int) -> list[Tensor]:
        n, h, w = self.size[0].shape
        if x.shape[1] != prefix + h * w * unit**2:
            raise ValueError(f"{x.shape[1]} tokens: feature layer, strategy and size must be the config's")
        x = x[:, prefix:].reshape(n, h, unit, w, unit, -1)
        return [x.transpose(2, 3).reshape(n, h, w, -1)]

    def join(self, grids: list[Tensor], unit: int, head: Tensor) -> Tensor:
        n, h, w, _ = grids[0].shape
        x = grids[0].reshape(n, h, w, unit, unit, -1).transpose(2, 3)
        return torch.cat([head, x.reshape(n, h * w * unit**2, -1)], dim=1)

    def tokens(self) -> list[Tensor]:
        """(n, H * W) per picture: the flat index of the merged token that each slot is in."""
        return [row * s.shape[2] + column for (row, column), s in zip(self.place, self.size, strict=True)]

    def merge(self, hidden: Tensor, step: int) -> Tensor:
        """One step of the plan, for all pictures: encoder tokens -> fewer encoder tokens."""
        unit, prefix = self.family.unit, self.family.prefix
        grids = self.split(hidden, unit, prefix)
        for i, x in enumerate(grids):
            axis, *left = self.plans[i][step + 1]
            size, place = self.size[i].to(x.device), tuple(t.to(x.device) for t in self.place[i])
            grids[i], self.size[i], parent = self.config.merge(x, size, left[axis - 1], axis)
            self.place[i] = follow(place, parent, axis)
        self.arrange([tuple(size.shape) for size in self.size])
        return self.join(grids, unit, hidden[:, :prefix])

    def deliver(self, features: Tensor, posts: bool) -> Tensor:
        """One row per merged token -> one row per slot: that of its token.

        With `posts`, of a token's slots only its home gets it, the middle one in reading order; the others
        get a signpost. (DeepStack features are added to what is alive and need none.)
        """
        prefix = self.family.prefix_slots if posts else 0
        grids = self.split(features, 1, prefix)
        for i, ((n, H, W), token) in enumerate(zip(self.shapes, self.tokens(), strict=True)):
            token, size = token.to(features.device), self.size[i].flatten(1).long().to(features.device)
            x = grids[i].flatten(1, 2).gather(1, token[..., None].expand(-1, -1, features.shape[-1]))
            if posts:
                order = token.argsort(dim=1, stable=True)  # the slots of the first token, then of the second
                home = order.gather(1, size.cumsum(1) - size + (size - 1) // 2)
                away = home.gather(1, token) - torch.arange(H * W, device=token.device)
                digits = torch.stack([away // 256, away % 256], -1)  # exact in every floating dtype
                post = nn.functional.pad(digits.to(x), (0, x.shape[2] - 2))
                x = torch.where((away == 0)[..., None], x, post)
            grids[i] = x.view(n, H, W, -1)
        if posts:
            self.arrange(self.shapes)
        return self.join(grids, 1, features[:, :prefix])


class PackedGrids(Grids):
    """Qwen: pictures of any size in one sequence, x (patches, C), slot by slot. Blocks get rotary positions
    and where frames end; in Qwen2.5-VL some attend within windows, and slots stand in the order of these."""

    def arrange(self, shapes: list[tuple[int, int, int]]) -> None:
        self.order, self.cos_sin = None, None
        unit, vision, device = self.family.unit, self.family.vision, self.size[0].device
        frames = [h * w * unit**2 for n, h, w in shapes for _ in range(n)]
        ends = torch.tensor([0, *itertools.accumulate(frames)], dtype=torch.int32, device=device)
        self.frame_ends = ends, max(frames)
        if hasattr(vision, "fullatt_block_indexes"):
            thw = torch.tensor([(n, h * unit, w * unit) for n, h, w in shapes])
            order, ends = get_vision_window_index(thw, unit, vision.window_size, vision.patch_size)
            self.order, self.window_ends = order.to(device), (ends.to(device), int(ends.diff().max()))

    def split(self, x: Tensor, unit: int, prefix: int) -> list[Tensor]:
        x = x.reshape(-1, unit**2 * x.shape[-1])
        x = x if self.order is None else x[self.order.argsort().to(x.device)]
        parts = x.split([size.numel() for size in self.size])
        return [part.view(*size.shape, -1) for part, size in zip(parts, self.size, strict=True)]

    def join(self, grids: list[Tensor], unit: int, head: Tensor) -> Tensor:
        x = torch.cat([grid.flatten(0, 2) for grid in grids])
        x = x if self.order is None else x[self.order]
        return x.reshape(len(x) * unit**2, -1)

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the merged tokens: a position is the mean over the patches that were merged."""
        unit, device, at = self.family.unit, hidden.device, []
        corner = torch.cartesian_prod(*[torch.arange(unit, device=device)] * 2).view(-1, 2)
        for (n, H, W), size, token in zip(self.shapes, self.size, self.tokens(), strict=True):
            slot = torch.cartesian_prod(torch.arange(H), torch.arange(W)).view(-1, 2).float().to(device)
            centre, index = slot.new_zeros(n, size[0].numel(), 2), token[..., None].expand(-1, -1, 2)
            centre = centre.scatter_reduce(1, index, slot.expand(n, -1, -1), "mean", include_self=False)
            at.append((centre[:, :, None] * unit + corner).flatten(0, 1))  # (slots, corners, 2), in patches
        at = torch.cat(at) if self.order is None else torch.cat(at)[self.order]
        return self.family.vision.rotary_pos_emb(hidden, at.flatten(0, 1))

    def arguments(self, number: int, hidden: Tensor, kwargs: dict) -> dict:
        self.cos_sin = self.rotary(hidden) if self.cos_sin is None else self.cos_sin
        full = self.order is None or number in self.family.vision.fullatt_block_indexes
        ends, longest = self.frame_ends if full else self.window_ends
        if kwargs.get("max_seqlen") is not None:  # FlashAttention asks for it
            kwargs["max_seqlen"] = longest
        return kwargs | {"cu_seqlens": ends, "position_embeddings": self.cos_sin}


def read_sizes(embeds: Tensor, visual: Tensor) -> Tensor:
    """What `deliver` wrote, read from the input of the LLM.

    Args: embeds (B, S, C); visual (B, S) bool, the slots.
    Returns: (B, S) float32, how many slots each position stands for; 0: a dead slot, 1: text.
    """
    dead = visual & (embeds[..., 2:] == 0).all(-1)
    away = (embeds[..., 0].float() * 256 + embeds[..., 1].float()).masked_fill(~dead, 0.0)
    home = torch.arange(embeds.shape[1], device=embeds.device) + away.long()
    return torch.zeros_like(away).scatter_add_(1, home, torch.ones_like(away))


# ==== 6. Hooks in, hooks out ================================================================================
#
# What one part of the model has to tell another within a call waits in these. A context variable has a value
# of its own in every thread, so several threads can use one attached model at the same time.

CALL: ContextVar = ContextVar("luvc_call", default=None)  # base -> decoder: input_ids, if there are pictures
GRIDS: ContextVar = ContextVar("luvc_grids", default=None)  # vision encoder -> its blocks and projectors

EAGER = "LUVC needs eager mode; compile or export a model without it, and load a compiled one anew"


def refuse(plain: Callable | None, *args, **kwargs):
    """Stands in for ways to generate that would fail in silence, or cut pictures in two."""
    if plain is None or args[1].prefill_chunk_size is not None:
        raise ValueError("LUVC has neither continuous batching nor prefill_chunk_size; use plain generate()")
    return plain(*args, **kwargs)


def check_call(decoder: nn.Module, kwargs: dict, text: Tensor) -> None:
    """Raises: ValueError for a call of the decoder that would go wrong in silence. text: (B, S) bool."""
    mask, at = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        raise ValueError("LUVC cannot train under gradient checkpointing; disable it, or detach()")
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        raise ValueError("LUVC needs a 2-D attention_mask (B, P + S), or none, and a DynamicCache")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if at is not None and text.shape[1] > 1:  # of M-RoPE's rows the first: its text is in order
        at = (at[0] if at.ndim == 3 else at).to(text.device) * text
        packed = packed or bool(((at < at.cummax(-1).values) & text).any())
    if packed:
        raise ValueError("position_ids begin again within a row: LUVC needs one sequence per row")


def adopt(cache, decoder: nn.Module, kwargs: dict) -> DynamicCache:
    """The KV cache of a call, the caller's or a new one: its layers count logical positions from now on.

    Raises: ValueError for another kind of cache, or one that was filled without LUVC.
    """
    use_cache = kwargs.get("use_cache")
    keeps = cache is not None or (decoder.config.use_cache if use_cache is None else use_cache)
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    kwargs |= {"past_key_values": cache} if keeps else {}
    kinds = {type(layer) for layer in cache.layers} if isinstance(cache, DynamicCache) else {type(cache)}
    if kinds - {DynamicLayer, PrunedLayer}:
        raise ValueError(f"a {type(cache).__name__} is not supported; use a DynamicCache, the default")
    if kinds != {PrunedLayer}:
        if cache.get_seq_length():
            raise ValueError("this KV cache was filled without LUVC; begin anew with LUVC attached")
        cache.layers = [PrunedLayer(keeps) for _ in decoder.layers]
    return cache


class LUVC:
    """Hook merging and pruning into a model, in place and reversibly.

        with LUVC(model) as luvc:
            model.generate(**inputs)       # or model(...), or a pipeline: nothing else changes
        print(luvc.report())

    With everything off (`vision_keep=1.0, llm_keep=1.0`) results are bit-identical.

    A second turn on the same KV cache works. It sees all text of the first turn and, in each layer, the
    visual tokens that this layer kept: all in the first, none in the last. Pruned tokens never come back.

    Several threads may use an attached model at once. `kept`, `sizes` and `report` then speak of whichever
    prefill ended last, `groups` of the pictures that were encoded last.

    Args: model, a Hugging Face VLM of a supported family (`family_of`); config, the settings.
    Raises: ValueError for an unsupported model, or settings that do not fit its layers or blocks.
    """

    def __init__(self, model: nn.Module, config: LUVCConfig = LUVCConfig()):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
        self.model, self.config, self.family = model, config, family_of(model)
        family, steps = self.family, config.vision_steps if config.vision_keep < 1 else 0
        self.fractions = config.fractions(len(family.decoder.layers))
        if steps and family.no_merger:
            raise ValueError(f"{family.no_merger}, so this model cannot merge; set vision_keep=1.0")
        if steps > len(family.blocks):
            raise ValueError(f"vision_steps={steps} must be at most {len(family.blocks)}, one per block")
        if steps == 1 and family.unit > 1 and family.side:
            raise ValueError("vision_steps=1 merges along W alone, but this model needs a square grid; set 2")
        # Our choice: the merges are spread evenly over the blocks. Block -> step of the plan.
        self.merges = {(step + 1) * len(family.blocks) // (steps + 1): step for step in range(steps)}
        self.off = not steps and min(self.fractions) == 1
        ids = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        self.placeholders = [id for id in ids if id is not None]
        whole = family.side and not family.no_merger
        self.slots = family.prefix_slots + math.prod(family.side) if whole else 0  # of a picture or tile
        self._handles, self._replaced = [], []  # how to take the hooks out again
        self._grids: Grids | None = None  # the latest pictures in the encoder
        self._prompt: Prompt | None = None  # the latest prefill

    def attach(self) -> "LUVC":
        """Put the hooks in. Raises: ValueError if a LUVC is attached already, or the model is compiled."""
        family = self.family
        if "_luvc" in family.decoder.__dict__:
            raise ValueError("a LUVC is attached to this model already; detach() it first")
        if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in self.model.modules()):
            raise ValueError(f"the model is compiled: {EAGER}")
        self._replace(family.decoder, "_luvc", self)
        # What torch.compile made of the model before does not see hooks, but it does see another forward.
        base = functools.wraps(family.base.forward)(functools.partial(self._run_base, family.base.forward))
        self._replace(family.base, "forward", torch.compiler.disable(base, reason=EAGER))
        decoder = functools.partial(self._run_decoder, family.decoder, family.decoder.forward)
        self._replace(family.decoder, "forward", decoder)
        before = {family.vision: self._before_vision}
        for number, block in enumerate(family.blocks):
            if number >= min(self.merges, default=math.inf):
                before[block] = functools.partial(self._before_block, number)
        self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in before.items()]
        for module in (family.projector, *family.deepstack) if self.merges else ():
            hook = functools.partial(self._after_projector, module is family.projector)
            self._handles.append(module.register_forward_hook(hook))
        if self.off:
            return self
        if hasattr(self.model, "_prefill"):
            self._replace(self.model, "init_continuous_batching", functools.partial(refuse, None))
            self._replace(self.model, "_prefill", functools.partial(refuse, self.model._prefill))
        for number, layer in enumerate(family.decoder.layers):
            # At `forward`, inside of the layer's hooks: with these transformers collects hidden_states, and
            # they have to see the logical sequence on both sides.
            forward = functools.partial(run_layer, layer, layer.forward, number, self.config)
            self._replace(layer, "forward", forward)
            config = copy.copy(layer.self_attn.config)  # for this module alone: no other attention changes
            config._attn_implementation, config.plain = "luvc", copy.copy(layer.self_attn)  # as it was
            self._replace(layer.self_attn, "config", config)
        return self

    def _replace(self, module: nn.Module, name: str, new) -> None:
        """Give a module another attribute. Some have one of their own: accelerate, too, replaces forwards."""
        self._replaced.append((module, name, new, module.__dict__.get(name)))
        setattr(module, name, new)

    def detach(self) -> None:
        """Take the hooks out: the model is what it was before `attach`. Without effect if not attached.

        Raises: ValueError if something else replaced what LUVC did, since that would be lost.
        """
        for module, name, new, _ in self._replaced:
            if module.__dict__.get(name) is not new:
                what = f"{type(module).__name__}.{name} was replaced after attach(), by accelerate perhaps"
                raise ValueError(f"{what}; undo that before detach(), and attach LUVC last")
        for handle in self._handles:
            handle.remove()
        for module, name, _, old in self._replaced:
            delattr(module, name) if old is None else setattr(module, name, old)
        self._handles, self._replaced = [], []

    def __reduce__(self):
        raise ValueError("a model cannot be copied or pickled while LUVC is attached; detach() it first")

    __enter__ = attach

    def __exit__(self, *exception) -> None:
        self.detach()

    def _before_vision(self, module, args, kwargs):
        family, unit = self.family, self.family.unit
        pixels = args[0] if args else kwargs["pixel_values"]
        shapes = [(len(pixels), *family.side)] if family.side else None
        if shapes is None:
            thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
            shapes = [(t, h // unit, w // unit) for t, h, w in thw.tolist()]
        packed = self.merges and not family.side  # nothing merged: the encoder's own order will do
        grids = (PackedGrids if packed else Grids)(family, self.config, shapes, pixels.device)
        self._grids, _ = grids, GRIDS.set(grids)

    def _before_block(self, number, module, args, kwargs):
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        if any(isinstance(mask, Tensor) for mask in (*rest, kwargs.get("attention_mask"))):
            raise ValueError("a tile has padding, which cannot be merged; split pictures into whole tiles")
        grids = GRIDS.get()
        if number in self.merges:
            hidden = grids.merge(hidden, self.merges[number])
        return (hidden, *rest), grids.arguments(number, hidden, kwargs)

    def _after_projector(self, posts, module, args, features):
        return GRIDS.get().deliver(features, posts)

    def _run_base(self, plain, *args, **kwargs):
        if torch.compiler.is_exporting():
            raise ValueError(EAGER)
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if ids is None and embeds is not None and embeds.shape[1] > 1 and not self.off:
            raise ValueError("LUVC finds the pictures by input_ids; pass these instead of inputs_embeds")
        features = ("pixel_values", "mm_encoder_outputs", "image_hidden_states")  # raw, or encoded ahead
        given = (isinstance(v, Tensor) or v for key, v in kwargs.items() if key.startswith(features))
        ids = ids if any(given) or len(args) > 1 else None  # without pictures a stray placeholder is text
        call = CALL.set(ids)
        try:
            return plain(*args, **kwargs)
        finally:
            CALL.reset(call)

    def _run_decoder(self, decoder, plain, *args, **kwargs):
        """Find out what is where in the prompt, and let the KV cache count logical positions."""
        ids = CALL.get()
        embeds, mask, cache = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "past_key_values"))
        # Without embeds somebody calls the LLM alone, with text.
        given = (args[0] if args else kwargs["input_ids"]) if embeds is None else embeds
        (B, S), device = given.shape[:2], given.device
        visual, begins = torch.zeros(2, B, S, dtype=torch.bool, device=device)
        size, at = torch.ones(B, S, device=device), kwargs.get("position_ids")
        if S > 1 and ids is not None:
            for token in self.placeholders:
                visual |= (ids == token).to(device)
            size = read_sizes(embeds, visual) if self.merges else size
            if at is not None and at.ndim == 3:  # M-RoPE: (row, column) rises within a frame of a clip
                rank = at[-2] * 2**20 + at[-1]
                begins[:, 1:] = rank.diff(dim=1) <= 0
        if S > 1 and isinstance(mask, Tensor) and mask.ndim == 2:
            size = size * (mask[:, -S:].to(device) != 0)
        if not self.off:
            check_call(decoder, kwargs, ~visual & (size > 0))
            cache = adopt(cache, decoder, kwargs)
        prompt = Prompt(visual, size, begins, cache, self.fractions, self.slots)
        if self.off:
            prompt.layers = [(size, prompt.start)] * len(self.fractions)
        output = plain(*args, **kwargs) if self.off else plain(*args, prompt=prompt, **kwargs)
        prompt.cache = None  # a report must not keep a KV cache alive
        self._prompt = prompt if S > 1 else self._prompt
        return output

    def _latest(self, what):
        if what is None:
            raise ValueError("nothing happened yet: call the model with a picture while LUVC is attached")
        return what

    @property
    def kept(self) -> list[list[Tensor]]:
        """`kept[layer][sample]`: positions that a decoder layer processed in the latest prefill, 1-D int64.

        Ascending, counted from the beginning of the KV cache, without padding. ValueError before a prefill.
        """
        prompt = self._latest(self._prompt)
        return [[row.nonzero()[:, 0] + prompt.start for row in size] for size, _ in prompt.layers]

    @property
    def sizes(self) -> list[list[Tensor]]:
        """`sizes[layer][sample]`: how many slots each position of `kept` stands for, 1-D float32; text 1."""
        return [[row[row > 0] for row in size] for size, _ in self._latest(self._prompt).layers]

    @property
    def groups(self) -> list[Tensor]:
        """For each picture, tile or frame encoded last: (H * W,) int64, the merged token of each slot."""
        return [one for token in self._latest(self._grids).tokens() for one in token]

    def report(self) -> "Report":
        """Numbers of the latest prefill, see `Report`. Raises: ValueError if there was none yet."""
        return Report.of(self._latest(self._prompt), self)


@dataclass
class Report:
    """What LUVC did in the latest prefill, summed over the batch. `print` it.

    `flops_left` is the fraction of the LLM's prefill arithmetic that is left. A decoder layer whose linear
    maps hold M weights, with attention of width A (heads times head size), costs per sample, for n positions
    behind p stored ones, 2 * M * n + 4 * A * (n * p + n * (n + 1) / 2) floating-point operations. Embedding,
    encoder, output head and the channels that sizes add to keys are not counted.
    """

    vision_tokens: list[int]  # per encoder block, of the pictures encoded last, CLS not counted
    visual_tokens: list[int]  # per decoder layer
    positions: list[int]  # per decoder layer, text included, padding not
    visual_full: int  # visual tokens per decoder layer of the plain model
    positions_full: int  # positions per decoder layer of the plain model
    kv_bytes: int  # a KV cache after the prefill, in the dtype of the embeddings, all devices together
    kv_bytes_full: int  # what the plain model's would hold
    flops_left: float

    @staticmethod
    def of(prompt: Prompt, luvc: LUVC) -> "Report":
        """The report of a prefill of `luvc`."""
        family, config, grids = luvc.family, luvc.family.decoder.config, luvc._grids
        layer, visual = family.decoder.layers[0], prompt.visual.cpu()
        head, itemsize = layer.self_attn.head_dim, family.decoder.embed_tokens.weight.element_size()
        # Quantised linear maps are of many classes; PEFT wraps a base_layer, which would be counted twice.
        linear = (m for m in layer.modules() if hasattr(m, "in_features") and not hasattr(m, "base_layer"))
        M = sum(m.in_features * m.out_features for m in linear)
        # LUVC's and the plain model's: positions n (2, layers, B), and p (2, layers, 1) stored before them.
        here = torch.stack([size.cpu() > 0 for size, _ in prompt.layers])  # (layers, B, S)
        n = torch.stack([here, (visual | here[0]).expand_as(here)]).sum(-1).double()
        p = torch.tensor([[past for _, past in prompt.layers], [prompt.start] * len(here)])[..., None]
        flops = 2 * M * n + 4 * config.num_attention_heads * head * n * (p + (n + 1) / 2)
        channels = torch.tensor([head if luvc.off else head + EXTRA, head])
        stored = len(visual) * channels * (p[..., 0] + n.amax(-1)).sum(-1)
        kv, kv_full = (2 * config.num_key_value_heads * itemsize * stored).long().tolist()
        left, full = flops.sum((1, 2)).tolist()
        steps = [sum(merge <= block for merge in luvc.merges) for block in range(len(family.blocks))]
        pictures = list(zip(grids.shapes, grids.plans, strict=True)) if grids else []
        slots = [sum(tiles * math.prod(plan[at][1:]) for (tiles, _, _), plan in pictures) for at in steps]
        tokens = [count * family.unit**2 for count in slots], (here & visual).sum((1, 2)).tolist()
        sums = here.sum((1, 2)).tolist(), int(visual.sum()), int(n[1, 0].sum())
        return Report(*tokens, *sums, kv, kv_full, left / full)

    def __str__(self) -> str:
        plain = f"{self.visual_full} and {self.positions_full}"
        lines = [f"vision tokens, per encoder block: {', '.join(map(str, self.vision_tokens))}"]
        lines.append(f"decoder layer, visual tokens, all positions (plain: {plain})")
        for layer, (visual, every) in enumerate(zip(self.visual_tokens, self.positions, strict=True)):
            lines.append(f"{layer:5d} {visual:6d} {every:6d} {'#' * round(60 * every / self.positions_full)}")
        lines.append(f"KV cache {self.kv_bytes:,} bytes, plain {self.kv_bytes_full:,}")
        return "\n".join([*lines, f"LLM prefill FLOPs left {self.flops_left:.1%}"])


# ==== 7. The command line: one question about one picture, with and without LUVC ============================

TOY = Path(__file__).resolve().parent / "toy"


def load(name: str, device: str, dtype: str = "auto", attn: str = "sdpa"):
    """(model, processor) of a checkpoint folder or hub name; only safetensors, no code that comes along."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.empty(0, device=device)  # is it there? before gigabytes are read
    where, safe = TOY if name == "toy" else name, {"use_safetensors": True, "trust_remote_code": False}
    processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    make = AutoModelForImageTextToText.from_pretrained
    return make(where, dtype=dtype, attn_implementation=attn, **safe).to(device).eval(), processor


def encode(processor, picture, prompt: str):
    """Model inputs for one picture and one question, through the processor's chat template if it has one."""
    text = f"<image>\n{prompt}"
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


def ask(args: argparse.Namespace) -> str:
    """One question with and without LUVC: what is printed."""
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

    full, times = answer(), []
    with luvc:
        less, report = answer(), luvc.report()
    for _ in range(9):  # in turns: machines are noisy
        plain = prefill()
        with luvc:
            times.append((plain, prefill()))
    slow, fast = torch.tensor(times[2:]).median(dim=0).values.tolist()  # two to warm up
    parts = ("vision_tokens", "visual_tokens", "positions", "flops_left", "kv_bytes_full")
    result = {"model": args.model, "prompt": args.prompt, "answer_full": full, "answer_luvc": less}
    result |= {"same_answer": full == less, **{part: getattr(report, part) for part in parts}}
    result |= {"kv_bytes_luvc": report.kv_bytes, "prefill_ms_full": slow, "prefill_ms_luvc": fast}
    result |= {"speedup": slow / fast}
    text = f"{args.prompt}\n  plain: {full}\n  LUVC:  {less}\n\n{report}\nprefill, vision encoder included: "
    text += f"{slow:.1f} -> {fast:.1f} ms ({slow / fast:.2f}x); {model.device}, {model.dtype}"
    return json.dumps(result) if args.json else text


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
