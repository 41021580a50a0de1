"""The curve: how right the toy's answers stay as fewer tokens are left, for LUVC and for simpler ways.

    python toy/curve.py                   # writes toy/curve.png: 96 unseen scenes and 48 unseen pairs, seeds from 300
    python toy/curve.py --store FILE      # keeps what is measured; a second call only draws

A point is one setting, all on the same questions. LUVC gets smaller in two ways: it merges more (`vision_keep` falls,
`llm_keep` stays at its default), or it prunes more: behind the merger at its default, layer l of L keeps
(1 - l / (L - 1)) ** p of the tokens; p = 1 is linear. Random and evenly spread tokens follow the latter.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import LUVCConfig, load, spectral_prune  # noqa: E402
from toy.compare import Method, by_kind, even_tokens, held_out, measure, parser, pool_axis, random_tokens  # noqa: E402

POWERS = (0.1, 0.4, 1, 1.7, 3, 6, 20)  # with the merger at its default 51, 40, 28, 21, 15, 10, 5 % are left
KEEPS = (0.6, 0.45, 0.3, 0.2, 0.14, 0.09, 0.06)  # merging alone
VISION_KEEPS = (1.0, 0.75, 0.5625, 0.42, 0.3, 0.2, 0.12)  # both units: half of that is left
SIDES = (18, 16, 13, 11, 9, 7, 6)
LINES = {  # name: colour, marker and line
    "LUVC, merging more": ("#c1272d", "o", "--"),
    "LUVC, pruning more": ("#c1272d", "o", "-"),
    "evenly spread in place of the SPU": ("#0072b2", "s", "-"),
    "random in place of the SPU": ("#56b4e9", "^", "-"),
    "OIM alone": ("#e69f00", "D", "-"),
    "average pooling alone": ("#009e73", "v", "-"),
    "a smaller picture": ("#666666", "X", "-"),
}


def methods(layers):
    """{name of a line: its methods, from many tokens to few}."""
    points = {name: [] for name in LINES}
    choosers = spectral_prune, even_tokens, random_tokens(0)
    for name, prune in zip(list(LINES)[1:4], choosers, strict=True):
        for power in POWERS:
            keep = [(1 - layer / (layers - 1)) ** power for layer in range(layers)]
            points[name].append(Method(f"{name}, p = {power}", LUVCConfig(llm_keep=keep, prune=prune)))
    for keep in VISION_KEEPS:
        points["LUVC, merging more"].append(Method(f"LUVC, vision_keep {keep}", LUVCConfig(vision_keep=keep)))
    for keep in KEEPS:
        config = {"vision_keep": keep, "llm_keep": 1.0}
        points["OIM alone"].append(Method(f"OIM to {keep}", LUVCConfig(**config)))
        pooled = Method(f"pooling to {keep}", LUVCConfig(**config, merge=pool_axis))
        points["average pooling alone"].append(pooled)
    points["a smaller picture"] = [Method(f"{side} x {side} patches", side=side) for side in SIDES]
    return points


def draw(scenes, rows, points, where):
    """Three panels over the share of token-layers left: all answers, numbers read, divergence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain = by_kind(scenes, rows["plain"]["right"])
    panels = [("all questions: answers right, %", "all"), ("reading numbers: answers right, %", "number")]
    panels.append(("divergence from the plain model, nats", None))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for (title, kind), axis in zip(panels, axes, strict=True):
        for name, (colour, marker, line) in LINES.items():
            row = [rows[method.name] for method in points[name]]
            x = [100 * r["left"] for r in row]
            y = [100 * by_kind(scenes, r["right"])[kind] if kind else np.mean(r["kl"]) for r in row]
            width = 2.4 if name.startswith("LUVC") else 1.4
            style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": line}
            axis.plot(x, y, **style, linewidth=width, label=name)
        if kind:
            axis.axhline(
                100 * plain[kind], color="black", linewidth=1, linestyle=":", label="plain, 100 % left"
            )
        else:
            axis.set_yscale("log")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("visual token-layers left in the LLM, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        handlelength=3.5,
    )
    figure.savefig(where, dpi=110)


def main():
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(first=300)
    arguments.add_argument("--scenes", type=int, default=96, help="default %(default)s")
    arguments.add_argument("--pairs", type=int, default=48, help="default %(default)s")
    arguments.add_argument("--out", type=Path, default=HERE / "curve.png", help="(default: toy/curve.png)")
    args = arguments.parse_args()
    model, processor = load(args.model, "cpu", "float32", "sdpa")
    scenes = held_out(processor, args.scenes, args.pairs, args.first)
    points = methods(len(model.get_decoder().layers))
    every = [Method("plain"), *(method for line in points.values() for method in line)]
    rows = measure(model, processor, scenes, every, store=args.store, batch=args.batch)
    for name, line in points.items():
        print(name)
        for method in line:
            row, kinds = rows[method.name], by_kind(scenes, rows[method.name]["right"])
            right = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds.items())
            print(f"  {row['left']:6.1%} left   KL {np.mean(row['kl']):.4f}   {right}")
    draw(scenes, rows, points, args.out)


if __name__ == "__main__":
    main()
