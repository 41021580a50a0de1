"""`toy/`: the checkpoint, what `toy/ask.py` prints and refuses, and what it and `luvc.report()` count."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from test_luvc import BOTH, CACHE, HERE, IMAGE, LAYERS, LUVC, SIDE, LUVCConfig, batch, ragged, tiny
from toy import ask

SCRIPT = HERE / "toy" / "ask.py"


def test_prints_one_json_object():
    """Catches: output that a script cannot read, counts that contradict each other."""
    command = [sys.executable, str(SCRIPT), "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = "model prompt answer_full answer_luvc same_answer vision_tokens visual_tokens positions flops_left"
    keys += " kv_bytes_full kv_bytes_luvc prefill_ms_full prefill_ms_luvc speedup"
    assert set(keys.split()) <= set(result)
    assert result["same_answer"] and result["answer_full"] == result["answer_luvc"] == "1 4"
    assert result["vision_tokens"][0] == 24 * 24 and result["vision_tokens"][-1] == 21 * 21
    assert result["visual_tokens"][0] == round(0.8 * 21 * 21) and result["visual_tokens"][-1] == 0
    each = 2 * 2 * (32 + 8) * 4  # keys and values, two heads, their size and the extra channels, float32
    assert result["kv_bytes_luvc"] == sum(result["positions"]) * each
    assert result["kv_bytes_full"] == 12 * result["positions_full"] * 2 * 2 * 32 * 4


def run(monkeypatch, *arguments):
    """`python toy/ask.py ARGUMENTS` in this process: the exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", *arguments])
    return ask.in_one_line(ask.main)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--llm-keep", ",".join(["1", *["0.5"] * 10, "0"])], "221"),
        (["--vision-keep=1", "--llm-keep=1"], "576"),
    ],
)
def test_prints_both_answers(arguments, left, monkeypatch, capsys):
    """Catches: settings that are not passed on; everything off taken for an error."""
    assert run(monkeypatch, "--max-new-tokens", "3", *arguments) == 0
    out = capsys.readouterr().out
    assert all(what in out for what in ("plain: 1 4", "LUVC:  1 4", "width 64", "KV cache", "FLOPs left"))
    row = next(line.split() for line in out.splitlines() if line.startswith("    5 "))
    assert row[1] == left and set(row[3]) == {"#"} and len(row[3]) == round(60 * int(row[2]) / 586)


@pytest.fixture
def folders(tmp_path):
    """Folders that hold no usable checkpoint."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    hidden = shutil.ignore_patterns("*.safetensors", "__pycache__", "real")
    shutil.copytree(HERE / "toy", tmp_path / "pickled", ignore=hidden)
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--image", "{}/nothing.png"], "nothing.png"),
        (["--image", "{}/text.png"], "text.png"),
        (["--image", "{}"], "directory"),
        (["--model", "{}/empty"], "empty"),
        (["--model", "{}/pickled"], "pickled"),
        (["--vision-keep", "0"], "vision_keep=0.0"),
        (["--vision-keep", "many"], "many"),
        (["--llm-keep", "0.5,0.6"], "llm_keep=[0.5, 0.6]"),
        (["--llm-keep", "1,0"], "12 layers"),
        (["--llm-keep", "nan"], "nan"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--unknown"], "--unknown"),
        (["--device", "cuda"], "cuda"),
        (["--attn", "flash_attention_2"], "flash"),
    ],
)
def test_refuses_in_one_line(folders, arguments, names, monkeypatch, capsys):
    """Catches: a traceback, an error that does not name what was wrong, an exit code of 0."""
    here = {"cuda": torch.cuda.is_available(), "flash": transformers.utils.is_flash_attn_2_available()}
    if here.get(names):
        pytest.skip(f"{names} is available here")
    assert run(monkeypatch, *(part.format(folders) for part in arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ask.py: error: ") and names in lines[0].lower(), lines


@torch.no_grad()
def test_flops_and_bytes_by_hand():
    """Catches: attention counted as full, a layer's share that is that of another, padding counted."""
    model, config, n = tiny(), LUVCConfig(vision_keep=1.0, llm_keep=[1, 1, 0.5, 0]), SIDE**2
    inputs = batch(model, [[1, "image1", 5, 6], [7, 8, 9]])
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v, o, the three of the MLP

    def flops(*positions):
        return sum(2 * weights * n + 2 * 32 * n * (n + 1) for n in positions)

    with LUVC(model, config) as luvc:
        cache = model(**inputs)[CACHE]
    want = flops(n + 3, n + 3, n // 2 + 3, 3) + flops(3, 3, 3, 3)
    assert ask.flops_left(luvc, inputs) == pytest.approx(want / (4 * flops(n + 3, 3)))
    columns = (n + 3) + (n + 3) + (n // 2 + 3) + 3  # of the longer sample
    assert ask.kv_bytes(cache) == 2 * columns * 2 * 2 * (8 + 8) * 4


@torch.no_grad()
def test_report_says_what_happened():
    """Catches: text or padding counted as image tokens, tokens of another layer, words that change it."""
    model, blocks = tiny(), []
    inputs, luvc = batch(model, ragged("llava-clip")), LUVC(model, BOTH)
    with pytest.raises(ValueError, match="nothing happened yet"):
        luvc.report()
    with luvc:
        for block in luvc.family.blocks:
            block.register_forward_hook(
                lambda block, x, out: blocks.append(len(out) * (out.shape[1] - 1))
            )  # CLS
        cache = model(**inputs)[CACHE]
        told = luvc.report()
        model(input_ids=torch.tensor([[5]] * 3), **{CACHE: cache})
    assert luvc.report() == told
    ids = inputs["input_ids"]
    plain, text = int((ids == IMAGE).sum()), int(((ids != 0) & (ids != IMAGE)).sum())
    image = [sum(map(len, layer)) - text for layer in luvc.kept]
    assert told.splitlines() == [
        f"image tokens per encoder block: {', '.join(map(str, blocks))}",
        f"image tokens per decoder layer, of {plain}: {', '.join(map(str, image))}",
        f"image token-layers left: {sum(image) / (LAYERS * plain):.1%}",
    ]
    assert blocks[0] == plain > blocks[-1] == round(image[0] / 0.8) and image[-1] == 0


def test_checkpoint_is_ordinary_and_small():
    files = {file.name: file.stat().st_size for file in (HERE / "toy").iterdir() if file.is_file()}
    assert sum(size for name, size in files.items() if name != "real.safetensors") <= 8 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "example.png"} <= set(files)
    config = json.loads((HERE / "toy" / "config.json").read_text())
    assert "auto_map" not in config, "a checkpoint must load without code of its own"
