"""The figure of the README, from real output: which patches live in which layer.

python toy/figure.py                  # writes toy/figure.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import EXAMPLE_PROMPT, LUVC, encode, load  # noqa: E402

SIDE, GAP, TITLE, COLUMNS = 264, 18, 26, 4  # pixels of a panel, between panels, of a title; panels in a row


def patches_alive(luvc, layer, first):
    """(H, W) bool: the patches whose token decoder layer `layer` processed, for one picture from position `first`."""
    layout = luvc.layout
    slots = luvc.kept[layer][0] - first
    slots = slots[(slots >= 0) & (slots < layout.H * layout.W)]
    tokens = luvc.groups[0][slots]  # a slot is one of the patches of its token
    return torch.isin(luvc.groups[0], tokens).view(layout.H, layout.W)


def panel(picture, alive, groups):
    """The picture with pruned patches bleached, and lines where one token ends and the next begins."""
    H, W = alive.shape
    shown = picture.resize((SIDE, SIDE))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    mask = Image.fromarray((alive.numpy() * 217 + 38).astype("uint8"))
    mask = mask.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    shown = Image.composite(shown, white, mask)
    pen, token, step = ImageDraw.Draw(shown), groups.view(H, W), SIDE / W
    for row in range(H):
        for column in range(W):
            x, y = column * step, row * step
            if column + 1 < W and token[row, column] != token[row, column + 1]:
                pen.line([x + step, y, x + step, y + step], fill=(70, 70, 70))
            if row + 1 < H and token[row, column] != token[row + 1, column]:
                pen.line([x, y + step, x + step, y + step], fill=(70, 70, 70))
    return shown


def main():
    model, processor = load("toy", "cpu")
    picture = Image.open(HERE / "example.png").convert("RGB")
    inputs = encode(processor, picture, EXAMPLE_PROMPT)

    def answer():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    plain, luvc = answer(), LUVC(model)
    first = inputs["input_ids"][0].tolist().index(luvc.layout.visual_ids[0])
    with luvc:
        less = answer()
    report, layers = luvc.report(), len(luvc.kept)
    every = torch.arange(luvc.layout.H * luvc.layout.W)
    all_alive = torch.ones(luvc.layout.H, luvc.layout.W, dtype=torch.bool)
    panels = [(f"the picture: {len(every)} patches", panel(picture, all_alive, every))]
    for layer in [round(i * (layers - 1) / 6) for i in range(7)]:
        title = f"LLM layer {layer + 1} of {layers}: {report.visual_tokens[layer]} tokens"
        panels.append((title, panel(picture, patches_alive(luvc, layer, first), luvc.groups[0])))
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TITLE + GAP) + GAP + 2 * TITLE
    page, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(size=16)
    pen = ImageDraw.Draw(page)
    for number, (title, image) in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * (SIDE + GAP), GAP + row * (SIDE + TITLE + GAP)
        pen.text((x, y), title, fill="black", font=font)
        page.paste(image, (x, y + TITLE))
    text = (
        f"“{EXAMPLE_PROMPT}”   plain: {plain}   LUVC: {less}\n"
        f"LLM prefill FLOPs left: {report.flops_left:.0%}   "
        f"KV cache left: {report.kv_bytes / report.kv_bytes_full:.0%}"
    )
    pen.multiline_text((GAP, height - 2 * TITLE - 4), text, fill="black", font=font, spacing=6)
    page.save(HERE / "figure.png", optimize=True)
    print(f"wrote {HERE.name}/figure.png")


if __name__ == "__main__":
    main()
