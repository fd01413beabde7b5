"""Test store_places.py: runs and studies with the same recipe use the same captures, also while others make them."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny_run
import yaml
from tiny_run import fuselm

from fuselm.runs import config
from fuselm.runs.store_places import locate_stores
from fuselm.stores.sharing import list_users
from fuselm.system import manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Return a folder with a run file and `mine`, the folder of a run that aligned; tests must not change it."""
    folder = tmp_path_factory.mktemp("places")
    write(folder, byte_level, sentence_piece, texts)
    outcome = fuselm("align", folder / "run.yaml")
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def beside(made, tmp_path) -> Path:
    """Return a copy of the folder that tests may change."""
    for path in made.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, tmp_path / path.name)
    given = yaml.safe_load((made / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given | {"output": str(tmp_path / "mine")}, sort_keys=False))
    return tmp_path


def write(folder: Path, byte_level: Path, sentence_piece: Path, texts, **options) -> Path:
    """Write a run file whose stores are shared."""
    given = {
        "output": str(folder / "mine"),
        "store_dir": "auto",
        "train": tiny_run.TRAIN | {"passes": 1},
        "write": {"ratio": {"other": 0.1}, "tokens": 20, "prompt_tokens": 20},
    }
    return tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=tiny_run.short(texts),
        **given | options,
    )


def names(folder: Path) -> list[str]:
    """Return the stages' folders in a folder, without their keys."""
    return sorted(
        f"{path.parent.name} {path.name.rpartition('-')[0]}"
        for stage in ("write", "capture", "align")
        for path in (folder / stage).glob("*")
    )


ALL = ["align other", "align own", "capture other", "capture own", "write other"]


def test_stores_are_beside_the_runs_and_their_users_are_written_down(made):
    assert names(made / "stores") == ALL and names(made / "mine") == []
    assert list_users(made / "stores") == [made / "mine"]
    assert not list(made.rglob("*.lock"))


def test_another_run_uses_them_also_under_another_name_of_a_source(beside):
    outcome = fuselm("align", beside / "run.yaml", f"output={beside / 'second'}")
    assert outcome.code == 0 and outcome.stages == ["corpus"], outcome.err
    given = yaml.safe_load((beside / "run.yaml").read_text())
    sources = {"mine": given["sources"]["own"], "other": given["sources"]["other"]}
    (beside / "renamed.yaml").write_text(
        yaml.safe_dump(given | {"sources": sources, "output": str(beside / "third")}, sort_keys=False)
    )
    outcome = fuselm("align", beside / "renamed.yaml")
    assert outcome.code == 0 and outcome.stages == ["corpus"], outcome.err
    assert names(beside / "stores") == ALL
    assert {beside / "second", beside / "third"} < set(list_users(beside / "stores"))


def test_other_options_are_another_store_beside_it(beside):
    outcome = fuselm("align", beside / "run.yaml", f"output={beside / 'second'}", "align.top_k=3")
    assert outcome.code == 0 and outcome.stages == ["corpus", "align own", "align other"], outcome.err
    assert names(beside / "stores") == sorted([*ALL, "align other", "align own"])


def test_a_run_may_keep_its_stores_to_itself_or_elsewhere(beside):
    options = [f"output={beside / 'alone'}", "write.ratio=0", "capture.draws=7"]
    outcome = fuselm("capture", beside / "run.yaml", *options, "store_dir=null")
    assert outcome.code == 0, outcome.err
    assert names(beside / "alone") == ["capture other", "capture own"] and names(beside / "stores") == ALL
    elsewhere = beside / "deep" / "elsewhere"
    outcome = fuselm("capture", beside / "run.yaml", "capture.draws=5", f"store_dir={elsewhere}")
    assert outcome.code == 0, outcome.err
    assert names(elsewhere) == ["capture other", "capture own"] and list_users(elsewhere) == [beside / "mine"]


def test_what_earlier_versions_left_in_a_run_is_found_and_resumed(beside):
    for stage in ("write", "capture", "align"):
        (beside / "stores" / stage).rename(beside / "mine" / stage)
    shutil.rmtree(beside / "stores")
    for output in ("mine", "second"):
        outcome = fuselm("align", beside / "run.yaml", f"output={beside / output}")
        assert outcome.code == 0 and outcome.stages == ([] if output == "mine" else ["corpus"]), outcome.err
    assert names(beside / "mine") == ALL and names(beside / "stores") == []
    (own,) = (beside / "mine/align").glob("own-*")
    begun = own.with_name(own.name + ".partial")
    own.rename(begun)
    (begun / "manifest.json").unlink()
    assert fuselm("align", beside / "run.yaml").stages == ["align own"]
    assert own.is_dir() and not begun.exists() and names(beside / "stores") == []


def test_a_study_uses_what_a_run_captured_and_its_seeds_are_runs_of_it(beside):
    study = {
        "run": "run.yaml",
        "output": str(beside / "study"),
        "seeds": [0],
        "arms": {"fused": {"method": "fused"}},
        "experiments": [{"name": "main", "title": "Main", "arms": ["base", "fused"], "against": "base"}],
    }
    (beside / "study.yaml").write_text(yaml.safe_dump(study))
    outcome = fuselm("study", beside / "study.yaml")
    assert outcome.code == 0, outcome.err
    assert not [stage for stage in outcome.stages if stage.split()[0] in ("write", "capture", "align")]
    outcome = fuselm("align", beside / "run.yaml", f"output={beside / 'study/seed-0'}", "align.top_k=3")
    assert outcome.code == 0 and outcome.stages == ["align own", "align other"], outcome.err
    assert names(beside / "stores") == sorted([*ALL, "align other", "align own"])
    assert names(beside / "study/seed-0") == [] and not (beside / "study/stores").exists()
    assert beside / "study/seed-0" in list_users(beside / "stores")


def test_runs_that_are_moved_with_their_stores_still_find_them(beside):
    assert fuselm("fuse", beside / "run.yaml").code == 0
    moved = beside / "moved"
    moved.mkdir()
    for name in ("mine", "stores"):
        (beside / name).rename(moved / name)
    shown = fuselm("inspect", moved / "mine")
    assert shown.code == 0 and "fused" in shown.out, shown.err


def stop_in_capture(run_file: Path, stores: Path, *options: str):
    """Start a run, and stop its process while it captures its first source."""
    process = tiny_run.start("align", run_file, *options)
    while process.exitcode is None and not list(stores.glob("capture/own-*.partial/.block-*.parquet")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    assert process.exitcode is None
    return process


@pytest.mark.parametrize("ends", ["finishes", "is killed"])
def test_who_wants_what_another_makes_waits_for_it_or_takes_over(
    made, tmp_path, byte_level, sentence_piece, texts, ends
):
    run_file = write(tmp_path, byte_level, sentence_piece, texts, output=str(tmp_path / "first"))
    first = stop_in_capture(run_file, tmp_path / "stores")
    second = tiny_run.start("align", run_file, f"output={tmp_path / 'second'}")
    while second.exitcode is None and not (tmp_path / "second/steps.json").is_file():
        time.sleep(0.01)
    second.join(2.0)
    assert second.exitcode is None  # it waits
    os.kill(first.pid, signal.SIGKILL if ends == "is killed" else signal.SIGCONT)
    for process in (first, second):
        process.join()
    assert second.exitcode == 0 and first.exitcode == (0 if ends == "finishes" else -signal.SIGKILL)
    assert names(tmp_path / "stores") == ALL
    for theirs in (made / "stores").glob("*/*"):
        ours = tmp_path / "stores" / theirs.parent.name / theirs.name
        assert manifest.read(ours)["files"] == manifest.read(theirs)["files"]


def test_a_store_dir_is_where_the_options_say(tmp_path, byte_level, sentence_piece, texts, monkeypatch):
    run_file = write(tmp_path, byte_level, sentence_piece, texts)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def shared(*overrides: str) -> Path | None:
        return locate_stores(config.load(run_file, list(overrides))).shared

    assert shared() == tmp_path / "stores" and shared("store_dir=null") is None
    assert shared("output=out") == Path("stores") and shared("store_dir=here") == Path("here")
    assert shared("store_dir=~/kept") == tmp_path / "home/kept"
    (tmp_path / "study").mkdir()
    assert shared(f"output={tmp_path}/study/seed-0") == tmp_path / "study/stores"
    (tmp_path / "study/study.json").touch()
    assert shared(f"output={tmp_path}/study/seed-0") == tmp_path / "stores"
