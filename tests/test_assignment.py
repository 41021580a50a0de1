"""The assignment: what students get, that a solution from the docstrings alone passes, that wrong ones fail.

Most of a run of the tests would be imports and collection. So one process does these once, and forks for each variant.
"""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import assignment as course
import pytest
from assignment import ROOT, RUBRIC, TAUGHT
from wrong import SOLUTION, WRONG

STUDENT = Path("student.py").resolve()


class Server(course.Outcome):
    """Runs the tests of variants as they are asked for, {"tasks", "functions": name -> text, "first"} on a line of
    standard input, each in a process of its own. Answers [[test, task, why it failed or ""] ...]."""

    def pytest_runtestloop(self, session):
        for line in sys.stdin:
            if os.fork() == 0:
                signal.alarm(300)  # a variant that never ends is ended
                try:
                    self.answer(session.items, **json.loads(line))
                except BaseException as error:
                    print(json.dumps([["none", 0, repr(error)]]), file=self.out, flush=True)
                os._exit(0)
            if os.wait()[1]:
                print('[["none", 0, "the process died"]]', file=self.out, flush=True)
        return True

    def answer(self, items, tasks, functions, first):
        from _pytest.runner import runtestprotocol

        luvc = sys.modules["luvc"]
        for name, text in functions.items():
            kind, _, method = name.rpartition(".")
            exec(compile(text, str(STUDENT), "exec"), vars(luvc))
            made, modules = getattr(luvc, method), [sys.modules[Path(file).stem] for file in course.FILES]
            for place in [getattr(luvc, kind)] if kind else modules:
                if hasattr(place, method):
                    setattr(place, method, made)
        for item in items:
            if course.task_of(item) in tasks and not (first and self.tests and self.tests[-1][2]):
                runtestprotocol(item, log=False, nextitem=None)
        print(json.dumps(self.tests), file=self.out, flush=True)

    @classmethod
    def serve(cls):
        server = cls(STUDENT, list(RUBRIC), False)
        server.out = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        course.run_pytest(server, "-s")


@pytest.fixture(scope="module")
def run():
    """(tasks, {function: text}, first) -> [(test, task, why it failed or "")]. Other functions are the reference's."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"LUVC_PROFILE": "quick", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "from test_assignment import Server; Server.serve()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as server:

        def ask(tasks, functions, first=False):
            request = {"tasks": tasks, "functions": functions, "first": first}
            print(json.dumps(request), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, "the process that runs the tests has ended"
            return json.loads(answer)

        yield ask


@pytest.mark.parametrize("tasks", [(1, 2, 3, 4), (2,), (3,), (4,)])
def test_stub_fails_its_tests_as_not_implemented(tasks, run):
    """Catches: a test that passes without the function that it is about, or that stands under too early a task."""
    raises = '(*args, **kwargs):\n    raise NotImplementedError("Task {}: ...")'
    due = {name: n for name, (n, *_) in TAUGHT.items() if n in tasks}
    stubs = {name: f"def {name.split('.')[-1]}{raises.format(n)}" for name, n in due.items()}
    outcome = run([n for n in RUBRIC if n <= max(tasks)], stubs)
    assert {test for test, *_ in outcome} == {test for test, n in course.ORDER.items() if n <= max(tasks)}
    for test, task, why in outcome:
        # Without anything, a test meets the first gap on its way; with all else written, its own.
        raised = [n for n in tasks if f"Task {n}: " in why]
        assert bool(raised) == bool(why) == (task in tasks), f"{test}, without tasks {tasks}:\n{why}"
        assert not raised or raised[0] <= task, f"{test} fails for lack of a later task:\n{why}"


@pytest.mark.parametrize("task", RUBRIC)
def test_a_solution_from_the_docstrings_passes(task, run):
    """Catches: a test that checks what only the reference does."""
    outcome = run([task], {name: text for name, text in SOLUTION.items() if TAUGHT[name][0] == task})
    assert outcome and not [(test, why) for test, _, why in outcome if why]


@pytest.mark.parametrize("name, what, changes", WRONG, ids=[f"{name}-{what}" for name, what, _ in WRONG])
def test_wrong_solution_fails_its_task(name, what, changes, run):
    """Catches: tests that let a typical mistake through."""
    text, (task, *_) = SOLUTION[name], TAUGHT[name]
    for old, new in changes:
        assert text.count(old) == 1, f"{name}, {what}: found {text.count(old)} times: {old}"
        text = text.replace(old, new)
    # What gather puts aside for scatter is everybody's own choice: both are from the same solution.
    whole = {name: text for name, text in SOLUTION.items() if name.startswith("SmallPruner") and task == 4}
    outcome = run([task], whole | {name: text}, first=True)
    assert any(why for *_, why in outcome), f"{name}, {what}: passes all {len(outcome)} tests of its task"


def test_assignment_is_luvc_without_the_bodies(tmp_path, capsys):
    """Catches: docstrings or other code lost, hints left, a file of the student overwritten."""
    file, source = tmp_path / "student.py", course.solved()
    assert course.main([str(file)]) == 0 and "--task 1" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    new = set(text.split("\n")) - set(source.split("\n"))
    stubs = [line for line in new if line.strip() and not line.strip().startswith("#")]
    assert len(stubs) == len(TAUGHT) and course.RULES.strip() in text, stubs
    before, after = course.functions(source), course.functions(text)
    assert list(before) == list(after) and list(TAUGHT) == [name for name in before if name in TAUGHT]
    for name, node in before.items():
        assert ast.get_docstring(node) == ast.get_docstring(after[name]), f"{name} lost its docstring"
        assert (ast.dump(node) != ast.dump(after[name])) == (name in TAUGHT), name
    file.write_text("a week of work")
    for name, says in [(file, "File exists"), (tmp_path / "no" / "x.py", "No such")]:
        assert course.main([str(name)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and says in lines[0], lines
    assert file.read_text() == "a week of work"
    assert sum(points for groups in RUBRIC.values() for points, _ in groups.values()) == 100


def test_marks_and_messages(tmp_path):
    """From the outside: a stub, a half-written file, one that does not compile. Catches: points for nothing, an answer
    that is printed, a seed without effect."""
    file, source = tmp_path / "student.py", course.solved()

    def says(text, *argv):
        file.write_text(text, encoding="utf-8")
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        env.pop("LUVC_MODULE", None)
        command = [sys.executable, str(ROOT / "tests" / "assignment.py"), str(file), *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
        return done.returncode, done.stdout + done.stderr

    code, out = says(course.assignment(source, tasks=(1,)), "--mark", "--task", "2", "--task", "1")
    assert code == 1 and "Task 1: 0.0 of 25" in out, out
    half = source.replace("math.floor(shrunk + 0.5)", "math.floor(shrunk)")
    assert half != source, "merge_plan is written in another way now: change this test"
    code, out = says(half, "--task", "2")
    said = "test_plan_by_hand failed, after 0 tests that pass:\n\nmerge_plan(9, 9, 0.25, 3): got [(2, 9, 6)"
    assert code == 1 and said in out and "assert" not in out, out
    _, out = says(half, "--mark", "--task", "2", "--seed", "3")
    assert "0.0 of  3  the plan by hand" in out and "3.0 of  3  following tokens by hand" in out, out
    code, out = says("def merge_axis(:", "--mark")
    assert code == 2 and "invalid syntax" in out and len(out.splitlines()) == 1, out
