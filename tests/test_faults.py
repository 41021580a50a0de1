"""Faults that users, other suites and a fuzzer found, each with a small case: whole kinds that must not come back.

The right value is, wherever there is one, the plain model's answer: with everything off bit by bit, with NEARLY (the
whole machinery runs, nothing is left out) to rounding errors. Else it is the dense reference of test_luvc.py, a row
of a batch against itself alone, or a ValueError that names the feature and leaves model and cache as they were.
"""

import ast
import contextlib
import copy
import functools
import gc
import inspect
import itertools
import re
import weakref

import pytest
import torch
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
    ragged,
    spectral_prune,
    tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

OFF = LUVCConfig(vision_keep=1.0, llm_keep=1.0)
NEARLY = LUVCConfig(vision_keep=1.0, llm_keep=0.999)  # of at most 499 tokens all are kept, in every layer
PRUNER = LUVCConfig(vision_keep=1.0)
QUARTER = LUVCConfig(vision_keep=1.0, llm_keep=0.25)  # a constant: so many of each picture, in every layer

each_family = pytest.mark.parametrize("name", FAMILIES)
no_grad = torch.no_grad()


def refused(words: str):
    return pytest.raises(ValueError, match=f"(?i){words}")


def run(model, config, inputs):
    with LUVC(model, config) as luvc:
        return model(**inputs).logits, luvc


def add_columns(model, inputs, *tokens):
    """The same inputs with these words behind each row, all of them shown."""
    more = torch.tensor(tokens).expand(len(inputs["input_ids"]), -1)
    new = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    new |= {"mm_token_type_ids": torch.zeros_like(more).int()} if model.name in QWENS else {}
    return inputs | {key: torch.cat([inputs[key], columns], 1) for key, columns in new.items()}


def in_each(luvc, pieces, layer=0, sample=0):
    """How many tokens a layer kept of each piece, a range of positions."""
    kept = luvc.kept[layer][sample].tolist()
    return [sum(position in piece for position in kept) for piece in pieces]


# ---- What the attention mask says --------------------------------------------------------------------------


@each_family
@no_grad
def test_hidden_picture(name):
    """Catches: a picture that the mask hides (it stands in padding) is pruned, counted or refused like any other; with
    everything off, code that only pruning needs runs, and raises."""
    model = tiny(name)
    n = len(prompt(model, "image1"))
    right, left = [1, 2, 3, "image1", 7], ["image1", 5, 6, 7, 8]
    seen = [1, "image2", 5, 6, 7]
    for row, hidden, alone in ((right, slice(3, None), [1, 2, 3]), (left, slice(0, n), [5, 6, 7, 8])):
        inputs = batch(model, [row, seen])
        for hide in (hidden, slice(n // 2, None)):  # the mask may end inside of a picture
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][0, hide] = 0
            assert torch.equal(run(model, OFF, inputs)[0], model(**inputs).logits), "off is the plain model"
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, hidden] = 0
        there = inputs["attention_mask"][0].nonzero()[:, 0]
        for config in (PRUNER, both(name)):
            got, luvc = run(model, config, inputs)
            want = [run(model, config, batch(model, [one]))[0][0] for one in (alone, seen)]
            agree(got[0, there], want[0], "text beside a hidden picture is not as if alone")
            agree(got[1], want[1], "the other row is not as if alone")
            for layer in luvc.kept:
                assert layer[0].tolist() == there.tolist(), "a hidden picture is padding: no layer processes it"


@each_family
@no_grad
def test_right_padding_without_a_cache(name):
    """Catches: positions that begin again behind padding taken for the seam of packed sequences. Without a KV cache,
    generate() writes position 0 at padding on the right, and its next word gets that of the last column plus one."""
    model = tiny(name)
    inputs = batch(model, ragged(name), "right")
    at = positions(model, inputs).masked_fill(inputs["attention_mask"] == 0, 0)
    inputs = add_columns(model, inputs, 7)
    inputs["position_ids"] = torch.cat([at, at[..., -1:] + 1], -1)
    shown = inputs["attention_mask"].bool()
    want = dense(model, inputs, both(name))[0]
    got = run(model, both(name), inputs | {"use_cache": False})[0]
    agree(got[shown], want[shown], "other logits than with pruned tokens masked")
    inputs = batch(model, [[1, "image1", 5, 6], [1, 2, 3]], "right")
    with LUVC(model, both(name)):
        cached, uncached = (model.generate(**inputs, **GREEDY, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached), f"{uncached} without a KV cache, {cached} with one"


def talk(model, whole, ends, masks):
    """The logits of several calls on one KV cache, which end at these columns; masks: one for each call."""
    cache, start, logits = DynamicCache(), 0, []
    media = {key: value for key, value in whole.items() if key.startswith(("pixel", "image", "video"))}
    for end, mask in zip(ends, masks, strict=True):
        part = {"input_ids": whole["input_ids"][:, start:end], "attention_mask": mask[:, :end], CACHE: cache}
        part["position_ids"] = whole["position_ids"][..., start:end]
        if not start and "mm_token_type_ids" in whole:
            part["mm_token_type_ids"] = whole["mm_token_type_ids"][:, :end]
        logits.append(model(**part, **({} if start else media)).logits)
        start = end
    return logits


@each_family
@no_grad
def test_later_masks(name):
    """Catches: what the mask of a later call says of positions that are stored already is not read, nor that of a call
    of one word. Row 0 answers sooner than row 1, and turn 2 hides its padding; or it hides words or the picture of
    turn 1; or the word that was just generated is hidden in one row."""
    model = tiny(name)
    first = batch(model, [[1, "image1", 5, 6], [1, "image2", 5, 7]])
    n = first["input_ids"].shape[1]
    whole = add_columns(model, first, 8, 9, 10, 11, 12, 13)
    whole["position_ids"] = positions(model, whole)
    ends = [n, n + 1, n + 2, n + 3, n + 6]  # a prompt, three words, a second turn
    cases = {  # row, columns, first call that hides them
        "padding behind a finished row": (0, slice(n + 1, n + 3), 4),
        "a word of the first turn": (0, slice(n - 2, n - 1), 4),
        "the picture of the first turn": (1, slice(1, n - 2), 4),
        "the word of this call": (1, slice(n + 1, n + 2), 2),
    }
    for case, (row, columns, since) in cases.items():
        masks = [torch.ones_like(whole["input_ids"]) for _ in ends]
        for mask in masks[since:]:
            mask[row, columns] = 0
        want = talk(model, whole, ends, masks)
        with LUVC(model, NEARLY):
            got = talk(model, whole, ends, masks)
        for call, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            shown = masks[call][:, start:end].bool()
            agree(got[call][shown], want[call][shown], f"{case}, call {call}: the plain model says otherwise")
        with LUVC(model, OFF):
            assert all(map(torch.equal, talk(model, whole, ends, masks), want)), f"{case}: off is plain"
        if case.startswith("padding"):  # nothing that stays was computed while these were shown
            with LUVC(model, both(name)):
                got = talk(model, whole, ends, masks)[-1]
            want = dense(model, whole | {"attention_mask": masks[-1]}, both(name))[0][:, n + 3 :]
            agree(got, want, f"{case}: other logits than with everything that is not there masked")


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
@no_grad
def test_masks_that_disagree_are_refused(name):
    """Catches: a silent wrong answer if a mask shows again what an earlier one hid, is shorter than the sequence, or is
    missing after one that hid something; a refusal that has changed the cache before."""
    model = tiny(name)
    first = batch(model, [[1, "image1", 5, 6], [1, 2]])  # padded on the left
    n = first["input_ids"].shape[1]
    whole = add_columns(model, first, 8, 9)
    mask, at = whole["attention_mask"], positions(model, whole)
    words = {"input_ids": whole["input_ids"][:, n:], "position_ids": at[..., n:]}
    first["position_ids"] = at[..., :n]
    wrong = {"shown again": torch.ones_like(mask), "short": mask[:, :-1], "missing": None}
    caches = {way: DynamicCache() for way in wrong}
    for cache in caches.values():
        model(**first, **{CACHE: cache})
    plain = {way: model(**words, attention_mask=wrong[way], **{CACHE: caches[way]}).logits for way in wrong}
    with LUVC(model, OFF):
        for way in wrong:
            cache = DynamicCache()
            model(**first, **{CACHE: cache})
            got = model(**words, attention_mask=wrong[way], **{CACHE: cache}).logits
            assert torch.equal(got, plain[way]), f"{way}: off cannot raise and is the plain model"
    with LUVC(model, both(name)):
        cache = DynamicCache()
        model(**first, **{CACHE: cache})
        want = model(**words, attention_mask=mask, **{CACHE: copy.deepcopy(cache)}).logits
        for way in wrong:
            with refused("mask"):
                model(**words, attention_mask=wrong[way], **{CACHE: cache})
        got = model(**words, attention_mask=mask, **{CACHE: cache}).logits
        assert torch.equal(got, want), "after a refusal the conversation goes on as if nothing had been asked"


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_vl"])
@no_grad
def test_mask_longer_than_the_sequence(name):
    """Catches: a mask with room for words to come, zeros behind, aligned at its right end: the last words are lost.
    Transformers aligns masks at the left."""
    model = tiny(name)
    first = batch(model, [[1, "image1", 5, 6, 7], [1, 2, 3]])
    n = first["input_ids"].shape[1]
    whole = add_columns(model, first, 8, 9)
    whole["position_ids"] = positions(model, whole)
    exact = [whole["attention_mask"]] * 2
    roomy = [torch.nn.functional.pad(exact[0][:, :end], (0, 20)) for end in (n, n + 2)]

    def calls(masks):
        cut = [mask if masks is exact else Roomy(mask) for mask in masks]
        return talk(model, whole, [n, n + 2], cut)

    class Roomy:  # `talk` cuts masks to the sequence: this one stays as it is
        def __init__(self, mask):
            self.mask = mask

        def __getitem__(self, _):
            return self.mask

    plain = calls(roomy)
    for config in (OFF, PRUNER, both(name)):
        with LUVC(model, config):
            got, want = calls(roomy), calls(exact)
        for one, other, mask in zip(got, want, (exact[0][:, :n], exact[0][:, n:]), strict=True):
            agree(one[mask.bool()], other[mask.bool()], "zeros behind the mask change the answer")
        if config is OFF:
            assert all(map(torch.equal, got, plain)), "off is the plain model"


# ---- How modules are called --------------------------------------------------------------------------------


def by_keyword(module):
    """From now on the module is called by keyword, whatever its caller does."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    move = lambda _, args, kwargs: ((), dict(zip(names, args, strict=False)) | kwargs)  # noqa: E731
    return module.register_forward_pre_hook(move, with_kwargs=True)


@each_family
@no_grad
def test_calls_by_keyword(name):
    """Catches: hooks that look for arguments by one name, or by their place; a module's own signature says."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    want = {config: run(model, config, inputs)[0] for config in (OFF, both(name))}
    family = LUVC(model, OFF).family
    modules = family.vision, family.projector, model.model, model.get_decoder()
    handles = [by_keyword(module) for module in modules]
    for config, logits in want.items():
        got = run(model, config, inputs)[0]
        assert torch.equal(got, logits), "other logits if encoder, projector, LLM are called by keyword"
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", QWENS)
@no_grad
def test_encoder_by_hand(name):
    """Catches: with everything off, or without the merger, Qwen's encoder is not what it was, called by hand."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    encode = functools.partial(model.model.visual, grid_thw=inputs["image_grid_thw"])
    plain = encode(hidden_states=inputs["pixel_values"]).pooler_output
    for config in (OFF, PRUNER):
        with LUVC(model, config):
            got = encode(hidden_states=inputs["pixel_values"]).pooler_output
        assert torch.equal(got, plain), "nothing is merged here"


@pytest.mark.parametrize("name", ["llava-clip", "internvl", "idefics3"])
@no_grad
def test_compiled_tower(name):
    """Catches: an encoder that was compiled before attach() and does not see hooks: nothing is merged, and the report
    tells of merged tokens; a report of what was planned instead of what happened."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    tower = model.model.vision_model if name == "idefics3" else model.model.vision_tower
    tower.forward = torch.compile(tower.forward, backend="eager")
    plain = model(**inputs).logits
    with refused("compile"):
        run(model, both(name), inputs)
    assert torch.equal(model(**inputs).logits, plain), "after the refusal the model is what it was"
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llava-clip", "llava_onevision", "internvl", "qwen2_vl"])
@no_grad
def test_features_by_hand(name):
    """Catches: half of the rows are signposts, or nothing is pruned, and nobody says so, if somebody takes features,
    scatters them and calls the LLM; likewise a projector that is called by hand."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    keys = ("pixel_values", "image_sizes", "image_grid_thw")
    pixels = {key: inputs[key] for key in keys if key in inputs}

    def by_hand():
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
        features = torch.cat(list(features))
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE)[..., None], features)
        return model.model.language_model(inputs_embeds=embeds).last_hidden_state

    plain = by_hand()
    with LUVC(model, OFF) as luvc:
        assert torch.equal(by_hand(), plain), "off is the plain model"
        projector = luvc.family.projector
    for config in (PRUNER, both(name), LUVCConfig(vision_keep=both(name).vision_keep, llm_keep=0.5)):
        with LUVC(model, config), refused("inputs_embeds"):
            by_hand()
    assert torch.equal(by_hand(), plain)
    if both(name).vision_keep < 1:
        given = []
        handle = projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        plain = by_hand()
        handle.remove()
        with LUVC(model, PRUNER):
            want = projector(given[0])
        with LUVC(model, both(name)), refused("get_image_features|projector"):
            projector(given[0])
        assert torch.equal(projector(given[0]), want)


# ---- Which tokens are a picture ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@no_grad
def test_pictures_without_text_between(name):
    """Catches: pictures side by side pruned as one: a blank one loses its tokens to its neighbour."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", "image2", 5]])
    inputs["pixel_values"][0] = 0.0
    n = len(prompt(model, "image1"))
    luvc = run(model, QUARTER, inputs)[1]
    got = in_each(luvc, [range(1, n + 1), range(n + 1, 2 * n + 1)])
    assert got == [n // 4] * 2, f"{got} tokens are kept of two pictures of {n}: a quarter of each by itself"


@no_grad
def test_frames_of_a_clip():
    """Catches: a clip of LLaVA-OneVision pruned as one piece, not frame by frame."""
    model = tiny("llava_onevision")
    clip = torch.randn(1, 3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    clip[0, 0] = 0.0
    inputs = {"input_ids": torch.tensor([[1, *[VIDEO] * 28, 5]]), "pixel_values_videos": clip}  # 3 x 9, newline
    luvc = run(model, LUVCConfig(vision_keep=1.0, llm_keep=0.34), inputs)[1]
    got = in_each(luvc, [range(1, 10), range(10, 19), range(19, 29)])
    assert got[:2] == [3, 3], f"{got} tokens are kept of three frames of 9: a third of each by itself"


@pytest.mark.parametrize("name", QWENS)
@no_grad
def test_clip_by_what_the_model_knows(name):
    """Catches: frames found by positions alone, which are linear in a second turn; a picture and the clip directly
    behind it taken for one piece."""
    model = tiny(name)
    _, picture = part_of_prompt(model, "image1")
    row, clip = part_of_prompt(model, "clip2")
    clip["pixel_values_videos"][:96] = 0.0  # frame 0 is blank
    n, kinds = 24, {IMAGE: 1, VIDEO: 2}

    def inputs(ids, media):
        types = torch.tensor([[kinds.get(i, 0) for i in ids]], dtype=torch.int32)
        return {"input_ids": torch.tensor([ids]), "mm_token_type_ids": types, **media}

    if name != "qwen3_vl":  # which has time stamps between frames
        ids = [1, START, *[IMAGE] * n, *[VIDEO] * 2 * n, END, 5]
        luvc = run(model, QUARTER, inputs(ids, picture | clip))[1]
        got = in_each(luvc, [range(2 + i * n, 2 + (i + 1) * n) for i in range(3)])
        assert got == [6, 6, 6], f"{got} are kept of a picture and two frames of 24: a quarter of each by itself"
    with LUVC(model, QUARTER) as luvc:
        cache = getattr(model(**inputs([1, START, *[IMAGE] * n, END, 5], picture), use_cache=True), CACHE)
        start = cache.get_seq_length()
        model(**inputs([*row, 6], clip), **{CACHE: cache})
    at = [start + i for i, token in enumerate(row) if token == VIDEO]
    got = in_each(luvc, [at[:n], at[n:]])
    assert got == [6, 6], f"{got} are kept of two frames in a second turn: a quarter of each by itself"


@pytest.mark.parametrize("name", [*QWENS, "llava_onevision"])
@no_grad
def test_placeholder_that_is_text(name):
    """Catches: a placeholder of one modality that is text, beside a real picture of the other, is pruned."""
    model = tiny(name)
    for word, part in ((VIDEO, "image1"), *([(IMAGE, "clip1")] if name in QWENS else [])):
        embed = model.get_input_embeddings().weight
        embed[word] = embed[7]  # so the word means what 7 means
        want, got = (batch(model, [[1, part, 5, token, 6]]) for token in (7, word))
        if name in QWENS:
            got["mm_token_type_ids"] = want["mm_token_type_ids"]
        want, luvc = run(model, both(name), want)
        kept = [row[0].tolist() for row in luvc.kept]
        got, luvc = run(model, both(name), got)
        assert [row[0].tolist() for row in luvc.kept] == kept, f"{word} is text here, and no picture"
        agree(got, want, f"{word} is text here, and no picture")



def one_slot(name):
    """A model whose pictures have a single slot (or as few as can be), and inputs: two rows with one each."""
    shuffle = name in ("internvl", "idefics3", "smolvlm")  # a slot is 2 x 2 patches of 4 x 4 pixels
    side = 8 if shuffle else 4
    model = tiny(name, **({} if name in QWENS else {"image_size": [side] * 2 if name == "internvl" else side}))
    noise = torch.Generator().manual_seed(0)
    if name in QWENS:
        media = {"pixel_values": torch.randn(8, 3 * 2 * 4 * 4, generator=noise)}
        media["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
    else:
        shape = (2, 3) if name.startswith("llava-") or name == "internvl" else (2, 1, 3)
        media = {"pixel_values": torch.randn(*shape, side, side, generator=noise)}
    if name in PRUNED_ONLY:
        model.config.image_grid_pinpoints = [[side, side]]
        media["pixel_values"] = media["pixel_values"].repeat(1, 2, 1, 1, 1)
        media["image_sizes"] = torch.tensor([[side, side]] * 2)
    features = model.model.get_image_features(**media, return_dict=True).pooler_output
    model.slots = n = len(features[0])
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
        for layer, b in ((layer, b) for layer in range(LAYERS) for b in range(2)):
            assert luvc.kept[layer][b].tolist() == list(kept[layer][b]), f"layer {layer}, sample {b}"
    assert torch.equal(run(model, OFF, inputs)[0], model(**inputs).logits), "off is the plain model"


# ---- Refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip", "internvl", "qwen2_vl"])
@no_grad
def test_prompt_ends_with_merged_picture(name):
    """Catches: a refusal that depends on the pixels, on whether the last slot happens to be the home of a token; one
    that comes after the cache was changed; the last position that the mask shows is what counts."""
    model = tiny(name)
    text = batch(model, [[1, 2, 3], [4, 5, 6]])
    want = model(**text).logits
    for seed in range(1, 7):
        inputs = batch(model, [[1, f"image{seed}", 5, 6], [1, f"image{seed}", 5, 7]])
        inputs["position_ids"] = positions(model, inputs)
        inputs["attention_mask"][1, 12:] = 0  # inside of the picture
        cache = DynamicCache()
        with LUVC(model, both(name)), refused("picture"):
            model(**inputs, **{CACHE: cache})
        got = model(**text, **{CACHE: cache}).logits
        assert torch.equal(got, want), "an empty cache that a refused call was given is still an empty cache"


@no_grad
def test_refused_before_anything_changes():
    """Catches: a refused call that has taken over the caller's empty KV cache, so that the plain model says it was
    filled under LUVC."""
    model = tiny()
    text = batch(model, [[1, 2, 3, 4]])
    want = model(**text).logits
    inputs = batch(model, [[1, "image1", 5, 6]])
    n = inputs["input_ids"].shape[1]
    again = torch.arange(n)[None] % (n - 2)
    wrong = {
        "picture": batch(model, [[1, 5, "image1"]]),
        "position_ids": inputs | {"position_ids": again, "attention_mask": None},
        "attention_mask": inputs | {"attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool).tril()},
        "mask": inputs | {"attention_mask": inputs["attention_mask"][:, :-1]},
    }
    for words, given in wrong.items():
        cache = DynamicCache()
        with LUVC(model, both("llava-clip")), refused(words):
            model(**given, **{CACHE: cache})
        got = model(**text, **{CACHE: cache}).logits
        assert torch.equal(got, want), f"{words}: the refused call has changed the caller's cache"


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_vl"])
@no_grad
def test_caption(name, monkeypatch):
    """Catches: other logits without a KV cache if a prompt ends with a picture. The last visual token speaks the first
    word, so it lives to the last layer, but only while it stands last."""
    model = tiny(name)
    inputs = batch(model, [[1, 5, "image1"]])
    if name in QWENS:  # without the token that ends a picture
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[key] = inputs[key][:, :-1]
    n = inputs["input_ids"].shape[1]
    whole = add_columns(model, inputs, 8, 9)
    whole["position_ids"] = positions(model, whole)
    with LUVC(model, PRUNER):
        got = talk(model, whole, [n, n + 1, n + 2], [whole["attention_mask"]] * 3)
        with refused("cache"):
            model.generate(**inputs, **GREEDY, use_cache=False)
    pieces = test_luvc.pieces_of
    but_the_last = lambda *args: [(token, piece[:-1]) for token, piece in pieces(*args)]  # noqa: E731
    monkeypatch.setattr(test_luvc, "pieces_of", but_the_last)
    want = dense(model, whole, PRUNER)[0]
    agree(torch.cat(got, 1), want, "other logits than with the last visual token treated as text")


@pytest.mark.parametrize("name", ["llava-clip", "internvl", "idefics3", "qwen2_vl"])
def test_gradient_checkpointing(name):
    """Catches: encoder or LLM under gradient checkpointing: some releases run hooks again in the backward pass, which
    merge twice. Refused by name, in training only."""
    for part in ("vision", "decoder"):
        model = tiny(name)
        inputs = batch(model, [[1, "image1", 5, 6]])
        inputs |= {"labels": inputs["input_ids"], "use_cache": False}
        (model.get_decoder() if part == "decoder" else LUVC(model).family.vision).gradient_checkpointing_enable()
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
    projections = ("q_proj", -1), ("k_proj", 1)  # of opposite sign: attention logits are large and negative

    def gap():
        """The largest difference between a row of a batch and the row alone."""
        found = 0.0
        for side, (b, row) in itertools.product(("left", "right"), enumerate(rows)):
            inputs = [batch(model, some, side) for some in (rows, [row])]
            for each in inputs:
                each |= {"pixel_values": each["pixel_values"].to(dtype)} if "pixel_values" in each else {}
            shown = inputs[0]["attention_mask"][b].bool()
            got, want = (model(**each).logits for each in inputs)
            found = max(found, (got[b, shown] - want[0]).abs().max().item())
        return found

    for size in (30, 100):  # logits of thousands; in float16 finite still
        for layer, (name, sign) in itertools.product(model.get_decoder().layers, projections):
            getattr(layer.self_attn, name).bias.fill_(sign * size)
        plain = gap()
        with LUVC(model, NEARLY):
            got = gap()
        assert got < 1e-3 + 2 * plain, f"biases of {size}: rows differ by {got} from alone, plain by {plain}"


@no_grad
def test_bytes_of_the_cache():
    """Catches: a report that leaves out padding that all rows share, which is stored like anything else."""
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6], [1, "image2", 7]])
    pad = torch.zeros(2, 3, dtype=torch.int64)
    for key in ("input_ids", "attention_mask"):
        inputs[key] = torch.cat([pad, inputs[key]], 1)
    plain = bytes_of(getattr(model(**inputs), CACHE))
    for config in (OFF, both("llava-clip")):
        with LUVC(model, config) as luvc:
            stored = bytes_of(getattr(model(**inputs), CACHE))
        report = luvc.report()
        assert report.kv_bytes == stored, f"kv_bytes {report.kv_bytes}, but {stored} are stored"
        assert report.kv_bytes_full == plain, f"kv_bytes_full {report.kv_bytes_full}, the plain model's {plain}"


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
        agree(got, plain, "the last token lives to the last layer")
        report = luvc.report()
        assert report.visual_full == 1 and report.visual_tokens == [1] * LAYERS, f"there is one token: {report}"


@no_grad
def test_sizes_are_float32():
    """Catches: sizes made in torch's default dtype, which may be one that cannot count to 300."""
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    kept = LUVCConfig(vision_keep=0.45, llm_keep=0.5)
    want = run(model, kept, inputs)[1].sizes
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = run(model, kept, inputs)[1].sizes
    finally:
        torch.set_default_dtype(torch.float32)
    assert got[0][0].dtype == torch.float32, f"sizes are {got[0][0].dtype}, expected float32"
    assert [row[0].tolist() for row in got] == [row[0].tolist() for row in want]


@no_grad
def test_token_ids_when_it_runs():
    """Catches: token ids read when LUVC is made: whoever adds a token and sets its id afterwards gets no pictures."""
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    luvc = LUVC(model, PRUNER)
    model.config.image_token_id = VIDEO
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    with luvc:
        model(**inputs)
    assert luvc.report().visual_full == model.slots, "the placeholder is what the config says when the model runs"


# ---- Memory and time ---------------------------------------------------------------------------------------


def use_and_forget(way):
    """Use a model in some way, and drop it. Returns a weak reference to a weight of it, and what is kept of LUVC."""
    model, kept = tiny("qwen2_5_vl" if way == "video" else "llava-clip"), []
    inputs = batch(model, [[1, "video1" if way == "video" else "image1", 5, 6]])

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


@pytest.mark.parametrize("way", ["forward", "video", "generate", "features", "an exception", "a refusal", "not detached"])
@no_grad
def test_model_is_freed(way):
    """Catches: context variables, reports or caches of functions that keep a model alive, 14 GB for 7B."""
    weight, _ = use_and_forget(way)
    gc.collect()
    assert weight() is None, f"after {way}, nobody needs the model, but its weights are still in memory"


class Operations(TorchDispatchMode):
    """Counts operations of torch, except those of modules in `silent`."""

    def __init__(self, silent):
        super().__init__()
        self.count, self.inside, self.handles = 0, 0, []
        for module in silent:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self.add(1)))
            self.handles.append(module.register_forward_hook(lambda *_: self.add(-1)))

    def add(self, number):
        self.inside += number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not self.inside
        return function(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)


@pytest.mark.parametrize("name", ["llava-clip", "internvl", "idefics3", "llava_onevision", *QWENS])
@no_grad
def test_operations_per_picture(name):
    """Catches: pictures of equal size treated one after the other, in the encoder or while pruning: 64 of them then cost
    as much as a layer. Counted without the encoder's attention (the plain model attends picture by picture)."""
    model = tiny(name)
    silent = [module for module in LUVC(model, OFF).family.blocks.modules() if type(module).__name__.endswith("Attention")]
    two_sizes = ["tall2", 7] if name in (*QWENS, "llava_onevision") else ["image2", 7]
    own = {}
    for many in (2, 8):
        inputs = batch(model, [[1, *["image1", 5, *two_sizes] * many, 6]])
        inputs["position_ids"] = positions(model, inputs)
        counts = []
        for config in (None, PRUNER, both(name)):
            with LUVC(model, config) if config else contextlib.nullcontext(), Operations(silent) as operations:
                model(**inputs)
            counts.append(operations.count)
        own[many] = [count - counts[0] for count in counts[1:]]
    print(name, own, counts)
    for unit, few, more in zip(("pruner", "both"), own[2], own[8], strict=True):
        assert more <= few, f"{unit}: {few} operations beside the plain model's for 4 pictures, {more} for 16"


# ---- What the README says ----------------------------------------------------------------------------------


def paragraph(words):
    """The paragraph of the README that has these words."""
    found = [part for part in (HERE / "README.md").read_text().split("\n\n") if words in part]
    assert found, f"README.md has no paragraph with {words!r}"
    return found[0]


def test_functions_to_copy():
    """Catches: a list of functions to copy that misses one: NameError above 64 channels."""
    tree = ast.parse(MODULE.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    listed = [name for name in re.findall(r"`(\w+)`", paragraph("Or copy")) if name in functions]
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = [node for node in imports if "transformers" not in ast.unparse(node)]
    copied = {}
    exec(ast.unparse(ast.Module(imports + [functions[name] for name in listed], [])), copied)
    x, size = torch.randn(1, 4, 4, 100), torch.ones(1, 4, 4)
    for axis, *left in copied["merge_plan"](4, 4, 0.25, 2):
        x, size, parent = copied["merge_axis"](x, size, left[axis - 1], axis)
    kept = copied["spectral_prune"](x.flatten(1, 2), 2)
    assert copied["inherit"](size.flatten(1), kept).sum() == 16
    missing = {"follow", "projection"} - set(copied)
    assert not missing, f"the list of functions to copy misses {missing}"


@pytest.mark.parametrize("name", ["output_attentions", "hidden_states"])
def test_limits_name(name):
    """Catches: users of attention maps and of mean pooling are not told that columns and rows mean something else."""
    limits = (HERE / "README.md").read_text().split("## Limits")[1].split("\n## ")[0]
    assert f"`{name}`" in limits, f"README, Limits: say what becomes of {name}"
