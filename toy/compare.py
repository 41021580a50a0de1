"""Near-lossless, measured: the toy with and without LUVC, and with simpler ways to the same number of tokens.

    python toy/compare.py               # the toy's table of docs/results.md: 160 unseen scenes and 80 pairs
    python toy/compare.py --scenes 20   # a quick look
    python toy/compare.py --growing     # where it hurts: more and more compression, by kind of question

right           share of the questions answered right, word for word
against LUVC    points more or less than LUVC with its defaults, on the same questions
count, number   right among the questions of that kind: how many, reading numbers; two pictures; the rest
same answer     share of the answers equal to the plain model's
KL              divergence of the next word's distribution from the plain model's, in nats, averaged over the
                words of the plain answer up to the first that differs, and over the questions
left            token-layers: of all image tokens times all layers of the LLM, what is processed

In brackets: 95 % intervals, from a bootstrap over scenes. All kinds of questions one by one go to stderr.

The tokens that are kept do not depend on the question. So a picture is read once, and its KV cache is copied
for each question about it. (Attention-ranked tokens do depend on it: there each question reads the picture
anew.)
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import CACHE, LUVC, LUVCConfig, low_pass  # noqa: E402
from toy.ask import load  # noqa: E402
from toy.make import draw_pair, draw_sample, prompt_of  # noqa: E402

# ---- Other ways to choose and to merge, with the contracts of `prune` and `merge` in LUVCConfig -----------


def even_tokens(x, keep):
    """`keep` tokens at equal distances."""
    position = torch.arange(keep, device=x.device)
    return ((2 * position + 1) * x.shape[1] // (2 * max(keep, 1))).expand(len(x), keep)


def random_tokens(seed):
    """Any `keep` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def choose(x, keep):
        lottery = torch.rand(x.shape[:2], generator=generator)
        return lottery.topk(keep, dim=1).indices.sort(dim=1).values.to(x.device)

    return choose


def smooth_tokens(x, keep, cutoff=0.5):
    """The filter the other way round: the tokens of which it passes most, each brought to norm 1 first."""
    passed = low_pass(nn.functional.normalize(x.float(), dim=-1), cutoff).norm(dim=-1)
    return passed.topk(keep, dim=1).indices.sort(dim=1).values


def pool_axis(x, size, keep, axis):
    """Average pooling with the contract of `merge_axis`: runs of equal length, whatever they show."""
    run = torch.arange(x.shape[axis], device=x.device) * keep // x.shape[axis]  # 0 0 0 1 1 2 ...
    shape = list(size.shape)
    shape[axis] = keep
    total = size.new_zeros(shape).index_add_(axis, run, size)
    weight = size[..., None].to(x.dtype)
    merged = x.new_zeros(*shape, x.shape[-1]).index_add_(axis, run, x * weight)
    row, column = (torch.arange(n, device=x.device) for n in x.shape[1:3])
    row, column = (run, column) if axis == 1 else (row, run)  # of the token that a token goes into
    parent = (row[:, None] * shape[2] + column).expand(size.shape)
    return merged / total[..., None].to(x.dtype), total, parent


class AttentionRanked:
    """FastV's rule (arXiv 2403.06764): keep what the last text token attends to most in the layer before,
    averaged over the heads.

    Attention weights have to be seen for that, so the model must run "eager" attention, which writes them
    out. A hook takes them from each layer. It knows where pictures are because the questions of a batch are
    equally long: nothing is padded, and a layer's positions are text and image tokens in the order of the
    prompt.
    """

    def __init__(self, model):
        self.layers, self.handles = model.get_decoder().layers, []
        self.weights, self.before = None, []  # before: text tokens in front of each picture

    def __enter__(self):
        self.handles = [layer.self_attn.register_forward_hook(self.look) for layer in self.layers]

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()

    def look(self, module, args, output):
        self.weights = output[1][:, :, -1].mean(1)  # (B, heads, K, K) -> (B, K)

    def __call__(self, x, keep):
        if keep == 0:
            return torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        N = x.shape[1]
        starts = [text + number * N for number, text in enumerate(self.before)]
        seen = torch.stack([self.weights[:, start : start + N] for start in starts], 1).flatten(0, 1)
        return seen.topk(keep, dim=1).indices.sort(dim=1).values


@dataclass
class Method:
    """One row of the table."""

    name: str
    config: LUVCConfig | None = None  # None: the plain model
    side: int = 24  # patches along a side of the picture; fewer: it is downsampled
    ranked: bool = False  # by attention


def falling(first, last, layers):
    """A schedule for `llm_keep`: evenly from first to last over all layers but the last, which keeps none."""
    return [*(first + (last - first) * n / (layers - 2) for n in range(layers - 1)), 0.0]


def methods_of(layers):
    """The rows of the table. Merging alone, and a smaller picture, keep a few more tokens than LUVC."""
    merger, third = {"llm_keep": 1.0, "vision_keep": 0.44}, falling(2 / 3, 1 / 3, layers)
    return [
        Method("plain"),
        Method("LUVC: OIM and SPU, the defaults (2x)", LUVCConfig()),
        Method("LUVC, 3x", LUVCConfig(vision_keep=0.5625, llm_keep=third)),
        Method("in place of the SPU: evenly spread", LUVCConfig(prune=even_tokens)),
        *[Method(f"- random, seed {seed}", LUVCConfig(prune=random_tokens(seed))) for seed in range(3)],
        Method("- the SPU reversed (keeps what is smooth)", LUVCConfig(prune=smooth_tokens)),
        Method("- ranked by the last word's attention", LUVCConfig(), ranked=True),
        Method("in place of the OIM: average pooling", LUVCConfig(merge=pool_axis)),
        Method("LUVC without sizes", LUVCConfig(sizes=False)),
        Method("SPU alone", LUVCConfig(vision_keep=1.0)),
        Method("OIM alone", LUVCConfig(llm_keep=1.0)),
        Method("OIM alone, to 16 x 16", LUVCConfig(**merger)),
        Method("average pooling alone, to 16 x 16", LUVCConfig(**merger, merge=pool_axis)),
        Method("a smaller picture, 16 x 16 patches", side=16),
    ]


def growing(layers):
    """The rows of `--growing`: the merger from off to a quarter, with the pruner off, at 2x, and at 3x."""
    schedules = {"off": 1.0, "0.8 to 0.4": None, "2/3 to 1/3": falling(2 / 3, 1 / 3, layers)}
    rows = methods_of(layers)[:2]
    for name, schedule in schedules.items():
        for keep in (1.0, 0.75, 0.5625, 0.36, 0.25):
            # Plain and the defaults stand there already.
            if (keep, schedule) not in ((1.0, 1.0), (0.75, None)):
                config = LUVCConfig(vision_keep=keep, llm_keep=schedule)
                rows.append(Method(f"vision_keep {keep}, llm_keep {name}", config))
    return rows


# ---- Questions and answers ---------------------------------------------------------------------------------


@dataclass
class Scene:
    """Questions about the same picture, or pair of pictures."""

    name: str
    pixels: torch.Tensor  # (pictures, 3, height, width)
    asked: list[tuple[str, str, str]]  # (kind, question, answer)


def held_out(processor, scenes, pairs, first=0):
    """Scenes that the toy was not trained on: `scenes` with one picture, `pairs` with two."""
    drawn = [(f"scene {seed}", *draw_sample(seed)[1:]) for seed in range(first, first + scenes)]
    drawn = [(name, [picture], asked) for name, picture, asked in drawn]
    drawn += [(f"pair {seed}", *draw_pair(seed)[1:]) for seed in range(first, first + pairs)]
    answer = []
    for name, pictures, asked in drawn:
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        answer.append(Scene(name, pixels, [(kind, question, text) for kind, _, question, text in asked]))
    return answer


WORDS = 3  # of an answer, </s> counted


def image_left(luvc, ids):
    """The share of the token-layers (image tokens times layers) that is left in a prefill of ids (B, S)."""
    image, kept = ids == luvc.model.config.image_token_id, luvc.kept
    left = sum(int(row[index].sum()) for layer in kept for row, index in zip(image, layer, strict=True))
    return left / (int(image.sum()) * len(kept))


def go_on(model, cache, read, rows, pad, words, hide=0):
    """Greedy words behind `rows` of ids (Q of them), each of which goes on from a row of a KV cache that has
    read `read` positions and then `hide` more, which are hidden: (tokens (Q, words), log-probabilities (Q,
    words, vocabulary))."""
    S = max(map(len, rows))
    ids = torch.tensor([[pad] * (S - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (S - len(row)) + [1] * len(row) for row in rows])
    position = (read + mask.cumsum(1) - 1) * mask
    mask = nn.functional.pad(nn.functional.pad(mask, (hide, 0)), (read, 0), value=1)
    ask = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "logits_to_keep": 1}
    out = model(**ask, **{CACHE: cache}, use_cache=True)
    return further(model, out, mask, position[:, -1:], words)


def further(model, out, mask, position, words):
    """Greedy words behind `out`: (tokens (Q, words), log-probabilities (Q, words, vocabulary))."""
    tokens, logs = [], []
    for step in range(words):
        logs.append(out.logits[:, -1].log_softmax(-1))
        tokens.append(out.logits[:, -1].argmax(-1))
        if step + 1 < words:
            mask, position = nn.functional.pad(mask, (0, 1), value=1), position + 1
            ask = {"input_ids": tokens[-1][:, None], "attention_mask": mask, "position_ids": position}
            out = model(**ask, **{CACHE: out[CACHE]}, use_cache=True)
    return torch.stack(tokens, 1), torch.stack(logs, 1)


def divergence(tokens, logs, other, other_logs, end):
    """KL divergence of other log-probabilities (Q, words, vocabulary) from `logs`, averaged over the words of
    `tokens` (Q, words) up to the first that differs, or the end: (Q,)."""
    same = (other == tokens).long().cumprod(1)
    before = nn.functional.pad(same[:, :-1], (1, 0), value=1) == 1
    ended = nn.functional.pad((tokens == end)[:, :-1], (1, 0))
    counts = before & ~ended
    return (logs.exp() * (logs - other_logs)).sum(-1).masked_fill(~counts, 0).sum(1) / counts.sum(1)


class Asker:
    """Greedy answers of a model to questions about scenes, and how sure it was."""

    def __init__(self, model, processor, method):
        self.tokenizer, self.method, self.model = processor.tokenizer, method, model
        self.image = model.config.image_token_id
        config, self.rank = method.config, AttentionRanked(model) if method.ranked else None
        if self.rank:  # the first layer keeps all: no layer before it attends to anything
            fractions = config.fractions(len(self.rank.layers))
            config = replace(config, prune=self.rank, llm_keep=(1.0, *fractions[1:]))
        self.luvc = LUVC(model, config) if config else None
        self.left = []  # token-layers left, one number per batch

    def encode(self, question, pictures):
        """A prompt as ids, in two parts: up to the last placeholder, and behind it."""
        ids = []
        for token in self.tokenizer(prompt_of(question, pictures))["input_ids"]:
            ids += [token] * (self.method.side**2 if token == self.image else 1)
        end = len(ids) - ids[::-1].index(self.image)
        return ids[:end], ids[end:]

    def read(self, scenes, rows):
        """Prefill of prompts, `rows` of ids, about the pictures of scenes."""
        pixels, ids = torch.cat([scene.pixels for scene in scenes]), torch.tensor(rows)
        if self.method.side != 24:
            side = self.method.side * self.model.config.vision_config.patch_size
            pixels = nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        smaller = {"interpolate_pos_encoding": True} if self.method.side != 24 else {}
        out = self.model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1, **smaller)
        if self.luvc:
            self.left.append((image_left(self.luvc, ids), len(scenes)))
        return out

    def ask(self, scenes):
        """All questions about scenes with equally many pictures, each picture read once."""
        pictures, word = len(scenes[0].pixels), self.tokenizer.convert_tokens_to_ids("what")
        prefix, _ = self.encode("", pictures)
        # No prompt may end with a picture: a word follows it, which the questions do not see.
        cache = self.read(scenes, [[*prefix, word]] * len(scenes))[CACHE]
        owner = torch.tensor([number for number, scene in enumerate(scenes) for _ in scene.asked])
        cache.batch_select_indices(owner)  # a copy for each question
        behind = [self.encode(question, pictures)[1] for scene in scenes for _, question, _ in scene.asked]
        return go_on(self.model, cache, len(prefix), behind, self.tokenizer.pad_token_id, WORDS, hide=1)

    def ask_each(self, scenes):
        """The same, each question with a prefill of its own."""
        pictures = len(scenes[0].pixels)
        asked = [
            (scene, *self.encode(question, pictures)) for scene in scenes for _, question, _ in scene.asked
        ]
        answer, length = [None] * len(asked), [len(behind) for _, _, behind in asked]
        for S in sorted(set(length)):
            which = [number for number, own in enumerate(length) if own == S]
            rows = [asked[number][1] + asked[number][2] for number in which]
            if self.rank:
                text = np.array(rows[0]) != self.image
                starts = np.flatnonzero(text[:-1] & ~text[1:]) + 1
                self.rank.before = [int(text[:start].sum()) for start in starts]
            out = self.read([asked[number][0] for number in which], rows)
            mask, position = torch.ones(len(rows), len(rows[0]), dtype=torch.long), len(rows[0]) - 1
            tokens, logs = further(self.model, out, mask, torch.full((len(rows), 1), position), WORDS)
            for row, number in enumerate(which):
                answer[number] = tokens[row], logs[row]
        return tuple(map(torch.stack, zip(*answer, strict=True)))

    @torch.inference_mode()
    def answers(self, scenes, batch=4, each=False):
        """(texts, tokens (Q, WORDS), log-probabilities (Q, WORDS, vocabulary)), question by question."""
        parts, groups = [], {}
        for scene in scenes:
            groups.setdefault(len(scene.pixels), []).append(scene)
        with self.luvc or contextlib.nullcontext(), self.rank or contextlib.nullcontext():
            for group in groups.values():
                for start in tqdm(range(0, len(group), batch), file=sys.stderr, leave=False):
                    ask = self.ask_each if each or self.rank else self.ask
                    parts.append(ask(group[start : start + batch]))
        tokens, logs = map(torch.cat, zip(*parts, strict=True))
        end = self.tokenizer.eos_token_id
        tokens = tokens.masked_fill((tokens == end).cumsum(1) > 0, end)  # what follows </s> is no answer
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts], tokens, logs

    def share_left(self):
        if self.luvc is None:
            return (self.method.side / 24) ** 2
        return sum(share * n for share, n in self.left) / sum(n for _, n in self.left)


# ---- Measuring ---------------------------------------------------------------------------------------------


def measure(model, processor, scenes, methods, eager=None, store=None, batch=4):
    """{name: {"right", "same", "kl": one number per question, "left": a share}}. The first method is plain.

    Args: scenes, those of `held_out`, by the number of pictures; eager, the model with eager attention;
        store, a JSON file where rows are kept, so that an interrupted run goes on.
    """
    rows = json.loads(store.read_text()) if store and store.exists() else {}
    truth = [text for scene in scenes for _, _, text in scene.asked]
    plain, end = None, processor.tokenizer.eos_token_id
    for method in methods:
        if method.name in rows and plain is not None:
            continue
        asker = Asker(eager if method.ranked else model, processor, method)
        texts, tokens, logs = asker.answers(scenes, batch)
        plain = (texts, tokens, logs) if plain is None else plain
        kl = divergence(*plain[1:], tokens, logs, end)
        rows[method.name] = {
            "right": [int(a == b) for a, b in zip(texts, truth, strict=True)],
            "same": [int(a == b) for a, b in zip(texts, plain[0], strict=True)],
            "kl": kl.tolist(),
            "left": asker.share_left(),
        }
        if store:
            store.write_text(json.dumps(rows))
        kinds = by_kind(scenes, rows[method.name]["right"])
        print(method.name, {k: f"{v:.1%}" for k, v in kinds.items()}, file=sys.stderr, flush=True)
    return rows


def by_kind(scenes, right):
    """{kind: share of the questions of that kind}, and "all"."""
    hits = {"all": right}
    kinds = [kind for scene in scenes for kind, _, _ in scene.asked]
    for kind, hit in zip(kinds, right, strict=True):
        hits.setdefault(kind, []).append(hit)
    return {kind: float(np.mean(hit)) for kind, hit in hits.items()}


def bootstrap(scenes, values, which=slice(None)):
    """(mean over the questions marked by `which`, lower and upper end of its 95 % interval): whole scenes are
    drawn with replacement."""
    owner = np.repeat(np.arange(len(scenes)), [len(scene.asked) for scene in scenes])[which]
    number = np.bincount(owner, minlength=len(scenes))
    total = np.bincount(owner, np.asarray(values, float)[which], minlength=len(scenes))
    draw = np.random.default_rng(0).integers(0, len(scenes), (2000, len(scenes)))
    means = total[draw].sum(1) / number[draw].sum(1)
    return total.sum() / number.sum(), *np.quantile(means, [0.025, 0.975])


def table(scenes, rows, luvc=None):
    """Markdown, one line per method; luvc: the name of what all others are held against, or the second."""
    luvc = luvc or [*rows][1]
    kinds = [kind for scene in scenes for kind, _, _ in scene.asked]
    columns = {kind: np.array([k == kind for k in kinds]) for kind in ("count", "number", "pair")}
    columns["the rest"] = ~np.any(list(columns.values()), axis=0)
    columns = {kind: which for kind, which in columns.items() if which.any()}
    lines = [["", "right", "against LUVC", *columns, "same answer", "KL", "left"]]
    lines.append(["---"] * len(lines[0]))
    for name, row in rows.items():
        right, best = np.array(row["right"]), np.array(rows[luvc]["right"])
        more = "{:+.1f} ({:+.1f} to {:+.1f})".format(*bootstrap(scenes, 100 * (right - best)))
        cells = [
            name,
            "{:.1%} ({:.1%} to {:.1%})".format(*bootstrap(scenes, right)),
            "" if name == luvc else more,
        ]
        cells += [f"{right[which].mean():.1%}" for which in columns.values()]
        cells += [
            f"{np.mean(row['same']):.1%}",
            "{:.4f} ({:.4f} to {:.4f})".format(*bootstrap(scenes, row["kl"])),
        ]
        lines.append([*cells, f"{row['left']:.0%}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def checkpoint(name):
    if name != "toy" and not (Path(name) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{name} is no checkpoint folder; it needs a config.json")
    return name


def parser(about):
    """What the command lines of this file and `curve.py` have in common."""
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--model", default="toy", type=checkpoint, help="checkpoint folder (default: the toy)")
    add("--first", type=int, default=0, help="seed of the first scene; LUVC was tuned on seeds from 5,000")
    add("--batch", type=int, default=4, help="scenes at a time (default %(default)s)")
    add("--store", type=Path, metavar="FILE", help="JSON: keeps what is measured, an interrupted run goes on")
    return parser


def main():
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--scenes", type=int, default=160, help="default %(default)s")
    arguments.add_argument("--pairs", type=int, help="scenes with two pictures; default: half as many")
    arguments.add_argument("--growing", action="store_true", help="more and more compression instead")
    args = arguments.parse_args()
    (model, processor), (eager, _) = (load(args.model, "cpu", "float32", a) for a in ("sdpa", "eager"))
    pairs = args.scenes // 2 if args.pairs is None else args.pairs
    scenes = held_out(processor, args.scenes, pairs, args.first)
    methods = (growing if args.growing else methods_of)(len(model.get_decoder().layers))
    rows = measure(model, processor, scenes, methods, eager, args.store, args.batch)
    rows = {method.name: rows[method.name] for method in methods}
    asked = sum(len(scene.asked) for scene in scenes)
    print(f"{asked:,} questions about {args.scenes} unseen pictures and {pairs} unseen pairs, CPU, float32\n")
    print(table(scenes, rows))


if __name__ == "__main__":
    main()
