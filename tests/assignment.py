"""luvc.py as a course assignment: four tasks, nine functions. docs/teaching.md is the teacher's page.

    python tests/assignment.py student.py                      # write luvc.py without the nine bodies
    python tests/assignment.py student.py --task 1             # what is wrong with task 1: one example at a time
    python tests/assignment.py student.py --mark               # points, with the examples that students have
    python tests/assignment.py student.py --mark --seed 7      # points, with other examples

The tests are those of test_luvc.py and tests/ that carry a mark task1 to task4. A test's mark is the latest task that
it needs, so a mistake in one task fails no test of an earlier one.
"""

import argparse
import ast
import contextlib
import io
import os
import sys
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_luvc.py", "tests/test_functions.py", "tests/test_encoder.py"]

TAUGHT = {  # function or Class.method -> (task, what is to be written, arithmetic that is given); in luvc.py's order
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
    "Prompt.prune": (
        4,
        "prune for the next layer",
        "self.select()  # at the end, if anything changed",
    ),
    "run_layer": (
        4,
        "gather the rows that are kept, run the layer, scatter its output back",
        "prompt: Prompt = kwargs.pop('prompt')\n"
        "take(hidden, prompt.index)  # unless the index is None\n"
        "kwargs | enter(layer, number, prompt, x, kwargs)  # what `plain` gets beside x\n"
        "torch.where(prompt.here[..., None] > 0, out, x)  # if prompt.ragged\n"
        "put(hidden, prompt.index, out)",
    ),
}

RULES = """
# The assignment: write the nine functions that raise NotImplementedError, from their docstrings. Whatever a docstring
# does not say otherwise, these rules hold for all of them, and tests check them:
#
#   * An input is never written to, and neither is the result of an earlier call.
#   * The same input gives the same result; the global random state is neither read nor set.
#   * Results can be differentiated with respect to tokens and sizes, where these are floating.
#   * Half precision is too coarse for sums, norms and similarities: compute in float32 (float64 for float64, unless the
#     docstring says float32), and return the dtype that the docstring says.
#   * Results are on the device of the inputs. No number is read on the host (`.item()`, `.tolist()`, `bool(tensor)`,
#     `nonzero`, a mask as an index): on a GPU the host would wait there.
#   * No Python loop over samples, lines, pictures of one group, or tokens: the number of torch operations is the same
#     for few and for many. No table of all pairs of tokens, except in `inherit`.
"""

RUBRIC = {  # task -> [(what is tested, points, tests)]
    1: [
        ("small cases by hand", 5, ["test_merge_by_hand"]),
        ("any grid, against plain loops", 8, ["test_merge_equals_plain_loops"]),
        ("precision and dtypes", 4, ["test_merge_computes_in_float32_or_better", "test_merge_keeps_dtypes"]),
        ("gradients of tokens and sizes", 3, ["test_merge_has_gradients"]),
        ("inputs, random state and earlier results left alone", 2, ["test_merge_leaves_no_trace"]),
        ("cost: no loops, no waiting", 2, ["test_merge_costs_what_it_should"]),
        ("errors", 1, ["test_merge_refuses_bad_input"]),
    ],
    2: [
        ("the plan by hand", 3, ["test_plan_by_hand"]),
        ("any plan", 3, ["test_plan_alternates_and_arrives"]),
        ("following tokens by hand", 3, ["test_follow_by_hand"]),
        ("following tokens over any two merges", 3, ["test_follow_equals_plain_loops"]),
        ("sizes arrive at the right slots", 1, ["test_signposts_say_what_was_merged"]),
        ("cost, and nothing left behind", 1, ["test_follow_leaves_no_trace_and_costs_what_it_should"]),
        ("errors", 1, ["test_plan_refuses_bad_input"]),
    ],
    3: [
        ("the filter by hand", 3, ["test_low_pass_by_hand"]),
        ("the filter on any sequence", 4, ["test_low_pass_equals_the_sum_of_waves"]),
        ("dtypes, dimensions, gradients, scale", 3, ["test_filter_dtype_dim_gradient_and_scale"]),
        ("the score", 4, ["test_score_measures_what_it_says_anywhere", "test_score_has_a_gradient"]),
        ("the choice by hand", 3, ["test_prune_by_hand"]),
        ("the choice on any sequence", 4, ["test_prune_keeps_the_highest_scores_in_order"]),
        ("ties", 2, ["test_prune_constant_signal_is_all_ties", "test_prune_ties_up_to_rounding"]),
        ("directions, projection", 2, ["test_prune_sees_directions_only", "test_scores_in_a_projection"]),
        ("sizes that are inherited", 2, ["test_inherit_by_hand", "test_inherit_equals_plain_loops"]),
        ("their precision and gradients", 1, ["test_inherit_is_exact", "test_inherit_has_a_gradient"]),
        (
            "cost, and nothing left behind",
            1,
            ["test_pruning_leaves_no_trace", "test_pruning_costs_what_it_should"],
        ),
        ("errors", 1, ["test_pruning_refuses_bad_input"]),
    ],
    4: [
        ("Prompt.prune by hand: one picture", 5, ["test_prompt_by_hand"]),
        ("Prompt.prune by hand: a batch of pictures", 5, ["test_pictures_stand_alone_by_hand"]),
        ("what it hands on: dtype, gradients", 2, ["test_scheme_sees_the_layers_input"]),
        ("run_layer by hand", 6, ["test_one_layer_by_hand"]),
        (
            "cost, and no waiting",
            2,
            ["test_prune_costs_what_it_should", "test_layers_do_not_wait_for_the_device"],
        ),
        ("a model against the dense reference", 4, ["test_physical_equals_logical", "test_pruner_alone"]),
        (
            "batches, hidden states",
            1,
            ["test_batch_gives_what_its_samples_give", "test_hidden_states_stay_logical"],
        ),
        ("gradients of a model", 1, ["test_gradients_equal_the_references"]),
        (
            "generation: a KV cache, turns, beams",
            2,
            [
                "test_cached_generation_equals_the_reference",
                "test_decoding_with_a_cache_equals_recomputation",
                "test_turns_of_interleaved_conversations",
            ],
        ),
        (
            "kernels, reports, hooks that come out again",
            1,
            ["test_flash_attention_contract", "test_merger_alone", "test_detach_restores_the_model"],
        ),
        ("anything: random conversations", 1, ["test_any_conversation_equals_the_reference"]),
    ],
}


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """Name -> syntax tree of each function, and as Class.method of each method."""
    found = {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part
    return found


def stub_of(name: str, indent: str) -> list[str]:
    """The lines that stand for the body of a taught function."""
    task, what, given = TAUGHT[name]
    lines = [f"    {line}" for line in given.splitlines()]
    lines = [f"{indent}# {line}" for line in (["Given, in no order:", *lines] if lines else [])]
    return [*lines, f'{indent}raise NotImplementedError("Task {task}: {what}")']


def assignment(source: str, tasks=(1, 2, 3, 4)) -> str:
    """The source of luvc.py without the bodies of the functions taught in `tasks`; docstrings stay."""
    found, lines = functions(source), source.split("\n")  # as ast counts them, which splitlines does not
    # The syntax tree only says where a body is: cutting lines leaves comments and formatting elsewhere as they are.
    # From the end on, so that line numbers stay right.
    for name, (task, *_) in reversed(TAUGHT.items()):
        if task in tasks:
            assert ast.get_docstring(found[name]), f"{name} has no docstring to say what is to be written"
            doc = found[name].body[0]
            lines[doc.end_lineno : found[name].end_lineno] = stub_of(name, " " * doc.col_offset)
    end = ast.parse(source).body[0].end_lineno  # of the file's docstring
    lines[end:end] = RULES.rstrip("\n").split("\n")
    return "\n".join(lines)


class Outcome:
    """A plugin of pytest that notes for each test its name, its task, and why it failed, "" if it passed."""

    def __init__(self, student: Path, first: bool):
        self.student, self.first, self.tests = student, first, []

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.originalname in ORDER), key=in_order)

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
        if report.failed:
            self.tests.append(("import", 0, str(report.longrepr).strip()))


# Tests run in the order of the rubric: small cases come first.
ORDER = [name for groups in RUBRIC.values() for _, _, names in groups for name in names]


def in_order(item) -> int:
    return ORDER.index(item.originalname)


def task_of(item) -> int:
    """The latest task that a test needs; 0: none."""
    return max([0, *(int(mark.name[4:]) for mark in item.iter_markers() if mark.name.startswith("task"))])


def explain(error: BaseException, student: Path) -> str:
    """Why a test failed, without the test's text: its message, the example that was drawn, the place in the student's
    file."""
    while getattr(error, "exceptions", ()):  # several examples, failing in several ways
        error = error.exceptions[0]
    message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    for note in getattr(error, "__notes__", []):
        if note.startswith("Falsifying") and "data=data(" not in note:
            message += "\n" + (note if len(note) < 1500 else note[:1500] + " ...")
    places = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == student]
    if places and not isinstance(error, AssertionError):
        message += f"\n{student.name}, line {places[-1].lineno}, in {places[-1].name}: {places[-1].line}"
    return message


def run(file: Path, tasks, seed=None, first=False) -> list[tuple[str, int, str]]:
    """Test a student's file: [(test, task, why it failed, or "")]."""
    os.environ |= {"LUVC_MODULE": str(file), "LUVC_PROFILE": "quick" if seed is None else "seeded"}
    outcome, options = Outcome(file.resolve(), first), ["-m", " or ".join(f"task{n}" for n in tasks)]
    options += ["-q", "--tb=no", "--assert=plain", "-pno:cacheprovider", "-pno:warnings", f"--rootdir={ROOT}"]
    options += [] if seed is None else [f"--hypothesis-seed={seed}"]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*(str(ROOT / name) for name in FILES), *options], [outcome])
    return outcome.tests


def show(tests, tasks) -> str:
    """The rubric, filled in."""
    lines, all_points, all_full = [], 0.0, 0
    for task in tasks:
        points, full = 0.0, sum(worth for _, worth, _ in RUBRIC[task])
        groups = []
        for title, worth, names in RUBRIC[task]:
            results = [why for name, _, why in tests if name in names]
            got = worth * sum(not why for why in results) / len(results) if results else 0.0
            points += got
            groups.append(f"  {got:4.1f} of {worth:2d}  {title}")
        lines += [f"Task {task}: {points:.1f} of {full}", *groups]
        all_points, all_full = all_points + points, all_full + full
    return "\n".join([*lines, f"Total: {all_points:.1f} of {all_full}"])


def write(file: Path) -> None:
    """Write the student's file. Raises: OSError or ValueError; nothing is written then."""
    luvc = ROOT / "luvc.py"
    if file.resolve() == luvc:
        raise ValueError("that is the reference itself; name another file")
    with open(file, "x", encoding="utf-8") as stream:  # "x" never overwrites
        stream.write(assignment(luvc.read_text(encoding="utf-8")))


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
            write(args.file)
            print(f"{args.file}: {len(TAUGHT)} functions to write. Test task 1:")
            print(f"    python {os.path.relpath(Path(__file__))} {args.file} --task 1")
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
        name, why = failed[0]
        print(f"{name} failed, after {len(tests) - 1} tests that pass:\n\n{why}")
    else:
        print(f"Task {', '.join(map(str, tasks))}: all {len(tests)} tests pass.")
    print(f"({time.perf_counter() - start:.0f} seconds)")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
