"""The house rules that a reader relies on: where things are, which way imports point, and how docstrings begin."""

import ast
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fuselm

PACKAGE = Path(fuselm.__file__).parent
TESTS = Path(__file__).parent
# Each package imports only those behind it.
ORDER = [
    "cli",
    "runs",
    "training",
    "results",
    "fusion",
    "alignment",
    "sources",
    "stores",
    "documents",
    "models",
    "system",
]
MOST_ENTRIES, MOST_LINES = 14, 400
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ROOT = TESTS.parent
DOCUMENTED = [
    path
    for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "examples", TESTS / "support")
    for path in sorted(folder.rglob("*.py"))
]
# Words that open a fragment, not a sentence that says what something does.
FRAGMENTS = re.compile(
    r"(an?|the|of|but|for|those|these|what|whether|how|why|which|where|it|its|each|every|one|all)\b", re.IGNORECASE
)


def read(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def imported_packages(module: Path) -> Iterator[str]:
    """Yield the packages of ours that a module imports, at its top and inside its functions."""
    for node in ast.walk(read(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fuselm":
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fuselm."))


def test_the_folder_of_the_package_is_taken_in_at_a_glance():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    assert {entry for entry in entries if (PACKAGE / entry).is_dir()} == set(ORDER)


@pytest.mark.parametrize("module", [m for m in MODULES if len(m.parts) > 1], ids=str)
def test_imports_point_one_way(module):
    place = ORDER.index(module.parts[0])
    upwards = {package for package in imported_packages(module) if package in ORDER[:place]}
    assert not upwards, f"{module} imports {', '.join(upwards)}, which stand above it"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_is_short(module):
    lines = (PACKAGE / module).read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES, f"{module} has {lines} lines"


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    opened = {
        getattr(node, "name", str(path)): docstring.split("\n")[0]
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node))
    }
    assert not {name: line for name, line in opened.items() if FRAGMENTS.match(line)}


def test_every_package_says_what_it_is_for():
    packages = [module for module in MODULES if module.name == "__init__.py"]
    assert [str(module) for module in packages if len(ast.get_docstring(read(module)) or "") < 80] == []


def test_tests_mirror_the_packages():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert set(ORDER) <= folders


def test_no_test_imports_another():
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("test_")], f"{path.name}: share through tests/support"


def test_every_name_is_defined():
    """Read what ruff finds undefined: jaxtyping's axes, in strings, are; anything outside of a string is a mistake."""
    folders = ["src", "tests", "benchmarks", "examples", "docs"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    found = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    undefined = []
    for problem in json.loads(found.stdout):
        place = problem["location"]["row"], problem["location"]["column"] - 1
        with open(problem["filename"], encoding="utf-8") as file:
            strings = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.STRING]
        if not any(token.start <= place < token.end for token in strings):
            undefined.append(f"{problem['filename']}:{place[0]}: {problem['message']}")
    assert not undefined


def test_nothing_heavy_is_imported_with_the_package():
    code = "import sys, fuselm, fuselm.cli.main; print([m for m in ('numpy', 'torch', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_package_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "fuselm", "--help"], capture_output=True, text=True, check=True)
    assert "fuse" in run.stdout
