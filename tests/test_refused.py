"""What is refused: by a ValueError that names what was wrong and the way out, before anything is changed. Never an
answer that is silently different."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache

from test_luvc import (
    BOTH,
    CACHE,
    LUVC,
    OFF,
    PRUNER,
    QWENS,
    LUVCConfig,
    attributes,
    batch,
    changed,
    positions,
    seams,
    stored,
    tiny,
)

EQUAL = LUVCConfig(vision_keep=0.45, sizes=False)


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
        model(**inputs, **{CACHE: cache})

    return act


def filled_without(model, inputs):
    cache, ids = DynamicCache(), torch.tensor([[1, 5, 6]])
    tiny(model.name)(input_ids=ids, **{CACHE: cache})
    model(input_ids=ids[:, :1], **{CACHE: cache})


def filled_under(config, then=None):
    """A cache filled under LUVC, continued by the plain model or under other settings. It stays what it
    was."""

    def act(model, inputs):
        turn = torch.tensor([[7, 8]])
        with LUVC(model, config):
            cache = stored(model(**inputs))
            want = model(input_ids=turn, **{CACHE: copy.deepcopy(cache)}).logits
        try:
            with LUVC(model, then) if then else contextlib.nullcontext():
                model(input_ids=turn[:, :1], **{CACHE: cache})
        finally:
            with LUVC(model, config):
                assert torch.equal(model(input_ids=turn, **{CACHE: cache}).logits, want), (
                    "the cache was spoilt"
                )

    return act


def packed(model, inputs):
    """Two sequences in one row, as collators make them that do without padding."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    positions = positions.expand(3, 1, -1) if model.name in QWENS else positions
    model(input_ids=torch.tensor([[1, 5, 6, 7, 1, 5, 6]]), position_ids=positions)


def packed_behind_a_picture(model, inputs):
    """The picture of the first sequence is all right; the text behind it begins again."""
    behind = torch.arange(4)  # a second sequence of four words
    ids = torch.cat([inputs["input_ids"], torch.tensor([[1, 5, 6, 7]])], 1)
    at = torch.cat([positions(model, inputs), behind.expand(3, 1, -1)], -1)
    more = {key: value for key, value in inputs.items() if key not in ("attention_mask", "mm_token_type_ids")}
    model(**more | {"input_ids": ids, "position_ids": at})


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
    "too many steps": (lambda m, i: LUVC(m, LUVCConfig(vision_steps=4)), r"=4 must lie in \[2, 3\]", "llava-full"),
    "LLaVA-NeXT's merger": (lambda m, i: LUVC(m), "cannot merge.*vision_keep=1.0", "llava_next"),
    "OneVision's merger": (lambda m, i: LUVC(m), "cannot merge.*vision_keep=1.0", "llava_onevision"),
    "model.compile()": (lambda m, i: compiled(m, m), "compiled.*without it"),
    "a compiled layer": (lambda m, i: compiled(m, m.get_decoder().layers[1]), "compiled.*without it"),
    "torch.compile(model)": (lambda m, i: LUVC(torch.compile(m)).attach(), "compiled.*without it"),
    "its cache, detached": (filled_under(BOTH), "under LUVC: attach LUVC again"),
    "its cache, no sizes": (filled_under(EQUAL), "under LUVC: attach LUVC again"),
    "its cache under an off one": (filled_under(PRUNER, OFF), "under LUVC: attach LUVC again", "qwen2_vl"),
}  # fmt: skip


WITH = {  # the same, while a LUVC is attached
    "attaching twice": (lambda m, i: LUVC(m).attach(), "attached.*already; detach"),
    "attaching inside": (lambda m, i: LUVC(m.model).attach(), "attached.*already; detach"),
    "deepcopy": (lambda m, i: copy.deepcopy(m), "copied.*detach"),
    "pickle": (lambda m, i: pickle.dumps(m), "pickled.*detach", "idefics3"),
    "export": (lambda m, i: torch.export.export(m, (), i, strict=False), "eager mode.*without it"),
    "continuous batching": (lambda m, i: m.generate_batch([[1, 5]]), "continuous batching.*use"),
    "prefill in chunks": (generating(prefill_chunk_size=8), "prefill_chunk_size.*use", "qwen2_5_vl"),
    "a static cache": (generating(cache_implementation="static"), "a DynamicCache", "qwen2_vl"),
    "a given static cache": (given_cache(transformers.StaticCache), "StaticCache.*use a Dynamic", "internvl"),
    "a quantised cache": (given_cache(transformers.QuantizedCache), "QuantizedCache.*use a DynamicCache"),
    "a filled cache": (filled_without, "without LUVC; begin anew"),
    "cropping": (lambda m, i: stored(m(**i)).crop(-1), "cannot crop"),
    "assisted decoding": (
        lambda m, i: generating(assistant_model=tiny())(m, i),
        "crop.*assisted|Assisted.*crop",
    ),
    "prompt lookup": (
        generating(prompt_lookup_num_tokens=2),
        "crop.*prompt-lookup|Assisted.*crop",
        "qwen3_vl",
    ),
    "a 4-D mask": (square_mask, "attention_mask.*2-D"),
    "no ids": (without_ids, "input_ids.*instead of inputs_embeds"),
    "packed rows": (packed, "begin again.*one sequence per row"),
    "packed rows, M-RoPE": (packed, "begin again.*one sequence per row", "qwen2_vl"),
    "packed rows behind a picture": (
        packed_behind_a_picture,
        "begin again.*one sequence per row",
        "qwen2_vl",
    ),
    "packed rows for flash": (packed_for_flash, "one sequence per row"),
    "a merged picture last": (lambda m, i: m(**batch(m, [[1, "image"]])), "add text to it"),
    "features from elsewhere": (lambda m, i: m(**i, vision_feature_layer=1), "must be the config's"),
    "checkpointing": (checkpointing, "gradient checkpointing; disable it"),
    "padded tiles": (part_of_a_tile, "merged; split pictures into whole tiles", "idefics3"),
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
