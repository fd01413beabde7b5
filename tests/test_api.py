"""The Python API: what `dir(fuselm)` lists has types and a docstring, and every example in a docstring runs."""

import ast
import doctest
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_run

import fuselm

HIDDEN = re.compile(r"^_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Make the folder that examples run in: two models, a file of texts, a run file, and its finished run."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copytree(byte_level, folder / "models" / "target")
    shutil.copytree(sentence_piece, folder / "models" / "other")
    rows = tiny_run.short(texts)
    tiny_run.write_rows(folder / "texts.jsonl", rows)
    written = tiny_run.write(folder, target=Path("models/target"), sources={"other": Path("models/other")}, rows=rows)
    run_file = written.read_text(encoding="utf-8").replace(str(folder / "out"), "runs/mine")
    (folder / "mine.yaml").write_text(run_file.replace(str(folder) + "/", ""), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tiny_run.fuselm("run", "mine.yaml").code == 0
    return folder


def test_the_names_are_listed_and_typed():
    names = [name for name in dir(fuselm) if not HIDDEN.match(name)]
    assert set(names) == set(fuselm.__all__)
    tree = ast.parse(Path(fuselm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"fuselm.{module}" for name, module in fuselm._MODULES.items()}
    assert (Path(fuselm.__file__).parent / "py.typed").is_file()
    for name in names:
        value = getattr(fuselm, name)
        called = value.__init__ if inspect.isclass(value) else value
        unknown = [p.name for p in inspect.signature(called).parameters.values() if p.annotation is p.empty]
        assert unknown in ([], ["self"], ["self", "args", "kwargs"]), (name, unknown)


@pytest.mark.parametrize("name", ["__doc__", *fuselm.__all__])
def test_examples_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    documented = fuselm if name == "__doc__" else getattr(fuselm, name)
    docstring = inspect.getdoc(documented)
    test = doctest.DocTestParser().get_doctest(docstring, {"fuselm": fuselm}, name, None, 0)
    assert test.examples, f"fuselm.{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


def test_python_finds_what_the_command_made(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("manifest.json")}
    result = fuselm.load_run("mine.yaml", quiet=True).run()
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("manifest.json")} == before
    assert result.summary == json.loads(Path("runs/mine/summary.json").read_text(encoding="utf-8"))


def test_a_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(ValueError, match="no finished run there"):
        fuselm.load_result(tmp_path)
