"""Every benchmark starts as a command of its own, and every name of ours that code imports is there."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path.name for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_says_what_it_takes(name):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    package = str(Path(importlib.import_module("fuselm").__file__).parents[1])
    run = subprocess.run(
        [sys.executable, f"benchmarks/{name}", "--help"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "usage:" in run.stdout, run.stderr


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_every_imported_name_of_ours_is_there(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fuselm":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
