"""Start commands that share the parts of a run's stages, with parts so small that there are many."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import tiny_run

from fuselm.results import scoring
from fuselm.runs import ray_runs
from fuselm.sources import prompts, resumable_writing
from fuselm.stores import part_writing
from fuselm.system import part_work

LOG = "SHARD_LOG"  # variable with the file that each part's maker is written to


def start(*arguments: object, log: Path | None = None) -> BaseProcess:
    """Start a command in a process that may be killed, and let it log the parts that it completes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fuselm.training.target_training", "fuselm.alignment.aligner", "tiny_run", "shards"]
    )
    environment = dict(os.environ) | ({} if log is None else {LOG: str(log)})
    process = context.Process(target=run_small, args=(list(map(str, arguments)), environment), daemon=True)
    process.start()
    return process


def run_small(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Run a command in this process with small parts, and exit with its code."""
    os.environ.update(environment)
    make_parts_small()
    outcome = tiny_run.fuselm(*arguments)
    sys.stderr.write(outcome.err if outcome.code else "")
    sys.exit(outcome.code)


def make_parts_small() -> None:
    """Let a part hold a few documents, and log who completes it if `LOG` is set."""
    resumable_writing.WINDOW_TOKENS, resumable_writing.WINDOW_BATCHES = 211, 0
    part_writing.WINDOW_BYTES = scoring.WINDOW_BYTES = 307
    prompts.BATCH = 5
    commit = part_work._Parts.commit

    def log_and_commit(parts, made) -> None:
        commit(parts, made)
        if LOG in os.environ:
            with open(os.environ[LOG], "a", encoding="ascii") as file:
                file.write(f"{parts._out.parent.name}/{parts._out.name} {made[0]} {os.getpid()}\n")

    part_work._Parts.commit = log_and_commit


def share_first_parts(count: int, folder: Path) -> None:
    """Let each of `count` processes wait with its first part until all have one, however slowly some of them start."""
    claim = part_work._Parts.claim_next

    def claim_and_wait(parts, claims) -> int | None:
        number = claim(parts, claims)
        (folder / f"has-a-part-{os.getpid()}").touch()
        end = time.monotonic() + 97
        while len(list(folder.glob("has-a-part-*"))) < count and time.monotonic() < end:
            time.sleep(0.05)
        return number

    part_work._Parts.claim_next = claim_and_wait


class SmallRayWorker(ray_runs.RayWorker):
    """Make small parts of a run in a worker of Ray."""

    def __init__(self, *arguments):
        make_parts_small()
        super().__init__(*arguments)


def kill_and_restart(count: int, *arguments: object, kills: int, log: Path, seed: int = 0) -> int:
    """Run `count` shards until all end, and kill and restart one at random moments; return how many were killed."""
    moments, killed = random.Random(seed), 0

    def begin(number: int) -> BaseProcess:
        return start(*arguments, "--shard", f"{number}/{count}", log=log)

    shards = [begin(number) for number in range(count)]
    while any(shard.exitcode is None for shard in shards):
        time.sleep(moments.uniform(0.01, 0.2))
        number = moments.randrange(count)
        if killed < kills and shards[number].exitcode is None:
            shards[number].kill()
            shards[number].join()
            killed += 1
            shards[number] = begin(number)
    assert [shard.exitcode for shard in shards] == [0] * count
    return killed
