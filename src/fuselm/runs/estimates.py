"""Estimate what a folder of a run will take: tokens, disk, memory and time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fuselm.system import manifest

if TYPE_CHECKING:
    from fuselm.runs.steps import Step

ENTRY_BYTES = 3.25  # an id and a log-probability that nothing makes smaller; benchmarks/store.py measures 2.0 to 2.1
USUAL_ENTRY_BYTES, USUAL_ROW_BYTES = 2.1, 7.0  # as measured, where the others are upper bounds
ROW_BYTES = 10  # token, start, gold, tail, count, and a document's share of names and metadata; measured: 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Hold what one folder takes. Bytes are upper bounds; time and memory are unknown (None) without calibration."""

    title: str
    tokens: int
    disk: int  # bytes that stay
    scratch: int = 0  # more bytes, needed only while it is made
    kept: int | None = None  # bytes that stay, as calibration expects them; without it, `disk`
    there: int = 0  # bytes of both that an interrupted attempt has already written
    keeps: str = ""  # a capture's policy, and what it kept of one batch
    seconds: float | None = None
    memory: int | None = None  # bytes
    is_shared: bool = False  # it is in `store_dir`
    parts: int = 0  # that several processes can share; 0 where one makes all of it


def estimate_step(step: "Step", *, tokens: int, disk: int = 0, scratch: int = 0, parts: float = 0.0) -> Estimate:
    """Return the estimate of a step, with what an interrupted attempt has already written.

    `parts` is how many parts' worth of work there is; each begun one is a part.
    """
    there = manifest.measure_partial(step.folder)
    return Estimate(
        title=step.title,
        tokens=tokens,
        disk=disk,
        scratch=scratch,
        there=there,
        is_shared=step.stage.is_shared,
        parts=math.ceil(parts),
    )


def estimate_row_bytes(entries: float) -> float:
    """Return the bytes that a row with so many entries takes in a store, about."""
    return USUAL_ROW_BYTES + USUAL_ENTRY_BYTES * entries


def sum_disk(rows: Sequence[Estimate]) -> int:
    """Return the bytes of disk that it takes to make all of them, one after the other."""
    there = sum(min(row.there, row.disk + row.scratch) for row in rows)
    return sum(row.disk for row in rows) + max((row.scratch for row in rows), default=0) - there
