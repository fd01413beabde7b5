"""The next call removes what kills left behind, and nothing that a live process uses or that a user put there."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuselm.system import atomic_files, file_lock, manifest, temporaries
from fuselm.system.manifest import Recipe, build_once

RECIPE = Recipe(stage="capture", parameters={"top_k": 7})


def build(folder):
    (folder / "a").write_text("1")
    (folder / ".scaffold").write_text("1")
    return {}


def forbidden(folder):
    raise AssertionError("built again")


@pytest.fixture
def dead() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("moment", ["unlink", "rename", "fsync"])
def test_a_stage_cut_off_while_finishing_is_finished_without_building_again(tmp_path, monkeypatch, moment):
    """Stop at a scaffold, at the change of the folder's name, and after it."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    folder = tmp_path / "stage"
    with monkeypatch.context() as patch:
        if moment == "unlink":
            unlink = Path.unlink
            patch.setattr(Path, "unlink", lambda path, **_: stop() if path.name == ".scaffold" else unlink(path, **_))
        elif moment == "rename":
            patch.setattr(os, "rename", stop)
        else:
            patch.setattr(atomic_files, "fsync", lambda path: stop() if path == tmp_path else None)
        with pytest.raises(KeyboardInterrupt):
            build_once(folder, RECIPE, build)
    made = build_once(folder, RECIPE, forbidden)
    assert made == (moment != "fsync")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "manifest.json"]


def test_a_partial_stage_with_a_wrong_or_incomplete_manifest_is_built_again(tmp_path):
    for damage in ("recipe", "file"):
        folder = tmp_path / damage
        build_once(folder, RECIPE, build)
        partial = folder.with_name(f"{damage}.partial")
        folder.rename(partial)
        if damage == "file":
            (partial / "a").unlink()
        recipe = RECIPE if damage == "file" else Recipe(stage="align")
        built = []
        build_once(folder, recipe, lambda out, built=built: built.append(out) or build(out))
        assert built == [partial] and manifest.read(folder)["key"] == recipe.key


def test_a_stage_that_is_reopened_is_built_again(tmp_path):
    build_once(tmp_path / "stage", RECIPE, build)
    manifest.reopen_stage(tmp_path / "stage")
    built = []
    assert build_once(tmp_path / "stage", RECIPE, lambda out: built.append(out) or build(out)) and built


def test_the_lock_of_a_finished_stage_is_removed_unless_it_is_held(tmp_path):
    build_once(tmp_path / "stage", RECIPE, build)
    lock = tmp_path / "stage/.lock"
    (tmp_path / "stage/.mine").touch()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        manifest.remove_stale_lock(tmp_path / "stage")
        assert lock.exists()
    manifest.remove_stale_lock(tmp_path / "stage")
    manifest.remove_stale_lock(tmp_path / "stage")
    assert sorted(p.name for p in (tmp_path / "stage").iterdir()) == [".mine", "a", "manifest.json"]


def test_the_next_write_removes_temporary_files_of_dead_processes_only(tmp_path, dead):
    path = tmp_path / "a.json"
    ours = temporaries.name_temporary(path)
    machine = ours.name.split("-")[-1]
    gone = tmp_path / f".a.json.{dead}-{machine}"
    living = tmp_path / f".a.json.{os.getppid()}-{machine}"
    elsewhere, long_ago = tmp_path / f".a.json.{dead}-00000000.tmp", tmp_path / f".a.json.{dead}.tmp"
    mine = [tmp_path / name for name in (".b.json.1.tmp", ".a.json.notes.tmp", "a.json.tmp")]
    for leftover in (gone, living, elsewhere, long_ago, *mine):
        leftover.touch()
    os.utime(long_ago, (time.time() - 2 * temporaries.SECONDS_OF_OTHERS,) * 2)
    atomic_files.write_text(path, "{}")
    assert set(tmp_path.iterdir()) == {path, living, elsewhere, *mine}


def test_a_lock_file_has_one_holder_at_a_time_and_is_removed_afterwards(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from fuselm.system import file_lock\n"
        "for _ in range(31):\n"
        "    with file_lock.hold_lock(Path(sys.argv[1])):\n"
        "        count = Path(sys.argv[2]); n = int(count.read_text())\n"
        "        time.sleep(0.001); count.write_text(str(n + 1))\n"
    )
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", script, str(tmp_path / "lock"), str(count)]
    for process in [subprocess.Popen(command) for _ in range(3)]:
        assert process.wait() == 0
    assert count.read_text() == "93" and not (tmp_path / "lock").exists()
    file_lock.remove_stale_lock(tmp_path / "lock")


def test_the_users_folders_beside_the_model_are_kept(tmp_path):
    from fuselm.runs.publish import publish

    run, reported, model = tmp_path / "run", tmp_path / "reported", tmp_path / "trained"
    for folder in (run / "model.old", run / "model.partial", reported, model):
        folder.mkdir(parents=True)
        (folder / "mine").touch()
    for name in ("summary.json", "report.html", "README.md"):
        (reported / name).touch()
    for key in ("1", "2"):
        publish(run, reported, model, key=key, folders={})
    assert (run / "model.old/mine").exists() and (run / "model.partial/mine").exists()
    assert json.loads((run / "run.json").read_text())["report"] == "2"
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]
