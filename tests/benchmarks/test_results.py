"""benchmarks/measured.py and results.py: what was measured is kept, and the page of results comes of that alone."""

import json
import shutil
from pathlib import Path

import measured
import pyarrow.parquet as pq
import pytest
import results
from tiny_run import fuselm

from fuselm.results.tasks import answers

ROOT = Path(__file__).parents[2]
SHOWN = {"study", "study-pairwise", "study-tasks", "study-baseline", "study-controls", "study-second-target"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def put(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def stage(name: str, number: int) -> dict[str, str]:
    folder = f"study/seed-0/evaluate/{name}"
    return {f"{folder}/manifest.json": f"{number}", f"{folder}/scores.json": f"scores {number}"}


def test_what_is_kept_comes_out_as_it_was_and_more_is_added(tmp_path):
    kept = tmp_path / "kept.tar.xz"
    with pytest.raises(ValueError, match=r"kept\.tar\.xz: no such file; `keep` writes it$"):
        measured.unpack(tmp_path, kept)
    first = put(tmp_path / "a", **stage("clm-1", 1), **{"peers.json": "{}", "apart.json": "[]"})
    put(first, **{"study/seed-0/fuse/2/manifest.json": "no", "study/seed-0/train/3.partial/manifest.json": "no"})
    assert measured.keep(first, kept) == 4
    once = kept.read_bytes()
    assert measured.keep(first, kept) == 4 and kept.read_bytes() == once
    assert measured.keep(put(tmp_path / "b", **stage("fused-2", 2), **{"peers.json": "anew"}), kept) == 3
    out = tmp_path / "out"
    assert measured.unpack(put(out, **{"apart.json": "there"}), kept) == 5
    wanted = stage("clm-1", 1) | stage("fused-2", 2) | {"peers.json": "anew", "apart.json": "there"}
    assert files(out) == {name: text.encode() for name, text in wanted.items()}


def test_of_a_history_only_the_scores_are_kept(tmp_path):
    name = "study/seed-0/train/clm-1"
    history = {f"{name}/history.json": '{"dev": [{"step": 0, "average": 1.25}], "log": [{"loss": 3.0}], "speed": []}'}
    put(tmp_path / "a", **history, **{f"{name}/manifest.json": "{}"})
    measured.keep(tmp_path / "a", tmp_path / "kept")
    measured.unpack(tmp_path / "b", tmp_path / "kept")
    kept = {"dev": [{"average": 1.25, "step": 0}]}
    assert json.loads((tmp_path / "b" / name / "history.json").read_text()) == kept


@pytest.mark.real
def test_answers_to_tasks_are_kept_without_their_texts(tmp_path):
    folder = tmp_path / "a/study-tasks/seed-0/tasks/fused-copying-1"
    folder.mkdir(parents=True)
    shared = {"task": "copying", "document": "a, b", "filter": "none", "target": "long", "answer": "text"}
    rows = [
        {**shared, "question": n, "metric": "bits", "value": value}
        for n, value in enumerate([1 / 3, None, 0.0, 12345.6])
    ]
    answers.write_answers(folder, rows, {"copying": {"questions": 4}})
    (folder / "manifest.json").write_text("{}")
    kept = tmp_path / "kept.tar.xz"
    assert measured.keep(tmp_path / "a", kept) == 3 and measured.unpack(tmp_path / "b", kept) == 3
    again = tmp_path / "b/study-tasks/seed-0/tasks/fused-copying-1"
    table = pq.read_table(again / answers.ROWS)
    assert table.schema == answers.SCHEMA and table["value"].to_pylist() == [0.33333, None, 0.0, 12346.0]
    assert table["document"].to_pylist() == ["a, b"] * 4 and table["answer"].null_count == 4
    assert (again / answers.NUMBERS).read_bytes() == (folder / answers.NUMBERS).read_bytes()
    once = kept.read_bytes()
    assert measured.keep(tmp_path / "b", kept) == 3 and kept.read_bytes() == once  # rounded once
    assert measured.unpack(tmp_path / "b", kept) == 0


def test_the_page_of_results_is_what_its_commands_make_of_what_was_measured(tmp_path, monkeypatch):
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    measured.unpack(runs)
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    absent = {name for name in SHOWN if f"examples/{name}.yaml{results.ABSENT}" in page}
    for name in SHOWN - absent:
        outcome = fuselm("study", ROOT / f"examples/{name}.yaml", f"output={runs}/{name}", "--report")
        assert outcome.code == 0, outcome.err
    shutil.rmtree(runs / "study-tokens")  # of a text that is not here: examples/corpus/build.py --larger makes it
    monkeypatch.setattr(results, "DOCS", docs)
    monkeypatch.setattr("sys.argv", ["results.py", str(runs)])
    results.main()

    def without_tokens(page: str) -> str:
        before, _, rest = page.partition("\n## Tokens needed\n")
        return before + rest[rest.index("\n## ") :]

    assert without_tokens((docs / "results.md").read_text(encoding="utf-8")) == without_tokens(page)
    for name in SHOWN - absent - {"study-tasks"}:  # which has no figures
        assert files(docs / f"figures/{name}") == files(ROOT / f"docs/figures/{name}")


def test_a_section_whose_experiment_is_not_there_stays_as_it_was():
    absent = f"`fuselm study x.yaml{results.ABSENT}\n\n"
    made = f"# A\n\n## B\n\n{absent}## C\n\nnew\n\n## D\n\n{absent}"
    before = f"# Old\n\n## B\n\nnumbers\n\n### B 1\n\nmore\n\n## C\n\nold\n\n## D\n\n{absent}"
    kept = "# A\n\n## B\n\nnumbers\n\n### B 1\n\nmore\n\n## C\n\nnew\n\n## D\n\n" + absent
    assert results.keep_sections(made, before) == kept
    assert results.keep_sections(made, "") == made
