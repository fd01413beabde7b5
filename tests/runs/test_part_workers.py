"""Test part_workers.py: a run starts processes where they pay, and they make parts of its stages."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shards
import tiny_run
from object_store import memory_folder  # noqa: F401
from rich.console import Console
from tiny_run import fuselm

from fuselm.results import scoring
from fuselm.runs import config, part_workers
from fuselm.runs.part_workers import BYTES_PER_WORKER, PartWorkers
from fuselm.runs.pipeline import STAGES
from fuselm.sources import resumable_writing
from fuselm.stores import part_writing
from fuselm.system import machine, manifest, part_work, processes
from fuselm.system.remote_paths import is_remote

SMALL = """
import sys, shards
shards.make_parts_small()
from fuselm.runs import part_workers
part_workers.work(sys.stdin)
"""


@pytest.fixture
def run_file(tmp_path, byte_level, sentence_piece, texts) -> Path:
    return tiny_run.write(
        tmp_path, target=byte_level, sources={"own": byte_level, "other": sentence_piece}, rows=tiny_run.short(texts)
    )


@pytest.mark.parametrize(
    ("size", "free", "options", "ranks", "count"),
    [
        (BYTES_PER_WORKER, 8, [], 1, {"align": 2, "capture": 1}),
        (BYTES_PER_WORKER - 1, 8, [], 1, {"align": 1, "fuse": 1}),
        (BYTES_PER_WORKER * 99, 8, [], 1, {"align": 8, "fuse": 8, "evaluate": 1}),
        (BYTES_PER_WORKER * 99, 8, [], 2, {"align": 1}),
        (1, 8, ["processes=3"], 1, {"align": 3, "capture": 3, "evaluate": 3}),
        (BYTES_PER_WORKER * 99, 8, ["processes=1"], 1, {"align": 1}),
    ],
)
def test_as_many_processes_work_as_pay_or_as_the_run_says(run_file, monkeypatch, size, free, options, ranks, count):
    monkeypatch.setattr(machine, "count_free_cores", lambda: free)
    monkeypatch.setattr(processes, "world_size", lambda: ranks)
    workers = PartWorkers(config.load(run_file, options), Path("precision.json"))
    assert {stage: workers._choose_count(STAGES[stage], size) for stage in count} == count


def test_the_number_of_processes_changes_no_key(run_file):
    runs = [config.load(run_file, options) for options in ([], ["processes=2"])]
    assert "processes" not in runs[0].model_dump() and runs[1].model_dump()["processes"] == 2
    keys = []
    for run in runs:
        from fuselm.runs.pipeline import Pipeline

        keys.append([step.folder for step in Pipeline(run, Console(quiet=True)).dry_run()])
    assert keys[0] == keys[1]


def test_a_worker_makes_parts_of_every_stage_and_the_bytes_are_those_of_one_process(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_writing, "WINDOW_TOKENS", 211)
    monkeypatch.setattr(resumable_writing, "WINDOW_BATCHES", 0)
    monkeypatch.setattr(part_writing, "WINDOW_BYTES", 307)
    monkeypatch.setattr(scoring, "WINDOW_BYTES", 307)
    monkeypatch.setattr(part_workers, "COMMAND", ("-c", SMALL))
    monkeypatch.setenv(shards.LOG, str(tmp_path / "log"))
    folders = [str(Path(shards.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    assert fuselm("fuse", run_file).code == 0
    claim_next = part_work._Parts.claim_next

    def wait_and_claim(parts, claims) -> int | None:
        for _ in range(3000):
            if sum(1 for _ in parts._out.glob(".worker-*")) > 1:
                break
            time.sleep(0.02)
        monkeypatch.setattr(part_work._Parts, "claim_next", slowly_claim)
        return slowly_claim(parts, claims)

    def slowly_claim(parts, claims) -> int | None:
        time.sleep(0.05)
        return claim_next(parts, claims)

    monkeypatch.setattr(part_work._Parts, "claim_next", wait_and_claim)
    outcome = fuselm("fuse", run_file, f"output={tmp_path / 'two'}", "processes=2")
    assert outcome.code == 0, outcome.err
    assert dict(list_files(tmp_path / "two")) == dict(list_files(tmp_path / "out"))
    made = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({(folder, part) for folder, part, _ in made}) == len(made) and made  # by the worker


def list_files(out: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for stage in ("capture", "align", "fuse"):
        for folder in (out / stage).iterdir():
            yield folder.name, manifest.read(folder)["files"]


def test_a_worker_is_told_a_folder_on_an_object_store(run_file, tmp_path, monkeypatch, memory_folder):
    joined = []

    class Opened:
        def __init__(self, options, console, *, precision_file):
            joined.append(precision_file)

        def join(self, stage, folder):
            joined.append(folder)

    monkeypatch.setattr("fuselm.runs.pipeline.Pipeline", Opened)
    monkeypatch.setattr(processes, "_shard", None)
    monkeypatch.setattr(part_workers, "SECONDS_OF_IDLENESS", 0.5)
    monkeypatch.setattr(part_workers, "_listen", lambda lines, folders: folders.put(json.loads(lines.readline())))
    asked = {"run": config.load(run_file).model_dump(mode="json"), "precision": f"{memory_folder}/p.json"}
    lines = [asked | {"number": 1, "count": 2}, {"stage": "align", "folder": f"{memory_folder}/align/x"}]
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(tmp_path / "lines") as file:
        part_workers.work(file)
    assert joined == [memory_folder / "p.json", memory_folder / "align" / "x"]
    assert all(map(is_remote, joined))
