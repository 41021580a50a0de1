"""The assignment: what students get, that a solution from the docstrings alone passes, that wrong ones fail.

Most of a run of the tests would be imports and collection. So one process does these once, and forks for each variant.
"""

import ast
import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from assignment import (
    FILES,
    ORDER,
    ROOT,
    RUBRIC,
    RULES,
    TAUGHT,
    assignment,
    explain,
    functions,
    in_order,
    main,
    task_of,
)
from wrong import SOLUTION, WRONG

SOURCE = (ROOT / "luvc.py").read_text(encoding="utf-8")


class Server:
    """A plugin of pytest: runs tests of variants as they are asked for, {"task", "functions": name -> text, "first"} on
    a line of standard input, each in a process of its own. Answers [[test, task, why it failed or ""] ...]."""

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.originalname in ORDER), key=in_order)

    def pytest_runtestloop(self, session):
        for line in sys.stdin:
            reader, writer = os.pipe()
            if os.fork() == 0:
                os.close(reader)
                answer = json.dumps(self.run(session.items, **json.loads(line)))
                with os.fdopen(writer, "w") as stream:
                    stream.write(answer)
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as stream:
                answer = stream.read()
            os.wait()
            print(answer or '"the process died"', file=self.out, flush=True)
        return True

    def run(self, items, tasks, functions, first):
        from _pytest.runner import call_and_report

        luvc, student = sys.modules["luvc"], Path("student.py").resolve()
        for name, text in functions.items():
            kind, _, method = name.rpartition(".")
            exec(compile(text, str(student), "exec"), vars(luvc))
            made = getattr(luvc, method)
            if kind:  # a method: it was made in the module
                setattr(getattr(luvc, kind), method, made)
            for module in [sys.modules[Path(file).stem] for file in FILES]:
                if hasattr(module, name):
                    setattr(module, name, made)
        out, self.why = [], ""
        for item in items:
            if task_of(item) not in tasks:
                continue
            self.why = ""
            for when in ("setup", "call", "teardown"):
                if when != "call" or not self.why:
                    call_and_report(
                        item, when, log=False, **({"nextitem": None} if when == "teardown" else {})
                    )
            out.append((item.originalname, task_of(item), self.why))
            if self.why and first:
                break
        return out

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo and not report.skipped:
            self.why = self.why or explain(call.excinfo.value, Path("student.py").resolve()) or "no reason"
        return report

    @staticmethod
    def serve():
        server = Server()
        server.out = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        options = ["-q", "--tb=no", "--assert=plain", "-s", "-pno:cacheprovider", f"--rootdir={ROOT}"]
        marks = " or ".join(f"task{n}" for n in RUBRIC)
        pytest.main([*(str(ROOT / name) for name in FILES), "-m", marks, *options], [server])


@pytest.fixture(scope="module")
def run():
    """(tasks, {function: text}, first) -> [(test, task, why it failed or "")]. Other functions are the reference's."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    env = os.environ | {"LUVC_PROFILE": "quick", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = {key: value for key, value in env.items() if key not in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")}
    command = [sys.executable, "-c", "from test_assignment import Server; Server.serve()"]
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), env.get("PYTHONPATH", "")])
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True) as server:

        def ask(tasks, functions, first=False):
            request = {"tasks": tasks, "functions": functions, "first": first}
            print(json.dumps(request), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, "the process that runs the tests has ended"
            return json.loads(answer)

        yield ask


def stub(name):
    """The text of a function that is not written yet."""
    raises = f'raise NotImplementedError("Task {TAUGHT[name][0]}: ...")'
    return f"def {name.rpartition('.')[2]}(*args, **kwargs):\n    {raises}"


@pytest.mark.parametrize("tasks", [(1, 2, 3, 4), (2,), (3,), (4,)])
def test_stub_fails_its_tests_as_not_implemented(tasks, run):
    """Catches: a test that passes without the function that it is about, or one that carries too early a task."""
    names = [name for name, (task, *_) in TAUGHT.items() if task in tasks]
    outcome = run([n for n in RUBRIC if n <= max(tasks)], {name: stub(name) for name in names})
    assert {task for _, task, _ in outcome} == set(range(1, max(tasks) + 1))
    for test, task, why in outcome:
        # Without anything, a test meets the first gap on its way; with all else written, its own.
        raised = [n for n in tasks if f"Task {n}: " in why]
        if task in tasks:
            assert raised and raised[0] <= task, f"{test} does not fail for lack of its task:\n{why}"
        else:
            assert not why, f"{test} fails for lack of a later task:\n{why}"


@pytest.mark.parametrize("task", RUBRIC)
def test_a_solution_from_the_docstrings_passes(task, run):
    """Catches: a test that checks what only the reference does."""
    outcome = run([task], {name: text for name, text in SOLUTION.items() if TAUGHT[name][0] == task})
    assert outcome and not [(test, why) for test, _, why in outcome if why]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[f"{name}-{what}" for name, what, *_ in WRONG])
def test_wrong_solution_fails_its_task(number, run):
    """Catches: tests that let a typical mistake through, or that do not say what was wrong."""
    name, what, *changes = WRONG[number]
    text = SOLUTION[name]
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(old) == 1, f"{name}, {what}: found {text.count(old)} times: {old}"
        text = text.replace(old, new)
    outcome = run([TAUGHT[name][0]], {name: text}, first=True)
    assert any(why for *_, why in outcome), f"{name}, {what}: passes all {len(outcome)} tests of its task"


def test_rubric_names_every_test():
    """Catches: a test without points, points without a test."""
    marked = {task: set() for task in RUBRIC}
    for file in FILES[:2]:
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
            for task in RUBRIC:
                every = task == 4 and {"every_family", "merging_family"} & set(marks)
                if f"pytest.mark.task{task}" in marks or every:
                    marked[task].add(node.name)
    marked[2].add("test_signposts_say_what_was_merged")
    for task, groups in RUBRIC.items():
        names = [name for *_, tests in groups for name in tests]
        assert len(names) == len(set(names)) and set(names) == marked[task], f"task {task}"
    assert sum(points for groups in RUBRIC.values() for _, points, _ in groups) == 100


def test_assignment_is_luvc_without_the_bodies(tmp_path, capsys):
    """Catches: docstrings or other code lost, hints left, a file of the student overwritten."""
    file = tmp_path / "student.py"
    assert main([str(file)]) == 0 and "--task 1" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert text == assignment(SOURCE) and RULES.strip() in text
    difference = difflib.unified_diff(SOURCE.split("\n"), text.split("\n"), n=0, lineterm="")
    new = [line[1:].strip() for line in difference if line.startswith("+") and not line.startswith("+++")]
    stubs = [line for line in new if line and not line.startswith("#")]
    assert len(stubs) == len(TAUGHT) and all(
        line.startswith("raise NotImplementedError") for line in stubs
    ), stubs
    before, after = functions(SOURCE), functions(text)
    assert list(before) == list(after) and list(TAUGHT) == [name for name in before if name in TAUGHT]
    assert [task for task, *_ in TAUGHT.values()] == sorted(task for task, *_ in TAUGHT.values())
    for name, node in before.items():
        assert ast.get_docstring(node) == ast.get_docstring(after[name]), f"{name} lost its docstring"
        changed = ast.dump(node) != ast.dump(after[name])
        assert changed == (name in TAUGHT), f"{name} {'changed' if changed else 'kept its body'}"
    file.write_text("a week of work")
    for name, says in [
        (file, "File exists"),
        (ROOT / "luvc.py", "itself"),
        (tmp_path / "no" / "x.py", "No such"),
    ]:
        assert main([str(name)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and says in lines[0], lines
    assert file.read_text() == "a week of work" and (ROOT / "luvc.py").read_text(encoding="utf-8") == SOURCE


def command(*argv):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("LUVC_MODULE", None)
    done = [sys.executable, str(ROOT / "tests" / "assignment.py"), *argv]
    return subprocess.run(done, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


def test_marks_and_messages(tmp_path):
    """From the outside: the stub, a half-written file, one that does not compile. Catches: points for nothing, an
    answer that is printed, a seed without effect."""
    file = tmp_path / "student.py"
    file.write_text(assignment(SOURCE, tasks=(1,)), encoding="utf-8")
    done = command(str(file), "--mark", "--task", "2", "--task", "1")
    assert "Task 1: 0.0 of 25" in done.stdout and done.returncode == 1, done
    half = SOURCE.replace("math.floor(shrunk + 0.5)", "math.floor(shrunk)")
    assert half != SOURCE, "merge_plan is written in another way now: change this test"
    file.write_text(half, encoding="utf-8")
    done = command(str(file), "--task", "2")
    said = "test_plan_by_hand failed, after 0 tests that pass:\n\nmerge_plan(9, 9, 0.25, 3): got [(2, 9, 6)"
    assert said in done.stdout and "assert" not in done.stdout and done.returncode == 1, done
    done = command(str(file), "--mark", "--task", "2", "--seed", "3")
    assert (
        "0.0 of  3  the plan by hand" in done.stdout and "3.0 of  3  following tokens by hand" in done.stdout
    ), done
    file.write_text("def merge_axis(:")
    done = command(str(file), "--mark")
    assert done.returncode == 2 and "invalid syntax" in done.stderr and len(done.stderr.splitlines()) == 1, (
        done
    )


def test_missing_student_file_is_said_in_one_line(tmp_path, monkeypatch):
    """Catches: a traceback, or the reference tested in silence, where LUVC_MODULE names no file."""
    import test_luvc

    monkeypatch.setenv("LUVC_MODULE", str(tmp_path / "nothing.py"))
    with pytest.raises(
        pytest.Collector.CollectError, match=r"LUVC_MODULE=.*nothing\.py: no such Python file"
    ):
        test_luvc.module_under_test()
