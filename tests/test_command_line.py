"""`python luvc.py`: what it prints, and how it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from test_luvc import HERE, reference


def test_command_line_prints_one_json_object():
    """Catches: output that a script cannot read, a report that contradicts itself."""
    command = [sys.executable, str(HERE / "luvc.py"), "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = "model prompt answer_full answer_luvc same_answer vision_tokens visual_tokens positions prefill_ms_full"
    assert set(result) == set(
        f"{keys} prefill_ms_luvc speedup kv_bytes_full kv_bytes_luvc flops_left".split()
    )
    assert result["same_answer"] and result["answer_full"] == result["answer_luvc"] != ""
    assert result["visual_tokens"][-1] == 0 and 0 < result["flops_left"] <= 0.5
    assert result["kv_bytes_luvc"] < 2 * result["kv_bytes_full"]


def test_command_line_prints_both_answers(capsys):
    assert reference.main(["--max-new-tokens", "3", "--llm-keep", ",".join(["1", *["0.5"] * 10, "0"])]) == 0
    out = capsys.readouterr().out
    assert all(what in out for what in ("plain:", "LUVC:", "###", "prefill"))


@pytest.fixture
def folders(tmp_path):
    """Folders that hold no usable checkpoint."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    shutil.copytree(
        HERE / "toy", tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
    )
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--image", "{}/nothing.png"], "nothing.png"),
        (["--image", "{}/text.png"], "text.png"),
        (["--image", "{}"], "--image"),
        (["--model", "{}/empty"], "empty"),
        (["--model", "{}/pickled"], "pickled"),
        (["--vision-keep", "0"], "vision_keep=0.0"),
        (["--vision-keep", "many"], "many"),
        (["--llm-keep", "0.5,0.6"], "rises"),
        (["--llm-keep", "1,0"], "12 decoder layers"),
        (["--llm-keep", "nan"], "nan"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--unknown"], "--unknown"),
        (["--device", "cuda"], "cuda"),
        (["--attn", "flash_attention_2"], "flash"),
    ],
)
def test_command_line_refuses_in_one_line(folders, argv, names, capsys):
    """Catches: a traceback, an error that does not name what was wrong, an exit code of 0."""
    here = {"cuda": torch.cuda.is_available(), "flash": transformers.utils.is_flash_attn_2_available()}
    if here.get(names):
        pytest.skip(f"{names} can be had here")
    assert reference.main([part.format(folders) for part in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading")]
    assert len(lines) == 1 and lines[0].startswith("luvc.py: error: ") and names in lines[0], lines


def test_toy_checkpoint_is_ordinary_and_small():
    files = {file.name: file.stat().st_size for file in (HERE / "toy").iterdir() if file.is_file()}
    assert sum(files.values()) <= 12 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "example.png"} <= set(files)
    config = json.loads((HERE / "toy" / "config.json").read_text())
    assert "auto_map" not in config, "a checkpoint must load without code of its own"
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    assert patches >= 576 and config["text_config"]["num_hidden_layers"] >= 12
