"""Faults that users, other suites and a fuzzer found, each with a small case, so that their whole kind stays away.

The right value is the plain model's answer wherever there is one: bit by bit with everything off, to rounding errors
with NEARLY, where the whole machinery runs and keeps all. Else it is the dense reference of test_luvc.py, a row of a
batch against itself alone, or a ValueError that names the feature and leaves model and cache as they were.
"""

import ast
import contextlib
import functools
import gc
import inspect
import itertools
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import test_luvc
from test_luvc import (
    CACHE,
    END,
    FAMILIES,
    GREEDY,
    HERE,
    IMAGE,
    LAYERS,
    LUVC,
    MODULE,
    PRUNED_ONLY,
    QWENS,
    START,
    VIDEO,
    LUVCConfig,
    agree,
    batch,
    both,
    bytes_of,
    dense,
    part_of_prompt,
    positions,
    prompt,
    spectral_prune,
    tiny,
)

OFF = LUVCConfig(vision_keep=1.0, llm_keep=1.0)
NEARLY = LUVCConfig(vision_keep=1.0, llm_keep=0.999)  # of at most 499 tokens all are kept, in every layer
PRUNER = LUVCConfig(vision_keep=1.0)
QUARTER = LUVCConfig(vision_keep=1.0, llm_keep=0.25)  # of each picture, in every layer

each_family = pytest.mark.parametrize("name", FAMILIES)
no_grad = torch.no_grad()


def families(*names):
    return pytest.mark.parametrize("name", names)


def refused(words):
    return pytest.raises(ValueError, match=f"(?i){words}")


def run(model, config, inputs):
    with LUVC(model, config) as luvc:
        return model(**inputs).logits, luvc


def add_columns(model, inputs, *tokens):
    """The same inputs with these words behind each row, all of them shown; and positions for all."""
    more = torch.tensor(tokens).expand(len(inputs["input_ids"]), -1)
    new = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    new |= {"mm_token_type_ids": torch.zeros_like(more).int()} if model.name in QWENS else {}
    whole = inputs | {key: torch.cat([inputs[key], columns], 1) for key, columns in new.items()}
    whole["input_ids"].lengths = getattr(inputs["input_ids"], "lengths", [])  # for `dense`
    return whole | {"position_ids": positions(model, whole)}


def talk(model, whole, ends, masks):
    """The logits of several calls on one KV cache, which end at these columns, each with its mask."""
    cache, start, logits = DynamicCache(), 0, []
    for end, mask in zip(ends, masks, strict=True):
        part = {"input_ids": whole["input_ids"][:, start:end], "attention_mask": mask, CACHE: cache}
        part["position_ids"] = whole["position_ids"][..., start:end]
        if not start:
            media = ("pixel", "image", "video")
            part |= {key: value for key, value in whole.items() if key.startswith(media)}
            part |= {key: whole[key][:, :end] for key in ("mm_token_type_ids",) if key in whole}
        logits.append(model(**part).logits)
        start = end
    return logits


def in_each(luvc, pieces):
    """How many tokens layer 0 kept of each piece of sample 0; a piece is the positions of a picture or frame."""
    kept = luvc.kept[0][0].tolist()
    return [sum(position in piece for position in kept) for piece in pieces]


# ---- What the attention mask says --------------------------------------------------------------------------


@each_family
@no_grad
def test_hidden_picture(name):
    """Catches: a picture that the mask hides (it stands in padding) is pruned or refused like any other; with all off,
    code runs that only pruning needs, and raises."""
    model = tiny(name)
    n = len(prompt(model, "image1"))
    right, left, seen = [1, 2, 3, "image1", 7], ["image1", 5, 6, 7, 8], [1, "image2", 5, 6, 7]
    for row, hidden, alone in ((right, slice(3, None), [1, 2, 3]), (left, slice(0, n), [5, 6, 7, 8])):
        inputs = batch(model, [row, seen])
        inside = inputs | {"position_ids": positions(model, inputs)}  # a mask may end inside of a picture
        inside["attention_mask"] = inputs["attention_mask"].clone()
        mask = inputs["attention_mask"]
        mask[0, hidden], inside["attention_mask"][0, n // 2 :] = 0, 0
        for given in (inputs, inside):
            assert torch.equal(run(model, OFF, given)[0], model(**given).logits), "off is the plain model"
        there = mask[0].nonzero()[:, 0]
        for config in (PRUNER, both(name)):
            got, luvc = run(model, config, inputs)
            want = [run(model, config, batch(model, [one]))[0][0] for one in (alone, seen)]
            agree(got[0, there], want[0], "text beside a hidden picture is not as if alone")
            agree(got[1], want[1], "the other row is not as if alone")
            for layer in luvc.kept:
                assert layer[0].tolist() == there.tolist(), "hidden is padding: no layer processes it"


@each_family
@no_grad
def test_right_padding_without_a_cache(name):
    """Catches: positions that begin again behind padding taken for the seam of packed sequences. Without a KV cache,
    generate() writes position 0 at padding on the right, and its next word gets that of the last column plus one."""
    model, config = tiny(name), both(name)
    inputs = batch(model, [[1, "image1", 5, "tall2", 6, 7], [1, "image3", 5, 6], [1, 2, 3]], "right")
    at = positions(model, inputs).masked_fill(inputs["attention_mask"] == 0, 0)
    whole = add_columns(model, inputs, 7) | {"position_ids": torch.cat([at, at[..., -1:] + 1], -1)}
    shown = whole["attention_mask"].bool()
    got, want = run(model, config, whole | {"use_cache": False})[0], dense(model, whole, config)[0]
    agree(got[shown], want[shown], "other logits than with pruned tokens masked")
    with LUVC(model, config):
        cached, uncached = (model.generate(**inputs, **GREEDY, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached), f"{uncached} without a KV cache, {cached} with one"


@each_family
@no_grad
def test_later_masks(name):
    """Catches: what the mask of a later call says of positions that are stored already is not read, nor that of a call
    of one word. Row 0 answers sooner than row 1, and turn 2 hides its padding; or it hides words or the picture of
    turn 1; or the word that was just generated is hidden in one row."""
    model = tiny(name)
    first = batch(model, [[1, "image1", 5, 6], [1, "image2", 5, 7]])
    n, whole = first["input_ids"].shape[1], add_columns(model, first, 8, 9, 10, 11, 12, 13)
    ends = [n, n + 1, n + 2, n + 3, n + 6]  # a prompt, three words, a second turn
    cases = {  # row, columns, the first call that hides them
        "padding behind a finished row": (0, slice(n + 1, n + 3), 4),
        "a word of the first turn": (0, slice(n - 2, n - 1), 4),
        "the picture of the first turn": (1, slice(1, n - 2), 4),
        "the word of this call": (1, slice(n + 1, n + 2), 2),
    }
    for case, (row, columns, since) in cases.items():
        masks = [torch.ones(2, end, dtype=torch.int64) for end in ends]
        for mask in masks[since:]:
            mask[row, columns] = 0
        want = talk(model, whole, ends, masks)
        with LUVC(model, OFF):
            assert all(map(torch.equal, talk(model, whole, ends, masks), want)), f"{case}: off is plain"
        with LUVC(model, NEARLY):
            got = talk(model, whole, ends, masks)
        for call, mask in enumerate(masks):
            shown = mask[:, -got[call].shape[1] :].bool()
            agree(got[call][shown], want[call][shown], f"{case}, call {call}: the plain model says otherwise")
        if case.startswith("padding"):  # nothing that stays was computed while it was shown
            with LUVC(model, both(name)):
                got = talk(model, whole, ends, masks)[-1]
            want = dense(model, whole | {"attention_mask": masks[-1]}, both(name))[0][:, n + 3 :]
            agree(got, want, f"{case}: other logits than with all that is not there masked")


@families("llava-clip", "qwen2_5_vl")
@no_grad
def test_masks_that_disagree_are_refused(name):
    """Catches: a wrong answer in silence if a mask shows again what an earlier one hid, is shorter than the sequence,
    or is missing after one that hid something; a refusal that has changed the cache before."""
    model = tiny(name)
    first = batch(model, [[1, "image1", 5, 6], [1, 2]])  # padded on the left
    n, whole = first["input_ids"].shape[1], add_columns(model, first, 8, 9)
    mask = whole["attention_mask"]
    for wrong in (torch.ones_like(mask), mask[:, :-1], None):
        masks, ends = [mask[:, :n], wrong], [n, n + 2]
        plain = talk(model, whole, ends, masks)
        with LUVC(model, OFF):
            got = talk(model, whole, ends, masks)
            assert all(map(torch.equal, got, plain)), "off cannot raise and is the plain model"
        with LUVC(model, both(name)):
            cache = DynamicCache()
            words = {"input_ids": whole["input_ids"][:, n:], "position_ids": whole["position_ids"][..., n:]}
            model(**first, position_ids=whole["position_ids"][..., :n], **{CACHE: cache})
            with refused("mask"):
                model(**words, attention_mask=wrong, **{CACHE: cache})
            got = model(**words, attention_mask=mask, **{CACHE: cache}).logits
            want = talk(model, whole, ends, [mask[:, :n], mask])[1]
            assert torch.equal(got, want), "after a refusal it goes on as if nothing had been asked"


@families("llava-clip", "qwen2_vl")
@no_grad
def test_mask_longer_than_the_sequence(name):
    """Catches: a mask with room for words to come, zeros behind, aligned at its right end: the last words are lost.
    Transformers aligns masks at the left."""
    model = tiny(name)
    first = batch(model, [[1, "image1", 5, 6, 7], [1, 2, 3]])
    n, whole = first["input_ids"].shape[1], add_columns(model, first, 8, 9)
    exact = [whole["attention_mask"][:, :end] for end in (n, n + 2)]
    roomy = [torch.nn.functional.pad(mask, (0, 20)) for mask in exact]
    plain = talk(model, whole, [n, n + 2], roomy)
    for config in (OFF, PRUNER, both(name)):
        with LUVC(model, config):
            got, want = (talk(model, whole, [n, n + 2], masks) for masks in (roomy, exact))
        assert config is not OFF or all(map(torch.equal, got, plain)), "off is the plain model"
        for one, other, shown in zip(got, want, (exact[0].bool(), exact[1][:, n:].bool()), strict=True):
            agree(one[shown], other[shown], "zeros behind the mask change the answer")


# ---- How modules are called --------------------------------------------------------------------------------


@each_family
@no_grad
def test_calls_by_keyword(name):
    """Catches: hooks that look for arguments by one name, or by their place; a module's own signature says."""
    model = tiny(name)
    inputs, configs = batch(model, [[1, "image1", 5, 6]]), (OFF, PRUNER, both(name))
    want = [run(model, config, inputs)[0] for config in configs]
    family = LUVC(model, OFF).family
    for module in (family.vision, family.projector, model.model, model.get_decoder()):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        move = functools.partial(lambda names, _, a, k: ((), dict(zip(names, a, strict=False)) | k), names)
        module.register_forward_pre_hook(move, with_kwargs=True)
    for config, logits in zip(configs, want, strict=True):
        got = run(model, config, inputs)[0]
        assert torch.equal(got, logits), "other logits if encoder, projector or LLM is called by keyword"


@families("llava-clip", "internvl", "idefics3")
@no_grad
def test_compiled_tower(name):
    """Catches: an encoder that was compiled before attach() and does not see hooks: nothing is merged, and the report
    tells of merged tokens. Right, or refused by name."""
    model = tiny(name)
    inputs, configs = batch(model, [[1, "image1", 5, 6]]), (both(name), both(name, sizes=False))
    want = [run(model, config, inputs)[0] for config in configs]
    tower = LUVC(model).family.vision
    tower.forward = torch.compile(tower.forward, backend="eager")
    plain = model(**inputs).logits
    for config, logits in zip(configs, want, strict=True):
        try:
            got = run(model, config, inputs)[0]
        except ValueError as error:
            assert "compile" in str(error), f"the message should name what is wrong: {error}"
        else:
            agree(got, logits, "other logits than with an encoder that is not compiled")
        assert torch.equal(model(**inputs).logits, plain), "afterwards the model is what it was"
    torch.compiler.reset()


@families("llava-clip", "llava_onevision", "internvl", "qwen2_vl")
@no_grad
def test_features_by_hand(name):
    """Catches: nothing is pruned, or half of the rows are signposts, and nobody says so, if somebody takes features,
    scatters them and calls the LLM; likewise a projector that is called by hand."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    projector, given = LUVC(model, OFF).family.projector, []

    def by_hand():
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        at = (inputs["input_ids"] == IMAGE)[..., None]
        embeds = embeds.masked_scatter(at, torch.cat(list(features)))
        return model.get_decoder()(inputs_embeds=embeds).last_hidden_state

    handle = projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    plain = by_hand()
    handle.remove()
    with LUVC(model, OFF):
        assert torch.equal(by_hand(), plain), "off is the plain model"
    merger = LUVCConfig(vision_keep=both(name).vision_keep, llm_keep=0.5)
    for config in (PRUNER, merger):
        with LUVC(model, config), refused("inputs_embeds"):
            by_hand()
        assert torch.equal(by_hand(), plain), "a refusal leaves the model as it was"
    if merger.vision_keep < 1:
        with LUVC(model, PRUNER):
            want = projector(given[0])
        with LUVC(model, merger), refused("projector"):
            projector(given[0])
        assert torch.equal(projector(given[0]), want), "a refusal leaves the projector as it was"


# ---- Which tokens are a picture ----------------------------------------------------------------------------


@families(*PRUNED_ONLY)
@no_grad
def test_pictures_without_text_between(name):
    """Catches: pictures side by side pruned as one: a blank one loses its tokens to its neighbour."""
    model = tiny(name)
    inputs, n = batch(model, [[1, "image1", "image2", 5]]), len(prompt(model, "image1"))
    inputs["pixel_values"][0] = 0.0
    got = in_each(run(model, QUARTER, inputs)[1], [range(1, n + 1), range(n + 1, 2 * n + 1)])
    assert got == [n // 4] * 2, f"{got} are kept of two pictures of {n} tokens: a quarter of each by itself"


@no_grad
def test_frames_of_a_clip():
    """Catches: clips of LLaVA-OneVision pruned as one piece, not frame by frame; the newline behind each of them, which
    was no feature of theirs in older transformers, counted for another."""
    clips = torch.randn(2, 3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    clips[:, 0] = 0.0
    ids = torch.tensor([[1, *[VIDEO] * 28, 6, *[VIDEO] * 28, 5]])  # 3 x 9 and a newline
    config = LUVCConfig(vision_keep=1.0, llm_keep=0.34)
    luvc = run(tiny("llava_onevision"), config, {"input_ids": ids, "pixel_values_videos": clips})[1]
    ends = [at + end for at in (1, 30) for end in (0, 9, 18, 28)]
    got = in_each(luvc, [range(*pair) for pair in itertools.pairwise(ends)])
    assert got == [3, 3, 3, 1, 3, 3, 3], (
        f"{got} are kept of frames of 9, 9 and 10 and a word, twice: a third of each"
    )


@families(*QWENS)
@no_grad
def test_clip_by_what_the_model_knows(name):
    """Catches: frames found by positions alone, which are linear in a second turn; a picture and the clip directly
    behind it taken for one piece."""
    model, n = tiny(name), 24
    (*_, picture), (row, *_, clip) = part_of_prompt(model, "image1"), part_of_prompt(model, "clip2")
    clip["pixel_values_videos"][: 4 * n] = 0.0  # frame 0 is blank

    def inputs(ids, media):
        types = [[{IMAGE: 1, VIDEO: 2}.get(i, 0) for i in ids]]
        return {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor(types).int(), **media}

    if name != "qwen3_vl":  # which has time stamps between frames
        ids = [1, START, *[IMAGE] * n, *[VIDEO] * 2 * n, END, 5]
        luvc = run(model, QUARTER, inputs(ids, picture | clip))[1]
        got = in_each(luvc, [range(2 + i * n, 2 + (i + 1) * n) for i in range(3)])
        assert got == [6, 6, 6], f"{got} are kept of a picture and two frames of {n}: a quarter of each"
    with LUVC(model, QUARTER) as luvc:
        cache = getattr(model(**inputs([1, START, *[IMAGE] * n, END, 5], picture), use_cache=True), CACHE)
        at = [cache.get_seq_length() + i for i, token in enumerate(row) if token == VIDEO]
        model(**inputs([*row, 6], clip), **{CACHE: cache})
    got = in_each(luvc, [at[:n], at[n:]])
    assert got == [6, 6], f"{got} are kept of two frames in a second turn: a quarter of each by itself"


@families(*QWENS, "llava_onevision")
@no_grad
def test_placeholder_that_is_text(name):
    """Catches: a placeholder of one modality that is text, beside a real picture of the other, is pruned."""
    model = tiny(name)
    for word, part in [(VIDEO, "image1"), (IMAGE, "clip1")][: 1 + (name in QWENS)]:
        model.get_input_embeddings().weight[word] = model.get_input_embeddings().weight[7]  # means the same
        want, got = (batch(model, [[1, part, 5, token, 6]]) for token in (7, word))
        got |= {"mm_token_type_ids": want["mm_token_type_ids"]} if name in QWENS else {}
        (want, plain), (got, luvc) = run(model, both(name), want), run(model, both(name), got)
        for one, other in zip(luvc.kept, plain.kept, strict=True):
            assert one[0].tolist() == other[0].tolist(), f"{word} is text here, and no picture"
        agree(got, want, f"{word} is text here, and no picture")


def one_slot(name):
    """A model whose pictures have a single slot (or as few as can be), and inputs: two rows with one each."""
    shuffle = name in ("internvl", "idefics3", "smolvlm")  # a slot is 2 x 2 patches of 4 x 4 pixels
    side, noise = 8 if shuffle else 4, torch.Generator().manual_seed(0)
    size = {} if name in QWENS else {"image_size": [side] * 2 if name == "internvl" else side}
    model = tiny(name, **size)
    if name in QWENS:
        media = {"pixel_values": torch.randn(8, 3 * 2 * 4 * 4, generator=noise)}
        media["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
    else:
        shape = (2, 1, 3) if name in (*PRUNED_ONLY, "idefics3", "smolvlm") else (2, 3)
        media = {"pixel_values": torch.randn(*shape, side, side, generator=noise)}
    if name in PRUNED_ONLY:  # the whole picture and one tile
        model.config.image_grid_pinpoints = [[side, side]]
        media = {"pixel_values": media["pixel_values"].repeat(1, 2, 1, 1, 1)}
        media["image_sizes"] = torch.tensor([[side, side]] * 2)
    model.slots = n = len(model.model.get_image_features(**media, return_dict=True).pooler_output[0])
    ids = torch.tensor([[1, 5, *[IMAGE] * n, 6], [1, *[IMAGE] * n, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    return model, inputs | ({"mm_token_type_ids": (ids == IMAGE).int()} if name in QWENS else {})


@each_family
@no_grad
def test_picture_of_one_slot(name):
    """Catches: what takes for granted that there is something to merge or prune: grids of 1 x 1, no boundaries."""
    model, inputs = one_slot(name)
    for config in (PRUNER, both(name)):
        got, luvc = run(model, config, inputs)
        want, kept = dense(model, inputs, config)
        agree(got, want, "other logits than with pruned tokens masked")
        for layer, b in itertools.product(range(LAYERS), range(2)):
            assert luvc.kept[layer][b].tolist() == list(kept[layer][b]), f"layer {layer}, sample {b}"
    assert torch.equal(run(model, OFF, inputs)[0], model(**inputs).logits), "off is the plain model"


# ---- Refusals ----------------------------------------------------------------------------------------------


@families("llava-clip", "internvl", "qwen2_vl")
@no_grad
def test_prompt_ends_with_merged_picture(name):
    """Catches: a refusal that depends on pixels, on whether the last slot happens to be a token's home. What counts is
    the last position that the mask shows. And a refusal after the cache was changed."""
    model = tiny(name)
    text = batch(model, [[1, 2, 3], [4, 5, 6]])
    want = model(**text).logits
    for seed in range(6):
        inputs = batch(model, [[1, f"image{seed}", 5, 6], [1, f"image{seed}", 5, 7]])
        inputs["position_ids"] = positions(model, inputs)
        inputs["attention_mask"][1, 12:] = 0  # inside of the picture
        cache = DynamicCache()
        with LUVC(model, both(name)), refused("picture"):
            model(**inputs, **{CACHE: cache})
        assert torch.equal(model(**text, **{CACHE: cache}).logits, want), "the empty cache is empty no more"


@no_grad
def test_refused_before_anything_changes():
    """Catches: a refused call that has taken over the caller's empty KV cache, so that the plain model says it was
    filled under LUVC."""
    model = tiny()
    text, inputs = batch(model, [[1, 2, 3, 4]]), batch(model, [[1, "image1", 5, 6, 7, 8]])
    want, n = model(**text).logits, inputs["input_ids"].shape[1]
    seams = [torch.arange(n)[None] % (n - behind) for behind in (2, 4)]  # in the text, and behind the picture
    wrong = [("picture", batch(model, [[1, 5, "image4"]]))]
    wrong += [("position_ids", {"position_ids": at, "attention_mask": None}) for at in seams]
    wrong += [("attention_mask", {"attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool).tril()})]
    wrong += [("mask", {"attention_mask": inputs["attention_mask"][:, :-1]})]
    for words, given in wrong:
        cache = DynamicCache()
        with LUVC(model, both("llava-clip")), refused(words):
            model(**inputs | given, **{CACHE: cache})
        assert torch.equal(model(**text, **{CACHE: cache}).logits, want), f"{words}: the cache was changed"


@families("llava-clip", "qwen2_vl")
@no_grad
def test_caption(name, monkeypatch):
    """Catches: other logits without a KV cache if a prompt ends with a picture. The last visual token speaks the first
    word, so it lives to the last layer, but only while it stands last."""
    model = tiny(name)
    inputs = batch(model, [[1, 5, "image1"]])
    if name in QWENS:  # without the token that ends a picture
        rows = ("input_ids", "attention_mask", "mm_token_type_ids")
        inputs |= {key: inputs[key][:, :-1] for key in rows}
        inputs["input_ids"].lengths = [[24]]
    n, whole = inputs["input_ids"].shape[1], add_columns(model, inputs, 8, 9)
    ends = [n, n + 1, n + 2]
    with LUVC(model, PRUNER):
        got = talk(model, whole, ends, [whole["attention_mask"][:, :end] for end in ends])
        with refused("cache"):
            model.generate(**inputs, **GREEDY, use_cache=False)
    pieces = test_luvc.pieces_of
    shorter = lambda *args: [(token, piece[:-1]) for token, piece in pieces(*args)]  # noqa: E731
    monkeypatch.setattr(test_luvc, "pieces_of", shorter)
    want = dense(model, whole, PRUNER)[0]
    agree(torch.cat(got, 1), want, "other logits than with the last visual token treated as text")


@families("llava-clip", "internvl", "idefics3", "qwen2_vl")
def test_gradient_checkpointing(name):
    """Catches: encoder or LLM under gradient checkpointing: some releases run hooks again in the backward pass, which
    merge twice. Refused by name, in training only."""
    for part in ("encoder", "LLM"):
        model = tiny(name)
        inputs = batch(model, [[1, "image1", 5, 6]])
        inputs |= {"labels": inputs["input_ids"], "use_cache": False}
        (
            LUVC(model).family.vision if part == "encoder" else model.get_decoder()
        ).gradient_checkpointing_enable()
        with LUVC(model, both(name)):
            answer = model(**inputs).loss
        model.train()
        with LUVC(model, both(name)), refused("checkpointing"):
            model(**inputs)
        with LUVC(model, OFF):
            loss = model(**inputs).loss
            loss.backward()
        assert torch.equal(loss, model(**inputs).loss), "off is the plain model"
        with LUVC(model.eval(), both(name)):
            assert torch.equal(model(**inputs).loss, answer), "a refusal leaves the model as it was"


# ---- Numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@no_grad
def test_weight_of_what_is_not_there(dtype):
    """Catches: a key of size 0 hidden by a finite bias that is not low enough: with large biases of queries and keys,
    which Qwen2 has, the logits of all visible keys lie below it."""
    model = tiny("llava-siglip").to(dtype)
    rows = [[1, "image1", 5, 6, 7, 8, 9], [1, 2, 3], [1, "image2", 5]]

    def gap():
        """The largest difference between a row of a batch and the row alone."""
        found = 0.0
        for side, (b, row) in itertools.product(("left", "right"), enumerate(rows)):
            inputs = [batch(model, some, side) for some in (rows, [row])]
            shown = inputs[0]["attention_mask"][b].bool()
            floats = [{k: v.to(dtype) for k, v in each.items() if v.is_floating_point()} for each in inputs]
            got, want = (model(**each | more).logits for each, more in zip(inputs, floats, strict=True))
            found = max(found, (got[b, shown] - want[0]).abs().max().item())
        return found

    for size in (30, 100):  # logits of -1,800 and -20,000; float16 reaches to 65,504
        for layer in model.get_decoder().layers:
            layer.self_attn.q_proj.bias.fill_(-size)
            layer.self_attn.k_proj.bias.fill_(size)
        plain = gap()
        with LUVC(model, NEARLY):
            got = gap()
        assert got < 1e-3 + 2 * plain, f"biases of {size}: rows differ by {got} from alone, plain by {plain}"


@no_grad
def test_bytes_of_the_cache():
    """Catches: a report that leaves out padding that all rows share, which is stored like anything else."""
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6], [1, "image2", 7]])
    for key in ("input_ids", "attention_mask"):
        inputs[key] = torch.nn.functional.pad(inputs[key], (3, 0))
    plain = bytes_of(getattr(model(**inputs), CACHE))
    for config in (OFF, both("llava-clip")):
        with LUVC(model, config) as luvc:
            stored = bytes_of(getattr(model(**inputs), CACHE))
        report = luvc.report()
        assert report.kv_bytes == stored, f"kv_bytes {report.kv_bytes}, but {stored} are stored"
        assert report.kv_bytes_full == plain, (
            f"kv_bytes_full {report.kv_bytes_full}, the plain model's {plain}"
        )


def test_prune_huge_tokens_in_half_precision():
    """Catches: tokens of huge norm, which large models have, overflow where more than 64 channels are projected."""
    x = torch.randn(2, 40, 1024, generator=torch.Generator().manual_seed(0))
    x[:, ::7] *= 2e4
    x = x.clamp(-6e4, 6e4).half()
    got, want = spectral_prune(x, 10).tolist(), spectral_prune(x.float(), 10).tolist()
    assert got == want, f"in float16 {got} are kept, in float32 {want}"


@no_grad
def test_report_of_a_single_token():
    """Catches: a prompt of one visual token taken for a word that is being generated: nothing to report."""
    model = tiny("qwen2_vl")
    inputs = {"input_ids": torch.tensor([[IMAGE]]), "mm_token_type_ids": torch.ones(1, 1, dtype=torch.int32)}
    pixels = torch.randn(4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]])}
    plain = model(**inputs).logits
    for config in (OFF, PRUNER):
        got, luvc = run(model, config, inputs)
        report = luvc.report()
        agree(got, plain, "the last token lives to the last layer")
        assert report.visual_full == 1 and report.visual_tokens == [1] * LAYERS, (
            f"there is one token: {report}"
        )


@no_grad
def test_sizes_are_float32():
    """Catches: sizes made in torch's default dtype, which may be one that cannot count to 300."""
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    for config in (PRUNER, both("llava-clip")):
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = run(model, config, inputs)[1].sizes[0][0].dtype
        finally:
            torch.set_default_dtype(torch.float32)
        assert got == torch.float32, f"sizes are {got}, expected float32"


@no_grad
def test_token_ids_when_it_runs():
    """Catches: token ids read when LUVC is made: whoever adds a token and sets its id afterwards gets no pictures."""
    model = tiny()
    inputs, luvc = batch(model, [[1, "image1", 5, 6]]), LUVC(model, PRUNER)
    model.config.image_token_id = VIDEO
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    with luvc:
        model(**inputs)
    assert luvc.report().visual_full == model.slots, (
        "the placeholder is what the config says when the model runs"
    )


# ---- Memory and time ---------------------------------------------------------------------------------------


def use_and_forget(way):
    """Use a model in some way, and drop it. Returns a weak reference to a weight of it, and what is kept of LUVC."""
    model, kept = tiny("qwen2_5_vl" if way == "clip" else "llava-clip"), []
    inputs = batch(model, [[1, "clip1" if way == "clip" else "image1", 5, 6]])

    def fail(*_):
        raise RuntimeError("on purpose")

    if way == "not detached":
        LUVC(model).attach()
        model(**inputs)
    else:
        with contextlib.suppress(RuntimeError, ValueError), LUVC(model) as luvc:
            if way == "an exception":
                luvc.family.blocks[2].register_forward_hook(fail)
            if way == "a refusal":
                inputs = batch(model, [[1, 5, "image1"]])
            if way == "generate":
                model.generate(**inputs, **GREEDY)
            if way == "features":
                kept.append(model.model.get_image_features(inputs["pixel_values"], return_dict=True))
            model(**inputs)
            kept += [luvc.report(), luvc.kept, luvc.sizes, luvc.groups]
    return weakref.ref(model.get_decoder().layers[0].mlp.up_proj.weight), kept


WAYS = ["forward", "clip", "generate", "features", "an exception", "a refusal", "not detached"]


@pytest.mark.parametrize("way", WAYS)
@no_grad
def test_model_is_freed(way):
    """Catches: context variables, reports or caches of functions that keep a model alive, 14 GB for 7B."""
    weight, _kept = use_and_forget(way)
    gc.collect()
    assert weight() is None, f"after {way}, nobody needs the model, but its weights are still in memory"


class Operations(TorchDispatchMode):
    """Counts operations of torch, except those of modules in `silent`."""

    def __init__(self, silent):
        super().__init__()
        self.count, self.inside, self.handles = 0, 0, []
        for module in silent:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self.enter(1)))
            self.handles.append(module.register_forward_hook(lambda *_: self.enter(-1)))

    def enter(self, number):
        self.inside += number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not self.inside
        return function(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)


@families("llava-clip", "internvl", "idefics3", "llava_onevision", *QWENS)
@no_grad
def test_operations_per_picture(name):
    """Catches: pictures of equal size treated one after the other, in the encoder or while pruning: 64 of them then
    cost as much as a layer. Counted without the encoder's attention (the plain model's goes picture by picture)."""
    model = tiny(name)
    modules = LUVC(model, OFF).family.vision.modules()
    silent = [module for module in modules if type(module).__name__.endswith("Attention")]
    other, own = "tall2" if name in (*QWENS, "llava_onevision") else "image2", {}
    for many in (2, 8):
        inputs = batch(model, [[1, *["image1", 5, other, 7] * many, 6]])
        inputs["position_ids"] = positions(model, inputs)
        counts = []
        for unit in (contextlib.nullcontext(), LUVC(model, PRUNER), LUVC(model, both(name))):
            with unit, Operations(silent) as operations:
                model(**inputs)
            counts.append(operations.count)
        own[many] = [count - counts[0] for count in counts[1:]]
    for unit, few, more in zip(("pruner", "both"), own[2], own[8], strict=True):
        assert more <= few, f"{unit}: {few} operations beside the plain model's for 4 pictures, {more} for 16"


# ---- What the README says ----------------------------------------------------------------------------------


def test_functions_to_copy():
    """Catches: a list of functions to copy that misses one: NameError above 64 channels."""
    tree, readme = ast.parse(MODULE.read_text()), (HERE / "README.md").read_text()
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    paragraph = next(part for part in readme.split("\n\n") if "copy" in part and "`inherit`" in part)
    listed = re.findall(r"`(\w+)`", paragraph)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    code = [node for node in imports if "transformers" not in ast.unparse(node)]
    code += [functions[name] for name in listed if name in functions]
    copied = {}
    exec(ast.unparse(ast.Module(code, [])), copied)
    x, size = torch.randn(1, 4, 4, 100), torch.ones(1, 4, 4)
    for axis, *left in copied["merge_plan"](4, 4, 0.25, 2):
        x, size, _ = copied["merge_axis"](x, size, left[axis - 1], axis)
    kept = copied["spectral_prune"](x.flatten(1, 2), 2)
    assert copied["inherit"](size.flatten(1), kept).sum() == 16 and "follow" in copied, f"copied: {listed}"


@pytest.mark.parametrize("name", ["output_attentions", "hidden_states"])
def test_limits_name(name):
    """Catches: users of attention maps and of mean pooling are not told that columns and rows mean something else."""
    limits = (HERE / "README.md").read_text().split("## Limits")[1].split("\n## ")[0]
    assert f"`{name}`" in limits, f"README, Limits: say what becomes of {name}"
