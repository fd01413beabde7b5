"""Score every model on the held-out documents: bits per byte of each document."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.models.locating import locate_model
from fuselm.runs.estimates import Estimate, estimate_step
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import corpus, merge, train
from fuselm.system import atomic_files, manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.training.choices import METHODS

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def make(pipeline: "Pipeline") -> dict[str, Path]:
    """Score the target as it was, every source, and every method's best model. Return their folders by name."""
    train.make(pipeline)
    merge.make(pipeline)
    return {name: evaluate_model(pipeline, name) for name in ("base", *pipeline.inputs.sources, *METHODS)}


def evaluate_model(pipeline: "Pipeline", name: str) -> Path:
    """Score `base`, a source or a method's best model. A source that is the target shares its folder."""
    inputs, run, precision = pipeline.inputs, pipeline.run, pipeline.precision
    model, role, dtype = inputs.target, "target", run.target.dtype
    fingerprint = model.fingerprint
    if name in METHODS:
        fingerprint = pipeline.steps.get_key(merge.find_trained(pipeline, name, needs_weights=False))
    elif name in inputs.sources:
        source, source_dtype = inputs.sources[name], precision.read_option(f"source {name}")
        is_target = (source.fingerprint, source.tokenizer_fingerprint) == (fingerprint, model.tokenizer_fingerprint)
        is_target &= inputs.identify_chat(f"source {name}") == inputs.identify_chat("target")
        if is_target and source_dtype == dtype:
            name = "base"
        else:
            role = f"source {name}"
        model, fingerprint, dtype = source, source.fingerprint, source_dtype
    prefix = {"prefix_tokens": run.evaluate.prefix_tokens} if run.evaluate.prefix_tokens else {}
    recipe = Recipe(
        stage=STAGE.name,
        parameters={"batch_tokens": run.evaluate.batch_tokens, "dtype": dtype, "split": "heldout"} | prefix,
        inputs={
            "model": fingerprint,
            "tokenizer": model.tokenizer_fingerprint,
            **inputs.identify_chat(role),
            "corpus": corpus.identify(pipeline),
        },
    )

    def build(out: Path, shown: Progress) -> dict | None:
        from fuselm.documents import token_counting
        from fuselm.results import bits_per_byte, scoring, texts_in_front

        located = model
        if name in METHODS:
            located = locate_model(str(merge.find_trained(pipeline, name) / train.WEIGHTS))
            vocabulary = inputs.load_trained_vocabulary(located)
        else:
            vocabulary = inputs.load_source_vocabulary(name) if name in inputs.sources else inputs.target_vocabulary
        read_in = dtype if name in inputs.servers else precision.choose_dtype(role, located)
        documents, front = pipeline.documents.select("heldout"), None
        lengths = token_counting.count_read_tokens(vocabulary, documents, reader=inputs.find_reader(role))
        if tokens := run.evaluate.prefix_tokens:
            front = texts_in_front.choose_texts_in_front(pipeline.documents.select("train"), tokens)
            lengths = [length + tokens for length in lengths]
        scores = bits_per_byte.score_by_parts(
            lambda: bits_per_byte.open_scorer(
                located,
                vocabulary,
                dtype=read_in,
                batch_tokens=run.evaluate.batch_tokens,
                server=inputs.servers.get(name),
                front=front,
            ),
            lengths,
            documents,
            out,
            progress=shown,
        )
        if scores is None:
            return None
        atomic_files.write_text(out / "scores.json", json.dumps([s.as_row() for s in scores], indent=0))
        return {"documents": len(scores), "bits_per_byte": scoring.compute_bits_per_byte(scores), "dtype": read_in}

    return pipeline.steps.make(pipeline.steps.declare(STAGE, name, recipe, build, by_parts=True))


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the tokens that a model is scored on."""
    model = pipeline.inputs.sources.get(step.name, pipeline.inputs.target)
    read = tokens[model.tokenizer_fingerprint]["heldout"]
    if prefix := pipeline.run.evaluate.prefix_tokens:
        counts = manifest.read(corpus.make(pipeline))["counts"]["documents"]
        read += prefix * sum(count for of, count in counts.items() if of.endswith("/heldout"))
    return estimate_step(step, tokens=read)


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the time and memory of reading one batch."""
    name = step.name if step.name in calibration.pipeline.inputs.sources else ""
    measured = calibration.time_reading(name)
    if measured is None:
        return row
    return replace(row, seconds=measured.loading + row.tokens / measured.speed, memory=measured.memory)


STAGE = Stage(name="evaluate", make=make, estimate=estimate, calibrate=calibrate, loads_models=True, asks_servers=True)
