"""What people do with a model beside calling it: threads, servers, pipelines, compilers, accelerate, PEFT, Trainer,
quantised weights, several processes. Each thing works; what does not is in test_refused.py."""

import concurrent.futures
import copy
import functools
import http.client
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
import transformers

import test_luvc
from test_luvc import (
    BOTH,
    CACHE,
    CLOSE,
    GREEDY,
    HERE,
    IMAGE,
    LAYERS,
    LUVC,
    OFF,
    PRUNER,
    QWENS,
    LUVCConfig,
    agree,
    attributes,
    batch,
    both,
    dense,
    every_family,
    merge_axis,
    ragged,
    reference,
    seams,
    spectral_prune,
    stored,
    tiny,
)


def test_threads_share_one_attached_model():
    """Eight threads generate at once what they generate one after the other. They wait for each other inside of every
    merge and every choice, so that all calls are at the same place: what one part of the model tells another, kept
    anywhere but in the call, would be that of the last one."""
    model, threads = tiny("llava-siglip"), 8
    barrier = threading.Barrier(1)

    def merge(*args):
        barrier.wait(timeout=60)
        return merge_axis(*args)

    def choose(*args):
        barrier.wait(timeout=60)
        return spectral_prune(*args)

    # Prompts of different lengths, with different pictures of one or two tiles.
    kinds = [f"{'image' if n % 3 else 'tall'}{n}" for n in range(threads)]
    rows = [[1, *range(2, 2 + n), kind, *range(5, 6 + n % 4), 9] for n, kind in enumerate(kinds)]
    prompts = [batch(model, [row]) for row in rows]
    ask = functools.partial(model.generate, **GREEDY, output_logits=True, return_dict_in_generate=True)
    with LUVC(model, LUVCConfig(vision_keep=0.45, merge=merge, prune=choose)):
        wanted = [ask(**inputs) for inputs in prompts]
        barrier = threading.Barrier(threads)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for _ in range(3):
                jobs = [pool.submit(ask, **inputs) for inputs in prompts]
                for got, want in zip([job.result(timeout=300) for job in jobs], wanted, strict=True):
                    assert torch.equal(got.sequences, want.sequences), "another answer than alone"
                    agree(torch.cat(got.logits), torch.cat(want.logits), "other logits than alone")


def test_pipeline_and_streaming_run_unchanged(toy, capsys):
    """Catches: hooks that need another call than a client makes."""
    from PIL import Image

    (model, processor), picture = toy, Image.open(HERE / "toy" / "example.png")
    question = "what colour is the striped thing?"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    with LUVC(model) as luvc:
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
        assert luvc.report().visual_tokens[-1] == 0
        streamer = transformers.TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        capsys.readouterr()
        model.generate(**reference.encode(processor, picture, question), max_new_tokens=4, streamer=streamer)
    assert said[0]["generated_text"].strip() == capsys.readouterr().out.strip() != ""


def test_a_server_with_a_thread_per_request():
    """Catches: state of a call on the wrapper, where other requests overwrite it."""
    model, interval = tiny("qwen2_5_vl"), sys.getswitchinterval()
    kinds = enumerate(["image", "tall", "video", "tall"] * 2)
    inputs = [batch(model, [[1, f"{kind}{i}", 5, *range(6, 7 + i)]]) for i, kind in kinds]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ids = model.generate(**inputs[int(self.path[1:])], **GREEDY).tolist()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(ids).encode())

        def log_message(self, *_):
            pass

    def ask(number):
        client = http.client.HTTPConnection(*server.server_address, timeout=300)
        client.request("GET", f"/{number}")
        return json.loads(client.getresponse().read())

    with LUVC(model, BOTH), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        want = [model.generate(**each, **GREEDY).tolist() for each in inputs]
        threading.Thread(target=server.serve_forever).start()
        sys.setswitchinterval(1e-5)  # threads take turns within a layer
        try:
            with concurrent.futures.ThreadPoolExecutor(len(inputs)) as clients:
                got = list(clients.map(ask, range(len(inputs))))
        finally:
            sys.setswitchinterval(interval)
            server.shutdown()
    assert got == want


@pytest.mark.parametrize(
    ("name", "side"), [("llava-full", "left"), ("internvl", "right"), ("llava_next", "left")]
)
@torch.no_grad()
def test_a_prompt_may_end_with_a_picture(name, side, monkeypatch):
    """Captioning with a base model: the last placeholder speaks, so it counts as text and lives to the last
    layer. Catches: the next word from a position that was pruned; padding behind it taken for text."""
    model, whole = tiny(name), test_luvc.pieces_of
    inputs = batch(model, [[1, 5, "image1"], [1, "image2", "tall3"], [1, "tall4", 5, 6]], side)

    def without_the_last(model, ids, b):
        last = (ids[b] != 0).nonzero().max().item()
        return [(token, [slot for slot in piece if slot != last]) for token, piece in whole(model, ids, b)]

    monkeypatch.setattr(test_luvc, "pieces_of", without_the_last)
    want, kept = dense(model, inputs, PRUNER)
    with LUVC(model, PRUNER) as luvc:
        got = model(**inputs).logits
    assert [[row.tolist() for row in rows] for rows in luvc.kept] == [
        [list(row) for row in rows] for rows in kept
    ]
    for b, row in enumerate(inputs["attention_mask"]):
        agree(got[b, row.nonzero().max()], want[b, row.nonzero().max()], f"the word behind sample {b}")


@pytest.mark.parametrize("name", ["llava-clip", "llava_next", "llava_onevision"])
@torch.no_grad()
def test_a_list_of_one_feature_layer_is_one_layer(name):
    """Catches: a config that is refused, or read as another layer, for a pair of brackets."""
    model = tiny(name)
    inputs = batch(model, [[1, "image", 5, 6]])
    with LUVC(model, both(name)):
        want = model(**inputs).logits
    model.config.vision_feature_layer = [model.config.vision_feature_layer]
    with LUVC(model, both(name)):
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm"])
@torch.no_grad()
def test_a_placeholder_without_a_picture_is_text(name):
    """Catches: a word that a user typed, or the model said, pruned as if it were a picture."""
    model = tiny(name)
    inputs, ids = batch(model, [[1, "image", 5, 6]]), torch.tensor([[1, 5, IMAGE, 6, 7]])
    plain = model(input_ids=ids).logits
    with LUVC(model, BOTH) as luvc:
        agree(model(input_ids=ids).logits, plain, "a prompt of text alone")
        assert [len(row) for (row,) in luvc.kept] == [5] * LAYERS
        model.generate(input_ids=ids, **GREEDY)
        assert [len(row) for (row,) in luvc.kept] == [5] * LAYERS
        model(input_ids=ids, **{CACHE: stored(model(**inputs))})  # a second turn
        assert [len(row) for (row,) in luvc.kept] == [5] * LAYERS


@every_family
@torch.no_grad()
def test_the_llm_alone_with_text(name):
    """Somebody reuses the LLM of a VLM for text, without and with a KV cache. Catches: ids that are looked for in the
    wrong place, pictures of an earlier call that are looked for in them."""
    model, ids = tiny(name), torch.tensor([[1, 9, 5, 7, 6], [1, 4, 8, 5, 9]])
    llm = model.get_decoder()
    plain = llm(input_ids=ids).last_hidden_state
    with LUVC(model, PRUNER):
        model(**batch(model, [[1, "image1", 5, 7, 6]]))
        for args, more in (((ids,), {}), ((), {"input_ids": ids})):
            got = llm(*args, **more, use_cache=False).last_hidden_state
            assert torch.allclose(got, plain, **CLOSE)
        first = llm(ids[:, :3], use_cache=True)
        rest = llm(ids[:, 3:], **{CACHE: first[CACHE]}).last_hidden_state
    assert torch.allclose(torch.cat([first.last_hidden_state, rest], 1), plain, **CLOSE)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_vl"])
@torch.no_grad()
def test_several_questions_on_one_reading(name):
    """A prompt is read once and its KV cache repeated, a row per question. Catches: rows that are mixed up or lost."""
    model = tiny(name)
    inputs, questions = (
        batch(model, [[1, "image1", 5], [1, 8, "image1", 6]]),
        [[7, 8], [9, 5], [6, 4], [8, 8]],
    )
    with LUVC(model, both(name)):
        cache = stored(model(**inputs, use_cache=True))
        cache.batch_repeat_interleave(2)
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(2, 0), torch.ones(4, 2).long()], 1)
        at = torch.arange(200, 202).expand(4, 2)  # any will do, for both the same
        at = at.expand(3, 4, 2) if name in QWENS else at
        more = {"attention_mask": mask, "position_ids": at}
        got = model(input_ids=torch.tensor(questions), **more, **{CACHE: cache}).logits
        for row, question in enumerate(questions):
            own = stored(model(**inputs, use_cache=True))
            own.batch_select_indices(torch.tensor([row // 2]))
            more = {"attention_mask": mask[row : row + 1], "position_ids": at[..., row : row + 1, :]}
            alone = model(input_ids=torch.tensor([question]), **more, **{CACHE: own}).logits
            agree(got[row : row + 1], alone, f"question {row}")


@torch.no_grad()
def test_packed_rows_with_everything_off():
    """Catches: a refusal of what the plain model can do, where nothing is merged or pruned."""
    model = tiny()
    row = {"input_ids": torch.tensor([[1, 5, 6, 1, 5]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    plain = model(**row).logits
    with LUVC(model, OFF):
        assert torch.equal(model(**row).logits, plain)


@torch.no_grad()
def test_compiled_beside_luvc():
    """Catches: what torch.compile made of the plain model before, used on while LUVC is attached, and the
    reverse; an error of the compiler that does not say why."""
    torch._dynamo.reset()  # it remembers what other tests compiled
    model = tiny()
    inputs = batch(model, [[1, "image1", 5]])
    plain, beside = model(**inputs).logits, torch.compile(model, backend="eager")
    agree(beside(**inputs).logits, plain, "compiled, plain")
    with LUVC(model, BOTH):
        agree(beside(**inputs).logits, model(**inputs).logits, "compiled, LUVC attached")
    agree(beside(**inputs).logits, plain, "compiled, LUVC detached")
    torch._dynamo.reset()
    with (
        LUVC(model, BOTH),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"LUVC needs eager mode.*without it"),
    ):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)


@every_family
@torch.no_grad()
def test_offloaded_by_accelerate(name):
    """Weights that come layer by layer, as with `device_map="auto"` where memory is short. Catches: a forward
    that accelerate had put in and that is lost, weights that are looked at while they are away."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny(name)
    inputs, luvc = batch(model, ragged(name)), LUVC(model, both(name))
    plain = model(**inputs).logits
    with luvc:
        want, left = model(**inputs).logits, len(luvc.kept[1][0])
    for module in (*luvc.family.blocks, *model.get_decoder().layers):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    before = attributes(model)
    assert all(weight.is_meta for weight in model.get_decoder().layers[0].parameters())
    with luvc:
        assert torch.equal(model(**inputs).logits, want) and len(luvc.kept[1][0]) == left
    assert not seams(model, before) and torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_hooks_of_accelerate_after_attach():
    """Catches: hooks that were put over LUVC's, and that `detach` throws away with them."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny()
    inputs, layer = batch(model, [[1, "image1", 5]]), model.model.language_model.layers[2]
    plain, luvc = model(**inputs).logits, LUVC(model, BOTH).attach()
    want = model(**inputs).logits
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer.forward.*undo that before detach"):
        luvc.detach()
    assert torch.equal(model(**inputs).logits, want), "refused, so LUVC is still attached"
    accelerate.hooks.remove_hook_from_module(layer, recurse=True)
    luvc.detach()
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_device_map_over_memory_and_disk(tmp_path):
    """The nearest thing to two devices that every machine has. Catches: weights that accelerate spread by
    itself, and that LUVC looks at or loses."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image", 5, 6], [1, 2]])
    with LUVC(model, BOTH):
        want, ids = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
    places |= {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.language_model.layers.{n}": ("cpu", "disk")[n // 2] for n in range(LAYERS)}
    spread = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "away").eval()
    assert next(spread.model.language_model.layers[3].parameters()).is_meta
    with LUVC(spread, BOTH):
        assert torch.equal(spread(**inputs).logits, want)
        assert torch.equal(spread.generate(**inputs, **GREEDY), ids)


@torch.no_grad()
def test_train_and_eval_while_attached():
    """Catches: the copy of an attention that LUVC runs, and that stays in the mode it was copied in."""
    model = tiny(attention="eager")
    inputs = batch(model, [[1, "image1", 5]])
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with LUVC(model, BOTH):
        first = model(**inputs).logits
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits), "no dropout while training"
        model.eval()
        assert torch.equal(model(**inputs).logits, first)


@torch.no_grad()
def test_several_models_at_once():
    """Catches: state that belongs to a class or to the module, not to the model."""
    models, got = [tiny("llava-clip"), tiny("qwen2_5_vl"), tiny("llava-clip")], []
    inputs, want = [batch(model, [[1, "image1", 5, 6]]) for model in models], []
    wrappers = [LUVC(model, config) for model, config in zip(models, (BOTH, PRUNER, OFF), strict=True)]
    for model, each, luvc in zip(models, inputs, wrappers, strict=True):
        with luvc:
            want.append((model(**each).logits.tolist(), luvc.report()))
    with wrappers[0], wrappers[1]:  # the third model stays plain, and off is plain
        for n in (0, 1, 2, 0):
            got.append((models[n](**inputs[n]).logits.tolist(), wrappers[n].report()))
    assert got == [*want, want[0]]


@torch.no_grad()
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


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_trainer_with_lora(name, tmp_path):
    """Two steps of transformers' Trainer, two accumulated samples each, are two steps of gradient descent by
    hand. Catches: hooks that Trainer or accelerate lose, gradients that stop at LUVC or reach frozen
    weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def adapted():
        model = tiny(name)
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "qkv"]))

    by_hand, model, rate, losses = adapted(), adapted(), 0.1, []
    samples = [batch(tiny(name), [[1, f"image{i}", 5, 6, 7 + i]]) for i in range(4)]
    for each in samples:
        each["labels"] = torch.where(each["input_ids"] < IMAGE, each["input_ids"], -100)
    with LUVC(by_hand, BOTH):
        descent = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], rate)
        for pair in (samples[:2], samples[2:]):
            loss = sum(by_hand(**each).loss for each in pair) / 2
            loss.backward()
            descent.step()
            descent.zero_grad()
            losses.append(loss.item())
    options = {"learning_rate": rate, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0}
    options |= {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    options |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "use_cpu": True}
    options |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    options = transformers.TrainingArguments(str(tmp_path), **options)
    with LUVC(model, BOTH):
        trainer = transformers.Trainer(
            model, options, train_dataset=samples, data_collator=lambda one: one[0]
        )
        trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == pytest.approx(
        losses, rel=CLOSE["rtol"]
    )
    after, start = dict(model.named_parameters()), dict(adapted().named_parameters())
    for key, weight in by_hand.named_parameters():
        agree(after[key], weight, key)
        assert weight.requires_grad or torch.equal(after[key], start[key]), f"{key} is frozen"
    moved = {key.split(".")[3] for key, weight in after.items() if not torch.equal(weight, start[key])}
    assert len(moved) == 2 and "language_model" in moved, f"adapters of the encoder and of the LLM: {moved}"


@pytest.mark.parametrize("package", ["torchao.quantization", "optimum.quanto"])
@torch.no_grad()
def test_quantised_weights(package):
    """Weight-only int8: LUVC equals the dense reference with the same weights. Catches: weights that are
    looked at where there are none, and a report that changes with the way they are stored."""
    quant = pytest.importorskip(package, reason=f"{package} is not installed")
    model = tiny()
    inputs = batch(model, [[1, "image1", 5, 6], [1, "tall2", 8]])
    with LUVC(model, BOTH) as luvc:
        exact, report = model(**inputs).logits, luvc.report()
    if package == "optimum.quanto":
        quant.quantize(model, weights=quant.qint8)
        quant.freeze(model)
    else:
        quant.quantize_(model, quant.Int8WeightOnlyConfig())
    plain, (want, _) = model(**inputs).logits, dense(model, inputs, BOTH)
    with LUVC(model, BOTH) as luvc:
        got = model(**inputs).logits
        assert luvc.report() == report
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
        result = out.logits, attached.kept, ids, vars(attached.report()), heads
    torch.save(result, f"{folder}/rank{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@torch.no_grad()
def test_tensor_parallelism(tmp_path):
    """Two processes that share heads and channels of every layer, started as README says. Catches: ranks that
    keep different tokens, so that they add up what does not belong together, and a report of one rank's
    share."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    want = {}
    for name in ("llava-clip", "qwen2_5_vl"):
        model, folder = tiny(name), tmp_path / name
        inputs = batch(model, [[1, "image1", 5, 6], [1, "tall2", "image3", 8]])
        with LUVC(model, BOTH) as luvc:
            ids, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits
            want[folder] = logits, luvc.kept, ids, vars(luvc.report()), 2
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "rank.py"), CACHE, reference.__file__, *map(str, want)]
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | threads)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (logits, kept, ids, report, heads) in want.items():
        for rank in ("rank0.pt", "rank1.pt"):
            got = torch.load(folder / rank)
            agree(got[0], logits, f"{folder.name}, {rank}")
            assert str(got[1]) == str(kept) and torch.equal(got[2], ids) and got[3] == report
            assert got[4] == heads // 2, "each rank stores the keys of its own heads"
