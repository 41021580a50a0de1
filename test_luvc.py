"""Tests of luvc.py: `python -m pytest test_luvc.py`. No network and no GPU needed; minutes on two cores.

Pure functions and settings come first: hypothesis draws the elements, small integers make sums exact, an oracle in
plain loops says what is right. Then models: tiny random ones of every family against a dense reference that masks
instead of removing, and the trained toy. Each test names the mistake that it would catch.

luvc.py is also a course assignment, in four tasks:

    python test_luvc.py --assignment student.py                        # luvc.py with nine functions to write
    LUVC_MODULE=student.py python -m pytest test_luvc.py -m task1 -x   # tests student.py instead of luvc.py

Without --assignment, `python test_luvc.py` runs pytest.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
import functools
import gc
import http.client
import http.server
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.masking_utils import flash_attention_mask
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.vision_utils import get_vision_window_index

HERE = Path(__file__).resolve().parent


def module_under_test() -> Path:
    """luvc.py beside this file, or the file that LUVC_MODULE names. Fresh from here under the name `luvc`, so
    that whoever imports `luvc` afterwards (toy/compare.py) gets the same one."""
    # As a script this file only hands over to pytest, which imports it once more, or writes the assignment; then
    # LUVC_MODULE may name a file that is yet to be written.
    name = None if __name__ == "__main__" else os.environ.get("LUVC_MODULE")
    file = Path(name).resolve() if name else HERE / "luvc.py"
    if name and not (file.is_file() and file.suffix == ".py"):
        # The one exception that pytest shows without a traceback when a test module raises it.
        raise pytest.Collector.CollectError(f"LUVC_MODULE={name}: no such Python file (looked for {file})")
    spec = importlib.util.spec_from_file_location("luvc", file)
    sys.modules["luvc"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return file


MODULE = module_under_test()

import luvc as reference  # noqa: E402
from luvc import (  # noqa: E402
    LUVC,
    LUVCConfig,
    follow,
    inherit,
    low_pass,
    merge_axis,
    merge_plan,
    spectral_prune,
    spectral_score,
)

EPS = torch.finfo(torch.float32).eps
settings.register_profile("luvc", deadline=None, derandomize=True, max_examples=60)
# For the assignment, which runs these tests many times: a failure is enough, it need not be the smallest one.
quick = {"max_examples": 15, "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("quick", settings.get_profile("luvc"), **quick)
settings.load_profile(os.environ.get("LUVC_PROFILE", "luvc"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def pytest_report_collectionfinish():
    return f"testing {MODULE}"


# pytest reads `pytest_plugins` in test modules too, so this one is its own plugin, and the hook above is called: the
# line stands under "collected ...". (pytest_report_header would be asked before any test module is imported.)
pytest_plugins = [__name__]


def same(got, want, why: str):
    __tracebackhide__ = True  # the line that calls says more
    assert got == want, f"{why}: got {got}, expected {want}"


def close(got, want, atol: float, why: str):
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda difference: f"{why}\n{difference}")


def refuses(names: str, function, *args, **kwargs):
    """The function has to raise a ValueError whose message names what is wrong."""
    with pytest.raises(ValueError) as error:
        pytest.fail(f"no error that names {names}, but {function(*args, **kwargs)}")
    assert names in str(error.value), f"the message should name what is wrong, {names}: {error.value}"


# ==== 1. Merging ============================================================================================

dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
size_dtypes = st.sampled_from([torch.int64, torch.float16, torch.float32, torch.float64])
SCALES = 2.0**-40, 2.0**-20, 2.0**20, 2.0**40  # around 1e-12, 1e-6, 1e6, 1e12: products are exact


@st.composite
def grids(draw):
    """(x (B, H, W, C) float64 of small integers, size (B, H, W), keep, axis)"""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)))
    x = torch.from_numpy(draw(hnp.arrays("float64", shape, elements=st.integers(-4, 4))))
    size = torch.from_numpy(draw(hnp.arrays("float64", shape[:3], elements=st.integers(1, 3))))
    axis = draw(st.sampled_from([1, 2]))
    return x, size, draw(st.integers(1, x.shape[axis])), axis


def merge_line_by_hand(tokens, sizes, keep):
    """One line in plain loops: the specification of merge_axis."""

    def similarity(a, b):
        norm_a, norm_b = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
        if norm_a == 0 or norm_b == 0:
            return float(norm_a == norm_b)
        return sum(u * v for u, v in zip(a, b, strict=True)) / (norm_a * norm_b)

    boundaries = sorted(range(len(tokens) - 1), key=lambda i: (similarity(tokens[i], tokens[i + 1]), i))
    cuts = set(boundaries[: keep - 1])
    merged, mass, parent, run = [], [], [], []
    for i, (token, size) in enumerate(zip(tokens, sizes, strict=True)):
        run.append((token, size))
        parent.append(len(merged))
        if i in cuts or i == len(tokens) - 1:
            total = sum(s for _, s in run)
            merged.append([sum(t[c] * s for t, s in run) / total for c in range(len(token))])
            mass.append(total)
            run = []
    return merged, mass, parent


@pytest.mark.task1
def test_merge_by_hand():
    """The smallest cases first, with numbers to follow on paper. Catches: the typical mistakes, one by one."""
    a, b, c, zero = [1.0, 0.0], [0.0, 1.0], [4.0, 3.0], [0.0, 0.0]  # similar: a b 0, a c 0.8, b c 0.6
    _, size, parent = merge_axis(torch.tensor([[[a, a, b]]]), torch.ones(1, 1, 3), 2, 2)
    why = "a a b: cut between the least similar neighbours, a and b, so that a new run starts behind the cut"
    same(parent.tolist(), [[[0, 0, 1]]], why)
    same(size.tolist(), [[[2, 1]]], "sizes of a a b, merged to 2: was the absorbed token's size added?")
    out, size, _ = merge_axis(torch.tensor([[[a, c]]]), torch.tensor([[[2.0, 1.0]]]), 1, 2)
    same(size.tolist(), [[[3]]], "sizes 2 and 1, merged to 1: was the absorbed token's size added?")
    why = "(1, 0) of size 2 and (4, 3) of size 1: is the mean weighted by size? (2 * 1 + 1 * 4) / 3 = 2"
    same(out.tolist(), [[[[2, 1]]]], why)
    for scale in SCALES:
        out, _, parent = merge_axis(torch.tensor([[[a, a, c]]]) * scale, torch.ones(1, 1, 3), 2, 2)
        why = f"a a c, times {scale:g}: is it the cosine that is compared (1 and 0.8), whatever the scale?"
        same((parent.tolist(), (out / scale).tolist()), ([[[0, 0, 1]]], [[[a, c]]]), why)
    out, _, parent = merge_axis(torch.tensor([[[a], [b], [c]]]), torch.ones(1, 3, 1), 2, 1)
    same(out.shape, (1, 2, 1, 2), "axis=1 merges along H")
    same(parent.flatten().tolist(), [0, 1, 1], "a | b c: 0 between a and b is less than 0.6 between b and c")
    parent = merge_axis(torch.tensor([[[zero, zero, c]]]), torch.ones(1, 1, 3), 2, 2)[2]
    same(parent.flatten().tolist(), [0, 0, 1], "0 0 c: two zero tokens are alike, and unlike anything else")
    parent = merge_axis(torch.ones(1, 1, 40, 3), torch.ones(1, 1, 40), 15, 2)[2]
    why = "40 equal tokens, keep=15: on a tie the lower index is cut (`topk` promises no order, `sort` if stable)"
    same(parent.flatten().tolist(), [min(i, 14) for i in range(40)], why)


@pytest.mark.task1
@given(grids())
def test_merge_equals_plain_loops(case):
    """Catches: unweighted means, off by one at the cut, the wrong axis, the wrong end of the ordering, ties,
    samples or lines that influence each other, a grid that is no rectangle any more."""
    x, size, keep, axis = case
    got = merge_axis(x.clone(), size.clone(), keep, axis)
    x, size, out, out_size, parent = (t.transpose(1, 2) if axis == 1 else t for t in (x, size, *got))
    for b, i in itertools.product(range(len(x)), range(x.shape[1])):
        line, sizes = x[b, i].tolist(), size[b, i].tolist()
        want, mass, runs = merge_line_by_hand(line, sizes, keep)
        why = f"tokens {line}, sizes {sizes}, keep={keep}:"
        cut = "is it the cosine similarity, are the least similar boundaries cut, on a tie those of lower index?"
        same(parent[b, i].tolist(), runs, f"{why} parent: {cut}")
        same(out_size[b, i].tolist(), mass, f"{why} sizes: was the absorbed token's size added?")
        same(out[b, i].tolist(), want, f"{why} tokens: is the mean weighted by size, divided by its sum?")


@pytest.mark.task1
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merge_computes_in_float32_or_better(dtype):
    """Catches: sums in half precision, where 2048 + 1 is 2048; similarities rounded so that differences vanish."""
    out, total, _ = merge_axis(torch.ones(1, 1, 4096, 2, dtype=dtype), torch.ones(1, 1, 4096), 1, 2)
    got = total.item(), out.flatten().tolist()
    same(got, (4096, [1, 1]), f"4096 {dtype} ones, merged: are sums taken in float32 or better?")
    step = 1e-5 if dtype == torch.float64 else 1 / 256  # cosines are 1 - step ** 2 / 2, 1 - 2 * step ** 2
    x = torch.tensor([[[[1, 0], [1, step], [1, 3 * step]]]], dtype=dtype)
    parent = merge_axis(x, torch.ones(1, 1, 3), 2, 2)[2].flatten().tolist()
    same(parent, [0, 0, 1], f"{dtype}, angles 0, {step:g}, {3 * step:g}: are cosines in float32 or better?")


@pytest.mark.task1
@given(grids(), dtypes, size_dtypes)
def test_merge_keeps_dtypes_gradients_and_inputs(case, dtype, size_dtype):
    """Catches: another dtype returned, no gradient (`no_grad`, `detach`), an input that was written into."""
    x, size, keep, axis = case
    leaf, size = x.to(dtype).requires_grad_(), size.to(size_dtype)
    x = leaf.clone()
    out, total, parent = merge_axis(x, size, keep, axis)
    got, want = (out.dtype, total.dtype, parent.dtype), (dtype, size_dtype, torch.int64)
    same(got, want, f"x {dtype}, size {size_dtype}: out, size and parent came back as")
    assert torch.equal(x, leaf) and torch.equal(size.double(), case[1]), "an input was changed"
    assert keep < x.shape[axis] or torch.equal(out, x), "keep is the whole axis: nothing may change"
    assert out.requires_grad, "x requires a gradient, and what was made of it does not"
    weight = (torch.arange(out.numel()) % 7).view_as(out).double()
    (gradient,) = torch.autograd.grad((out.double() * weight).sum(), leaf)
    share = (size.double() / total.double().gather(axis, parent))[..., None]  # of a token in its merged one
    want = weight.gather(axis, parent[..., None].expand_as(x)) * share
    # Two float32 operations, then one rounding to dtype.
    torch.testing.assert_close(gradient.double(), want, rtol=2 * max(EPS, torch.finfo(dtype).eps), atol=0)


@pytest.mark.task1
def test_merge_refuses_bad_input():
    """Catches: an answer where the caller made a mistake, an error that does not name it."""
    x, size = torch.ones(1, 3, 4, 2), torch.ones(1, 3, 4)
    refuses("(3, 4, 2)", merge_axis, x[0], size[0], 1, 1)
    refuses("int64", merge_axis, x.long(), size, 1, 1)
    refuses("(1, 4, 3)", merge_axis, x, size.transpose(1, 2), 1, 1)
    for names, *bad in [("=0", 0, 1), ("[1, 3]", 4, 1), ("[1, 4]", 5, 2), ("axis=0", 1, 0), ("axis=3", 1, 3)]:
        refuses(names, merge_axis, x, size, *bad)


@pytest.mark.task2
def test_plan_by_hand():
    """Catches: the wrong axis first, each axis shrunk to all of `keep`, a single step to its square root."""
    for args, want in [
        ((24, 24, 0.25, 4), [(2, 24, 18), (1, 18, 18), (2, 18, 12), (1, 12, 12)]),
        ((24, 24, 0.5625, 2), [(2, 24, 18), (1, 18, 18)]),
        ((4, 8, 0.25, 2), [(2, 4, 4), (1, 2, 4)]),
        ((9, 9, 0.25, 3), [(2, 9, 7), (1, 5, 7), (2, 5, 5)]),  # 6.75, 4.5 and 4.5: halves are rounded up
        ((4, 8, 0.25, 1), [(2, 4, 2)]),
        ((1, 1, 0.1, 2), [(2, 1, 1), (1, 1, 1)]),
        ((4, 8, 1.0, 2), []),
    ]:
        why = "steps alternate 2 (along W), 1 (along H), and each axis shrinks to the square root of `keep` of its"
        same(merge_plan(*args), want, f"merge_plan{args}: {why} full length, a single step to `keep`")
    for bad in [(0, 4, 0.5, 2), (4, 0, 0.5, 2), (4, 4, 0.5, 0), (4, 4, 0.0, 2), (4, 4, 1.5, 2)]:
        refuses(f"H={bad[0]}, W={bad[1]}, steps={bad[3]}", merge_plan, *bad)
    refuses("nan", merge_plan, 4, 4, math.nan, 2)


@pytest.mark.task2
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1, exclude_max=True), st.integers(1, 6))
def test_plan_alternates_and_arrives(H, W, keep, steps):
    """Catches: an axis that grows or vanishes, the wrong order of axes, a target missed, unequal portions."""
    plan, sides = merge_plan(H, W, keep, steps), [H, W]
    axes = [(2, 1)[step % 2] for step in range(steps)]
    same([axis for axis, _, _ in plan], axes, "axes: W (2) has its turn first, then W and H alternate")
    goal = keep if steps == 1 else math.sqrt(keep)
    for step, (axis, *now) in enumerate(plan):
        full = (H, W)[axis - 1]
        exact = max(1, full - full * (1 - goal) * (step // 2 + 1) / axes.count(axis))
        assert abs(now[axis - 1] - exact) <= 0.5 + 1e-9, (
            f"step {step} leaves {now[axis - 1]} of {full}, expected {exact:g} to the nearest: equal portions, to "
            f"{goal:g} of the full length (the square root of `keep`, in a single step `keep`)"
        )
        assert now[axis - 1] <= sides[axis - 1], f"step {step} goes from {sides} to {now}"
        sides[axis - 1] = now[axis - 1]
        same(now, sides, f"the grid after step {step} along axis {axis}: does the other axis stay?")


@pytest.mark.task2
def test_follow_by_hand():
    """Two rows of three, W merged to two columns, then H to one row. Catches: rows and columns mixed up."""
    place = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    for axis, parent, want in [
        (2, [[0, 0, 1], [0, 1, 1]], [[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1]]),
        (1, [[0, 0], [0, 0]], [[0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]]),
    ]:
        place = follow(place, torch.tensor([parent]), axis)
        why = f"rows and columns, after merging along axis {axis} with parent {parent}: that is the new row when"
        same([t[0].tolist() for t in place], want, f"{why} axis is 1 and the new column when axis is 2")


@pytest.mark.task2
@given(grids(), st.data())
def test_follow_equals_plain_loops(case, data):
    """Catches: rows and columns or samples mixed up when merges follow each other, an input written into."""
    x, size, _, first = case
    slots = list(itertools.product(range(x.shape[1]), range(x.shape[2])))
    place = tuple(torch.tensor([list(t)] * len(x)) for t in zip(*slots, strict=True))
    want = [slots for _ in x]
    for axis in (first, 3 - first):  # one merge along each axis
        x, size, parent = merge_axis(x, size, data.draw(st.integers(1, x.shape[axis])), axis)
        old_place, before = place, [t.tolist() for t in place]
        place = follow(old_place, parent, axis)
        same([t.tolist() for t in old_place], before, "the places before are the caller's, return new ones")
        for b, old in enumerate(want):
            new = [parent[b, i, j].item() for i, j in old]
            want[b] = [(t, j) if axis == 1 else (i, t) for (i, j), t in zip(old, new, strict=True)]
            got = list(zip(place[0][b].tolist(), place[1][b].tolist(), strict=True))
            same(got, want[b], f"sample {b}: where the tokens at {old} are after merging along {axis}")


@st.composite
def encoders(draw):
    """How an encoder lays out its tokens, patches per side of a slot, [(n, H, W)], keep, steps, and two numbers for
    each slot; one in three is wide and merged to little: then a home can be more than 256 slots away."""
    kind = draw(st.sampled_from(["tiles", "tiles with CLS", "packed", "windows"]))
    if draw(st.integers(0, 2)) == 0:
        unit, shapes, keep = 1, [(1, draw(st.integers(1, 2)), draw(st.integers(530, 600)))], 1e-6
    else:
        unit, keep = draw(st.integers(1, 2)), draw(st.floats(0.05, 0.99))
        shape = st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6))
        shapes = draw(st.lists(shape, min_size=1, max_size=1 if kind.startswith("tiles") else 3))
    total, element = sum(n * H * W for n, H, W in shapes), st.integers(-4, 4)
    x = draw(hnp.arrays("float32", (total, 2), elements=element, fill=element))
    return kind, unit, shapes, keep, draw(st.integers(1, 4)), torch.from_numpy(x)


@pytest.mark.task2
@given(encoders(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_signposts_say_what_was_merged(case, dtype):
    """What `Grids` merges and `deliver` writes, `read_sizes` reads. Catches: a number that bfloat16 rounds, a sign
    lost, positions counted from the start of the prompt, CLS taken for a patch, text that has a size, frames,
    pictures or windows mixed up, a home that is another token's, signposts in DeepStack features."""
    kind, unit, shapes, keep, steps, x = case
    cls, tiles, windows = int(kind == "tiles with CLS"), kind.startswith("tiles"), kind == "windows"
    tower = SimpleNamespace(window_size=4 * unit, patch_size=1, fullatt_block_indexes=[]) if windows else None
    parts = dict.fromkeys(["base", "decoder", "projector"]) | {"vision": tower, "blocks": [None] * steps}
    family = reference.Family(**parts, unit=unit, prefix=cls, prefix_slots=cls)
    config = LUVCConfig(vision_keep=keep, vision_steps=steps)
    merging = (reference.Grids if tiles else reference.PackedGrids)(family, config, shapes, "cpu")

    # Each slot has a channel of its own, so a merged token says which slots it is made of.
    (n, H, W), total, order = shapes[0], len(x), torch.arange(len(x))
    slots = torch.cat([4 * x, torch.eye(total)], 1)
    if tiles:
        patches = slots.view(n, H, 1, W, 1, -1).expand(-1, -1, unit, -1, unit, -1)
        patches = patches.reshape(n, H * W * unit**2, -1)
        patches = torch.cat([torch.full((n, cls, total + 2), 7.0), patches], 1)
    else:
        thw = torch.tensor([(n, H * unit, W * unit) for n, H, W in shapes])
        order = get_vision_window_index(thw, unit, 4 * unit, 1)[0] if windows else order
        patches = slots[order].repeat_interleave(unit**2, 0)
    for step in range(steps):
        patches = merging.merge(patches, step)
    slots = patches[:: unit**2]
    if tiles:
        assert (patches[:, :cls] == 7).all(), "CLS was merged"
        h, w = merging.size[0].shape[1:]
        slots = patches[:, cls:].view(n, h, unit, w, unit, -1)[:, :, 0, :, 0].flatten(0, 2)
    members = [(row > 0).nonzero()[:, 0].tolist() for row in slots[:, 2:]]
    same(sorted(itertools.chain(*members)), list(range(total)), "slots that the tokens are made of")
    index = torch.cat([token.flatten() for token in merging.tokens()])
    assert all((index[mine] == index[mine[0]]).all() for mine in members), "`tokens` splits a token's slots"

    # The projector makes 2, 3, 1 + k % 128, k // 128 of token k. Text is 2, 3, 0, 0 or zeros: no signposts.
    def projected(start, count):
        return torch.tensor([[2, 3, 1 + k % 128, k // 128] for k in range(start, start + count)], dtype=dtype)

    token, first = projected(0, len(members)), projected(9000, cls).view(1, cls, 4).expand(n, -1, -1)
    rows = torch.cat([first, token.view(n, -1, 4)], 1) if tiles else token
    if not cls and not windows:  # DeepStack features come first, and are added to what is alive
        deep = merging.deliver(rows, posts=False).reshape(total, 4)
        assert all((deep[mine] == token[k]).all() for k, mine in enumerate(members)), "a slot without feature"
    features = merging.deliver(rows, posts=True)
    features = features if tiles else features[order.argsort()]  # as Qwen2.5-VL does behind its projector
    pieces = features.unbind() if tiles else features.split([n * H * W for n, H, W in shapes])
    text = torch.tensor([[2, 3, 0, 0], [0, 0, 0, 0]], dtype=dtype)
    row = torch.cat([part for piece in pieces for part in (text, piece)])
    where = torch.cat([torch.tensor([0, 0] + [1] * cls + [2] * (len(piece) - cls)) for piece in pieces])
    sizes = reference.read_sizes(torch.stack([row * 0, row]), torch.stack([where < 0, where > 0]))
    assert (sizes[0] == 1).all() and (sizes[1, where < 2] == 1).all(), "text and CLS have size 1, in any row"
    features, sizes = row[where == 2], sizes[1, where == 2]
    for k, mine in enumerate(members):
        home = mine[(len(mine) - 1) // 2]
        want = [len(mine) * (slot == home) for slot in mine]
        same(sizes[mine].tolist(), want, f"sizes of a token's slots {mine}: the middle one stands for all")
        same(features[home].tolist(), token[k].tolist(), f"what slot {home} holds")


# ==== 2. Pruning ============================================================================================

cutoffs, directions, digits = st.floats(0, 1), st.sampled_from(["detail", "smooth"]), st.integers(0, 9)


@st.composite
def sequences(draw, max_n=17):
    """x (B, N, C) float32 of small integers"""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, max_n), st.integers(1, 3)))
    return torch.from_numpy(draw(hnp.arrays("float32", shape, elements=st.integers(-8, 8))))


def rounding(x):
    """Error bound of one FFT and its inverse in float32: a few eps per butterfly level, of the largest sum."""
    return 4 * EPS * (2 + math.log2(x.shape[1])) * max(1.0, x.abs().sum(1).max().item())


@pytest.mark.task3
def test_low_pass_by_hand():
    """Eight values, waves of frequency 0 (the mean) to 4. Catches: high frequencies kept, one too many or too few."""
    for number in range(5):
        wave = 3 * torch.cos(2 * math.pi * number * torch.arange(8) / 8)[None, :, None]
        why = f"frequency {number} {'passes' if number <= 2 else 'goes'}: with cutoff 0.5 half of the 4 frequencies"
        why += " beside the mean pass; are the low frequencies kept and the high ones set to zero?"
        close(low_pass(wave, 0.5), wave * (number <= 2), rounding(wave), why)


@pytest.mark.task3
@given(sequences(), cutoffs)
def test_low_pass_equals_the_sum_of_waves(x, cutoff):
    """Catches: the high frequencies kept instead, one frequency too many or too few, a filter along the channels,
    rounding where everything passes."""
    N, want = x.shape[1], torch.zeros_like(x, dtype=torch.float64)
    passed = math.floor(cutoff * (N // 2) + 0.5)
    for k in range(-passed, passed + 1):  # the projection on each wave, by its definition
        wave = torch.exp(2j * math.pi * k * torch.arange(N, dtype=torch.float64) / N)[None, :, None]
        if N % 2 == 0 and abs(k) == N // 2:
            wave = wave / math.sqrt(2)  # +N/2 and -N/2 are one and the same wave
        want += ((x * wave.conj()).sum(1, keepdim=True) / N * wave).real
    why = f"not the sum of the {passed + 1} slowest waves (of {N // 2 + 1}) along dim 1: are the low frequencies the"
    why += " ones that pass, is their number rounded to the nearest, is DC counted?"
    close(low_pass(x, cutoff).double(), want, rounding(x), why)
    assert torch.equal(low_pass(x / 3, 1.0), x / 3), "everything passes: not a bit may change"


@pytest.mark.task3
@given(sequences(), cutoffs, dtypes, st.sampled_from([2.0**-20, 2.0**20]))
def test_filter_dtype_dim_gradient_and_scale(x, cutoff, dtype, scale):
    """Catches: an FFT in half precision, another dimension, no gradient, absolute thresholds, an input changed."""
    want, leaf = low_pass(x, cutoff), x.clone().requires_grad_()
    got = low_pass(x.to(dtype), cutoff)  # these integers are the same in every dtype
    assert got.dtype == torch.float32 and torch.equal(got, want), f"{dtype} is filtered in another way"
    for dim in (0, 2, -1):
        got = low_pass(x.movedim(1, dim).contiguous(), cutoff, dim=dim).movedim(dim, 1)
        close(got, want, rounding(x), f"dim={dim} is not the dimension that was filtered")
    assert torch.equal(low_pass(x * scale, cutoff), want * scale), f"times {scale:g} it passes in another way"
    for score in ("detail", "smooth"):
        once, scaled = (spectral_score(t, cutoff, score) for t in (x, x * scale))
        assert torch.equal(scaled, once * scale), f"tokens times {scale:g} score in another way"
        assert torch.equal(spectral_score(x.to(dtype), cutoff, score), once), f"{dtype} scores in another way"
    # The filter is a projection, so half the square of what passes has the gradient that passes.
    (gradient,) = torch.autograd.grad(low_pass(leaf, cutoff).square().sum() / 2, leaf)
    close(gradient, want, 2 * rounding(x), "the gradient of the filter is lost")
    assert torch.equal(leaf, x), "the filter changed its input"


@pytest.mark.task3
@given(sequences(), cutoffs, st.integers(0, 16))
def test_score_measures_what_it_says_anywhere(x, cutoff, shift):
    """The paper's position invariance, as a property. Catches: detail and smooth swapped, another default; zero
    padding, windows, differences of neighbours."""
    slow = low_pass(x, cutoff)
    for score, what, want in (("smooth", "passes", slow), ("detail", "removes", x - slow)):
        got, moved = spectral_score(x, cutoff, score), spectral_score(x.roll(shift, dims=1), cutoff, score)
        why = f'"{score}" is the norm of what the filter {what}: swapped?'
        close(got, want.norm(dim=-1), 16 * rounding(x), why)
        why = f"tokens shifted in a circle by {shift} must shift their scores, not change them"
        close(moved, got.roll(shift, dims=1), 16 * rounding(x), why)
    assert torch.equal(spectral_score(x), spectral_score(x, 0.5, "detail")), "defaults: detail, cutoff 0.5"


@pytest.mark.task3
def test_prune_by_hand():
    """Ones everywhere, but for two tokens that differ. Catches: the lowest scores kept, positions not in order, ties
    to the higher index, the neighbours of a huge token taken for detail."""
    x = torch.ones(1, 64, 2)
    x[0, 2], x[0, 50] = torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, -1.0])  # 50 differs most
    why = "tokens 50 and 2 are the odd ones out, in this order: the *highest* scores are kept, on a tie the lower"
    for keep, want in ((0, []), (1, [50]), (2, [2, 50]), (4, [0, 1, 2, 50]), (64, list(range(64)))):
        got = spectral_prune(x, keep, 0.0)[0].tolist()
        same(got, want, f"{why} index, and positions are returned in ascending order; keep={keep}")
    x[0, 30] *= 1000  # the same direction as most others, only longer
    for scale in SCALES:
        got = spectral_prune(x * scale, 2, 0.5).tolist()
        same(got, [[2, 50]], f"token 30 is only longer, all times {scale:g}: is each brought to norm 1?")


@pytest.mark.task3
@given(sequences(), cutoffs, directions, dtypes, st.sampled_from(SCALES), st.data())
def test_prune_keeps_the_highest_scores_in_order(x, cutoff, score, dtype, scale, data):
    """Catches: unsorted positions, the lowest scores kept, a wrong count, absolute thresholds, half precision."""
    keep, before = data.draw(st.integers(0, x.shape[1])), x.clone()
    chosen = spectral_prune(x, keep, cutoff, score)
    same((chosen.shape, chosen.dtype), ((len(x), keep), torch.int64), f"keep={keep} of {len(x)} samples")
    assert (chosen.diff(dim=1) > 0).all(), f"positions ascend, and none comes twice: {chosen.tolist()}"
    for t, what in ((x * scale, f"times {scale:g}"), (x.to(dtype), f"in {dtype}")):
        got = spectral_prune(t, keep, cutoff, score)
        same(got.tolist(), chosen.tolist(), f"only directions count, but {what} it keeps others")
    assert torch.equal(x, before), "pruning changed its input"
    scores = spectral_score(normalize(x, dim=-1), cutoff, score)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    lowest, highest = scores.masked_fill(~kept, torch.inf).amin(1), scores.masked_fill(kept, 0.0).amax(1)
    # Scores tie in steps of 1 / 16384 of the highest one, or of some 64 roundings if that is more.
    assert (highest <= lowest + scores.amax(1) / 16384 + 64 * EPS).all(), (
        f"scores {scores.tolist()}, keep={keep}: kept {chosen.tolist()}, not the highest of tokens of norm 1"
    )


@pytest.mark.task3
@given(st.integers(1, 40), st.lists(st.integers(-9, 9), min_size=1, max_size=4), cutoffs, st.data())
def test_prune_constant_signal_is_all_ties(N, token, cutoff, data):
    """Catches: rounding noise of the FFT that decides between tokens which are all alike, a sort that is not stable."""
    keep, x = data.draw(st.integers(0, N)), torch.tensor(token, dtype=torch.float32).expand(1, N, len(token))
    got = spectral_prune(x, keep, cutoff)[0].tolist()
    same(got, list(range(keep)), "all tokens are alike: is noise no score, and the sort stable?")


@pytest.mark.task3
def test_prune_ties_up_to_rounding():
    """With 4 or 6 tokens and cutoff 0.5 only the highest frequency is detail, and every token has as much of it.
    Catches: a choice that depends on the attention kernel that computed the tokens; ties that straddle two steps."""
    noise = torch.Generator().manual_seed(0)
    for N, spread in itertools.product((4, 6), (1.0, 0.1, 0.03)):  # tokens of deep layers are alike
        x = torch.randn(2000, 1, 64, generator=noise) + spread * torch.randn(2000, N, 64, generator=noise)
        # A direction moves by at most 5e-7, so two scores part by at most 1e-6 and their own rounding. Steps are 32
        # eps or more, and the highest score stands on one: less than half a step below it is a tie.
        for tokens in (x, x * (1 + 1e-6 * (torch.rand(x.shape, generator=noise) - 0.5))):
            others = (spectral_prune(tokens, N // 2, 0.5) != torch.arange(N // 2)).any(1).sum().item()
            same(
                others,
                0,
                f"samples of 2000 with {N} tokens where scores tie up to rounding and others are kept",
            )


@pytest.mark.task3
def test_scores_in_a_projection():
    """Catches: a projection that changes from call to call or takes numbers from the global generator, one that
    does not keep lengths, one that is left out, one that cannot be trained through after inference."""
    C, channels, N = 256, 64, 400
    with torch.inference_mode():
        torch.manual_seed(1)
        first = reference.projection(C, channels, torch.device("cpu"), torch.float32)
        after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the global random numbers are the caller's"
    reference.projection.cache_clear()
    assert torch.equal(first, reference.projection(C, channels, torch.device("cpu"), torch.float32))
    x = torch.randn(1, N, C, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (x @ first).sum().backward()  # refused for tensors that were made in inference mode
    x = x.detach()
    ratio = (x @ first).square().sum() / x.square().sum()
    # One squared length varies by sqrt(2 / channels). The mean over N tokens varies less, but not below what the one
    # projection that they share gives all of them: 1 / sqrt(C) of that. Six standard deviations of both.
    assert abs(ratio - 1) < 6 * math.sqrt(2 / channels) * (1 / math.sqrt(N) + 1 / math.sqrt(C)), ratio
    want, full = spectral_prune(x @ first, 100), spectral_prune(x, 100, channels=C)
    assert torch.equal(spectral_prune(x, 100), want), "tokens wider than 64 are scored in the projection"
    assert torch.equal(full, spectral_prune(x, 100, channels=2 * C)) and not torch.equal(full, want)
    for half in (x.half(), x.bfloat16()):
        assert spectral_prune(half, 100).shape == (1, 100), "the projection has to have the tokens' dtype"
        want = spectral_prune(half.float(), 100, channels=C)
        assert torch.equal(spectral_prune(half, 100, channels=C), want), "norms and scores are float32's"


def inherit_by_hand(sizes, kept):
    """Plain loops: the specification of inherit."""
    answer = [0] * len(kept)
    for i, size in enumerate(sizes):
        answer[min(range(len(kept)), key=lambda k: (abs(kept[k] - i), k))] += size
    return answer


@pytest.mark.task3
def test_inherit_by_hand():
    """Seven tokens of sizes 1, 2, 4, ...: each sum says which ones it is made of. Catches: sizes that are lost, or
    go to the later on a tie."""
    size = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64]])
    why = "tokens 1 and 5 are kept: a pruned token's size goes to the nearest kept token, that of token 3, between"
    got = inherit(size.clone(), torch.tensor([[1, 5]])).tolist()
    same(got, [[1 + 2 + 4 + 8, 16 + 32 + 64]], f"{why} both, to the earlier")
    same(inherit(size, torch.tensor([[4]])).tolist(), [[127]], "one token is left: it stands for all")


@pytest.mark.task3
@given(hnp.arrays("int64", st.tuples(st.integers(1, 2), st.integers(1, 20)), elements=digits), st.data())
def test_inherit_equals_plain_loops(sizes, data):
    """Catches: sizes that are lost or counted twice, ties to the later, off by one, what lies before the first
    kept token or behind the last one forgotten, another dtype, samples mixed up, an input written into."""
    sizes, N = torch.from_numpy(sizes).to(data.draw(size_dtypes)), sizes.shape[1]
    keep = data.draw(st.integers(1, N))
    choice = st.permutations(range(N)).map(lambda order: sorted(order[:keep]))
    kept = torch.tensor([data.draw(choice) for _ in sizes])
    before, at = sizes.tolist(), kept.tolist()
    got = inherit(sizes, kept)
    same((sizes.tolist(), kept.tolist()), (before, at), "an input was changed")
    same(got.dtype, sizes.dtype, "the dtype in which sizes came back")
    want = [inherit_by_hand(*row) for row in zip(before, at, strict=True)]
    why = "each pruned token's size goes to the nearest kept token, on a tie to the earlier"
    same(got.tolist(), want, f"sizes {before}, kept {at}: {why}")


@pytest.mark.task3
def test_pruning_refuses_bad_input():
    """Catches: an answer where the caller made a mistake, an error that does not name it."""
    x = torch.ones(1, 4, 2)
    for bad in (x.long(), torch.ones(1, 0, 2)):
        refuses(f"{tuple(bad.shape)}, {bad.dtype}", low_pass, bad, 0.5)
    refuses("()", low_pass, torch.tensor(1.0), 0.5, dim=0)
    for cutoff in (1 + 1e-9, -1e-9, math.nan):
        refuses(f"cutoff={cutoff}", low_pass, x, cutoff)
    for function, keep in ((spectral_score, ()), (spectral_prune, (2,))):
        refuses("(4, 2)", function, x[0], *keep)
        refuses("rough", function, x, *keep, score="rough")
    for keep in (5, -1):
        refuses(f"keep={keep}", spectral_prune, x, keep)
    assert spectral_prune(torch.ones(2, 0, 3), 0).shape == (2, 0), "0 of no tokens are 0 tokens, no error"


# ==== 3. Settings ===========================================================================================

ABOVE_0, ABOVE_1 = math.nextafter(0, 1), math.nextafter(1, 2)
NO_FRACTIONS = [-ABOVE_0, ABOVE_1, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("vision_keep", [ABOVE_0, 0.5, 1, 1.0], [0, 0.0, *NO_FRACTIONS, None, "half"]),
        ("vision_steps", [1, 2, 7], [0, -1, 1.5, 2.0, math.nan, math.inf, None, "2"]),
        ("llm_keep", [None, 0, 0.0, ABOVE_0, 0.5, 1, 1.0], [*NO_FRACTIONS, "half", ""]),
        ("llm_keep", [(0.5,), (1, 0.5, 0.5, 0), (0, 0)], [(), *[(f,) for f in NO_FRACTIONS], (1, math.nan)]),
        ("llm_keep", [[1, 0.0]], [(0.5, -ABOVE_0), (0.5, "0"), (1, None), (0, ABOVE_0), (1, 0.5, 0.6, 0)]),
        ("sizes", [True, False], [None, 1, "no"]),
        ("merge", [merge_axis, lambda x, size, keep, axis: None], [None, 3, "merge_axis"]),
        ("prune", [spectral_prune, functools.partial(spectral_prune, cutoff=0.25)], [None, 3, "detail"]),
    ],
)
def test_settings_are_checked_when_made(name, good, bad):
    """Catches: a bound that is off or open where it is closed, NaN that passes every comparison, a message that
    does not name the value."""
    for value in good:
        want = tuple(value) if isinstance(value, list) else value
        same(getattr(LUVCConfig(**{name: value}), name), want, f"{name}={value!r}")
    for value in bad:
        shown = repr(value) if name in ("merge", "prune", "sizes") else value
        refuses(f"{name}={shown}", LUVCConfig, **{name: value})


def test_fractions_of_layers():
    """Catches: a schedule off by one layer, so that tokens are left in the last one; fractions for another number of
    layers; settings that the caller can change afterwards."""
    for layers in range(2, 61):
        got, want = LUVCConfig().fractions(layers), [(layers - 1 - n) / (layers - 1) for n in range(layers)]
        assert got == pytest.approx(want, rel=0, abs=1e-15) and (got[0], got[-1]) == (1, 0), got
    keep = [1, 0.5, 0]
    config = LUVCConfig(llm_keep=keep)
    keep[0] = 0
    half, one = LUVCConfig(llm_keep=0.5), LUVCConfig(llm_keep=1)
    for made, want in [(config, [1, 0.5, 0]), (half, [0.5] * 3), (one, [1])]:
        got = made.fractions(len(want))
        same(got, want, f"fractions of {len(want)} layers with llm_keep={made.llm_keep}")
        assert all(type(fraction) is float for fraction in got), f"integers among {got}"
    for made, layers in [(config, 2), (config, 4), (LUVCConfig(), 1)]:
        refuses(f"fit {layers} decoder layers", made.fractions, layers)
    defaults = {"vision_keep": 0.5625, "vision_steps": 2, "llm_keep": None, "sizes": True}
    same(LUVCConfig(), LUVCConfig(**defaults, merge=merge_axis, prune=spectral_prune), "the default settings")
    with pytest.raises(AttributeError):
        config.vision_keep = 0.1


# ==== B. The wrapper ========================================================================================
#
# Pruning by hand first. Then tiny random models of every family are compared with one reference, `dense`, which masks
# what LUVC removes. Only LLaVA's tests carry a task: the assignment needs no other family.


def keep_last(x, keep):
    """A scheme that is easy to follow on paper, in place of `spectral_prune`."""
    return torch.arange(x.shape[1] - keep, x.shape[1]).expand(len(x), keep)


def prompts_by_hand(rows, sizes, fractions, slots, choose):
    """[(index, sizes)] of each layer, as lists, for rows of letters: v visual, f visual and a new frame, p padding."""
    visual = torch.tensor([[letter in "vf" for letter in row.split()] for row in rows])
    begins = torch.tensor([[letter == "f" for letter in row.split()] for row in rows])
    prompt = reference.Prompt(visual, torch.tensor(sizes).float(), begins, None, fractions, slots)
    hidden, out = torch.arange(visual.numel()).view(*visual.shape, 1).float(), []
    for _ in fractions:
        index, size = prompt.prune(hidden, choose)
        prompt.layers.append((prompt.size, 0))
        out.append((None if index is None else index.tolist(), size.tolist()))
    return out


@pytest.mark.task4
def test_prompt_by_hand():
    """Prompt.prune on t v v v v t p: two of text, a picture of four tokens, padding; the last tokens stay."""
    asked = []

    def choose(x, keep):
        asked.append((x[0, :, 0].tolist(), keep))
        return keep_last(x, keep)

    got = prompts_by_hand(
        ["t v v v v t p"], [[1, 2, 4, 8, 16, 1, 0]], [1.0, 0.75, 0.75, 0.25, 0.0], 4, choose
    )
    indices = [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 4, 5], [0, 5]]
    sizes = [[1, 2, 4, 8, 16, 1], [1, 6, 8, 16, 1], [1, 6, 8, 16, 1], [1, 30, 1], [1, 1]]
    for layer, (index, size) in enumerate(got):
        assert index == [indices[layer]], (
            f"layer {layer} processes {index}, expected {[indices[layer]]}: all of the text, no padding, and the "
            "visual tokens that the scheme kept, ascending; how many is a fraction of the four *delivered*"
        )
        assert size == [sizes[layer]], (
            f"layer {layer}: these have sizes {size}, expected {[sizes[layer]]}: a token that is pruned for a "
            "layer passes its size on in this layer already (`inherit`), and text has size 1"
        )
    assert asked == [([1, 2, 3, 4], 3), ([2, 3, 4], 1), ([4], 0)], (
        f"the scheme was asked (tokens, keep) = {asked}: it sees the layer's input at the visual tokens that are "
        "left, and is asked only where fewer are to be kept than are left"
    )
    assert prompts_by_hand(["t t t"], [[1, 1, 1]], [1.0], 4, choose) == [(None, [[1, 1, 1]])], (
        "every position is processed: return None for the index, so that nothing is gathered"
    )


@pytest.mark.task4
def test_pictures_stand_alone_by_hand():
    """Two pictures of 4 slots side by side, one half merged, and a clip of 2 frames; beside it a picture of 6, which 4
    does not divide, and a clip of 3. Catches: pieces that are pruned together, or with another sample's fractions."""
    rows = ["t v v v v v v v v t v v v f v v t", "p p t v v v v v v t v v f v f v t"]
    sizes = [[1, 2, 0, 0, 2] + [1] * 12, [0, 0] + [1] * 15]
    pieces = [
        [[1, 4], [5, 6, 7, 8], [10, 11, 12], [13, 14, 15]],
        [[3, 4, 5, 6, 7, 8], [10, 11], [12, 13], [14, 15]],
    ]
    asked = []

    def choose(x, keep):
        asked.extend((tokens.int().tolist(), keep) for tokens in x[..., 0])
        return keep_last(x, keep)

    got = prompts_by_hand(rows, sizes, [1.0, 0.5], 4, choose)
    want = [([p + 17 * b for p in piece], (len(piece) + 1) // 2) for b in (0, 1) for piece in pieces[b]]
    assert sorted(asked) == sorted(want), f"pruned by themselves were (tokens, keep) {asked}, expected {want}"
    for (layer, (index, size)), b in itertools.product(enumerate(got), (0, 1)):
        text = [p for p, letter in enumerate(rows[b].split()) if letter == "t"]
        here = sorted(text + [p for piece in pieces[b] for p in piece[len(piece) // 2 * layer :]])
        n, where = len(here), f"layer {layer}, sample {b}"
        assert index[b][:n] == here, f"{where}: index {index[b]}, expected {here}, and fillers behind them"
        assert min(size[b][:n]) > 0 and size[b][n:] == [0] * (len(index[b]) - n), (
            f"{where}: sizes {size[b]}: what fills a shorter sample up has size 0, and nothing else has"
        )
        assert sum(size[b]) == sum(sizes[b]), f"{where}: sizes {size[b]} sum to another number than before"
    assert len(got[1][0][0]) == len(got[1][0][1]), "samples are filled up to the longest one"
    with pytest.raises(
        ValueError, match="sample 1 ends with a merged picture"
    ):  # who would speak the next word?
        prompts_by_hand(["v t", "t v"], [[2, 1], [1, 0]], [1.0], 1, choose)


@pytest.mark.task4
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_layer_by_hand(attention):
    """run_layer around a "layer" that adds 100: what it gets and gives, where samples keep 1 of 2 and 2 of 3 tokens."""
    model, seen = tiny(attention=attention), {}
    hidden, table = torch.arange(10.0).view(2, 5, 1).requires_grad_(), torch.arange(5.0).view(1, 5, 1)
    visual = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]).bool()
    size = [[1.0, 3, 5, 1, 1], [0, 1, 2, 4, 1]]

    def plain(x, **kwargs):
        seen.update(kwargs, x=x)
        return x + 100

    config = LUVCConfig(vision_keep=1.0, llm_keep=[0.5, 0.5, 0.0, 0.0], prune=keep_last)
    with LUVC(model, config):
        layer, cache = model.model.language_model.layers[0], DynamicCache()
        store, *_ = cache.layers = [reference.PrunedLayer() for _ in range(LAYERS)]
        fractions = config.fractions(LAYERS)
        prompt = reference.Prompt(visual, torch.tensor(size), torch.zeros_like(visual), cache, fractions, 0)
        more = {"position_embeddings": (table, -table), "position_ids": torch.arange(5)[None]}
        out = reference.run_layer(layer, plain, 0, config, hidden, prompt=prompt, **more)
    assert seen["x"].tolist() == [[[0], [2], [3], [4]], [[7], [8], [9], [5]]], (
        f"the layer ran on {seen['x'].tolist()}: gather the rows that `prompt.prune` lists, fillers last"
    )
    assert out[..., 0].tolist() == [[100, 1, 102, 103, 104], [5, 6, 107, 108, 109]], (
        f"the output is {out[..., 0].tolist()}: rows that the layer processed are 100 higher and back in their places, "
        "a pruned token, padding and a filler are as they were"
    )
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    assert (gradient == 1).all(), (
        f"the gradient of the output's sum is {gradient[..., 0].tolist()}, expected ones: each row goes to one row"
    )
    for got, sign in zip(seen["position_embeddings"], (1, -1), strict=True):
        assert (sign * got[..., 0]).tolist() == [[0, 2, 3, 4], [2, 3, 4, 0]], (
            f"rotary positions {got[..., 0].tolist()}: they are those of the logical sequence, not renumbered"
        )
    assert seen["position_ids"] is None, "gaps in position_ids look like packed sequences to FlashAttention"
    mask = seen["attention_mask"]  # eager attention is handed one in any case, fused kernels need none
    assert mask is None if attention == "sdpa" else mask.shape[-2:] == (4, 4), (
        f"a mask {mask}: transformers makes it anew for the short sequence of 4 (`causal_mask`)"
    )
    want = torch.tensor([[1.0, 8, 1, 1], [3, 4, 1, 0]]).log().clamp(min=-1000) / layer.self_attn.scaling
    assert torch.equal(store.bias, want), (
        f"the cache's layer was told the bias {store.bias.tolist()}, expected log(size) / scaling, that is "
        f"{want.tolist()}; the weight of a filler is e^-1000"
    )
    assert store.seen == 5, f"the layer has seen {store.seen} positions, expected 5: logical ones are counted"
    assert [(s.tolist(), past) for s, past in prompt.layers] == [([[1, 0, 8, 1, 1], [0, 0, 3, 4, 1]], 0)], (
        f"prompt.layers is {prompt.layers}: note the sizes of all positions, and how many columns were stored"
    )


# ---- Models, prompts and the reference ---------------------------------------------------------------------

IMAGE, VIDEO, START, END = 60, 61, 62, 63  # placeholders, and what Qwen puts around pictures and clips
LAYERS, SIDE = 4, 6  # decoder layers; a tile has 6 x 6 slots
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 24, "patch_size": 4, "projection_dim": 32}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "image_size": 24, "patch_size": 4}
INTERNVL = {**TOWER, "image_size": [48, 48], "patch_size": [4, 4]}
IDEFICS = {**TOWER, "image_size": 48, "patch_size": 4}
QWEN = {"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48}
QWEN |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1, 3]}  # 2 x 2 slots
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
    "llava_next": ("LlavaNext", CLIP, MISTRAL, TILES),
    "llava_onevision": ("LlavaOnevision", SIGLIP, QWEN2, TILES | FULL),
    "internvl": ("InternVL", INTERNVL, QWEN3, SHUFFLE),
    "idefics3": ("Idefics3", IDEFICS, LLAMA, {"scale_factor": 2}),
    "smolvlm": ("SmolVLM", IDEFICS, LLAMA, {"scale_factor": 2}),
    "qwen2_vl": ("Qwen2VL", QWEN | {"embed_dim": 32, "mlp_ratio": 2}, MROPE, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", QWEN | WINDOWS, MROPE, {}),
    "qwen3_vl": ("Qwen3VL", QWEN | DEEP, MROPE | {"head_dim": 8}, {}),
}
QWENS = [name for name in FAMILIES if name.startswith("qwen")]
PRUNED_ONLY = ["llava_next", "llava_onevision"]
TASK4 = [pytest.param(n, marks=pytest.mark.task4) if n.startswith("llava-") else n for n in FAMILIES]
every_family = pytest.mark.parametrize("name", TASK4)
merging_family = pytest.mark.parametrize("name", [name for name in TASK4 if name not in PRUNED_ONLY])


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
    model.name, model.slots = name, SIDE**2 + (name == "llava-full")  # of a tile
    return model


@torch.no_grad()
def part_of_prompt(model, part):
    """(ids, tensors) of one part of a prompt: an id, None for padding, or a picture or clip as processors make it.

    "image" is a picture, "tall" one of another size or of two tiles, "video" a clip of three frames, "clip" one of
    two; a number behind it is the seed of its pixels: "image", "image7".
    """
    if not isinstance(part, str):
        return [part or 0], {}
    kind = part.rstrip("0123456789")
    noise = torch.Generator().manual_seed(int(part.removeprefix(kind) or 0))
    if model.name in QWENS:
        shapes = {"image": (1, 4, 6), "tall": (1, 6, 3), "video": (3, 4, 6), "clip": (2, 4, 6)}
        frames, H, W = shapes[kind]
        token, media, suffix = (IMAGE, "image", "") if frames == 1 else (VIDEO, "video", "_videos")
        between = [END, 9, START] if model.name == "qwen3_vl" else []  # time stamps
        ids = [START, *([token] * (H * W) + between) * (frames - 1), *[token] * (H * W), END]
        # Patches, four of them a slot; each RGB x 2 pictures in time x 4 x 4 pixels.
        pixels = torch.randn(frames * 4 * H * W, 3 * 2 * 4 * 4, generator=noise)
        grid = torch.tensor([[frames, 2 * H, 2 * W]])
        return ids, {f"pixel_values{suffix}": pixels, f"{media}_grid_thw": grid}
    if model.name in PRUNED_ONLY:
        size = torch.tensor([[44, 20] if kind == "tall" else [30, 44]])
        tiles = image_size_to_num_patches(size[0], model.config.image_grid_pinpoints, 24)
        pixels = torch.randn(1, tiles, 3, 24, 24, generator=noise)
        slots = len(model.model.get_image_features(pixels, size).pooler_output[0])
        return [IMAGE] * slots, {"pixel_values": pixels, "image_sizes": size}
    tiles, side = 1 + (kind == "tall"), 24 if "llava" in model.name else 48
    return [IMAGE] * (tiles * model.slots), {
        "pixel_values": torch.randn(tiles, 3, side, side, generator=noise)
    }


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
    pad = functools.partial(
        torch.nn.utils.rnn.pad_sequence, batch_first=True
    )  # black tiles, which are left out
    for key in dict.fromkeys(key for row in parts for _, more in row for key in more):
        rows_of = [[more[key] for _, more in row if key in more] for row in parts]
        values = [value for row in rows_of for value in row]
        if model.name in PRUNED_ONLY and key == "pixel_values":
            values = [pad([tiles[0] for tiles in values])]
        elif model.name in ("idefics3", "smolvlm"):  # (B, tiles, 3, H, W)
            values = [pad([torch.cat(row) if row else torch.zeros(0, 3, 48, 48) for row in rows_of])]
        inputs[key] = torch.cat(values)
    return inputs


def pieces_of(model, ids):
    """[(placeholder, slots)] of each picture, tile or frame in a row of ids: in these LUVC merges and prunes."""
    pieces = []
    for token in (IMAGE, VIDEO):  # pictures are encoded first
        at, count = (ids == token).nonzero()[:, 0].tolist(), itertools.count()
        for _, run in itertools.groupby(at, key=lambda i, count=count: i - next(count)):
            run = list(run)
            whole = model.name in PRUNED_ONLY or (model.name in QWENS and token == IMAGE)
            length = len(run) if whole else 24 if token == VIDEO else model.slots
            pieces += [(token, run[first : first + length]) for first in range(0, len(run), length)]
    return pieces


def sizes_by_hand(groups, cls=0):
    """{slot that a merged token goes to: how many slots it stands for}: the middle one of its slots."""
    members = {}
    for slot, token in enumerate(groups):
        members.setdefault(token, []).append(slot + cls)
    homes = {group[(len(group) - 1) // 2]: len(group) for group in members.values()}
    return dict.fromkeys(range(cls), 1) | dict(sorted(homes.items()))


def spy(module, note):
    """Calls `note` with what a module is given: its first argument, and those by name."""
    return module.register_forward_pre_hook(lambda _, a, k: note((*a, *k.values())[0], k), with_kwargs=True)


def dense(model, inputs, config):
    """The reference: nothing is removed. Full length in every layer; a position that is pruned, dead or padding is
    hidden from all others by a mask, its row is not updated, and a key of size s has log(s) added to its logits.

    From LUVC it takes the encoder's features, and which slots were merged (`groups`): the encoder has a test of its
    own. Returns (logits (B, S, vocabulary), kept): kept[layer][sample] is {position: size} of what a layer processes.
    """
    given, groups, luvc = {}, [], LUVC(model, dataclasses.replace(config, llm_keep=1.0))
    decoder = luvc.family.decoder
    with luvc:
        handles = [spy(decoder, lambda _, kwargs: given.update(kwargs))]
        if luvc.merges:  # pictures and clips are two calls of the encoder
            hook = luvc.family.projector.register_forward_hook(lambda *_: groups.extend(luvc.groups))
            handles.append(hook)
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
    embeds, at = given["inputs_embeds"], given.get("position_ids")
    (B, S), ids = embeds.shape[:2], inputs["input_ids"]
    at = (
        torch.arange(S)[None] if at is None else at[1:] if len(at) == 4 else at
    )  # Qwen: text, time, row, column
    cos_sin = [t.expand(B, -1, -1) for t in decoder.rotary_emb(embeds, position_ids=at)]
    deep, visual = given.get("deepstack_visual_embeds") or [], given.get("visual_pos_masks")
    pieces = [[] for _ in ids]  # of each sample, as {position: size}
    queue = iter(groups)
    for token, (b, row) in itertools.product((IMAGE, VIDEO), enumerate(ids)):  # the order of encoding
        for piece in [piece for kind, piece in pieces_of(model, row) if kind == token]:
            homes = sizes_by_hand(next(queue).tolist(), model.name == "llava-full") if groups else {}
            pieces[b].append({piece[slot]: homes.get(slot, 1) for slot in homes or range(len(piece))})
    logits, kept = [], [[] for _ in range(LAYERS)]
    for b, pictures in enumerate(pieces):
        hidden, delivered = embeds[b : b + 1], [len(picture) for picture in pictures]
        slots = {slot for _, piece in pieces_of(model, ids[b]) for slot in piece}
        text = {i: 1 for i in range(S) if inputs["attention_mask"][b, i] and i not in slots}
        for number, (layer, fraction) in enumerate(
            zip(decoder.layers, config.fractions(LAYERS), strict=True)
        ):
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
            out = layer(hidden, attention_mask=hide[None, None], position_embeddings=rotary)
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


def both(name, **changes):
    """Settings with both units, or with the pruner alone where the merger is refused."""
    return LUVCConfig(**({"vision_keep": 1.0 if name in PRUNED_ONLY else 0.45} | changes))


def ragged(name):
    """Three rows: different pictures side by side, a clip where the family has such; one picture; none."""
    clip = ["video3", 8] if name in QWENS else []
    return [[1, "image1", 5, *clip, "tall2", "image4", 6, 7], [1, "tall5", 5, 6], [1, 2, 3]]


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
            out = luvc.model(**inputs, past_key_values=cache)
            words = end - start == 1  # of which `kept` does not speak
            for layer, b in itertools.product(range(0 if words else LAYERS), range(len(rows))):
                got = dict(zip(luvc.kept[layer][b].tolist(), luvc.sizes[layer][b].tolist(), strict=True))
                want = {p: size for p, size in kept[layer][b].items() if start <= p < end}
                where = f"turn {turn}, layer {layer}, sample {b}"
                assert list(got) == list(want), f"{where}: processed {list(got)}, the reference {list(want)}"
                assert got == want, f"{where}: sizes {got}, in the reference {want}"
            agree(
                out.logits, logits[:, start:end], f"turn {turn}: other logits than with pruned tokens masked"
            )
            assert cache.get_seq_length() == end, "the cache counts logical positions, not stored ones"
            yield out

    return speak


def same_as_the_reference(model, config, turns, side="left", attached=None):
    speak = conversation(model, config, turns, side)
    with LUVC(attached or model, config) as luvc:
        assert len(list(speak(luvc))) == len(turns)
    return luvc


# ---- The wrapper as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_off_is_bit_identical(name):
    """Catches: anything computed or asked in another way although nothing is merged or pruned (a prompt may end with
    a picture); a report that is not that of the latest prefill, once words were generated."""
    model, off = tiny(name), LUVCConfig(vision_keep=1.0, llm_keep=[1.0] * LAYERS)
    for rows, side in ((ragged(name), "right"), (ragged(name), "left"), ([[1, 5, "image1"]], "left")):
        inputs = batch(model, rows, side)
        plain, answer = model(**inputs), model.generate(**inputs, **GREEDY)
        with LUVC(model, off) as luvc:
            assert torch.equal(model(**inputs).logits, plain.logits), (
                "run the layers as they are, all of them"
            )
            assert torch.equal(model.generate(**inputs, **GREEDY), answer)
        report, ids = luvc.report(), inputs["input_ids"]
        visual = int(((ids == IMAGE) | (ids == VIDEO)).sum())
        assert report.visual_tokens == [visual] * LAYERS and report.visual_full == visual
        assert report.positions == [int((ids > 0).sum())] * LAYERS and report.flops_left == 1
        assert report.kv_bytes == report.kv_bytes_full == bytes_of(plain.past_key_values)
        for b, row in enumerate(ids):
            assert luvc.kept[-1][b].tolist() == row.nonzero()[:, 0].tolist()
            assert luvc.sizes[-1][b].tolist() == [1] * int((row > 0).sum())


def attributes(model):
    """Every attribute of every module; what is in dictionaries, hooks for example, one by one."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            found |= {
                (name, key, k): v for k, v in inner if key != "rope_deltas"
            }  # Qwen's, of the latest prompt
    return found


def changed(model, before):
    """What is not the same object as it was."""
    after, missing = attributes(model), object()
    return [k for k in before | after if before.get(k, missing) is not after.get(k, missing)]


@every_family
@torch.no_grad()
def test_detach_restores_the_model(name):
    """Catches: hooks, configs or state left behind, by `detach` and by a forward that broke off."""
    model = tiny(name)
    inputs, text = batch(model, ragged(name)), batch(model, [[1, 2, 3]])
    plain, words = model(**inputs).logits, model(**text).logits
    before, luvc = attributes(model), LUVC(model, both(name))
    assert not changed(model, before), "only attach() may change the model"

    def fail(*_):
        raise RuntimeError("on purpose")

    for _ in range(2):  # one LUVC may be attached again
        with luvc:
            want = model(**inputs).logits
            assert not torch.equal(want, plain), "LUVC had no effect"
            for module in (luvc.family.blocks[2], luvc.family.projector, luvc.family.decoder.layers[2].mlp):
                handle = module.register_forward_hook(fail)
                with pytest.raises(RuntimeError, match="on purpose"):
                    model(**inputs)
                handle.remove()
                assert torch.equal(model(**text).logits, words), (
                    "a call that broke off leaks into the next one"
                )
                assert torch.equal(model(**inputs).logits, want), (
                    "a call that broke off leaks into the next one"
                )
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
    """Catches: a mask or rotary positions that are not indexed, rows scattered to the wrong place, dead slots, padding
    or fillers that take part, pieces pruned together, sizes that are lost or of other tokens or without effect."""
    changes, attention, side = SETTINGS[setting]
    config = both(name, **changes)
    if name in PRUNED_ONLY and setting == "merger":
        pytest.skip("the merger is refused")
    luvc = same_as_the_reference(tiny(name), config, [ragged(name)], side, tiny(name, attention))
    assert luvc.report().visual_tokens[-1] == 0 or "llm_keep" in changes


@every_family
@torch.no_grad()
def test_batch_gives_what_its_samples_give(name):
    """Catches: samples that see each other's padding, features, clips or fractions, in the encoder as well."""
    model, rows = tiny(name), [*ragged(name), ["clip6" if name in QWENS else "image6", 9]]
    inputs = batch(model, rows)
    with LUVC(model, both(name)) as luvc:
        out, kept = model(**inputs).logits, luvc.kept
        for b, row in enumerate(rows):
            alone, real = model(**batch(model, [row])).logits[0], inputs["attention_mask"][b].bool()
            agree(out[b, real], alone, f"sample {b} depends on the others")
            for layer in range(LAYERS):
                at = kept[layer][b] - real.nonzero()[0]
                assert torch.equal(at, luvc.kept[layer][0]), (
                    f"layer {layer}, sample {b}: other tokens than alone"
                )


@every_family
def test_gradients_equal_the_references(name):
    """Labels, the loss and all gradients, those of the pixels among them. Catches: a gradient that stops at a gather,
    a signpost or a merge; labels of the physical sequence."""
    model, config = tiny(name), both(name)
    inputs = batch(model, ragged(name))
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == 0) | (inputs["input_ids"] >= IMAGE), -100
    )
    pixels = {key: value.requires_grad_() for key, value in inputs.items() if key.startswith("pixel_values")}
    wanted = dict(model.named_parameters()) | pixels

    def gradients(loss):
        got = zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True)
        return {key: gradient for key, gradient in got if gradient is not None}

    logits = dense(model, inputs, config)[0][:, :-1]
    want_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    want = gradients(want_loss)
    with LUVC(model, config):
        loss = model(**inputs, labels=labels).loss
        got = gradients(loss)
    agree(loss, want_loss, "another loss")
    assert list(got) == list(want) and all(want[key].any() for key in pixels)
    largest = max(gradient.abs().max() for gradient in want.values())
    for (
        key,
        gradient,
    ) in want.items():  # keys' biases have no effect on a softmax: what they get is rounding errors
        scale = gradient.abs().max().clamp(min=1e-2 * largest)
        agree(got[key] / scale, gradient / scale, f"another gradient of {key}")


@every_family
def test_cached_generation_equals_the_reference(name):
    """Step by step, in a padded batch. Catches: a cache that counts physical positions, M-RoPE positions that jump,
    fillers that are attended to, clips that are cut otherwise where features were encoded ahead."""
    model, config = tiny(name), both(name)
    rows = padded(model, ragged(name), "left")
    inputs = batch(model, rows)
    with LUVC(model, config):
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    S = inputs["input_ids"].shape[1]
    new = out.sequences[:, S:]
    whole = batch(model, [[*row, *ids] for row, ids in zip(rows, new.tolist(), strict=True)])
    with torch.no_grad():
        logits = dense(model, whole | {"position_ids": positions(model, whole)}, config)[0][:, S - 1 : -1]
    agree(torch.stack(out.logits, 1), logits, "with a KV cache other logits than without")
    logits[..., model.generation_config.suppress_tokens] = -torch.inf
    assert torch.equal(new, logits.argmax(-1))
    assert out.past_key_values.get_seq_length() == S + 3, (
        "the cache counts logical positions, not stored ones"
    )


DECODING = {
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
}


@every_family
@pytest.mark.parametrize("how", DECODING)
def test_decoding_with_a_cache_equals_recomputation(name, how):
    """Catches: keys, sizes or signposts that are not repeated or reordered with their beam."""
    # One picture of one tile per sample: for several, transformers before 5.23 hands beams the wrong ones.
    model, out = tiny(name), []
    inputs = batch(model, [[1, "image1", 5, 6], [1, "image2", 7]])
    with LUVC(model, both(name)):
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
    model, config = tiny(name), both(name)
    turns = [
        [["image1", 5], [1, 2]],
        [[7, 8, 9], [7, 8]],
        [[3], [4]],
        [["tall2", 5], ["image3", 6]],
        [[9], [5]],
    ]
    others = [ragged(name)[:2], [["image4", 7], [6, 6]], [[8], [8]], [[2, 3], [4]], [[5], [6]]]
    speakers = [conversation(model, config, each, side) for each in (turns, others)]
    with LUVC(model, config) as luvc:
        assert len(list(zip(*[speak(luvc) for speak in speakers], strict=True))) == len(turns)


@every_family
@torch.no_grad()
def test_hidden_states_stay_logical(name):
    """Catches: hooks in an order that shows callers the physical sequence."""
    model = tiny(name)
    inputs = batch(model, [ragged(name)[0]])
    for _ in range(2):  # transformers puts its own hooks in at the first request, before and after LUVC's
        with LUVC(model, both(name)) as luvc:
            out = model(**inputs, output_hidden_states=True).hidden_states
        assert [h.shape[1] for h in out] == [inputs["input_ids"].shape[1]] * (LAYERS + 1)
        for layer in range(1 if name == "qwen3_vl" else LAYERS - 1):  # DeepStack adds to pruned rows as well
            different = (out[layer] != out[layer + 1]).any(-1)[0].nonzero()[:, 0]
            assert torch.equal(different, luvc.kept[layer][0]), "a pruned token must ride along as it is"
        model(**inputs, output_hidden_states=True)


# ---- The encoder -------------------------------------------------------------------------------------------


def places(model, h, w, windows=False):
    """(row, column, corner) of the patches of h x w slots, in the order of the encoder's sequence."""
    if model.name in QWENS:  # slot by slot, in Qwen2.5-VL window by window of 2 x 2 slots
        slots = list(itertools.product(range(h), range(w)))
        slots.sort(key=lambda at: (at[0] // 2, at[1] // 2, *at) if windows else at)
        return [(r, c, corner) for r, c in slots for corner in range(4)]
    unit = 1 if "llava" in model.name else 2
    patches = itertools.product(range(h * unit), range(w * unit))
    return [(y // unit, x // unit, y % unit * unit + x % unit) for y, x in patches]


def vision_calls(name):
    """[(parts, shapes of their pieces)] for one call of the encoder each."""
    if name in QWENS:
        return [(["image1", 5, "tall2"], [(4, 6), (6, 3)]), (["video3"], [(4, 6)] * 3)]
    return [(["image1", 5, "tall2"], [(SIDE, SIDE)] * 3)]


@pytest.mark.parametrize("name", QWENS)
@torch.no_grad()
def test_the_grid_may_be_handed_by_position(name):
    """Catches: a picture's size that is looked for in one place, where a caller of the encoder put it in another."""
    model = tiny(name)
    inputs = batch(model, [[1, "image", 5]])
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    with LUVC(model, both(name)) as luvc:
        want = model.model.visual(pixels, grid_thw=grid).pooler_output
        got = model.model.visual(pixels, grid).pooler_output
    assert torch.equal(got, want) and len(luvc.groups) == 1


@merging_family
@torch.no_grad()
def test_encoder_by_hand(name):
    """What each block, the projectors and the LLM get, from what came before. Catches: merges of other tokens, along
    other axes or before other blocks, windows and frame ends of the old grid, rotary positions that are not the mean
    of what was merged, features in other slots."""
    model, config = tiny(name), LUVCConfig(vision_keep=0.45, vision_steps=3, llm_keep=1.0)
    luvc, made, got, given = LUVC(model, config), {}, {}, {}
    family, windowed, used = (
        luvc.family,
        name == "qwen2_5_vl",
        3 if name in ("llava-clip", "llava-full") else 4,
    )
    prefix, cls = int(name in ("llava-clip", "llava-full", "internvl")), int(name == "llava-full")
    for number, block in enumerate(family.blocks):  # hooks from before LUVC see what it gets ...
        spy(block, lambda x, kwargs, number=number: made.update({number: x}))
        flash = lambda _, args, kwargs: (args, kwargs | {key: 7 for key in kwargs if key == "max_seqlen"})  # noqa: E731
        block.register_forward_pre_hook(
            flash, with_kwargs=True
        )  # FlashAttention wants to know the longest frame
    for number, module in enumerate([family.projector, *family.deepstack]):
        module.register_forward_hook(lambda *args, key=("features", number): made.update({key: args[2]}))
    luvc.attach()
    for number, block in enumerate(family.blocks):  # ... and those from after, what it makes of it
        spy(block, lambda x, kwargs, number=number: got.update({number: (x, dict(kwargs))}))
    spy(family.decoder, lambda x, kwargs: given.update(kwargs))
    for parts, shapes in vision_calls(name):
        inputs = batch(model, [[1, *parts, 7]])
        model(**inputs)
        sizes = [torch.ones(shape) for shape in shapes]
        tokens = [{slot: slot for slot in itertools.product(range(h), range(w))} for h, w in shapes]
        rows = {}  # after a block: for each piece, where in its part of the sequence each slot's token is
        for number in range(used):
            x, (y, arguments), ends, means, rows[number] = made[number], got[number], [], [], []
            order = [places(model, *size.shape, windowed) for size in sizes]
            pieces = list(x[:, prefix:] if x.ndim == 3 else x.split([len(place) for place in order]))
            for i, (H, W) in enumerate(shapes):
                step = number - (used - 3)
                if step >= 0:  # one merge before each of the last three blocks
                    axis, *left = merge_plan(H, W, 0.45, 3)[step]
                    grid = x.new_zeros(*sizes[i].shape, len({at[2] for at in order[i]}), x.shape[-1])
                    for token, at in zip(pieces[i], order[i], strict=True):
                        grid[at] = token
                    merged = merge_axis(grid.flatten(2)[None], sizes[i][None], left[axis - 1], axis)
                    (grid,), (sizes[i],), (parent,) = merged[0].unflatten(-1, grid.shape[2:]), *merged[1:]
                    order[i] = places(model, *sizes[i].shape, windowed)
                    pieces[i] = torch.stack([grid[at] for at in order[i]])
                    for slot, (r, c) in tokens[i].items():
                        tokens[i][slot] = (int(parent[r, c]), c) if axis == 1 else (r, int(parent[r, c]))
                for r, c, corner in order[i]:
                    members = torch.tensor([slot for slot, token in tokens[i].items() if token == (r, c)])
                    means.append(2 * members.double().mean(0) + torch.tensor(divmod(corner, 2)))
                once = list(dict.fromkeys(at[:2] for at in order[i]))
                windows = [
                    4 * len(list(run))
                    for _, run in itertools.groupby(once, lambda at: (at[0] // 2, at[1] // 2))
                ]
                inside = windowed and number not in WINDOWS["fullatt_block_indexes"]
                ends += windows if inside else [len(order[i])]
                rows[number].append([once.index(token) for token in tokens[i].values()])
            want = torch.cat(pieces) if x.ndim == 2 else torch.cat([x[:, :prefix], torch.stack(pieces)], 1)
            assert torch.equal(y, want), f"block {number} does not get what was merged, in its own order"
            if name in QWENS:
                assert arguments["cu_seqlens"].diff().tolist() == ends, (
                    f"block {number}: frames end elsewhere"
                )
                assert number < used - 3 or arguments.get("max_seqlen") in (None, max(ends))
                rotary = model.model.visual.rotary_pos_emb(y, torch.stack(means))
                for mine, theirs in zip(arguments["position_embeddings"], rotary, strict=True):
                    agree(mine, theirs, f"block {number}: rotary positions")
        (ids,), (embeds,) = inputs["input_ids"], given["inputs_embeds"]
        pieces = [piece for _, piece in pieces_of(model, ids)]
        visual = sorted(itertools.chain(*pieces))
        for number, features in enumerate([embeds, *(given.get("deepstack_visual_embeds") or [])]):
            made_here, offset = made["features", number], 0
            for i, piece in enumerate(pieces):
                at = rows[used - 1 if number == 0 else number - 1][
                    i
                ]  # DeepStack looks behind blocks 0, 1 and 2
                assert luvc.groups[i].tolist() == [r * sizes[i].shape[1] + c for r, c in tokens[i].values()]
                for slot in sizes_by_hand(luvc.groups[i].tolist()) if number == 0 else range(len(at)):
                    want = (
                        made_here[i, cls + at[slot]] if made_here.ndim == 3 else made_here[offset + at[slot]]
                    )
                    here = features[piece[cls + slot] if number == 0 else visual.index(piece[slot])]
                    assert torch.equal(here, want), f"slot {slot} of piece {i} has another token's feature"
                assert not cls or torch.equal(embeds[piece[0]], made_here[i, 0]), "CLS is lost"
                offset += max(at) + 1


@merging_family
@torch.no_grad()
def test_merging_equal_neighbours_is_exact(name):
    """A picture of 2 x 2 equal slots, merged to a quarter, in an encoder that knows no positions: all tokens weigh the
    same, so attention sees the same mixture. (CLS weighs as much as a token, merged or not, so encoders with CLS go
    without attention.) Catches: patches merged across slots, groups written to another home, DeepStack features too."""
    model = tiny(name, **({"window_size": 1024} if name == "qwen2_5_vl" else {}))
    off = ("position_embedding", "pos_embed", "rotary_pos_emb")
    off += ("out_proj", "projection_layer") if name in ("llava-clip", "llava-full", "internvl") else ()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "vis" in key and any(part in key for part in off) and tensor.is_floating_point():
            tensor.data.zero_()
    inputs, seen = batch(model, [[1, "image1", 5]]), []
    ((_, ((H, W), *_)), *_), pixels = vision_calls(name), inputs["pixel_values"]
    tile = [(r // 2 * 2) * W + c // 2 * 2 for r in range(H) for c in range(W)]
    if name in QWENS:  # four rows of patches are one slot
        inputs["pixel_values"] = pixels.view(H * W, 4, -1)[tile].flatten(0, 1)
    else:
        side = pixels.shape[-1] // SIDE
        grid = pixels.reshape(3, SIDE, side, SIDE, side).permute(1, 3, 0, 2, 4).flatten(0, 1)[tile]
        grid = grid.view(SIDE, SIDE, 3, side, side).permute(2, 0, 3, 1, 4)
        inputs["pixel_values"] = grid.reshape(pixels.shape)
    for keep in (1.0, 0.25):
        with LUVC(model, LUVCConfig(vision_keep=keep, llm_keep=1.0)) as luvc:
            handle = spy(luvc.family.decoder, lambda _, kwargs: seen.append(kwargs))
            model(**inputs)
            handle.remove()
    groups = [r // 2 * (W // 2) + c // 2 for r in range(H) for c in range(W)]
    ((_, piece),) = pieces_of(model, inputs["input_ids"][0])
    assert luvc.groups[0].tolist() == groups, "equal neighbours are not what merged"
    homes = [piece[slot] for slot in sizes_by_hand(groups, int(name == "llava-full"))]
    full, merged = (given["inputs_embeds"][0, homes] for given in seen)
    assert not torch.allclose(full[-1], full[-2], **CLOSE), "a picture that is all alike shows nothing"
    agree(merged, full, "another feature")
    deep = [given.get("deepstack_visual_embeds") or [] for given in seen]
    assert len(deep[0]) == (3 if name == "qwen3_vl" else 0)
    for full, merged in zip(*deep, strict=True):  # in every slot: the dead ones have that of their token
        agree(merged, full, "another DeepStack feature")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sizes_survive_half_precision(dtype):
    """32 x 32 slots merged to 3 x 3: dead slots are far from their token's. Catches: signposts that are rounded."""
    model, slots = tiny("qwen2_vl").to(dtype), 32 * 32
    noise = torch.randn(4 * slots, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, START, *[IMAGE] * slots, END, 5]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": noise.to(dtype)}
    with LUVC(model, LUVCConfig(vision_keep=0.01)) as luvc:
        model(**inputs, image_grid_thw=torch.tensor([[1, 64, 64]]))
    want = {2 + slot: size for slot, size in sizes_by_hand(luvc.groups[0].tolist()).items()}
    assert len(want) == 3 * 3
    got = dict(zip(luvc.kept[0][0].tolist(), luvc.sizes[0][0].tolist(), strict=True))
    assert got == {0: 1, 1: 1} | want | {2 + slots: 1, 3 + slots: 1}


# ---- The report --------------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_report_says_what_happened(name):
    """Catches: pruned keys that are stored all the same, and a report that is a formula instead of a measurement."""
    model, blocks = tiny(name), {}
    inputs, luvc = batch(model, ragged(name)), LUVC(model, both(name))
    full = bytes_of(model(**inputs).past_key_values)
    with luvc:
        for number, block in enumerate(
            luvc.family.blocks
        ):  # of two calls, pictures and clips, the latest one
            spy(block, lambda x, kwargs, number=number: blocks.update({number: x}))
        cache = model(**inputs).past_key_values
    report, ids = luvc.report(), inputs["input_ids"]
    prefix = int(model.config.vision_config.model_type.startswith(("clip", "internvl")))
    assert report.vision_tokens == [x.shape[:-1].numel() - prefix * len(x) for x in blocks.values()]
    assert report.positions == [sum(map(len, layer)) for layer in luvc.kept]
    assert [layer.keys.shape[2] for layer in cache.layers] == [max(map(len, layer)) for layer in luvc.kept]
    text = int(((ids > 0) & (ids != IMAGE) & (ids != VIDEO)).sum())
    assert report.visual_tokens == [n - text for n in report.positions] and report.visual_tokens[-1] == 0
    assert report.positions_full == int((ids > 0).sum()) == report.visual_full + text
    assert report.kv_bytes == bytes_of(cache) and report.kv_bytes_full == full
    assert all(what in str(report) for what in ("vision tokens", "visual tokens", "KV cache", "FLOPs left"))


@pytest.mark.task4
@torch.no_grad()
def test_flops_by_hand():
    """Of two turns, the second behind what is stored. Catches: attention counted as full or from another start, a
    layer's share that is that of another, words that change the report."""
    model, config, n = tiny(), LUVCConfig(vision_keep=1.0, llm_keep=[1, 1, 0.5, 0]), SIDE**2
    turns = [torch.tensor([prompt(model, *row)]) for row in ([1, "image1", 5, 6], [7, "image2", 8])]
    pixels = batch(model, [["image1"]])["pixel_values"]
    layers = [n + 3, n + 3, n // 2 + 3, 3]  # positions in the first turn; in the second one less
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v, o, the three of the MLP

    def flops(n, stored):
        return 2 * weights * n + 4 * 32 * (n * stored + n * (n + 1) / 2)

    plain, cache = DynamicCache(), DynamicCache()
    for ids in turns:
        model(input_ids=ids, pixel_values=pixels, past_key_values=plain)
    with LUVC(model, config) as luvc:
        model(input_ids=turns[0], pixel_values=pixels, past_key_values=cache)
        first = luvc.report()
        model(input_ids=turns[1], pixel_values=pixels, past_key_values=cache)
        second, stored = luvc.report(), bytes_of(cache)
        model(input_ids=turns[0][:, -1:], past_key_values=cache)
    want = sum(flops(each, 0) for each in layers) / (4 * flops(n + 3, 0))
    assert first.flops_left == pytest.approx(want)
    want = sum(flops(each - 1, each) for each in layers) / (4 * flops(n + 2, n + 3))
    assert second.flops_left == pytest.approx(want) and luvc.report() == second
    assert second.positions == [each - 1 for each in layers] and second.positions_full == n + 2
    assert second.kv_bytes_full == bytes_of(plain) and second.kv_bytes == stored


# ---- Attention with sizes, kernels, devices ----------------------------------------------------------------


@st.composite
def sized_keys(draw):
    """(query (B, 4, Q, 8), key, value (B, 2, T, 8), sizes (B, T), allowed (Q, T)): small integers, float64"""
    B, Q, T = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6)))

    def array(*shape, low, high):
        return torch.from_numpy(draw(hnp.arrays("float64", shape, elements=st.integers(low, high))))

    query, key, value = (array(B, *shape, 8, low=-3, high=3) for shape in ((4, Q), (2, T), (2, T)))
    allowed, sizes = array(Q, T, low=0, high=1).bool(), array(B, T, low=0, high=4)
    somewhere = draw(st.integers(0, T - 1))  # a query looks at something
    allowed[:, somewhere], sizes[:, somewhere] = True, sizes[:, somewhere].clamp(min=1)
    return query, key, value, sizes, allowed


def attend(module, query, calls, mask=None):
    """Attention over the keys of one or more calls (key, value, sizes) of a KV cache."""
    store = reference.PrunedLayer()
    for key, value, sizes in calls:
        store.bias = sizes.float().log().clamp(min=-1000) / module.scaling
        keys, values = store.update(key, value)
    assert keys.shape[-1] == values.shape[-1] == query.shape[-1] + reference.EXTRA
    return reference.sized_attention(module, query, keys, values, mask, scaling=module.scaling)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_key_of_size_s_is_s_keys_of_size_1(attention):
    """What a size means. Catches: a size instead of its log, a log times the scale, sizes that go to other keys, heads
    or samples, outputs with channels too many, sizes of an earlier call that are lost or given to later keys."""
    model = tiny(attention=attention)
    module = model.model.language_model.layers[1].self_attn

    @given(sized_keys(), st.data())
    def check(case, data):
        query, key, value, sizes, allowed = case
        cut = data.draw(st.integers(1, key.shape[2]))
        calls = [(key[:, :, at], value[:, :, at], sizes[:, at]) for at in (slice(0, cut), slice(cut, None))]
        mask = torch.where(allowed, 0.0, -torch.inf).double()[None, None]
        got = attend(module, query, calls[: 1 + (cut < key.shape[2])], mask)
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

    with LUVC(model, LUVCConfig(vision_keep=1.0)):
        check()


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [8, 64, 128])
@torch.no_grad()
def test_a_key_of_size_0_weighs_exactly_nothing(device, attention, dtype, head):
    """Catches: padding and fillers that are seen a little, a bias that half precision turns into inf and then nan."""
    model, noise = tiny(attention=attention, decoder={"head_dim": head}), torch.Generator().manual_seed(0)
    module = model.to(device, dtype).model.language_model.layers[1].self_attn
    tokens = (3 * torch.randn(2, heads, 7, head, generator=noise) for heads in (4, 2, 2))
    query, key, value = (t.to(device, dtype) for t in tokens)
    sizes = torch.tensor([[1, 0, 3, 0, 0, 2, 1], [5, 0, 0, 0, 0, 0, 0]], device=device)
    with LUVC(model, LUVCConfig(vision_keep=1.0)):
        got = attend(module, query, [(key, value, sizes)])
        loud = torch.where((sizes == 0)[:, None, :, None], 1e4, value)
        assert torch.equal(got, attend(module, query, [(key, loud, sizes)])), (
            "a key of size 0 reaches the output"
        )
    want = value[1, :, 0].repeat_interleave(2, 0).expand(7, 4, head)
    assert got.isfinite().all() and torch.equal(got[1], want), "the only key has all the weight"


@pytest.mark.task4
@torch.no_grad()
def test_flash_attention_contract():
    """FlashAttention-2 takes no mask or a 2-D one, heads of equal size in queries, keys and values, a multiple of 8,
    and reads gaps in position_ids as packed sequences. A probe with that contract, in plain torch, sees what it would
    see. Catches: a mask, sizes that are not in channels, a config that names another attention than the one that runs.
    """
    calls = []

    def probe(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
        assert module.config._attn_implementation == "probe", "a kernel looks up there which one it is"
        assert attention_mask is None, "a mask where a causal kernel needs none"
        at, Q, T = kwargs.get("position_ids"), query.shape[2], key.shape[2]
        assert at is None or (at.shape[-1] == Q and (at.diff() == 1).all()), "gaps look like packed sequences"
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        logits = query @ key.transpose(-1, -2) * scaling
        if module.is_causal:
            calls.append((Q, query.shape[-1]))
            logits = logits.masked_fill(torch.arange(Q)[:, None] + T - Q < torch.arange(T), -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("probe", probe)
    transformers.AttentionMaskInterface.register("probe", flash_attention_mask)
    turns = [ragged("llava-clip"), [["image6", 7], [2, 3], [4]], [[7], [8], [9]]]
    for side in ("left", "right"):
        luvc = same_as_the_reference(tiny(), both("llava-clip"), turns, side, tiny(attention="probe"))
        second = calls[LAYERS : 2 * LAYERS]
        assert second == [(max(map(len, layer)), 8 + reference.EXTRA) for layer in luvc.kept]
        calls.clear()


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes a GPU's host wait: values that decide shapes or come back as Python numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        assert not masked and not name.startswith(self.WAITS), (
            f"{function}: on a GPU the host would wait here"
        )
        return function(*args, **(kwargs or {}))


def run_inside_layers(model, enter, leave):
    """A call with fillers and several pictures; `enter` before each decoder layer, `leave` after it."""
    inputs = {key: value.to(model.device) for key, value in batch(model, ragged(model.name)).items()}
    with LUVC(model, both(model.name)) as luvc, torch.no_grad():
        model(**inputs)  # FFT plans and projections are made once
        for layer in luvc.family.decoder.layers:
            layer.register_forward_pre_hook(lambda *_: enter())
            layer.register_forward_hook(lambda *_: leave())
        try:
            model(**inputs)
        finally:
            leave()


@every_family
def test_layers_do_not_wait_for_the_device(name, monkeypatch):
    """Catches: a value that is read on the host inside of the decoder layers."""
    mode, inside = NoWaiting(), []

    def refuse(*_):
        raise AssertionError("tolist() in a decoder layer: on a GPU the host would wait here")

    def enter():
        monkeypatch.setattr(
            torch.Tensor, "tolist", refuse
        )  # it reads a CPU tensor without asking the dispatcher
        inside.append(mode.__enter__())

    def leave():
        if inside:
            inside.pop().__exit__(None, None, None)
            monkeypatch.undo()

    run_inside_layers(tiny(name), enter, leave)
    with pytest.raises(AssertionError, match="wait"), mode:  # the probe itself
        torch.ones(3)[torch.tensor([True, False, True])]


# ---- Anything, and at once ---------------------------------------------------------------------------------


@st.composite
def conversations(draw):
    """(family, settings, turns, side of the padding)"""
    name = draw(st.sampled_from(["llava-clip", "llava-full", "llava-siglip", "qwen2_5_vl", "qwen3_vl"]))
    part = st.sampled_from([5, 6, 7, "image1", "image2", "tall3", "video4" if name in QWENS else "image4"])
    row = st.lists(part, max_size=4).map(lambda parts: [*parts, 8])  # a turn ends with text
    B, share = draw(st.integers(1, 3)), st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.51, 0.8, 1.0])
    turns = [[draw(row) for _ in range(B)] for _ in range(draw(st.integers(1, 3)))]
    fractions = sorted(draw(st.lists(share, min_size=LAYERS, max_size=LAYERS)), reverse=True)
    values = {"vision_keep": st.sampled_from([1.0, 0.7, 0.45, 0.03]), "vision_steps": st.integers(1, 3)}
    values |= {"llm_keep": st.sampled_from([None, 0.5, fractions]), "sizes": st.booleans()}
    config = LUVCConfig(**{key: draw(each) for key, each in values.items()})
    return name, config, turns, draw(st.sampled_from(["left", "right"]))


@pytest.mark.task4
@settings(max_examples=25)
@given(conversations())
def test_any_conversation_equals_the_reference(case):
    """Catches: what nobody thought of, in combinations of rows, padding, pictures, fractions, turns and sizes."""
    name, config, turns, side = case
    model = tiny(name)
    if not LUVC(model, config).off:  # the plain model processes padding as well
        same_as_the_reference(model, config, turns, side)


def test_threads_share_one_attached_model():
    """Eight threads generate at once what they generate one after the other. They wait for each other inside of every
    merge and every choice, so that all calls are at the same place: what one part of the model tells another, kept
    anywhere but in the call, would be that of the last one."""
    model, threads = tiny("llava-siglip"), 8
    barrier = threading.Barrier(1)

    def merge(*args):
        barrier.wait(timeout=60)
        return merge_axis(*args)

    def choose(*args):
        barrier.wait(timeout=60)
        return spectral_prune(*args)

    # Prompts of different lengths, with different pictures of one or two tiles.
    kinds = [f"{'image' if n % 3 else 'tall'}{n}" for n in range(threads)]
    rows = [[1, *range(2, 2 + n), kind, *range(5, 6 + n % 4), 9] for n, kind in enumerate(kinds)]
    prompts = [batch(model, [row]) for row in rows]
    ask = functools.partial(model.generate, **GREEDY, output_logits=True, return_dict_in_generate=True)
    with LUVC(model, LUVCConfig(vision_keep=0.45, merge=merge, prune=choose)):
        wanted = [ask(**inputs) for inputs in prompts]
        barrier = threading.Barrier(threads)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for _ in range(3):
                jobs = [pool.submit(ask, **inputs) for inputs in prompts]
                for got, want in zip([job.result(timeout=300) for job in jobs], wanted, strict=True):
                    assert torch.equal(got.sequences, want.sequences), "another answer than alone"
                    agree(torch.cat(got.logits), torch.cat(want.logits), "other logits than alone")


# ---- The toy and the command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    return reference.load("toy", "cpu")


def test_toy_checkpoint_is_ordinary_and_small():
    files = {file.name: file.stat().st_size for file in (HERE / "toy").iterdir() if file.is_file()}
    assert sum(files.values()) <= 12 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "example.png"} <= set(files)
    config = json.loads((HERE / "toy" / "config.json").read_text())
    assert "auto_map" not in config, "a checkpoint must load without code of its own"
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    assert patches >= 576 and config["text_config"]["num_hidden_layers"] >= 12


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


@torch.inference_mode()
def answers(model, processor, asked, config=None):
    """(the answers, the report of the last batch)"""
    from toy.make import prompt_of

    texts, report = [], None
    for start in range(0, len(asked), 20):
        part = asked[start : start + 20]
        prompts = [prompt_of(question, len(pictures)) for _, pictures, question, _ in part]
        pictures = [picture for _, each, *_ in part for picture in each]
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with LUVC(model, config) if config else contextlib.nullcontext() as luvc:
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            report = luvc.report() if config else None
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return texts, report


def near_lossless(model, processor, asked, kernel=contextlib.nullcontext):
    """The defaults' targets: over all at most one point lost, in any kind at most two, at least 97 % of the answers the
    same, at most half of the visual token-layers left and none in the last layer."""
    plain, _ = answers(model, processor, asked)
    with kernel():
        less, report = answers(model, processor, asked, LUVCConfig())
    lost = {}
    for a, b, (kind, _, _, answer) in zip(plain, less, asked, strict=True):
        lost.setdefault(kind, []).append((a == answer) - (b == answer))
    every = [each for of_kind in lost.values() for each in of_kind]
    share = {kind: sum(of_kind) / len(of_kind) for kind, of_kind in lost.items()}
    assert sum(every) <= 0.01 * len(asked), f"{sum(every)} of {len(asked)} answers lost; by kind {share}"
    assert max(share.values()) <= 0.02, f"answers lost, by kind: {share}"
    same = sum(a == b for a, b in zip(plain, less, strict=True))
    assert same >= 0.97 * len(asked), f"{same} of {len(asked)} answers are the plain model's"
    assert sum(report.visual_tokens) <= 0.5 * len(report.visual_tokens) * report.visual_full
    assert report.visual_tokens[-1] == 0
    right = sum(text == answer for text, (*_, answer) in zip(plain, asked, strict=True))
    assert right >= 0.97 * len(asked), f"the toy itself is right {right} times in {len(asked)}"


def test_near_lossless_on_the_toy(toy):
    """Catches: units that work as they should and lose answers all the same. (With half as many questions, one of a
    kind would be two points of it.)"""
    near_lossless(*toy, asked_of_unseen_scenes(100))


def test_pipeline_and_streaming_run_unchanged(toy, capsys):
    """Catches: hooks that need another call than a client makes."""
    from PIL import Image

    (model, processor), picture = toy, Image.open(HERE / "toy" / "example.png")
    question = "what colour is the striped thing?"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    with LUVC(model) as luvc:
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
        assert luvc.report().visual_tokens[-1] == 0
        streamer = transformers.TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        capsys.readouterr()
        model.generate(**reference.encode(processor, picture, question), max_new_tokens=4, streamer=streamer)
    assert said[0]["generated_text"].strip() == capsys.readouterr().out.strip() != ""


def test_command_line_prints_one_json_object():
    """Catches: output that a script cannot read, a report that contradicts itself."""
    command = [sys.executable, str(HERE / "luvc.py"), "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = "model prompt answer_full answer_luvc same_answer vision_tokens visual_tokens positions prefill_ms_full"
    assert set(result) == set(
        f"{keys} prefill_ms_luvc speedup kv_bytes_full kv_bytes_luvc flops_left".split()
    )
    assert result["same_answer"] and result["answer_full"] == result["answer_luvc"] != ""
    assert result["visual_tokens"][-1] == 0 and 0 < result["flops_left"] <= 0.5
    assert result["kv_bytes_luvc"] < 2 * result["kv_bytes_full"]


def test_command_line_prints_both_answers(capsys):
    assert reference.main(["--max-new-tokens", "3", "--llm-keep", ",".join(["1", *["0.5"] * 10, "0"])]) == 0
    out = capsys.readouterr().out
    assert all(what in out for what in ("plain:", "LUVC:", "###", "prefill"))


@pytest.fixture
def folders(tmp_path):
    """Folders that hold no usable checkpoint."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    shutil.copytree(
        HERE / "toy", tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
    )
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--image", "{}/nothing.png"], "nothing.png"),
        (["--image", "{}/text.png"], "text.png"),
        (["--image", "{}"], "--image"),
        (["--model", "{}/empty"], "empty"),
        (["--model", "{}/pickled"], "pickled"),
        (["--vision-keep", "0"], "vision_keep=0.0"),
        (["--vision-keep", "many"], "many"),
        (["--llm-keep", "0.5,0.6"], "rises"),
        (["--llm-keep", "1,0"], "12 decoder layers"),
        (["--llm-keep", "nan"], "nan"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--unknown"], "--unknown"),
        (["--device", "cuda"], "cuda"),
        (["--attn", "flash_attention_2"], "flash"),
    ],
)
def test_command_line_refuses_in_one_line(folders, argv, names, capsys):
    """Catches: a traceback, an error that does not name what was wrong, an exit code of 0."""
    here = {"cuda": torch.cuda.is_available(), "flash": transformers.utils.is_flash_attn_2_available()}
    if here.get(names):
        pytest.skip(f"{names} can be had here")
    assert reference.main([part.format(folders) for part in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading")]
    assert len(lines) == 1 and lines[0].startswith("luvc.py: error: ") and names in lines[0], lines


# family -> (its processor, image processor and video processor, and settings of these for the tiny model)
QWEN_PIXELS = {"patch_size": 4, "merge_size": 2, "min_pixels": 64 * 64, "max_pixels": 96 * 96}
SQUARE = {"height": 24, "width": 24}
PROCESSORS = {
    "llava-clip": ("Llava", "CLIP", "", {"size": {"shortest_edge": 24}, "crop_size": SQUARE},
                   {"patch_size": 4, "num_additional_image_tokens": 1}),
    "llava_next": ("LlavaNext", "LlavaNext", "",
                   {"size": {"shortest_edge": 24}, "crop_size": SQUARE, **TILES},
                   {"patch_size": 4, "num_additional_image_tokens": 1}),
    "llava_onevision": ("LlavaOnevision", "LlavaOnevision", "LlavaOnevision", {"size": SQUARE, **TILES},
                        {"num_image_tokens": SIDE**2}),
    "internvl": ("InternVL", "GotOcr2", "InternVL",
                 {"size": {"height": 48, "width": 48}, "crop_to_patches": True, "max_patches": 4},
                 {"image_seq_length": SIDE**2}),
    "idefics3": ("Idefics3", "Idefics3", "",
                 {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}},
                 {"image_seq_len": SIDE**2}),
    "smolvlm": ("SmolVLM", "SmolVLM", "SmolVLM",
                {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}},
                {"image_seq_len": SIDE**2}),
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", "Qwen2VL", QWEN_PIXELS, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", "Qwen2VL", QWEN_PIXELS, {}),
    "qwen3_vl": ("Qwen3VL", "Qwen2VL", "Qwen3VL", QWEN_PIXELS, {}),
}  # fmt: skip
SPECIAL = {  # token ids 60 to 63: picture, video, start, end
    "internvl": ["<IMG_CONTEXT>", "<video>", "<img>", "</img>"],
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "": ["<image>", "<video>", "<fake_token_around_image>", "<global-img>"],
}


def save_checkpoint(name, folder):
    """A tiny model of a family and its own processor, with a tokenizer of words made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    processor, image, video, pixels, more = PROCESSORS[name]
    special = next(tokens for key, tokens in SPECIAL.items() if name.startswith(key))
    words = ["<pad>", "<s>", "<unk>", "<end_of_utterance>", "what", "colour", "is", "it", "?", "answer", ":"]
    words += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words += [f"word{i}" for i in range(len(words), IMAGE)] + special
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = dict(zip(["context_image_token", "video_token", "start_image_token", "end_image_token"], special,
                     strict=True)) if name == "internvl" else {}  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens=named or [word for word in words if word[0] == "<"],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": special} if named else {})
    picture = special[2] + special[0] + special[3] if name.startswith("qwen") else special[0]
    template = "<s>{% for part in messages[0].content %}{% if part.type == 'image' %}" + picture
    template += "{% else %} {{ part.text }} answer : {% endif %}{% endfor %}"
    model = tiny(name)
    image_processor = getattr(transformers, f"{image}ImageProcessorPil")(**pixels)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    if video:
        parts["video_processor"] = getattr(transformers, f"{video}VideoProcessor")()
    if name.startswith("llava"):
        more = more | {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    processor = getattr(transformers, f"{processor}Processor")(**parts, chat_template=template, **more)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", PROCESSORS)
def test_family_command_line(name, tmp_path, capsys):
    """A saved checkpoint, a picture file and a question, through the family's own processor. Catches: inputs that
    `encode` loses, pictures whose number of slots is not what the processor writes into the prompt."""
    from PIL import Image

    try:
        save_checkpoint(name, tmp_path)
    except ImportError as error:
        package = next(package for package in ("torchvision", "num2words") if package in str(error).lower())
        pytest.skip(f"the processor of {name} needs {package}, which does not import here")
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "picture.png")
    argv = ["--model", str(tmp_path), "--image", str(tmp_path / "picture.png"), "--prompt", "what is it ?"]
    argv += ["--max-new-tokens", "3", "--json", "--device", "cpu"]
    if name in PRUNED_ONLY:
        assert reference.main(argv) == 2 and "set vision_keep=1.0" in capsys.readouterr().err
        argv += ["--vision-keep", "1.0"]
    code = reference.main(argv)
    out = capsys.readouterr()
    assert code == 0, out.err
    result = json.loads(out.out)
    assert result["visual_tokens"][0] > 0 and result["visual_tokens"][-1] == 0, result
    full = result["positions"][0] - result["visual_tokens"][0]
    assert result["positions"][-1] == full >= 7 and result["flops_left"] < 1
    merged = result["vision_tokens"][-1] < result["vision_tokens"][0]
    assert merged == (name not in PRUNED_ONLY) and result["kv_bytes_luvc"] < 2 * result["kv_bytes_full"]


# ---- On a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@given(grids())
def test_merge_on_gpu_equals_cpu(case):
    """Catches: a sort or an `index_add` that is another one there. (Sums of small integers are exact.)"""
    x, size, keep, axis = case
    on_gpu = merge_axis(x.cuda(), size.cuda(), keep, axis)
    for a, b in zip(on_gpu, merge_axis(x, size, keep, axis), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.gpu
@needs_gpu
def test_functions_do_not_wait_for_the_gpu():
    x, size = torch.randn(2, 24, 24, 128, device="cuda"), torch.ones(2, 24, 24, device="cuda")
    slot = torch.arange(576, device="cuda").expand(2, 576)

    def run():
        y, mass, parent = merge_axis(x, size, 18, 2)
        merge_axis(y, mass, 18, 1)
        follow((slot // 24, slot % 24), parent, 2)
        inherit(size.flatten(1), spectral_prune(x.flatten(1, 2), 100))

    run()  # FFT plans and projections are made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_layers_do_not_wait_for_the_gpu():
    check = torch.cuda.set_sync_debug_mode
    run_inside_layers(tiny().cuda(), lambda: check("error"), lambda: check("default"))


def evenly(x, keep):
    """The same choice in every dtype."""
    at = torch.arange(keep, device=x.device)
    return ((2 * at + 1) * x.shape[1] // (2 * max(keep, 1))).expand(len(x), keep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [64, 128])  # with the channels for sizes 72 and 136
@torch.no_grad()
def test_half_precision_in_the_flash_kernel(device, side, dtype, head):
    """The flash kernel forced, in a ragged batch: on average LUVC may be at most twice as far from its float32 self as
    the plain model is from its own (flash-attention's own tolerance; on a CPU it is 1.0 to 1.6 times as far). Catches:
    a mask or a bias that rules the kernel out, sizes that half precision rounds away."""

    def logits(kind, config):
        model, rows, out = tiny(decoder={"head_dim": head}).to(device, kind), ragged("llava-clip"), []
        kernel = SDPBackend.MATH if kind == torch.float32 else SDPBackend.FLASH_ATTENTION
        for part in (
            [rows] if config else [[row] for row in rows]
        ):  # padding rules the kernel out for the plain model
            inputs = {key: value.to(device) for key, value in batch(model, part, side).items()}
            inputs |= {key: value.to(kind) for key, value in inputs.items() if key == "pixel_values"}
            text = (inputs["input_ids"] > 0) & (inputs["input_ids"] != IMAGE)
            with sdpa_kernel(kernel), LUVC(model, config) if config else contextlib.nullcontext():
                out.append(model(**inputs).logits[text].float())
        return torch.cat(out)

    configs = None, LUVCConfig(vision_keep=1.0, prune=evenly)
    plain, error = [(logits(dtype, each) - logits(torch.float32, each)).abs().mean() for each in configs]
    assert 0 < error <= 2 * plain, f"LUVC is off by {error}, the plain model by {plain}"


@pytest.mark.gpu
@needs_gpu
def test_near_lossless_in_the_flash_kernel():
    """The same targets in bfloat16 on a GPU, the flash kernel forced for LUVC."""
    model, processor = reference.load("toy", "cuda", "bfloat16")
    near_lossless(
        model, processor, asked_of_unseen_scenes(100), lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    )


# ==== Real clients, and what is refused =====================================================================
#
# What people do with a model beside calling it. Each thing works, or is refused by a ValueError that names
# what was wrong and the way out. Never an answer that is silently different.

OFF, PRUNER = LUVCConfig(vision_keep=1.0, llm_keep=1.0), LUVCConfig(vision_keep=1.0)
BOTH, EQUAL = LUVCConfig(vision_keep=0.45), LUVCConfig(vision_keep=0.45, sizes=False)


def seams(model, before):
    """What `attach` works with, of that what is not as it was: hooks, forwards, configs of attentions, and so
    on. (Other attributes may change: accelerate fetches weights, `generate` and the compiler take notes.)"""
    own = ("config", "_luvc", "_prefill", "init_continuous_batching")
    return [key for key in changed(model, before) if key[1] in own or "forward" in key[1]]


def setting(path, value):
    """LUVC(model), where one entry of the model's config is another."""

    def act(model, inputs):
        *parents, name = path.split(".")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functools.reduce(getattr, parents, model.config), name, value, raising=False)
            LUVC(model, PRUNER)

    return act


def generating(**how):
    return lambda model, inputs: model.generate(**inputs, max_new_tokens=2, **how)


def compiled(model, module):
    module.compile(backend="eager")
    try:
        LUVC(model).attach()
    finally:
        del module._compiled_call_impl


def given_cache(kind):
    """A cache of another kind, made by hand: the packages that some need are not at hand."""

    def act(model, inputs):
        cache = kind.__new__(kind)
        vars(cache).update(vars(DynamicCache()))
        model(**inputs, past_key_values=cache)

    return act


def filled_without(model, inputs):
    cache, ids = DynamicCache(), torch.tensor([[1, 5, 6]])
    tiny(model.name)(input_ids=ids, past_key_values=cache)
    model(input_ids=ids[:, :1], past_key_values=cache)


def filled_under(config, then=None):
    """A cache filled under LUVC, continued by the plain model or under other settings. It stays what it
    was."""

    def act(model, inputs):
        turn = torch.tensor([[7, 8]])
        with LUVC(model, config):
            cache = model(**inputs).past_key_values
            want = model(input_ids=turn, past_key_values=copy.deepcopy(cache)).logits
        try:
            with LUVC(model, then) if then else contextlib.nullcontext():
                model(input_ids=turn[:, :1], past_key_values=cache)
        finally:
            with LUVC(model, config):
                assert torch.equal(model(input_ids=turn, past_key_values=cache).logits, want), (
                    "the cache was spoilt"
                )

    return act


def packed(model, inputs):
    """Two sequences in one row, as collators make them that do without padding."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    positions = positions.expand(3, 1, -1) if model.name in QWENS else positions
    model(input_ids=torch.tensor([[1, 5, 6, 7, 1, 5, 6]]), position_ids=positions)


def packed_for_flash(model, inputs):
    ends = torch.tensor([0, 4, 7], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    model(input_ids=torch.tensor([[1, 5, 6, 7, 1, 5, 6]]), **lengths)


def square_mask(model, inputs):
    S = inputs["input_ids"].shape[1]
    model(**inputs | {"attention_mask": torch.ones(1, 1, S, S)})


def without_ids(model, inputs):
    model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


def checkpointing(model, inputs):
    model.gradient_checkpointing_enable()
    try:
        model.train()(**inputs, use_cache=False)
    finally:
        model.eval().gradient_checkpointing_disable()
        model.disable_input_require_grads()


def part_of_a_tile(model, inputs):
    mask = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    mask[..., 24:] = False
    model(**inputs, pixel_attention_mask=mask)


WITHOUT = {  # what is done to a plain model -> how, the words of the error, the family (none: LLaVA)
    "a text model": (lambda m, i: LUVC(m.model.language_model), "'llama'.*use LLaVA"),
    "no model at all": (lambda m, i: LUVC(m.lm_head), "'Linear'.*use LLaVA"),
    "another family": (setting("model_type", "blip"), "'blip'.*use LLaVA"),
    "another tower": (setting("vision_config.model_type", "resnet"), "'resnet'.*use CLIP"),
    "another strategy": (setting("vision_feature_select_strategy", "default"), "use.*'full'", "llava-siglip"),
    "several feature layers": (setting("vision_feature_layer", [-2, -1]), "-2, -1.*single layer"),
    "another decoder": (setting("text_config.model_type", "mamba"), "'mamba'.*use one of"),
    "sliding windows": (setting("text_config.sliding_window", 8), "sliding_.*only full", "llava-full"),
    "linear attention": (setting("text_config.layer_types", ["linear_attention"] * 4), "linear_.*full", "qwen2_vl"),
    "flex attention": (setting("text_config._attn_implementation", "flex_attention"), "use sdpa", "qwen3_vl"),
    "fractions": (lambda m, i: LUVC(m, LUVCConfig(llm_keep=[1, 0])), "llm_keep.*fit 4 decoder", "internvl"),
    "too many steps": (lambda m, i: LUVC(m, LUVCConfig(vision_steps=4)), "=4 must be at most 3", "llava-full"),
    "LLaVA-NeXT's merger": (lambda m, i: LUVC(m), "cannot merge.*vision_keep=1.0", "llava_next"),
    "OneVision's merger": (lambda m, i: LUVC(m), "cannot merge.*vision_keep=1.0", "llava_onevision"),
    "InternVL, one step": (lambda m, i: LUVC(m, LUVCConfig(vision_steps=1)), "square.*set 2", "internvl"),
    "SmolVLM, one step": (lambda m, i: LUVC(m, LUVCConfig(vision_steps=1)), "square grid; set 2", "smolvlm"),
    "model.compile()": (lambda m, i: compiled(m, m), "compiled.*without it"),
    "a compiled layer": (lambda m, i: compiled(m, m.model.language_model.layers[1]), "compiled.*without it"),
    "torch.compile(model)": (lambda m, i: LUVC(torch.compile(m)).attach(), "compiled.*without it"),
    "its cache, detached": (filled_under(BOTH), "under LUVC: attach LUVC again"),
    "its cache, no sizes": (filled_under(EQUAL), "under LUVC: attach LUVC again"),
    "its cache under an off one": (filled_under(PRUNER, OFF), "under LUVC: attach LUVC again", "qwen2_vl"),
}  # fmt: skip
WITH = {  # the same, while a LUVC is attached
    "attaching twice": (lambda m, i: LUVC(m).attach(), "attached.*already; detach"),
    "attaching inside": (lambda m, i: LUVC(m.model).attach(), "attached.*already; detach"),
    "deepcopy": (lambda m, i: copy.deepcopy(m), "copied.*detach"),
    "pickle": (lambda m, i: pickle.dumps(m), "pickled.*detach"),
    "export": (lambda m, i: torch.export.export(m, (), i, strict=False), "eager mode.*without it"),
    "continuous batching": (lambda m, i: m.generate_batch([[1, 5]]), "continuous batching.*use"),
    "prefill in chunks": (generating(prefill_chunk_size=8), "prefill_chunk_size.*use", "qwen2_5_vl"),
    "a static cache": (generating(cache_implementation="static"), "a DynamicCache", "qwen2_vl"),
    "a given static cache": (given_cache(transformers.StaticCache), "StaticCache.*use a Dynamic", "internvl"),
    "a quantised cache": (given_cache(transformers.QuantizedCache), "QuantizedCache.*use a DynamicCache"),
    "a filled cache": (filled_without, "without LUVC; begin anew"),
    "cropping": (lambda m, i: m(**i).past_key_values.crop(-1), "cannot crop"),
    "assisted decoding": (lambda m, i: generating(assistant_model=tiny())(m, i), "crop.*assisted"),
    "prompt lookup": (generating(prompt_lookup_num_tokens=2), "crop.*prompt-lookup", "qwen3_vl"),
    "a 4-D mask": (square_mask, "2-D attention_mask"),
    "no ids": (without_ids, "input_ids.*instead of inputs_embeds"),
    "packed rows": (packed, "begin again.*one sequence per row"),
    "packed rows, M-RoPE": (packed, "begin again.*one sequence per row", "qwen2_vl"),
    "packed rows for flash": (packed_for_flash, "one sequence per row"),
    "a merged picture last": (lambda m, i: m(**batch(m, [[1, "image"]])), "put text behind it"),
    "features from elsewhere": (lambda m, i: m(**i, vision_feature_layer=1), "must be the config's"),
    "checkpointing": (checkpointing, "gradient checkpointing; disable it"),
    "padded tiles": (part_of_a_tile, "padding, which cannot be merged; split", "idefics3"),
}
REFUSED = WITHOUT | WITH


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    """Catches: an answer that is silently different, an error that does not say what to do, a model that a
    refusal changes, and state of a refused call that the next one finds."""
    act, words, *family = REFUSED[what]
    model = tiny(*family)
    inputs = batch(model, [[1, "image", 5]])
    with torch.no_grad():
        plain, before = model(**inputs).logits, attributes(model)
        with LUVC(model, BOTH) if what in WITH else contextlib.nullcontext():
            want, attached = model(**inputs).logits, attributes(model)
            with torch.set_grad_enabled(what == "checkpointing"), pytest.raises(ValueError, match=words):
                act(model, inputs)
            assert not seams(model, attached), "the refusal changed the model"
            assert torch.equal(model(**inputs).logits, want), "the call after a refusal"
        assert not seams(model, before) and torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "florence2", "paligemma", "blip-2"])
def test_other_families_are_refused(kind):
    """Catches: a model of another family that is changed, or that fails somewhere inside."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.CONFIG_MAPPING[kind]())
    before = attributes(model)
    with pytest.raises(ValueError, match="is not supported; use LLaVA"):
        LUVC(model)
    assert not changed(model, before)


def test_a_server_with_a_thread_per_request():
    """Catches: state of a call on the wrapper, where other requests overwrite it."""
    model, interval = tiny("qwen2_5_vl"), sys.getswitchinterval()
    kinds = enumerate(["image", "tall", "video", "tall"] * 2)
    inputs = [batch(model, [[1, f"{kind}{i}", 5, *range(6, 7 + i)]]) for i, kind in kinds]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ids = model.generate(**inputs[int(self.path[1:])], **GREEDY).tolist()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(ids).encode())

        def log_message(self, *_):
            pass

    def ask(number):
        client = http.client.HTTPConnection(*server.server_address, timeout=300)
        client.request("GET", f"/{number}")
        return json.loads(client.getresponse().read())

    with LUVC(model, BOTH), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        want = [model.generate(**each, **GREEDY).tolist() for each in inputs]
        threading.Thread(target=server.serve_forever).start()
        sys.setswitchinterval(1e-5)  # threads take turns within a layer
        try:
            with concurrent.futures.ThreadPoolExecutor(len(inputs)) as clients:
                got = list(clients.map(ask, range(len(inputs))))
        finally:
            sys.setswitchinterval(interval)
            server.shutdown()
    assert got == want


@pytest.mark.parametrize(
    ("name", "side"), [("llava-full", "left"), ("internvl", "right"), ("llava_next", "left")]
)
@torch.no_grad()
def test_a_prompt_may_end_with_a_picture(name, side, monkeypatch):
    """Captioning with a base model: the last placeholder speaks, so it counts as text and lives to the last
    layer. Catches: the next word from a position that was pruned; padding behind it taken for text."""
    model, whole = tiny(name), pieces_of
    inputs = batch(model, [[1, 5, "image1"], [1, "image2", "tall3"], [1, "tall4", 5, 6]], side)

    def without_the_last(model, ids):
        last = (ids != 0).nonzero().max().item()
        return [(token, [slot for slot in piece if slot != last]) for token, piece in whole(model, ids)]

    monkeypatch.setitem(globals(), "pieces_of", without_the_last)
    want, kept = dense(model, inputs, PRUNER)
    with LUVC(model, PRUNER) as luvc:
        got = model(**inputs).logits
    assert [[row.tolist() for row in rows] for rows in luvc.kept] == [
        [list(row) for row in rows] for rows in kept
    ]
    for b, row in enumerate(inputs["attention_mask"]):
        agree(got[b, row.nonzero().max()], want[b, row.nonzero().max()], f"the word behind sample {b}")


@pytest.mark.parametrize("name", ["llava-clip", "llava_next", "llava_onevision"])
@torch.no_grad()
def test_a_list_of_one_feature_layer_is_one_layer(name):
    """Catches: a config that is refused, or read as another layer, for a pair of brackets."""
    model = tiny(name)
    inputs = batch(model, [[1, "image", 5, 6]])
    with LUVC(model, both(name)):
        want = model(**inputs).logits
    model.config.vision_feature_layer = [model.config.vision_feature_layer]
    with LUVC(model, both(name)):
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm"])
@torch.no_grad()
def test_a_placeholder_without_a_picture_is_text(name):
    """Catches: a word that a user typed, or the model said, pruned as if it were a picture."""
    model = tiny(name)
    inputs, ids = batch(model, [[1, "image", 5, 6]]), torch.tensor([[1, 5, IMAGE, 6, 7]])
    plain = model(input_ids=ids).logits
    with LUVC(model, BOTH) as luvc:
        agree(model(input_ids=ids).logits, plain, "a prompt of text alone")
        assert [len(row) for (row,) in luvc.kept] == [5] * LAYERS and luvc.report().visual_full == 0
        model.generate(input_ids=ids, **GREEDY)
        assert [len(row) for (row,) in luvc.kept] == [5] * LAYERS
        model(input_ids=ids, past_key_values=model(**inputs).past_key_values)  # a second turn
        assert [len(row) for (row,) in luvc.kept] == [5] * LAYERS


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_report_with_everything_off(name):
    """Catches: a report that takes an off LUVC for one that prunes, or that fails after `generate`."""
    model = tiny(name)
    inputs = batch(model, ragged(name))
    with LUVC(model, OFF) as luvc:
        ids = model.generate(**inputs, **GREEDY)
        report, cache = luvc.report(), model(**inputs).past_key_values
    assert torch.equal(ids, model.generate(**inputs, **GREEDY))
    visual = ((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)).sum().item()
    assert report.positions == [report.positions_full] * LAYERS == [inputs["attention_mask"].sum()] * LAYERS
    assert report.visual_tokens == [report.visual_full] * LAYERS == [visual] * LAYERS
    stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert report.kv_bytes == report.kv_bytes_full == stored and report.flops_left == 1


@torch.no_grad()
def test_packed_rows_with_everything_off():
    """Catches: a refusal of what the plain model can do, where nothing is merged or pruned."""
    model = tiny()
    row = {"input_ids": torch.tensor([[1, 5, 6, 1, 5]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    plain = model(**row).logits
    with LUVC(model, OFF):
        assert torch.equal(model(**row).logits, plain)


@torch.no_grad()
def test_compiled_beside_luvc():
    """Catches: what torch.compile made of the plain model before, used on while LUVC is attached, and the
    reverse; an error of the compiler that does not say why."""
    torch._dynamo.reset()  # it remembers what other tests compiled
    model = tiny()
    inputs = batch(model, [[1, "image1", 5]])
    plain, beside = model(**inputs).logits, torch.compile(model, backend="eager")
    agree(beside(**inputs).logits, plain, "compiled, plain")
    with LUVC(model, BOTH):
        agree(beside(**inputs).logits, model(**inputs).logits, "compiled, LUVC attached")
    agree(beside(**inputs).logits, plain, "compiled, LUVC detached")
    torch._dynamo.reset()
    with (
        LUVC(model, BOTH),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"LUVC needs eager mode.*without it"),
    ):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)


@every_family
@torch.no_grad()
def test_offloaded_by_accelerate(name):
    """Weights that come layer by layer, as with `device_map="auto"` where memory is short. Catches: a forward
    that accelerate had put in and that is lost, weights that are looked at while they are away."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny(name)
    inputs, luvc = batch(model, ragged(name)), LUVC(model, both(name))
    plain = model(**inputs).logits
    with luvc:
        want, left = model(**inputs).logits, luvc.report().flops_left
    for module in (*luvc.family.blocks, *luvc.family.decoder.layers):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    before = attributes(model)
    assert all(weight.is_meta for weight in luvc.family.decoder.layers[0].parameters())
    with luvc:
        assert torch.equal(model(**inputs).logits, want) and luvc.report().flops_left == left
    assert not seams(model, before) and torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_hooks_of_accelerate_after_attach():
    """Catches: hooks that were put over LUVC's, and that `detach` throws away with them."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny()
    inputs, layer = batch(model, [[1, "image1", 5]]), model.model.language_model.layers[2]
    plain, luvc = model(**inputs).logits, LUVC(model, BOTH).attach()
    want = model(**inputs).logits
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer.forward.*undo that before detach"):
        luvc.detach()
    assert torch.equal(model(**inputs).logits, want), "refused, so LUVC is still attached"
    accelerate.hooks.remove_hook_from_module(layer, recurse=True)
    luvc.detach()
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_device_map_over_memory_and_disk(tmp_path):
    """The nearest thing to two devices that every machine has. Catches: weights that accelerate spread by
    itself, and that LUVC looks at or loses."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image", 5, 6], [1, 2]])
    with LUVC(model, BOTH):
        want, ids = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
    places |= {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.language_model.layers.{n}": ("cpu", "disk")[n // 2] for n in range(LAYERS)}
    spread = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "away").eval()
    assert next(spread.model.language_model.layers[3].parameters()).is_meta
    with LUVC(spread, BOTH):
        assert torch.equal(spread(**inputs).logits, want)
        assert torch.equal(spread.generate(**inputs, **GREEDY), ids)


@torch.no_grad()
def test_train_and_eval_while_attached():
    """Catches: the copy of an attention that LUVC runs, and that stays in the mode it was copied in."""
    model = tiny(attention="eager")
    inputs = batch(model, [[1, "image1", 5]])
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with LUVC(model, BOTH):
        first = model(**inputs).logits
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits), "no dropout while training"
        model.eval()
        assert torch.equal(model(**inputs).logits, first)


@torch.no_grad()
def test_several_models_at_once():
    """Catches: state that belongs to a class or to the module, not to the model."""
    models, got = [tiny("llava-clip"), tiny("qwen2_5_vl"), tiny("llava-clip")], []
    inputs, want = [batch(model, [[1, "image1", 5, 6]]) for model in models], []
    wrappers = [LUVC(model, config) for model, config in zip(models, (BOTH, PRUNER, OFF), strict=True)]
    for model, each, luvc in zip(models, inputs, wrappers, strict=True):
        with luvc:
            want.append((model(**each).logits.tolist(), luvc.report()))
    with wrappers[0], wrappers[1]:  # the third model stays plain, and off is plain
        for n in (0, 1, 2, 0):
            got.append((models[n](**inputs[n]).logits.tolist(), wrappers[n].report()))
    assert got == [*want, want[0]]


@torch.no_grad()
def test_adapters_of_peft():
    """Catches: LUVC that does not find the model inside PEFT's wrapper, or that switches its adapters off."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    with LUVC(model, BOTH):
        without = model(**inputs).logits
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    plain, merged = wrapped(**inputs).logits, copy.deepcopy(wrapped).merge_and_unload()
    with LUVC(merged, BOTH):
        want, ids = merged(**inputs).logits, merged.generate(**inputs, **GREEDY)
    with LUVC(wrapped, BOTH):
        agree(wrapped(**inputs).logits, want, "adapters beside the weights, and merged into them")
        assert not torch.allclose(want, without, **CLOSE)
        assert torch.equal(wrapped.generate(**inputs, **GREEDY), ids)
        with wrapped.disable_adapter():
            agree(wrapped(**inputs).logits, without, "adapters switched off")
    assert torch.equal(wrapped(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_trainer_with_lora(name, tmp_path):
    """Two steps of transformers' Trainer, two accumulated samples each, are two steps of gradient descent by
    hand. Catches: hooks that Trainer or accelerate lose, gradients that stop at LUVC or reach frozen
    weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def adapted():
        model = tiny(name)
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "qkv"]))

    by_hand, model, rate, losses = adapted(), adapted(), 0.1, []
    samples = [batch(tiny(name), [[1, f"image{i}", 5, 6, 7 + i]]) for i in range(4)]
    for each in samples:
        each["labels"] = torch.where(each["input_ids"] < IMAGE, each["input_ids"], -100)
    with LUVC(by_hand, BOTH):
        descent = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], rate)
        for pair in (samples[:2], samples[2:]):
            loss = sum(by_hand(**each).loss for each in pair) / 2
            loss.backward()
            descent.step()
            descent.zero_grad()
            losses.append(loss.item())
    options = {"learning_rate": rate, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0}
    options |= {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    options |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "use_cpu": True}
    options |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    options = transformers.TrainingArguments(str(tmp_path), **options)
    with LUVC(model, BOTH):
        trainer = transformers.Trainer(
            model, options, train_dataset=samples, data_collator=lambda one: one[0]
        )
        trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == pytest.approx(
        losses, rel=CLOSE["rtol"]
    )
    after, start = dict(model.named_parameters()), dict(adapted().named_parameters())
    for key, weight in by_hand.named_parameters():
        agree(after[key], weight, key)
        assert weight.requires_grad or torch.equal(after[key], start[key]), f"{key} is frozen"
    moved = {key.split(".")[3] for key, weight in after.items() if not torch.equal(weight, start[key])}
    assert len(moved) == 2 and "language_model" in moved, f"adapters of the encoder and of the LLM: {moved}"


class Foreign(torch.nn.Module):
    """A linear map that is not torch's own class, as kernels for quantised weights are."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("rows", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.rows.T


@torch.no_grad()
def test_flops_count_linear_maps_of_any_class():
    """Catches: `flops_left` that counts torch's own linear maps alone, or PEFT's wrapper beside what it
    wraps."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    with LUVC(model, BOTH) as luvc:
        want, left = model(**inputs).logits, luvc.report().flops_left
    for layer in model.model.language_model.layers:
        layer.mlp.up_proj, layer.self_attn.q_proj = (
            Foreign(layer.mlp.up_proj),
            Foreign(layer.self_attn.q_proj),
        )
    with LUVC(model, BOTH) as luvc:
        agree(model(**inputs).logits, want, "the same maps")
        assert luvc.report().flops_left == left
    wrapped = peft.get_peft_model(
        tiny(), peft.LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", r=4)
    )
    text = wrapped.base_model.model.config.get_text_config()
    C, F, kv = text.hidden_size, text.intermediate_size, text.num_key_value_heads * 8
    M = 3 * C * F + 2 * C * C + 2 * C * kv + 4 * (C + C + C + kv)  # the last term: A and B of two adapters
    n, full = torch.tensor(
        [[len(row) for (row,) in luvc.kept], inputs["input_ids"].shape[1:] * LAYERS]
    ).double()
    flops, whole = (2 * M * x + 2 * C * x * (x + 1) for x in (n, full))
    with LUVC(wrapped, BOTH) as luvc:
        wrapped(**inputs)
        assert luvc.report().flops_left == pytest.approx((flops.sum() / whole.sum()).item())


@pytest.mark.parametrize("package", ["torchao.quantization", "optimum.quanto"])
@torch.no_grad()
def test_quantised_weights(package):
    """Weight-only int8: LUVC equals the dense reference with the same weights. Catches: weights that are
    looked at where there are none, and a report that changes with the way they are stored."""
    quant = pytest.importorskip(package, reason=f"{package} is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6], [1, "tall2", 8]])
    with LUVC(model, BOTH) as luvc:
        exact, report = model(**inputs).logits, luvc.report()
    if package == "optimum.quanto":
        quant.quantize(model, weights=quant.qint8)
        quant.freeze(model)
    else:
        quant.quantize_(model, quant.Int8WeightOnlyConfig())
    plain, (want, _) = model(**inputs).logits, dense(model, inputs, BOTH)
    with LUVC(model, BOTH) as luvc:
        got = model(**inputs).logits
        assert luvc.report() == report
    text = (inputs["input_ids"] < IMAGE) & inputs["attention_mask"].bool()
    agree(got[text], want[text], "LUVC and the dense reference, both quantised")
    assert not torch.allclose(got[text], exact[text], **CLOSE), "nothing was quantised"
    assert torch.equal(model(**inputs).logits, plain)


RANK = """
import os, sys, torch, transformers
from transformers.distributed import DistributedConfig
sys.path.insert(0, os.path.dirname(sys.argv[1]))
luvc = __import__(os.path.basename(sys.argv[1]).removesuffix(".py"))
for folder in sys.argv[2:]:
    inputs, plan = torch.load(f"{folder}/inputs.pt"), DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, distributed_config=plan)
    with luvc.LUVC(model, luvc.LUVCConfig(vision_keep=0.45)) as attached, torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out = model(**inputs)
        heads = out.past_key_values.layers[0].keys.shape[1]
        result = out.logits, attached.kept, ids, vars(attached.report()), heads
    torch.save(result, f"{folder}/rank{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@torch.no_grad()
def test_tensor_parallelism(tmp_path):
    """Two processes that share heads and channels of every layer, started as README says. Catches: ranks that
    keep different tokens, so that they add up what does not belong together, and a report of one rank's
    share."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    want = {}
    for name in ("llava-clip", "qwen2_5_vl"):
        model, folder = tiny(name), tmp_path / name
        inputs = batch(model, [[1, "image1", 5, 6], [1, "tall2", "image3", 8]])
        with LUVC(model, BOTH) as luvc:
            ids, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits
            want[folder] = logits, luvc.kept, ids, vars(luvc.report()), 2
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "rank.py"), reference.__file__, *map(str, want)]
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | threads)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (logits, kept, ids, report, heads) in want.items():
        for rank in ("rank0.pt", "rank1.pt"):
            got = torch.load(folder / rank)
            agree(got[0], logits, f"{folder.name}, {rank}")
            assert str(got[1]) == str(kept) and torch.equal(got[2], ids) and got[3] == report
            assert got[4] == heads // 2, "each rank stores the keys of its own heads"


# ==== 6. The assignment =====================================================================================
#
# A test's mark is the latest task that it needs, so a mistake in one task fails no test of an earlier one. Tests
# without a mark need no function that is taught, or other families, the toy, a GPU.

TAUGHT = {  # function or Class.method -> (task, what is to be written); the order is that of luvc.py
    "merge_axis": (1, "merge neighbouring tokens along one axis of the grid"),
    "merge_plan": (2, "decide which axis merges at which step, and to how many tokens"),
    "follow": (2, "say which token of the merged grid each original patch is in"),
    "low_pass": (3, "keep the slow part of a sequence"),
    "spectral_score": (3, "score each token by what the filter makes of it"),
    "spectral_prune": (3, "return the positions of the tokens with the highest scores"),
    "inherit": (3, "pass the sizes of pruned tokens on to those that stay"),
    "Prompt.prune": (4, "prune for the next layer and list the positions that it processes"),
    "run_layer": (4, "gather the rows that are kept, run the layer, scatter its output back"),
}


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """Name -> syntax tree of each function, and as Class.method of each method."""
    found = {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part
    return found


def assignment(source: str, tasks=(1, 2, 3, 4)) -> str:
    """The source of luvc.py without the bodies of the functions taught in `tasks`; docstrings stay."""
    found, lines = functions(source), source.split("\n")  # as ast counts them, which splitlines does not
    # The syntax tree only says where a body is: cutting lines leaves comments and formatting elsewhere as they are.
    # From the end on, so that line numbers stay right.
    for name, (task, what) in reversed(TAUGHT.items()):
        if task in tasks:
            assert ast.get_docstring(found[name]), f"{name} has no docstring to say what is to be written"
            doc = found[name].body[0]
            stub = f'{" " * doc.col_offset}raise NotImplementedError("Task {task}: {what}")'
            lines[doc.end_lineno : found[name].end_lineno] = [stub]
    return "\n".join(lines)


def write_assignment(name: str) -> int:
    """Write the student's file. Returns the exit code: 0, or 2 after one line about what was wrong."""
    luvc, file = HERE / "luvc.py", Path(name)
    try:
        if file.resolve() == luvc:
            raise ValueError("that is the reference itself; name another file")
        with open(file, "x", encoding="utf-8") as stream:  # "x" never overwrites
            stream.write(assignment(luvc.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"test_luvc.py: error: --assignment {name}: {reason}; nothing was written", file=sys.stderr)
        return 2
    print(
        f"{name}: {len(TAUGHT)} functions to write; each raises NotImplementedError until then. Test task 1:"
    )
    print(f"    LUVC_MODULE={name} python -m pytest {os.path.relpath(HERE / 'test_luvc.py')} -m task1 -x")
    return 0


# Typical wrong solutions: where, what is wrong, what the first failure has to tell; then what of the function's text
# is replaced (-), and by what (+).
WRONG = """
merge_axis: the mean is not weighted: is the mean weighted by size?
- weighted = (token * mass[..., None])
+ weighted = token
- .div_(total[..., None])
+ .div_(torch.zeros_like(total).scatter_add_(-1, parent, torch.ones_like(mass))[..., None])
merge_axis: sizes are not carried: was the absorbed token's size added?
- total.to(size.dtype), parent
+ torch.ones_like(total, dtype=size.dtype), parent
merge_axis: a run starts before the cut: a new run starts behind the cut
- cut + 1
+ cut
merge_axis: similar neighbours are cut: least similar neighbours
- similar.sort(dim=-1, stable=True)
+ similar.sort(dim=-1, stable=True, descending=True)
merge_axis: ties cut the higher index: lower index
- similar.sort(dim=-1, stable=True).indices
+ W - 2 - similar.flip(-1).sort(dim=-1, stable=True).indices
merge_axis: zero tokens are unlike each other: two zero tokens are alike
- == 0), 1.0)
+ == 0), 0.0)
merge_axis: dot products in place of cosines: is it the cosine that is compared
- dot / (norm[:, :, :-1] * norm[:, :, 1:]).clamp(min=torch.finfo(token.dtype).tiny)
+ dot
merge_axis: an epsilon in the cosine: whatever the scale?
- torch.finfo(token.dtype).tiny
+ 1e-8
merge_axis: sums in half precision: float32 or better?
- torch.promote_types(x.dtype, torch.float32)
+ x.dtype
merge_axis: no gradient: what was made of it does not
- token = x.to(
+ token = x.detach().to(
merge_axis: sizes of another dtype: came back as
- total.to(size.dtype), parent
+ total, parent
merge_axis: the input is written into: an input was changed
- weighted = (token * mass[..., None])
+ weighted = token.mul_(mass[..., None])
merge_plan: rows merge first: steps alternate 2 (along W), 1 (along H)
- axis = 1 if step % 2 else 2
+ axis = 2 if step % 2 else 1
merge_plan: each axis shrinks to all of keep: shrinks to the square root
- goal = keep if steps == 1 else math.sqrt(keep)
+ goal = keep
merge_plan: a single step merges too little: a single step to `keep`
- goal = keep if steps == 1 else math.sqrt(keep)
+ goal = math.sqrt(keep)
merge_plan: an axis vanishes: expected [(2, 1, 1), (1, 1, 1)]
- max(1,
+ max(0,
follow: rows and columns are mixed up: the new column when axis is 2
- if axis == 1
+ if axis == 2
follow: every sample follows the first: where the tokens at
- parent[batch,
+ parent[0 * batch,
low_pass: the filter is reversed: are the low frequencies kept
- narrow(dim, passed, spectrum.shape[dim] - passed)
+ narrow(dim, 0, passed)
low_pass: DC is not counted: half of the 4 frequencies beside the mean
- passed = 1 + math.floor(
+ passed = math.floor(
low_pass: no gradient: does not require grad
- spectrum = torch.fft.rfft(x.float(), dim=dim)
+ spectrum = torch.fft.rfft(x.detach().float(), dim=dim)
spectral_score: detail and smooth are swapped: swapped?
- if score == "smooth"
+ if score == "detail"
spectral_prune: the lowest scores are kept: *highest* scores
- descending=True
+ descending=False
spectral_prune: positions are not sorted: ascending order
- order[:, :keep].sort(dim=1).values
+ order[:, :keep]
spectral_prune: rounding decides between equals: scores tie up to rounding
- .round()
+
spectral_prune: long tokens count more: is each brought to norm 1?
- keepdim=True).clamp(min=single.tiny)
+ keepdim=True).clamp(min=1.0, max=1.0)
spectral_prune: an epsilon in the norm: is each brought to norm 1?
- keepdim=True).clamp(min=single.tiny)
+ keepdim=True).clamp(min=1e-6)
spectral_prune: norms in half precision: norms and scores are float32's
- x.float() / x.float().norm(
+ x / x.norm(
inherit: sizes of pruned tokens are lost: a pruned token's size goes to the nearest kept token
- return size.new_zeros(kept.shape).scatter_add_(1, heir, size)
+ return size.gather(1, kept)
inherit: sizes on a tie go to the later: between both, to the earlier
- kept[:, 1:]) // 2
+ kept[:, 1:] - 1) // 2
inherit: the input is written into: an input was changed
- return size.new_zeros(kept.shape).scatter_add_(1, heir, size)
+ return size.scatter_(1, kept, size.new_zeros(kept.shape).scatter_add_(1, heir, size)).gather(1, kept)
inherit: sizes of another dtype: the dtype in which sizes came back
- size.new_zeros(kept.shape).scatter_add_(1, heir, size)
+ torch.zeros(kept.shape).scatter_add_(1, heir, size.float())
Prompt.prune: fractions are counted from what is left: *delivered*
- math.floor(fraction * tokens + 0.5)
+ math.floor(fraction * where.shape[1] + 0.5)
Prompt.prune: pruned tokens keep their size: the visual tokens that the scheme kept
- size[rows, where] = 0.0
+ size[rows, where] += 0.0
Prompt.prune: sizes are not passed on: passes its size on
- inherit(before, kept)
+ before.gather(1, kept)
run_layer: attention gets sizes without their log: expected log(size) / scaling
- weight.log()
+ weight
run_layer: the mask is that of the full sequence: it anew for the short sequence
- causal_mask(layer.self_attn.config.plain.config, x, past)
+ causal_mask(layer.self_attn.config.plain.config, hidden, past)
run_layer: rotary positions are renumbered: not renumbered
- take(t, rows, index)
+ t[:, : index.shape[1]]
run_layer: pruned rows are overwritten: as they were
- hidden.index_put(
+ torch.zeros_like(hidden).index_put(
run_layer: rows go back to the front: back in their places
- (rows, index), out)
+ (rows, torch.arange(out.shape[1])), out)
run_layer: fillers are updated: as they were
- torch.where(size[..., None] > 0, out, x)
+ out
run_layer: rows are detached by the scatter: gradient
- hidden.index_put((rows, index), out)
+ hidden.detach().index_put((rows, index), out)
run_layer: the cache counts what it stores: positions, expected 5
- store.seen + prompt.S
+ store.seen + 1
"""
WRONG = {text.partition("\n")[0].rpartition(": ")[0]: text for text in re.split(r"\n(?=\w)", WRONG.strip())}


def wrong_solution(name: str, source: str) -> tuple[str, str]:
    """The source with a mistake, and what the first failure has to tell."""
    head, *lines = WRONG[name].split("\n")
    node, source = functions(source)[name.partition(":")[0]], source.split("\n")
    text = "\n".join(source[node.lineno - 1 : node.end_lineno])
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        count = text.count(old[2:])
        assert (old[:1], new[:1], count) == ("-", "+", 1), f"WRONG, {name}: found {count} times:\n{old}"
        text = text.replace(old[2:], new[2:])
    source[node.lineno - 1 : node.end_lineno] = text.split("\n")
    return "\n".join(source), head.rpartition(": ")[2]


class Outcome:
    """A plugin of pytest that notes for each test its task, and why it failed, "" if it passed."""

    def __init__(self):
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            task = max(n for n in range(5) if n == 0 or f"task{n}" in report.keywords)
            self.tests[report.nodeid.partition("::")[2]] = task, report.longreprtext


def serve():
    """Test students' files as they come: [folder, options of pytest ...] on each line of standard input.

    Most of such a run would be the import of transformers. This process has done that, and forks for each run.
    """
    gc.freeze()  # pytest collects garbage several times a run: not all that was imported
    for line in sys.stdin:
        folder, *options = json.loads(line)
        if os.fork() == 0:
            try:
                os.chdir(folder)
                log = os.open("log", os.O_CREAT | os.O_WRONLY)
                os.dup2(log, 1), os.dup2(log, 2)
                os.environ["LUVC_MODULE"] = "student.py"
                del sys.modules[__name__], sys.modules["luvc"]  # pytest imports both anew
                # Native tracebacks: for others pytest would parse this file once more for each of their lines.
                command, outcome = [__file__, "-q", "--tb=native", "-pno:cacheprovider", *options], Outcome()
                pytest.main(command, [outcome])
                Path("outcome").write_text(json.dumps(outcome.tests))
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.wait()
        print("done", flush=True)


@pytest.fixture(scope="module")
def run_tests(tmp_path_factory):
    """(text of a student's file, options of pytest) -> {test: (task, why it failed or "")}, in order."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    env = os.environ | {"LUVC_PROFILE": "quick", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env = {key: value for key, value in env.items() if key not in ("LUVC_MODULE", "PYTEST_ADDOPTS")}
    command, pipe = [sys.executable, "-c", f"import {__name__} as tests; tests.serve()"], subprocess.PIPE
    with subprocess.Popen(command, cwd=HERE, env=env, stdin=pipe, stdout=pipe, text=True) as server:

        def run(text: str, *options: str) -> dict[str, tuple[int, str]]:
            folder = tmp_path_factory.mktemp("student").resolve()
            (folder / "student.py").write_text(text, encoding="utf-8")
            print(json.dumps([str(folder), *options]), file=server.stdin, flush=True)
            assert server.stdout.readline() == "done\n"
            log = (folder / "log").read_text(encoding="utf-8")
            assert f"testing {folder / 'student.py'}\n" in log, log
            outcome = json.loads((folder / "outcome").read_text())
            assert outcome, log
            return outcome

        yield run


@pytest.mark.parametrize("tasks", [(1, 2, 3, 4), (2,), (3,), (4,)])
def test_stub_fails_its_tests_as_not_implemented(tasks, run_tests):
    """Catches: a test that passes without the function that it is about, or one that carries too early a task."""
    text = assignment((HERE / "luvc.py").read_text(encoding="utf-8"), tasks)
    outcome = run_tests(text, "-m", " or ".join(f"task{n}" for n in range(1, max(tasks) + 1)))
    assert {task for task, _ in outcome.values()} == set(range(1, max(tasks) + 1))
    for test, (task, why) in outcome.items():
        # Without anything, a test meets the first gap on its way; with all else written, its own.
        raised = [n for n in tasks if f"NotImplementedError: Task {n}: " in why]
        if task in tasks:
            assert raised and raised[0] <= task, f"{test} does not fail for lack of its task:\n{why}"
        else:
            assert not why, f"{test} fails for lack of a later task:\n{why}"


@pytest.mark.parametrize("solution", WRONG)
def test_wrong_solution_fails_its_own_task(solution, run_tests):
    """Catches: tests that let a typical mistake through, or do not explain it. (It fails no test of an earlier task:
    these pass without the function, as the stubs show.)"""
    text, says = wrong_solution(solution, (HERE / "luvc.py").read_text(encoding="utf-8"))
    task, _ = TAUGHT[solution.partition(":")[0]]
    *passed, (last, (_, why)) = run_tests(text, "-m", f"task{task}", "-x").items()
    assert why and not any(failure for _, (_, failure) in passed), f"{last} ended the run:\n{why}"
    assert says in " ".join(why.split()), f"{last} does not say {says!r}:\n{why}"


def test_assignment_is_luvc_without_the_bodies(tmp_path, capsys):
    """Catches: docstrings or other code lost, hints left, a file of the student overwritten."""
    source, file = (HERE / "luvc.py").read_text(encoding="utf-8"), tmp_path / "student.py"
    assert main(["--assignment", str(file)]) == 0 and "-m task1" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert text == assignment(source)
    difference = difflib.unified_diff(source.split("\n"), text.split("\n"), n=0, lineterm="")
    stubs = [line for line in difference if line.startswith("+") and not line.startswith("+++")]
    assert len(stubs) == len(TAUGHT) and all("raise NotImplementedError" in line for line in stubs), stubs
    before, after = functions(source), functions(text)
    assert list(before) == list(after) and list(TAUGHT) == [name for name in before if name in TAUGHT]
    assert [task for task, _ in TAUGHT.values()] == sorted(task for task, _ in TAUGHT.values())
    for name, node in before.items():
        assert ast.get_docstring(node) == ast.get_docstring(after[name]), f"{name} lost its docstring"
        changed = ast.dump(node) != ast.dump(after[name])
        assert changed == (name in TAUGHT), f"{name} {'changed' if changed else 'kept its body'}"
    file.write_text("a week of work")
    for name, says in [
        (file, "File exists"),
        (HERE / "luvc.py", "itself"),
        (tmp_path / "no" / "x.py", "No such"),
    ]:
        assert main(["--assignment", str(name)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and says in lines[0], lines
    assert file.read_text() == "a week of work" and (HERE / "luvc.py").read_text(encoding="utf-8") == source


def test_missing_student_file_is_said_in_one_line(tmp_path, monkeypatch):
    """Catches: a traceback, or the reference tested in silence, where LUVC_MODULE names no file."""
    monkeypatch.setenv("LUVC_MODULE", str(tmp_path / "nothing.py"))
    with pytest.raises(
        pytest.Collector.CollectError, match=r"LUVC_MODULE=.*nothing\.py: no such Python file"
    ):
        module_under_test()


def main(argv: list[str]) -> int:
    """`--assignment FILE` writes the student's file; everything else goes to pytest."""
    parser = argparse.ArgumentParser(prog="test_luvc.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--assignment", metavar="FILE")
    args, rest = parser.parse_known_args(argv)
    if args.assignment is None:
        return pytest.main([__file__, *rest])
    if rest:
        parser.error(f"--assignment takes one file and nothing else, not {' '.join(rest)}")
    return write_assignment(args.assignment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
