"""luvc.py as a course assignment: four tasks, ten functions. docs/teaching.md is the teacher's page.

    python tests/assignment.py student.py                      # write luvc.py without the ten bodies
    python tests/assignment.py student.py --task 1             # what is wrong with task 1: one example at a time
    python tests/assignment.py student.py --mark               # points, with the examples that students have
    python tests/assignment.py student.py --mark --seed 7      # points, with other examples

Task 4 has two halves: the forty-line SmallPruner of walkthrough.ipynb, put in front of luvc.py's section 4, and
`run_layer`. RUBRIC names the tests of a task. A mistake in one task fails no test of an earlier one.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_luvc.py", "tests/test_functions.py", "tests/test_small.py"]

TAUGHT = {  # function or Class.method -> (task, what is to be written, lines that are given); in the file's order
    "merge_axis": (1, "merge neighbouring tokens along one axis of the grid", ""),
    "merge_plan": (2, "decide which axis merges at which step, and to how many tokens", ""),
    "follow": (2, "say which token of the merged grid each original token is in", ""),
    "low_pass": (3, "keep the slow part of a sequence", ""),
    "spectral_score": (3, "score each token by what the filter removes", ""),
    "spectral_prune": (
        3,
        "return the indices of the tokens with the highest scores",
        "token / token.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)\n"
        "(score * 2**14).round()",
    ),
    "inherit": (3, "pass the sizes of pruned tokens on to those that stay", ""),
    "SmallPruner.gather": (
        4,
        "choose the positions of this layer; return (args, kwargs) with these alone",
        "math.floor(self.fractions[number] * int(self.is_image.sum()) + 0.5)  # how many image tokens may stay\n"
        "self.kept.append(self.index)\n"
        'cos, sin = kwargs["position_embeddings"]  # of all positions, (1, S, head size): gather them as well\n'
        'kwargs["position_ids"] = kwargs["attention_mask"] = None  # the causal mask is the kernel\'s',
    ),
    "SmallPruner.scatter": (4, "put the layer's output (1, K, C) back into the whole sequence (1, S, C)", ""),
    "run_layer": (
        4,
        "prune, gather what is kept, run the layer, scatter its output back",
        'prompt, cache = kwargs.pop("prompt"), kwargs[CACHE]\n'
        "move(hidden.device, prompt, *prompt.pictures)  # first of all: layers may be on several devices\n"
        "prompt.layers.append(prompt.size)  # once it is pruned; with pruner.fractions and pruner.config.prune\n"
        "store = None if cache is None else cache.layers[number]\n"
        "store.expect(prompt)  # if there is one; if not, and prompt.weigh: key_channels=prompt.channels\n"
        'kwargs["attention_mask"] = prompt.mask(store, x, pruner.decoder.config)  # x: what the layer runs on\n'
        'kwargs["position_ids"] = None  # and "position_embeddings", cosines and sines, are gathered as x is',
    ),
}

RULES = """
# The assignment: write the functions that raise NotImplementedError, from their docstrings. Whatever these do not say
# otherwise, some rules hold for tasks 1 to 3, and tests check them:
#
#   * No input, and no result of an earlier call, is written to. The global random state is neither read nor set.
#   * Half precision is too coarse for sums, norms and similarities: compute in float32 (float64 for float64, unless the
#     docstring says float32), and return the dtype that the docstring says.
#   * Results are on the device of the inputs. No number is read on the host (`.item()`, `.tolist()`, `bool(tensor)`,
#     `nonzero`, a mask as an index): on a GPU the host would wait there.
#   * No Python loop over samples, lines or tokens: the number of torch operations is the same for few and for many. No
#     table of all pairs of tokens, except in `inherit`.
"""
RUBRIC = {  # task -> {what is tested: (points, tests)}
    1: {
        "small cases by hand": (5, ["test_merge_by_hand"]),
        "any grid, against plain loops": (8, ["test_merge_equals_plain_loops"]),
        "precision, dtypes": (7, ["test_merge_computes_in_float32_or_better", "test_merge_keeps_dtypes"]),
        "inputs, random state and earlier results left alone": (2, ["test_merge_leaves_no_trace"]),
        "cost, errors": (3, ["test_merge_costs_what_it_should", "test_merge_refuses_bad_input"]),
    },
    2: {
        "the plan by hand": (3, ["test_plan_by_hand"]),
        "any plan": (3, ["test_plan_alternates_and_arrives"]),
        "following tokens by hand": (3, ["test_follow_by_hand"]),
        "following tokens over any two merges": (4, ["test_follow_equals_plain_loops"]),
        "cost": (1, ["test_follow_leaves_no_trace_and_costs_what_it_should"]),
        "errors": (1, ["test_plan_refuses_bad_input"]),
    },
    3: {
        "the filter by hand": (3, ["test_low_pass_by_hand"]),
        "the filter on any sequence": (4, ["test_low_pass_equals_the_sum_of_waves"]),
        "dtypes, dimensions, scale": (4, ["test_filter_dtype_dim_and_scale"]),
        "the score": (4, ["test_score_measures_what_it_says_anywhere"]),
        "the choice by hand": (3, ["test_prune_by_hand"]),
        "the choice on any sequence": (4, ["test_prune_keeps_the_highest_scores_in_order"]),
        "ties": (2, ["test_prune_constant_signal_is_all_ties", "test_prune_ties_up_to_rounding"]),
        "directions, projection": (2, ["test_prune_sees_directions_only", "test_scores_in_a_projection"]),
        "sizes": (2, ["test_inherit_by_hand", "test_inherit_equals_plain_loops", "test_inherit_is_exact"]),
        "cost, nothing left": (1, ["test_pruning_leaves_no_trace", "test_pruning_costs_what_it_should"]),
        "errors": (1, ["test_pruning_refuses_bad_input"]),
    },
    4: {
        "the small Pruner by hand": (8, ["test_small_pruner_by_hand"]),
        "the small Pruner against masks": (7, ["test_small_pruner_equals_a_masked_model"]),
        "run_layer by hand": (7, ["test_one_layer_by_hand"]),
        "a model against the dense reference": (4, ["test_physical_equals_logical", "test_pruner_alone"]),
        "batches": (1, ["test_batch_gives_what_its_samples_give"]),
        "a KV cache": (2, ["test_cached_generation_equals_the_reference"]),
        "turns": (1, ["test_turns_of_interleaved_conversations"]),
    },
}
# Tests run in this order: small cases come first.
ORDER = {name: task for task, groups in RUBRIC.items() for _, names in groups.values() for name in names}


def small_pruner() -> str:
    """The class of the notebook's section 7."""
    cells = json.loads((ROOT / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    return next(text for cell in cells if (text := "".join(cell["source"])).startswith("class SmallPruner"))


def solved() -> str:
    """The file of which students get a part: luvc.py with the small Pruner in front of section 4."""
    luvc = (ROOT / "luvc.py").read_text(encoding="utf-8")
    before, ruler, behind = luvc.partition("# ==== 4. ")
    return f"{before}# ==== Task 4 begins here ====\n\n\n{small_pruner().rstrip()}\n\n\n{ruler}{behind}"


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """Name -> syntax tree of each function, and as Class.method of each method."""
    found = {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part
    return found


def assignment(source: str, tasks=(1, 2, 3, 4)) -> str:
    """A source without the bodies of the functions taught in `tasks`; docstrings stay."""
    found, lines = functions(source), source.split("\n")  # as ast counts them, which splitlines does not
    # The syntax tree only says where a body is: cutting lines leaves comments and formatting elsewhere as they are.
    # From the end on, so that line numbers stay right.
    for name, (task, what, given) in reversed(TAUGHT.items()):
        if task in tasks:
            assert ast.get_docstring(found[name]), f"{name} has no docstring to say what is to be written"
            doc = found[name].body[0]
            hints = ["# Given, in no order:", *(f"#     {line}" for line in given.splitlines())]
            stub = [*(hints if given else []), f'raise NotImplementedError("Task {task}: {what}")']
            lines[doc.end_lineno : found[name].end_lineno] = [" " * doc.col_offset + line for line in stub]
    end = ast.parse(source).body[0].end_lineno  # of the file's docstring
    lines[end:end] = RULES.rstrip("\n").split("\n")
    return "\n".join(lines)


def task_of(item) -> int:
    """The task that a test belongs to; 0: none. Of the families of models LLaVA is enough."""
    family = getattr(item, "callspec", None) and item.callspec.params.get("name", "llava-clip")
    return ORDER.get(item.originalname, 0) if family in (None, "llava-clip") else 0


class Outcome:
    """A plugin of pytest that takes down for each test its name, its task, and why it failed, "" if it passed."""

    def __init__(self, student: Path, tasks, first: bool):
        self.student, self.tasks, self.first, self.tests = student, tasks, first, []

    def pytest_collection_modifyitems(self, items):
        chosen = [item for item in items if task_of(item) in self.tasks]
        items[:] = sorted(chosen, key=lambda item: list(ORDER).index(item.originalname))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" or (call.excinfo and not report.skipped):
            why = explain(call.excinfo.value, self.student) if call.excinfo and not report.skipped else ""
            self.tests.append((item.originalname, task_of(item), why))
            if why and self.first:
                item.session.shouldstop = "one example at a time"
        return report

    def pytest_collectreport(self, report):
        self.tests += [("import", 0, str(report.longrepr).strip())] if report.failed else []


def explain(error: BaseException, student: Path) -> str:
    """Why a test failed, without the test's text: its message, the example that was drawn, the student's line."""
    while getattr(error, "exceptions", ()):  # several examples, failing in several ways
        error = error.exceptions[0]
    message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    for note in getattr(error, "__notes__", []):
        if note.startswith("Falsifying") and "data=data(" not in note:
            message += "\n" + (note if len(note) < 1500 else note[:1500] + " ...")
    places = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == student]
    if places and not isinstance(error, AssertionError):
        message += f"\n{student.name}, line {places[-1].lineno}, in {places[-1].name}: {places[-1].line}"
    return message or "an assertion without a message"


def run_pytest(plugin, *options) -> None:
    """Collect FILES and run what the plugin chooses, in silence."""
    more = ["-q", "--tb=no", "--assert=plain", "-pno:cacheprovider", "-pno:warnings", f"--rootdir={ROOT}"]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*(str(ROOT / name) for name in FILES), *more, *options], [plugin])


def run(file: Path, tasks, seed=None, first=False) -> list[tuple[str, int, str]]:
    """Test a student's file: [(test, task, why it failed, or "")]."""
    os.environ |= {"LUVC_MODULE": str(file), "LUVC_PROFILE": "quick" if seed is None else "seeded"}
    outcome = Outcome(file.resolve(), tasks, first)
    run_pytest(outcome, *([] if seed is None else [f"--hypothesis-seed={seed}"]))
    return outcome.tests


def show(tests, tasks) -> str:
    """The rubric, filled in."""
    lines, total = [], []
    for task in tasks:
        groups = []
        for title, (worth, names) in RUBRIC[task].items():
            passed = [not why for name, _, why in tests if name in names]
            groups.append((worth * sum(passed) / max(1, len(passed)), worth, title))
        points, full = (sum(group[i] for group in groups) for i in (0, 1))
        lines.append(f"Task {task}: {points:.1f} of {full}")
        lines += ["  {:4.1f} of {:2d}  {}".format(*group) for group in groups]
        total += groups
    points, full = (sum(group[i] for group in total) for i in (0, 1))
    return "\n".join([*lines, f"Total: {points:.1f} of {full}"])


def main(argv=None) -> int:
    """Returns the exit code: 0, 1 if a test failed, or 2 after one line about what was wrong."""
    parser = argparse.ArgumentParser("assignment.py", description="luvc.py as an assignment in four tasks.")
    parser.add_argument("file", type=Path, metavar="student.py")
    parser.add_argument("--task", type=int, choices=RUBRIC, action="append", help="test this task alone")
    parser.add_argument("--mark", action="store_true", help="print points")
    parser.add_argument("--seed", type=int, help="draw other examples than students have")
    args = parser.parse_args(argv)
    tasks = args.task or list(RUBRIC)
    try:
        if not args.mark and not args.task:
            with open(args.file, "x", encoding="utf-8") as stream:  # "x" never overwrites
                stream.write(assignment(solved()))
            script = os.path.relpath(Path(__file__))
            print(f"{len(TAUGHT)} functions to write. Test task 1: python {script} {args.file} --task 1")
            return 0
        compile(args.file.read_text(encoding="utf-8"), str(args.file), "exec")
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"assignment.py: error: {args.file}: {reason}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    tests = run(args.file, tasks, args.seed, first=not args.mark)
    failed = [(name, why) for name, _, why in tests if why]
    if args.mark:
        print(show(tests, tasks))
        for name, why in failed:
            print(f"  {name}: {' '.join(why.split())[:160]}")
    elif failed:
        print(f"{failed[0][0]} failed, after {len(tests) - 1} tests that pass:\n\n{failed[0][1]}")
    else:
        print(f"Task {', '.join(map(str, tasks))}: all {len(tests)} tests pass.")
    print(f"({time.perf_counter() - start:.0f} seconds)")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
