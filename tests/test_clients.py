"""What people do with a model beside calling it: threads, pipelines, compilers, accelerate, PEFT, quantised weights,
several devices or processes. Each thing works; what does not is in test_refused.py."""
# ruff: noqa: I001

import concurrent.futures
import copy
import functools
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from test_luvc import BOTH, CACHE, CLOSE, GREEDY, HERE, IMAGE, LUVC, PRUNER, QWENS, LUVCConfig
from test_luvc import agree, attributes, batch, changed, dense, every_family, merge_axis, ragged, reference
from test_luvc import spectral_prune, stored, tiny

no_grad = torch.no_grad()


def seams(model, before):
    """What `attach` works with, of that what is not as it was: forwards, hooks, configs of attentions, and so on.
    (Other attributes may change: accelerate fetches weights, `generate` and the compiler keep records.)"""
    own = ("config", "_luvc", "plain_attention", "key_channels")
    return [key for key in changed(model, before) if key[1] in own or "forward" in key[1]]


@pytest.mark.parametrize("name", ["llava-siglip", "qwen2_5_vl"])
def test_threads_share_one_attached_model(name):
    """A server with a thread per request. Eight generate at once what they generate one after the other. They wait for
    each other inside of every merge and every choice, so that all calls are at the same place: what one part of the
    model tells another, kept anywhere but in the call, would be that of the last one."""
    model, threads = tiny(name), 8
    barrier = threading.Barrier(1)

    def together(function, *args):
        barrier.wait(timeout=60)
        return function(*args)

    # Prompts of different lengths, with different pictures.
    kinds = [f"{'image' if n % 3 else 'tall'}{n}" for n in range(threads)]
    rows = [[1, *range(2, 2 + n), kind, *range(5, 6 + n % 4), 9] for n, kind in enumerate(kinds)]
    prompts = [batch(model, [row]) for row in rows]
    ask = functools.partial(model.generate, **GREEDY, output_logits=True, return_dict_in_generate=True)
    rules = {"merge": merge_axis, "prune": spectral_prune}
    rules = {key: functools.partial(together, rule) for key, rule in rules.items()}
    with LUVC(model, LUVCConfig(vision_keep=0.45, **rules)):
        wanted = [ask(**inputs) for inputs in prompts]
        barrier = threading.Barrier(threads)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for _ in range(3):
                jobs = [pool.submit(ask, **inputs) for inputs in prompts]
                for got, want in zip([job.result(timeout=300) for job in jobs], wanted, strict=True):
                    assert torch.equal(got.sequences, want.sequences), "another answer than alone"
                    agree(torch.cat(got.logits), torch.cat(want.logits), "other logits than alone")


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
@no_grad
def test_a_call_within_a_call(name):
    """Of the same model, or of another one, say in a hook that somebody put into a layer. Catches:
    the outer call that goes on with pictures, prompt or ids of the inner one; state of a class or of the file."""
    model, other, got, hooks = tiny(name), tiny("llava-siglip"), [], []
    outer = batch(model, [[1, "image1", 5, "tall2", 6]])
    family, layer = LUVC(model).family, model.get_decoder().layers[1]
    inputs = {each: batch(each, [[1, 5, "tall3", 7, 8], [1, 2]]) for each in (model, other)}

    def call(inner, *_):
        hooks.pop().remove()
        got.append(inner(**inputs[inner]).logits)

    with LUVC(model, BOTH), LUVC(other, PRUNER):
        for inner, module in itertools.product(
            (model, other), (family.blocks[2], family.projectors[0], layer)
        ):
            want = model(**outer).logits, inner(**inputs[inner]).logits
            hooks.append(module.register_forward_pre_hook(functools.partial(call, inner)))
            assert torch.equal(model(**outer).logits, want[0]), "another answer than without a call inside"
            assert torch.equal(got.pop(), want[1]), "another answer inside of a call"


def test_pipeline_and_streaming_run_unchanged(toy, capsys):
    """Catches: hooks that need another call than a client makes."""
    from PIL import Image

    from toy.ask import encode

    (model, processor), picture = toy, Image.open(HERE / "toy" / "example.png").convert("RGB")
    question = "what colour is the striped thing?"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    with LUVC(model) as luvc:
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
        assert len(luvc.kept[-1][0]) < len(luvc.kept[0][0]) / 4
        streamer = transformers.TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        capsys.readouterr()
        model.generate(**encode(processor, picture, question), max_new_tokens=4, streamer=streamer)
    assert said[0]["generated_text"].strip() == capsys.readouterr().out.strip() != ""


@every_family
@no_grad
def test_the_llm_alone_with_text(name):
    """Somebody reuses the LLM of a VLM for text, without and with a KV cache. Catches: ids that are looked for in the
    wrong place, pictures of an earlier call that are looked for in them."""
    model, ids = tiny(name), torch.tensor([[1, 9, 5, 7, 6], [1, 4, 8, 5, 9]])
    llm = model.get_decoder()
    plain = llm(input_ids=ids).last_hidden_state
    with LUVC(model, PRUNER):
        model(**batch(model, [[1, "image1", 5, 7, 6]]))
        for args, more in (((ids,), {}), ((), {"input_ids": ids})):
            agree(llm(*args, **more, use_cache=False).last_hidden_state, plain, "without a KV cache")
        first = llm(ids[:, :3], use_cache=True)
        rest = llm(ids[:, 3:], **{CACHE: first[CACHE]}).last_hidden_state
    agree(torch.cat([first.last_hidden_state, rest], 1), plain, "with a KV cache")


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_vl"])
@no_grad
def test_several_questions_on_one_reading(name):
    """A prompt is read once and its KV cache repeated, a row per question. Catches: rows that are mixed up or lost."""
    model, questions = tiny(name), [[7, 8], [9, 5], [6, 4], [8, 8]]
    inputs = batch(model, [[1, "image1", 5], [1, 8, "image1", 6]])
    with LUVC(model, BOTH):
        cache = stored(model(**inputs, use_cache=True))
        cache.batch_repeat_interleave(2)
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(2, 0), torch.ones(4, 2).long()], 1)
        at = torch.arange(200, 202).expand(4, 2)  # any will do, for both the same
        at = at.expand(3, 4, 2) if name in QWENS else at
        more = {"attention_mask": mask, "position_ids": at}
        got = model(input_ids=torch.tensor(questions), **more, **{CACHE: cache}).logits
        for row, question in enumerate(questions):
            own = stored(model(**inputs, use_cache=True))
            own.reorder_cache(torch.tensor([1, 0]))
            own.batch_select_indices(torch.tensor([1 - row // 2]))
            more = {"attention_mask": mask[row : row + 1], "position_ids": at[..., row : row + 1, :]}
            alone = model(input_ids=torch.tensor([question]), **more, **{CACHE: own}).logits
            agree(got[row : row + 1], alone, f"question {row}")


@pytest.mark.parametrize("part", ["the model", "its encoder"])
@no_grad
def test_compiled_beside_luvc(part):
    """Catches: what torch.compile made of the plain model or its encoder before, used on while LUVC is attached, and
    the reverse."""
    torch._dynamo.reset()  # it remembers what other tests compiled
    model = tiny(decoder={"num_hidden_layers": 2}, num_hidden_layers=3)
    inputs, ask = batch(model, [[1, "image1", 5]]), model
    plain = model(**inputs).logits
    with LUVC(model, LUVCConfig(vision_keep=0.45, vision_steps=2)) as luvc:
        want = model(**inputs).logits
    if part == "the model":
        ask = torch.compile(model, backend="eager")
    else:
        luvc.family.vision.forward = torch.compile(luvc.family.vision.forward, backend="eager")
    agree(ask(**inputs).logits, plain, f"{part} compiled, LUVC not attached")
    with luvc:
        agree(ask(**inputs).logits, want, f"{part} compiled, LUVC attached")
    agree(ask(**inputs).logits, plain, f"{part} compiled, LUVC detached")
    torch._dynamo.reset()


@every_family
@no_grad
def test_offloaded_by_accelerate(name):
    """Weights that come layer by layer, as with `device_map="auto"` where memory is short. Catches: a forward
    that accelerate had put in and that is lost, weights that are looked at while they are away."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny(name)
    inputs, luvc = batch(model, ragged(name)), LUVC(model, BOTH)
    plain = model(**inputs).logits
    with luvc:
        want = model(**inputs).logits
    for module in (*luvc.family.blocks, *model.get_decoder().layers):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    before = attributes(model)
    assert all(weight.is_meta for weight in model.get_decoder().layers[0].parameters())
    with luvc:
        assert torch.equal(model(**inputs).logits, want)
    assert not seams(model, before) and torch.equal(model(**inputs).logits, plain)


@no_grad
def test_hooks_of_accelerate_after_attach():
    """Catches: hooks that were put over LUVC's, and that `detach` throws away with them."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny()
    inputs, layer = batch(model, [[1, "image1", 5]]), model.model.language_model.layers[2]
    plain, luvc = model(**inputs).logits, LUVC(model, BOTH).attach()
    want = model(**inputs).logits
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    before = attributes(model)
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer.forward"):
        luvc.detach()
    assert not changed(model, before), "a refusal leaves everything as it was"
    assert torch.equal(model(**inputs).logits, want), "refused, so LUVC is still attached"
    accelerate.hooks.remove_hook_from_module(layer, recurse=True)
    luvc.detach()
    assert torch.equal(model(**inputs).logits, plain)


class OneDevice(TorchDispatchMode):
    """An operation gets tensors of one device, but for numbers; as it is on GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        copies = function.overloadpacket.__name__ in ("_to_copy", "copy_")
        assert copies or len({t.device for t in found}) < 2, f"{function} gets tensors of several devices"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llava-clip", "llava_next", "internvl", "qwen2_5_vl"])
@no_grad
def test_parts_on_two_devices(name):
    """The second half of the LLM, or of an encoder, on the device "meta", where tensors have shapes and no numbers.
    Catches: sizes, positions, grids that stay on the first device."""
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed").hooks

    def elsewhere(modules):
        for module in modules:
            align = hooks.AlignDevicesHook(execution_device=torch.device("meta"))
            hooks.add_hook_to_module(module.to("meta"), align)

    model = tiny(name)
    inputs, decoder = batch(model, ragged(name)), model.get_decoder()
    with LUVC(model, BOTH):
        want = model(**inputs, use_cache=True)
    elsewhere([*decoder.layers[2:], decoder.norm, model.lm_head])
    with LUVC(model, BOTH), OneDevice():
        assert model(**inputs, use_cache=False).logits.is_meta
        got = model(**inputs, use_cache=True)
    assert got.logits.is_meta and got.logits.shape == want.logits.shape
    for mine, plain in zip(stored(got).layers, stored(want).layers, strict=True):
        assert mine.keys.shape == plain.keys.shape, "another number of keys"
    if name == "internvl":  # others read numbers behind their encoder
        model = tiny(name)
        family = LUVC(model, BOTH).family
        elsewhere([*family.blocks[2:], *family.projectors])
        with LUVC(model, BOTH), OneDevice():
            features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        assert features.is_meta and features.shape[:2] == (len(inputs["pixel_values"]), model.per_tile)


@no_grad
def test_adapters_of_peft():
    """Catches: LUVC that does not find the model inside PEFT's wrapper, or that switches its adapters off."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6]])
    with LUVC(model, BOTH):
        without = model(**inputs).logits
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    plain, merged = wrapped(**inputs).logits, copy.deepcopy(wrapped).merge_and_unload()
    with LUVC(merged, BOTH):
        want, ids = merged(**inputs).logits, merged.generate(**inputs, **GREEDY)
    with LUVC(wrapped, BOTH):
        agree(wrapped(**inputs).logits, want, "adapters beside the weights, and merged into them")
        assert not torch.allclose(want, without, **CLOSE)
        assert torch.equal(wrapped.generate(**inputs, **GREEDY), ids)
        with wrapped.disable_adapter():
            agree(wrapped(**inputs).logits, without, "adapters switched off")
    assert torch.equal(wrapped(**inputs).logits, plain)


@pytest.mark.parametrize("package", ["torchao.quantization", "optimum.quanto"])
@no_grad
def test_quantised_weights(package):
    """Weight-only int8: LUVC equals the dense reference with the same weights. Catches: weights that are looked at
    where there are none."""
    quant = pytest.importorskip(package, reason=f"{package} is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6], [1, "tall2", 8]])
    with LUVC(model, BOTH):
        exact = model(**inputs).logits
    if package == "optimum.quanto":
        quant.quantize(model, weights=quant.qint8)
        quant.freeze(model)
    else:
        quant.quantize_(model, quant.Int8WeightOnlyConfig())
    plain, (want, _) = model(**inputs).logits, dense(model, inputs, BOTH)
    with LUVC(model, BOTH):
        got = model(**inputs).logits
    text = (inputs["input_ids"] < IMAGE) & inputs["attention_mask"].bool()
    agree(got[text], want[text], "LUVC and the dense reference, both quantised")
    assert not torch.allclose(got[text], exact[text], **CLOSE), "nothing was quantised"
    assert torch.equal(model(**inputs).logits, plain)


RANK = """
import os, sys, torch, transformers
from transformers.distributed import DistributedConfig
sys.path.insert(0, os.path.dirname(sys.argv[2]))
luvc = __import__(os.path.basename(sys.argv[2]).removesuffix(".py"))
for folder in sys.argv[3:]:
    inputs, plan = torch.load(f"{folder}/inputs.pt"), DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, distributed_config=plan)
    with luvc.LUVC(model, luvc.LUVCConfig(vision_keep=0.45)) as attached, torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out = model(**inputs)
        heads = getattr(out, sys.argv[1]).layers[0].keys.shape[1]
        torch.save((out.logits, attached.kept, ids, heads), f"{folder}/rank{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@no_grad
def test_tensor_parallelism(tmp_path):
    """Two processes that share heads and channels of every layer. Catches: ranks that keep different
    tokens, so that they add up what does not belong together."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    want = {}
    for name in ("llava-clip", "qwen2_5_vl"):
        model, folder = tiny(name), tmp_path / name
        inputs = batch(model, [[1, "image1", 5, 6], [1, "tall2", "image3", 8]])
        with LUVC(model, BOTH) as luvc:
            want[folder] = model.generate(**inputs, **GREEDY), model(**inputs).logits, luvc.kept
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "rank.py"), CACHE, reference.__file__, *map(str, want)]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=threads)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (ids, logits, kept) in want.items():
        for rank in ("rank0.pt", "rank1.pt"):
            got = torch.load(folder / rank)
            agree(got[0], logits, f"{folder.name}, {rank}")
            assert str(got[1]) == str(kept) and torch.equal(got[2], ids)
            assert got[3] == 1, "each rank stores the keys of its own heads"
