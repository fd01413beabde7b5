"""Estimate what a run will take: tokens, disk, memory and time of each stage that is not done yet.

Tokens and disk follow from the corpus alone; a run checks its disk before it loads any model. Time and memory come from
a short calibration.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table

from fuselm.runs import remaining_time
from fuselm.runs.estimates import Estimate, sum_disk
from fuselm.runs.stage import TokenCounts
from fuselm.runs.stages import report
from fuselm.system import manifest
from fuselm.system.durations import format_duration
from fuselm.system.local_copies import find_disk

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

GIB = 1 << 30


def estimate(pipeline: "Pipeline", steps: "Sequence[Step] | None" = None) -> list[Estimate]:
    """Estimate the steps that are not done; None means those of the whole run and its report.

    Makes the corpus and loads no model.
    """
    todo = [step for step in steps or pipeline.dry_run() if step.is_needed]
    result = _estimate_steps(pipeline, todo)
    if todo and steps is None:
        result.append(report.estimate_published(pipeline, _count_tokens(pipeline)))
    return result


def _count_tokens(pipeline: "Pipeline") -> TokenCounts:
    """Return the tokens of the corpus; of a sample, as many as all texts have about."""
    counted = manifest.read(pipeline.make_corpus())["counts"]["tokens"]
    return {
        name: {split: round(count * pipeline.sampled_factor) for split, count in of.items()}
        for name, of in counted.items()
    }


def _estimate_steps(pipeline: "Pipeline", steps: "Sequence[Step]") -> list[Estimate]:
    tokens = _count_tokens(pipeline)
    return [step.stage.estimate(pipeline, step, tokens) for step in steps]


def calibrate(pipeline: "Pipeline") -> tuple[list[Estimate], Mapping[str, str], list[str]]:
    """Return the estimates with time and memory, the precision of each model, and why some stages could not be tried.

    A stage that could not be tried has no time; the others do.
    """
    todo = [step for step in pipeline.dry_run() if step.is_needed]
    if not todo:
        return [], {}, []
    from fuselm.runs.calibration import Calibration

    calibration = Calibration(pipeline)
    rows = [
        step.stage.calibrate(calibration, step, row)
        for step, row in zip(todo, _estimate_steps(pipeline, todo), strict=True)
    ]
    remaining_time.keep_plan(pipeline.folder, todo, rows)
    published = report.calibrate_published(calibration, report.estimate_published(pipeline, _count_tokens(pipeline)))
    return [*rows, published], calibration.chosen, calibration.failures


def check_disk(pipeline: "Pipeline", steps: "Sequence[Step] | None" = None, *, output: Path | None = None) -> None:
    """Raise `ValueError` if a disk has less room than the steps that are not done may need on it.

    `output` is the folder that they will be made in, if it is not the pipeline's.
    """
    rows = estimate(pipeline, steps)
    folder = find_disk(output or pipeline.folder)
    shared = None if pipeline.places.shared is None or output else find_disk(pipeline.places.shared)
    if shared is None or shared.stat().st_dev == folder.stat().st_dev:
        _check_room(pipeline, "output", folder, rows)
    else:
        _check_room(pipeline, "output", folder, [row for row in rows if not row.is_shared])
        _check_room(pipeline, "store_dir", shared, [row for row in rows if row.is_shared])


def _check_room(pipeline: "Pipeline", option: str, folder: Path, rows: Sequence[Estimate]) -> None:
    needed, free = sum_disk(rows), shutil.disk_usage(folder).free
    if needed > free:
        less = "let sources write less (write.ratio), " if pipeline.inputs.writers else ""
        raise ValueError(
            f"{folder}: {free / GIB:.2f} GiB free, but the run may need {needed / GIB:,.2f} GiB; make room, "
            f"set another `{option}`, {less}or keep fewer entries (capture.draws, align.top_k)"
        )


def draw_estimates(rows: Sequence[Estimate]) -> Table:
    """Return estimates as a table for the terminal."""
    numbers = ("tokens", "parts", "disk", "kept", "memory", "time")
    result = Table("stage", "keeps", *map(_align_right, numbers), box=box.SIMPLE_HEAD, pad_edge=False)
    if any(e.keeps for e in rows):
        result.caption = (
            "keeps: the policy, entries of a token, and their share of its mass; see docs/store.md. disk: at most, "
            "while a stage is made, with checkpoints and full rows. kept: about what stays"
        )
    for e in rows:
        memory = f"{e.memory / GIB:.1f} GiB" if e.memory else ""
        seconds = "" if e.seconds is None else format_duration(e.seconds, decimals=0)
        disk, kept = format_size(e.disk + e.scratch), format_size(e.disk if e.kept is None else e.kept)
        tokens, parts = (f"{count:,}" if count else "" for count in (e.tokens, e.parts))
        result.add_row(e.title, e.keeps, tokens, parts, disk, kept, memory, seconds)
    if not rows:
        result.add_row("nothing to do", *[""] * 7)
    result.add_section()
    peak = max((e.memory or 0 for e in rows), default=0)
    result.add_row(
        "in all",
        *[""] * 3,
        format_size(sum_disk(rows)),
        format_size(sum(e.disk if e.kept is None else e.kept for e in rows)),
        f"{peak / GIB:.1f} GiB",
        format_duration(sum((e.seconds or 0.0 for e in rows), start=0.0), decimals=0),
    )
    return result


def describe_estimates(pipeline: "Pipeline", rows: Sequence[Estimate], chosen: Mapping[str, str]) -> dict[str, Any]:
    """Return what the tables of `fuselm plan` show, for JSON: bytes, seconds and tokens, None where unknown."""
    counted = _count_tokens(pipeline)
    models = {"target": pipeline.inputs.target} | pipeline.inputs.sources
    return {
        "tokens": {name: counted[model.tokenizer_fingerprint] for name, model in models.items()},
        "dtypes": dict(chosen),
        "stages": [
            {
                "title": e.title,
                "keeps": e.keeps,
                "tokens": e.tokens,
                "parts": e.parts,
                "disk_bytes": e.disk + e.scratch,
                "kept_bytes": e.disk if e.kept is None else e.kept,
                "memory_bytes": e.memory,
                "seconds": e.seconds,
            }
            for e in rows
        ],
        "disk_bytes": sum_disk(rows),
        "memory_bytes": max((e.memory or 0 for e in rows), default=0),
        "seconds": sum((e.seconds or 0.0 for e in rows), start=0.0),
        "notes": pipeline.notes,
        "sampled_factor": pipeline.sampled_factor,
    }


def draw_token_counts(pipeline: "Pipeline") -> Table:
    """Return a table of the tokens of each split under each tokenizer."""
    counted = _count_tokens(pipeline)
    result = Table("tokens of", *(_align_right(split) for split in ("train", "dev", "heldout")))
    for name, model in [("target", pipeline.inputs.target), *pipeline.inputs.sources.items()]:
        result.add_row(name, *(f"{n:,}" for n in counted[model.tokenizer_fingerprint].values()))
    return result


def draw_machine(chosen: Mapping[str, str]) -> Table:
    """Return a table of this machine's speed and of what the run chose by it: `chosen` comes from `calibrate`."""
    from fuselm.models import precision
    from fuselm.system import machine

    result = Table("machine", "", show_header=False)
    device, *speeds = precision.describe_device()
    result.add_row("device", device)
    result.add_row("threads", f"{machine.use_free_cores()} ({machine.count_usable_cores()} cores may be used)")
    for precision_name, speed in speeds:
        result.add_row(f"GFLOP/s, {precision_name}", speed)
    for role, dtype in chosen.items():
        shown = "its checkpoint's type" if dtype == "auto" else dtype
        result.add_row("trains in" if role == "train" else f"{role} is read in", shown)
    return result


def _align_right(heading: str) -> Column:
    return Column(heading, justify="right", no_wrap=True)


def format_size(count: int) -> str:
    """Return a number of bytes in MiB or GiB; nothing for 0."""
    if not count:
        return ""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
