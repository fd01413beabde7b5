"""Test reuse.py: a plan says which sources are captured again, and which option is the reason."""

import re
from pathlib import Path

import pytest
import tiny_run
import yaml
from tiny_run import fuselm


@pytest.fixture(scope="module")
def captured(tmp_path_factory, byte_level, sentence_piece, word_piece, texts) -> Path:
    """Return the run file of a run that captured, whose stores are shared."""
    folder = tmp_path_factory.mktemp("reuse")
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=tiny_run.short(texts),
        store_dir="auto",
        train=tiny_run.TRAIN | {"passes": 1},
    )
    assert fuselm("capture", run_file).code == 0
    return run_file


def explain(captured: Path, *overrides: str) -> list[str]:
    """Return what `plan` says below its tables, with stores without their keys."""
    outcome = fuselm("plan", captured, f"output={captured.parent / 'planned'}", *overrides)
    assert outcome.code == 0, outcome.err
    stores = re.escape(str(captured.parent / "stores"))
    lines = [line for line in outcome.out.splitlines() if line.startswith("capture ") and ": " in line]
    return [re.sub(rf"{stores}/capture/(\w+)-\w{{16}}", r"STORE of \1", line) for line in lines]


def test_what_is_there_is_not_captured_again(captured):
    assert explain(captured) == explain(captured, "align.top_k=3", "train.passes=2", "train.average=0.5") == []


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["capture.draws=7"], "capture.draws is 7, but 13"),
        (["capture={policy: top_k, top_k: 5, batch_tokens: 131}"],
         "capture.draws is not set, but 13, capture.policy is top_k, but sampled, capture.top_k is 5, but not set"),
        (["seed=1"], "seed is 1, but 0"),
        (["corpus.share=0.5", "corpus.max_bytes=64"], "corpus.max_bytes is 64, but 4096, corpus.share is 0.5, but 1.0"),
        (["write={ratio: {other: 0.1}, tokens: 20, prompt_tokens: 20}"],
         "the text written by other is another one than"),
    ],
)  # fmt: skip
def test_the_option_that_differs_is_named(captured, overrides, reason):
    lines = explain(captured, *overrides)
    assert lines == [
        f"capture {name}: captured again, because {reason} in STORE of {name}" for name in ("own", "other")
    ]


def test_the_nearest_capture_is_the_one_that_is_named(captured):
    assert fuselm("capture", captured, "capture.draws=5").code == 0
    lines = explain(captured, "capture.draws=5", "capture.prefix_tokens=32")
    assert [line.split("because ")[1] for line in lines] == [
        f"capture.prefix_tokens is 32, but 256 in STORE of {name}" for name in ("own", "other")
    ]


def test_other_texts_and_models_are_named(captured, tmp_path, texts, word_piece):
    other = tiny_run.write_rows(tmp_path / "corpus.jsonl", tiny_run.short(texts, length=99))
    lines = explain(captured, f"corpus.files=[{other}]")
    assert all("because corpus.files are other files or texts than in STORE" in line for line in lines)
    lines = explain(captured, f"sources.third={word_piece}")
    assert lines == ["capture third: no capture of this model is there yet"]  # it cuts no document shorter


def test_a_study_says_so_for_each_seed(captured):
    study = {
        "run": "run.yaml",
        "output": str(captured.parent / "study"),
        "seeds": [0, 1],
        "arms": {"fused": {"method": "fused"}},
        "experiments": [{"name": "main", "title": "Main", "arms": ["base", "fused"], "against": "base"}],
    }
    file = captured.parent / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    outcome = fuselm("study", file, "--plan")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if ", capture " in line]
    assert [line.split(" in /")[0] for line in lines] == [
        f"seed 1, capture {name}: captured again, because seed is 1, but 0" for name in ("own", "other")
    ]
