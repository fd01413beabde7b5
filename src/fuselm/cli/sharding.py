"""Read which of several commands this one is, started apart by a scheduler on machines that see the same files."""

import os
from typing import Annotated

import typer

AUTO = "auto"
# For each scheduler: its number for a command, the first of these numbers, and how many there are, if it says so.
SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "", "JOB_COMPLETIONS"),  # an indexed Job of Kubernetes
)

ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="Share the work with commands on this and other machines: I/N, as 0/4 to 3/4; auto: as Slurm's array or "
        "Kubernetes' indexed job numbers them.",
        show_default=False,
    ),
]


def join_shards(shard: str | None) -> None:
    """Let this process share the parts of stages with the other shards, or be alone if no shard is asked for.

    Raises `ValueError` on no such shard.
    """
    from fuselm.system import processes

    if shard is None:
        processes.leave_workers()
    else:
        processes.set_worker(*(_find_shard() if shard == AUTO else _parse_shard(shard)))


def _parse_shard(shard: str) -> tuple[int, int]:
    number, _, count = shard.partition("/")
    if not (number.isascii() and number.isdecimal() and count.isascii() and count.isdecimal()):
        raise ValueError(f"--shard {shard}: write I/N, as 0/4 for the first of four, or auto")
    if int(number) >= int(count):
        raise ValueError(f"--shard {shard}: shards of {count} are 0 to {int(count) - 1}; take one of them")
    return int(number), int(count)


def _find_shard() -> tuple[int, int]:
    """Return the number and the count that a scheduler gives."""
    for name, first, total in SCHEDULERS:
        if (given := os.environ.get(name, "")).isdecimal():
            number = int(given) - int(os.environ.get(first) or 0)
            return number, max(int(os.environ.get(total) or 0), number + 1)
    names = " or ".join(name for name, _, _ in SCHEDULERS)
    raise ValueError(f"--shard auto: no scheduler numbers this process ({names}); write I/N, as 0/4")
