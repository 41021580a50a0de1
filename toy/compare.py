"""Near-lossless, measured: the toy with and without LUVC, and with other ways to choose the same number of
tokens.

    python toy/compare.py                 # the table of the README: 1,040 questions about 130 unseen scenes
    python toy/compare.py --scenes 20     # a quick look

Columns: share of the questions answered right, word for word; share of the answers equal to the plain
model's; KL divergence of the next word's distribution from the plain model's, in nats, averaged over the
words of the plain answer up to the first that differs; share of the visual tokens that the decoder layers
still process, of all visual tokens times all layers; visual tokens in the last layer.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from luvc import LUVC, LUVCConfig, load  # noqa: E402
from toy.make import draw_sample  # noqa: E402


def held_out(scenes, first=0):
    """Questions about unseen scenes: a list of dicts with scene, picture, kind, prompt and answer."""
    questions = []
    for seed in range(first, first + scenes):
        _, picture, asked = draw_sample(seed)
        for kind, _, prompt, answer in asked:
            item = {"scene": seed, "kind": kind, "prompt": prompt, "answer": answer}
            questions.append(item | {"picture": Image.fromarray(picture)})
    return questions


# ---- Other ways to choose. Those that prune go into LUVCConfig(score=...), those that merge into merge=... -----


def random_tokens(seed):
    """Any `keep` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def choose(x, keep):
        return (
            torch.rand(x.shape[:2], generator=generator)
            .topk(keep, dim=1)
            .indices.sort(dim=1)
            .values.to(x.device)
        )

    return choose


def even_tokens(x, keep):
    """`keep` tokens at equal distances."""
    position = torch.arange(keep, device=x.device)
    return ((2 * position + 1) * x.shape[1] // (2 * max(keep, 1))).expand(len(x), keep)


def pool_axis(x, size, keep, axis):
    """Average pooling with the contract of `merge_axis`: runs of equal length, whatever they show."""
    length = x.shape[axis]
    run = torch.arange(length, device=x.device) * keep // length
    parent = (run[:, None] if axis == 1 else run).expand(size.shape)
    shape = list(size.shape)
    shape[axis] = keep
    total = size.new_zeros(shape).scatter_add_(axis, parent, size)
    merged = x.new_zeros(*shape, x.shape[-1])
    merged.scatter_add_(axis, parent[..., None].expand_as(x), x * size[..., None].to(x.dtype))
    return merged / total[..., None].to(x.dtype), total, parent


QUARTER = {"llm_keep": 1.0, "vision_keep": 0.25}
METHODS = [
    ("plain", None),
    ("LUVC: OIM and SPU, the defaults", LUVCConfig()),
    ("LUVC without token sizes", LUVCConfig(sizes=False)),
    ("OIM alone", LUVCConfig(llm_keep=1.0)),
    ("OIM alone, to 25 %", LUVCConfig(**QUARTER)),
    ("average pooling, to 25 %", LUVCConfig(**QUARTER, merge=pool_axis)),
    ("OIM alone, to 25 %, without token sizes", LUVCConfig(**QUARTER, sizes=False)),
    ("average pooling, to 25 %, without token sizes", LUVCConfig(**QUARTER, sizes=False, merge=pool_axis)),
    ("SPU alone", LUVCConfig(vision_keep=1.0)),
    ("SPU alone, scored in a projection to 16 channels", LUVCConfig(vision_keep=1.0, channels=16)),
    ("SPU alone, without bringing tokens to norm 1", LUVCConfig(vision_keep=1.0, normalize=False)),
    ("SPU alone, reversed (keeps what is smooth)", LUVCConfig(vision_keep=1.0, score="smooth")),
    ("evenly spread in place of SPU", LUVCConfig(vision_keep=1.0, score=even_tokens)),
    *[
        (f"random in place of SPU, seed {s}", LUVCConfig(vision_keep=1.0, score=random_tokens(s)))
        for s in range(3)
    ],
    ("SPU alone, without token sizes", LUVCConfig(vision_keep=1.0, sizes=False)),
    ("evenly spread, without token sizes", LUVCConfig(vision_keep=1.0, score=even_tokens, sizes=False)),
    ("random, seed 0, without token sizes", LUVCConfig(vision_keep=1.0, score=random_tokens(0), sizes=False)),
]

# ---- Measuring -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(model, processor, questions, config, batch=16, words=3):
    """Greedy answers: (texts, token ids (Q, words), log-probabilities (Q, words, vocabulary), report of one batch)."""
    texts, tokens, logs, report = [], [], [], None
    for start in tqdm(range(0, len(questions), batch), file=sys.stderr, leave=False):
        part = questions[start : start + batch]
        prompts = [f"USER: <image>\n{q['prompt']} ASSISTANT:" for q in part]
        inputs = processor(
            images=[q["picture"] for q in part], text=prompts, padding=True, return_tensors="pt"
        )
        inputs = inputs.to(model.device, model.dtype)
        ask = {"max_new_tokens": words, "min_new_tokens": words, "do_sample": False, "eos_token_id": None}
        ask |= {"output_logits": True, "return_dict_in_generate": True}
        if config is None:
            out = model.generate(**inputs, **ask)
        else:
            with LUVC(model, config) as luvc:
                out = model.generate(**inputs, **ask)
            report = luvc.report()
        new = out.sequences[:, inputs["input_ids"].shape[1] :].cpu()
        ended = (new == processor.tokenizer.eos_token_id).cumsum(1) > 0  # what follows </s> is no answer
        new = new.masked_fill(ended, processor.tokenizer.eos_token_id)
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        tokens.append(new)
        logs.append(torch.stack(out.logits, 1).float().log_softmax(-1).cpu())
    return texts, torch.cat(tokens), torch.cat(logs), report


def compare(model, processor, questions, methods=METHODS):
    """One dict per method: name, accuracy, agreement, kl, token_layers_left, last_layer. The first method is plain."""
    rows, truth, plain = [], [q["answer"] for q in questions], None
    for name, config in methods:
        texts, tokens, logs, report = answers(model, processor, questions, config)
        if plain is None:
            plain = texts, tokens, logs
        same = (tokens == plain[1]).long().cumprod(1)  # (Q, words): 1 up to the first word that differs
        before = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1)
        comparable = (before == 1) & (plain[1] != processor.tokenizer.eos_token_id)
        kl = (plain[2].exp() * (plain[2] - logs)).sum(-1)[comparable].mean().item()
        left, last = 1.0, LUVC(model).layout.slots
        if report is not None:
            left = sum(report.visual_tokens) / (report.visual_full * len(report.visual_tokens))
            last = report.visual_tokens[-1] * LUVC(model).layout.slots // report.visual_full  # of one picture
        rows.append(
            {
                "name": name,
                "accuracy": sum(a == b for a, b in zip(texts, truth, strict=True)) / len(truth),
                "agreement": sum(a == b for a, b in zip(texts, plain[0], strict=True)) / len(truth),
                "kl": kl,
                "token_layers_left": left,
                "last_layer": last,
            }
        )
        hits = {}
        for question, text in zip(questions, texts, strict=True):
            hits.setdefault(question["kind"], []).append(text == question["answer"])
        rows[-1]["by_kind"] = {kind: sum(hit) / len(hit) for kind, hit in sorted(hits.items())}
        print(rows[-1], file=sys.stderr)  # the share right of every kind of question is seen here
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=130, help="of 8 questions each; default %(default)s")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, processor = load("toy", args.device, "float32", "sdpa")
    questions = held_out(args.scenes)
    print(f"{len(questions)} questions about {args.scenes} unseen scenes, {args.device}, float32\n")
    print("| | right | same answer | KL (nats) | visual token-layers left | in the last layer |")
    print("|---|---|---|---|---|---|")
    for row in compare(model, processor, questions):
        print(
            f"| {row['name']} | {row['accuracy']:.1%} | {row['agreement']:.1%} | {row['kl']:.4f} "
            f"| {row['token_layers_left']:.0%} | {row['last_layer']} |"
        )


if __name__ == "__main__":
    main()
