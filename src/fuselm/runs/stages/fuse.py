"""Fuse all sources' aligned distributions into one for each token."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.runs import row_fusion
from fuselm.runs.config import RunOptions
from fuselm.runs.estimates import Estimate, estimate_row_bytes, estimate_step
from fuselm.runs.stage import Made, Stage, TokenCounts
from fuselm.runs.stages import align, write
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def declare(pipeline: "Pipeline", copy: str | None = None) -> Path:
    """Return the store of fused distributions, or of those that a copy of the target learns; make nothing."""
    names, size = pipeline.inputs.list_fused_sources(copy), pipeline.inputs.target.output_size
    aligned = {name: path for name, path in align.declare(pipeline).items() if name in names}
    recipe = Recipe(
        stage=STAGE.name,
        parameters=pipeline.run.fuse.select_sources(names) | {"vocabulary_size": size},
        inputs={f"source {name}": pipeline.steps.get_key(path) for name, path in aligned.items()},
    )

    def build(out: Path, shown: Progress) -> dict | None:
        from fuselm.fusion import fuse
        from fuselm.stores import store

        return fuse.fuse_stores(
            {name: store.Store(path, vocabulary_size=size) for name, path in sorted(aligned.items())},
            row_fusion.choose_sample(pipeline, write.fusion_documents(pipeline)),
            out,
            learn_from=row_fusion.choose_sample(pipeline, pipeline.documents.select("train")),
            **recipe.parameters,
            progress=shown,
        )

    written = write.declare(pipeline).values()
    inputs = [*aligned.values(), *written]
    return pipeline.steps.declare(STAGE, copy or "", recipe, build, inputs=inputs, by_parts=True)


def declare_all(pipeline: "Pipeline") -> Made:
    """Return the store of fused distributions, or the one of each copy of the target; make nothing."""
    copies = pipeline.inputs.copies
    return {copy: declare(pipeline, copy) for copy in copies} if copies else declare(pipeline)


def make(pipeline: "Pipeline") -> Made:
    """Fuse the aligned stores. Return the fused one, or with `fuse.pairwise` the one of each copy."""
    stores = declare_all(pipeline)
    pipeline.steps.make_all(stores.values() if isinstance(stores, dict) else [stores])
    return stores


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the fused store, whose rows may have the entries of all sources."""
    count, disk = align.estimate_aligned(pipeline, tokens)
    disk *= len(pipeline.inputs.list_fused_sources(step.name or None))
    return estimate_step(step, tokens=count, disk=disk, parts=align.estimate_parts(pipeline, tokens, count))


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the time of compiling and fusing, and the size of rows with the entries of all sources."""
    row = calibration.add_kernel_time(step, row)
    names = calibration.pipeline.inputs.list_fused_sources(step.name or None)
    measured = [calibration.time_reading(name) for name in names]
    found = [m for m in measured if m is not None]
    if not found or len(found) < len(measured):
        return row
    tokens = row.tokens * max(m.row_share for m in found)
    return replace(row, kept=round(tokens * estimate_row_bytes(sum(m.entries for m in found))))


def count_passes(run: RunOptions, name: str, written: Mapping[str, float]) -> float | None:
    """Return the size of all text that is fused, for each byte of the training documents; None if it is a sample."""
    return 1.0 + sum(written.values()) if run.fuse.when == "stage" else None


STAGE = Stage(name="fuse", make=make, estimate=estimate, calibrate=calibrate, count_passes=count_passes, is_on_cpu=True)
