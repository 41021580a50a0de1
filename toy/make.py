"""The toy: a small LLaVA, really trained, saved as an ordinary Hugging Face checkpoint folder.

    python toy/make.py                # draws scenes, trains, saves into the folder of this file
    python toy/make.py --check 1000   # accuracy of the saved checkpoint on unseen scenes, by kind of question

Tests, notebook and the default command must run offline, and random weights cannot show "near-lossless". So
this file makes the smallest model that can: it sees pictures of textured, coloured rectangles on a shaded,
noisy background, each with a plate that carries a number, and answers questions of five kinds in words, and a
sixth kind about two pictures. It is trained *without* LUVC and not tuned to it. The result loads through
`AutoProcessor` and `AutoModelForImageTextToText`, the code path of every real model.

Seeds below `HELD_OUT` draw the unseen scenes that tests and tables use; training draws from seeds above it.

How the checkpoint here came about, in 100 minutes of one core, and some of another for drawing. It continues
from the one of commit f498161 (four kinds, no numbers, an encoder half as wide); `widened` makes room in it:

    git archive --prefix=FOUR/ f498161 toy | tar x
    python toy/make.py --resume FOUR/toy --out NEW --stages plates:600 --batch 16          # 11 minutes
    python toy/make.py --resume NEW --out NEW --stages 2:1000,2p:1700,3p:300 --first 20000000   # 50 minutes
    python toy/make.py --resume NEW --out NEW --stages 3p:750 --rate 1e-3 --first 40000000      # 23 minutes
    python toy/make.py --resume NEW --out NEW --stages 3p:520 --rate 1e-3 --first 60000000      # 16 minutes

First the encoder learns digits from small parts of pictures, at a tenth of the cost; then all learn together,
from 2 x 2 cells of the layout and then from whole pictures. The rate of the first two runs was still falling
when the next began, and the shares of kinds and losses changed a little on the way: in the last run `Scenes`
asked for more of "count" in place of "number", and went on with the patch heads of the run before. So this
repeats what was done, not the very weights. Training from nothing, without --resume, is possible but untried.
"""

import argparse
import json
import math
import os
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

HERE = Path(__file__).resolve().parent
HELD_OUT = 1_000_000
EXAMPLE = 278  # seed of example.png

# --------------------------------------------------------------------------------------------------
# 1. Scenes and questions
# --------------------------------------------------------------------------------------------------

PIXELS, PATCH = 192, 8  # 24 x 24 = 576 patches, the grid of LLaVA-1.5
CELLS = 3  # objects sit in a 3 x 3 layout, so that "top left" is never a matter of taste
CELL = PIXELS // CELLS
PLATE, DIGIT = (12, 20), ((2, 2), (2, 11))  # height and width of a plate; where on it its two digits begin

COLOURS = {
    "red": (205, 50, 50),
    "green": (55, 165, 70),
    "blue": (55, 85, 205),
    "yellow": (225, 200, 55),
    "purple": (145, 60, 170),
    "cyan": (60, 190, 200),
}
TEXTURES = ("plain", "striped", "barred", "dotted", "checked")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four")
WHICH = ("first", "second", "both", "neither")
KINDS = ("colour", "texture", "place", "count", "number")  # and "pair", about two pictures


def corner(seed, cells=CELLS):
    """Training starts with parts of pictures, `cells` x `cells` of the layout: where the part of a seed
    begins."""
    return divmod(seed % (CELLS - cells + 1) ** 2, CELLS - cells + 1)


def scene(rng, cells=CELLS, corner=(0, 0), palette=4):
    """Things in different cells, two to six in a whole picture: dicts with colour, texture, row, col, box (y,
    x, height, width), number and plate (the y and x of its upper left corner). They have at most `palette`
    colours and as many textures."""
    things = []
    # Not all colours and textures at once, so that counts exceed one.
    colours, cloths = rng.permutation(list(COLOURS))[:palette], rng.permutation(TEXTURES)[:palette]
    for cell in rng.permutation(cells * cells)[: rng.integers(2, 7)]:
        row, col = divmod(int(cell), cells)
        row, col = row + corner[0], col + corner[1]
        height, width = rng.integers(28, CELL - 11), rng.integers(34, CELL - 11)
        y = row * CELL + rng.integers(4, CELL - 4 - height + 1)
        x = col * CELL + rng.integers(4, CELL - 4 - width + 1)
        plate = y + rng.integers(1, height - PLATE[0]), x + rng.integers(1, width - PLATE[1])
        things.append(new_thing(rng, colours, cloths, row, col, (y, x, height, width), plate))
    return things


def new_thing(rng, colours, cloths, row, col, box, plate):
    """A thing with a random colour, texture and number: a dict, its keys in the order of `scene`."""
    return {
        "colour": str(rng.choice(colours)),
        "texture": str(rng.choice(cloths)),
        "row": row,
        "col": col,
        "box": tuple(map(int, box)),
        "number": int(rng.integers(10, 100)),
        "plate": tuple(map(int, plate)),
    }


def light(texture, height, width, period, phase):
    """Where a texture is bright: (height, width) bool."""
    y, x = np.mgrid[0:height, 0:width]
    wave_y, wave_x = (y + phase) % period < period / 2, (x + phase) % period < period / 2
    return {
        "plain": np.ones_like(wave_x),
        "striped": wave_x,
        "barred": wave_y,
        "dotted": ~(wave_x & wave_y),
        "checked": wave_x ^ wave_y,
    }[texture]


@cache
def glyph(digit):
    """A digit in PIL's default font, 11 pixels high with what goes above and below: (8, 7) in [0, 1]."""
    picture = Image.new("L", (12, 16))
    ImageDraw.Draw(picture).text((2, 1), str(digit), fill=255, font=ImageFont.load_default(size=11))
    return np.asarray(picture, np.float32)[4:12, 2:9, None] / 255


def draw(rng, things, cells=CELLS, corner=(0, 0)):
    """The picture of a scene: (pixels, pixels, 3) uint8."""
    pixels = cells * CELL
    yy, xx = np.mgrid[0:pixels, 0:pixels].astype(np.float32)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(10, 40)
    shade = strength * ((yy * math.sin(angle) + xx * math.cos(angle)) / pixels - 0.5)
    picture = (rng.uniform(90, 160, 3) + shade[..., None]).astype(np.float32)
    for thing in things:
        y, x, height, width = thing["box"]
        y, x = y - corner[0] * CELL, x - corner[1] * CELL
        bright = light(thing["texture"], height, width, rng.integers(7, 11), rng.integers(0, 10))
        colour = np.array(COLOURS[thing["colour"]], np.float32) + rng.uniform(-12, 12, 3)
        picture[y : y + height, x : x + width] = np.where(bright[..., None], colour, colour * 0.45)
        y, x = thing["plate"][0] - corner[0] * CELL, thing["plate"][1] - corner[1] * CELL
        picture[y : y + PLATE[0], x : x + PLATE[1]] = 20
        for digit, (v, u) in zip(str(thing["number"]), DIGIT, strict=True):
            picture[y + v : y + v + 8, x + u : x + u + 7] += 225 * glyph(digit)
    picture += rng.standard_normal(picture.shape, np.float32) * 7
    return picture.clip(0, 255).astype(np.uint8)


def questions(rng, things, number=8, more=None):
    """`number` different questions about a scene, in random order, `more` of one kind if there are: tuples
    (kind, subject, question, answer)."""
    asked = []
    for by, names in (("texture", TEXTURES), ("colour", tuple(COLOURS))):
        other = "colour" if by == "texture" else "texture"
        for name in names:
            found = [t for t in things if t[by] == name]
            count = f"how many {name} things are there?"
            asked.append(("count", name, count, NUMBERS[len(found)] if len(found) < len(NUMBERS) else None))
            if len(found) == 1:  # only what is unique can be asked for by name
                thing = found[0]
                place = f"{ROWS[thing['row']]} {COLUMNS[thing['col']]}"
                asked.append((other, name, f"what {other} is the {name} thing?", thing[other]))
                asked.append(("place", name, f"where is the {name} thing?", place))
                digits = " ".join(str(thing["number"]))
                asked.append(("number", name, f"what number is on the {name} thing?", digits))
    asked = [asked[i] for i in rng.permutation(len(asked)) if asked[i][3] is not None]
    if more:  # in training: few of the questions about absent things, which there are most of
        asked = [a for a in asked if a[3] != "zero" or rng.random() < 0.2]
    # Every kind gets its share where the scene allows it, and of the absent things only a few are counted.
    chosen, share = [], -(-number // len(KINDS))
    for kind in KINDS:
        of_kind = [a for a in asked if a[0] == kind]
        if kind == "count":
            of_kind.sort(key=lambda a: a[3] == "zero" and rng.random() < 0.8)
        chosen += of_kind[: number if kind == more else share]
    chosen += [a for a in asked if a not in chosen][: max(0, number - len(chosen))]
    return [chosen[i] for i in rng.permutation(len(chosen))[:number]]


def draw_sample(seed, number=8, cells=CELLS, more=None, palette=4):
    """(things, picture array, questions) of a seed; what follows `number` is for training."""
    rng = np.random.default_rng(seed)
    things = scene(rng, cells, corner(seed, cells), palette)
    return things, draw(rng, things, cells, corner(seed, cells)), questions(rng, things, number, more)


def sample(seed):
    """One scene: (PIL image, [(prompt, answer), ...]). Seeds in [0, HELD_OUT) were never trained on."""
    _, picture, asked = draw_sample(seed)
    return Image.fromarray(picture), [(question, answer) for _, _, question, answer in asked]


def draw_pair(seed, number=4, cells=CELLS):
    """Two scenes of a seed and questions about both: ([things, things], [picture array, picture array],
    questions)."""
    rng = np.random.default_rng(seed)
    things = [scene(rng, cells, corner(seed, cells)) for _ in range(2)]
    pictures = [draw(rng, t, cells, corner(seed, cells)) for t in things]
    answers = {answer: [] for answer in WHICH}
    for by, names in (("texture", TEXTURES), ("colour", tuple(COLOURS))):
        for name in names:
            first, second = (any(t[by] == name for t in of_one) for of_one in things)
            answer = WHICH[(2 if second else 0) if first else (1 if second else 3)]
            answers[answer].append(("pair", name, f"which picture has the {name} thing?", answer))
    asked = []
    while any(answers.values()) and len(asked) < number:  # one of each answer in turn
        for answer in rng.permutation(WHICH):
            if answers[answer]:
                asked.append(answers[answer].pop(rng.integers(len(answers[answer]))))
    return things, pictures, asked[:number]


def prompt_of(question, pictures=1):
    """The prompt of a question about one picture or, if `pictures` is 2, about the first and the second."""
    images = "<image>" if pictures == 1 else " ".join(f"{name} <image>" for name in WHICH[:pictures])
    return f"USER: {images}\n{question} ASSISTANT:"


# --------------------------------------------------------------------------------------------------
# 2. The model and its processor: stock classes, small numbers
# --------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (  # the turns of LLaVA-1.5
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = "what is the thing things where how many are there colour texture ? ."
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", *words.split()]
    words += [*COLOURS, *TEXTURES, *ROWS, *COLUMNS, *NUMBERS]
    words += ["number", "on", *"0123456789", "which", "picture", "has", *WHICH]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words with spaces
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=4096,
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, width=64, layers=12, vision_width=128, vision_layers=4):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_width // 32,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=vision_width,
        initializer_range=0.05,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3 // 32 * 32,
        num_hidden_layers=layers,
        head_dim=32,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        # The default of 0.02 is meant for widths of thousands; at 64 attention would stay flat.
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def widened(model, tokenizer):
    """The same function with new words and an encoder twice as wide, for a checkpoint of the first size.

    A channel of value s becomes two, s + d and s - d. What was there reads their mean, s, and adds to s; the
    new heads and MLP units, and the d of the embeddings, read both and add to d alone. So nothing old changes
    but by what d does to the LayerNorms, and there is room for what digits need.
    """
    larger, old = make_model(tokenizer), model.state_dict()
    state = larger.state_dict()
    for name, new in state.items():
        was = old[name]
        if new.shape == was.shape:
            new.copy_(was)
        elif (
            "vision_tower" not in name and "projector" not in name
        ):  # embeddings and head: new words at the end
            new[: len(was)] = was
        elif "projector" in name:  # reads s
            new.copy_(torch.cat([was / 2, was / 2], 1) + 0.1 * new)
        elif "position_embedding" in name:
            side = math.isqrt(len(new) - 1)
            angle = torch.arange(side)[:, None] * (math.pi / side * 2 ** torch.arange(0, 4, 0.5))
            wave = torch.cat([angle.sin(), angle.cos()], 1)  # (side, 16), by which neighbours find each other
            rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
            d = torch.cat([rows, columns, rows * columns, rows * columns.flip(-1)], -1).flatten(0, 1) * 0.3
            d = torch.cat([torch.zeros(1, d.shape[1]), d])
            new.copy_(torch.cat([was + d, was - d], 1))
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):  # reads
            new[: len(was)] = torch.cat([was, was], 1) / 2
        elif name.endswith(("out_proj.weight", "fc2.weight")):  # adds
            fresh = new[: len(was), was.shape[1] :].clone()
            new.copy_(torch.cat([torch.cat([was, fresh], 1), torch.cat([was, -fresh], 1)]))
        elif name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "fc1.bias")):
            new[: len(was)] = was
        elif "patch_embedding" in name or "class_embedding" in name:
            d = new[: len(was)] * (0.05 / 0.02 if "patch" in name else 1)
            new.copy_(torch.cat([was + d, was - d]))
        else:  # biases of what adds, LayerNorms
            new.copy_(torch.cat([was, was]))
    larger.load_state_dict(state)
    return larger


# --------------------------------------------------------------------------------------------------
# 3. Training
# --------------------------------------------------------------------------------------------------


def encode_turns(tokenizer, asked, patches, pictures=1):
    """Several turns about the same picture(s) -> (ids, labels, crutch). A label stands where the answer's
    word is predicted.

    The answer is asked for twice: behind "ASSISTANT:", and as a crutch already at the word that names the
    subject ("striped") and, where the answer has two words, at the one behind it. There the question ends as
    far as the picture is concerned; copying the answer to the end of the line is then easy. Without it
    learning takes hours.
    """
    to_id, image = tokenizer.convert_tokens_to_ids, tokenizer.convert_tokens_to_ids("<image>")
    ids = [to_id("USER:")]
    for name in WHICH[:pictures]:
        ids += [to_id(name)] * (pictures > 1) + [image] * patches
    labels, crutch = [-100] * len(ids), [-100] * len(ids)
    for turn, (_, subject, question, answer) in enumerate(asked):
        q = to_id([*["USER:"] * (turn > 0), *question.replace("?", " ?").split(), "ASSISTANT:"])
        a = to_id([*answer.split(), "</s>"])
        ids += q + a
        labels += [-100] * (len(q) - 1) + a + [-100]
        hint, at = [-100] * (len(q) + len(a)), q.index(to_id(subject))
        hint[at : at + len(a) - 1] = a[:-1]
        crutch += hint
    return ids, labels, crutch


# What the heads say of a patch, and how many answers there are to each.
HEADS = [len(TEXTURES) + 1, len(COLOURS) + 1, 2, CELLS, CELLS, 11, 11]


def patch_targets(things, cells=CELLS, corner=(0, 0)):
    """What every patch shows and where it is, (rows, columns, 7): texture and colour of the thing at its
    middle, whether it is the middle of a thing, the third of the picture it lies in, by rows and by columns,
    and the tens and the units digit whose middle lies in it (0 where there is none, else the digit + 1)."""
    target = np.zeros((PIXELS // PATCH, PIXELS // PATCH, len(HEADS)), np.int64)
    middle = np.arange(PIXELS // PATCH) * PATCH + PATCH / 2
    target[..., 3] = (middle // CELL)[:, None]
    target[..., 4] = middle // CELL
    for thing in things:
        y, x, height, width = thing["box"]
        rows = np.nonzero((middle >= y) & (middle < y + height))[0]
        cols = np.nonzero((middle >= x) & (middle < x + width))[0]
        target[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1, 0] = 1 + TEXTURES.index(thing["texture"])
        target[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1, 1] = 1 + list(COLOURS).index(thing["colour"])
        target[int((y + height / 2) // PATCH), int((x + width / 2) // PATCH), 2] = 1
        for which, (digit, (v, u)) in enumerate(zip(str(thing["number"]), DIGIT, strict=True)):
            y, x = thing["plate"][0] + v + 4, thing["plate"][1] + u + 3
            target[y // PATCH, x // PATCH, 5 + which] = 1 + int(digit)
    size, (row, col) = cells * CELL // PATCH, (c * CELL // PATCH for c in corner)
    return target[row : row + size, col : col + size]


def patch_places(row, col, height, width):
    """Rows of the table of position embeddings for a part of the picture, in patches, behind that of CLS."""
    grid = torch.arange(row, row + height)[:, None] * (PIXELS // PATCH) + torch.arange(col, col + width)
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 + grid.flatten()])


def as_pixels(pictures):
    """A list of picture arrays -> (pictures, 3, height, width), normalised as the processor does it."""
    return (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


class Plates(torch.utils.data.Dataset):
    """Batches of small parts of pictures for the encoder alone: three batches in four of 3 x 4 patches around
    a plate, every fourth of whole cells, so that the middles of things are not forgotten."""

    def __init__(self, first, steps, batch):
        self.first, self.steps, self.batch = first, steps, batch

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        pictures, targets, places = [], [], []
        height, width = (CELL // PATCH, CELL // PATCH) if index % 4 == 0 else (3, 4)
        batch = self.batch // 5 if index % 4 == 0 else self.batch
        rng = np.random.default_rng(self.first + index)
        while len(pictures) < batch:
            things = [thing for _ in range(2) for thing in scene(rng)]
            things = list({(t["row"], t["col"]): t for t in things}.values())
            picture, target = draw(rng, things), patch_targets(things)
            for thing in things:
                row, col = thing["row"] * height, thing["col"] * width
                if index % 4:
                    (y, x), limit = thing["plate"], PIXELS // PATCH
                    row = rng.integers(max(0, -(-(y + PLATE[0]) // PATCH) - height), y // PATCH + 1)
                    col = rng.integers(max(0, -(-(x + PLATE[1]) // PATCH) - width), x // PATCH + 1)
                    row, col = min(row, limit - height), min(col, limit - width)
                pictures.append(
                    picture[row * PATCH : (row + height) * PATCH, col * PATCH : (col + width) * PATCH]
                )
                targets.append(target[row : row + height, col : col + width])
                places.append(patch_places(row, col, height, width))
        targets = torch.from_numpy(np.stack(targets)).flatten(1, 2)
        return as_pixels(pictures), torch.stack(places), targets


class Scenes(torch.utils.data.Dataset):
    """Batches of scenes with questions; every `pairs`-th of half as many, with two pictures each."""

    def __init__(self, tokenizer, first, steps, batch, number, cells, pairs):
        self.tokenizer, self.first, self.steps, self.batch = tokenizer, first, steps, batch
        self.number, self.cells, self.pairs = number, cells, pairs

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        pictures, targets, places, rows = [], [], [], []
        size, pair = self.cells * CELL // PATCH, self.pairs and index % self.pairs == self.pairs - 1
        for i in range(self.batch // 2 if pair else self.batch):
            seed = self.first + index * self.batch + i
            if pair:
                things, drawn, asked = draw_pair(seed, 11, self.cells)
            else:
                things, drawn, asked = draw_sample(seed, self.number, self.cells, "number", 4 - 2 * (i % 2))
                things, drawn = [things], [drawn]
            at = corner(seed, self.cells)
            pictures += drawn
            targets += [patch_targets(t, self.cells, at) for t in things]
            places += [patch_places(*(c * CELL // PATCH for c in at), size, size)] * len(drawn)
            rows.append(encode_turns(self.tokenizer, asked, size * size, len(drawn)))
        longest, pad_id = max(len(ids) for ids, _, _ in rows), self.tokenizer.pad_token_id
        text = [
            torch.tensor([row[i] + [value] * (longest - len(row[i])) for row in rows])
            for i, value in enumerate((pad_id, -100, -100))
        ]
        targets = torch.from_numpy(np.stack(targets)).flatten(1, 2)
        return as_pixels(pictures), torch.stack(places), targets, *text


def see(model, pixels, places):
    """The model's image features for parts of pictures that lie at `places`: (pictures, patches, width)."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    table = tower.embeddings
    patches = table.patch_embedding(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([table.class_embedding.expand(len(patches), 1, -1), patches], 1)
    x = tower.encoder(inputs_embeds=tower.pre_layrnorm(x + table.position_embedding(places)))
    return model.model.multi_modal_projector(x.last_hidden_state[:, 1:])


# Answers by the kind of question, for the progress bar.
ANSWERS = {
    "look": (*COLOURS, *TEXTURES),
    "place": (*ROWS, *COLUMNS),
    "count": NUMBERS,
    "number": tuple("0123456789"),
    "pair": WHICH,
}


def train(model, processor, stages, batch, number, rate, device, save, first):
    """Trains `model` through `stages`, a list of (name, steps), on scenes from seed `first` on; returns the
    seconds it took."""
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    model, to_id = model.to(device).train(), processor.tokenizer.convert_tokens_to_ids
    answers = {kind: torch.tensor(to_id(list(words)), device=device) for kind, words in ANSWERS.items()}
    # What each patch shows and where it is the encoder learns directly; the heads are thrown away afterwards.
    heads = torch.nn.Linear(model.config.text_config.hidden_size, sum(HEADS)).to(device)
    weights = [torch.ones(size, device=device) for size in HEADS]
    weights[2][1] = 20  # one patch in a hundred is the middle of a thing
    # Muon for the matrices inside the blocks, AdamW for everything else.
    body = {name: p for name, p in model.named_parameters() if "post_layernorm" not in name}
    inner = [p for name, p in body.items() if p.ndim == 2 and ".layers." in name]
    outer = [p for name, p in body.items() if p.ndim != 2 or ".layers." not in name]
    optimisers = [
        torch.optim.Muon(inner, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*outer, *heads.parameters()], betas=(0.9, 0.98), weight_decay=0.02),
    ]
    total, done, start, right = sum(steps for _, steps in stages), 0, time.time(), {}
    bar = tqdm(total=total, file=sys.stderr, mininterval=10)

    def meet(name, hits):  # running means for the progress bar
        if hits.numel():
            value = hits.float().mean().item()
            right[name] = 0.97 * right.get(name, value) + 0.03 * value

    for name, steps in stages:
        if name == "plates":
            data = Plates(first, steps, 32 * batch)
        else:
            pairs = 2 if "p" in name else 0
            data = Scenes(processor.tokenizer, first, steps, batch, number, int(name[0]), pairs)
        first += steps * batch
        for items in torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4):
            # One warm-up and one cosine span all stages; the crutches fade before the end.
            scale = min(1.0, (done + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done / total)))
            fade = 0.1 + 0.9 * max(0.0, 1 - 1.25 * done / total)
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = rate * scale
            pixels, places, targets, *text = (t.to(device) for t in items)
            features = see(model, pixels, places)
            weights[5][0] = weights[6][0] = 3 / targets.shape[1]  # few patches hold a digit
            shown = heads(features).flatten(0, 1).split(HEADS, dim=-1)
            targets = targets.flatten(0, 1).unbind(-1)
            loss = sum(
                cross_entropy(shown[i], targets[i], weight=weights[i])
                for i in range(len(HEADS))
                if i != 2
                or pixels.shape[-1] >= CELL  # smaller parts do not show where the middle of a thing is
            )
            for i, what in ((0, "texture"), (1, "colour"), (5, "tens"), (6, "units")):
                meet(what, (shown[i].argmax(-1) == targets[i])[targets[i] > 0])
            if text:
                ids, labels, crutch = text
                embedded, images = model.get_input_embeddings()(ids), ids == model.config.image_token_id
                embedded = embedded.masked_scatter(images[..., None], features.flatten(0, 1))
                hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
                said, words = model.lm_head(hidden[labels != -100]), labels[labels != -100]
                hint = cross_entropy(model.lm_head(hidden[crutch != -100]), crutch[crutch != -100])
                loss = cross_entropy(said, words) + 0.5 * fade * (hint + loss)
                for kind, of_kind in answers.items():
                    meet(kind, (said.argmax(-1) == words)[torch.isin(words, of_kind)])
            model.zero_grad(set_to_none=True)
            heads.zero_grad(set_to_none=True)
            loss.backward()
            if done < 60:  # the heads first, so that they fit what the encoder says already
                model.zero_grad(set_to_none=True)
            torch.nn.utils.clip_grad_norm_([*body.values(), *heads.parameters()], 1.0)
            for optimiser in optimisers:
                optimiser.step()
            shares = " ".join(f"{kind} {share:.3f}" for kind, share in right.items())
            bar.set_postfix_str(f"{name} {loss.item():.2f} {shares}", refresh=False)
            bar.update()
            done += 1
            if done % 200 == 0 or done == total:  # so that an interrupted run is not lost
                model.save_pretrained(save)
                processor.save_pretrained(save)
    model.eval()
    return time.time() - start


@torch.inference_mode()
def accuracy(model, processor, scenes, first=0, batch=25, pairs=True):
    """{kind: share of questions answered word for word right}, on unseen scenes, greedy, one turn each."""
    right = {}
    for start in range(first, first + scenes, batch):
        asked = []
        for seed in range(start, min(start + batch, first + scenes)):
            _, picture, questions_here = draw_sample(seed)
            asked += [(kind, [picture], q, a) for kind, _, q, a in questions_here[:4]]
        two = []
        for seed in range(start, min(start + batch, first + scenes)) if pairs else ():
            _, pictures, questions_here = draw_pair(seed)
            two += [(kind, pictures, q, a) for kind, _, q, a in questions_here[:1]]
        for part in filter(None, (asked, two)):
            prompts = [prompt_of(q, len(pictures)) for _, pictures, q, _ in part]
            images = [[Image.fromarray(p) for p in pictures] for _, pictures, _, _ in part]
            inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
            out = model.generate(**inputs.to(model.device), max_new_tokens=4, do_sample=False)
            said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for (kind, _, _, answer), text in zip(part, said, strict=True):
                right.setdefault(kind, []).append(text.strip() == answer)
    total = [hit for hits in right.values() for hit in hits]
    right = {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())}
    return right | {"all": float(np.mean(total))}


def parse_stages(text):
    """ "plates:1000,2:500,3p:100" -> [("plates", 1000), ("2", 500), ("3p", 100)]"""
    stages = [(name, int(steps)) for name, steps in (stage.split(":") for stage in text.split(","))]
    if any(name not in ("plates", "2", "2p", "3", "3p") or steps < 1 for name, steps in stages):
        raise ValueError
    return stages


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="plates:600,2:1000,2p:1700,3p:1100",
        help="name:steps,...; plates: the encoder alone; 2 or 3: all, on 2 x 2 or 3 x 3 cells; p: with pairs",
    )
    parser.add_argument("--batch", type=int, default=8, help="scenes per step")
    parser.add_argument("--questions", type=int, default=16, help="turns per scene")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first scene")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE, help="checkpoint folder")
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="continue from the checkpoint in FOLDER"
    )
    parser.add_argument("--check", type=int, metavar="SCENES", help="only measure the checkpoint in --out")
    args = parser.parse_args()
    for folder in filter(None, (args.resume, args.check and args.out)):
        if not (folder / "model.safetensors").exists():
            parser.error(f"{folder} holds no checkpoint")
    if args.check:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(args.out).to(args.device).eval()
        print(json.dumps(accuracy(model, AutoProcessor.from_pretrained(args.out), args.check)))
        return
    torch.manual_seed(0)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    if args.resume:
        old = type(model).from_pretrained(args.resume)
        wide = old.config.vision_config.hidden_size == model.config.vision_config.hidden_size
        model = old if wide else widened(old, processor.tokenizer)
    seconds = train(
        model,
        processor,
        args.stages,
        args.batch,
        args.questions,
        args.rate,
        args.device,
        args.out,
        args.first,
    )
    sample(EXAMPLE)[0].save(args.out / "example.png", optimize=True)
    print(f"stages {args.stages}, {args.batch} scenes a step: {seconds / 60:.0f} minutes on {args.device}")
    print(json.dumps(accuracy(model, processor, 100)))


if __name__ == "__main__":
    main()
