"""Kernels, devices, time and memory: what FlashAttention sees, half precision, waiting for a GPU, operations."""
# ruff: noqa: I001

import contextlib
import gc
import weakref

import pytest
import torch
import transformers
from test_functions import NoWaiting, Watch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import flash_attention_mask

from test_luvc import BOTH, GREEDY, IMAGE, LAYERS, LUVC, OFF, PRUNER, QWENS, LUVCConfig, batch, every_family
from test_luvc import follow, inherit, keep_last, merge_axis, needs_gpu, positions, ragged, random, reference
from test_luvc import same_as_the_reference, spectral_prune, tiny

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


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
        at, Q, T = kwargs.get("position_ids"), query.shape[2], key.shape[2]
        fits = attention_mask is None or (T > Q and attention_mask.ndim == 2)
        assert fits, "a mask where a causal kernel needs none"
        assert at is None or (at.shape[-1] == Q and (at.diff() == 1).all()), "gaps look like packed sequences"
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        logits = query @ key.transpose(-1, -2) * scaling
        if module.is_causal:
            calls.append((Q, query.shape[-1]))
            logits = logits.masked_fill(torch.arange(Q)[:, None] + T - Q < torch.arange(T), -torch.inf)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask[:, None, None], -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("probe", probe)
    transformers.AttentionMaskInterface.register("probe", flash_attention_mask)
    turns = [ragged("llava-clip"), [["image6", 7], [2, 3], [4]], [[7], [8], [9]]]
    for side in ("left", "right"):
        luvc = same_as_the_reference(tiny(), BOTH, turns, side, tiny(attention="probe"))
        second = calls[LAYERS : 2 * LAYERS]
        assert second == [(max(map(len, layer)), 8 + reference.EXTRA) for layer in luvc.kept]
        calls.clear()


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
        # Padding rules the kernel out for the plain model.
        for part in [rows] if config else [[row] for row in rows]:
            inputs = {key: value.to(device) for key, value in batch(model, part, side).items()}
            inputs |= {key: value.to(kind) for key, value in inputs.items() if key == "pixel_values"}
            text = (inputs["input_ids"] > 0) & (inputs["input_ids"] != IMAGE)
            with sdpa_kernel(kernel), LUVC(model, config) if config else contextlib.nullcontext():
                out.append(model(**inputs).logits[text].float())
        return torch.cat(out)

    configs = None, LUVCConfig(vision_keep=1.0, prune=keep_last)  # the same choice in every dtype
    plain, error = [(logits(dtype, each) - logits(torch.float32, each)).abs().mean() for each in configs]
    assert 0 < error <= 2 * plain, f"LUVC is off by {error}, the plain model by {plain}"


def run_inside_layers(model, enter, leave):
    """A call with fillers and several pictures, then words; `enter` before each decoder layer, `leave` behind it."""
    inputs = {key: value.to(model.device) for key, value in batch(model, ragged(model.name)).items()}
    with LUVC(model, BOTH):
        model(**inputs)  # FFT plans and projections are made once
        for layer in model.get_decoder().layers:
            layer.register_forward_pre_hook(lambda *_: enter())
            layer.register_forward_hook(lambda *_: leave())
        try:
            model.generate(**inputs, **GREEDY)
        finally:
            leave()


@every_family
@torch.no_grad()
def test_layers_do_not_wait_for_the_device(name, monkeypatch):
    """Catches: a value that is read on the host inside of the decoder layers."""
    mode, inside = NoWaiting(), []

    def refuse(*_):
        raise AssertionError("tolist() in a decoder layer: on a GPU the host would wait here")

    def enter():
        # It reads a CPU tensor without asking the dispatcher.
        monkeypatch.setattr(torch.Tensor, "tolist", refuse)
        inside.append(mode.__enter__())

    def leave():
        if inside:
            inside.pop().__exit__(None, None, None)
            monkeypatch.undo()

    run_inside_layers(tiny(name), enter, leave)
    with pytest.raises(AssertionError, match="wait"), mode:  # the probe itself
        torch.ones(3)[torch.tensor([True, False, True])]


@torch.no_grad()
def test_a_word_without_padding_does_not_wait():
    """Catches: a mask that is read on the host for each word, although it hides nothing."""
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    with LUVC(model, BOTH):
        cache = model(**inputs, use_cache=True)[reference.CACHE]
        word = {
            "input_ids": torch.tensor([[7]]),
            "position_ids": torch.tensor([[40]]),
            reference.CACHE: cache,
        }
        with NoWaiting():
            model.get_decoder()(**word)


@pytest.mark.parametrize("name", ["llava-clip", "internvl", "idefics3", "llava_onevision", *QWENS])
@torch.no_grad()
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
        for hook in (contextlib.nullcontext(), LUVC(model, PRUNER), LUVC(model, BOTH)):
            with hook, Watch(silent) as watch:
                model(**inputs)
            counts.append(watch.count)
        own[many] = [count - counts[0] for count in counts[1:]]
    for hook, few, many in zip(("Pruner", "both"), own[2], own[8], strict=True):
        assert many <= few, f"{hook}: {few} operations beside the plain model's for 4 pictures, {many} for 16"


def use_and_forget(way):
    """Use a model in some way, and drop it. Returns weak references to its weights, and what is kept of LUVC."""
    model = tiny("qwen2_5_vl" if way == "video" else "llava-clip")
    inputs = batch(model, [[1, "short1" if way == "video" else "image1", 5, 6]])
    luvc = LUVC(model).attach()
    if way == "an exception":
        luvc.family.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        model.generate(**inputs, **GREEDY) if way != "not detached" else model(**inputs)
    if way != "not detached":
        luvc.detach()
    kept = [] if way == "an exception" else [luvc.report(), luvc.kept, luvc.sizes, luvc.groups]
    return [weakref.ref(weight) for weight in model.parameters()], kept


@pytest.mark.parametrize("way", ["generate", "video", "an exception", "not detached"])
@torch.no_grad()
def test_model_is_freed(way):
    """Catches: context variables, results or caches of functions that keep a model alive, 14 GB for 7B."""
    weights, _kept = use_and_forget(way)
    gc.collect()
    left = sum(weight() is not None for weight in weights)
    assert not left, f"after {way}, nobody needs the model, but {left} of its weights are still in memory"


# ---- On a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_nothing_waits_for_the_gpu():
    """Neither the functions nor the decoder layers. Catches: what the dispatcher on a CPU does not see; a sort or an
    `index_add` that is another one there. (Sums of small integers are exact.)"""
    x, size, check = random(1, 2, 24, 24, 128), torch.ones(2, 24, 24), torch.cuda.set_sync_debug_mode

    def merged(device, mode="default"):
        x_here, size_here, token = (
            x.to(device),
            size.to(device),
            torch.arange(576, device=device).expand(2, 576),
        )
        check(mode)
        try:
            y, mass, parent = merge_axis(x_here, size_here, 18, 2)
            inherit(size_here.flatten(1), spectral_prune(x_here.flatten(1, 2), 100))
            return y, *merge_axis(y, mass, 18, 1)[1:], follow(token, parent)
        finally:
            check("default")

    merged("cuda")  # FFT plans and projections are made once
    for got, want in zip(merged("cuda", "error"), merged("cpu"), strict=True):
        assert torch.equal(got.cpu(), want), "another result than on the CPU"
    run_inside_layers(tiny().cuda(), lambda: check("error"), lambda: check("default"))
