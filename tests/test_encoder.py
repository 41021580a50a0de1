"""The merger inside of the encoders, patch by patch: what merges, who gets the feature, and what is a copy of what."""
# ruff: noqa: I001

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_luvc import ANYRES, BOTH, CLASS_TOKEN, CLOSE, EPS, FAMILIES, IMAGE, LUVC, PRUNER, QWENS, SHUFFLED
from test_luvc import SIDE, VIDEO, WINDOWS, LUVCConfig, agree, batch, copies_by_hand, dense
from test_luvc import merge_axis, merge_plan, random, reference, same, spy, tiny

THREE_BLOCKS = ["llava-clip", "llava-full", "llava-dinov2"]  # of four: an earlier output is taken
in_place = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ANYRES])


@st.composite
def delivered(draw):
    """(dtype, token of each row or None for a newline, its picture, the picture behind whose projector is noise)"""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    tokens = draw(st.lists(st.integers(0, 6) | st.none(), min_size=1, max_size=24))
    pictures = draw(st.lists(st.integers(0, 2), min_size=len(tokens), max_size=len(tokens)))
    return dtype, tokens, sorted(pictures), draw(st.integers(0, 3))


@given(delivered())
def test_copies_are_told_by_their_number(case):
    """Rows of seven tokens, all equal but for their numbers. Catches: equal pictures, still frames or blank parts taken
    for one token; copies in another picture; rows that something changed, or that are no tokens (newlines), taken for
    copies; a number that half precision rounds; a row moved by more than one unit in the last place."""
    dtype, tokens, pictures, noisy = case
    x = (random(1, 1, 40) / 3).to(dtype).expand(7, -1)
    numbered = reference.number_rows(x)
    moved = (numbered.double() - x.double()).abs()
    eps, tiniest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    assert (moved <= eps * x.abs().clamp(min=tiniest).double()).all(), "more than the last bit was changed"
    rows, names = torch.stack([x[0] if token is None else numbered[token] for token in tokens]), []
    for i, (token, picture) in enumerate(zip(tokens, pictures, strict=True)):
        rows[i, 35] += (picture == noisy) * (1 + i)
        names.append((i,) if token is None or picture == noisy else (picture, token))
    middle, copies = reference.find_copies(rows, torch.tensor(pictures))
    got = dict(zip(middle.tolist(), copies.tolist(), strict=True))
    same(got, copies_by_hand(names), f"{names}: where one of the copies is kept, and how many there are")


@torch.no_grad()
def test_many_tokens_are_many():
    """Catches: numbers that begin again after 256 or 32,768 tokens."""
    x = torch.ones(40_000, 32)
    middle, copies = reference.find_copies(reference.number_rows(x), torch.zeros(len(x)).long())
    assert len(middle) == len(x) and (copies == 1).all()


def places(model, h, w, windows=False):
    """(row, column, corner) of the patches of h x w image tokens, in the order of the encoder's sequence."""
    if model.name in QWENS:  # token by token, in Qwen2.5-VL window by window of 2 x 2 tokens
        tokens = list(itertools.product(range(h), range(w)))
        tokens.sort(key=lambda at: (at[0] // 2, at[1] // 2, *at) if windows else at)
        return [(r, c, corner) for r, c in tokens for corner in range(4)]
    side = 2 if model.name in SHUFFLED else 1
    patches = itertools.product(range(h * side), range(w * side))
    return [(y // side, x // side, y % side * side + x % side) for y, x in patches]


def vision_calls(name):
    """[(parts, shapes of their pictures, tiles or frames)] for one call of the encoder each."""
    if name in QWENS:
        return [(["image1", 5, "tall2"], [(4, 6), (6, 3)]), (["video3"], [(4, 6)] * 3)]
    return [(["image1", 5, "tall2"], [(SIDE, SIDE)] * 3)]


def cut(model, inputs, shapes):
    """Positions of the placeholders of row 0, for each picture, tile or frame."""
    at = iter([i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token in (IMAGE, VIDEO)])
    cls = CLASS_TOKEN.get(model.name, 0)
    return [list(itertools.islice(at, H * W + cls)) for H, W in shapes]


@in_place
@torch.no_grad()
def test_encoder_by_hand(name):
    """What each block, the projectors and the LLM get, from what came before. Catches: merges of other tokens, along
    other axes or before other blocks, windows and frame ends of the old grid, rotary positions that are not the mean
    of what was merged, features in other places."""
    model, config = tiny(name), LUVCConfig(vision_keep=0.45, vision_steps=3, llm_keep=1.0)
    luvc, made, got, given = LUVC(model, config), {}, {}, {}
    family, windowed, used = luvc.family, name == "qwen2_5_vl", 3 if name in THREE_BLOCKS else 4
    prefix, cls = int(name in CLASS_TOKEN), CLASS_TOKEN.get(name, 0)

    def flash(_, args, kwargs):  # FlashAttention wants to know how long a frame may be
        return args, kwargs | {key: 999 for key in kwargs if key == "max_seqlen"}

    for number, block in enumerate(family.blocks):  # hooks from before LUVC see what it gets ...
        spy(block, lambda x, kwargs, number=number: made.update({number: x}))
        block.register_forward_pre_hook(flash, with_kwargs=True)
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
        tokens = [{place: place for place in itertools.product(range(h), range(w))} for h, w in shapes]
        rows = {}  # after a block: for each picture, where in its part of the sequence each place's token is
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
                    for place, (r, c) in tokens[i].items():
                        tokens[i][place] = divmod(int(parent[r, c]), sizes[i].shape[1])
                for r, c, corner in order[i]:
                    members = torch.tensor([place for place, token in tokens[i].items() if token == (r, c)])
                    means.append(2 * members.double().mean(0) + torch.tensor(divmod(corner, 2)))
                once = list(dict.fromkeys(at[:2] for at in order[i]))
                runs = itertools.groupby(once, lambda at: (at[0] // 2, at[1] // 2))
                inside = windowed and number not in WINDOWS["fullatt_block_indexes"]
                ends += [4 * len(list(run)) for _, run in runs] if inside else [len(order[i])]
                rows[number].append([once.index(token) for token in tokens[i].values()])
            want = torch.cat(pieces) if x.ndim == 2 else torch.cat([x[:, :prefix], torch.stack(pieces)], 1)
            assert torch.equal(y, want), f"block {number} does not get what was merged, in its own order"
            if name in QWENS:
                same(arguments["cu_seqlens"].diff().tolist(), ends, f"block {number}: where frames end")
                assert arguments.get("max_seqlen", 999) >= max(ends), (
                    "an upper bound will do, a lower one not"
                )
                rotary = model.model.visual.rotary_pos_emb(y, torch.stack(means))
                for mine, theirs in zip(arguments["position_embeddings"], rotary, strict=True):
                    agree(mine, theirs, f"block {number}: rotary positions")
        (embeds,) = given["inputs_embeds"]
        pieces = cut(model, inputs, shapes)
        visual = list(itertools.chain(*pieces))
        for number, features in enumerate([embeds, *(given.get("deepstack_visual_embeds") or [])]):
            made_here, offset = made["features", number], 0
            for i, piece in enumerate(pieces):
                at = rows[number - 1 if number else used - 1][i]  # DeepStack looks behind blocks 0, 1 and 2
                assert luvc.groups[i].tolist() == [r * sizes[i].shape[1] + c for r, c in tokens[i].values()]
                for place in range(len(at)):  # every place has a copy
                    packed = made_here.ndim == 2
                    want = made_here[offset + at[place]] if packed else made_here[i, cls + at[place]]
                    here = features[visual.index(piece[place]) if number else piece[cls + place]]
                    near = (here - want).abs() <= EPS * want.abs()  # all but the last bits, which number it
                    assert near.all(), f"place {place} of picture {i} has another token's feature"
                assert not cls or torch.allclose(embeds[piece[0]], made_here[i, 0]), "CLS is lost"
                offset += max(at) + 1


@in_place
@torch.no_grad()
def test_merging_equal_neighbours_is_exact(name):
    """A picture of equal neighbours, merged to one token of each kind, in an encoder that knows no positions: a token
    weighs what it stands for, so attention sees the same mixture. (Qwen's encoders do not weigh tokens, so there all
    stand for the same number.) Catches: patches merged across image tokens, sizes that do not reach the encoder's
    attention, features copied to other places, DeepStack features too."""
    model = tiny(name, **({"window_size": 1024} if name == "qwen2_5_vl" else {}))
    off = ("position_embedding", "pos_embed", "rotary_pos_emb")
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "vis" in key and any(part in key for part in off) and tensor.is_floating_point():
            tensor.data.zero_()
    inputs, seen = batch(model, [[1, "image1", 5]]), []
    ((_, ((H, W), *_)), *_), pixels = vision_calls(name), inputs["pixel_values"]
    rows, columns = ([0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2])
    if name in QWENS:
        rows, columns = ([0, 0, 1, 1], [0, 0, 1, 1, 2, 2])
    tile = [rows.index(r) * W + columns.index(c) for r in rows for c in columns]
    if name in QWENS:  # four rows of patches are one image token
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
    (piece,) = cut(model, inputs, [(H, W)])
    full, merged, alike = (given["inputs_embeds"][0, piece] for given in seen)
    assert not torch.allclose(full[-1], full[0], **CLOSE), "a picture that is all alike shows nothing"
    agree(merged, full, "another feature")
    assert torch.allclose(alike, full, **CLOSE) == (name in QWENS), "sizes=False: all tokens weigh the same"
    deep = [given.get("deepstack_visual_embeds") or [] for given in seen[:2]]
    assert len(deep[0]) == (3 if name == "qwen3_vl" else 0)
    for full, merged in zip(*deep, strict=True):
        agree(merged, full, "another DeepStack feature")


def picture_of(model, H, W):
    """Inputs with a picture of H x W image tokens, whatever the config says of a tile's size."""
    side, noise = 4 * (2 if model.name in SHUFFLED else 1), torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 5, *[IMAGE] * (H * W), 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.name in QWENS:
        pixels = {"pixel_values": torch.randn(4 * H * W, 96, generator=noise)}
        grid = {
            "image_grid_thw": torch.tensor([[1, 2 * H, 2 * W]]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
        return inputs | pixels | grid
    pixels = torch.randn(1, 3, H * side, W * side, generator=noise)
    if model.name in ("idefics3", "smolvlm"):
        return inputs | {"pixel_values": pixels[None]}
    if model.name == "llava-clip":  # (as a keyword of the model only since transformers 5.24)
        more = {"interpolate_pos_encoding": True}
        model.model.vision_tower.register_forward_pre_hook(lambda _, a, k: (a, k | more), with_kwargs=True)
    return inputs | {"pixel_values": pixels}


GEOMETRIES = [("llava-clip", 3, 12), ("llava-dinov2", 2, 4), ("idefics3", 3, 3), ("smolvlm", 4, 4)]
GEOMETRIES += [(name, 1, 1) for name in ("llava-clip", "llava-dinov2", "idefics3", *QWENS)]


@pytest.mark.parametrize(("name", "H", "W"), GEOMETRIES)
@torch.no_grad()
def test_geometry_is_that_of_the_pixels(name, H, W):
    """Position embeddings that are interpolated, tiles smaller than `image_size`, a picture of one token. Catches: a
    grid from the config (3 x 12 has as many tokens as 6 x 6, and would be merged as such); what takes for granted that
    there is something to merge or prune."""
    model = tiny(name)
    inputs = picture_of(model, H, W)
    with LUVC(model, BOTH) as luvc:
        got, (token,) = model(**inputs).logits, luvc.groups
    *_, (_, h, w) = merge_plan(H, W, 0.45, len(luvc.family.blocks) - 1)
    rows, columns = token.view(H, W) // w, token.view(H, W) % w
    same((int(rows.max()) + 1, int(columns.max()) + 1), (h, w), f"the grid that {H} x {W} became")
    ordered = (rows.diff(dim=0) >= 0).all() and (columns.diff(dim=1) >= 0).all()
    assert ordered, f"these are no merges of neighbours along lines: {token.view(H, W)}"
    want = dense(model, inputs, BOTH)[0][:, -2:]
    agree(got[:, -2:], want, "other logits than with copies masked")


@pytest.mark.parametrize("name", ["llava-clip", *ANYRES])
@torch.no_grad()
def test_a_list_of_one_feature_layer_is_one_layer(name):
    """Catches: a config that is refused, or read as another layer, for a pair of brackets."""
    model = tiny(name)
    inputs = batch(model, [[1, "image", 5, 6]])
    with LUVC(model):
        want = model(**inputs).logits
    model.config.vision_feature_layer = [model.config.vision_feature_layer]
    with LUVC(model):
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_few_blocks_with_the_merger_off(blocks):
    """Catches: steps that do not fit the blocks, although nothing is merged."""
    model = tiny("llava-siglip", num_hidden_layers=blocks)
    inputs = batch(model, [[1, "image", 5, 6]])
    want, _ = dense(model, inputs, PRUNER)
    with LUVC(model, PRUNER):
        agree(model(**inputs).logits[:, -2:], want[:, -2:], "the Pruner alone")


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_gradients_of_the_pixels(name):
    """Catches: a gradient that stops at a merge, a copy, its number, or a gather."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, "tall2", 6]])
    pixels = inputs["pixel_values"].requires_grad_()
    with LUVC(model, BOTH):
        got = model(**inputs).logits[:, -1]
    pair = [
        torch.autograd.grad(logits.square().sum(), pixels)[0]
        for logits in (got, dense(model, inputs, BOTH)[0][:, -1])
    ]
    scale = pair[1].abs().max()
    agree(pair[0] / scale, pair[1] / scale, "another gradient than with pruned tokens masked")


@torch.no_grad()
def test_encoder_in_another_dtype():
    """Catches: numbers that are lost when the model casts features to the dtype of its LLM."""
    model = tiny().bfloat16()
    model.model.vision_tower.float(), model.model.multi_modal_projector.float()
    with LUVC(model, LUVCConfig(vision_keep=0.45, llm_keep=1.0)) as luvc:
        model(**batch(model, [[1, "image1", 5, 6]]))
    copies = copies_by_hand(luvc.groups[0].tolist()).values()
    same(luvc.sizes[0][0].tolist(), [1, *copies, 1, 1], "sizes: text, image tokens, text")
