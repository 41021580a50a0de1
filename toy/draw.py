"""The pictures of walkthrough.ipynb: every function draws what a cell has computed, and computes nothing itself.

Colours and hatches differ in grey as well. Bars on a logarithmic axis begin at its lower end; a value of 0 is written
there and gets no bar.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection

DARK, MIDDLE, LIGHT = plt.get_cmap("viridis")([0.0, 0.5, 0.85])
LINES = ["-", "--", "-.", ":", (0, (1, 1)), "--", "-.", ":"]


def style():
    """How all figures look; called once."""
    plt.rcParams |= {"figure.dpi": 110, "font.size": 9, "axes.titlesize": 10, "image.cmap": "viridis"}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def figure(*size, rows=1, columns=1, **options):
    """(figure, axes) of `size` inches."""
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def percent(ax, ticks, which="x"):
    """A logarithmic axis for shares, with these ticks."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    ax.set(**{f"{which}scale": "log", f"{which}ticks": ticks})
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.minorticks_off()


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
    ax.add_collection(
        LineCollection(lines, colors="black", linewidths=2.5 * width)
    )  # black below white can be
    ax.add_collection(LineCollection(lines, colors="white", linewidths=width))  # seen on any background


def bleached(ax, picture, alive):
    """The picture; patches that are not `alive`, (H, W) bool, are nearly white."""
    ax.imshow(picture)
    veil = np.ones((*alive.shape, 4))  # white; the fourth channel is how opaque it is
    veil[..., 3] = ~np.asarray(alive) * 0.85
    side = picture.width - 0.5, picture.height - 0.5
    ax.imshow(veil, extent=(-0.5, side[0], side[1], -0.5), interpolation="nearest")
    ax.set_axis_off()


def four_patches(photo, patches, row, column):
    """A photograph in patches, (rows, columns, 3, side, side), and four of them as pictures and as vectors."""
    rows, columns, _, side, _ = patches.shape
    whole = plt.figure(figsize=(9, 4), layout="constrained")
    left, right = whole.subfigures(1, 2, width_ratios=[1, 1.1])
    ax = left.subplots()
    ax.imshow(photo)
    outline(ax, np.arange(rows * columns).reshape(rows, columns), photo.width, width=0.4)
    for colour, width in (("black", 5), ("white", 2)):
        box = (column * side, row * side), 4 * side, side
        ax.add_patch(plt.Rectangle(*box, fill=False, color=colour, linewidth=width))
    ax.set_axis_off()
    ax.set_title(f"{rows} x {columns} patches; the frame marks four")
    for i, ax in enumerate(right.subplots(2, 4).flat):
        patch = patches[row, column + i % 4]
        if i < 4:
            ax.imshow(patch.permute(1, 2, 0) * 0.25 + 0.5)
            ax.set_title(f"({row}, {column + i})")
            ax.set_axis_off()
        else:
            ax.plot(patch.flatten(), color=DARK, linewidth=0.4)
            ax.set(ylim=(-2.1, 2.1), xticks=[0, patch.numel()], yticks=[-2, 0, 2] if i == 4 else [])
    right.supxlabel(f"the four, and as vectors of {patch.numel()} numbers", fontsize=9)
    plt.show()


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
    plt.show()


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
    plt.show()


def alive_in_layers(picture, panels, columns=4, groups=None):
    """A picture again and again, with what lives of it. panels: (title, alive (H, W) bool)."""
    rows = -(-len(panels) // columns)
    _, axes = figure(2.1 * columns, 2.4 * rows, rows=rows, columns=columns, squeeze=False)
    pictures = picture if isinstance(picture, list) else [picture] * len(panels)
    for ax, shown, (title, alive) in zip(axes.flat, pictures, panels, strict=True):
        bleached(ax, shown, alive)
        if groups is not None:
            outline(ax, groups, shown.width, width=0.2)
        ax.set_title(title)
    plt.show()


def sizes_in_layers(panels):
    """Sizes over the picture, as colours. panels: (title, sizes (H, W), NaN where there is no token)."""
    whole, axes = figure(9, 2.6, columns=len(panels))
    for ax, (title, size) in zip(axes, panels, strict=True):
        image = ax.imshow(np.log2(size), vmin=0, vmax=6)
        ax.set(title=title, xticks=[], yticks=[])
    bar = whole.colorbar(image, ax=axes, ticks=[0, 2, 4, 6])
    bar.ax.set_yticklabels(["1 slot", "4", "16", "64"])
    plt.show()


def parts_of(pictures, side, window):
    """Parts of pictures with groups. pictures: (title, picture, groups (H, W)); window (left, right, top, bottom)."""
    _, axes = figure(2.3 * len(pictures), 2.7, columns=len(pictures), squeeze=False)
    left, right, top, bottom = window
    for ax, (title, picture, groups) in zip(axes.flat, pictures, strict=True):
        ax.imshow(picture)
        outline(ax, groups, side, width=1)
        ax.set(xlim=(left, right), ylim=(bottom, top), title=title)
        ax.set_axis_off()
    plt.show()


# ---- By hand -----------------------------------------------------------------------------------------------


def merged_by_hand(steps):
    """Boxes as wide as a token's size, one row for each step. steps: (line of (token, size), similarities)."""
    _, ax = figure(9, 3.6)
    for level, (line, similar) in enumerate(steps):
        at = 0
        for number, ((p, q), n) in enumerate(line):
            ax.add_patch(
                plt.Rectangle((at + 0.04, -level), n - 0.08, 0.55, facecolor="white", edgecolor="black")
            )
            ax.text(at + n / 2, 0.27 - level, f"({p:.2f}, {q:.2f})\nsize {n}", ha="center", va="center")
            at += n
            if number < len(similar):
                joined = similar[number] == max(similar)
                text, weight = ("merge", "bold") if joined else ("cut", "normal")
                text = f"{similar[number]:.2f} {text}"
                ax.text(at, -0.22 - level, text, ha="center", va="center", fontweight=weight)
        ax.text(-0.1, 0.27 - level, f"{len(line)} left", ha="right", va="center")
    ax.set(xlim=(-0.5, 4.1), ylim=(-3.2, 0.7))
    ax.set_axis_off()
    ax.set_title("width of a box: its size; below it: the cosine similarity to its neighbour")
    plt.show()


def filtered_by_hand(signal, waves, slow):
    """Eight numbers, the waves that pass, their sum, and what is left. waves: {name: eight numbers}."""
    _, axes = figure(9, 2.7, columns=3, sharex=True)
    at = np.arange(len(signal))
    axes[0].bar(at, signal, 0.7, color=LIGHT, edgecolor="black")
    axes[0].plot(at, slow, "o-", color=DARK, label="what passes")
    axes[0].set(title="eight tokens of one channel", ylim=(0, 12.5))
    axes[0].legend(loc="upper right")
    for number, (name, wave) in enumerate(waves.items()):
        axes[1].plot(
            at,
            wave,
            "osD"[number],
            linestyle=LINES[number],
            color=plt.get_cmap("viridis")(number / 3),
            label=name,
        )
    axes[1].set(title="what passes: the mean and two waves", ylim=(-1.5, 11))
    axes[1].legend(loc="upper right")
    detail = [abs(a - b) for a, b in zip(signal, slow, strict=True)]
    best = sorted(detail)[-3]
    colours = [DARK if d >= best else "white" for d in detail]
    axes[2].bar(at, detail, 0.7, color=colours, edgecolor="black")
    axes[2].set(title="score: what is removed (dark: three stay)", ylim=(0, 1.8))
    for x, d in zip(at, detail, strict=True):
        axes[2].text(x, d + 0.04, f"{d:.2f}", ha="center", fontsize=8)
    for ax in axes:
        ax.set(xlabel="token", xticks=at)
    plt.show()


# ---- Curves and bars ---------------------------------------------------------------------------------------


def cost_of_tokens(counts, panels, device):
    """What the decoder needs for more and more visual tokens. panels: {title: values}."""
    whole, axes = figure(9, 3, columns=2)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.fill_between(counts, values[0], values, color=LIGHT, hatch="//", edgecolor="white")
        ax.plot(counts, values, "o-", color=DARK)
        ax.axhline(values[0], color="black", linestyle=":")
        ax.text(590, values[0], "the text\nalone", va="bottom")
        ax.text(555, 0.4 * max(values), "the picture", ha="right", backgroundcolor="white")
        ax.set(
            xlabel="visual tokens in the sequence", title=f"decoder: {title}", ylim=(0, None), xlim=(-20, 720)
        )
    whole.suptitle(device, x=0.99, ha="right", fontsize=8)
    plt.show()


def spectrum_and_score(spectra, passed, score, picture, alive):
    """The spectrum of the tokens, their score over the picture, and those that stay. spectra: {name: amplitudes}."""
    whole, axes = figure(10, 3.2, columns=3, width_ratios=[1.4, 1, 1])
    looks = ({"color": LIGHT}, {"color": DARK, "linestyle": "--", "linewidth": 1})
    for (name, values), look in zip(spectra.items(), looks, strict=True):
        axes[0].semilogy(values, label=name, **look)
    first = next(iter(spectra.values()))
    axes[0].set(ylim=(first.min() / 4, first.max() * 3), xlabel="frequency (periods per picture)")
    axes[0].set(title="amplitude, mean over the channels")
    axes[0].axvline(passed, color="black", linestyle=":")
    axes[0].legend(loc="upper right")
    shown = axes[1].imshow(score)
    axes[1].set_axis_off()
    axes[1].set_title("score of each token")
    whole.colorbar(shown, ax=axes[1], shrink=0.8)
    bleached(axes[2], picture, alive)
    axes[2].set_title(f"the {int(alive.sum())} that stay")
    plt.show()


def position_bias(by_row, rolled):
    """Scores by row of the picture, and before and after rolling. by_row: {name: (H,)}; rolled: {name: (old, new)}."""
    _, axes = figure(10, 3.4, columns=3, width_ratios=[1.3, 1, 1])
    looks = [{"color": DARK, "marker": "o"}, {"color": MIDDLE, "linestyle": "--", "marker": "s"}]
    for (name, values), look in zip(by_row.items(), looks, strict=True):
        axes[0].plot(values, label=name, markersize=4, **look)
    axes[0].set(xlabel="row of the picture (the text follows the last one)", ylabel="relative to the mean")
    axes[0].set_ylim(0, 1.4 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].legend(loc="upper left")
    for ax, (name, (old, new)), marker in zip(axes[1:], rolled.items(), "os", strict=True):
        ax.plot([0, old.max()], [0, old.max()], color="black", linestyle=":")
        ax.plot(old, new, marker, markersize=3, fillstyle="none", color=DARK)
        ax.set(xlabel="score of a token", ylabel="the same token, rolled", title=f"by {name}")
    plt.show()


def kept_and_apart(kept, length, first, last, apart, floor=1e-7):
    """Which positions each layer processed, and bars of differences on a logarithmic axis. apart: {name: value}."""
    _, axes = figure(10.5, 3, columns=2)
    raster = np.zeros((len(kept), length))
    for number, index in enumerate(kept):
        raster[number, index] = 1
    axes[0].imshow(raster, cmap="Greys", aspect="auto", interpolation="nearest")
    axes[0].set(xlabel=f"position in the sequence (the picture: {first} to {last})", ylabel="layer")
    axes[0].set_title("black: processed")
    for y, (name, value) in enumerate(apart.items()):
        hatch = "////" if name.startswith("mistake") else ".." if "plain" in name else ""
        if value > 0:
            axes[1].barh(y, value, color="white" if hatch else DARK, edgecolor="black", hatch=hatch)
        axes[1].text(1.5 * max(value, floor), y, f"{value:.1g}" if value else "0: the same bits", va="center")
    axes[1].set(xscale="log", xlim=(floor, 300), yticks=range(len(apart)), yticklabels=list(apart))
    axes[1].invert_yaxis()
    axes[1].set_title("largest difference of a logit from ours")
    plt.show()


def positions_per_layer(full, visual, text):
    """Bars: positions of the plain model, and of LUVC, layer by layer."""
    _, ax = figure(9, 3)
    number = np.arange(len(visual))
    ax.bar(number - 0.2, [full] * len(visual), 0.4, color=LIGHT, label="plain: all positions")
    ax.bar(number + 0.2, visual, 0.4, bottom=text, color=DARK, label="LUVC: visual tokens")
    look = {"color": "white", "edgecolor": "black", "hatch": "////"}
    ax.bar(number + 0.2, [text] * len(visual), 0.4, label="LUVC: text", **look)
    ax.set(xlabel="decoder layer", ylabel="positions processed", xticks=number)
    ax.legend(loc="lower right", ncols=3, bbox_to_anchor=(1, 1))
    plt.show()


def trade_off(rows, names, default, plain):
    """Right answers and divergence over the share of token-layers left, one line for each name."""
    whole, axes = figure(10, 4.4, columns=2)
    for number, name in enumerate(names):
        curve = [row for row in rows if row["name"] == name]
        left = [row["left"] for row in curve]
        look = {"marker": "osvD^PX"[number], "linestyle": LINES[number], "linewidth": 1.3 if number else 3}
        look |= {"color": plt.get_cmap("viridis")(number / len(names)), "label": name, "markersize": 6}
        for ax, key in zip(axes, ("right", "kl"), strict=True):
            ax.plot(left, [row[key] for row in curve], **look)
    for ax, key in zip(axes, ("right", "kl"), strict=True):
        at = default["left"], default[key]
        ax.plot(*at, "o", markersize=17, fillstyle="none", color="black")
        ax.annotate("default", at, (12, -20), textcoords="offset points")
        ax.set(xlabel="visual token-layers left")
        percent(ax, [0.03, 0.06, 0.12, 0.25, 0.5])
    axes[0].axhline(plain, color="black", linestyle=":")
    axes[0].set(title="share of right answers (dotted: plain)")
    axes[1].set(title="divergence from the plain model, nats", yscale="log")
    whole.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plt.show()


def read_over_left(rows, names, plain, title):
    """One panel: share right over the share of token-layers left."""
    _, ax = figure(7, 3.2)
    for number, name in enumerate(names):
        curve = [row for row in rows if row["name"] == name]
        look = {
            "marker": "oD^"[number],
            "linestyle": LINES[number],
            "color": plt.get_cmap("viridis")(number / 3),
        }
        ax.plot([row["left"] for row in curve], [row["right"] for row in curve], label=name, **look)
    ax.axhline(plain, color="black", linestyle=":", label="plain, 100 % left")
    ax.set(xlabel="visual token-layers left", title=title, ylim=(-0.02, 1.05))
    percent(ax, [0.03, 0.06, 0.12, 0.25, 0.5])
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


def grouped_bars(groups, bars, title, form="{:.0%}", top=1.15):
    """Bars side by side. groups: names on the axis; bars: {name: one value per group}."""
    _, ax = figure(9, 3)
    looks = [
        {"color": "white", "hatch": "////"},
        {"color": DARK},
        {"color": LIGHT, "hatch": "xx"},
        {"color": MIDDLE},
    ]
    step, at = 0.8 / len(bars), np.arange(len(groups))
    for number, ((name, values), look) in enumerate(zip(bars.items(), looks[: len(bars)], strict=True)):
        x = at + step * (number - (len(bars) - 1) / 2)
        ax.bar(x, values, 0.9 * step, edgecolor="black", label=name, **look)
        for each, value in zip(x, values, strict=True):
            ax.text(each, value + 0.02 * top, form.format(value), ha="center", fontsize=8)
    ax.set(xticks=at, xticklabels=groups, ylim=(0, top), title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


def flops_over_text(texts, curves, title):
    """Share of the arithmetic over the length of the text. curves: {name: shares}."""
    _, ax = figure(8, 3.2)
    for number, (name, shares) in enumerate(curves.items()):
        look = {"color": (LIGHT, DARK, MIDDLE)[number], "linestyle": LINES[number], "marker": "sod"[number]}
        ax.plot(texts, shares, label=name, **look)
    ax.set(xscale="log", xticks=texts, xticklabels=texts, xlabel="positions of text")
    ax.set(ylabel="prefill FLOPs left", ylim=(0, 1.05), title=title)
    ax.minorticks_off()
    ax.legend(loc="lower right")
    plt.show()
