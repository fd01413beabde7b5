"""The sandbox: what runs there reaches no network, no file and no process, and ends in time."""

import os
from pathlib import Path

import pytest

from fuselm.results.tasks import sandbox


@pytest.fixture(autouse=True, scope="module")
def _available():
    try:
        sandbox.check_sandbox()
    except ValueError as error:
        pytest.skip(str(error))


def run(code: str, seconds: float = 3.0):
    def execute():
        names: dict = {}
        exec(code, names)
        return names.get("result")

    return sandbox.run_sandboxed(execute, seconds=seconds)


def test_plain_results_come_back():
    assert run("result = {'a': [1, 2.5, None], 'b': 'ü'}") == {"a": [1, 2.5, None], "b": "ü"}
    assert run("import json, math; result = json.dumps(math.pi)") == "3.141592653589793"
    assert run("open('x', 'w').write('mine'); result = open('x').read()") == "mine"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("while True: pass", "longer than 1 seconds"),
        ("import time; time.sleep(30)", "longer than 1 seconds"),
        ("result = 'x' * (3 << 30)", "MemoryError"),
        ("open('x', 'w').write('a' * (2 << 20))", "File too large"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "unreachable"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "it was stopped"),
        ("result = open", "no plain data|cannot be read"),
    ],
)
def test_what_goes_too_far_fails(code, told):
    with pytest.raises(sandbox.SandboxError, match=told):
        run(code, seconds=1.0)


def test_files_outside_can_neither_be_read_nor_written(tmp_path):
    (tmp_path / "secret").write_text("s")
    for code in (
        f"open({str(tmp_path / 'secret')!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.remove({str(tmp_path / 'secret')!r})",
        f"import os; os.remove({str(Path(os.__file__))!r})",
    ):
        with pytest.raises(sandbox.SandboxError, match="PermissionError"):
            run(code)
    assert (tmp_path / "secret").read_text() == "s" and Path(os.__file__).is_file()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "1")
    assert run("import os; result = os.environ.get('SECRET_KEY')") is None


def test_a_fork_bomb_ends():
    with pytest.raises(sandbox.SandboxError):
        run("import os, time\nfor _ in range(60): os.fork()\ntime.sleep(9)", seconds=1.0)


def test_programs_are_judged_by_their_tests():
    from fuselm.results.tasks.programs import judge_completion
    from fuselm.results.tasks.suites.code_completion import describe_functions

    functions = describe_functions()
    assert len({f["prompt"] for f in functions}) == len(functions) == 60
    for function in functions[::7]:
        assert judge_completion(function, [function["answer"]]) == {"pass@1": 1.0}
        for wrong in (" None", " not a program ("):
            assert judge_completion(function, [wrong]) == {"pass@1": 0.0}


def test_every_functions_answer_passes_its_tests():
    from fuselm.results.tasks.suites.code_completion import describe_functions

    for function in describe_functions():  # ours, so they may run here
        exec(f"{function['prompt']}{function['answer']}\n{function['test']}", {})
