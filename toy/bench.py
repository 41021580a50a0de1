"""How fast: a model with and without LUVC, measured side by side.

    python toy/bench.py                                      # the toy
    python toy/bench.py --shape width-512 --tokens 576       # a shape with random weights, for a CPU
    python toy/bench.py --shape qwen2.5-vl-7b --tokens 1024,4096,16384 --batch 8 --flash     # for a GPU
    python toy/bench.py --model FOLDER --json                # a checkpoint; one JSON object
    python toy/bench.py --attention --shape llava-1.5-7b --tokens 1024,4096 --flash          # what sizes cost
    python toy/bench.py --merge --tokens 1024,4096,16384     # merge_axis against global matching

Speed does not depend on what the weights are, so a *shape*, the sizes of a well-known model, is filled with
random weights on the device itself. Inputs are random pixels and text. Whatever is compared runs in turns,
after two rounds to warm up; printed are medians, with the smallest and the largest value. On a GPU, CUDA
events mark where the parts begin and end, so that the host never waits.

    encoder      from pixels to features: vision encoder and projector
    LLM          the decoder's forward call: from the embedded prompt to the last hidden states
    prefill      the whole call, up to the logits of the first new word
    own code     what LUVC adds around the model's own blocks and layers, see `time_prefill`
    operations   of torch, in a prefill: calls of a kernel or of a view, whatever their sizes
    per token    after the prefill, averaged over so many greedy steps with a growing KV cache
"""

import argparse
import contextlib
import datetime
import functools
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from luvc import CACHE, EXTRA, LUVC, LUVCConfig, family_of, merge_axis
from toy.ask import flops_left, fractions, in_one_line, kv_bytes, load

DEFAULT, WARM = LUVCConfig(), 2  # WARM: rounds that are not counted

# ---- Models with random weights, and inputs for any model --------------------------------------------------


def llm_sizes(width, layers, heads, kv_heads, inner, vocabulary, theta=1e6, tied=False, **rope):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary}
    rope = {"rope_type": "default", "rope_theta": theta, **rope}
    return sizes | {"tie_word_embeddings": tied, "max_position_embeddings": 32768, "rope_parameters": rope}


def clip_sizes(width, layers, heads):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "projection_dim": 768, "image_size": 336, "patch_size": 14}
    return {"model_type": "clip_vision_model", **sizes}


MROPE = {"mrope_section": [16, 24, 24]}
MROPE_3 = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
QWEN_3B = llm_sizes(2048, 36, 16, 2, 11008, 151936, tied=True, **MROPE)
QWEN_7B = llm_sizes(3584, 28, 28, 4, 18944, 152064, **MROPE)
QWEN3_8B = llm_sizes(4096, 36, 32, 8, 12288, 151936, 5e6, **MROPE_3)
SHAPES = {  # name: (model_type, LLM, vision encoder where it differs from transformers' defaults)
    "width-512": ("llava", llm_sizes(512, 8, 8, 8, 1376, 32064, 1e4), clip_sizes(512, 8, 8)),
    "llava-1.5-7b": ("llava", llm_sizes(4096, 32, 32, 32, 11008, 32064, 1e4), clip_sizes(1024, 24, 16)),
    "qwen2.5-vl-3b": ("qwen2_5_vl", QWEN_3B, {"hidden_size": 1280, "out_hidden_size": 2048}),
    "qwen2.5-vl-7b": ("qwen2_5_vl", QWEN_7B, {"hidden_size": 1280, "out_hidden_size": 3584}),
    "qwen3-vl-8b": ("qwen3_vl", QWEN3_8B, {"out_hidden_size": 4096}),
    "internvl3-2b": ("internvl", llm_sizes(1536, 28, 12, 2, 8960, 151674), {"attention_bias": True}),
}


def build(name, device, dtype, attn="sdpa", layers=None):
    """A model of a named shape, with random weights made on the device in that dtype; `layers` cuts it down.

    Raises: ValueError for an attention that is not there.
    """
    kind, llm, vision = SHAPES[name]
    if layers is not None:
        blocks = max(layers, 4)  # LLaVA does not use the last block, and the merger needs three
        llm, vision = llm | {"num_hidden_layers": layers}, vision | {"num_hidden_layers": blocks}
        if kind.startswith("qwen"):
            vision |= {
                "depth": blocks,
                "fullatt_block_indexes": [blocks - 1],
                "deepstack_visual_indexes": [0],
            }
    parts = {"text_config": dict(llm), "vision_config": dict(vision)}
    parts["tie_word_embeddings"] = llm["tie_word_embeddings"]
    config = transformers.AutoConfig.for_model(kind, **parts)
    create = transformers.AutoModelForImageTextToText.from_config
    try:
        with torch.device(device):
            return create(config, dtype=dtype, attn_implementation=attn).eval()
    except ImportError as error:
        raise ValueError(f"--attn {attn}: {error}") from error


def make_inputs(model, tokens, batch=1, text=64):
    """(inputs of a prefill with about `tokens` image tokens per sample, their true number).

    Where pictures have a fixed size there are as many as come nearest, else there is one, nearly square. Half
    of the text stands before the pictures and half behind.

    Raises: ValueError for a family whose inputs are not known here.
    """
    family, vision, kind = family_of(model), model.config.vision_config, model.config.model_type
    device, inputs, placeholder = model.device, {}, model.config.image_token_id
    on_device = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    if family.patch_size is None:  # Qwen: all patches of all pictures in one row, each flattened
        H = max(1, round(math.sqrt(tokens)))
        W = max(1, round(tokens / H))
        tokens, patch = H * W, 3 * vision.temporal_patch_size * vision.patch_size**2
        side = family.per_side  # patches along a side of an image token
        shape, grid = (batch * tokens * side**2, patch), [1, H * side, W * side]
        inputs["image_grid_thw"] = torch.tensor([grid] * batch, device=device)
    elif kind in ("llava", "internvl"):
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        each = family.prefix_tokens + (side // family.patch_size[0] // family.per_side) ** 2
        tiles = max(1, round(tokens / each))
        tokens, shape = tiles * each, (batch * tiles, 3, side, side)
    else:
        raise ValueError(f"no inputs can be made up for {kind!r}; use a llava, internvl or Qwen VL model")
    inputs["pixel_values"] = torch.randn(shape, dtype=model.dtype, **on_device)
    words = torch.randint(5, min(1000, model.get_decoder().config.vocab_size), (batch, text), **on_device)
    picture = torch.full((batch, tokens), placeholder, device=device)
    ids = torch.cat([words[:, : text // 2], picture, words[:, text // 2 :]], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.patch_size is None:
        inputs["mm_token_type_ids"] = (ids == placeholder).int()
    return inputs, tokens


# ---- Measuring a model -------------------------------------------------------------------------------------


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

    def watch(self, function, key):
        """`function`, timed."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            begin = self.mark()
            output = function(*args, **kwargs)
            self.spans[key].append((begin, self.mark()))
            return output

        return timed

    def read(self):
        """Milliseconds per key, of all calls since the last time; 0 for a key that had none."""
        total = {key: sum(self.between(*span) for span in spans) for key, spans in self.spans.items()}
        self.spans.clear()
        return defaultdict(float, total)


@contextlib.contextmanager
def watched(model):
    """A Clock that times the parts of every forward call: encoder, llm, layers (of the LLM) and blocks.

    Layers and blocks are timed at `forward`, inside of the hooks and wrappers that LUVC puts on later: so
    these spans are the model's own work also while LUVC is attached.
    """
    family, decoder, clock, begun = family_of(model), model.get_decoder(), Clock(model.device), []
    inside = [(layer, "forward", "layers") for layer in decoder.layers]
    inside += [(m, "forward", "blocks") for m in (*family.blocks, *family.projectors)]
    inside += [(model.base_model, "get_image_features", "encoder")]
    before = decoder.register_forward_pre_hook(lambda *_: begun.append(clock.mark()), prepend=True)
    after = decoder.register_forward_hook(lambda *_: clock.spans["llm"].append((begun.pop(), clock.mark())))
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


class Operations(TorchDispatchMode):
    """`with Operations() as counted: ...`: counted.number operations of torch."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += 1
        return operation(*args, **(kwargs or {}))


@torch.inference_mode()
def time_prefill(model, inputs, config=DEFAULT, repeats=9):
    """Whole prefills, plain and LUVC in turns.

    *Own code* is the time of encoder and LLM that is spent outside of the encoder's blocks, the projector and
    the decoder's layers, minus the same of the plain model (embedding, positions, masks, norms). In the
    encoder that is merging, in the LLM the plan of positions, scores, gathers, scatters and masks; on a GPU
    both hold all waiting for the host. Not in it: the channels for sizes, inside of attention
    (`--attention`).

    Returns:
        a dict. `plain` and `luvc`: milliseconds of `encoder`, `llm` and `prefill`, each [median, smallest,
        largest]; `ratio`: plain / LUVC of the medians; `predicted`: that of the LLM by `flops_left`,
        and `reached`, the fraction of it; `own`, `own_encoder` and `own_llm`: milliseconds as above;
        `kv_bytes` after a prefill, and `operations` in it: of `plain` and `luvc`.
    Raises: ValueError for a config that switches everything off.
    """
    methods, parts = {"plain": None, "luvc": LUVC(model, config)}, ("encoder", "llm", "prefill")
    runs, stored, operations = {name: [] for name in methods}, {}, {}
    prefill = functools.partial(model, **inputs, use_cache=True, logits_to_keep=1)
    with watched(model) as clock:
        for name in list(methods) * (WARM + repeats):
            with methods[name] or contextlib.nullcontext():
                clock.watch(prefill, "prefill")()
                runs[name].append(clock.read())
    for name, method in methods.items():
        with method or contextlib.nullcontext(), Operations() as counted:
            stored[name] = kv_bytes(prefill()[CACHE])
        operations[name] = counted.number
    plain, luvc = (run[WARM:] for run in runs.values())
    answer, left = {"plain": plain, "luvc": luvc}, flops_left(methods["luvc"], inputs)
    answer = {name: {part: spread(r[part] for r in run) for part in parts} for name, run in answer.items()}
    ratio = {part: answer["plain"][part][0] / (answer["luvc"][part][0] or 1) for part in parts}
    answer |= {"ratio": ratio, "predicted": 1 / left, "reached": ratio["llm"] * left}
    encoder, llm = (
        [(b[whole] - b[part]) - (a[whole] - a[part]) for a, b in zip(plain, luvc, strict=True)]
        for whole, part in (("encoder", "blocks"), ("llm", "layers"))
    )
    answer |= {"own": spread(map(sum, zip(encoder, llm, strict=True)))}
    answer |= {"own_encoder": spread(encoder), "own_llm": spread(llm)}
    return answer | {"kv_bytes": stored, "operations": operations}


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
                ids, cache = out.logits[:, -1:].argmax(-1), {CACHE: out[CACHE]}
                out = model(input_ids=ids, **cache, use_cache=True)
                if step in counts:
                    runs[step][name].append(clock.between(begin, clock.mark()) / step)
        if clock.cuda:
            peak[name] = torch.cuda.max_memory_allocated()
        del out, cache  # or the next run's peak would hold them
    per_token = {n: {name: spread(run[1:]) for name, run in both.items()} for n, both in runs.items()}
    return {"per_token": per_token, "peak_bytes": peak or None}


# ---- Parts alone -------------------------------------------------------------------------------------------


@torch.inference_mode()
def in_turns(jobs, device, repeats):
    """{name: [median, smallest, largest] milliseconds} of functions without arguments."""
    clock, runs = Clock(device), {name: [] for name in jobs}
    for name in list(jobs) * (WARM + repeats):
        clock.watch(jobs[name], name)()
        runs[name].append(clock.read()[name])
    return {name: spread(run[WARM:]) for name, run in runs.items()}


def match_globally(x, size, keep):
    """What `merge_axis` is compared with: any two tokens may merge, however far apart they are.

    Of the tokens x (B, N, C), every second one looks for the most similar one among those in between, and the
    most similar pairs merge, weighted by `size` (B, N), until `keep` tokens are left. N / 2 x N / 2
    comparisons.
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


def time_merge(tokens, device, dtype, repeats=9, channels=1024):
    """Of a square grid of about so many tokens, keep 3/4 of each axis: `merge_axis` and global matching."""
    side = max(2, round(math.sqrt(tokens)))
    keep, generator = max(1, side * 3 // 4), torch.Generator().manual_seed(0)
    x = torch.randn(1, side, side, channels, generator=generator).to(device, dtype)
    size = torch.ones(1, side, side, device=device)

    def merging():
        merged, mass, _ = merge_axis(x, size, keep, axis=2)
        merge_axis(merged, mass, keep, axis=1)

    flat, mass = x.flatten(1, 2), size.flatten(1)
    jobs = {"merge_axis": merging, "matching": lambda: match_globally(flat, mass, max(keep**2, side**2 // 2))}
    times = in_turns(jobs, device, repeats)
    return times | {"tokens": side**2, "ratio": times["matching"][0] / times["merge_axis"][0]}


def time_attention(tokens, batch, heads, channels, device, dtype, repeats=9):
    """What a weight for each key costs: causal attention of one layer, three ways.

    `unsized`: no weights. `channels`: the weight rides in `EXTRA` more channels, as in LUVC; `padding` is the
    time to make them, of queries, keys and values. `mask`: the weight and what causality hides are an
    additive mask, which torch's flash kernel does not take: on a GPU that is the memory-efficient one.

    Returns: a dict of these, each [median, smallest, largest]; `error`, the largest difference of the last
        two from float64, and `mask_bytes`.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, channels, generator=generator) for _ in range(3))
    q, k, v = (t.to(device, dtype) for t in (q, k, v))
    bias = torch.randint(1, 9, (batch, tokens), generator=generator).float().log().to(device, dtype)
    scale, attend, pad = channels**-0.5, nn.functional.scaled_dot_product_attention, nn.functional.pad
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
    mask = bias[:, None, None].expand(-1, 1, tokens, -1).masked_fill(hidden, -math.inf)

    def padded():
        key = pad(k, (0, EXTRA))
        key[..., -EXTRA] = bias[:, None]
        return pad(q, (0, EXTRA), value=1 / scale), key, pad(v, (0, EXTRA))

    wide, with_mask = padded(), [] if q.is_cuda else [SDPBackend.FLASH_ATTENTION]
    with_mask.append(SDPBackend.EFFICIENT_ATTENTION)

    def masked():
        with sdpa_kernel(with_mask):
            return attend(q, k, v, attn_mask=mask, scale=scale)

    def sized():
        return attend(*wide, is_causal=True, scale=scale)

    jobs = {"unsized": lambda: attend(q, k, v, is_causal=True, scale=scale), "channels": sized}
    times = in_turns(jobs | {"padding": padded, "mask": masked}, device, repeats)
    rows = slice(-16, None)  # in float64, enough to see that both compute the same
    logits = q[:1, :, rows].double() @ k[:1].double().mT * scale + mask[:1, :, rows].double()
    right, error = logits.softmax(-1) @ v[:1].double(), {}
    with torch.inference_mode():
        for name, job in (("channels", sized), ("mask", masked)):
            error[name] = (job()[:1, :, rows, :channels] - right).abs().max().item()
    return times | {"tokens": tokens, "error": error, "mask_bytes": mask.nbytes}


# ---- What is printed ---------------------------------------------------------------------------------------


def header(args):
    """What the numbers depend on, in one line."""
    info, name = Path("/proc/cpuinfo"), platform.machine()
    if torch.device(args.device).type == "cuda":
        name = torch.cuda.get_device_name(args.device)
    elif info.exists() and "model name" in info.read_text():
        name = info.read_text().partition("model name")[2].partition("\n")[0].strip("\t :")
    kernel = f"{args.attn}, flash kernel forced" if args.flash else args.attn
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    threads = f"{torch.get_num_threads()} threads, {datetime.date.today()}"
    return f"{name}, {args.dtype}, {kernel}, {versions}, {threads}"


def ms(values):
    return "{:.4g} ({:.4g} to {:.4g})".format(*values)


def both(plain, luvc):
    return f"{ms(plain)} -> {ms(luvc)} ms, {plain[0] / (luvc[0] or 1):.2f}x"


def mebibytes(both):
    return f"{both['plain'] / 2**20:,.1f} -> {both['luvc'] / 2**20:,.1f} MiB"


def cells(row):
    """One column of the table: title -> what is printed there."""
    cell = {}
    if "merge_axis" in row:
        cell |= {"merge_axis, ms": ms(row["merge_axis"])}
        cell |= {"global matching, ms": f"{ms(row['matching'])}, {row['ratio']:.1f}x"}
    if "unsized" in row:
        for part, title in (("unsized", "no sizes"), ("channels", "sizes in more channels")):
            cell[title + ", ms"] = ms(row[part])
        cell["making these, ms"] = ms(row["padding"])
        cell["sizes in a mask, ms"] = f"{ms(row['mask'])}, mask {row['mask_bytes'] / 2**20:,.0f} MiB"
        cell["largest error, channels and mask"] = "{channels:.1e}, {mask:.1e}".format(**row["error"])
    if "plain" in row:
        for part, title in (("encoder", "encoder"), ("llm", "LLM"), ("prefill", "whole prefill")):
            cell[title] = both(row["plain"][part], row["luvc"][part])
        cell["LLM, by its FLOPs"] = f"{row['predicted']:.2f}x, of which {row['reached']:.0%} is reached"
        titles = {"own": "own code", "own_encoder": "- in the encoder", "own_llm": "- in the LLM"}
        for part, title in titles.items():
            share = row[part][0] / row["luvc"]["prefill"][0]
            cell[title] = f"{ms(row[part])} ms, {share:.1%} of the prefill"
        cell["KV cache after the prefill"] = mebibytes(row["kv_bytes"])
        cell["operations of torch"] = "{plain:,} -> {luvc:,}".format(**row["operations"])
    if "per_token" in row:
        for count, times in row["per_token"].items():
            cell[f"per token, {count:,} new ones"] = both(times["plain"], times["luvc"])
        peak = row["peak_bytes"]
        cell["peak memory, weights included"] = mebibytes(peak) if peak else "not available"
    return cell


def table(result):
    """The object that --json prints, as Markdown."""
    rows = result["rows"]
    columns = [cells(row) for row in rows]
    titles = dict.fromkeys(title for column in columns for title in column)  # in order, each once
    lines = [["", *(f"{row['tokens']:,} tokens" for row in rows)], ["---"] * (1 + len(rows))]
    for title in titles:
        cell = (c.get(title, row.get("error", "")) for c, row in zip(columns, rows, strict=True))
        lines.append([title, *cell])
    return "\n".join([result["title"], result["header"], "", *("| " + " | ".join(x) + " |" for x in lines)])


# ---- The command line --------------------------------------------------------------------------------------


def measure(args):
    """Everything that was asked for: the object that --json prints."""
    dtype = getattr(torch, args.dtype)
    if args.merge:
        title = "1,024 channels, 3/4 of each axis kept"
        job = functools.partial(time_merge, device=args.device, dtype=dtype, repeats=args.repeats)
    elif args.attention:
        _, llm, _ = SHAPES[args.shape or "llava-1.5-7b"]
        heads = llm["num_attention_heads"]
        size = {"batch": args.batch, "heads": heads, "channels": llm["hidden_size"] // heads}
        title = "causal attention: " + ", ".join(f"{value} {name}" for name, value in size.items())
        job = functools.partial(time_attention, **size, device=args.device, dtype=dtype, repeats=args.repeats)
    else:
        if args.shape:
            model = build(args.shape, args.device, dtype, args.attn, args.layers)
        else:
            model, _ = load(args.model, args.device, args.dtype, args.attn)
        weights, layers = sum(p.nbytes for p in model.parameters()), len(model.get_decoder().layers)
        title = f"{args.shape or args.model}, {layers} layers, weights {weights / 2**20:,.0f} MiB, "
        title += f"batch {args.batch}, {args.text} text tokens; plain -> LUVC"
        config = LUVCConfig(vision_keep=args.vision_keep, llm_keep=args.llm_keep)

        def job(tokens):
            inputs, tokens = make_inputs(model, tokens, args.batch, args.text)
            row = {"tokens": tokens} | time_prefill(model, inputs, config, args.repeats)
            return row | time_decode(model, inputs, config, args.new_tokens, args.decode_repeats)

    rows = []
    for tokens in sorted(args.tokens):
        try:
            rows.append(job(tokens))
        except torch.OutOfMemoryError:
            rows.append({"tokens": tokens, "error": "out of memory"})
        if "error" in rows[-1] and torch.cuda.is_available():  # only now have the frames of the failure gone
            torch.cuda.empty_cache()
        print(json.dumps(rows[-1]), file=sys.stderr)  # what was measured stays, whatever happens later
    return {"title": title, "header": header(args), "rows": rows}


def parse_arguments():
    def whole(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} must be at least 1")
        return int(text)

    def wholes(text):
        return [whole(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--model", default="toy", help="checkpoint folder (default: the toy)")
    add("--shape", choices=SHAPES, help="random weights instead")
    add("--merge", action="store_true", help="merge_axis against global matching; no model")
    add(
        "--attention", action="store_true", help="what sizes cost in attention, heads as in --shape; no model"
    )
    add("--tokens", type=wholes, default=[576, 1152], metavar="N,...", help="of images, per sample")
    add("--batch", type=whole, default=1, metavar="N")
    add("--text", type=whole, default=64, metavar="N", help="text tokens (default %(default)s)")
    add("--new-tokens", type=wholes, default=[128, 1024], metavar="N,...", help="(default 128,1024)")
    add("--repeats", type=whole, default=9, metavar="N", help="prefills (default %(default)s)")
    add("--decode-repeats", type=whole, default=3, metavar="N", help="generations (default %(default)s)")
    add("--layers", type=whole, metavar="N", help="cut a shape to N layers, for a quick trial")
    add("--vision-keep", type=float, default=DEFAULT.vision_keep, metavar="F", help="as in LUVCConfig")
    add("--llm-keep", type=fractions, metavar="F|F,F,...", help="as in LUVCConfig")
    add("--device", default="cuda" if cuda else "cpu", help="(default %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16, on a CPU float32)")
    add("--attn", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    add(
        "--flash",
        action="store_true",
        help="with sdpa: torch's flash kernel, or an error where it cannot run",
    )
    add("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()
    if args.text < 2:
        parser.error(f"--text {args.text} must be at least 2: a token before and one behind the picture")
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)  # events and memory are those of the current device
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main():
    args = parse_arguments()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if args.flash else contextlib.nullcontext():
        result = measure(args)
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    sys.exit(in_one_line(main))
