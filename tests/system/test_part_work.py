"""Test part_work.py and claims.py: each part is made once, whoever makes it, and a dead worker's part is taken over."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuselm.system import claims, manifest, part_work
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

RECIPE = Recipe(stage="align", parameters={"a": 1})
SIZES = [3, 1, 2, 5, 4, 7]


def build_parts(folder: Path, log: Path, seconds: float = 0.0) -> bool:
    """Make a folder whose parts hold their numbers; log who makes what."""

    def build(out: Path) -> dict | None:
        base = part_work.prepare_once(out, lambda: note(log, "prepared") or {"base": 10})["base"]

        def make_part(number: int):
            note(log, f"part {number}")
            time.sleep(seconds)
            (out / f"part-{number}").write_text(str(base + number))
            return lambda: {"file": f"part-{number}", "documents": SIZES[number], "sums": base + number}

        def finish(fragments: list[dict]) -> dict:
            note(log, "finished")
            return {"sum": sum(fragment["sums"] for fragment in fragments)}

        shown = Progress(Console(file=io.StringIO()), "parts")
        return part_work.make_parts(out, SIZES, make_part, finish, progress=shown, unit="documents")

    return part_work.build_by_parts(folder, RECIPE, build)


def note(log: Path, line: str) -> None:
    with open(log, "a") as file:
        file.write(line + "\n")


def start(folder: Path, log: Path, seconds: float):
    process = multiprocessing.get_context("fork").Process(target=build_parts, args=(folder, log, seconds), daemon=True)
    process.start()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_made_by_parts_has_its_fragments_in_the_manifest(tmp_path):
    assert build_parts(tmp_path / "done", tmp_path / "log")
    assert not build_parts(tmp_path / "done", tmp_path / "log")
    made = manifest.read(tmp_path / "done")
    assert made["counts"] == {"sum": sum(range(10, 16))}
    assert [part["file"] for part in made["parts"]] == [f"part-{n}" for n in range(6)]
    assert {part["file"]: part["sha256"] for part in made["parts"]} == made["files"]
    assert [part["documents"] for part in made["parts"]] == SIZES and "sums" not in made["parts"][0]
    assert names(tmp_path / "done") == ["manifest.json", *(f"part-{n}" for n in range(6))]
    assert not (tmp_path / "done.partial").exists()


def test_three_processes_make_each_part_once(tmp_path):
    processes = [start(tmp_path / "done", tmp_path / "log", 0.02) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    log = (tmp_path / "log").read_text().split("\n")[:-1]
    assert sorted(log) == sorted(["prepared", "finished", *(f"part {n}" for n in range(6))])
    build_parts(tmp_path / "alone", tmp_path / "other")
    assert manifest.read(tmp_path / "done")["files"] == manifest.read(tmp_path / "alone")["files"]
    assert names(tmp_path) == ["alone", "done", "log", "other"]


def test_a_killed_workers_part_is_made_by_another_and_what_it_finished_is_kept(tmp_path):
    log = tmp_path / "log"
    process = start(tmp_path / "done", log, 0.1)
    while not log.exists() or "part 2" not in log.read_text():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)  # nobody has waited for it yet, so its number is still taken
    assert build_parts(tmp_path / "done", log)
    lines = log.read_text().split("\n")
    assert lines.count("part 0") == 1 and lines.count("part 2") == 2 and lines.count("finished") == 1
    process.join()


def test_a_part_that_was_damaged_is_made_again(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "write_manifest", lambda *_, **__: fail())
        build_parts(tmp_path / "done", log)
    (tmp_path / "done.partial" / "part-3").write_text("other")
    assert build_parts(tmp_path / "done", log)
    lines = log.read_text().split("\n")
    assert [lines.count(f"part {n}") for n in range(6)] == [1, 1, 1, 2, 1, 1]
    assert (tmp_path / "done" / "part-3").read_text() == "13"


def fail() -> None:
    raise RuntimeError


def test_what_was_begun_is_ended_when_an_earlier_part_fails(tmp_path):
    begun, ended, third, failed = [], [], threading.Event(), threading.Event()

    def make_part(number: int):
        begun.append(number)
        if number == 2:
            third.set()
            failed.wait(60)
            time.sleep(0.2)

        def complete() -> dict:
            ended.append(number)
            if number == 0:
                third.wait(60)
                failed.set()
                raise OSError("full")
            if number == 2:
                raise ValueError("not to hide that the disk is full")
            return {}

        return complete

    (tmp_path / "made.partial").mkdir()
    progress = Progress(Console(file=io.StringIO()), "parts")
    with pytest.raises(OSError, match="full"):
        part_work.make_parts(tmp_path / "made.partial", SIZES, make_part, lambda found: {}, progress=progress, unit="")
    assert sorted(ended) == begun == [0, 1, 2]
    assert not list(tmp_path.rglob(".fragment-*"))


def test_a_worker_of_another_machine_is_dead_when_it_has_been_silent(tmp_path, monkeypatch):
    with claims.open_claims(tmp_path) as held:
        assert held.take("part") and held.take("part")
        (worker,) = tmp_path.glob(".worker-*")
        row = json.loads(worker.read_text()) | {"machine": "elsewhere"}
        worker.write_text(json.dumps(row))
        other = claims.Claims(tmp_path)
        assert not other.take("part") and not other.take("part")
        monkeypatch.setattr(claims, "SECONDS_OF_SILENCE", 0.05)
        time.sleep(0.06)
        worker.write_text(json.dumps(row | {"beat": 2}))
        assert not other.take("part")
        time.sleep(0.06)
        assert other.take("part")
        third = claims.Claims(tmp_path)
        assert not third.take("part")
        other.close()
        assert third.take("part")
        third.close()


def test_windows_hold_about_so_much_and_every_document(tmp_path):
    windows = part_work.split_windows([3, 1, 4, 1, 5, 9, 2, 6], 5)
    assert windows == [slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 8)]
    assert part_work.split_windows([], 5) == []


@given(sizes=st.lists(st.integers(0, 9), max_size=30), most=st.integers(0, 40))
def test_a_window_ends_with_the_document_that_fills_it(sizes, most):
    expected, begin, total = [], 0, 0
    for n, size in enumerate(sizes):
        total += size
        if total >= most or n == len(sizes) - 1:
            expected.append(slice(begin, n + 1))
            begin, total = n + 1, 0
    assert part_work.split_windows(sizes, most) == expected
    assert part_work.split_windows(np.array(sizes, np.int32), most) == expected
