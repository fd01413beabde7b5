"""Test steps.py: a folder is made when it is asked for, or when something that is missing is built from it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
from rich.console import Console
from tiny_run import fuselm, summary

from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, texts, cache) -> Path:
    """Return the folder of a finished run whose sources wrote text, with its run file; tests must not change it."""
    folder = tmp_path_factory.mktemp("steps")
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=tiny_run.short(texts),
        write={"ratio": {"other": 0.1}, "tokens": 20, "prompt_tokens": 20},
        train=tiny_run.TRAIN | {"passes": 1},
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """Return a copy of the finished run that tests may change."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def needed(run_file: Path, *overrides: str) -> list[str]:
    """Return what a run would make."""
    pipeline = Pipeline(config.load(run_file, list(overrides)), Console(quiet=True))
    return [step.title for step in pipeline.dry_run() if step.is_needed]


@pytest.mark.parametrize("stages", [("capture",), ("capture", "align"), ("write", "capture", "align", "fuse")])
def test_what_a_finished_run_was_made_from_may_be_deleted(finished, again, cache, stages):
    for stage in stages:
        shutil.rmtree(again / stage)
    assert needed(finished / "run.yaml", f"output={again}") == []
    outcome = fuselm("run", finished / "run.yaml", f"output={again}", cache=cache)
    assert outcome.code == 0, outcome.err
    assert outcome.stages == [] and "Nothing to do" in outcome.err
    assert not any((again / stage).exists() for stage in stages)


def test_training_again_needs_no_capture_and_its_report_only_what_is_left(finished, again, cache):
    shutil.rmtree(again / "capture")
    options = [f"output={again}", "train.lambda_clm=0.25"]
    assert needed(finished / "run.yaml", *options) == ["train fused at 0.003", "evaluate fused"]
    outcome = fuselm("run", finished / "run.yaml", *options, cache=cache)
    assert outcome.code == 0, outcome.err
    assert outcome.stages == ["train fused at 0.003", "evaluate fused", "report"]
    assert not (again / "capture").exists()
    seconds = json.loads((again / "summary.json").read_text())["stages"]
    assert "align own" in seconds and "capture own" not in seconds


def test_aligning_again_captures_again_what_was_deleted_and_nothing_else(finished, again, cache):
    (other,) = (again / "capture").glob("other-*")
    shutil.rmtree(other)
    options = [f"output={again}", "align.top_k=3"]
    assert needed(finished / "run.yaml", *options)[:4] == ["capture other", "align own", "align other", "fuse"]
    outcome = fuselm("align", finished / "run.yaml", *options, cache=cache)
    assert outcome.code == 0, outcome.err
    assert outcome.stages == ["capture other", "align own", "align other"]
    (kept,), (made,) = (sorted((out / "capture").glob("other-*")) for out in (finished / "out", again))
    assert (made / "part-00000.parquet").read_bytes() == (kept / "part-00000.parquet").read_bytes()


def test_a_deleted_text_is_written_again_when_something_is_trained_on_it(finished, again, cache):
    shutil.rmtree(again / "write")
    outcome = fuselm("train", finished / "run.yaml", f"output={again}", "train.lambda_clm=0.25", cache=cache)
    assert outcome.code == 0, outcome.err
    assert outcome.stages == ["write other", "train fused at 0.003"]
    assert summary(again) == summary(finished / "out")
