"""Share the parts of a folder on an object store among processes that are killed: the bytes are those of one."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from object_store import (  # noqa: F401
    az_address,
    az_bucket,
    gs_address,
    gs_bucket,
    memory_folder,
    s3_address,
    s3_bucket,
)
from rich.console import Console

from fuselm.system import atomic_files, manifest, part_work
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.remote_paths import open_path

PARTS, WORKERS, KILLS = 24, 3, 4
SECONDS_PER_PART = 0.05
QUIET = Progress(Console(quiet=True), "")


def build(folder: str, log: str, seconds: float) -> None:
    """Make the parts that nobody else makes, each of them in some time."""

    def fill(out: Path) -> dict | None:
        def make_part(number: int):
            time.sleep(seconds)
            name = f"part-{number:05d}.bin"

            def complete() -> dict:
                atomic_files.write_file(out / name, lambda path: path.write_bytes(b"%d" % number * 1000), seal=True)
                with open(log, "a", encoding="ascii") as made:
                    made.write(f"{number}\n")
                return {"file": name, "rows": number}

            return complete

        def finish(fragments: list[dict]) -> dict:
            return {"rows": sum(fragment["rows"] for fragment in fragments)}

        return part_work.make_parts(out, [1] * PARTS, make_part, finish, progress=QUIET, unit="parts")

    part_work.build_by_parts(open_path(folder), Recipe(stage="parts"), fill)


def work(folder: str, log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    build(folder, log, SECONDS_PER_PART)


@pytest.mark.parametrize("bucket", ["s3_bucket", "gs_bucket", "az_bucket"])
def test_killed_processes_leave_the_bytes_of_one(bucket, tmp_path, request):
    bucket = request.getfixturevalue(bucket)
    build(str(tmp_path / "one"), str(tmp_path / "one.log"), 0.0)
    folder, log = bucket / "shared", tmp_path / "shared.log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["s3fs", "fuselm.system.part_work", "test_remote_parts"])

    def start():
        process = context.Process(target=work, args=(str(folder), str(log), dict(os.environ)), daemon=True)
        process.start()
        return process

    moments, workers, killed = random.Random(0), [start() for _ in range(WORKERS)], 0
    deadline = time.monotonic() + 300
    while not manifest.is_finished(folder) and time.monotonic() < deadline:
        made = len(log.read_text().split()) if log.exists() else 0
        if killed < KILLS and made >= (killed + 1) * PARTS // (KILLS + 2):
            time.sleep(moments.uniform(0, 0.1))
            number = moments.randrange(WORKERS)
            workers[number].kill()
            workers[number].join()
            workers[number], killed = start(), killed + 1
        time.sleep(0.01)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert killed == KILLS
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    one, shared = manifest.read(tmp_path / "one"), manifest.read(folder)
    assert (one["files"], one["counts"], one["parts"]) == (shared["files"], shared["counts"], shared["parts"])
    assert all((folder / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in one["files"])
    assert len(log.read_text().split()) <= PARTS + 2 * KILLS  # a killed process had two at most: one made, one begun


def test_what_others_finish_and_sweep_meanwhile_is_no_error(memory_folder):
    recipe = Recipe(stage="parts")

    def build_late(out: Path) -> None:
        manifest.write_manifest(out, recipe, {}, 0.0)
        raise FileNotFoundError(2, "a block of a part is gone")

    assert part_work.build_by_parts(memory_folder / "shared", recipe, build_late)
    assert manifest.is_finished(memory_folder / "shared")
    with pytest.raises(FileNotFoundError):
        part_work.build_by_parts(memory_folder / "other", recipe, lambda out: (out / "absent").read_bytes())
