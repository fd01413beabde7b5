"""Names of code on pages: files, functions and options that a page cites are there."""

import ast
import re
import subprocess
from pathlib import Path

import markdown_pages
import pytest
from markdown_pages import ROOT

PAGES = markdown_pages.find_pages()
HISTORY = {Path("CHANGELOG.md")}  # names what was
CODE = re.compile(r"`([^`]+)`")
TRACKED = set(
    subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
)
# Files and names that the repository does not hold: made by a run or a model's author, or those of other projects.
NOT_OURS = re.compile(
    r"examples/corpus/larger\.jsonl|tokenizer\.json|config\.json|\w*_config\.json|part-\w+\.parquet|"
    r"(manifest|summary|study|run|report|config|precision|fingerprints|results|generation_config)\.\w+"
)


def read_names() -> dict[str, set[str]]:
    """Return the names that each module of ours defines, by the module's last name; several may share one."""
    names: dict[str, set[str]] = {}
    for path in [*(ROOT / "src" / "fuselm").rglob("*.py"), *(ROOT / "tests" / "support").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = names.setdefault(path.stem, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
    return names


FILES = {"py", "json", "yaml", "arrow"}  # what a cited file may end with
NAMES = read_names()
OPTIONS = set(re.findall(r"`(?:study\.)?([\w.]+)`", markdown_pages.read(Path("docs/options.md"))))


def find_code(page: Path) -> list[tuple[int, str]]:
    return [(number, code) for number, text in markdown_pages.paragraphs(page) for code in CODE.findall(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=str)
def test_cited_files_are_there(page):
    basenames = {Path(path).name for path in TRACKED}
    missing = []
    for number, code in find_code(page):
        path = re.match(r"(?:tests|benchmarks|examples|src|docs)/[\w./-]+\w", code)
        if path and not NOT_OURS.search(code):
            there = path[0] in TRACKED or any(name.startswith(f"{path[0]}/") for name in TRACKED)
            missing += [] if there else [f"{page}:{number}: {code}"]
        elif re.fullmatch(r"\w+\.py", code) and code not in basenames:
            missing.append(f"{page}:{number}: {code}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=str)
def test_cited_functions_and_options_are_there(page):
    """`module.name` is a name of that module of ours, or an option of a run file."""
    missing = []
    for number, code in find_code(page):
        cited = re.fullmatch(r"([a-z_]+)\.([A-Za-z_]+)(?:[:=(].*)?", code)
        if cited and cited[1] in NAMES and f"{cited[1]}.{cited[2]}" not in OPTIONS and not NOT_OURS.fullmatch(code):
            missing += [] if cited[2] in NAMES[cited[1]] | FILES else [f"{page}:{number}: {code}"]
    assert not missing, "\n".join(missing)
