"""Tests of luvc.py, to be read beside it. No network and no GPU needed.

    python -m pytest -q                                   # these, and what is in tests/
    LUVC_MODULE=other.py python -m pytest test_luvc.py    # another file instead of luvc.py

Contents (each heading is a ruler that a search finds, say `# ==== 4`):

    1  Merging              functions against plain loops; small integers make sums exact
    2  Pruning              the filter, the choice, and who inherits the sizes
    3  Settings
    4  One layer by hand    gather, run, scatter, on numbers to follow on paper
    5  Tiny models          of every family, and prompts for them
    6  The reference        `dense`: nothing is removed, all that LUVC removes is masked
    7  LUVC                 against the reference: prompts, batches, turns, decoding
    8  Each hook alone      Pruner and Merger
    9  Sizes                what a size means
    10 The toy              a trained model must lose next to nothing

Hypothesis draws the elements, so that zeros, ties and equal neighbours come up. Each test names the mistakes that it
would catch. tests/ holds what is not needed to understand the method: encoders patch by patch, kernels and devices,
other people's programs, refusals, processors, and the assignment (`python tests/assignment.py --help`).
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import sys
from pathlib import Path

import hypothesis.extra.numpy as hnp
import pytest
import torch
import transformers
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

HERE = Path(__file__).resolve().parent


def module_under_test() -> Path:
    """luvc.py beside this file, or the file that LUVC_MODULE names. Fresh from here under the name `luvc`, so
    that whoever imports `luvc` afterwards (toy/compare.py) gets the same one."""
    name = os.environ.get("LUVC_MODULE")
    file = Path(name).resolve() if name else HERE / "luvc.py"
    if not (file.is_file() and file.suffix == ".py"):
        # The one exception that pytest shows without a traceback when a test module raises it.
        raise pytest.Collector.CollectError(f"LUVC_MODULE={name}: no such Python file (looked for {file})")
    spec = importlib.util.spec_from_file_location("luvc", file)
    sys.modules["luvc"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return file


MODULE = module_under_test()

import luvc as reference  # noqa: E402, I001
from luvc import LUVC, LUVCConfig, Merger, Pruner, follow, inherit, low_pass, merge_axis  # noqa: E402
from luvc import merge_plan, spectral_prune, spectral_score  # noqa: E402

EPS = torch.finfo(torch.float32).eps
# The name of the KV cache in forwards and outputs: `cache` since transformers 5.24, `past_key_values` before.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
more = {"deadline": None, "max_examples": 60, "report_multiple_bugs": False}
settings.register_profile("luvc", derandomize=True, **more)
# For the assignment, which runs these tests many times: a failure is enough, it need not be the smallest one.
quick = {"max_examples": 15, "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("quick", settings.get_profile("luvc"), **quick)
# For marking: --hypothesis-seed
settings.register_profile("seeded", derandomize=False, database=None, **more)
settings.load_profile(os.environ.get("LUVC_PROFILE", "luvc"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def pytest_report_collectionfinish():
    return f"testing {MODULE}"


# pytest reads `pytest_plugins` in test modules too, so this one is its own plugin, and the hook above is called.
pytest_plugins = ["test_luvc"]


def same(got, want, why: str):
    __tracebackhide__ = True  # the line that calls says more
    assert got == want, f"{why}: got {got}, expected {want}"


def close(got, want, atol: float, why: str):
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda difference: f"{why}\n{difference}")


def refuses(value, function, *args, **kwargs):
    """The function has to raise a ValueError whose message names what is wrong: a number, a shape in any notation,
    a dtype, or text that has to be in it."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        assert isinstance(error, ValueError), (
            f"{value} is wrong: expected a ValueError that names it, got {error!r}"
        )
        message = str(error)
    else:
        raise AssertionError(f"{value} is wrong: expected a ValueError, but got the result {result}")
    pattern = r"\D+".join(map(str, value)) if isinstance(value, tuple) else re.escape(str(value))
    if not isinstance(value, str | tuple):
        pattern = rf"(?<![\w.-]){pattern}(?![\w])"
    assert re.search(pattern, message), f"the message should name what is wrong, {value}: {message}"


def scattered(t):
    """The same values, a slice of a larger tensor: not contiguous, and of no other shape without a copy."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


# ==== 1. Merging ============================================================================================

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
sizes_dtypes = st.sampled_from([torch.int32, torch.int64, *FLOATS])
SCALES = 2.0**-40, 2.0**-20, 2.0**20, 2.0**40  # around 1e-12, 1e-6, 1e6, 1e12: products are exact


def random(seed, *shape, low=-4, high=4):
    """float32 of small integers. (For what is too long to be drawn number by number.)"""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def long_grid(seed, axis, length, B=4, lines=2):
    x = random(seed, B, lines, length, 2).double()
    size = random(seed + 1, B, lines, length, low=1, high=3).double()
    return tuple(t.transpose(1, 2).contiguous() if axis == 1 else t for t in (x, size))


@st.composite
def grids(draw):
    """(x (B, H, W, C) float64 of small integers, size (B, H, W), keep, axis); one grid in four has a long axis."""
    B, axis = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))
    if draw(st.integers(0, 3)) == 0:
        seed, length, lines = draw(st.tuples(st.integers(0, 999), st.integers(7, 80), st.integers(1, 2)))
        x, size = long_grid(seed, axis, length, B, lines)
    else:
        shape = (B, *draw(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))))
        more = {"fill": st.nothing()}  # without it most elements are the same
        x = torch.from_numpy(draw(hnp.arrays("float64", shape, elements=st.integers(-4, 4), **more)))
        size = torch.from_numpy(draw(hnp.arrays("float64", shape[:3], elements=st.integers(1, 3), **more)))
    x, size = (scattered(x), scattered(size)) if draw(st.booleans()) else (x, size)
    return x, size, draw(st.integers(1, x.shape[axis])), axis


def similarity(a, b):
    norm_a, norm_b = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
    if norm_a == 0 or norm_b == 0:
        return float(norm_a == norm_b)
    return sum(u * v for u, v in zip(a, b, strict=True)) / (norm_a * norm_b)


def check_line(tokens, sizes, keep, runs, merged, mass, why):
    """One line in plain loops: the specification of merge_axis. Which runs it made is given, so that similarities that
    are equal but for rounding may be cut in any order; of equal pairs of tokens the first is cut."""
    steps = [after - before for before, after in itertools.pairwise(runs)]
    whole_line = runs[0] == 0 and set(steps) <= {0, 1} and runs[-1] == keep - 1
    assert whole_line, f"{why} runs {runs}: not {keep}, in order"
    pairs = list(itertools.pairwise(tokens))
    alike = [similarity(*pair) for pair in pairs]
    cut, whole = ([i for i, step in enumerate(steps) if step == kind] for kind in (1, 0))
    for i, j in itertools.product(cut, whole):
        assert alike[i] < alike[j] + 1e-9 and (i < j or pairs[i] != pairs[j]), (
            f"{why} cut behind token {i}, where similarity is {alike[i]}, and not behind {j}, where it is {alike[j]}"
        )
    for run in range(keep):
        members = [(t, s) for t, s, at in zip(tokens, sizes, runs, strict=True) if at == run]
        total = sum(size for _, size in members)
        mean = [sum(t[c] * size for t, size in members) / total for c in range(len(tokens[0]))]
        same(mass[run], total, f"{why} size of run {run}")
        assert merged[run] == pytest.approx(mean, rel=1e-12, abs=1e-12), f"{why} run {run}: not {mean}"


def test_merge_by_hand():
    """The smallest cases first, with numbers to follow on paper. Catches: the typical mistakes, one by one."""
    a, b, c, zero = [1.0, 0.0], [0.0, 1.0], [4.0, 3.0], [0.0, 0.0]  # similar: a b 0, a c 0.8, b c 0.6

    def merge(grid, keep, axis=2, size=None):
        x = torch.tensor([grid])
        size = torch.ones(x.shape[:3]) if size is None else torch.tensor([size])
        return [t.tolist()[0] for t in merge_axis(x, size, keep, axis)]

    _, size, parent = merge([[a, a, b]], 2)
    same(parent, [[0, 0, 1]], "a a b, merged to 2: a new run starts behind the least similar neighbours")
    same(size, [[2, 1]], "sizes of a a b, merged to 2: do the sizes of a run add up?")
    out, size, _ = merge([[a, c]], 1, size=[[2.0, 1.0]])
    same(size, [[3]], "sizes 2 and 1, merged to 1: do the sizes of a run add up?")
    same(out, [[[2, 1]]], "(1, 0) of size 2 and (4, 3) of size 1: the mean, weighted by size")
    for scale in SCALES:
        out, _, parent = merge_axis(torch.tensor([[[a, a, c]]]) * scale, torch.ones(1, 1, 3), 2, 2)
        why = f"a a c, times {scale:g}: is it the cosine that is compared, whatever the scale?"
        same((parent.tolist(), (out / scale).tolist()), ([[[0, 0, 1]]], [[[a, c]]]), why)
    out, _, parent = merge([[a], [b], [c]], 2, axis=1)
    same((len(out), len(out[0])), (2, 1), "a column of three, merged along H to two: the shape")
    same(parent, [[0], [1], [1]], "a column a b c, merged to two: parent")
    # H = 3, W = 2: of the left column b c merge, of the right one a a
    parent = merge([[a, b], [b, a], [c, a]], 2, axis=1)[2]
    same(parent, [[0, 1], [2, 3], [2, 3]], "two columns: parent is the flat index of the new grid")
    parent = merge([[a, b], [b, a]], 1)[2]
    same(parent, [[0, 0], [1, 1]], "two rows, each merged to one: parent is the flat index of the new grid")
    parent = merge([[zero, zero, c]], 2)[2]
    same(parent, [[0, 0, 1]], "0 0 c: how similar are two zero tokens, and one and another?")
    for line, want in (([b, a, [-1.0, 0.0]], [0, 0, 1]), ([a, [-1.0, 0.0], b], [0, 1, 1])):
        same(merge([line], 2)[2], [want], f"{line}: a cosine of -1 is less than one of 0")
    for n, keep in ((40, 15), (200, 150)):
        parent = merge([[[1.0] * 3] * n], keep)[2]
        why = f"{n} equal tokens, keep={keep}: which are cut on a tie? (`topk` promises no order, `sort` if stable)"
        same(parent, [[min(i, keep - 1) for i in range(n)]], why)


@example((*long_grid(1, 2, 80), 60, 2))
@example((*long_grid(2, 1, 80), 50, 1))
@given(grids())
def test_merge_equals_plain_loops(case):
    """Catches: unweighted means, off by one at the cut, the wrong axis, the wrong end of the ordering, ties,
    samples or lines that influence each other, a grid that is no rectangle any more."""
    x, size, keep, axis = case
    got = merge_axis(x, size, keep, axis)
    columns = got[1].shape[2]
    x, size, out, out_size, parent = (t.transpose(1, 2) if axis == 1 else t for t in (x, size, *got))
    for b, i in itertools.product(range(len(x)), range(x.shape[1])):
        line, sizes = x[b, i].tolist(), size[b, i].tolist()
        why = f"sample {b}, line {i} along axis {axis}: tokens {line}, sizes {sizes}, keep={keep}:"
        at = [divmod(flat, columns) for flat in parent[b, i].tolist()]  # row and column of the new grid
        same({pair[axis - 1 == 0] for pair in at}, {i}, f"{why} parent, the other axis")
        runs = [pair[axis - 1] for pair in at]
        check_line(line, sizes, keep, runs, out[b, i].tolist(), out_size[b, i].tolist(), why)


def test_plan_by_hand():
    """Catches: the wrong axis first, each axis shrunk to all of `keep`, halves that are not rounded up."""
    for args, want in [
        ((24, 24, 0.25, 4), [(2, 24, 18), (1, 18, 18), (2, 18, 12), (1, 12, 12)]),
        ((24, 24, 0.5625, 2), [(2, 24, 18), (1, 18, 18)]),
        ((4, 8, 0.25, 2), [(2, 4, 4), (1, 2, 4)]),
        ((9, 9, 0.25, 3), [(2, 9, 7), (1, 5, 7), (2, 5, 5)]),  # 6.75, 4.5 and 4.5
        ((1, 1, 0.1, 2), [(2, 1, 1), (1, 1, 1)]),
        ((3, 3, 0.81, 4), [(2, 3, 3), (1, 3, 3), (2, 3, 3), (1, 3, 3)]),
        ((4, 8, 1.0, 2), []),
    ]:
        same(merge_plan(*args), want, f"merge_plan{args}")


@given(st.integers(1, 80), st.integers(1, 80), st.floats(0.01, 1, exclude_max=True), st.integers(2, 24))
def test_plan_alternates_and_arrives(H, W, keep, steps):
    """Catches: an axis that grows or vanishes, the wrong order of axes, a target missed, unequal portions."""
    plan, sides, call = merge_plan(H, W, keep, steps), [H, W], f"merge_plan({H}, {W}, {keep}, {steps})"
    axes = [(2, 1)[step % 2] for step in range(steps)]
    same([axis for axis, _, _ in plan], axes, f"{call}: the axes")
    for step, (axis, *now) in enumerate(plan):
        full = (H, W)[axis - 1]
        exact = max(1, full - full * (1 - math.sqrt(keep)) * (step // 2 + 1) / axes.count(axis))
        assert abs(now[axis - 1] - exact) <= 0.5 + 1e-9, (
            f"{call}: step {step} leaves {now[axis - 1]} of {full}, expected {exact:g} to the nearest: equal portions, "
            "to the square root of `keep`"
        )
        assert now[axis - 1] <= sides[axis - 1], f"step {step} goes from {sides} to {now}"
        sides[axis - 1] = now[axis - 1]
        same(now, sides, f"the grid after step {step} along axis {axis}: does the other axis stay?")


def test_follow_by_hand():
    """Two rows of three, W merged to two columns, then H to one row. Catches: a step that starts again from the
    beginning."""
    token, second = torch.arange(6)[None], ([[0, 1], [0, 1]], [0, 0, 1, 0, 1, 1])
    for parent, want in [([[0, 0, 1], [2, 3, 3]], [0, 0, 1, 2, 3, 3]), second]:
        token = follow(token, torch.tensor([parent]))
        same(token[0].tolist(), want, f"where the six tokens are, after a merge with parent {parent}")


@given(grids(), st.data())
def test_follow_equals_plain_loops(case, data):
    """Catches: samples mixed up, or rows and columns, when merges follow each other; an input written into."""
    x, size, _, first = case
    B, tokens = len(x), data.draw(st.permutations(range(x.shape[1] * x.shape[2])))
    token = torch.tensor([tokens[: max(1, len(tokens) - 1)]] * B)  # of any tokens, in any order
    want = token.tolist()
    for axis in (first, 3 - first):  # one merge along each axis
        x, size, parent = merge_axis(x, size, data.draw(st.integers(1, x.shape[axis])), axis)
        before, old = token.tolist(), token
        token = follow(old, scattered(parent))
        same(old.tolist(), before, "the tokens before are the caller's, return new ones")
        want = [[parent[b].flatten().tolist()[i] for i in row] for b, row in enumerate(want)]
        why = f"tokens {before}, after merging along {axis}"
        same((token.tolist(), token.dtype), (want, torch.int64), why)


# ==== 2. Pruning ============================================================================================

cutoffs = st.floats(0, 1)


@st.composite
def sequences(draw):
    """x (B, N, C) float32 of small integers; one in four is long"""
    if draw(st.integers(0, 3)) == 0:
        seed, B, N = draw(st.tuples(st.integers(0, 999), st.integers(1, 4), st.integers(18, 200)))
        x = random(seed, B, N, 3, low=-8, high=8)
    else:
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 17), st.integers(1, 3)))
        x = draw(hnp.arrays("float32", shape, elements=st.integers(-8, 8), fill=st.nothing()))
        x = torch.from_numpy(x)
    return scattered(x) if draw(st.booleans()) else x


def rounding(x):
    """Error bound of one FFT and its inverse in float32: a few eps per butterfly level, of the largest sum."""
    return 4 * EPS * (2 + math.log2(x.shape[1])) * max(1.0, x.abs().sum(1).max().item())


def passes(N, cutoff):
    """How many of the N // 2 frequencies beside the mean pass."""
    return math.floor(cutoff * (N // 2) + 0.5)


def waves(N, count):
    """(N, N) float64: the matrix that keeps the mean and the `count` slowest of N // 2 frequencies, by definition."""
    at, total = torch.arange(N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
    for k in range(count + 1):
        share = 1 if k == 0 or 2 * k == N else 2  # +k and -k; these two have no partner
        total += share / N * torch.cos(2 * math.pi * k * (at[:, None] - at) / N)
    return total


def test_low_pass_by_hand():
    """Eight values, waves of frequency 0 (the mean) to 4. Catches: high frequencies kept, one too many or too few."""
    for number in range(5):
        wave = 3 * torch.cos(2 * math.pi * number * torch.arange(8) / 8)[None, :, None]
        why = f"a wave of frequency {number}, cutoff 0.5: half of the 4 frequencies beside the mean pass"
        close(low_pass(wave, 0.5), wave * (number <= 2), rounding(wave), why)
    for N, cutoff, passed in ((6, 0.5, 2), (10, 0.5, 3), (10, 0.3, 2)):  # 1.5, 2.5 and 1.5: halves
        x, why = random(N, 1, N, 2), f"{N} values, cutoff {cutoff}: {passed} beside the mean pass"
        close(low_pass(x, cutoff), (waves(N, passed) @ x.double()).float(), rounding(x), why)


LONG = [random(seed, 4, N, 3, low=-8, high=8) for seed, N in ((1, 200), (2, 199))]


@example(LONG[0], 0.5)
@example(LONG[1], 0.3)
@given(sequences(), cutoffs)
def test_low_pass_equals_the_sum_of_waves(x, cutoff):
    """Catches: the high frequencies kept instead, one frequency too many or too few, a filter along the channels,
    rounding where everything passes."""
    N, passed = x.shape[1], passes(x.shape[1], cutoff)
    why = f"{tuple(x.shape)}, cutoff {cutoff}: not the mean and the {passed} slowest of {N // 2} waves along dim 1"
    close(low_pass(x, cutoff).double(), waves(N, passed) @ x.double(), rounding(x), why)
    assert torch.equal(low_pass(x / 3, 1.0), x / 3), "everything passes: not a bit may change"


@given(sequences(), cutoffs, st.integers(0, 199))
def test_score_measures_what_it_says_anywhere(x, cutoff, shift):
    """The paper's position invariance, as a property. Catches: what passes scored instead of what is removed, another
    default; zero padding, windows, differences of neighbours."""
    got, N, why = spectral_score(x, cutoff), x.shape[1], f"cutoff {cutoff}: not the norm of what is removed"
    removed = x.double() - waves(N, passes(N, cutoff)) @ x.double()
    close(got.double(), removed.norm(dim=-1), 16 * rounding(x), why)
    why = f"tokens shifted in a circle by {shift} must shift their scores, not change them"
    close(spectral_score(x.roll(shift, 1), cutoff), got.roll(shift, 1), 16 * rounding(x), why)
    assert torch.equal(spectral_score(x), spectral_score(x, 0.5)), "the default cutoff is 0.5"


def test_prune_by_hand():
    """Ones everywhere, but for two tokens that differ. Catches: the lowest scores kept, indices not in order, ties
    to the higher index, the neighbours of a huge token taken for detail."""
    x = torch.ones(1, 64, 2)
    x[0, 2], x[0, 50] = torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, -1.0])  # 50 differs most
    for keep, want in ((0, []), (1, [50]), (2, [2, 50]), (4, [0, 1, 2, 50]), (64, list(range(64)))):
        got = spectral_prune(x, keep, 0.0)[0].tolist()
        same(got, want, f"all tokens are alike but 50, which differs most, and 2; keep={keep}")
    x[0, 30] *= 1000  # the same direction as most others, only longer
    for scale in SCALES:
        got = spectral_prune(x * scale, 2, 0.5).tolist()
        same(got, [[2, 50]], f"token 30 is only longer than its neighbours, all times {scale:g}")


def in_order(scores, chosen, error):
    """Is `chosen` what spectral_prune has to keep, by scores (N,) float64 that may be off by `error` before they are
    rounded to multiples of 2^-14? Returns a pair (kept, pruned in its place) that is wrong, or None."""
    low, high = (((scores + way * error) * 2**14).add(0.5).floor() for way in (-1, 1))
    kept = torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, chosen, True)
    a, b = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
    worse = high[a][:, None] < low[b]  # whatever rounding did
    worse |= (high[a][:, None] == low[b]) & (low[a][:, None] == high[b]) & (b < a[:, None])  # ties, for sure
    return next(((int(a[i]), int(b[j])) for i, j in worse.nonzero().tolist()), None)


@example(LONG[0], 0.5, 0.5)
@example(LONG[1], 0.3, 0.9)
@given(sequences(), cutoffs, st.floats(0, 1))
def test_prune_keeps_the_highest_scores_in_order(x, cutoff, share):
    """Catches: unsorted indices, the lowest scores kept, a wrong count, ties to the higher index."""
    N, keep = x.shape[1], round(share * x.shape[1])
    chosen = spectral_prune(x, keep, cutoff)
    same((chosen.shape, chosen.dtype), ((len(x), keep), torch.int64), f"keep={keep} of {len(x)} samples")
    assert (chosen.diff(dim=1) > 0).all(), f"indices ascend, and none comes twice: {chosen.tolist()}"
    length = x.double().norm(dim=-1, keepdim=True)
    direction = x.double() / length.where(length > 0, 1)
    scores = (direction - waves(N, passes(N, cutoff)) @ direction).norm(dim=-1)
    for b, row in enumerate(chosen):
        wrong = in_order(scores[b], row, 16 * rounding(direction))
        assert wrong is None, (
            f"sample {b} of {x.tolist()}, keep={keep}, cutoff={cutoff}: {wrong[0]} was kept and not {wrong[1]}; the "
            f"scores are {scores[b].tolist()}"
        )


@given(st.integers(1, 200), st.lists(st.integers(-9, 9), min_size=1, max_size=4), cutoffs, st.data())
def test_prune_constant_signal_is_all_ties(N, token, cutoff, data):
    """Catches: rounding noise of the FFT that decides between tokens which are all alike, a sort that is not stable."""
    keep, x = data.draw(st.integers(0, N)), torch.tensor(token, dtype=torch.float32).expand(3, N, len(token))
    got = spectral_prune(x, keep, cutoff).tolist()
    same(got, [list(range(keep))] * 3, f"{N} tokens {token}, all alike, keep={keep}: a tie")


def inherit_by_hand(sizes, kept):
    """Plain loops: the specification of inherit."""
    answer = [0] * len(kept)
    for i, size in enumerate(sizes):
        answer[min(range(len(kept)), key=lambda k: (abs(kept[k] - i), k))] += size
    return answer


def test_inherit_by_hand():
    """Seven tokens of sizes 1, 2, 4, ...: each sum says which ones it is made of. Catches: sizes that are lost, or
    go to the later on a tie."""
    size = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64]])
    got = inherit(size.clone(), torch.tensor([[1, 5]])).tolist()
    same(got, [[1 + 2 + 4 + 8, 16 + 32 + 64]], f"sizes {size.tolist()}, of which tokens 1 and 5 are kept")
    same(inherit(size, torch.tensor([[4]])).tolist(), [[127]], "one token is left: it stands for all")


@given(st.data(), sizes_dtypes)
def test_inherit_equals_plain_loops(data, dtype):
    """Catches: sizes that are lost or counted twice, ties to the later, off by one, what lies before the first
    kept token or behind the last one forgotten, another dtype, samples mixed up, an input written into."""
    B, N = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20) | st.integers(21, 200))
    sizes = random(data.draw(st.integers(0, 999)), B, N, low=0, high=9).to(dtype)
    keep = data.draw(st.integers(1, N))
    orders = st.randoms(use_true_random=False).map(lambda draw: sorted(draw.sample(range(N), keep)))
    kept = torch.tensor([data.draw(orders) for _ in sizes])
    sizes, kept = (scattered(sizes), scattered(kept)) if data.draw(st.booleans()) else (sizes, kept)
    before, at = sizes.tolist(), kept.tolist()
    got = inherit(sizes, kept)
    same((sizes.tolist(), kept.tolist()), (before, at), "an input was changed")
    same(got.dtype, dtype, "the dtype in which sizes came back")
    want = torch.tensor([inherit_by_hand(*row) for row in zip(before, at, strict=True)])
    same(got.tolist(), want.to(dtype).tolist(), f"sizes {before}, kept {at}")


# ==== 3. Settings ===========================================================================================

ABOVE_0, ABOVE_1 = math.nextafter(0, 1), math.nextafter(1, 2)
NO_FRACTIONS = [-ABOVE_0, ABOVE_1, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("vision_keep", [ABOVE_0, 0.5, 1, 1.0], [0, 0.0, *NO_FRACTIONS]),
        ("vision_steps", [None, 2, 3], [1, 0, -1, 4, math.nan, math.inf]),
        ("llm_keep", [None, 0, 0.0, ABOVE_0, 0.5, 1, 1.0], [*NO_FRACTIONS, ""]),
        ("llm_keep", [(1, 0.5, 0.5, 0), [0] * 4], [(), (1, 0.5, 0.5), (1, 0.5, 0.6, 0), (1, 1, 1, math.nan)]),
    ],
)
def test_settings_are_checked_when_a_hook_is_made(name, good, bad):
    """Catches: a bound that is off or open where it is closed, NaN that passes every comparison, a message that
    does not name the value."""
    model = tiny()
    for value in good:
        LUVC(model, LUVCConfig(**{name: value}))
    for value in bad:
        refuses(f"{name}={value}", LUVC, model, LUVCConfig(**{name: value}))


def test_fractions_of_layers():
    """Catches: a schedule off by one layer, so that tokens are left in the last one; fractions for another number of
    layers; settings that the caller can change afterwards."""
    for layers in range(2, 61):
        got, step = LUVCConfig().fractions(layers), 0.4 / (layers - 2) if layers > 2 else 0
        want = [*(0.8 - n * step for n in range(layers - 1)), 0]
        assert got == pytest.approx(want, rel=0, abs=1e-15) and got[-1] == 0, got
    for keep, want in [([1, 0.5, 0], [1, 0.5, 0]), (0.5, [0.5] * 3), (1, [1] * 3)]:
        same(LUVCConfig(llm_keep=keep).fractions(3), want, f"fractions of 3 layers with llm_keep={keep}")
    refuses("4 layers", LUVCConfig(llm_keep=[1, 0.5, 0]).fractions, 4)
    defaults = {"vision_keep": 0.75, "vision_steps": None, "llm_keep": None, "sizes": True}
    same(LUVCConfig(), LUVCConfig(**defaults, merge=merge_axis, prune=spectral_prune), "the default settings")
    with pytest.raises(AttributeError):
        LUVCConfig().vision_keep = 0.1


# ==== 4. One layer by hand ==================================================================================


def keep_last(x, keep):
    """A scheme that is easy to follow on paper, in place of `spectral_prune`."""
    return torch.arange(x.shape[1] - keep, x.shape[1], device=x.device).expand(len(x), keep)


def prompt_with(sizes, pieces, text_lengths):
    """A Prompt with sizes (B, S), and pictures from (sample, positions) of each."""
    size, found = torch.as_tensor(sizes).float(), []
    for count in dict.fromkeys(len(at) for _, at in pieces):
        here = [(b, at) for b, at in pieces if len(at) == count]
        where = torch.tensor([[b * size.shape[1] + position for position in at] for b, at in here])
        found.append(reference.Pictures(count, where, [b for b, _ in here]))
    return reference.Prompt(size, found, text_lengths, torch.ones_like(size) > 0, False, True)


def test_prompt_by_hand():
    """Prompt.prune on t i i i i t p: two of text, a picture of four tokens, padding; the last tokens stay. Catches:
    fractions of what is left, not of what was delivered; sizes of an earlier layer written over, or lost."""
    asked, fractions = [], [1.0, 0.75, 0.75, 0.25, 0.0]
    prompt, hidden = (
        prompt_with([[1, 1, 2, 4, 8, 1, 0]], [(0, [1, 2, 3, 4])], [2]),
        torch.arange(7.0).view(1, 7, 1),
    )

    def choose(x, keep):
        asked.append((x[0, :, 0].tolist(), keep))
        return keep_last(x, keep)

    indices = [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 4, 5], [0, 5]]
    sizes = [[1, 1, 2, 4, 8, 1], [1, 3, 4, 8, 1], [1, 3, 4, 8, 1], [1, 15, 1], [1, 1]]
    for layer, want in enumerate(zip(indices, sizes, strict=True)):
        old, before = prompt.size, prompt.size.tolist()
        prompt.prune(hidden, fractions[layer], choose)
        same(old.tolist(), before, "sizes of an earlier layer were changed: they stand in `layers`")
        got = prompt.index.tolist(), prompt.channels[0, 0, :, 0].exp().round().tolist()
        same(got, want, f"layer {layer}, {fractions[layer]} of the four: index, and sizes of these positions")
    want = [([1, 2, 3, 4], 3), ([2, 3, 4], 1), ([4], 0)]
    same(asked, want, "what `choose` was asked: (tokens, keep) each time")
    assert prompt_with([[1, 1, 1]], [(0, [1])], [2]).index is None, "all are processed: nothing to gather"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_layer_by_hand(attention):
    """run_layer around a "layer" that adds 100: what it gets and gives, where samples keep 1 of 2 and 2 of 3 tokens."""
    config, seen = LUVCConfig(llm_keep=[0.5, 0.5, 0.0, 0.0], prune=keep_last), {}
    pruner, cache = Pruner(tiny(attention=attention), config), DynamicCache()
    cache.layers = [reference.PrunedLayer() for _ in range(LAYERS)]
    hidden, table = torch.arange(10.0).view(2, 5, 1), torch.arange(5.0).view(1, 5, 1)

    def plain(x, **kwargs):
        seen.update(kwargs, x=x)
        return x + 100

    prompt = prompt_with([[1, 3, 5, 1, 1], [0, 1, 2, 4, 1]], [(0, [1, 2]), (1, [1, 2, 3])], [3, 1])
    more = {"position_embeddings": (table, -table), "position_ids": torch.arange(5)[None], CACHE: cache}
    out = reference.run_layer(plain, 0, pruner, hidden, prompt=prompt, **more)
    told, whole = cache.layers[0].prompt, prompt_with(torch.ones(2, 5), [], [5, 5])
    everything = reference.run_layer(lambda x, **_: x + 100, 1, pruner, hidden, prompt=whole, **more)
    same(everything.tolist(), (hidden + 100).tolist(), "no picture, no padding: all positions are processed")
    assert told is prompt, "the cache of the layer has to know what comes"
    same(seen["x"][..., 0].tolist(), [[0, 2, 3, 4], [7, 8, 9, 5]], "the layer ran on (fillers last)")
    (first, second), want = out[..., 0].tolist(), [[100, 1, 102, 103, 104], [6, 107, 108, 109]]
    same([first, second[1:]], want, "the output: 100 more where the layer processed a row")
    assert hidden.tolist() == torch.arange(10.0).view(2, 5, 1).tolist(), "the input was changed"
    for got, sign in zip(seen["position_embeddings"], (1, -1), strict=True):
        want = [[0, 2, 3, 4], [2, 3, 4, 0]]
        same((sign * got[..., 0]).tolist(), want, "rotary positions: those of the whole sequence")
    assert seen["position_ids"] is None, "gaps in position_ids look like packed sequences to FlashAttention"
    mask = seen["attention_mask"]  # eager attention is handed one in any case, fused kernels need none
    right = mask is None if attention == "sdpa" else mask.shape[-2:] == (4, 4)
    assert right, f"a mask {mask} for a sequence of 4"
    told = prompt.channels[:, 0, :, 0].exp().round().tolist()
    same(told, [[1, 8, 1, 1], [3, 4, 1, 0]], "the sizes whose logs the cache's layer was told")
    same(prompt.positions.tolist(), [[0, 2, 3, 4], [2, 3, 4, -1]], "logical positions of what is stored")
    same([s.tolist() for s in prompt.layers], [[[1, 0, 8, 1, 1], [0, 0, 3, 4, 1]]], "prompt.layers: sizes")


# ==== 5. Tiny models ========================================================================================
#
# Random, of every family, and prompts for them.

IMAGE, VIDEO, START, END = 60, 61, 62, 63  # placeholders, and what Qwen puts around pictures and videos
LAYERS, SIDE = 4, 6  # decoder layers; a tile has 6 x 6 image tokens
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 24, "patch_size": 4, "projection_dim": 32}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "image_size": 24, "patch_size": 4}
DINO = {**TOWER, "model_type": "dinov2", "image_size": 24, "patch_size": 4, "mlp_ratio": 2}
INTERNVL = {**TOWER, "image_size": [48, 48], "patch_size": [4, 4]}
IDEFICS = {**TOWER, "image_size": 48, "patch_size": 4}
QWEN = {"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48}
QWEN |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1, 3]}  # 2 x 2 image tokens
DEEP = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LLAMA, MISTRAL = {"model_type": "llama"}, {"model_type": "mistral", "sliding_window": None}
QWEN2, QWEN3 = {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 8}
FULL = {"vision_feature_select_strategy": "full"}
TILES = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
SHUFFLE = {"image_seq_length": SIDE**2, "downsample_ratio": 0.5}
FAMILIES = {  # name -> class, config of the tower, of the decoder, and what the model's own config adds
    "llava-clip": ("Llava", CLIP, LLAMA, {"vision_feature_layer": -2}),
    "llava-full": ("Llava", CLIP, MISTRAL, {"vision_feature_layer": 3} | FULL),  # CLS reaches the LLM
    "llava-siglip": ("Llava", SIGLIP, QWEN2, {"vision_feature_layer": -1} | FULL),
    "llava-dinov2": ("Llava", DINO, LLAMA, {"vision_feature_layer": -2}),
    "llava-swiglu": ("Llava", DINO | {"use_swiglu_ffn": True}, QWEN2, {"vision_feature_layer": -1} | FULL),
    "llava_next": ("LlavaNext", CLIP, MISTRAL, TILES),
    "llava_onevision": ("LlavaOnevision", SIGLIP, QWEN2, TILES | FULL),
    "deepseek_vl": ("DeepseekVL", SIGLIP, LLAMA, {}),
    "internvl": ("InternVL", INTERNVL, QWEN3, SHUFFLE),
    "idefics3": ("Idefics3", IDEFICS, LLAMA, {"scale_factor": 2}),
    "smolvlm": ("SmolVLM", IDEFICS, LLAMA, {"scale_factor": 2}),
    "qwen2_vl": ("Qwen2VL", QWEN | {"embed_dim": 32, "mlp_ratio": 2}, MROPE, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", QWEN | WINDOWS, MROPE, {}),
    "qwen3_vl": ("Qwen3VL", QWEN | DEEP, MROPE | {"head_dim": 8}, {}),
}
QWENS = [name for name in FAMILIES if name.startswith("qwen")]
# Behind the projector tiles become one picture, which is cut to size, with newlines.
ANYRES = ["llava_next", "llava_onevision"]
# Encoders that put a class token in front of the patches: how many of it reach the LLM?
CLASS_TOKEN = {"llava-clip": 0, "llava-full": 1, "llava-dinov2": 0, "llava-swiglu": 1, "internvl": 0}
CLASS_TOKEN |= {"llava_next": 0}
SHUFFLED = ["internvl", "idefics3", "smolvlm"]  # an image token of a tile is 2 x 2 patches
every_family = pytest.mark.parametrize("name", FAMILIES)


def tiny(name="llava-clip", attention="sdpa", decoder=(), **changes):
    """A tiny random model of a family, always the same; `changes` go to the config of its tower."""
    prefix, tower, llm, more = FAMILIES[name]
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": 64}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    text |= {"initializer_range": 0.25, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    configs = {"vision_config": tower | changes, "text_config": text | llm | dict(decoder)}
    config = getattr(transformers, f"{prefix}Config")(**configs, attn_implementation=attention, **more)
    for key, token in (("image", IMAGE), ("video", VIDEO), ("vision_start", START), ("vision_end", END)):
        if hasattr(config, f"{key}_token_id"):
            setattr(config, f"{key}_token_id", token)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    for key, weight in model.named_parameters():  # random models are nearly blind: make the tower loud
        if ("visual" in key or "vision" in key) and weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [0, IMAGE, VIDEO, START, END]
    model.name, model.per_tile = name, SIDE**2 + CLASS_TOKEN.get(name, 0)  # image tokens
    return model


@torch.no_grad()
def part_of_prompt(model, part):
    """(ids, tensors) of one part of a prompt: an id, None for padding, or a picture or video as processors make it.

    "image" is a picture, "blank" a blank one, "tall" one of another size or of two tiles, "video" a video of three
    frames, "short" one of two, "still" one of two equal ones; a number behind it is the seed of its pixels: "image7".
    """
    if not isinstance(part, str):
        return [part or 0], {}
    kind = part.rstrip("0123456789")
    frames, seed = {"video": 3, "short": 2, "still": 2}.get(kind, 1), int(part.removeprefix(kind) or 0)
    randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    randn = torch.ones if kind == "blank" else randn
    if model.name in QWENS:
        H, W = (6, 3) if kind == "tall" else (4, 6)
        token, media, suffix = (IMAGE, "image", "") if frames == 1 else (VIDEO, "video", "_videos")
        between = [END, 9, START] if model.name == "qwen3_vl" else []  # time stamps
        ids = [START, *([token] * (H * W) + between) * (frames - 1), *[token] * (H * W), END]
        # Patches, four of them an image token; each RGB x 2 pictures in time x 4 x 4 pixels.
        grid = torch.tensor([[frames, 2 * H, 2 * W]])
        pixels = randn(frames * 4 * H * W, 3 * 2 * 4 * 4)
        pixels = pixels[: 4 * H * W].repeat(frames, 1) if kind == "still" else pixels
        return ids, {f"pixel_values{suffix}": pixels, f"{media}_grid_thw": grid}
    if frames > 1:  # LLaVA-OneVision: a frame is 3 x 3 image tokens, and a video has one more at its end
        return [VIDEO] * (9 * frames + 1), {"pixel_values_videos": randn(1, frames, 3, 24, 24)}
    if model.name in ANYRES:
        size = torch.tensor([[44, 20] if kind == "tall" else [30, 44]])
        tiles = image_size_to_num_patches(size[0], model.config.image_grid_pinpoints, 24)
        pixels = randn(1, tiles, 3, 24, 24)
        count = len(model.model.get_image_features(pixels, size).pooler_output[0])
        return [IMAGE] * count, {"pixel_values": pixels, "image_sizes": size}
    tiles, side = 1 + (kind == "tall"), 48 if model.name in SHUFFLED else 24
    return [IMAGE] * (tiles * model.per_tile), {"pixel_values": randn(tiles, 3, side, side)}


def prompt(model, *parts):
    """The ids of one row of a batch."""
    return [i for part in parts for i in part_of_prompt(model, part)[0]]


def padded(model, rows, side):
    """Rows of parts, the shorter ones filled up with None."""
    lengths = [len(prompt(model, *row)) for row in rows]
    gaps = [[None] * (max(lengths) - length) for length in lengths]
    return [[*gap, *row] if side == "left" else [*row, *gap] for gap, row in zip(gaps, rows, strict=True)]


def batch(model, rows, side="left"):
    """What `model(...)` and `model.generate(...)` take, for rows of parts; shorter rows are padded on `side`."""
    parts = [[part_of_prompt(model, part) for part in row] for row in padded(model, rows, side)]
    ids = torch.tensor([[i for tokens, _ in row for i in tokens] for row in parts])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if model.name in QWENS:  # which count positions by themselves, and need this for it
        inputs["mm_token_type_ids"] = ((ids == IMAGE) + 2 * (ids == VIDEO)).int()
    # Black tiles behind, which models leave out.
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    for key in dict.fromkeys(key for row in parts for _, more in row for key in more):
        rows_of = [[more[key] for _, more in row if key in more] for row in parts]
        values = [value for row in rows_of for value in row]
        if model.name in ANYRES and key == "pixel_values":
            values = [pad([tiles[0] for tiles in values])]
        elif model.name in ("idefics3", "smolvlm"):  # (B, tiles, 3, H, W)
            values = [pad([torch.cat(row) if row else torch.zeros(0, 3, 48, 48) for row in rows_of])]
        inputs[key] = torch.cat(values)
    return inputs


def spy(module, tell):
    """Tells what a module is given: its first argument, and those by name."""
    return module.register_forward_pre_hook(lambda _, a, k: tell((*a, *k.values())[0], k), with_kwargs=True)


def stored(output):
    """The KV cache of a model's output, whatever transformers calls it."""
    return getattr(output, CACHE)


# ==== 6. The reference ======================================================================================


def copies_by_hand(tokens):
    """Where one of the copies of each token is kept, the middle one, and how many there are: {index: copies}."""
    members = {}
    for index, token in enumerate(tokens):
        members.setdefault(token, []).append(index)
    return dict(sorted((at[(len(at) - 1) // 2], len(at)) for at in members.values()))


def tokens_of(model, inputs, groups):
    """(B, S): which merged token each placeholder is a copy of, or -1. The plain model carries numbers in place of its
    features through whatever it does behind its encoder: crops, newlines, means."""
    queue, numbers, given, cls = enumerate(groups), {}, {}, CLASS_TOKEN.get(model.name, 0)

    def put(module, args, out):
        features, row = out.pooler_output if model.name in QWENS else out, []
        while len(row) < features[..., 0].numel():
            at, group = next(queue)  # of the next tile or frame
            row += [numbers.setdefault((at, t), 2 + len(numbers)) for t in (*range(-cls, 0), *group.tolist())]
        features.copy_(torch.tensor(row).sqrt().view(*features.shape[:-1], 1).expand_as(features))

    vision = LUVC(model, OFF).family
    handles = [(vision.vision if model.name in QWENS else vision.projectors[0]).register_forward_hook(put)]
    handles.append(spy(model.get_decoder(), lambda _, kwargs: given.update(kwargs)))
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    rows = given["inputs_embeds"]
    found = rows[..., :1] == torch.arange(2, 2 + len(numbers)).sqrt()
    found &= (rows == rows[..., :1]).all(-1, keepdim=True)
    return torch.where(found.any(-1), found.int().argmax(-1), -1)


def dense(model, inputs, config):
    """The reference: nothing is removed. Full length in every layer; a position that is pruned, a copy, or padding is
    hidden from all others by a mask, its row is not updated, and a key of size s has log(s) added to its logits.

    From LUVC it takes the encoder's features, and which tokens were merged (`groups`): the encoder has a test of its
    own. Returns (logits (B, S, vocabulary), kept): kept[layer][sample] is {position: size} of what a layer processes.
    """
    given, groups, decoder = {}, [], model.get_decoder()
    with LUVC(model, dataclasses.replace(config, llm_keep=1.0)) as luvc:
        handles = [spy(decoder, lambda _, kwargs: given.update(kwargs))]
        if config.vision_keep < 1:  # pictures and videos are two calls of the encoder
            projector = luvc.family.projectors[0]
            handles.append(projector.register_forward_hook(lambda *_: groups.extend(luvc.groups)))
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
    embeds, at, ids = given["inputs_embeds"], given.get("position_ids"), inputs["input_ids"]
    (B, S), shown = ids.shape, inputs["attention_mask"].bool()
    # Qwen: text, time, row, column
    at = torch.arange(S)[None] if at is None else at[1:] if len(at) == 4 else at
    cos_sin = [t.expand(B, -1, -1) for t in decoder.rotary_emb(embeds, position_ids=at)]
    deep, visual = given.get("deepstack_visual_embeds") or [], given.get("visual_pos_masks")
    tokens = tokens_of(model, inputs, groups) if groups else torch.full((B, S), -1)
    logits, kept = [], [[] for _ in range(LAYERS)]
    for b in range(B):
        hidden, pictures, text = embeds[b : b + 1], [], {}
        for kind, run in itertools.groupby(range(S), lambda i, row=ids[b]: int(row[i])):
            run = [i for i in run if shown[b, i]]
            if kind not in (IMAGE, VIDEO):
                text |= dict.fromkeys(run, 1)
            elif run:  # side by side they are one picture
                names = [int(tokens[b, i]) if tokens[b, i] >= 0 else (i,) for i in run]
                pictures.append({run[i]: copies for i, copies in copies_by_hand(names).items()})
        delivered = [len(picture) for picture in pictures]
        for number, fraction in enumerate(config.fractions(LAYERS)):
            for i, picture in enumerate(pictures):
                keep, at = math.floor(fraction * delivered[i] + 0.5), list(picture)
                if keep < len(at):
                    chosen = config.prune(hidden[:, at], keep)[0].tolist()
                    pictures[i] = {at[c]: 0 for c in chosen}
                    for j, size in enumerate(picture.values()) if keep else ():
                        pictures[i][at[min(chosen, key=lambda c, j=j: (abs(c - j), c))]] += size
            here = functools.reduce(dict.__or__, pictures, text)
            kept[number].append(dict(sorted(here.items())))
            hide = torch.full((S, S), -torch.inf).fill_diagonal_(0.0)  # each row needs a key, read or not
            for key, size in here.items():
                hide[key:, key] = math.log(size) if config.sizes else 0.0
            rotary = tuple(t[b : b + 1] for t in cos_sin)
            out = decoder.layers[number](hidden, attention_mask=hide[None, None], position_embeddings=rotary)
            member = torch.zeros(S, dtype=torch.bool).index_fill_(0, torch.tensor(list(here)), True)
            hidden = torch.where(member[None, :, None], out, hidden)
            if number < len(deep):
                features = torch.zeros_like(embeds).masked_scatter(visual[..., None], deep[number])
                hidden = hidden + features[b : b + 1]
        logits.append(model.lm_head(decoder.norm(hidden)))
    return torch.cat(logits), kept


# Two ways to the same numbers, sums of at most a few hundred terms in another order: in float32 they differ by
# about 5e-6 here, where a single wrong size or position makes a difference of 1e-2 or more.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
OFF, PRUNER = LUVCConfig(vision_keep=1.0, llm_keep=1.0), LUVCConfig(vision_keep=1.0)
BOTH = LUVCConfig(vision_keep=0.45)


def ragged(name):
    """Three rows: pictures side by side, a video where the family has such; one picture; none."""
    video = ["video3", 8] if name in QWENS or name == "llava_onevision" else []
    return [[1, "image1", *video, 5, "tall2", "image4", 6, 7], [1, "tall5", 5, 6], [1, 2, 3]]


def agree(got, want, why):
    torch.testing.assert_close(got, want, **CLOSE, msg=lambda difference: f"{why}\n{difference}")


def bytes_of(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def positions(model, inputs):
    """Rotary positions, padding left out: the model's own M-RoPE, or 0, 1, 2, ..."""
    if model.name not in QWENS:
        return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{key: inputs[key] for key in names if key in inputs})[0]


def conversation(model, config, turns, side="left"):
    """Turns of one conversation on one KV cache, each (B rows), against the reference, which sees all at once.

    Returns a function of an attached LUVC, maybe on another model of the same weights. It is a generator: a turn
    runs and is compared when it is asked for, so several conversations can take turns.
    """
    turns = [padded(model, rows, side) for rows in turns]
    whole = batch(model, [list(itertools.chain(*row)) for row in zip(*turns, strict=True)])
    at = whole["position_ids"] = positions(model, whole)
    with torch.no_grad():
        logits, kept = dense(model, whole, config)

    @torch.no_grad()
    def speak(luvc):
        end, cache = 0, DynamicCache()
        for turn, rows in enumerate(turns):
            inputs = batch(model, rows)
            start, end = end, end + inputs["input_ids"].shape[1]
            inputs |= {"attention_mask": whole["attention_mask"][:, :end], "position_ids": at[..., start:end]}
            out = luvc.model(**inputs, **{CACHE: cache})
            words = end - start == 1  # of which `kept` does not speak
            for layer, b in itertools.product(range(0 if words else LAYERS), range(len(rows))):
                got = dict(zip(luvc.kept[layer][b].tolist(), luvc.sizes[layer][b].tolist(), strict=True))
                want = {p: size for p, size in kept[layer][b].items() if start <= p < end}
                same(got, want, f"turn {turn}, layer {layer}, sample {b}: {{position: size}} processed")
            text = (inputs["input_ids"] < IMAGE) & (whole["attention_mask"][:, start:end] > 0)
            why = f"turn {turn}: other logits than with pruned tokens masked"
            agree(out.logits[text], logits[:, start:end][text], why)
            assert cache.get_seq_length() == end, "the cache counts logical positions, not stored ones"
            yield out

    return speak


def same_as_the_reference(model, config, turns, side="left", attached=None):
    speak = conversation(model, config, turns, side)
    with LUVC(attached or model, config) as luvc:
        assert len(list(speak(luvc))) == len(turns)
    return luvc


# ==== 7. LUVC ===============================================================================================


def attributes(model):
    """Every attribute of every module; what is in dictionaries, hooks for example, one by one."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            # `rope_deltas` is Qwen's, of the latest prompt.
            found |= {(name, key, k): v for k, v in inner if key != "rope_deltas"}
    return found


def changed(model, before):
    """What is not the same object as it was."""
    after, missing = attributes(model), object()
    return [k for k in before | after if before.get(k, missing) is not after.get(k, missing)]


@every_family
@torch.no_grad()
def test_off_changes_nothing(name):
    """Catches: hooks although nothing is merged or pruned (where a prompt may end with a picture)."""
    model = tiny(name)
    inputs = [batch(model, ragged(name), "right"), batch(model, [[1, 5, "image1"]])]
    plain = [(model(**each).logits, model.generate(**each, **GREEDY)) for each in inputs]
    before = attributes(model)
    with LUVC(model, dataclasses.replace(OFF, llm_keep=[1.0] * LAYERS)):
        touched = changed(model, before)
        for each, (logits, words) in zip(inputs, plain, strict=True):
            assert torch.equal(model(**each).logits, logits), "off is the plain model"
            assert torch.equal(model.generate(**each, **GREEDY), words), "off is the plain model"
    assert not touched, f"with everything off nothing is attached: {touched}"


@every_family
@torch.no_grad()
def test_detach_restores_the_model(name):
    """Catches: hooks, configs or state left behind, by `detach` and by a forward that broke off."""
    model = tiny(name)
    inputs, text = batch(model, ragged(name)), batch(model, [[1, 2, 3]])
    plain, words = model(**inputs).logits, model(**text).logits
    before, luvc = attributes(model), LUVC(model, BOTH)
    assert not changed(model, before), "only attach() may change the model"

    def fail(*_):
        raise RuntimeError("on purpose")

    for _ in range(2):  # one LUVC may be attached again
        with luvc:
            want, why = model(**inputs).logits, "a call that broke off leaks into the next one"
            assert not torch.equal(want, plain), "LUVC had no effect"
            decoder, family = model.get_decoder(), luvc.family
            for module in (family.blocks[2], family.projectors[0], decoder.layers[2].mlp):
                handle = module.register_forward_hook(fail)
                with pytest.raises(RuntimeError, match="on purpose"):
                    model(**inputs)
                handle.remove()
                assert torch.equal(model(**text).logits, words), why
                assert torch.equal(model(**inputs).logits, want), why
        luvc.detach()  # without effect
        assert not changed(model, before), "something was left behind"
    with pytest.raises(RuntimeError, match="on purpose"), luvc:
        fail()
    assert not changed(model, before) and torch.equal(model(**inputs).logits, plain)


SETTINGS = {  # what is merged and pruned, the attention, and the side of the padding
    "both": ({}, "sdpa", "left"),
    "both, eager": ({}, "eager", "right"),
    "pruner": ({"vision_keep": 1.0}, "sdpa", "right"),
    "merger": ({"llm_keep": 1.0}, "eager", "left"),
    "without sizes": ({"sizes": False}, "sdpa", "left"),
    "without sizes, eager": ({"sizes": False, "llm_keep": [1, 1, 0.4, 0.4]}, "eager", "right"),
}


@every_family
@pytest.mark.parametrize("setting", SETTINGS)
def test_physical_equals_logical(name, setting):
    """Catches: a mask or rotary positions that are not indexed, rows scattered to the wrong place, copies, padding or
    fillers that take part, pictures pruned together, sizes that are lost or of other tokens or without effect."""
    changes, attention, side = SETTINGS[setting]
    config = dataclasses.replace(BOTH, **changes)
    same_as_the_reference(tiny(name), config, [ragged(name)], side, tiny(name, attention))


@every_family
@torch.no_grad()
def test_batch_gives_what_its_samples_give(name):
    """Catches: samples that see each other's padding, features, videos or fractions, in the encoder as well; equal rows
    taken for copies, which is a matter of rounding."""
    model, rows = tiny(name), [*ragged(name), ["blank", 9, "still6" if name in QWENS else "blank", 9]]
    inputs = batch(model, rows)
    with LUVC(model, BOTH) as luvc:
        out, kept = model(**inputs).logits, luvc.kept
        for b, row in enumerate(rows):
            alone, real = model(**batch(model, [row])).logits[0], inputs["attention_mask"][b].bool()
            text = inputs["input_ids"][b, real] < IMAGE
            agree(out[b, real][text], alone[text], f"sample {b} depends on the others")
            for layer in range(LAYERS):
                at, why = kept[layer][b] - real.nonzero()[0], f"layer {layer}, sample {b}"
                assert torch.equal(at, luvc.kept[layer][0]), f"{why}: other tokens than alone"


@every_family
def test_cached_generation_equals_the_reference(name):
    """Step by step, in a padded batch. Catches: a cache that counts physical positions, M-RoPE positions that jump,
    fillers that are attended to, videos that are cut otherwise where features were encoded ahead."""
    model = tiny(name)
    rows = padded(model, ragged(name), "left")
    inputs = batch(model, rows)
    with LUVC(model, BOTH):
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    S = inputs["input_ids"].shape[1]
    new = out.sequences[:, S:]
    whole = batch(model, [[*row, *ids] for row, ids in zip(rows, new.tolist(), strict=True)])
    with torch.no_grad():
        logits = dense(model, whole | {"position_ids": positions(model, whole)}, BOTH)[0][:, S - 1 : -1]
    agree(torch.stack(out.logits, 1), logits, "with a KV cache other logits than without")
    logits[..., model.generation_config.suppress_tokens] = -torch.inf
    assert torch.equal(new, logits.argmax(-1))
    assert stored(out).get_seq_length() == S + 3, "the cache counts logical positions, not stored ones"


DECODING = {
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
}


@every_family
@pytest.mark.parametrize("how", DECODING)
def test_decoding_with_a_cache_equals_recomputation(name, how):
    """Catches: keys, sizes or positions that are not repeated or reordered with their beam."""
    # One picture of one tile per sample: for several, transformers before 5.23 hands beams the wrong ones.
    model, out = tiny(name), []
    inputs = batch(model, [[1, "image1", 5, 6], [1, "image2", 7]])
    with LUVC(model, BOTH):
        for use_cache in (True, False):
            torch.manual_seed(5)
            out.append(model.generate(**inputs, **DECODING[how], max_new_tokens=5, use_cache=use_cache))
    assert torch.equal(*out), "the answer changes with the cache"
    assert len({tuple(row) for row in out[0].tolist()}) > 2


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_turns_of_interleaved_conversations(name, side):
    """Two conversations take turns, in padded batches: pictures, text, words one by one. Catches: state kept in the
    wrapper instead of the cache; a turn that sees too little or too much of earlier ones."""
    model = tiny(name)
    turns = [[["image1", 5], [1, 2]], [[7, 8, 9], [7, 8]], [[3], [4]], [["tall2", 5], ["image3", 6]]]
    turns.append([[9], [5]])
    others = [ragged(name)[:2], [["image4", 7], [6, 6]], [[8], [8]], [[2, 3], [4]], [[5], [6]]]
    speakers = [conversation(model, BOTH, each, side) for each in (turns, others)]
    with LUVC(model, BOTH) as luvc:
        assert len(list(zip(*[speak(luvc) for speak in speakers], strict=True))) == len(turns)


@st.composite
def conversations(draw):
    """(family, settings, turns, side of the padding)"""
    name = draw(st.sampled_from(["llava-clip", "llava-full", "llava-siglip", "qwen2_5_vl", "qwen3_vl"]))
    videos = ["video4", "still"] * (name in QWENS)
    part = st.sampled_from([5, 6, "image1", "image2", "tall3", "blank", *videos])
    row = st.lists(part, max_size=4).map(lambda parts: [*parts, 8])  # a turn ends with text
    B, share = draw(st.integers(1, 3)), st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.51, 0.8, 1.0])
    turns = [[draw(row) for _ in range(B)] for _ in range(draw(st.integers(1, 3)))]
    fractions = sorted(draw(st.lists(share, min_size=LAYERS, max_size=LAYERS)), reverse=True)
    config = LUVCConfig(
        vision_keep=draw(st.sampled_from([1.0, 0.7, 0.45, 0.03])),
        vision_steps=draw(st.sampled_from([None, 2, 3])),
        llm_keep=draw(st.sampled_from([None, 0.5, fractions])),
        sizes=draw(st.booleans()),
    )
    return name, config, turns, draw(st.sampled_from(["left", "right"]))


@settings(max_examples=25)
@given(conversations())
def test_any_conversation_equals_the_reference(case):
    """Catches: what nobody thought of, in combinations of rows, padding, pictures, fractions, turns and sizes."""
    name, config, turns, side = case
    off = config.vision_keep == 1 and min(config.fractions(LAYERS)) == 1
    if not off:  # the plain model processes padding as well
        same_as_the_reference(tiny(name), config, turns, side)


# ==== 8. Each hook alone ====================================================================================


def used(name):
    """A tiny model that ran once: transformers then puts hooks of its own in."""
    model = tiny(name)
    model(**batch(model, [[1, "image1", 5]]))
    return model


@every_family
@torch.no_grad()
def test_pruner_alone(name):
    """Against a LUVC that does the same. Catches: pruning that needs the merger or LUVC itself, hooks that stay in."""
    model, out = used(name), []
    inputs, before = batch(model, ragged(name)), attributes(model)
    at = torch.arange(200, 202).expand(3, 2)  # any will do, for both the same
    again = {"input_ids": torch.tensor([[7, 8], [9, 5], [6, 7]])}
    again["position_ids"] = at.expand(3, 3, 2) if name in QWENS else at
    again["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, 2).long()], 1)
    for hook in (Pruner(model, PRUNER), LUVC(model, PRUNER)):
        with hook:
            first = model(**inputs, use_cache=True)
            second = model(**again, **{CACHE: stored(first)})
            single = batch(model, [[1, "image1", 5, 6], [1, "image2", 7]])
            beams = model.generate(**single, **GREEDY | {"num_beams": 3})
            out.append([first.logits, second.logits, model.generate(**inputs, **GREEDY), beams])
    for got, want, what in zip(*out, ("logits", "a second turn", "words", "words of beams"), strict=True):
        assert torch.equal(got, want), f"the Pruner alone: other {what}"
    assert not changed(model, before), "something was left behind"


@every_family
@torch.no_grad()
def test_merger_alone(name):
    """The plain LLM on what LUVC's encoder gives. Catches: merging that needs pruning, hooks that stay in."""
    model, given = used(name), []
    inputs, before = batch(model, [[1, "image1", 5, "tall2", 6]]), attributes(model)
    for hook in (LUVC(model, BOTH), Merger(model, BOTH)):
        with hook:
            handle = spy(model.get_decoder(), lambda _, kwargs: given.append(kwargs))
            out = model(**inputs, use_cache=False).logits
            handle.remove()
    assert torch.equal(*[kwargs["inputs_embeds"] for kwargs in given]), "other features than under LUVC"
    want = model.lm_head(model.get_decoder()(**given[1]).last_hidden_state)
    assert torch.equal(out, want), "the LLM is not the plain one"
    assert not changed(model, before), "something was left behind"


@torch.no_grad()
def test_hooks_side_by_side():
    """The sum of both by hand. Catches: hooks that get into each other's way; a second one attached over the first, a
    model that a failed `attach` leaves changed."""
    model = used("llava-clip")
    inputs, before = batch(model, ragged("llava-clip")), attributes(model)
    with LUVC(model, BOTH):
        want = model(**inputs).logits
    pruner = Pruner(model, BOTH, reference.find_copies)
    with pruner, Merger(model, BOTH):
        assert torch.equal(model(**inputs).logits, want)
        for hook in (pruner, Pruner(model), Merger(model), LUVC(model)):
            refuses("detach", hook.attach)
        assert torch.equal(model(**inputs).logits, want), "a second hook, refused, changed the model"
    assert not changed(model, before), "something was left behind"


# ==== 9. Sizes ==============================================================================================


@st.composite
def sized_keys(draw):
    """(query (B, 4, Q, 8), key, value (B, 2, T, 8), sizes (B, T), allowed (Q, T)): small integers, float64"""
    B, Q, T = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6)))

    def array(*shape, low, high):
        return torch.from_numpy(draw(hnp.arrays("float64", shape, elements=st.integers(low, high))))

    query, key, value = (array(B, *shape, 8, low=-3, high=3) for shape in ((4, Q), (2, T), (2, T)))
    allowed, sizes = array(Q, T, low=0, high=1).bool(), array(B, T, low=1, high=4)
    allowed[:, draw(st.integers(0, T - 1))] = True  # a query looks at something
    return query, key, value, sizes, allowed


def attend(module, query, calls, mask=None, cached=True):
    """Attention over the keys of one or more calls (key, value, sizes): of a KV cache that adds channels for the sizes,
    or of an encoder, where the attention adds them."""
    store, more = reference.PrunedLayer(), {"scaling": module.scaling}
    for key, value, sizes in calls if cached else ():
        prompt = prompt_with(sizes, [], [sizes.shape[1]] * len(sizes))
        prompt.channels = reference.size_channels(sizes)  # in float64
        store.expect(prompt)
        keys, values = store.update(key, value)
    if not cached:
        keys, values = (torch.cat(t, dim=2) for t in list(zip(*calls, strict=True))[:2])
        more["key_channels"] = reference.size_channels(torch.cat([sizes for *_, sizes in calls], dim=-1))
    assert keys.shape[-1] == values.shape[-1] == query.shape[-1] + reference.EXTRA * cached
    return reference.sized_attention(module, query, keys, values, mask, **more)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_key_of_size_s_is_s_keys_of_size_1(attention):
    """What a size means. Catches: a size instead of its log, a log times the scale, sizes that go to other keys, heads
    or samples, outputs with channels too many, sizes of an earlier call that are lost or given to later keys."""
    model = tiny(attention=attention)
    module = model.get_decoder().layers[1].self_attn

    @given(sized_keys(), st.data())
    def check(case, data):
        query, key, value, sizes, allowed = case
        cut, cached = data.draw(st.integers(1, key.shape[2])), data.draw(st.booleans())
        calls = [(key[:, :, at], value[:, :, at], sizes[:, at]) for at in (slice(0, cut), slice(cut, None))]
        mask = torch.where(allowed, 0.0, -torch.inf).double()[None, None]
        got = attend(module, query, calls[: 1 + (cut < key.shape[2])], mask, cached)
        # Logits of at most 8 * 9 * scaling = 25 and values of at most 3; eager attention rounds to float32.
        atol = 25 * 3 * EPS
        for b, q in itertools.product(range(len(query)), range(query.shape[2])):
            copies = sizes[b].long() * allowed[q]
            many = (t[b : b + 1].repeat_interleave(copies, dim=2) for t in (key, value))
            want = attend(module, query[b : b + 1, :, q : q + 1], [(*many, torch.ones(1, int(copies.sum())))])
            torch.testing.assert_close(got[b, q], want[0, 0], rtol=0, atol=atol)
            for h, shared in enumerate((0, 0, 1, 1)):  # two heads share their keys
                weights = (key[b, shared] @ query[b, h, q] * module.scaling).exp() * copies
                want = weights @ value[b, shared] / weights.sum()
                torch.testing.assert_close(got[b, q, h], want, rtol=0, atol=atol)

    with Pruner(model):
        check()


# ==== 10. The toy ===========================================================================================


@pytest.fixture(scope="module")
def toy():
    from toy.ask import load

    return load("toy")


def asked_of_unseen_scenes(each):
    """(kind, pictures, question, answer): `each` questions of every kind, those of equal length beside each other."""
    from PIL import Image

    from toy.make import KINDS, draw_pair, draw_sample

    asked = {kind: [] for kind in (*KINDS, "pair")}
    for seed in range(40 * each):  # seeds below HELD_OUT were never trained on
        drawn = (draw_sample(seed) if min(len(asked[kind]) for kind in KINDS) < each else draw_pair(seed))[1:]
        pictures = [Image.fromarray(one) for one in (drawn[0] if isinstance(drawn[0], list) else [drawn[0]])]
        for kind, _, question, answer in drawn[1]:
            if len(asked[kind]) < each:
                asked[kind].append((kind, pictures, question, answer))
        if min(map(len, asked.values())) == each:
            break
    return sorted(itertools.chain(*asked.values()), key=lambda item: (len(item[1]), len(item[2].split())))


def asked_together(processor, asked):
    from toy.make import prompt_of

    prompts = [prompt_of(question, len(pictures)) for _, pictures, question, _ in asked]
    pictures = [picture for _, each, *_ in asked for picture in each]
    return processor(images=pictures, text=prompts, padding=True, return_tensors="pt")


@torch.inference_mode()
def answers(model, processor, asked, config=None):
    """(the answers, image tokens that the last batch kept in each layer, and had)"""
    texts, left, full = [], [], 0
    for start in range(0, len(asked), 20):
        inputs = asked_together(processor, asked[start : start + 20]).to(model.device, model.dtype)
        with LUVC(model, config) if config else contextlib.nullcontext() as luvc:
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        full = int((inputs["input_ids"] == model.config.image_token_id).sum())
        if luvc:
            left = [sum(map(len, layer)) + full - int(inputs["attention_mask"].sum()) for layer in luvc.kept]
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return texts, left, full


def near_lossless(model, processor, asked, kernel=contextlib.nullcontext):
    """The defaults' targets: over all at most one point lost, in any kind at most two, at least 97 % of the answers the
    same, at most half of the image token-layers left and none in the last layer."""
    plain, *_ = answers(model, processor, asked)
    with kernel():
        less, left, full = answers(model, processor, asked, LUVCConfig())
    lost = {}
    for a, b, (kind, _, _, answer) in zip(plain, less, asked, strict=True):
        lost.setdefault(kind, []).append((a == answer) - (b == answer))
    every = [each for of_kind in lost.values() for each in of_kind]
    share = {kind: sum(of_kind) / len(of_kind) for kind, of_kind in lost.items()}
    assert sum(every) <= 0.01 * len(asked), f"{sum(every)} of {len(asked)} answers lost; by kind {share}"
    assert max(share.values()) <= 0.02, f"answers lost, by kind: {share}"
    same = sum(a == b for a, b in zip(plain, less, strict=True))
    assert same >= 0.97 * len(asked), f"{same} of {len(asked)} answers are the plain model's"
    assert sum(left) <= 0.5 * len(left) * full and left[-1] == 0 < left[-2], f"{left} of {full} image tokens"
    right = sum(text == answer for text, (*_, answer) in zip(plain, asked, strict=True))
    assert right >= 0.97 * len(asked), f"the toy itself is right {right} times in {len(asked)}"


def test_near_lossless_on_the_toy(toy):
    """Catches: hooks that work as they should and lose answers all the same. (With half as many questions, one of a
    kind would be two points of it.)"""
    near_lossless(*toy, asked_of_unseen_scenes(100))


@pytest.mark.gpu
@needs_gpu
def test_near_lossless_in_the_flash_kernel():
    """The same targets in bfloat16 on a GPU, the flash kernel forced for LUVC."""
    from toy.ask import load

    flash = functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    near_lossless(*load("toy", "cuda", "bfloat16"), asked_of_unseen_scenes(100), flash)
