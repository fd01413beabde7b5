"""Align every source's distributions to the target's vocabulary."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.runs import row_fusion
from fuselm.runs.config import RunOptions
from fuselm.runs.estimates import ENTRY_BYTES, ROW_BYTES, Estimate, estimate_row_bytes, estimate_step
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import capture, corpus, write
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def declare(pipeline: "Pipeline", *, draws: bool | None = None) -> dict[str, Path]:
    """Return the aligned store of each source; make none.

    `draws`: use the entries sampled from tails; None lets the run decide.
    """
    captured = capture.declare(pipeline)
    draws = pipeline.run.is_linear_in_rows if draws is None else draws
    return {name: _declare_for_source(pipeline, name, captured[name], draws) for name in pipeline.inputs.sources}


def make(pipeline: "Pipeline", *, draws: bool | None = None) -> dict[str, Path]:
    """Align every source, and return their stores. `draws`: see `declare`."""
    folders = declare(pipeline, draws=draws)
    pipeline.steps.make_all(folders.values())
    return folders


def _declare_for_source(pipeline: "Pipeline", name: str, captured: Path, draws: bool) -> Path:
    inputs, options = pipeline.inputs, pipeline.run.align.model_dump()
    # Versions that took strings for what tokens spell aligned these wrongly, under the key without it.
    is_corrected = any(map(inputs.is_corrected, (inputs.sources[name], inputs.target)))
    recipe = Recipe(
        stage=STAGE.name,
        parameters=options
        | {"draws": draws}
        # Versions before learned from texts, or from rows without the target's words.
        | ({"followers": "rows and words"} if options["method"] == "branches" else {})
        | ({"token_bytes": "decoded"} if is_corrected else {})
        | row_fusion.describe_sample(pipeline),
        inputs={
            "captured": pipeline.steps.get_key(captured),
            "tokenizer": inputs.target.tokenizer_fingerprint,
            **inputs.identify_chat("target"),
        },
    )

    def build(out: Path, shown: Progress) -> dict | None:
        from fuselm.alignment import aligner
        from fuselm.documents.document_texts import DocumentTexts
        from fuselm.stores import store

        capture.check_given_store(pipeline, name)
        source = store.Store(captured, draws=draws, vocabulary_size=inputs.sources[name].output_size)
        documents = row_fusion.choose_sample(pipeline, write.fusion_documents(pipeline))
        learned_from = documents.take(source.has_documents(documents.ids))
        to_target = aligner.Aligner(
            inputs.load_source_vocabulary(name),
            inputs.target_vocabulary,
            **options,
            texts=DocumentTexts(learned_from),
            traces=source,
        )
        return aligner.align_store(to_target, source, documents, out, progress=shown)

    written = write.declare(pipeline).values()
    return pipeline.steps.declare(STAGE, name, recipe, build, inputs=[captured, *written], by_parts=True)


def estimate_aligned(pipeline: "Pipeline", tokens: TokenCounts) -> tuple[int, int]:
    """Return the target's tokens of one aligned store, and its bytes at most."""
    count = round(tokens[pipeline.inputs.target.tokenizer_fingerprint]["train"] * write.compute_text_ratio(pipeline))
    if pipeline.run.fuse.when == "load":
        count = min(count, row_fusion.SAMPLE_TOKENS * len(pipeline.inputs.domains))
    return count, int(count * (ROW_BYTES + ENTRY_BYTES * pipeline.run.align.top_k))


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate one aligned store."""
    count, disk = estimate_aligned(pipeline, tokens)
    return estimate_step(step, tokens=count, disk=disk, parts=estimate_parts(pipeline, tokens, count))


def estimate_parts(pipeline: "Pipeline", tokens: TokenCounts, count: int) -> float:
    """Return in how many parts so many of the target's tokens are aligned or fused, about."""
    from fuselm.stores import part_writing

    counted = manifest.read(corpus.make(pipeline))["counts"]
    tokenizer = pipeline.inputs.target.tokenizer_fingerprint
    size = counted["bytes"]["train"] / max(counted["tokens"][tokenizer]["train"], 1)
    return count * size / part_writing.WINDOW_BYTES


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the time of compiling and aligning, and the size of rows with as many entries as the source's."""
    source, target = calibration.pipeline.inputs.sources[step.name], calibration.pipeline.inputs.target
    is_same = source.tokenizer_fingerprint == target.tokenizer_fingerprint
    row = calibration.add_kernel_time(step, row, spelled=0 if is_same else source.output_size + target.output_size)
    if (measured := calibration.time_reading(step.name)) is None:
        return row
    entries = float(min(measured.entries, calibration.pipeline.run.align.top_k))
    return replace(row, kept=round(row.tokens * measured.row_share * estimate_row_bytes(entries)))


def count_passes(run: RunOptions, name: str, written: Mapping[str, float]) -> float | None:
    """Return the size of all text that is aligned, for each byte of the training documents; None if it is a sample."""
    return 1.0 + sum(written.values()) if run.fuse.when == "stage" else None


STAGE = Stage(
    name="align",
    make=make,
    estimate=estimate,
    calibrate=calibrate,
    count_passes=count_passes,
    is_shared=True,
    is_on_cpu=True,
)
