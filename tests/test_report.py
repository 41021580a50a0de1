"""`LUVC.report()`: what happened in the latest prefill, in tokens, bytes and arithmetic."""

import pytest
import torch
from transformers import DynamicCache

from test_luvc import (
    BOTH,
    CACHE,
    FAMILIES,
    GREEDY,
    IMAGE,
    LAYERS,
    LUVC,
    OFF,
    SIDE,
    VIDEO,
    LUVCConfig,
    agree,
    batch,
    both,
    bytes_of,
    every_family,
    prompt,
    ragged,
    spy,
    stored,
    tiny,
)


@every_family
@torch.no_grad()
def test_report_says_what_happened(name):
    """Catches: pruned keys that are stored all the same, and a report that is a formula instead of a measurement."""
    model, blocks = tiny(name), {}
    inputs, luvc = batch(model, ragged(name)), LUVC(model, both(name))
    full = bytes_of(stored(model(**inputs)))
    with luvc:
        for number, block in enumerate(
            luvc.family.blocks
        ):  # of two calls, pictures and clips, the latest one
            spy(block, lambda x, kwargs, number=number: blocks.update({number: x}))
        cache = stored(model(**inputs))
    report, ids = luvc.report(), inputs["input_ids"]
    prefix = int(model.config.vision_config.model_type.startswith(("clip", "internvl", "dinov2")))
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

    def flops(n, before):
        return 2 * weights * n + 4 * 32 * (n * before + n * (n + 1) / 2)

    plain, cache = DynamicCache(), DynamicCache()
    for ids in turns:
        model(input_ids=ids, pixel_values=pixels, **{CACHE: plain})
    with LUVC(model, config) as luvc:
        model(input_ids=turns[0], pixel_values=pixels, **{CACHE: cache})
        first = luvc.report()
        model(input_ids=turns[1], pixel_values=pixels, **{CACHE: cache})
        second, held = luvc.report(), bytes_of(cache)
        model(input_ids=turns[0][:, -1:], **{CACHE: cache})
    want = sum(flops(each, 0) for each in layers) / (4 * flops(n + 3, 0))
    assert first.flops_left == pytest.approx(want)
    want = sum(flops(each - 1, each) for each in layers) / (4 * flops(n + 2, n + 3))
    assert second.flops_left == pytest.approx(want) and luvc.report() == second
    assert second.positions == [each - 1 for each in layers] and second.positions_full == n + 2
    assert second.kv_bytes_full == bytes_of(plain) and second.kv_bytes == held


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_report_with_everything_off(name):
    """Catches: a report that takes an off LUVC for one that prunes, or that fails after `generate`."""
    model = tiny(name)
    inputs = batch(model, ragged(name))
    with LUVC(model, OFF) as luvc:
        ids = model.generate(**inputs, **GREEDY)
        report, cache = luvc.report(), stored(model(**inputs))
    assert torch.equal(ids, model.generate(**inputs, **GREEDY))
    visual = ((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)).sum().item()
    assert report.positions == [report.positions_full] * LAYERS == [inputs["attention_mask"].sum()] * LAYERS
    assert report.visual_tokens == [report.visual_full] * LAYERS == [visual] * LAYERS
    assert report.kv_bytes == report.kv_bytes_full == bytes_of(cache) and report.flops_left == 1


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
