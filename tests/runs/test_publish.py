"""Test that a run's results are published in its folder, and nothing else there is touched."""

from pathlib import Path

import pytest

from fuselm.runs.publish import publish


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path, Path]:
    run, reported, model = tmp_path / "run", tmp_path / "run/report/1", tmp_path / "run/train/fused-1/model"
    for folder in (reported, model):
        folder.mkdir(parents=True)
    for name in ("summary.json", "report.html", "README.md"):
        (reported / name).write_text(f"first {name}")
    (model / "config.json").write_text("first")
    (model / "spiece.model").write_text("first")
    publish(run, reported, model, key="1", folders={"train fused": model})
    return run, reported, model


def test_results_lie_in_the_run(made):
    run, _, _ = made
    assert (run / "model/config.json").read_text() == "first"
    assert (run / "model/README.md").read_text() == "first README.md"
    assert (run / "summary.json").read_text() == "first summary.json"


def test_later_results_replace_ours_and_leave_what_the_user_put_there(made):
    run, reported, model = made
    (run / "model/notes.txt").write_text("mine")
    (run / "model/onnx").mkdir()
    (run / "model/onnx/model.onnx").write_text("mine")
    (model / "spiece.model").unlink()
    (model / "config.json").write_text("second")
    publish(run, reported, model, key="2", folders={"train fused": model})
    assert (run / "model/config.json").read_text() == "second"
    assert not (run / "model/spiece.model").exists()
    assert (run / "model/notes.txt").read_text() == (run / "model/onnx/model.onnx").read_text() == "mine"


def test_the_same_results_are_not_published_again(made):
    run, reported, model = made
    (run / "model/config.json").write_text("edited")
    publish(run, reported, model, key="1", folders={"train fused": model})
    assert (run / "model/config.json").read_text() == "edited"


@pytest.mark.parametrize("gone", ["summary.json", "report.html", "model"])
def test_what_was_moved_elsewhere_is_published_again(made, gone):
    run, reported, model = made
    (run / gone).rename(run.parent / "elsewhere")
    publish(run, reported, model, key="1", folders={"train fused": model})
    assert (run / gone).exists() and (run / "model/config.json").read_text() == "first"


def test_a_model_cut_off_between_two_renames_is_not_lost(made):
    run, reported, model = made
    (run / "model/notes.txt").write_text("mine")
    (run / "model").rename(run / ".model.old")
    publish(run, reported, model, key="2", folders={"train fused": model})
    assert (run / "model/notes.txt").read_text() == "mine"
    assert not (run / ".model.old").exists()
