"""What is refused: by a ValueError that names what was wrong, before anything is changed. Never an answer that is
silently different."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
import transformers
from test_clients import seams
from transformers import DynamicCache

from test_luvc import BOTH, CACHE, LUVC, OFF, PRUNER, LUVCConfig, attributes, batch, changed, stored, tiny

EQUAL = LUVCConfig(vision_keep=0.45, sizes=False)
HALF = torch.arange(48).lt(24).expand(1, 1, 48, 48)  # of a tile's pixels


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


def with_more(**more):
    return lambda model, inputs: model(**inputs | more)


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


def filled_under(config, then=contextlib.nullcontext):
    """A cache filled under LUVC, continued by the plain model or under other settings. It stays what it was."""

    def act(model, inputs):
        turn = torch.tensor([[7, 8]])
        with LUVC(model, config):
            cache = stored(model(**inputs))
            want = model(input_ids=turn, **{CACHE: copy.deepcopy(cache)}).logits
        try:
            with then(model):
                model(input_ids=turn[:, :1], **{CACHE: cache})
        finally:
            with LUVC(model, config):
                got = model(input_ids=turn, **{CACHE: cache}).logits
                assert torch.equal(got, want), "the cache was spoilt"

    return act


def shared(part):
    """Another model that shares a frozen encoder, or an LLM."""

    def act(model, inputs):
        other = tiny(model.name)
        setattr(other.model, part, getattr(model.model, part))
        before = attributes(other)
        try:
            LUVC(other, BOTH).attach()
        finally:
            assert not changed(other, before), "a failed attach changed the other model"

    return act


WITHOUT = {  # what is done to a plain model -> how, the words of the error, the family (none: LLaVA)
    "a text model": (lambda m, i: LUVC(m.model.language_model), "'llama'.*use one of"),
    "another family": (setting("model_type", "blip"), "'blip'.*use one of"),
    "another tower": (setting("vision_config.model_type", "resnet"), "'resnet'.*use one of"),
    "another strategy": (setting("vision_feature_select_strategy", "default"), "use.*'full'", "llava-siglip"),
    "several feature layers": (setting("vision_feature_layer", [-2, -1]), "-2, -1.*single layer"),
    "another decoder": (setting("text_config.model_type", "mamba"), "'mamba'.*use one of"),
    "sliding windows": (setting("text_config.sliding_window", 8), "sliding_.*use.*full", "llava-full"),
    "linear attention": (setting("text_config.layer_types", ["linear_attention"] * 4), "linear_.*full", "qwen2_vl"),
    "flex attention": (setting("text_config._attn_implementation", "flex_attention"), "use.*sdpa", "qwen3_vl"),
    "fractions": (lambda m, i: LUVC(m, LUVCConfig(llm_keep=[1, 0])), "llm_keep.*4 layers", "internvl"),
    "too many steps": (lambda m, i: LUVC(m, LUVCConfig(vision_steps=4)), r"=4 must lie .*\[2, 3\]", "llava-full"),
    "model.compile()": (lambda m, i: compiled(m, m), "compiled"),
    "a compiled layer": (lambda m, i: compiled(m, m.get_decoder().layers[1]), "compiled"),
    "torch.compile(model)": (lambda m, i: LUVC(torch.compile(m)).attach(), "compiled"),
    "its cache, detached": (filled_under(BOTH), "under LUVC: attach LUVC again"),
    "its cache, no sizes": (filled_under(EQUAL), "under LUVC: attach LUVC again"),
    "its cache under an off one": (filled_under(PRUNER, lambda m: LUVC(m, OFF)), "attach LUVC again", "qwen2_vl"),
}  # fmt: skip
WITH = {  # the same, while a LUVC is attached
    "attaching twice": (lambda m, i: LUVC(m).attach(), "attached.*already; detach"),
    "attaching inside": (lambda m, i: LUVC(m.model).attach(), "attached.*already; detach"),
    "a shared encoder": (shared("vision_tower"), "attached to this CLIPVisionModel already"),
    "a shared LLM": (shared("language_model"), "attached to this LlamaModel already"),
    "training mode": (lambda m, i: m.train()(**i), r"training.*model.eval\(\)"),
    "deepcopy": (lambda m, i: copy.deepcopy(m), "copied.*detach"),
    "pickle": (lambda m, i: pickle.dumps(m), "pickled.*detach", "idefics3"),
    "a static cache": (generating(cache_implementation="static"), "a DynamicCache", "qwen2_vl"),
    "a given static cache": (given_cache(transformers.StaticCache), "StaticCache.*a DynamicCache", "internvl"),
    "a quantised cache": (given_cache(transformers.QuantizedCache), "QuantizedCache.*a DynamicCache"),
    "a filled cache": (filled_without, "empty or filled under LUVC"),
    "cropping": (lambda m, i: stored(m(**i)).crop(-1), "cannot crop"),
    "prompt lookup": (generating(prompt_lookup_num_tokens=2), "crop.*prompt-lookup|Assisted.*crop", "qwen3_vl"),
    "a 4-D mask": (with_more(attention_mask=torch.ones(1, 1, 38, 38)), "attention_mask.*2-D"),
    "a short mask": (with_more(attention_mask=torch.ones(1, 9).long()), "attention_mask.*9.*columns"),
    "no ids": (lambda m, i: m(inputs_embeds=torch.ones(1, 5, 32)), "input_ids.*not inputs_embeds"),
    "pictures by position": (lambda m, i: m.model(*i.values()), "by name.*keyword"),
    "packed rows": (with_more(cu_seq_lens_q=torch.tensor([0, 4, 38])), "cu_seq_lens_q"),
    "a picture last": (lambda m, i: m(**batch(m, [[1, 5, "image"]])), "ends with a picture.*add text"),
    "a picture last in a row": (lambda m, i: m(**batch(m, [[1, "image", 5], [1, "image1"]])), "ends with a pic"),
    "a picture last, then padding": (with_more(attention_mask=torch.arange(38)[None] < 9), "ends with a picture"),
    "features from elsewhere": (with_more(vision_feature_layer=1), "must be the config's"),
    "padded tiles": (with_more(pixel_attention_mask=HALF), "padding.*whole tiles", "idefics3"),
}  # fmt: skip


@pytest.mark.parametrize("what", WITHOUT | WITH)
def test_refused(what):
    """Catches: an answer that is silently different, an error that does not say what to do, a model that a
    refusal changes, and state of a refused call that the next one finds."""
    act, words, *family = (WITHOUT | WITH)[what]
    model = tiny(*family)
    inputs = batch(model, [[1, "image", 5]])
    with torch.no_grad():
        plain, before = model(**inputs).logits, attributes(model)
        with LUVC(model, BOTH) if what in WITH else contextlib.nullcontext():
            want, attached = model(**inputs).logits, attributes(model)
            with pytest.raises(ValueError, match=words):
                act(model, inputs)
            model.eval()
            assert not seams(model, attached), "the refusal changed the model"
            assert torch.equal(model(**inputs).logits, want), "the call after a refusal"
        assert not seams(model, before) and torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_a_refused_call_leaves_the_cache():
    """Catches: a refused call that has taken over the caller's empty KV cache, so that the plain model says it was
    filled under LUVC."""
    model = tiny()
    text, inputs = batch(model, [[1, 2, 3, 4]]), batch(model, [[1, "image1", 5, 6, 7, 8]])
    want = model(**text).logits
    for wrong in (batch(model, [[1, 5, "image4"]]), inputs | {"attention_mask": torch.ones(1, 9).long()}):
        cache = DynamicCache()
        with LUVC(model, BOTH), pytest.raises(ValueError, match=r"picture|mask"):
            model(**wrong, **{CACHE: cache})
        assert torch.equal(model(**text, **{CACHE: cache}).logits, want), "the cache was changed"


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "florence2", "paligemma", "blip-2"])
def test_other_families_are_refused(kind):
    """Catches: a model of another family that is changed, or that fails somewhere inside."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.CONFIG_MAPPING[kind]())
    before = attributes(model)
    with pytest.raises(ValueError, match="is not supported; use one of"):
        LUVC(model)
    assert not changed(model, before)
