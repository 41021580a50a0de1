"""What README says: which lines of luvc.py work on their own, and the limits that users have to know."""

import contextlib
import importlib.util
import re
import sys

import pytest
import torch
import transformers

from test_luvc import (
    CACHE,
    GREEDY,
    HERE,
    LUVC,
    MODULE,
    PRUNER,
    batch,
    random,
    reference,
    same,
    spectral_prune,
    tiny,
)

IMPORTS = "import functools, math, torch\nfrom torch import Tensor\n"


def lifted(tmp_path, first, last, above=""):
    """A module of its own from sections `first` to `last` of luvc.py (0: above the first ruler). It may import torch
    and transformers, and what comes with Python."""
    text, name = MODULE.read_text(encoding="utf-8"), f"sections_{first}_to_{last}"
    rulers = [0, *(match.start() for match in re.finditer(r"^# =+ \d\. ", text, re.MULTILINE))]
    text = above + text[rulers[first] : rulers[last + 1]]
    imports = {part.split(".")[0] for part in re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)}
    others = imports - set(sys.stdlib_module_names) - {"torch"} - ({"transformers"} if last > 2 else set())
    assert not others, f"{name} needs {others}"
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_readme_says_what_to_copy():
    """Catches: sections, functions or imports in README that are not those of luvc.py; limits that nobody is told."""
    readme, text = ((HERE / file).read_text(encoding="utf-8") for file in ("README.md", MODULE))
    copy, limits = (readme.split(f"\n## {heading}")[1].split("\n## ")[0] for heading in ("Copy", "Limits"))
    for line in IMPORTS.splitlines():
        assert f"`{line}`" in copy, f"Copy: above sections 1 and 2 stands {line}"
    for ruler in re.findall(r"# =+ \d\. \w+", copy):
        assert f"\n{ruler}" in text, f"Copy: {ruler} is no ruler of luvc.py"
    for name in re.findall(r"`(\w+)`", copy):
        assert hasattr(reference, name) or name in ("luvc", "torch"), f"Copy: luvc.py has no {name}"
    for name in ("output_attentions", "hidden_states"):
        assert f"`{name}`" in limits, f"Limits: say what becomes of {name}"


def test_functions_lifted_out(tmp_path):
    """Sections 1 and 2 alone. Catches: a name from elsewhere; at the width of a real LLM, too."""
    merging, pruning = (lifted(tmp_path, n, n, IMPORTS) for n in (1, 2))
    x, size = random(1, 1, 6, 8, 4096), torch.ones(1, 6, 8)
    for at in merging.merge_plan(6, 8, 0.25, 4):
        x, size, _ = merging.merge_axis(x, size, at[at[0]], at[0])
    same(tuple(x.shape), (1, 3, 4, 4096), "a grid of 6 x 8 tokens of width 4096, merged to a quarter")
    same(merging.follow(torch.tensor([[1]]), torch.tensor([[[0, 0, 1]]])).tolist(), [[0]], "follow")
    x = random(2, 1, 100, 4096)
    kept = pruning.spectral_prune(x, 25)
    assert torch.equal(kept, spectral_prune(x, 25)), "section 2 alone keeps other tokens"
    same(pruning.inherit(torch.ones(1, 100), kept).sum().item(), 100, "sizes of 100 tokens, inherited")


@pytest.mark.parametrize("name", ["llava-clip", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_hooks_lifted_out(name, tmp_path):
    """The text above section 5, and above section 7. Catches: hooks that lean on what follows them in the file."""
    model, before = tiny(name), transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["luvc"]
    inputs, out = batch(model, [[1, "image1", 5, 6], [1, "image2", 7]]), []
    try:
        four, six = (lifted(tmp_path, 0, last) for last in (4, 6))
        both = contextlib.ExitStack()
        both.enter_context(six.Pruner(model, find_copies=six.find_copies))
        both.enter_context(six.Merger(model))
        for hooks in (both, LUVC(model), four.Pruner(model), LUVC(model, PRUNER)):
            with hooks:
                words = [model.generate(**inputs, **GREEDY, num_beams=beams).tolist() for beams in (1, 2)]
                cache = {CACHE: model(**inputs, use_cache=True)[CACHE]}
                second = model(input_ids=torch.tensor([[7, 8], [9, 5]]), **cache).logits.tolist()
                out.append([*words, second])
    finally:
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register("luvc", before)
    assert out[0] == out[1], "both hooks lifted out: other words, of beams, or logits of a second turn"
    assert out[2] == out[3], "the Pruner lifted out: other words, of beams, or logits of a second turn"
