"""What callers of the functions rely on beside their values: dtypes, nothing written where it does not belong, cost,
errors. The values are in test_luvc.py, sections 1, 2 and 4."""
# ruff: noqa: I001

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from test_luvc import BOTH, EPS, FLOATS, LAYERS, LUVC, batch, close, cutoffs, every_family, follow, inherit
from test_luvc import low_pass, merge_axis, merge_plan, ragged, random, reference, refuses, rounding, same
from test_luvc import scattered, sequences, spectral_prune, spectral_score, tiny

SIZES = [torch.int32, torch.int64, *FLOATS]


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes a GPU's host wait: values that decide shapes or come back as Python numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        waits = masked or name.startswith(self.WAITS)
        assert not waits, f"{function}: on a GPU the host would wait here"
        return function(*args, **(kwargs or {}))


def tensors(found):
    return [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Counts torch's operations, but for those inside of the modules `silent`, and numbers in the largest result."""

    def __init__(self, silent=()):
        super().__init__()
        self.count = self.largest = self.inside = 0
        enter = [module.register_forward_pre_hook(lambda *_: self.enter(1)) for module in silent]
        self.handles = enter + [module.register_forward_hook(lambda *_: self.enter(-1)) for module in silent]

    def enter(self, number):
        self.inside += number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += not self.inside
        self.largest = max([self.largest, *(t.numel() for t in tensors(out))])
        return out

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)


def leaves_no_trace(function, *args):
    """Runs it twice, and between the two on other tensors. Catches: an input that is written into, results that the
    next call overwrites, a global seed set or random numbers taken on the way, noise in the results."""
    args = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
    copies = [t.clone() for t in tensors(tuple(args))]
    others = [t.flip(-1) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = tensors(function(*args))
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was read or set"
    assert all(map(torch.equal, tensors(tuple(args)), copies)), "an input was changed; it is the caller's"
    before = [t.clone() for t in first]
    function(*others)
    torch.manual_seed(2)
    again = tensors(function(*args))
    assert all(map(torch.equal, first, before)), "another call changed the results of this one"
    assert all(map(torch.equal, again, before)), "the same input gave another result the second time"


def cheap(function, small, large, largest=None):
    """`function` on small and on large input: as many operations, none of which waits for a GPU, everything made on
    the device of the input. Catches: loops over tokens, lines, samples; a value read on the way; a table of all pairs
    (more than `largest` numbers)."""
    function(*large), function(*small)  # plans and projections are made once
    counts = []
    for args in (small, large):
        with Watch() as watch:
            function(*args)
        counts.append(watch.count)
    few, many = counts
    assert many <= few + 4, (
        f"{few} torch operations for few tokens, {many} for many: their number must not grow"
    )
    fits = largest is None or watch.largest <= largest
    assert fits, f"a tensor of {watch.largest} numbers was made: that grows with the square of the tokens"
    with NoWaiting():
        function(*large)
    # A tensor on the device "meta" has a shape and no numbers: reading one, or a tensor from elsewhere, is an error.
    nowhere = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in large]
    try:
        found = tensors(function(*nowhere))
    except Exception as error:
        why = "a number is read on the host, or a tensor was made on another device than that of the input"
        raise AssertionError(f"{why}: {error}") from error
    assert all(t.device.type == "meta" for t in found), "the results are not on the device of the input"


# ==== 1. Merging ============================================================================================


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_computes_in_float32_or_better(dtype):
    """Catches: sums in half precision, where 2048 + 1 is 2048; similarities rounded so that differences vanish."""
    for of_sizes in {torch.float32, dtype}:
        ones = torch.ones(1, 1, 4096, dtype=of_sizes)
        out, total, _ = merge_axis(torch.ones(1, 1, 4096, 2, dtype=dtype), ones, 1, 2)
        why = f"4096 {dtype} ones, sizes {of_sizes}, merged: are sums in float32 or better?"
        same((total.item(), out.flatten().tolist()), (4096, [1, 1]), why)
    step = 1e-5 if dtype == torch.float64 else 1 / 256  # cosines are 1 - step ** 2 / 2, 1 - 2 * step ** 2
    x = torch.tensor([[[[1, 0], [1, step], [1, 3 * step]]]], dtype=dtype)
    parent = merge_axis(x, torch.ones(1, 1, 3), 2, 2)[2].flatten().tolist()
    same(parent, [0, 0, 1], f"{dtype}, angles 0, {step:g}, {3 * step:g}: are cosines in float32 or better?")
    x = torch.tensor([[[[1, step], [1, -step], [1, -2.5 * step]]]], dtype=dtype)  # 2 and 1.5 steps apart
    parent = merge_axis(x, torch.ones(1, 1, 3), 2, 2)[2].flatten().tolist()
    same(parent, [0, 1, 1], f"{dtype}, angles 2 and 1.5 steps apart: are dot products in float32 or better?")
    # Times 600: too large, or nearly so, for float16; exact.
    big = 128.0 if dtype == torch.float16 else 2.0**60
    x = big * torch.tensor([[[[1, 0], [1, 0], [0, 1]]]], dtype=dtype)
    out, _, parent = merge_axis(x, torch.full((1, 1, 3), 300.0), 2, 2)
    same(out.tolist(), x[:, :, 1:].tolist(), f"{dtype}, tokens of length {big:g}, sizes of 300")
    size = torch.tensor([[[2049.0, 1]]])
    same(merge_axis(x[:, :, :2], size, 1, 2)[1].item(), 2050, f"{dtype} tokens of sizes 2049 and 1, float32")
    if dtype == torch.float64:
        size = torch.tensor([[[2**24 + 1, 2]]])  # float32 has no room for the first
        got = merge_axis(x[:, :, :2], size, 1, 2)[1].item()
        same(got, 2**24 + 3, "float64 tokens: sizes of 2^24 + 1 and 2")


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_keeps_dtypes(dtype):
    """Every pair of them. Catches: another dtype returned, sums that are another in some of them."""
    x, size = random(3, 3, 4, 5, 8), random(4, 3, 4, 5, low=1, high=3)
    for of_sizes, axis in itertools.product(SIZES, (1, 2)):
        got = merge_axis(x.to(dtype), size.to(of_sizes), 2, axis)
        want, why = merge_axis(x.double(), size.double(), 2, axis), f"x {dtype}, size {of_sizes}"
        same([t.dtype for t in got], [dtype, of_sizes, torch.int64], f"{why}: tokens, sizes and parent are")
        assert torch.equal(got[1].double(), want[1]) and torch.equal(got[2], want[2]), f"{why}: sizes"
        bound = 4 * max(EPS, torch.finfo(dtype).eps) * 4  # a few roundings, of numbers up to 4
        close(got[0].double(), want[0], bound, f"{why}: tokens")


@pytest.mark.parametrize("axis", [1, 2])
def test_merge_leaves_no_trace(axis):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, size = random(5, 3, 6, 6, 4).to(dtype), random(6, 3, 6, 6, low=1, high=3).to(dtype)
        leaves_no_trace(merge_axis, x, size, 4, axis)
        leaves_no_trace(merge_axis, scattered(x), scattered(size), 1, axis)


@pytest.mark.parametrize("axis", [1, 2])
def test_merge_costs_what_it_should(axis):
    def case(B, side):
        return random(7, B, side, side, 8), torch.ones(B, side, side), side * 3 // 4, axis

    cheap(merge_axis, case(1, 4), case(12, 48), largest=2 * 12 * 48 * 48 * 8)


def test_merge_refuses_bad_input():
    """Catches: an answer where the caller made a mistake, an error that does not name it."""
    x, size = torch.ones(1, 3, 4, 2), torch.ones(1, 3, 4)
    refuses((3, 4, 2), merge_axis, x[0], size[0], 1, 1)
    refuses("int64", merge_axis, x.long(), size, 1, 1)
    refuses((1, 4, 3), merge_axis, x, size.transpose(1, 2), 1, 1)
    refuses((1, 3, 4, 2), merge_axis, x, x, 1, 1)
    wrong = [(0, 0, 1), (4, 4, 1), (5, 5, 2), (-1, -1, 2), (0, 1, 0), (3, 1, 3), (-1, 1, -1)]
    for value, keep, axis in wrong:
        refuses(value, merge_axis, x, size, keep, axis)


def test_plan_refuses_bad_input():
    """Catches: an answer where the caller made a mistake, an error that does not name it; numbers that are no ints."""
    for wrong, *args in [(0, 0, 4, 0.5, 2), (0, 4, 0, 0.5, 2), (-3, -3, 4, 0.5, 2), (1, 4, 4, 0.5, 1)]:
        refuses(wrong, merge_plan, *args)
    for keep in (0.0, -0.5, 1.5, math.nan):
        refuses(keep, merge_plan, 4, 4, keep, 2)
    whole = all(type(n) is int for step in merge_plan(7, 9, 0.3, 5) for n in step)
    assert whole, "a plan is made of whole numbers"


def test_follow_leaves_no_trace_and_costs_what_it_should():
    def case(B, side):
        x, size = random(8, B, side, side, 3), torch.ones(B, side, side)
        return torch.arange(side * side).expand(B, -1), merge_axis(x, size, side // 2, 2)[2]

    leaves_no_trace(follow, *case(3, 6))
    cheap(follow, case(1, 4), case(12, 48), largest=12 * 48 * 48)


# ==== 2. Pruning ============================================================================================


@example(random(14, 3, 12, 3, low=-8, high=8), 0.4, torch.bfloat16, 2.0**20)
@example(random(15, 3, 11, 3, low=-8, high=8), 0.4, torch.float16, 2.0**-20)
@given(sequences(), cutoffs, st.sampled_from(FLOATS), st.sampled_from([2.0**-20, 2.0**20]))
def test_filter_dtype_dim_and_scale(x, cutoff, dtype, scale):
    """Catches: an FFT in half precision, another dimension, absolute thresholds."""
    want, got = (
        low_pass(x, cutoff),
        low_pass(x.to(dtype), cutoff),
    )  # these integers are the same in every dtype
    same(got.dtype, torch.float32, f"{dtype} is filtered to")
    close(got, want, rounding(x), f"{dtype} is filtered in another way")
    for dim in (0, 2, -1):
        got = low_pass(x.movedim(1, dim), cutoff, dim=dim).movedim(dim, 1)
        close(got, want, rounding(x), f"dim={dim} is not the dimension that was filtered")
    close(low_pass(x[0, :, 0], cutoff, dim=0), want[0, :, 0], rounding(x), "a sequence of numbers, dim=0")
    assert torch.equal(low_pass(x * scale, cutoff), want * scale), f"times {scale:g} it passes in another way"
    once, scaled = (spectral_score(t, cutoff) for t in (x, x * scale))
    assert torch.equal(scaled, once * scale), f"tokens times {scale:g} score in another way"
    got = spectral_score(x.to(dtype), cutoff)
    same(got.dtype, torch.float32, f"scores of {dtype} tokens")
    close(got, once, 16 * rounding(x), f"{dtype} scores in another way")


@given(sequences(), cutoffs, st.sampled_from(FLOATS), st.sampled_from([2.0**-40, 2.0**-20, 2.0**20, 2.0**40]))
def test_prune_sees_directions_only(x, cutoff, dtype, scale):
    """Catches: absolute thresholds, an epsilon in the norm, half precision."""
    chosen = spectral_prune(x, (x.shape[1] + 1) // 2, cutoff)
    longer = x * scale ** (torch.arange(x.shape[1]) % 2)[:, None]
    for t, what in ((x * scale, "all scaled"), (longer, "every other one scaled"), (x.to(dtype), dtype)):
        got = spectral_prune(t, chosen.shape[1], cutoff)
        same(got.tolist(), chosen.tolist(), f"tokens {x.tolist()}, {what}, {scale:g}: only directions count")


def test_prune_ties_up_to_rounding():
    """With 4 or 6 tokens and cutoff 0.5 only the highest frequency is detail, and every token has as much of it.
    Catches: a choice that depends on the attention kernel that computed the tokens. (Scores are whole multiples of
    2^-14, so those that tie can still fall on two sides of a half: at most as often as errors are large.)"""
    noise = torch.Generator().manual_seed(0)
    for N, spread in itertools.product((4, 6), (1.0, 0.1, 0.03)):  # tokens of deep layers are alike
        x = torch.randn(2000, 1, 64, generator=noise) + spread * torch.randn(2000, N, 64, generator=noise)
        # A direction moves by at most 5e-7, so two scores part by at most 1e-6, of a step of 6e-5: 1 in 60.
        for tokens in (x, x * (1 + 1e-6 * (torch.rand(x.shape, generator=noise) - 0.5))):
            others = (spectral_prune(tokens, N // 2, 0.5) != torch.arange(N // 2)).any(1).sum().item()
            assert others <= 2000 / 30, (
                f"{others} samples of 2000 with {N} tokens whose scores tie up to rounding"
            )


def test_scores_in_a_projection():
    """Catches: tokens wider than `channels` that are scored as they are, or narrower ones that are not; a projection in
    half precision, or after the norm."""
    C, channels, N = 256, 64, 400
    matrix = reference.projection(C, channels, torch.device("cpu"))
    x = torch.randn(3, N, C, generator=torch.Generator().manual_seed(0))
    x = x * 10 ** torch.rand(3, N, 1, generator=torch.Generator().manual_seed(1))
    want, full = spectral_prune(x @ matrix, 100), spectral_prune(x, 100, channels=C)
    assert torch.equal(spectral_prune(x, 100), want), "256 channels are scored in the projection to 64"
    as_they_are = torch.equal(full, spectral_prune(x, 100, channels=2 * C)) and not torch.equal(full, want)
    assert as_they_are, "tokens of as many channels as `channels`, or fewer, are scored as they are"
    for half in (x.half(), x.bfloat16(), x.half() * 1000):  # 1000: up to 4e4, whose squares are too large
        projected, why = spectral_prune(half.float() @ matrix, 100), f"{half.dtype}: computed in float32?"
        assert torch.equal(spectral_prune(half, 100), projected), why
        wide = spectral_prune(half.float(), 100, channels=C)
        assert torch.equal(spectral_prune(half, 100, channels=C), wide), why


def test_the_projection():
    """Catches: one that changes from call to call or takes numbers from the global generator, does not keep lengths, or
    is of no use to gradients once it was made for inference."""
    C, channels, N, made = 256, 64, 400, []
    for _ in range(2):
        reference.projection.cache_clear()
        torch.manual_seed(1)
        made.append((reference.projection(C, channels, torch.device("cpu")), torch.rand(1)))
    torch.manual_seed(1)
    assert torch.equal(made[0][1], torch.rand(1)), "the global random numbers are the caller's"
    assert torch.equal(made[0][0], made[1][0]), "it changes from call to call"
    with torch.inference_mode():
        spectral_prune(torch.ones(1, 8, 257), 4)  # 257: a width that nobody asked for yet
    spectral_prune(torch.ones(1, 8, 257, requires_grad=True), 4)
    x = torch.randn(1, N, C, generator=torch.Generator().manual_seed(0))
    ratio = (x @ made[0][0]).square().sum() / x.square().sum()
    # One squared length varies by sqrt(2 / channels). The mean over N tokens varies less, but not below what the one
    # projection that they share gives all of them: 1 / sqrt(C) of that. Six standard deviations of both.
    assert abs(ratio - 1) < 6 * math.sqrt(2 / channels) * (1 / math.sqrt(N) + 1 / math.sqrt(C)), ratio


@pytest.mark.parametrize("dtype", SIZES)
def test_inherit_is_exact(dtype):
    """Catches: half precision in sums; float64 and int64 that come back through float32."""
    got = inherit(torch.ones(1, 4096, dtype=dtype), torch.tensor([[1000]])).item()
    same(got, 4096, f"4096 {dtype} ones, one token kept")
    wide = {torch.int64: 2**40, torch.float64: 2**40, torch.int32: 2048, torch.float32: 2048}
    if dtype in wide:
        got = inherit(torch.tensor([[wide[dtype], 1, 7]], dtype=dtype), torch.tensor([[0, 2]])).tolist()
        same(got, [[wide[dtype] + 1, 7]], f"{dtype} sizes {wide[dtype]}, 1, 7; tokens 0 and 2 are kept")


@settings(max_examples=10)
@given(st.integers(2, 60), cutoffs)
def test_pruning_leaves_no_trace(N, cutoff):
    x = random(N, 3, N, 5)
    leaves_no_trace(low_pass, x, cutoff)
    leaves_no_trace(spectral_score, x, cutoff)
    leaves_no_trace(spectral_prune, x, N // 2, cutoff)
    leaves_no_trace(spectral_prune, x, N // 2, cutoff, 2)
    leaves_no_trace(inherit, random(N, 3, N, low=1, high=9), torch.arange(N)[None, ::2].expand(3, -1))


def test_pruning_costs_what_it_should():
    for B, N in ((12, 500), (12, 501)):
        small, large = random(12, 1, N % 2 + 8, 4), random(13, B, N, 4)
        cheap(low_pass, (small, 0.5), (large, 0.5), largest=2 * B * N * 4)
        cheap(spectral_score, (small, 0.5), (large, 0.5), largest=2 * B * N * 4)
        cheap(spectral_prune, (small, 4), (large, N // 2), largest=2 * B * N * 4)
        cheap(spectral_prune, (small, 4, 0.5, 2), (large, N // 2, 0.5, 2), largest=2 * B * N * 4)
        small, kept = torch.ones(1, 8), torch.arange(0, 8, 2)[None]
        cheap(inherit, (small, kept), (torch.ones(B, N), torch.arange(0, N, 2).expand(B, -1)))


def test_pruning_refuses_bad_input():
    """Catches: an answer where the caller made a mistake, an error that does not name it."""
    x = torch.ones(1, 4, 2)
    refuses("int64", low_pass, x.long(), 0.5)
    refuses((1, 0, 2), low_pass, torch.ones(1, 0, 2), 0.5)
    refuses("", low_pass, torch.tensor(1.0), 0.5, dim=0)
    for cutoff in (1 + 1e-9, -1e-9, math.nan):
        refuses(cutoff, low_pass, x, cutoff)
        refuses(cutoff, spectral_score, x, cutoff)
    refuses((4, 2), spectral_score, x[0])
    refuses((4, 2), spectral_prune, x[0], 2)
    for keep in (5, -1):
        refuses(keep, spectral_prune, x, keep)
    for N in (0, 3):
        got = spectral_prune(torch.ones(2, N, 3), 0)
        same((got.shape, got.dtype), ((2, 0), torch.int64), f"keep=0 of {N} tokens")


# ==== 4. One layer ==========================================================================================


@every_family
@torch.no_grad()
def test_hidden_states_stay_logical(name):
    """Catches: hooks in an order that shows callers the physical sequence."""
    model = tiny(name)
    inputs = batch(model, [ragged(name)[0]])
    for _ in range(2):  # transformers puts its own hooks in at the first request, before and after LUVC's
        with LUVC(model, BOTH) as luvc:
            out = model(**inputs, output_hidden_states=True).hidden_states
        assert [h.shape[1] for h in out] == [inputs["input_ids"].shape[1]] * (LAYERS + 1)
        for layer in range(1 if name == "qwen3_vl" else LAYERS - 1):  # DeepStack adds to pruned rows as well
            different = (out[layer] != out[layer + 1]).any(-1)[0].nonzero()[:, 0]
            assert torch.equal(different, luvc.kept[layer][0]), "a pruned token must ride along as it is"
        model(**inputs, output_hidden_states=True)
