"""manifest.py: a stage is built once, resumes after an interruption, and has its final name only when it is done."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from fuselm.system import manifest
from fuselm.system.manifest import FORMAT, Recipe, build_once

RECIPE = Recipe(stage="capture", parameters={"top_k": 7}, inputs={"model": "0f"})


def write(name: str, text: str = "text"):
    def build(folder):
        (folder / name).write_text(text)
        return {"documents": 3}

    return build


def forbidden(folder):
    raise AssertionError("built again")


def test_a_stage_is_built_once_and_then_skipped(tmp_path):
    folder = tmp_path / "stage"
    assert not manifest.is_finished(folder)
    assert build_once(folder, RECIPE, write("a"))
    assert manifest.is_finished(folder)
    before = (folder / "manifest.json").read_bytes()
    assert not build_once(folder, RECIPE, forbidden)
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_the_manifest_records_recipe_counts_and_file_hashes(tmp_path):
    build_once(tmp_path / "stage", RECIPE, write("a", "seven"))
    found = manifest.read(tmp_path / "stage")
    seconds = found.pop("seconds")
    assert found == {
        "format": FORMAT,
        "stage": "capture",
        "key": RECIPE.key,
        "parameters": {"top_k": 7},
        "inputs": {"model": "0f"},
        "about": {},
        "counts": {"documents": 3},
        "files": {"a": hashlib.sha256(b"seven").hexdigest()},
    }
    assert 0 <= seconds < 60


def test_files_of_subfolders_are_listed_and_hidden_ones_are_not(tmp_path):
    def build(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("")
        (folder / ".hidden").write_text("")
        return {}

    build_once(tmp_path / "stage", RECIPE, build)
    assert list(manifest.read(tmp_path / "stage")["files"]) == ["inner/b"]


def test_an_exception_leaves_no_final_name_and_the_next_call_resumes(tmp_path):
    folder = tmp_path / "stage"

    def fail(partial):
        (partial / "first").write_text("1")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        build_once(folder, RECIPE, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["stage.partial"]

    def go_on(partial):
        assert (partial / "first").read_text() == "1"
        (partial / "second").write_text("2")
        return {}

    assert build_once(folder, RECIPE, go_on)
    assert list(manifest.read(folder)["files"]) == ["first", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_stage_cut_off_between_manifest_and_rename_ends_the_same(tmp_path):
    build_once(tmp_path / "stage", RECIPE, write("a"))
    expected = manifest.read(tmp_path / "stage")
    os.rename(tmp_path / "stage", tmp_path / "stage.partial")
    assert build_once(tmp_path / "stage", RECIPE, write("a"))
    found = manifest.read(tmp_path / "stage")
    assert found | {"seconds": 0} == expected | {"seconds": 0}


KILLED = """
import sys, time
from pathlib import Path
from fuselm.system.manifest import Recipe, build_once

def build(folder):
    (folder / "first").write_text("1")
    print("begun", flush=True)
    time.sleep(60)
    return {}

build_once(Path(sys.argv[1]), Recipe(stage="capture"), build)
"""


def test_a_stage_that_another_process_builds_is_refused_until_that_process_ends(tmp_path):
    folder = tmp_path / "stage"
    other = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(ValueError) as caught:
            build_once(folder, RECIPE, forbidden)
        assert str(caught.value) == f"{folder}.partial: another fuselm process is working on it; wait for it to end"
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert not folder.exists() and not manifest.is_finished(folder)
    assert build_once(folder, RECIPE, write("second"))
    assert list(manifest.read(folder)["files"]) == ["first", "second"]


def test_recipes_with_different_outcomes_have_different_keys():
    others = [
        replace(RECIPE, stage="align"),
        replace(RECIPE, parameters={"top_k": 11}),
        replace(RECIPE, parameters={"top": 7}),
        replace(RECIPE, inputs={"model": "0e"}),
        replace(RECIPE, parameters={}, inputs={"top_k": "7", "model": "0f"}),
    ]
    assert len({recipe.key for recipe in [RECIPE, *others]}) == 6
    assert replace(RECIPE, parameters={"b": 1, "a": 2}).key == replace(RECIPE, parameters={"a": 2, "b": 1}).key
    assert len(RECIPE.key) == 16 and int(RECIPE.key, 16) >= 0


def message(folder) -> str:
    with pytest.raises(ValueError) as caught:
        manifest.read(folder)
    return str(caught.value)


def test_each_way_of_being_no_finished_stage_has_its_message(tmp_path):
    assert message(tmp_path) == f"{tmp_path}: not a finished stage (no manifest.json); run `fuselm run` again"
    path = tmp_path / "manifest.json"
    for damaged in (b"", b'{"format": 1', b"\xff\xfe", b"[]", b"null"):
        path.write_bytes(damaged)
        assert message(tmp_path) == f"{path}: damaged; delete {tmp_path} and run again"
    path.write_text(json.dumps({"format": FORMAT + 1}))
    expected = f"written in format {FORMAT + 1}, this fuselm reads {FORMAT}; run the stage again"
    assert message(tmp_path) == f"{tmp_path}: {expected}"


def test_threads_do_not_build_a_stage_twice(tmp_path):
    built, refused = [], []
    release = threading.Event()

    def build(folder):
        built.append(folder)
        release.wait(10)
        return {}

    def run():
        try:
            build_once(tmp_path / "stage", RECIPE, build)
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(refused) < 2:
        threads[-1].join(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and manifest.is_finished(tmp_path / "stage")
