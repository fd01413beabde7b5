"""Check that our own command is named so that a shell in the same folder runs it."""

import sys
from pathlib import Path

import pytest

from fuselm.system import own_command


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    path = tmp_path / ".venv" / "bin" / "fuselm"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    return path


def test_a_script_outside_of_path_is_named_by_its_path(script, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    assert own_command.write_command("inspect", "runs/my run") == ".venv/bin/fuselm inspect 'runs/my run'"


def test_a_script_on_path_is_named_alone(script, monkeypatch):
    monkeypatch.setenv("PATH", str(script.parent))
    assert own_command.write_command("run", Path("a.yaml")) == "fuselm run a.yaml"


def test_another_script_on_path_is_not_taken_for_this_one(script, monkeypatch, tmp_path):
    other = tmp_path / "other" / "fuselm"
    other.parent.mkdir()
    other.write_bytes(script.read_bytes())
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert own_command.write_command() == ".venv/bin/fuselm"


def test_a_module_is_named_with_its_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/fuselm/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert own_command.write_command("doctor") == "bin/python -m fuselm doctor"


def test_python_that_called_the_library_names_the_command_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert own_command.write_command("doctor") == "fuselm doctor"
