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
import yaml

import fuselm
from fuselm.alignment import choices as alignment_choices
from fuselm.fusion import choices as fusion_choices

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


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_what_is_shown_of_an_object_is_one_short_line(here):
    run = fuselm.load_run("mine.yaml", quiet=True)
    store = run.fuse()
    trace = store[0]
    shown = [run, store, trace, trace.distributions, fuselm.load_vocabulary("models/target"), run.run()]
    assert [repr(value).partition("(")[0] for value in shown] == [type(value).__name__ for value in shown]
    assert all(len(repr(value)) < 120 and "\n" not in repr(value) for value in shown)
    assert repr(run) == "FusionRun('runs/mine', other into models/target)"


def test_overrides_and_run_files_may_be_mappings(here):
    wanted = fuselm.load_run("mine.yaml", ["train.passes=1", "seed=2"], quiet=True).options
    given = yaml.safe_load(Path("mine.yaml").read_text(encoding="utf-8"))
    before = json.dumps(given)
    assert fuselm.load_run("mine.yaml", {"train.passes": 1, "seed": 2}, quiet=True).options == wanted
    assert fuselm.load_run(given, ["train.passes=1", "seed=2"], quiet=True).options == wanted
    assert fuselm.load_run("mine.yaml", "train.passes=1", quiet=True).options.train.passes == 1
    assert json.dumps(given) == before
    with pytest.raises(ValueError, match=r"^train\.lr: unknown option; did you mean 'learning_rate'\?$"):
        fuselm.load_run(given, {"train.lr": 1}, quiet=True)


def test_a_store_is_a_sequence_of_documents(here):
    store = fuselm.load_run("mine.yaml", quiet=True).capture()["other"]
    traces = list(store)
    assert [store[n].document for n in range(len(store))] == [t.document for t in traces] == store.documents
    assert store[-1].document == traces[-1].document
    with pytest.raises(IndexError, match=rf"document {len(store)}: the store has {len(store)}"):
        store[len(store)]
    for wrong in (lambda: store["000000"], lambda: store.read(0)):
        with pytest.raises(TypeError):
            wrong()


def test_rows_are_counted_from_both_ends(here):
    rows = fuselm.load_run("mine.yaml", quiet=True).capture()["other"][0].distributions
    last, first = len(rows) - 1, rows.row(0)
    assert rows.row(-1)[0].tolist() == rows.row(last)[0].tolist() != []
    assert rows.row(-len(rows))[0].tolist() == first[0].tolist()
    for number in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=rf"row {number}: there are {len(rows)} rows"):
            rows.row(number)


def test_a_string_or_a_path_names_a_model_wherever_one_is_needed(here):
    located = fuselm.locate_model(Path("models/target"))
    assert located == fuselm.locate_model("models/target")
    for named in ("models/target", Path("models/target")):
        assert fuselm.load_vocabulary(named).token_bytes == fuselm.load_vocabulary(located).token_bytes
        assert fuselm.load_model(named, device="cpu").config.vocab_size == located.output_size
        aligner = fuselm.Aligner("models/other", named)
        assert aligner.target.token_bytes == fuselm.load_vocabulary(located).token_bytes
    assert fuselm.load_tokenizer("runs/mine").to_str() == fuselm.load_tokenizer("runs/mine/model").to_str()
    with pytest.raises(ValueError, match=r"nowhere\.gguf: no such folder or GGUF file"):
        fuselm.load_tokenizer("nowhere.gguf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "spam"}, "method 'spam': unknown; needs one of span, "),
        ({"top_k": 0}, "top_k 0: must be 1 or more"),
    ],
)
def test_an_aligner_refuses_what_it_cannot_do(here, arguments, message):
    with pytest.raises(ValueError, match=message):
        fuselm.Aligner("models/other", "models/target", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"traces": []}, "traces: there are none; needs one for each source"),
        ({"function": "avg"}, "function 'avg': unknown; needs one of min_ce, "),
        ({"level": "sentence"}, "level 'sentence': unknown; needs one of document, window, token"),
        ({"window": 0}, "window 0, .* needs a window of 1 or more"),
        ({"prior": [1.0, 1.0]}, "prior: 2 values for 1 sources; needs one for each"),
        ({"temperatures": []}, "temperatures: 0 values for 1 sources; needs one for each"),
    ],
)
def test_fuse_refuses_what_it_cannot_do(here, arguments, message):
    trace = fuselm.load_run("mine.yaml", quiet=True).align()["other"][0]
    given = {"traces": [trace], "vocabulary_size": fuselm.locate_model("models/target").output_size} | arguments
    with pytest.raises(ValueError, match=message):
        fuselm.fuse(given.pop("traces"), **given)


def test_choices_are_named_where_they_are_made():
    for documented, names in ((fuselm.Aligner, alignment_choices.METHODS), (fuselm.fuse, fusion_choices.FUNCTIONS)):
        assert not [name for name in names if name not in inspect.getdoc(documented)]


def test_texts_may_be_several_files_whose_fields_have_other_names(here):
    scores = fuselm.score_texts("models/target", "texts.jsonl", quiet=True)
    rows = [json.loads(line) for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    renamed = [{"body": row["text"], "lang": row["domain"]} for row in rows]
    tiny_run.write_rows(here / "a.jsonl", renamed[:7])
    tiny_run.write_rows(here / "b.jsonl", renamed[7:])
    columns = {"text": "body", "domain": "lang"}
    assert fuselm.score_texts("models/target", ["a.jsonl", Path("b.jsonl")], columns=columns, quiet=True) == scores
    command = "evaluate", "models/target", "--texts", "?.jsonl", "--column", "text=body", "--column", "domain=lang"
    outcome = tiny_run.fuselm(*command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == scores
    outcome = tiny_run.fuselm("evaluate", "models/target", "--texts", "a.jsonl", "--column", "body=text")
    assert outcome.code == 2 and "--column body=text: write NAME=FIELD, as text=content; NAME is one of" in outcome.err


def test_a_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(ValueError, match="no finished run there"):
        fuselm.load_result(tmp_path)
