"""Two figures of the documentation, from real output.

python toy/figure.py                # toy/figure.png, of README.md: which patches live in which layer
python toy/figure.py --lost SEED    # toy/lost.png, of docs/results.md: a number lost as more is merged
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import LUVC, LUVCConfig, encode, load  # noqa: E402
from toy.make import draw_sample  # noqa: E402

PROMPT = "what number is on the striped thing?"
SIDE, GAP, TITLE, COLUMNS = 264, 18, 26, 4  # pixels of a panel, between panels, of a title; panels in a row
LINE = (70, 70, 70)


def patches_alive(luvc, layer, first):
    """(H, W) bool: the patches whose token decoder layer `layer` processed, for one picture from position `first`."""
    groups, (H, W) = luvc.groups[0], luvc.family.side
    slots = luvc.kept[layer][0] - first
    tokens = groups[slots[(slots >= 0) & (slots < H * W)]]  # a slot is one of the patches of its token
    return torch.isin(groups, tokens).view(H, W)


def outlined(picture, groups, size, width=1):
    """The picture, size x size pixels, with lines where one token ends and the next begins; groups (H, W)."""
    shown = picture.resize((size, size))
    pen, step, lines = ImageDraw.Draw(shown), size / groups.shape[1], []
    for row, column in (groups[:, 1:] != groups[:, :-1]).nonzero().tolist():
        x, y = (column + 1) * step, row * step
        lines.append([x, y, x, y + step])
    for row, column in (groups[1:] != groups[:-1]).nonzero().tolist():
        x, y = column * step, (row + 1) * step
        lines.append([x, y, x + step, y])
    looks = ((LINE, 1),) if width == 1 else (("black", 2 * width), ("white", width))  # seen on any background
    for colour, wide in looks:
        for line in lines:
            pen.line(line, fill=colour, width=wide)
    return shown


def panel(picture, alive, groups):
    """The picture with pruned patches bleached, and outlines of tokens."""
    white = Image.new("RGB", picture.size, "white")
    mask = Image.fromarray((alive.numpy() * 217 + 38).astype("uint8"))
    shown = Image.composite(picture, white, mask.resize(picture.size, Image.Resampling.NEAREST))
    return outlined(shown, groups.view(alive.shape), SIDE)


def page(panels, text, where):
    """Save titled panels in rows, and two lines of text below."""
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TITLE + GAP) + GAP + 2 * TITLE
    sheet, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(size=16)
    pen = ImageDraw.Draw(sheet)
    for number, (title, image) in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * (SIDE + GAP), GAP + row * (SIDE + TITLE + GAP)
        pen.text((x, y), title, fill="black", font=font)
        sheet.paste(image, (x, y + TITLE))
    pen.multiline_text((GAP, height - 2 * TITLE - 4), text, fill="black", font=font, spacing=6)
    sheet.save(where, optimize=True)
    print(f"wrote {where.parent.name}/{where.name}")


class Reader:
    """Asks a model one question about a picture."""

    def __init__(self, name):
        self.model, self.processor = load(name, "cpu")
        H, W = LUVC(self.model).family.side
        self.every, self.all_alive = torch.arange(H * W), torch.ones(H, W, dtype=torch.bool)

    def ask(self, picture, prompt, config=None):
        """(answer, position of the first visual token, LUVC or None)."""
        inputs = encode(self.processor, picture, prompt)
        luvc = LUVC(self.model, config) if config else None
        with luvc or contextlib.nullcontext():
            out = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        first = inputs["input_ids"][0].tolist().index(self.model.config.image_token_id)
        return said.strip(), first, luvc


def layers_of(reader, picture, prompt, where):
    """The figure of the README: what is left of a picture in the LLM's layers."""
    plain, _, _ = reader.ask(picture, prompt)
    less, first, luvc = reader.ask(picture, prompt, LUVCConfig())
    report, layers = luvc.report(), len(luvc.kept)
    panels = [(f"the picture: {len(reader.every)} patches", panel(picture, reader.all_alive, reader.every))]
    for layer in [round(i * (layers - 1) / 6) for i in range(7)]:
        title = f"LLM layer {layer + 1} of {layers}: {report.visual_tokens[layer]} tokens"
        panels.append((title, panel(picture, patches_alive(luvc, layer, first), luvc.groups[0])))
    text = (
        f"“{prompt}”   plain: {plain}   LUVC: {less}\n"
        f"LLM prefill FLOPs left: {report.flops_left:.0%}   "
        f"KV cache left: {report.kv_bytes / report.kv_bytes_full:.0%}"
    )
    page(panels, text, where)


def lost(reader, seed, where):
    """What growing compression does to a number: the thing whose number is asked for, and its tokens."""
    things, picture, asked = draw_sample(seed)
    picture, size = Image.fromarray(picture), reader.all_alive.shape[0]
    _, name, prompt, truth = next(a for a in asked if a[0] == "number")
    thing = next(t for t in things if name in (t["colour"], t["texture"]))
    y, x, height, width = thing["box"]
    side = max(height, width) + 16
    left, top = (
        min(max(0, middle - side // 2), picture.width - side) for middle in (x + width // 2, y + height // 2)
    )
    zoom = 6  # the whole picture is drawn so many times as large, and the thing cut out
    panels = []
    for keep in (None, 1.0, 0.75, 0.5625, 0.36, 0.25, 0.16):
        config = LUVCConfig(vision_keep=keep) if keep else None
        said, _, luvc = reader.ask(picture, prompt, config)
        groups = luvc.groups[0] if keep and keep < 1 else reader.every
        shown = outlined(picture, groups.view(size, -1), zoom * picture.width, width=3)
        shown = shown.crop([zoom * v for v in (left, top, left + side, top + side)]).resize((SIDE, SIDE))
        title = f"plain: {said}" if keep is None else f"vision_keep {keep:g}: {said}"
        panels.append((title, shown))
    text = f"“{prompt}”   right: {truth}\nOutlined: patches that share a token when they reach the LLM."
    page(panels, text, where)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy", help="checkpoint folder (default: the toy)")
    parser.add_argument("--prompt", default=PROMPT, help="(default: %(default)r)")
    parser.add_argument("--lost", type=int, metavar="SEED", help="write toy/lost.png, of that scene, instead")
    args = parser.parse_args()
    reader = Reader(args.model)
    if args.lost is not None:
        lost(reader, args.lost, HERE / "lost.png")
    else:
        layers_of(reader, Image.open(HERE / "example.png").convert("RGB"), args.prompt, HERE / "figure.png")


if __name__ == "__main__":
    main()
