"""The pictures of walkthrough.ipynb: every function draws what a cell has computed, and computes nothing itself.

Colours and hatches differ in grey as well. Bars on a logarithmic axis begin at its lower end; a value of 0 is written
there and gets no bar.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from matplotlib.collections import EllipseCollection, LineCollection

DARK, MIDDLE, LIGHT = plt.get_cmap("viridis")([0.0, 0.5, 0.85])


def style():
    """How all figures look; called once."""
    plt.rcParams |= {"savefig.dpi": 120, "font.size": 9, "axes.titlesize": 10, "image.cmap": "viridis"}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def figure(*size, rows=1, columns=1, **options):
    """(figure, axes) of `size` inches."""
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def show(form="png"):
    """Display the figure, as a JPEG ("jpg") where photographs would make a PNG large: notebooks keep their figures."""
    file = io.BytesIO()
    more = {"pil_kwargs": {"quality": 90, "subsampling": 0, "optimize": True}} if form == "jpg" else {}
    plt.savefig(file, format=form, bbox_inches="tight", pad_inches=0.08, **more)
    plt.close()
    display(Image(file.getvalue(), format=form))


# ---- Pictures, patches and tokens --------------------------------------------------------------------------


def outline(ax, groups, picture_side, width=0.7):
    """On `ax`, which shows a picture of picture_side pixels: lines where one token ends and the next begins.

    groups: (H, W), for each patch the token that it is in.
    """
    (H, W), lines = groups.shape, []
    for row, column in np.ndindex(H, W):
        y, x = row * picture_side / H - 0.5, column * picture_side / W - 0.5
        if column and groups[row, column] != groups[row, column - 1]:
            lines.append([(x, y), (x, y + picture_side / H)])
        if row and groups[row, column] != groups[row - 1, column]:
            lines.append([(x, y), (x + picture_side / W, y)])
    for colour, wide in (("black", 2.5 * width), ("white", width)):  # seen on any background
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=wide))


def bleached(ax, picture, kept):
    """The picture; patches that are not `kept`, (H, W) bool, are nearly white."""
    ax.imshow(picture)
    veil = np.ones((*kept.shape, 4))  # white; the fourth channel is how opaque it is
    veil[..., 3] = ~np.asarray(kept) * 0.85
    right, bottom = picture.width - 0.5, picture.height - 0.5
    ax.imshow(veil, extent=(-0.5, right, bottom, -0.5), interpolation="nearest")
    ax.set_axis_off()


def four_patches(photo, patches, row, column):
    """A photograph in patches, (rows, columns, 3, side, side); four of them, and the three channels of each."""
    rows, columns, _, side, _ = patches.shape
    whole = plt.figure(figsize=(9, 4.2), layout="constrained")
    left, right = whole.subfigures(1, 2, width_ratios=[1, 1.05])
    ax = left.subplots()
    ax.imshow(photo)
    outline(ax, np.arange(rows * columns).reshape(rows, columns), photo.width, width=0.4)
    for colour, width in (("black", 5), ("white", 2)):
        box = (column * side - 0.5, row * side - 0.5), 4 * side, side
        ax.add_patch(plt.Rectangle(*box, fill=False, color=colour, linewidth=width))
    ax.set_axis_off()
    ax.set_title(f"{rows} x {columns} patches; the frame marks four")
    names = ["patch", "red", "green", "blue"]
    for i, line in enumerate(right.subplots(4, 4).T):
        patch = patches[row, column + i]
        line[0].imshow((patch.permute(1, 2, 0) * 0.25 + 0.5).clamp(0, 1))
        line[0].set_title(f"({row}, {column + i})")
        for ax, channel in zip(line[1:], patch, strict=True):
            shown = ax.imshow(channel, vmin=-2, vmax=2, cmap="gray")
        for ax, name in zip(line, names, strict=True):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i == 0:
                ax.set_ylabel(name)
    right.colorbar(shown, ax=right.axes, shrink=0.6, ticks=[-2, 0, 2], label="what the encoder gets")
    show("jpg")


def groups_and_tokens(photo, columns):
    """Groups above, patches painted as their tokens below. columns: (title, groups, painted, title below)."""
    _, axes = figure(9, 5.2, rows=2, columns=len(columns))
    for (title, groups, painted, below), (upper, lower) in zip(columns, axes.T, strict=True):
        upper.imshow(photo)
        outline(upper, groups, photo.width, width=0.5)
        upper.set_title(title)
        lower.imshow(painted)
        lower.set_title(below)
    for ax in axes.flat:
        ax.set_axis_off()
    show("jpg")


def encoder_blocks(picture, groups, similar):
    """For each encoder block: groups on the picture, and similarities of neighbours (masked: the same token)."""
    whole, axes = figure(9.6, 4.8, rows=2, columns=len(groups))
    for block, (group, values) in enumerate(zip(groups, similar, strict=True)):
        axes[0, block].imshow(picture)
        outline(axes[0, block], group, picture.width, width=0.4)
        axes[0, block].set_title(f"block {block}: {len(group.unique())} tokens")
        shown = axes[1, block].imshow(values, vmin=-0.2, vmax=1, cmap="cividis")
    for ax in axes.flat:
        ax.set_axis_off()
    whole.colorbar(shown, ax=axes[1], label="cosine similarity", shrink=0.8)
    show("jpg")


def kept_in_layers(picture, panels, columns=4, groups=None):
    """A picture again and again, with what is kept of it. panels: (title, kept (H, W) bool); picture: one, or one
    for each panel."""
    rows = -(-len(panels) // columns)
    _, axes = figure(2.2 * columns, 2.5 * rows, rows=rows, columns=columns, squeeze=False)
    pictures = picture if isinstance(picture, list) else [picture] * len(panels)
    for ax, shown, (title, kept) in zip(axes.flat, pictures, panels, strict=True):
        bleached(ax, shown, kept)
        if groups is not None:
            outline(ax, groups, shown.width, width=0.2)
        ax.set_title(title)
    show("jpg")


def score_and_kept(picture, score, panels):
    """What the filter removes, as colours, and the picture with what is kept. panels: (title, kept (H, W) bool)."""
    _, axes = figure(9, 2.6, columns=2 + len(panels))
    axes[0].imshow(picture)
    axes[0].set_title("the picture")
    axes[1].imshow(score)
    axes[1].set_title("score (bright: high)")
    for ax, (title, kept) in zip(axes[2:], panels, strict=True):
        bleached(ax, picture, kept)
        ax.set_title(title)
    for ax in axes:
        ax.set_axis_off()
    show("jpg")


def sizes_in_layers(picture, panels):
    """Each token as a circle on the picture, with the area of as many patches as its size. panels: (title, size (H, W),
    0 where there is none)."""
    _, axes = figure(9, 3.2, columns=len(panels))
    for ax, (title, size) in zip(axes, panels, strict=True):
        patch = picture.width / size.shape[1]
        ax.imshow(picture, alpha=0.6)
        rows, columns = np.nonzero(np.asarray(size))
        across = 2 * patch * np.sqrt(np.asarray(size)[rows, columns] / np.pi)
        centres = np.stack([columns + 0.5, rows + 0.5], 1) * patch - 0.5
        look = {"facecolors": (1, 1, 1, 0.35), "edgecolors": "black", "linewidths": 0.7}
        where = {"units": "xy", "offsets": centres, "offset_transform": ax.transData}
        ax.add_collection(EllipseCollection(across, across, np.zeros_like(across), **where, **look))
        ax.set(xlim=(-0.5, picture.width - 0.5), ylim=(picture.height - 0.5, -0.5), title=title)
        ax.set_axis_off()
    show("jpg")


def parts_of(pictures, side, window):
    """Parts of pictures with groups. pictures: (title, picture, groups (H, W)); window (left, right, top, bottom)."""
    left, right, top, bottom = window
    width = 9 / len(pictures)
    _, axes = figure(9, width * (bottom - top) / (right - left) + 0.35, columns=len(pictures), squeeze=False)
    for ax, (title, picture, groups) in zip(axes.flat, pictures, strict=True):
        ax.imshow(picture)
        outline(ax, groups, side, width=1)
        ax.set(xlim=(left, right), ylim=(bottom, top), title=title)
        ax.set_axis_off()
    show()


# ---- By hand -----------------------------------------------------------------------------------------------


def merged_by_hand(steps):
    """Boxes as wide as a token's size, one row for each step. steps: (line of (token, size), similarities)."""
    _, ax = figure(8, 3.3)
    for level, (line, similar) in enumerate(steps):
        at = 0
        for number, ((p, q), n) in enumerate(line):
            box = (at + 0.04, -level), n - 0.08, 0.55
            ax.add_patch(plt.Rectangle(*box, facecolor="white", edgecolor="black"))
            ax.text(at + n / 2, 0.27 - level, f"({p:.2f}, {q:.2f})\nsize {n}", ha="center", va="center")
            at += n
            if number < len(similar):
                joined = similar[number] == max(similar)
                text, weight = ("merge", "bold") if joined else ("cut", "normal")
                text = f"{similar[number]:.2f} {text}"
                ax.text(at, -0.22 - level, text, ha="center", va="center", fontweight=weight)
        ax.text(-0.1, 0.27 - level, f"{len(line)} left", ha="right", va="center")
    ax.set(xlim=(-0.5, 4.1), ylim=(-3.1, 0.65))
    ax.set_axis_off()
    show()


def filtered_by_hand(signal, waves, slow):
    """Eight numbers, the waves that pass, their sum, and what is left. waves: {name: eight numbers}."""
    _, axes = figure(9, 2.8, columns=3, sharex=True)
    at = np.arange(len(signal))
    axes[0].bar(at, signal, 0.7, color=LIGHT, edgecolor="black")
    axes[0].plot(at, slow, "o-", color=DARK, label="what passes")
    axes[0].set(title="eight tokens of one channel", ylim=(0, 12.5))
    axes[0].legend(loc="upper right")
    for (name, wave), marker, line, shade in zip(
        waves.items(), "osD", ("-", "--", "-."), (0, 0.33, 0.67), strict=True
    ):
        look = {"marker": marker, "linestyle": line, "color": plt.get_cmap("viridis")(shade)}
        axes[1].plot(at, wave, label=name, **look)
    axes[1].set(title="the mean and two waves pass", ylim=(-1.5, 11))
    axes[1].legend(loc="upper right")
    detail = [abs(a - b) for a, b in zip(signal, slow, strict=True)]
    best = sorted(detail)[-3]
    colours = [DARK if d >= best else "white" for d in detail]
    axes[2].bar(at, detail, 0.7, color=colours, edgecolor="black")
    axes[2].set(title="the score; dark: the three highest", ylim=(0, 1.8))
    for x, d in zip(at, detail, strict=True):
        axes[2].text(x, d + 0.04, f"{d:.2f}", ha="center", fontsize=8)
    for ax in axes:
        ax.set(xlabel="token", xticks=at)
    show()


# ---- Curves and bars ---------------------------------------------------------------------------------------


def cost_of_tokens(counts, panels):
    """What the decoder needs for more and more image tokens. panels: {title: values}."""
    _, axes = figure(9, 2.8, columns=2)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.fill_between(counts, values[0], values, color=LIGHT, hatch="//", edgecolor="white")
        ax.plot(counts, values, "o-", color=DARK)
        ax.axhline(values[0], color="black", linestyle=":")
        ax.text(590, values[0], "the text\nalone", va="bottom")
        ax.text(555, 0.4 * max(values), "the picture", ha="right", backgroundcolor="white")
        ax.set(xlabel="image tokens in the sequence", title=title, ylim=(0, None), xlim=(-20, 720))
    show()


def spectrum(spectra, passed, row):
    """Amplitudes over the frequency, on a logarithmic axis. spectra: {name: amplitudes}; row: tokens of a row."""
    _, ax = figure(9, 2.8)
    looks = ({"color": LIGHT, "linewidth": 2}, {"color": DARK, "linestyle": "--", "linewidth": 1})
    for (name, values), look in zip(spectra.items(), looks, strict=True):
        ax.semilogy(values, label=name, **look)
    first = next(iter(spectra.values()))
    ax.set(ylim=(first.min() / 3, first.max() * 2), xlim=(-3, len(first) + 2))
    ax.set(xticks=range(0, len(first), row), xlabel=f"frequency: periods per picture; ticks at {row}, ...")
    ax.set_ylabel("amplitude, mean of the channels")
    ax.axvline(passed, color="black", linestyle=":")
    ax.text(passed + 2, first.max(), "cutoff", va="top")
    ax.legend(loc="upper right")
    show()


def position_bias(by_row):
    """Scores by row of the sequence. by_row: {title: ((H,) scores of pictures as they are, (H,) of rolled ones)}."""
    _, axes = figure(9, 3, columns=len(by_row))
    for ax, (title, (old, rolled)) in zip(axes, by_row.items(), strict=True):
        ax.plot(old, "o-", color=DARK, markersize=4, label="pictures as they are")
        ax.plot(rolled, "s--", color=MIDDLE, markersize=4, label="rolled by half a picture")
        ax.set(title=title, xlabel="row of the sequence (the text follows the last one)", ylim=(0, None))
        ax.set_ylabel("score, relative to the mean")
    bottom, top = axes[0].get_ylim()
    axes[0].set_ylim(bottom, 1.3 * top)  # room for the legend
    axes[0].legend(loc="upper left")
    show()


def kept_and_apart(picture, panels, apart, floor=1e-7):
    """What layers keep of a picture, and bars of differences on a logarithmic axis.

    panels: six of (title, kept (H, W) bool); apart: {name: value}.
    """
    whole = plt.figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = whole.subfigures(1, 2, width_ratios=[1, 1.15])
    for ax, (title, kept) in zip(left.subplots(2, 3).flat, panels, strict=True):
        bleached(ax, picture, kept)
        ax.set_title(title)
    ax = right.subplots()
    for y, (name, value) in enumerate(apart.items()):
        hatch = "////" if name.startswith("mistake") else ".." if "plain" in name else ""
        if value > 0:
            ax.barh(y, value, color="white" if hatch else DARK, edgecolor="black", hatch=hatch)
        ax.text(1.5 * max(value, floor), y, f"{value:.1g}" if value else "0: the same bits", va="center")
    ax.set(xscale="log", xlim=(floor, 300), yticks=range(len(apart)), yticklabels=list(apart))
    ax.invert_yaxis()
    ax.set_title("largest difference of a logit from ours")
    show("jpg")


def positions_per_layer(full, image_tokens, text):
    """Bars: positions of the plain model, and of LUVC, layer by layer."""
    _, ax = figure(9, 3)
    number = np.arange(len(image_tokens))
    ax.bar(number - 0.2, [full] * len(image_tokens), 0.4, color=LIGHT, label="plain: all positions")
    ax.bar(number + 0.2, image_tokens, 0.4, bottom=text, color=DARK, label="LUVC: image tokens")
    look = {"color": "white", "edgecolor": "black", "hatch": "////"}
    ax.bar(number + 0.2, [text] * len(image_tokens), 0.4, label="LUVC: text", **look)
    ax.set(xlabel="decoder layer", ylabel="positions processed", xticks=number, ylim=(0, 1.2 * full))
    ax.legend(loc="upper right", ncols=3)
    show()


def flops_over_text(texts, curves, title):
    """Share of the arithmetic over the length of the text. curves: {name: shares}."""
    _, ax = figure(8, 3)
    looks = zip((LIGHT, MIDDLE, DARK), ("-", "--", "-."), "sod", strict=True)
    for (name, shares), (colour, line, marker) in zip(curves.items(), looks, strict=True):
        ax.plot(texts, shares, color=colour, linestyle=line, marker=marker, label=name)
    ax.set(xscale="log", xticks=texts, xticklabels=texts, xlabel="positions of text")
    ax.set(ylabel="prefill FLOPs left", ylim=(0, 1.05), title=title)
    ax.minorticks_off()
    ax.legend(loc="lower right")
    show()
