"""Merge what was trained into the fused model: the copies of the target that sources were fused into, and others."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.models.locating import Model, locate_model
from fuselm.models.merging.choices import METHODS
from fuselm.runs import config
from fuselm.runs.estimates import Estimate, estimate_step
from fuselm.runs.merging.recipe import MergedModel, MergeOptions
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import corpus, train
from fuselm.system import atomic_files, manifest, processes
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

# Sums over the copies, and what is of one of them; see `target_training`.
SUMMED, SHARED = ("steps", "planned_steps", "tokens"), ("text_tokens",)


def make(pipeline: "Pipeline") -> dict[str, Path]:
    """Merge, and return the folder of the merged model under the empty name; nothing if the run merges nothing."""
    return {} if pipeline.run.merging is None else {"": _make_merged(pipeline, needs_weights=True)}


def find_trained(pipeline: "Pipeline", method: str, *, needs_weights: bool = True) -> Path:
    """Make a method's model, `clm` or `fused`, and return its folder: the merge's, where `fused` is merged.

    A model whose weights were dropped is made again if the caller `needs_weights`.
    """
    if method == config.FUSED and pipeline.run.merging is not None:
        return _make_merged(pipeline, needs_weights=needs_weights)
    return train.train_method(pipeline, method, needs_weights=needs_weights)


def _make_merged(pipeline: "Pipeline", *, needs_weights: bool) -> Path:
    folder, merging = _declare(pipeline), pipeline.run.merging
    if not pipeline.steps.makes_folders or merging is None:
        return pipeline.steps.make(folder)
    is_dropped = manifest.is_finished(folder) and not (folder / train.WEIGHTS).is_dir()
    if not manifest.is_finished(folder) or (is_dropped and needs_weights):
        for name in _list_trained(pipeline):
            train.train_method(pipeline, name)  # its weights may have been dropped
        if is_dropped:
            manifest.reopen_stage(folder)
    pipeline.steps.make(folder)
    if not merging.keep_copies and processes.rank() == 0:
        for copy in pipeline.inputs.copies:
            train.drop_weights(train.train_method(pipeline, copy, needs_weights=False))
    return folder


def _list_trained(pipeline: "Pipeline") -> list[str]:
    """Return the names of the trainings whose models are merged."""
    return pipeline.inputs.copies or [config.FUSED]


def _declare(pipeline: "Pipeline") -> Path:
    """Return the folder of the merged model; merge nothing, but make what is trained."""
    inputs, merging = pipeline.inputs, pipeline.run.merging
    assert merging is not None
    names = _list_trained(pipeline)
    trained = {name: train.train_method(pipeline, name, needs_weights=False) for name in names}
    keys = {name: pipeline.steps.get_key(folder) for name, folder in trained.items()}
    others = {name: model.fingerprint for name, model in inputs.merged.items()}
    recipe = Recipe(
        stage=STAGE.name,
        parameters=_describe_merge(merging, [*trained, *others], pipeline.run.seed),
        inputs={
            **{f"model {name}": key for name, key in (keys | others).items()},
            **({"base": inputs.merge_base.fingerprint} if merging.takes_base else {}),
            "target": inputs.target.fingerprint,
            "tokenizer": inputs.target.tokenizer_fingerprint,
            "corpus": corpus.identify(pipeline),
        },
    )

    def build(out: Path, shown: Progress) -> dict[str, Any]:
        folders = {name: train.train_method(pipeline, name) for name in names}
        models = {name: locate_model(str(folder / train.WEIGHTS)) for name, folder in folders.items()}
        _merge(pipeline, _write_recipe(pipeline, models | inputs.merged), out, shown)
        return _summarize(pipeline, out, folders, shown)

    return pipeline.steps.declare(STAGE, "", recipe, build, inputs=list(trained.values()))


def _describe_merge(merging: config.RunMergeOptions, names: list[str], seed: int) -> dict[str, Any]:
    """Return all that the merge depends on beside its models."""
    options = merging.write_recipe({name: name for name in names}, "base", seed)
    described = options.model_dump(include={"method", "parameters"})
    own = {m.model: m.model_dump()["parameters"] for m in options.models if m.parameters}
    return described | ({"by_model": own} if own else {}) | ({"seed": seed} if options.draws else {})


def _write_recipe(pipeline: "Pipeline", models: Mapping[str, Model]) -> MergeOptions:
    """Return the merge of located models, by name, for this machine."""
    merging = pipeline.run.merging
    assert merging is not None
    places = {name: str(model.folder) for name, model in models.items()}
    return merging.write_recipe(places, str(pipeline.inputs.merge_base.folder), pipeline.run.seed)


def check_models(pipeline: "Pipeline") -> None:
    """Raise `ValueError` unless the models that the run does not train can be merged with the target."""
    from fuselm.runs.merging.merge import plan_merge

    inputs = pipeline.inputs
    models = [inputs.target, inputs.merge_base, *inputs.merged.values()]
    merged = [MergedModel(model=str(model.folder)) for model in models]
    try:
        plan_merge(MergeOptions(method="linear", models=merged, parameters={"weight": 1.0}), like=inputs.target)
    except ValueError as error:
        raise ValueError(f"merge: {error}") from None


def _merge(pipeline: "Pipeline", options: MergeOptions, out: Path, shown: Progress) -> None:
    """Write the merged model with the target's configuration, tokenizer and templates."""
    from fuselm.runs.merging.merge import plan_merge, write_merged_model

    plan = plan_merge(options, like=pipeline.inputs.target)
    if METHODS[options.method].needs_texts:
        from fuselm.runs.merging.soup import prepare_soup

        dev = pipeline.documents.select("dev")
        plan = prepare_soup(plan, dev, pipeline.inputs.target_vocabulary, out, shown)
    write_merged_model(plan, out / train.WEIGHTS, shown)


def _summarize(pipeline: "Pipeline", out: Path, folders: Mapping[str, Path], shown: Progress) -> dict[str, Any]:
    """Score the merged model on the development split; return what a training counts, summed over those merged."""
    from fuselm.results import bits_per_byte, scoring

    merged = locate_model(str(out / train.WEIGHTS))
    scores = bits_per_byte.score_model(
        merged,
        pipeline.inputs.load_trained_vocabulary(merged),
        pipeline.documents.select("dev"),
        dtype=pipeline.precision.choose_dtype("target", merged),
        batch_tokens=pipeline.run.evaluate.batch_tokens,
        progress=shown,
    )
    dev = scoring.compute_bits_per_byte(scores)
    records = [manifest.read(folder)["counts"] for folder in folders.values()]
    counts: dict[str, Any] = {name: sum(record.get(name, 0) for record in records) for name in SUMMED}
    counts |= {name: records[0][name] for name in SHARED}
    for seal in (out / train.WEIGHTS).glob(".*"):
        seal.unlink()
    history = {"dev": [{"step": counts["steps"], **dev}], "log": []}
    atomic_files.write_text(out / "history.json", json.dumps(history, sort_keys=True))
    return counts | {
        "best_step": counts["steps"],
        "dev_bits_per_byte": dev["average"],
        "models": {name: record["dev_bits_per_byte"] for name, record in zip(folders, records, strict=True)},
    }


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the merged model, and the tokens of the development split that it is scored on."""
    target = pipeline.inputs.target
    return estimate_step(step, tokens=tokens[target.tokenizer_fingerprint]["dev"], disk=target.parameters_bytes)


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the time of reading and writing all models, and of scoring the development split."""
    measured = calibration.time_reading("")
    if measured is None:
        return row
    inputs = calibration.pipeline.inputs
    moved = inputs.target.parameters_bytes * (2 + len(inputs.copies) + len(inputs.merged))
    seconds = calibration.time_writing(moved) + measured.loading + row.tokens / measured.speed
    return replace(row, seconds=seconds, memory=measured.memory)


STAGE = Stage(name="merge", make=make, estimate=estimate, calibrate=calibrate, loads_models=True, merges=True)
