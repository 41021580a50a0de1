"""The merger inside of the encoders, slot by slot: what merges, who gets the feature, where sizes are written."""

import itertools
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from test_luvc import (
    CLASS_TOKEN,
    CLOSE,
    END,
    HALF_THE_PIXELS,
    IMAGE,
    LUVC,
    QWENS,
    SIDE,
    START,
    WINDOWS,
    LUVCConfig,
    agree,
    batch,
    both,
    merge_axis,
    merge_plan,
    merging_family,
    pieces_of,
    reference,
    same,
    sizes_by_hand,
    spy,
    tiny,
)

THREE_BLOCKS = ["llava-clip", "llava-full", "llava-dinov2"]  # of four: an earlier output is taken


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
    return kind, unit, shapes, keep, draw(st.integers(2, 5)), torch.from_numpy(x)


@pytest.mark.task2
@given(encoders(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_signposts_say_what_was_merged(case, dtype):
    """What `merge` merges and `deliver` writes, `read_sizes` reads. Catches: a number that bfloat16 rounds, a sign
    lost, positions counted from the start of the prompt, CLS taken for a patch, text that has a size, frames,
    pictures or windows mixed up, a home that is another token's, signposts in DeepStack features."""
    kind, unit, shapes, keep, steps, x = case
    cls, tiles, windows = int(kind == "tiles with CLS"), kind.startswith("tiles"), kind == "windows"
    config = LUVCConfig(vision_keep=keep, vision_steps=steps)
    frames = [(H, W) for n, H, W in shapes for _ in range(n)]
    more = frames, unit, cls, config, steps, "cpu"
    tower = SimpleNamespace(
        **{"window_size": 4 * unit, "patch_size": 1, "fullatt_block_indexes": []} if windows else {}
    )
    merging = reference.Tiles(*more) if tiles else reference.Packed(tower, *more)

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
    for _ in range(steps):
        patches = merging.merge(patches)
    slots = patches[:: unit**2]
    if tiles:
        assert (patches[:, :cls] == 7).all(), "CLS was merged"
        h, w = merging.grids[0].size.shape[1:]
        slots = patches[:, cls:].view(n, h, unit, w, unit, -1)[:, :, 0, :, 0].flatten(0, 2)
    members = [(row > 0).nonzero()[:, 0].tolist() for row in slots[:, 2:]]
    same(sorted(itertools.chain(*members)), list(range(total)), "slots that the tokens are made of")
    index = {i: t for grid in merging.grids for i, t in zip(grid.numbers, grid.token, strict=True)}
    index = torch.cat([index[i] for i in range(len(frames))])
    assert all((index[mine] == index[mine[0]]).all() for mine in members), "a token's slots are split"
    if tiles:  # in the encoder's attention a patch weighs as much as the slots that it is made of
        want = torch.cat([torch.ones(n, cls), (patches[:, cls:, 2:] > 0).sum(-1)], 1)
        same(merging.key_sizes().tolist(), want.tolist(), "sizes for the encoder's attention")

    # The projector makes 2, 3, 1 + k % 128, k // 128 of token k. Text is 2, 3, 0, 0 or zeros: no signposts.
    def projected(start, count):
        return torch.tensor([[2, 3, 1 + k % 128, k // 128] for k in range(start, start + count)], dtype=dtype)

    token, first = projected(0, len(members)), projected(9000, cls).view(1, cls, 4).expand(n, -1, -1)
    rows = torch.cat([first, token.view(n, -1, 4)], 1) if tiles else token
    if not cls and not windows:  # DeepStack features come first, and are added to what is alive
        deep = merging.deliver(rows, 0, posts=False).reshape(total, 4)
        assert all((deep[mine] == token[k]).all() for k, mine in enumerate(members)), "a slot without feature"
    features = merging.deliver(rows, cls, posts=True)
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


def places(model, h, w, windows=False):
    """(row, column, corner) of the patches of h x w slots, in the order of the encoder's sequence."""
    if model.name in QWENS:  # slot by slot, in Qwen2.5-VL window by window of 2 x 2 slots
        slots = list(itertools.product(range(h), range(w)))
        slots.sort(key=lambda at: (at[0] // 2, at[1] // 2, *at) if windows else at)
        return [(r, c, corner) for r, c in slots for corner in range(4)]
    unit = 2 if model.name in HALF_THE_PIXELS else 1
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
    family, windowed, used = luvc.family, name == "qwen2_5_vl", 3 if name in THREE_BLOCKS else 4
    prefix, cls = int(name in CLASS_TOKEN), CLASS_TOKEN.get(name, 0)
    for number, block in enumerate(family.blocks):  # hooks from before LUVC see what it gets ...
        spy(block, lambda x, kwargs, number=number: made.update({number: x}))
        flash = lambda _, args, kwargs: (args, kwargs | {key: 7 for key in kwargs if key == "max_seqlen"})  # noqa: E731
        block.register_forward_pre_hook(
            flash, with_kwargs=True
        )  # FlashAttention wants to know the longest frame
    for number, module in enumerate(family.projectors):
        module.register_forward_hook(lambda *args, key=("features", number): made.update({key: args[2]}))
    luvc.attach()
    for number, block in enumerate(family.blocks):  # ... and those from after, what it makes of it
        spy(block, lambda x, kwargs, number=number: got.update({number: (x, dict(kwargs))}))
    spy(model.get_decoder(), lambda x, kwargs: given.update(kwargs))
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
                        tokens[i][slot] = divmod(int(parent[r, c]), sizes[i].shape[1])
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
        (embeds,) = given["inputs_embeds"]
        pieces = [piece for _, piece in pieces_of(model, inputs["input_ids"], 0)]
        visual = sorted(itertools.chain(*pieces))
        for number, features in enumerate([embeds, *(given.get("deepstack_visual_embeds") or [])]):
            made_here, offset = made["features", number], 0
            for i, piece in enumerate(pieces):
                at = rows[used - 1 if number == 0 else number - 1][
                    i
                ]  # DeepStack looks behind blocks 0, 1 and 2
                assert luvc.groups[i].tolist() == [r * sizes[i].shape[1] + c for r, c in tokens[i].values()]
                for slot in range(len(at)):  # every place has a copy
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
    """A picture of equal neighbours, merged to one token of each kind, in an encoder that knows no positions: a token
    weighs what it stands for, so attention sees the same mixture. (Qwen's encoders do not weigh tokens, so there all
    stand for the same number.) Catches: patches merged across slots, sizes that do not reach the encoder's attention,
    groups written to another home, DeepStack features too."""
    model = tiny(name, **({"window_size": 1024} if name == "qwen2_5_vl" else {}))
    off = ("position_embedding", "pos_embed", "rotary_pos_emb")
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "vis" in key and any(part in key for part in off) and tensor.is_floating_point():
            tensor.data.zero_()
    inputs, seen = batch(model, [[1, "image1", 5]]), []
    ((_, ((H, W), *_)), *_), pixels = vision_calls(name), inputs["pixel_values"]
    rows, columns = (
        ([0, 0, 1, 1], [0, 0, 1, 1, 2, 2]) if name in QWENS else ([0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2])
    )
    tile = [rows.index(r) * W + columns.index(c) for r in rows for c in columns]
    if name in QWENS:  # four rows of patches are one slot
        inputs["pixel_values"] = pixels.view(H * W, 4, -1)[tile].flatten(0, 1)
    else:
        side = pixels.shape[-1] // SIDE
        grid = pixels.reshape(3, SIDE, side, SIDE, side).permute(1, 3, 0, 2, 4).flatten(0, 1)[tile]
        grid = grid.view(SIDE, SIDE, 3, side, side).permute(2, 0, 3, 1, 4)
        inputs["pixel_values"] = grid.reshape(pixels.shape)
    steps = 2 if name in QWENS else None  # two: at once to half along each axis
    for keep, sizes in ((1.0, True), (0.25, True), (0.25, False)):
        with LUVC(model, LUVCConfig(vision_keep=keep, vision_steps=steps, llm_keep=1.0, sizes=sizes)) as luvc:
            handle = spy(model.get_decoder(), lambda _, kwargs: seen.append(kwargs))
            model(**inputs)
            handle.remove()
        groups = [r * 3 + c for r in rows for c in columns]
        assert keep == 1 or luvc.groups[0].tolist() == groups, "equal neighbours are not what merged"
    ((_, piece),) = pieces_of(model, inputs["input_ids"], 0)
    homes = [piece[slot] for slot in sizes_by_hand(groups, CLASS_TOKEN.get(name, 0))]
    full, merged, alike = (given["inputs_embeds"][0, homes] for given in seen)
    assert not torch.allclose(full[-1], full[-2], **CLOSE), "a picture that is all alike shows nothing"
    agree(merged, full, "another feature")
    assert torch.allclose(alike, full, **CLOSE) == (name in QWENS), "sizes=False: all tokens weigh the same"
    deep = [given.get("deepstack_visual_embeds") or [] for given in seen[:2]]
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
    with LUVC(model, LUVCConfig(vision_keep=0.01, llm_keep=1.0)) as luvc:
        model(**inputs, image_grid_thw=torch.tensor([[1, 64, 64]]))
    want = {2 + slot: size for slot, size in sizes_by_hand(luvc.groups[0].tolist()).items()}
    assert len(want) == 3 * 3
    got = dict(zip(luvc.kept[0][0].tolist(), luvc.sizes[0][0].tolist(), strict=True))
    assert got == {0: 1, 1: 1} | want | {2 + slots: 1, 3 + slots: 1}
