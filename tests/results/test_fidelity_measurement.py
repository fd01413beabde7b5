"""Check that `fuselm fidelity` measures a run as its folder, its file and Python name it, and what it says."""

import json
from pathlib import Path

import pytest
import tiny_run
from tiny_run import fuselm

from fuselm.alignment import aligner
from fuselm.results.fidelity_measurement import _describe_cost
from fuselm.results.notes import FIDELITY_SCALE
from fuselm.runs import run_folders
from fuselm.system import manifest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, byte_level, sentence_piece, word_piece, texts) -> Path:
    """Write a run file, and align its sources; return the run file."""
    run_file = tiny_run.write(
        tmp_path_factory.mktemp("fidelity"),
        target=byte_level,
        sources={"alpha": sentence_piece, "own": byte_level, "words": word_piece},
        rows=tiny_run.short(texts, length=97),
    )
    assert fuselm("align", run_file, cache=tmp_path_factory.getbasetemp() / "cache").code == 0
    return run_file


def measure(*arguments: object, cache: Path) -> dict:
    outcome = fuselm("fidelity", *arguments, "--json", cache=cache)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


def test_a_run_has_the_fidelity_that_its_alignment_measured(aligned, cache):
    of_folder, of_file = (measure(run, cache=cache) for run in (aligned.parent / "out", aligned))
    assert of_folder == of_file and list(of_folder) == ["alpha", "words"]  # the target is not aligned to itself
    stages = run_folders.find_stages(aligned.parent / "out")
    for name, result in of_folder.items():
        counted = manifest.read(stages[f"align {name}"])["counts"]["fidelity"]
        assert result["conditional"] is None and set(result["domains"]) == set(counted)
        for domain, row in counted.items():
            for key, value in row.items():
                assert result["domains"][domain][key] == pytest.approx(value, rel=1e-6)


def test_one_source_is_measured_by_several_methods_and_drawn_on_a_page(aligned, cache, tmp_path):
    page = tmp_path / "page.html"
    options = ("--source", "words", "--method", "span", "--method", "exact", "--report", page)
    result = measure(aligned.parent / "out", *options, cache=cache)
    assert list(result) == ["words"] and list(result["words"]["methods"]) == ["span", "exact"]
    assert FIDELITY_SCALE.replace("'", "&#39;") in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--texts", "x.jsonl"), "--texts: has no effect on a run, whose own captures are measured; drop it"),
        (("--sampled-tokens", 5), "--sampled-tokens: has no effect on a run, whose own captures are measured; drop it"),
        (("--source", "none"), "--source none: {out} has no such source; there are alpha, own, words"),
        (("--report", "x.html"), "--report: a page shows one source; add --source, one of alpha, words"),
        (("seed=1",), "seed=1: has no effect on a run's folder; drop it, or name the run file"),
        (("--method", "spam"), "--method spam: unknown; take one of"),
    ],
    ids=str,
)
def test_what_a_run_cannot_take_is_refused_in_one_line(aligned, cache, arguments, message):
    out = aligned.parent / "out"
    outcome = fuselm("fidelity", out, *arguments, cache=cache)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"fuselm: {message.format(out=out)}")


def test_without_a_run_all_three_options_are_needed():
    outcome = fuselm("fidelity", "--source", "somewhere")
    assert outcome.code == 2
    assert outcome.err == "fuselm: fidelity: name a run, or give --source, --target and --texts\n"


def test_how_a_fidelity_is_read_is_said_once_and_in_the_same_words_everywhere(aligned, cache):
    outcome = fuselm("fidelity", aligned.parent / "out", cache=cache)
    assert outcome.code == 0 and " ".join(outcome.out.split()).count(FIDELITY_SCALE) == 1
    for page in ("alignment.md", "explanation/align.md", "how-to/diagnose.md"):
        assert FIDELITY_SCALE in " ".join((DOCS / page).read_text(encoding="utf-8").split()), page


def test_what_a_measurement_costs_is_said_before_it_begins():
    assert _describe_cost(1, 645, 0) == "the source reads 1 document, 645 tokens"
    assert _describe_cost(3, 1234, 8192) == (
        "the source reads 3 documents, 1,234 tokens; then it writes 8,192 tokens and reads them, which takes longest "
        "(--sampled-tokens 0 leaves that out)"
    )


@pytest.mark.parametrize(("method", "learns"), [("span", False), ("branches", True)])
def test_branches_learns_from_the_rows_that_fidelity_reads(
    tmp_path, byte_level, sentence_piece, texts, monkeypatch, method, learns
):
    learned = []

    class Kept(aligner.Followers):
        def __init__(self, source, texts, traces=()):
            learned.extend(trace.document for trace in traces)
            super().__init__(source, texts, traces)

    monkeypatch.setattr(aligner, "Followers", Kept)
    rows = tiny_run.write_rows(tmp_path / "texts.jsonl", tiny_run.short(texts, length=97)[:3])
    arguments = ("fidelity", "--source", sentence_piece, "--target", byte_level, "--texts", rows, "--method", method)
    outcome = fuselm(*arguments, "--sampled-tokens", 0, "--json")
    assert outcome.code == 0, outcome.err
    assert bool(learned) == learns
