"""How fast: a model with and without LUVC, measured side by side.

    python luvc.py --bench                                      # the toy
    python luvc.py --bench --shape width-512 --tokens 576       # a shape with random weights, for a CPU
    python luvc.py --bench --shape qwen2.5-vl-7b --tokens 1024,4096,16384 --batch 8 --device cuda
    python luvc.py --bench --model FOLDER --json                # a checkpoint; one JSON object
    python luvc.py --bench --merge                              # merge_axis against global matching

(`python toy/bench.py ...` is the same.) Speed does not depend on what the weights are, so a *shape*, the sizes
of a well-known model, is filled with random weights on the device itself. Inputs are random pixels and text.

What is timed: whole prefills, plain and LUVC in turns, after two rounds to warm up; medians, with the smallest
and the largest value. On a GPU, CUDA events mark where the parts begin and end, so that the host never waits.

    encoder      from pixels to features: vision encoder and projector
    LLM          the decoder's forward call: from the embedded prompt to the last hidden states
    prefill      the whole call, up to the logits of the first new word
    own code     what LUVC adds around the model's own parts, see `time_prefill`
    per token    after the prefill, averaged over so many greedy steps with a growing KV cache
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from luvc import LUVC, LUVCConfig, OneLineParser, check_device, find_layout, fractions, load, merge_axis

DEFAULT, WARM = LUVCConfig(), 2  # WARM: rounds that are not counted

# ---- Models with random weights, and inputs for any model ------------------------------------------


def llm_sizes(width, layers, heads, kv_heads, inner, vocabulary, theta=1e6, tied=False, **rope):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary}
    rope = {"rope_type": "default", "rope_theta": theta, **rope}
    return sizes | {"tie_word_embeddings": tied, "max_position_embeddings": 32768, "rope_parameters": rope}


def clip_sizes(width, layers, heads):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "projection_dim": 768, "image_size": 336, "patch_size": 14}
    return {"model_type": "clip_vision_model", **sizes}


SECTIONS = {"mrope_section": [16, 24, 24]}
SECTIONS_3 = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
SHAPES = {  # name: (model_type, LLM, vision encoder where it differs from transformers' defaults)
    "width-512": ("llava", llm_sizes(512, 8, 8, 8, 1376, 32064, 1e4), clip_sizes(512, 8, 8)),
    "llava-1.5-7b": ("llava", llm_sizes(4096, 32, 32, 32, 11008, 32064, 1e4), clip_sizes(1024, 24, 16)),
    "qwen2.5-vl-3b": (
        "qwen2_5_vl",
        llm_sizes(2048, 36, 16, 2, 11008, 151936, tied=True, **SECTIONS),
        {"hidden_size": 1280, "out_hidden_size": 2048},
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        llm_sizes(3584, 28, 28, 4, 18944, 152064, **SECTIONS),
        {"hidden_size": 1280, "out_hidden_size": 3584},
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        llm_sizes(4096, 36, 32, 8, 12288, 151936, 5e6, **SECTIONS_3),
        {"out_hidden_size": 4096},
    ),
    "internvl3-2b": ("internvl", llm_sizes(1536, 28, 12, 2, 8960, 151674), {"attention_bias": True}),
}


def build(name, device, dtype, attn="sdpa", layers=None):
    """A model of a named shape, with random weights made on the device in that dtype; `layers` cuts it down.

    Raises:
        ValueError: no such shape, or an attention that is not there.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape {name} is not known; use one of {', '.join(SHAPES)}")
    kind, llm, vision = SHAPES[name]
    if layers is not None:
        blocks = max(layers, 3)  # LLaVA does not use the last block, and two merges need one each
        llm, vision = llm | {"num_hidden_layers": layers}, vision | {"num_hidden_layers": blocks}
        if kind.startswith("qwen"):
            vision |= {"fullatt_block_indexes": [blocks - 1], "deepstack_visual_indexes": [0]}
    tied = llm["tie_word_embeddings"]
    config = transformers.AutoConfig.for_model(
        kind, text_config=dict(llm), vision_config=dict(vision), tie_word_embeddings=tied
    )
    create = transformers.AutoModelForImageTextToText.from_config
    try:
        with torch.device(device):
            return create(config, dtype=dtype, attn_implementation=attn).eval()
    except ImportError as error:
        raise ValueError(f"--attn {attn}: {str(error).strip().splitlines()[0]}") from error


def make_inputs(model, tokens, batch=1, text=64):
    """(inputs of a prefill with about `tokens` visual tokens per sample, their true number).

    Where pictures have a fixed size there are as many as come nearest, else there is one, nearly square. Half
    of the text stands before the pictures and half behind.

    Raises:
        ValueError: a family whose inputs are not known here.
    """
    layout, vision, kind = find_layout(model), model.config.vision_config, model.config.model_type
    device, inputs = model.device, {}
    on_device = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    if layout.packed:  # Qwen: all patches of all pictures in one row, each flattened
        H = max(1, round(math.sqrt(tokens)))
        W = max(1, round(tokens / H))
        tokens, patch = H * W, 3 * vision.temporal_patch_size * vision.patch_size**2
        shape, grid = (batch * tokens * layout.unit**2, patch), [1, H * layout.unit, W * layout.unit]
        inputs["image_grid_thw"] = torch.tensor([grid] * batch, device=device)
    elif kind in ("llava", "internvl"):
        tiles = max(1, round(tokens / layout.slots))
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        tokens, shape = tiles * layout.slots, (batch * tiles, 3, side, side)
    else:
        raise ValueError(f"no inputs can be made up for {kind!r}; use a llava, internvl or Qwen VL model")
    inputs["pixel_values"] = torch.randn(shape, dtype=model.dtype, **on_device)
    words = torch.randint(5, min(1000, layout.decoder.config.vocab_size), (batch, text), **on_device)
    picture = torch.full((batch, tokens), layout.visual_ids[0], device=device)
    ids = torch.cat([words[:, : text // 2], picture, words[:, text // 2 :]], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if layout.packed:
        inputs["mm_token_type_ids"] = (ids == layout.visual_ids[0]).int()
    return inputs, tokens


# ---- Measuring -------------------------------------------------------------------------------------


class Clock:
    """Marks on the device's own time line: CUDA events where there are any, else the time of day."""

    def __init__(self, device):
        self.cuda, self.spans = torch.device(device).type == "cuda", defaultdict(list)

    def mark(self):
        if not self.cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin, end):
        """Milliseconds; waits for the device."""
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end)

    def ms(self, key):
        """Milliseconds of all calls that were watched under this key since `spans` was cleared."""
        return sum(self.between(*span) for span in self.spans[key])

    def watch(self, function, key):
        """`function`, timed."""

        def timed(*args, **kwargs):
            begin = self.mark()
            output = function(*args, **kwargs)
            self.spans[key].append((begin, self.mark()))
            return output

        return timed


@contextlib.contextmanager
def watched(model):
    """A Clock that times the parts of every forward call: encoder, llm, layers (of the LLM) and blocks.

    Layers and blocks are timed at `forward`, inside of the hooks and wrappers that LUVC puts on later: so
    these spans are the model's own work also while LUVC is attached.
    """
    layout, clock, begun = find_layout(model), Clock(model.device), []
    inside = [(layer, "forward", "layers") for layer in layout.decoder.layers]
    inside += [(m, "forward", "blocks") for m in (*layout.blocks, layout.projector, *layout.deepstack)]
    inside += [(layout.base, "get_image_features", "encoder")]
    before = layout.decoder.register_forward_pre_hook(lambda *_: begun.append(clock.mark()), prepend=True)
    after = layout.decoder.register_forward_hook(
        lambda *_: clock.spans["llm"].append((begun.pop(), clock.mark()))
    )
    for owner, name, key in inside:
        setattr(owner, name, clock.watch(getattr(owner, name), key))
    try:
        yield clock
    finally:
        before.remove()
        after.remove()
        for owner, name, _ in inside:
            delattr(owner, name)


def spread(values):
    """[median, smallest, largest]"""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


@torch.inference_mode()
def time_prefill(model, inputs, config=DEFAULT, repeats=9):
    """Whole prefills, plain and LUVC in turns.

    *Own code* is the time of encoder and LLM that is spent outside of the encoder's blocks, the projector and
    the decoder's layers, minus the same of the plain model (embedding, positions, masks, norms). It holds
    merges, signposts, the plan of positions, scores, gathers, scatters, masks, counting for the report, and on
    a GPU all waiting for the host in between. What `LUVCConfig.sizes` adds *inside* of the layers, channels of
    keys and values, is measured by turning it off: `sizes` is how much longer the layers take with it.

    Returns:
        a dict. `plain` and `luvc`: milliseconds of `encoder`, `llm` and `prefill`, each [median, smallest,
        largest]; `ratio`: plain / LUVC of the medians; `predicted`: that of the LLM by `Report.flops_left`,
        and `reached`, the fraction of it; `own` and `sizes`: milliseconds as above, `own_share` and
        `sizes_share` of LUVC's prefill; `kv_bytes`: of `plain` and `luvc`, after the prefill.
    """
    methods = {"plain": None, "luvc": LUVC(model, config)}
    if config.sizes:
        methods["unsized"] = LUVC(model, dataclasses.replace(config, sizes=False))
    runs = {name: [] for name in methods}
    with watched(model) as clock:
        for name in list(methods) * (WARM + repeats):
            with methods[name] or contextlib.nullcontext():
                clock.spans.clear()
                clock.watch(model, "prefill")(**inputs, use_cache=True, logits_to_keep=1)
                runs[name].append({k: clock.ms(k) for k in ("prefill", "encoder", "llm", "layers", "blocks")})
    plain, luvc, unsized = (runs.get(name, runs["luvc"])[WARM:] for name in ("plain", "luvc", "unsized"))
    report, parts = methods["luvc"].report(), ("encoder", "llm", "prefill")
    answer = {"plain": plain, "luvc": luvc}
    answer = {name: {part: spread(r[part] for r in run) for part in parts} for name, run in answer.items()}
    ratio = {part: answer["plain"][part][0] / (answer["luvc"][part][0] or 1) for part in parts}
    around = [[r["encoder"] + r["llm"] - r["layers"] - r["blocks"] for r in run] for run in (plain, luvc)]
    own = spread(with_it - without for without, with_it in zip(*around, strict=True))
    sizes = spread(b["layers"] - a["layers"] for a, b in zip(unsized, luvc, strict=True))
    return answer | {
        "ratio": ratio,
        "predicted": 1 / report.flops_left,
        "reached": ratio["llm"] * report.flops_left,
        "own": own,
        "own_share": own[0] / answer["luvc"]["prefill"][0],
        "sizes": sizes,
        "sizes_share": sizes[0] / answer["luvc"]["prefill"][0],
        "kv_bytes": {"plain": report.kv_bytes_full, "luvc": report.kv_bytes},
    }


@torch.inference_mode()
def time_decode(model, inputs, config=DEFAULT, counts=(128, 1024), repeats=3):
    """Milliseconds per decoded token, averaged over the first `counts` tokens; plain and LUVC in turns.

    Returns:
        a dict. `per_token`: count -> `plain` and `luvc`, each [median, smallest, largest]; `peak_bytes`: of
        prefill and decoding, weights included, `plain` and `luvc`; None without CUDA.
    """
    methods, clock, peak = {"plain": None, "luvc": LUVC(model, config)}, Clock(model.device), {}
    runs = {count: {name: [] for name in methods} for count in counts}
    for name in list(methods) * (1 + repeats):  # the first round warms up
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        with methods[name] or contextlib.nullcontext():
            out, begin = model(**inputs, use_cache=True, logits_to_keep=1), clock.mark()
            for step in range(1, max(counts) + 1):
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                if step in counts:
                    runs[step][name].append(clock.between(begin, clock.mark()) / step)
        if clock.cuda:
            peak[name] = torch.cuda.max_memory_allocated()
        del out, cache  # or the next run's peak would hold them
    per_token = {n: {name: spread(run[1:]) for name, run in both.items()} for n, both in runs.items()}
    return {"per_token": per_token, "peak_bytes": peak or None}


def break_even(points):
    """From how many visual tokens on prefills are faster, in words; of (tokens, ratio), never extrapolated."""
    points = sorted(points)
    if not points or points[-1][1] < 1:
        return f"not up to {points[-1][0]:,}, the most measured" if points else "not measured"
    for (low, before), (high, after) in reversed(list(itertools.pairwise(points))):
        if before < 1:
            return f"about {low + (high - low) * (1 - before) / (after - before):,.0f}, interpolated"
    return f"below {points[0][0]:,}, the fewest measured"


# ---- Merging alone ---------------------------------------------------------------------------------


def match_globally(x, size, keep):
    """What `merge_axis` is compared with: any two tokens may merge, however far apart they are.

    Of the tokens x (B, N, C), every second one looks for the most similar one among those in between, and the
    most similar pairs merge, weighted by `size` (B, N), until `keep` tokens are left. N / 2 x N / 2 comparisons.
    """
    merges, mass = x.shape[1] - keep, size[..., None].float()
    unit, weighted = nn.functional.normalize(x, dim=-1), x * mass
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    order = best.argsort(dim=1, descending=True)[..., None]
    leave, stay = order[:, :merges], order[:, merges:]
    goal = partner[..., None].gather(1, leave)

    def moved(values):  # those that stay, then those in between with what came to them
        channels, even, odd = values.shape[-1], values[:, ::2], values[:, 1::2]
        come = even.gather(1, leave.expand(-1, -1, channels))
        odd = odd.scatter_add(1, goal.expand(-1, -1, channels), come)
        return torch.cat([even.gather(1, stay.expand(-1, -1, channels)), odd], dim=1)

    mass = moved(mass)
    return (moved(weighted) / mass).to(x.dtype), mass[..., 0]


@torch.inference_mode()
def time_merge(device, dtype, repeats=9, channels=1024):
    """merge_axis on 64 x 64 and 128 x 128 tokens, 3/4 of each axis kept, and global matching of the former."""
    clock, generator = Clock(device), torch.Generator().manual_seed(0)
    grids = {n: torch.randn(1, n, n, channels, generator=generator).to(device, dtype) for n in (64, 128)}

    def merging(side):
        x, size = grids[side], torch.ones(1, side, side, device=device)
        for axis in (2, 1):
            x, size, _ = merge_axis(x, size, side * 3 // 4, axis)

    def matching():
        match_globally(grids[64].flatten(1, 2), torch.ones(1, 64 * 64, device=device), 48 * 48)

    jobs = {"merge_axis": lambda: merging(64), "matching": matching, "merge_axis_128": lambda: merging(128)}
    runs = {name: [] for name in jobs}
    for name in list(jobs) * (WARM + repeats):
        clock.spans.clear()
        clock.watch(jobs[name], name)()
        runs[name].append(clock.ms(name))
    times = {name: spread(run[WARM:]) for name, run in runs.items()}
    ours, theirs, large = (median for median, _, _ in times.values())
    return times | {"ratio": theirs / ours, "four_times_the_tokens": large / ours}


# ---- The command line ------------------------------------------------------------------------------


def header(device, dtype, attn):
    """What the numbers depend on, in one line."""
    info, name = Path("/proc/cpuinfo"), platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif info.exists() and "model name" in info.read_text():
        name = info.read_text().partition("model name")[2].partition("\n")[0].strip("\t :")
    return (
        f"{name}, {dtype}, {attn}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {datetime.date.today()}"
    )


def whole(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def wholes(text):
    return [whole(part) for part in text.split(",")]


def parse_arguments(argv):
    parser = OneLineParser(prog="luvc.py --bench", description=__doc__.splitlines()[0])
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="toy", help="checkpoint folder (default: the toy)")
    which.add_argument("--shape", help=f"random weights instead: {', '.join(SHAPES)}")
    which.add_argument("--merge", action="store_true", help="merge_axis against global matching; no model")
    add("--tokens", type=wholes, default=[576, 1152], metavar="N,...", help="visual, per sample")
    add("--batch", type=whole, default=1, metavar="N")
    add("--text", type=whole, default=64, metavar="N", help="text tokens (default %(default)s)")
    add("--new-tokens", type=wholes, default=[128, 1024], metavar="N,...", help="(default 128,1024)")
    add("--repeats", type=whole, default=9, metavar="N", help="prefills (default %(default)s)")
    add("--decode-repeats", type=whole, default=3, metavar="N", help="generations (default %(default)s)")
    add("--layers", type=whole, metavar="N", help="cut a shape to N layers, for a quick trial")
    add("--vision-keep", type=float, default=DEFAULT.vision_keep, metavar="F", help="as in LUVCConfig")
    add("--llm-keep", type=fractions, metavar="F|F,F,...", help="as in LUVCConfig")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16, on a CPU float32)")
    add("--attn", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    add("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    check_device(args.device)
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)  # events and memory are those of the current device
    if args.layers and not args.shape:
        raise ValueError("--layers cuts a --shape; a checkpoint keeps its layers")
    if args.text < 2:
        raise ValueError(
            f"--text {args.text} must be at least 2: one token before and one behind the picture"
        )
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.config = LUVCConfig(vision_keep=args.vision_keep, llm_keep=args.llm_keep)
    return args


def bench(args):
    """Everything about one model: the object that --json prints."""
    logging.disable_progress_bar()
    if args.shape:
        model = build(args.shape, args.device, getattr(torch, args.dtype), args.attn, args.layers)
    else:
        model, _ = load(args.model, args.device, args.dtype, args.attn)
    rows = []
    for wanted in sorted(args.tokens):
        row = {"wanted": wanted}
        try:
            inputs, row["tokens"] = make_inputs(model, wanted, args.batch, args.text)
            row |= time_prefill(model, inputs, args.config, args.repeats)
            row |= time_decode(model, inputs, args.config, args.new_tokens, args.decode_repeats)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        if "error" in row and torch.cuda.is_available():  # only now have the frames of the failure gone
            torch.cuda.empty_cache()
        print(json.dumps(row), file=sys.stderr)  # what was measured stays, whatever happens later
        rows.append(row)
    return {
        "header": header(args.device, args.dtype, args.attn),
        "model": args.shape or args.model,
        "layers": len(find_layout(model).decoder.layers),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "batch": args.batch,
        "text": args.text,
        "break_even": break_even(
            [(row["tokens"], row["ratio"]["prefill"]) for row in rows if "ratio" in row]
        ),
        "rows": rows,
    }


def milliseconds(values):
    return "{:.4g} ({:.4g} to {:.4g})".format(*values)


def times(both):
    plain, luvc = both["plain"], both["luvc"]
    return f"{milliseconds(plain)} -> {milliseconds(luvc)} ms, {plain[0] / (luvc[0] or 1):.2f}x"


def mebibytes(both):
    return f"{both['plain'] / 2**20:,.1f} -> {both['luvc'] / 2**20:,.1f} MiB"


def cells(row):
    """One column of the table: title -> what is printed there."""
    column = {}
    if "ratio" in row:
        for part, title in (("encoder", "encoder"), ("llm", "LLM"), ("prefill", "whole prefill")):
            column[title] = times({name: row[name][part] for name in ("plain", "luvc")})
        column["LLM, by its FLOPs"] = f"{row['predicted']:.2f}x, of which {row['reached']:.0%} is reached"
        for part, title in (("own", "own code"), ("sizes", "sizes, inside of the layers")):
            share = row[part + "_share"]
            column[title] = f"{milliseconds(row[part])} ms, {share:.1%} of the prefill"
        column["KV cache after the prefill"] = mebibytes(row["kv_bytes"])
    if "per_token" in row:
        for count, both in row["per_token"].items():
            column[f"per token, {count:,} new ones"] = times(both)
        peak = row["peak_bytes"]
        column["peak memory, weights included"] = mebibytes(peak) if peak else "not available"
    return column


def table(result):
    """The object that --json prints, as Markdown."""
    if "rows" not in result:
        lines = [result["header"], "", "| 1,024 channels, 3/4 of each axis kept | ms |", "|---|---|"]
        lines.append(f"| merge_axis, 64 x 64 | {milliseconds(result['merge_axis'])} |")
        theirs, large = milliseconds(result["matching"]), milliseconds(result["merge_axis_128"])
        lines.append(f"| global matching, 64 x 64 | {theirs}, {result['ratio']:.1f}x |")
        lines.append(f"| merge_axis, 128 x 128 | {large}, {result['four_times_the_tokens']:.2f}x |")
        return "\n".join(lines)
    columns = [cells(row) for row in result["rows"]]
    failed = [row.get("error", "") for row in result["rows"]]
    titles = dict.fromkeys(itertools.chain(*columns))  # in order, each once
    body = [[title, *(c.get(title, f) for c, f in zip(columns, failed, strict=True))] for title in titles]
    top = [
        "plain -> LUVC",
        *(f"{row.get('tokens', row['wanted']):,} visual tokens" for row in result["rows"]),
    ]
    weights = f"{result['layers']} layers, weights {result['weight_bytes'] / 2**20:,.0f} MiB"
    return "\n".join(
        [
            f"{result['model']}, {weights}, batch {result['batch']}, {result['text']} text tokens",
            result["header"] + "\n",
            *("| " + " | ".join(line) + " |" for line in (top, ["---"] * len(top), *body)),
            f"\nPrefills are faster from this number of visual tokens on: {result['break_even']}.",
        ]
    )


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one line about what was wrong."""
    try:
        args = parse_arguments(argv)
        if args.merge:
            result = {"header": header(args.device, args.dtype, "no attention")}
            result |= time_merge(args.device, getattr(torch, args.dtype), args.repeats)
        else:
            result = bench(args)
    except ValueError as error:
        print(f"luvc.py --bench: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    print(json.dumps(result) if args.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
