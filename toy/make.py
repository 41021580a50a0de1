"""The toy: a small LLaVA, really trained, saved as an ordinary Hugging Face checkpoint folder.

    python toy/make.py                # draws scenes, trains, saves into the folder of this file
    python toy/make.py --check 1000   # accuracy of the saved checkpoint on unseen scenes, by kind of question

Tests, notebook and the default command must run offline, and random weights cannot show "near-lossless". So
this file makes the smallest model that can: it sees pictures of textured, coloured rectangles on a shaded,
noisy background and answers questions of four kinds in words. It is trained *without* LUVC and not tuned to
it. The result loads through `AutoProcessor` and `AutoModelForImageTextToText`, the code path of every real
model.

Seeds below `HELD_OUT` draw the unseen scenes that tests and tables use; training draws from seeds above it.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

HERE = Path(__file__).resolve().parent
HELD_OUT = 1_000_000
EXAMPLE = 58  # seed of example.png

# --------------------------------------------------------------------------------------------------
# 1. Scenes and questions
# --------------------------------------------------------------------------------------------------

PIXELS, PATCH = 192, 8  # 24 x 24 = 576 patches, the grid of LLaVA-1.5
CELLS = 3  # objects sit in a 3 x 3 layout, so that "top left" is never a matter of taste

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
KINDS = ("colour", "texture", "place", "count")


def scene(rng, pixels=PIXELS):
    """Two to six things in different cells: dicts with colour, texture, row, col and box (y, x, height, width)."""
    things, cell_size = [], pixels // CELLS
    palette, cloths = (
        rng.permutation(list(COLOURS))[:4],
        rng.permutation(TEXTURES)[:4],
    )  # so that counts exceed one
    for cell in rng.permutation(CELLS * CELLS)[: rng.integers(2, 7)]:
        row, col = divmod(int(cell), CELLS)
        height, width = rng.integers(cell_size * 2 // 5, cell_size - 11, 2)
        y = row * cell_size + rng.integers(4, cell_size - 4 - height + 1)
        x = col * cell_size + rng.integers(4, cell_size - 4 - width + 1)
        things.append(
            {
                "colour": str(rng.choice(palette)),
                "texture": str(rng.choice(cloths)),
                "row": row,
                "col": col,
                "box": (int(y), int(x), int(height), int(width)),
            }
        )
    return things


def draw(rng, things, pixels=PIXELS):
    """The picture of a scene: (pixels, pixels, 3) uint8."""
    yy, xx = np.mgrid[0:pixels, 0:pixels].astype(np.float32)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(10, 40)
    shade = strength * ((yy * math.sin(angle) + xx * math.cos(angle)) / pixels - 0.5)
    picture = (rng.uniform(90, 160, 3) + shade[..., None]).astype(np.float32)
    for thing in things:
        y, x, height, width = thing["box"]
        v, u = yy[y : y + height, x : x + width] - y, xx[y : y + height, x : x + width] - x
        period, phase = rng.integers(7, 11), rng.integers(0, 10)
        wave_y, wave_x = (v + phase) % period < period / 2, (u + phase) % period < period / 2
        light = {
            "plain": np.ones_like(wave_x),
            "striped": wave_x,
            "barred": wave_y,
            "dotted": ~(wave_x & wave_y),
            "checked": wave_x ^ wave_y,
        }[thing["texture"]]
        colour = np.array(COLOURS[thing["colour"]], np.float32) + rng.uniform(-12, 12, 3)
        picture[y : y + height, x : x + width] = np.where(light[..., None], colour, colour * 0.45)
    picture += rng.normal(0, 7, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def questions(rng, things, number=8):
    """`number` different questions about a scene, in random order: tuples (kind, subject, question, answer)."""
    asked = []
    for by, names in (("texture", TEXTURES), ("colour", tuple(COLOURS))):
        other = "colour" if by == "texture" else "texture"
        for name in names:
            found = [t for t in things if t[by] == name]
            count = f"how many {name} things are there?"
            asked.append(("count", name, count, NUMBERS[len(found)] if len(found) < len(NUMBERS) else None))
            if len(found) == 1:  # only what is unique can be asked for by name
                asked.append((other, name, f"what {other} is the {name} thing?", found[0][other]))
                place = f"{ROWS[found[0]['row']]} {COLUMNS[found[0]['col']]}"
                asked.append(("place", name, f"where is the {name} thing?", place))
    asked = [asked[i] for i in rng.permutation(len(asked)) if asked[i][3] is not None]
    # Every kind gets a quarter where the scene allows it, and of the absent things only a few are counted.
    chosen, left = [], number
    for kind in KINDS:
        of_kind = [a for a in asked if a[0] == kind]
        if kind == "count":
            of_kind.sort(key=lambda a: a[3] == "zero" and rng.random() < 0.8)
        chosen += of_kind[: number // len(KINDS)]
    left = number - len(chosen)
    chosen += [a for a in asked if a not in chosen][:left]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def draw_sample(seed, number=8, pixels=PIXELS):
    """(things, picture array, questions) of a seed."""
    rng = np.random.default_rng(seed)
    things = scene(rng, pixels)
    return things, draw(rng, things, pixels), questions(rng, things, number)


def sample(seed):
    """One scene: (PIL image, [(prompt, answer), ...]). Seeds in [0, HELD_OUT) were never trained on."""
    _, picture, asked = draw_sample(seed)
    return Image.fromarray(picture), [(question, answer) for _, _, question, answer in asked]


# --------------------------------------------------------------------------------------------------
# 2. The model and its processor: stock classes, small numbers
# --------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (  # the turns of LLaVA-1.5
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
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


def make_model(tokenizer, width=64, layers=12, vision_layers=4, pixels=PIXELS):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=width // 32,
        image_size=pixels,
        patch_size=PATCH,
        projection_dim=width,
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
        # The default of 0.02 is meant for widths of thousands; at 64 attention would start flat and stay flat.
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
        image_seq_length=(pixels // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


# --------------------------------------------------------------------------------------------------
# 3. Training
# --------------------------------------------------------------------------------------------------


def encode_turns(tokenizer, asked, patches):
    """Several turns about one picture -> (ids, labels). A label stands where the answer's word is predicted.

    The answer is asked for twice: behind "ASSISTANT:", and as a crutch already at the word that names the
        subject
    ("striped") and, where the answer has two words, at the one behind it. There the question ends as far as
    the picture is concerned; copying the answer to the end of the line is then easy. Without it learning
    takes hours.
    """
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = [tokenizer.convert_tokens_to_ids("USER:")] + [image] * patches
    labels, crutch = [-100] * len(ids), [-100] * len(ids)
    for turn, (_, subject, question, answer) in enumerate(asked):
        q = tokenizer.convert_tokens_to_ids([*question.replace("?", " ?").split(), "ASSISTANT:"])
        a = tokenizer.convert_tokens_to_ids([*answer.split(), "</s>"])
        if turn:
            ids, labels, crutch = (
                [*ids, tokenizer.convert_tokens_to_ids("USER:")],
                [*labels, -100],
                [*crutch, -100],
            )
        ids += q + a
        labels += [-100] * (len(q) - 1) + a + [-100]
        hint = [-100] * (len(q) + len(a))
        at = q.index(tokenizer.convert_tokens_to_ids(subject))
        hint[at : at + len(a) - 1] = a[:-1]
        crutch += hint
    return ids, labels, crutch


def patch_targets(things, pixels):
    """What every patch shows and where it is, (patches, 5): texture and colour of the thing at its middle,
    whether it is the middle of a thing, and the third of the picture it lies in, by rows and by columns."""
    grid = pixels // PATCH
    target = np.zeros((grid, grid, 5), np.int64)
    middle = np.arange(grid) * PATCH + PATCH / 2
    target[..., 3] = (middle * CELLS // pixels)[:, None]
    target[..., 4] = middle * CELLS // pixels
    for thing in things:
        y, x, height, width = thing["box"]
        rows = np.nonzero((middle >= y) & (middle < y + height))[0]
        cols = np.nonzero((middle >= x) & (middle < x + width))[0]
        target[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1, 0] = 1 + TEXTURES.index(thing["texture"])
        target[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1, 1] = 1 + list(COLOURS).index(thing["colour"])
        target[int((y + height / 2) // PATCH), int((x + width / 2) // PATCH), 2] = 1
    return target.reshape(grid * grid, 5)


class Scenes(torch.utils.data.Dataset):
    """Training scenes; item i is seed `first` + i."""

    def __init__(self, tokenizer, first, size, number, pixels):
        self.tokenizer, self.first, self.size, self.number, self.pixels = (
            tokenizer,
            first,
            size,
            number,
            pixels,
        )

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        things, picture, asked = draw_sample(self.first + index, self.number, self.pixels)
        ids, labels, crutch = encode_turns(self.tokenizer, asked, (self.pixels // PATCH) ** 2)
        return (
            torch.from_numpy(picture),
            ids,
            labels,
            crutch,
            torch.from_numpy(patch_targets(things, self.pixels)),
        )

    def collate(self, items):
        pictures, ids, labels, crutch, patches = zip(*items, strict=True)
        longest = max(map(len, ids))

        def pad(rows, value):
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        pixels = (torch.stack(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        pad_id = self.tokenizer.pad_token_id
        return pixels, pad(ids, pad_id), pad(labels, -100), pad(crutch, -100), torch.stack(patches)


def grow(model, tokenizer, width, pixels):
    """The same weights for larger pictures: the encoder's position embeddings are interpolated, all else is copied."""
    larger, state = make_model(tokenizer, width, pixels=pixels), model.state_dict()
    for name, value in larger.state_dict().items():
        if "position_embedding.weight" in name:
            old, new = math.isqrt(len(state[name]) - 1), math.isqrt(len(value) - 1)
            plane = state[name][1:].T.reshape(1, width, old, old)
            plane = torch.nn.functional.interpolate(plane, (new, new), mode="bicubic", align_corners=False)
            state[name] = torch.cat([state[name][:1], plane.reshape(width, new * new).T])
        elif "position_ids" in name:
            state[name] = value
    larger.load_state_dict(state)
    return larger


def train(stages, batch, width, number, rate, device, save=None, resume=None, seed=0):
    """Trains through `stages`, a list of (pixels, steps); returns (model, processor, seconds).

    `resume` is a checkpoint folder to continue from, on new scenes and without crutches.
    """
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    processor = make_processor()
    model = make_model(processor.tokenizer, width, pixels=stages[0][0])
    if resume:
        model = LlavaForConditionalGeneration.from_pretrained(resume)
    first = 10 * HELD_OUT if resume else HELD_OUT  # seed of the first scene
    # What each patch shows and where it is the encoder learns directly; the heads are thrown away afterwards.
    parts = [len(TEXTURES) + 1, len(COLOURS) + 1, 2, CELLS, CELLS]
    heads = torch.nn.Linear(width, sum(parts)).to(device)
    weight = torch.tensor([1.0, 20.0], device=device)  # one patch in a hundred is the middle of a thing
    total, done, start, right = sum(steps for _, steps in stages), 0, time.time(), None
    bar = tqdm(total=total, file=sys.stderr, mininterval=5)
    for pixels, steps in stages:
        model = grow(model, processor.tokenizer, width, pixels).to(device).train()
        parameters = [*model.parameters(), *heads.parameters()]
        # Muon for the matrices inside the blocks, AdamW for everything else.
        inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
        outer = [p for p in parameters if not any(p is q for q in inner)]
        optimisers = [
            torch.optim.Muon(inner, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.02),
        ]
        scenes = Scenes(processor.tokenizer, first + done * batch, steps * batch, number, pixels)
        loader = torch.utils.data.DataLoader(scenes, batch, collate_fn=scenes.collate, num_workers=1)
        for step, items in enumerate(loader):
            # Each stage warms up its optimiser; one cosine spans all stages.
            scale = min(1.0, (step + 1) / 150) * (0.02 + 0.49 * (1 + math.cos(math.pi * done / total)))
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = rate * scale
            pixel_values, ids, labels, crutch, patches = (t.to(device) for t in items)
            text = 1 + (pixels // PATCH) ** 2  # logits are only needed where there are words
            out = model(
                input_ids=ids, pixel_values=pixel_values, use_cache=False, logits_to_keep=ids.shape[1] - text
            )
            logits = out.logits.flatten(0, 1)
            labels, crutch = labels[:, text:].flatten(), crutch[:, text:].flatten()
            answer = cross_entropy(logits, labels, ignore_index=-100)
            seen = heads(out.image_hidden_states.reshape(-1, width)).split(parts, dim=-1)
            weights = [None, None, weight, None, None]
            targets = zip(seen, patches.flatten(0, 1).unbind(-1), weights, strict=True)
            shown = sum(cross_entropy(logit, target, weight=w) for logit, target, w in targets)
            # The end of the training is about the answers alone.
            fade = 0.0 if resume else max(0.0, 1 - 1.25 * done / total)
            loss = answer + fade * (0.5 * cross_entropy(logits, crutch, ignore_index=-100) + 0.5 * shown)
            model.zero_grad(set_to_none=True)
            heads.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser in optimisers:
                optimiser.step()
            hit = (logits.argmax(-1) == labels)[labels != -100].float().mean().item()
            right = hit if right is None else 0.98 * right + 0.02 * hit
            bar.set_postfix(
                loss=f"{answer.item():.3f}", patch=f"{shown.item():.2f}", right=f"{right:.3f}", refresh=False
            )
            bar.update()
            done += 1
            if save and done % 500 == 0:  # so that an interrupted run is not lost
                model.save_pretrained(save)
                processor.save_pretrained(save)
    return model.eval(), processor, time.time() - start


@torch.inference_mode()
def accuracy(model, processor, scenes, first=0, batch=25):
    """Share of questions answered word for word right on unseen scenes, greedy, one turn each: {kind: share}."""
    right = {}
    for start in range(first, first + scenes, batch):
        asked = []
        for seed in range(start, min(start + batch, first + scenes)):
            _, picture, questions_here = draw_sample(seed)
            asked += [(kind, Image.fromarray(picture), q, a) for kind, _, q, a in questions_here[:4]]
        prompts = [f"USER: <image>\n{q} ASSISTANT:" for _, _, q, _ in asked]
        inputs = processor(
            images=[i for _, i, _, _ in asked], text=prompts, padding=True, return_tensors="pt"
        )
        out = model.generate(**inputs.to(model.device), max_new_tokens=4, do_sample=False)
        said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (kind, _, _, answer), text in zip(asked, said, strict=True):
            right.setdefault(kind, []).append(text.strip() == answer)
    total = [hit for hits in right.values() for hit in hits]
    right = {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())}
    return right | {"all": float(np.mean(total))}


def parse_stages(text):
    """ "128:2000,192:900" -> [(128, 2000), (192, 900)]: pixels, a multiple of patch and cells, and steps."""
    stages = [tuple(int(number) for number in stage.split(":")) for stage in text.split(",")]
    if any(len(s) != 2 or s[0] % PATCH or s[0] < 128 or s[1] < 1 for s in stages) or stages[-1][0] != PIXELS:
        raise ValueError
    return stages


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="128:2000,192:900",
        help=f"pixels:steps,...; small pictures are quick to learn from, the last must have {PIXELS} pixels",
    )
    parser.add_argument("--batch", type=int, default=16, help="scenes per step")
    parser.add_argument("--questions", type=int, default=8, help="turns per scene")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE, help="checkpoint folder")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--check", type=int, metavar="SCENES", help="only measure the saved checkpoint")
    args = parser.parse_args()
    if (args.check or args.resume) and not (args.out / "model.safetensors").exists():
        parser.error(f"{args.out} holds no checkpoint; train without --resume first")
    if args.check:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(args.out).to(args.device).eval()
        print(json.dumps(accuracy(model, AutoProcessor.from_pretrained(args.out), args.check)))
        return
    model, processor, seconds = train(
        args.stages,
        args.batch,
        args.width,
        args.questions,
        args.rate,
        args.device,
        save=args.out,
        resume=args.out if args.resume else None,
    )
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    sample(EXAMPLE)[0].save(args.out / "example.png", optimize=True)
    print(f"stages {args.stages}, {args.batch} scenes a step: {seconds / 60:.0f} minutes on {args.device}")
    print(json.dumps(accuracy(model, processor, 100)))


if __name__ == "__main__":
    main()
