"""What a run will take, before it takes it: tokens, disk, memory and time of each stage that is not done yet.

Tokens and disk follow from the corpus alone; a run checks its disk before it loads any model. Time and memory come from
a short calibration (calibration.py).
"""

import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.table import Table
from safetensors import safe_open

from fuselm.system import manifest
from fuselm.system.durations import format_duration
from fuselm.system.terminal import plain

if TYPE_CHECKING:
    from fuselm.models.model import Model
    from fuselm.runs import config
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

ENTRY_BYTES = 3.25  # an id and a log-probability that nothing makes smaller; benchmarks/store.py measures 2.0 to 2.1
ROW_BYTES = 10  # token, start, gold, tail, count, and a document's share of names and metadata; measured: 7
USUAL_ENTRY_BYTES, USUAL_ROW_BYTES = 2.1, 7.0
STATE_BYTES = 12  # a parameter in a checkpoint: float32 weight and two moments
MEAN_BYTES = 4  # ... and the mean of the weight, where there is one
CHECKPOINTS = 3  # the best, the last, and the one being written
ALIGN_SECONDS = 1e-4  # a token; measured, and small beside all else
CALIBRATION_DOCUMENTS = 64  # at most, of all parts of the corpus
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one stage takes. Bytes are upper bounds; time and memory are unknown (None) without calibration."""

    title: str
    tokens: int
    disk: int  # bytes that stay
    scratch: int = 0  # ... and more while it is made
    there: int = 0  # ... of both, from when it was interrupted
    keeps: str = ""  # a capture's policy, and what it makes of one batch
    bytes_per_token: float | None = None  # of a capture, as one batch has it
    seconds: float | None = None
    memory: int | None = None  # bytes


def estimates(pipeline: "Pipeline", steps: "Sequence[Step] | None" = None) -> list[Estimate]:
    """Of those steps, else of all of the run and its report, that are not done. Makes the corpus; loads no model."""
    counted = manifest.read(pipeline.corpus())["counts"]["tokens"]
    todo = [step for step in steps or pipeline.steps() if not step.done]
    result = [_estimate(pipeline, step, counted) for step in todo]
    if todo and steps is None:
        size = pipeline.inputs.target.parameters_bytes
        result.append(Estimate(title="report", tokens=0, disk=size, scratch=size))  # the model, beside one of before
    return result


def room(rows: Sequence[Estimate]) -> int:
    """Bytes of disk that it takes to make all of them, one after the other."""
    there = sum(min(e.there, e.disk + e.scratch) for e in rows)
    return sum(e.disk for e in rows) + max((e.scratch for e in rows), default=0) - there


def _estimate(pipeline: "Pipeline", step: "Step", counted: dict[str, dict[str, int]]) -> Estimate:
    run, target = pipeline.run, pipeline.inputs.target
    of_target = counted[target.tokenizer_fingerprint]
    aligned_row = ROW_BYTES + ENTRY_BYTES * run.align.top_k
    ratio = 1 + sum(map(pipeline.written, pipeline.inputs.writers))
    learnt, scratch = round(of_target["train"] * ratio), 0
    if step.stage == "write":
        model = pipeline.inputs.sources[step.name]
        tokens, disk = round(counted[model.tokenizer_fingerprint]["train"] * pipeline.written(step.name)), 0
    elif step.stage == "capture":
        model = pipeline.inputs.sources[step.name]
        tokens = round(counted[model.tokenizer_fingerprint]["train"] * ratio)
        disk = int(
            tokens * (ROW_BYTES + ENTRY_BYTES * min(_most_entries(run.capture_of(step.name)), model.output_size))
        )
    elif step.stage == "align":
        tokens, disk = learnt, int(learnt * aligned_row)
    elif step.stage == "fuse":
        tokens, disk = learnt, int(learnt * aligned_row) * len(pipeline.inputs.sources)
    elif step.stage == "train":
        options = run.train.of(step.name)
        tokens = (learnt if step.name == "fused" else of_target["train"]) * options.passes
        state = STATE_BYTES + (MEAN_BYTES if options.average else 0)
        scratch = CHECKPOINTS * state * _trained_parameters(target, options.lora_rank)
        disk = target.parameters_bytes
    elif step.stage == "evaluate":
        model = pipeline.inputs.sources.get(step.name, target)
        tokens, disk = counted[model.tokenizer_fingerprint]["heldout"], 0
    else:
        tokens, disk = 0, 0
    return Estimate(
        title=step.title, tokens=tokens, disk=disk, scratch=scratch, there=manifest.size_so_far(step.folder)
    )


def _trained_parameters(target: "Model", lora_rank: int | None) -> int:
    """At most: all, were they of 16 bits, or what adapters beside all matrices have."""
    files = sorted(target.folder.glob("*.safetensors"))
    if lora_rank is None or not files:
        return target.parameters_bytes // 2
    shapes: list[list[int]] = []
    for file in files:
        with safe_open(file, "np") as weights:
            shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return sum(lora_rank * sum(shape) for shape in shapes if len(shape) == 2)


def _most_entries(options: "config.Capture") -> int:
    """Of a row, whatever the model says. Beside its draws that is the largest, the gold one, and one of a sliver."""
    told = options.retention
    return min(told.get("top_k", told.get("draws", 0) + 3), int(1 / told.get("threshold", 1e-9)))


def check_disk(pipeline: "Pipeline", steps: "Sequence[Step] | None" = None) -> None:
    """Raises `ValueError` where the disk has less room than the steps yet to come may need."""
    needed = room(estimates(pipeline, steps))
    free = shutil.disk_usage(pipeline.folder).free
    if needed > free:
        less = "let sources write less (write.ratio), " if pipeline.inputs.writers else ""
        raise ValueError(
            f"{pipeline.folder}: {free / GIB:.2f} GiB free, but the run may need {needed / GIB:,.2f} GiB; make room, "
            f"set another `output`, {less}or keep fewer entries (capture.draws, align.top_k)"
        )


def table(rows: Sequence[Estimate]) -> Table:
    """Return estimates as a table for the terminal."""
    result = Table(
        "stage", "keeps", *(_right(h) for h in ("tokens", "bytes/token", "disk", "memory", "time")), show_footer=False
    )
    if any(e.keeps for e in rows):
        result.caption = "keeps: the policy, entries of a token, and their share of its mass; see docs/store.md"
    for e in rows:
        memory = f"{e.memory / GIB:.1f} GiB" if e.memory else ""
        seconds = "" if e.seconds is None else format_duration(e.seconds, decimals=0)
        each = "" if e.bytes_per_token is None else f"{e.bytes_per_token:.0f}"
        disk = _size(e.disk + e.scratch)
        result.add_row(e.title, e.keeps, f"{e.tokens:,}" if e.tokens else "", each, disk, memory, seconds)
    if not rows:
        result.add_row("nothing to do", *[""] * 6)
    result.add_section()
    peak = max((e.memory or 0 for e in rows), default=0)
    result.add_row(
        "in all",
        *[""] * 3,
        _size(room(rows)),
        f"{peak / GIB:.1f} GiB",
        format_duration(sum((e.seconds or 0.0 for e in rows), start=0.0), decimals=0),
    )
    return result


def tokens_table(pipeline: "Pipeline") -> Table:
    """Tokens of each split under each tokenizer."""
    counted = manifest.read(pipeline.corpus())["counts"]["tokens"]
    result = Table("tokens of", *(_right(split) for split in ("train", "dev", "heldout")))
    for name, model in [("target", pipeline.inputs.target), *pipeline.inputs.sources.items()]:
        result.add_row(name, *(f"{n:,}" for n in counted[model.tokenizer_fingerprint].values()))
    return result


def machine_table(chosen: Mapping[str, str]) -> Table:
    """Return what was found of this machine, and what that lets the run choose: `calibrated` gives `chosen`."""
    from fuselm.models import precision
    from fuselm.system import machine

    result = Table("machine", "", show_header=False)
    device, *speeds = precision.describe()
    result.add_row("device", device)
    result.add_row("threads", f"{machine.use_free_cores()} ({machine.usable_cores()} cores may be used)")
    for what, of in speeds:
        result.add_row(f"GFLOP/s, {what}", of)
    for role, of in chosen.items():
        of = "its checkpoint's type" if of == "auto" else of
        result.add_row("trains in" if role == "train" else f"{role} is read in", of)
    return result


def calibrated(pipeline: "Pipeline") -> tuple[list[Estimate], dict[str, str], list[str]]:
    """Return the estimates with time and memory, the precision of each model, and what kept a stage from being tried.

    A stage that cannot be tried has no time; the others do.
    """
    rows = estimates(pipeline)
    failed: list[str] = []
    if not rows:
        return [], {}, failed
    from fuselm.runs import calibration
    from fuselm.system import compiling, machine

    machine.use_free_cores()
    chosen = pipeline.precision.choose(pipeline.local_models)
    documents = calibration.spread([d for d in pipeline.documents if d.split == "train"], CALIBRATION_DOCUMENTS)
    measured: dict[str, tuple[calibration.Measured, int] | None] = {}
    result = []
    compiled: set[str] = set()
    todo = [step for step in pipeline.steps() if not step.done]
    for step, row in zip(todo, rows, strict=False):
        if step.stage in ("align", "fuse"):
            compilation = 0.0 if step.stage in compiled else compiling.seconds_to_compile(step.stage)
            compiled.add(step.stage)
            seconds = row.tokens * ALIGN_SECONDS + compilation
            result.append(replace(row, seconds=seconds, memory=_peak_memory()))
            continue
        if step.stage == "write":  # nobody knows before it is tried how fast a model writes
            result.append(row)
            continue
        prefix = pipeline.run.capture_of(step.name).prefix_tokens if step.stage == "capture" else 0
        task = "train" if step.stage == "train" else "capture" if prefix else "read"
        name = step.name if step.name in pipeline.inputs.sources and task != "train" else ""
        if f"{task} {name}" not in measured:
            pipeline.console.print(plain(f"calibrating: {task} {name or 'target'}", style="dim"))
            try:
                if task == "train":
                    found = calibration.trained(pipeline, documents, precision=chosen["train"])
                elif name in pipeline.inputs.servers:
                    found = calibration.asked(pipeline, name, documents)
                else:
                    dtype = chosen[f"source {name}" if name else "target"]
                    found = calibration.read(pipeline, name, documents, dtype=dtype, prefix_tokens=prefix)
                measured[f"{task} {name}"] = (found, _peak_memory())
            except ValueError as error:
                measured[f"{task} {name}"] = None
                failed.append(str(error))
        outcome = measured[f"{task} {name}"]
        if outcome is None:
            result.append(row)
            continue
        found, memory = outcome
        speed = found.speed
        if step.stage == "train" and pipeline.run.train.of(step.name).average:
            memory += MEAN_BYTES * _trained_parameters(pipeline.inputs.target, pipeline.run.train.lora_rank)
        if step.stage == "capture":
            options = pipeline.run.capture_of(name).retention
            keeps = f"{' '.join(map(str, options.values()))}: {found.entries:.1f}, {found.mass:.0%}"
            each = USUAL_ROW_BYTES + USUAL_ENTRY_BYTES * found.entries
            row = replace(row, keeps=keeps, bytes_per_token=each)
            if name not in pipeline.inputs.servers:
                speed *= pipeline.run.capture.processes
        result.append(replace(row, seconds=row.tokens / speed, memory=memory))
    return result + [replace(row, seconds=1.0) for row in rows[len(todo) :]], chosen, failed


def _peak_memory() -> int:
    """The most that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _right(heading: str):
    from rich.table import Column

    return Column(heading, justify="right")


def _size(count: int) -> str:
    if not count:
        return ""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
