"""The curve: how right the toy's answers stay as fewer tokens are left, for LUVC and with one part replaced.

    pip install matplotlib
    python toy/curve.py                 # toy/curve.png: 96 unseen scenes and 48 unseen pairs, seeds from 300
    python toy/curve.py --store FILE    # keeps what is measured; a second call only draws

A point is one setting, and all are measured on the same questions. In a setting the encoder keeps a share of
the grid (`vision_keep`), and the LLM a share of that, which falls evenly to its half at the last layer but
one (`llm_keep`). The three lines share the settings: LUVC as it is, with evenly spread tokens in place of its
pruner's choice, and with average pooling in place of its merger. Bars and brackets: 95 % intervals, by a
bootstrap over scenes.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import LUVCConfig  # noqa: E402
from toy import compare  # noqa: E402
from toy.ask import load  # noqa: E402
from toy.compare import Method, bootstrap, falling  # noqa: E402

# vision_keep, and llm_keep in the first layer. The second one is the default, 2x, the third 3x.
SETTINGS = ((0.9, 0.9), (0.75, 0.8), (0.5625, 2 / 3), (0.42, 0.5), (0.3, 0.4), (0.2, 0.3))
LINES = {  # name: what is replaced, and looks
    "LUVC": ({}, {"color": "#c1272d", "marker": "o", "linewidth": 2.4}),
    "evenly spread tokens": (
        {"prune": compare.even_tokens},
        {"color": "#0072b2", "marker": "s", "linestyle": "--"},
    ),
    "average pooling": ({"merge": compare.pool_axis}, {"color": "#009e73", "marker": "v", "linestyle": ":"}),
}


def methods(layers):
    """{name of a line: its methods, from many tokens to few}."""
    points = {name: [] for name in LINES}
    for name, (replaced, _) in LINES.items():
        for vision_keep, first in SETTINGS:
            config = LUVCConfig(vision_keep, llm_keep=falling(first, first / 2, layers), **replaced)
            points[name].append(Method(f"{name}, {vision_keep}", config))
    return points


def shares(scenes, right):
    """{which questions: (% right, the ends of its interval)}."""
    number = np.array([kind == "number" for scene in scenes for kind, _, _ in scene.asked])
    some = {"all questions": slice(None), "reading numbers": number}
    return {title: bootstrap(scenes, 100 * np.array(right), which) for title, which in some.items()}


def draw(scenes, rows, points, where):
    """Two panels over the share of token-layers left: all questions, and those that read a number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained")
    for title, axis in zip(("all questions", "reading numbers"), axes, strict=True):
        for name, (_, looks) in LINES.items():
            line = [rows[method.name] for method in points[name]]
            mean, low, high = np.array([shares(scenes, row["right"])[title] for row in line]).T
            x, bars = [100 * row["left"] for row in line], np.clip([mean - low, high - mean], 0, None)
            axis.errorbar(x, mean, bars, **{"linewidth": 1.6} | looks, markersize=5, capsize=3, label=name)
        plain, *_ = shares(scenes, rows["plain"]["right"])[title]
        axis.axhline(plain, color="black", linewidth=1, linestyle=(0, (1, 3)), label="plain, at 100 %")
        for which, name in ((1, "2x"), (2, "3x")):
            x = 100 * rows[points["LUVC"][which].name]["left"]
            axis.annotate(name, (x, 1.01), xycoords=("data", "axes fraction"), ha="center", color="#c1272d")
        axis.set_title(f"{title}: answers right, %", fontsize=11, pad=18)
        axis.set(xlabel="token-layers left in the LLM, %", xlim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, handlelength=3.5)
    figure.savefig(where, dpi=115)


def main():
    arguments = compare.parser(__doc__.splitlines()[0])
    arguments.set_defaults(first=300)
    arguments.add_argument("--scenes", type=int, default=96, help="default %(default)s")
    arguments.add_argument("--pairs", type=int, default=48, help="default %(default)s")
    args = arguments.parse_args()
    model, processor = load(args.model, "cpu", "float32")
    scenes = compare.held_out(processor, args.scenes, args.pairs, args.first)
    points = methods(len(model.get_decoder().layers))
    every = [Method("plain"), *(method for line in points.values() for method in line)]
    rows = compare.measure(model, processor, scenes, every, store=args.store, batch=args.batch)
    print("| line, vision_keep | left | all questions right | numbers read | KL |\n|---|---|---|---|---|")
    for method in every:
        row = rows[method.name]
        cells = [f"{row['left']:.0%}"]
        cells += ["{:.1f} % ({:.1f} to {:.1f})".format(*s) for s in shares(scenes, row["right"]).values()]
        print("|", " | ".join([method.name, *cells, f"{np.mean(row['kl']):.4f}"]), "|")
    draw(scenes, rows, points, HERE / "curve.png")


if __name__ == "__main__":
    main()
