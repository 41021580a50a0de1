"""Faults that users, other suites and a fuzzer found, each with a small case, so that their whole kind stays away.

The right value is the plain model's answer wherever there is one: to rounding errors with NEARLY, where the whole
machinery runs and keeps all. Else it is the dense reference of test_luvc.py, or a row of a batch against itself alone.
"""
# ruff: noqa: I001

import inspect
import itertools

import pytest
import torch
from transformers import DynamicCache

from test_luvc import ANYRES, BOTH, CACHE, GREEDY, IMAGE, LAYERS, LUVC, PRUNER, QWENS, VIDEO, LUVCConfig
from test_luvc import Merger, agree, batch, dense, every_family, positions, prompt, refuses, same, tiny

NEARLY = LUVCConfig(vision_keep=1.0, llm_keep=0.999)  # of at most 499 tokens all are kept, in every layer
no_grad = torch.no_grad()


def families(*names):
    return pytest.mark.parametrize("name", names)


def run(model, config, inputs):
    with LUVC(model, config) as luvc:
        return model(**inputs).logits, luvc


def add_columns(model, inputs, *tokens):
    """The same inputs with these words behind each row, all of them shown; and positions for all."""
    more = torch.tensor(tokens).expand(len(inputs["input_ids"]), -1)
    new = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    new |= {"mm_token_type_ids": torch.zeros_like(more).int()} if model.name in QWENS else {}
    whole = inputs | {key: torch.cat([inputs[key], columns], 1) for key, columns in new.items()}
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


# ---- What the attention mask says --------------------------------------------------------------------------


@every_family
@no_grad
def test_hidden_picture(name):
    """Catches: a picture that the mask hides (it stands in padding) is pruned or refused like any other."""
    model = tiny(name)
    n = len(prompt(model, "image1"))
    right, left, seen = [1, 2, 3, "image1", 7], ["image1", 5, 6, 7, 8], [1, "image2", 5, 6, 7]
    for row, hidden, alone in ((right, slice(3, None), [1, 2, 3]), (left, slice(0, n), [5, 6, 7, 8])):
        inputs = batch(model, [row, seen])
        inputs["attention_mask"][0, hidden] = 0
        there = inputs["attention_mask"][0].nonzero()[:, 0]
        for config in (PRUNER, BOTH):
            got, luvc = run(model, config, inputs)
            want = [run(model, config, batch(model, [one]))[0][0] for one in (alone, seen)]
            agree(got[0, there], want[0], "text beside a hidden picture is not as if alone")
            agree(got[1, -3:], want[1][-3:], "the other row is not as if alone")
            for layer in luvc.kept:
                assert layer[0].tolist() == there.tolist(), "hidden is padding: no layer processes it"


@families("llava-clip", "qwen2_5_vl")
@no_grad
def test_hidden_entirely(name):
    """A row, or a whole call, then a word. Catches: a crash where the plain model goes on, the other row changed."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6], [1, "image2", 5, 7]])
    n, whole = inputs["input_ids"].shape[1], add_columns(model, inputs, 8)
    for rows in (slice(0, 1), slice(0, 2)):
        masks = [torch.ones(2, end).long() for end in (n, n + 1)]
        for mask in masks:
            mask[rows, :n] = 0
        with LUVC(model, BOTH):
            want, got = (talk(model, whole, [n, n + 1], each) for each in ([None, None], masks))
        assert all(logits.isfinite().all() for logits in got)
        assert rows.stop == 2 or torch.allclose(got[1][1], want[1][1], atol=1e-4), "the other row is changed"


@every_family
@no_grad
def test_later_masks(name):
    """Row 0 answers sooner than row 1, and turn 2 hides its padding; or it hides words or the picture of turn 1; or the
    word that was just generated is hidden in one row. Catches: what a later mask hides of positions that are stored
    already is not read, nor that of a call of one word; a mask with room for words to come, zeros behind, that is taken
    to end where the words end. (Transformers aligns masks at the left.)"""
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
        roomy = [torch.nn.functional.pad(mask, (0, 20)) for mask in masks]
        want = talk(model, whole, ends, roomy)
        with LUVC(model, NEARLY):
            got = talk(model, whole, ends, roomy)
        for call, mask in enumerate(masks):
            shown = mask[:, -got[call].shape[1] :].bool()
            agree(got[call][shown], want[call][shown], f"{case}, call {call}: the plain model says otherwise")
        if case.startswith("padding"):  # nothing that stays was computed while it was shown
            with LUVC(model, BOTH):
                got = talk(model, whole, ends, masks)[-1]
            want = dense(model, whole | {"attention_mask": masks[-1]}, BOTH)[0][:, n + 3 :]
            agree(got, want, f"{case}: other logits than with all that is not there masked")


# ---- How modules are called --------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("way", ["by keyword", "by position"])
@no_grad
def test_calls(name, way):
    """Catches: hooks that look for arguments by one name, or by their place; a module's own signature says."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    want, luvc = run(model, BOTH, inputs)

    def move(names, args, kwargs):
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        given = itertools.takewhile(kwargs.__contains__, names if way == "by position" else ())
        return tuple(kwargs.pop(each) for each in given), kwargs

    modules = [luvc.family.vision, luvc.family.projectors[0], model.model, model.get_decoder()]
    for module in modules[: 2 if way == "by position" else 4]:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        hook = lambda _, args, kwargs, names=names: move(names, args, kwargs)  # noqa: E731
        module.register_forward_pre_hook(hook, with_kwargs=True)
    assert torch.equal(run(model, BOTH, inputs)[0], want), f"other logits if modules are called {way}"


@families("llava-clip", "llava_next", "internvl", "qwen2_vl")
@no_grad
def test_features_by_hand(name):
    """Somebody takes features, scatters them and calls the LLM. Catches: features that are of use to LUVC alone."""
    model = tiny(name)
    inputs = batch(model, [[1, "image1", 5, 6]])
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    inputs["position_ids"] = positions(model, inputs)
    with Merger(model, BOTH):
        want = model(**inputs).logits
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE)[..., None], torch.cat(list(features)))
    given = {"inputs_embeds": embeds, "position_ids": inputs["position_ids"]}
    agree(model.lm_head(model.get_decoder()(**given).last_hidden_state), want, "the plain LLM says otherwise")
    with LUVC(model, BOTH):
        refuses("inputs_embeds", model.get_decoder(), **given)


@families("llava-clip", *ANYRES[1:], "internvl", "smolvlm", *QWENS)
@no_grad
def test_placeholder_that_is_text(name):
    """Catches: a word that a user typed, or the model said, pruned as if it were a picture: without a picture, or
    beside one of another kind; in a prompt, while generating, in a second turn."""
    model = tiny(name)
    inputs, ids = batch(model, [[1, "image", 5, 6]]), torch.tensor([[1, 5, IMAGE, 6, 7]])
    plain = model(input_ids=ids).logits
    with LUVC(model, BOTH) as luvc:
        agree(model(input_ids=ids).logits, plain, "a prompt of text alone")
        model.generate(input_ids=ids, **GREEDY)
        same([len(row) for (row,) in luvc.kept], [5] * LAYERS, "positions processed of a prompt of text")
        cache = model(**inputs, use_cache=True)[CACHE]
        model(input_ids=ids, **{CACHE: cache})
        same([len(row) for (row,) in luvc.kept], [5] * LAYERS, "positions processed of a second turn")
    for token, part in [(VIDEO, "image1"), (IMAGE, "short1")][: 2 * (name in QWENS)]:
        model.get_input_embeddings().weight[token] = model.get_input_embeddings().weight[7]  # means the same
        want, got = (batch(model, [[1, part, 5, each, 6]]) for each in (7, token))
        got["mm_token_type_ids"] = want["mm_token_type_ids"]
        (want, plain), (got, luvc) = run(model, BOTH, want), run(model, BOTH, got)
        assert str(luvc.kept) == str(plain.kept), f"{token} is text here, and no picture"
        agree(got[:, -3:], want[:, -3:], f"{token} is text here, and no picture")


# ---- What LUVC says of a call ------------------------------------------------------------------------------


@no_grad
def test_kept_is_of_the_last_complete_prefill():
    """Catches: an error from inside before there was any, or half of a call that failed or was refused."""
    model, luvc = tiny(), LUVC(tiny(), BOTH)
    for what in ("kept", "sizes", "groups", "report"):
        with pytest.raises(ValueError, match="call the model"):
            value = getattr(luvc, what)
            value() if callable(value) else None
    first, second = batch(model, [[1, "image1", 5, 6]]), batch(model, [[1, "tall2", 5, 6, 7]])
    with LUVC(model, BOTH) as luvc:
        model(**first)
        before, fail = str((luvc.kept, luvc.sizes)), model.get_decoder().layers[2].mlp.down_proj
        handle = fail.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**second)
        handle.remove()
        same(str((luvc.kept, luvc.sizes)), before, "kept and sizes after a call that failed half-way")
        refuses("ends with a picture", model, **batch(model, [[1, 5, "image4"]]))
        same(str((luvc.kept, luvc.sizes)), before, "kept and sizes after a call that was refused")


@no_grad
def test_settings_when_it_runs():
    """Catches: token ids read when LUVC is made (whoever sets a new token's id afterwards gets no pictures); sizes
    made in torch's default dtype, which may be one that cannot count to 300."""
    model = tiny()
    inputs, luvc = batch(model, [[1, "image1", 5, 6]]), LUVC(model, PRUNER)
    model.config.image_token_id = VIDEO
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    torch.set_default_dtype(torch.bfloat16)
    try:
        with luvc:
            model(**inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    same(
        len(luvc.kept[-1][0]),
        3,
        "the placeholder is what the config says when the model runs: positions left",
    )
    same(luvc.sizes[0][0].dtype, torch.float32, "the dtype of sizes")
