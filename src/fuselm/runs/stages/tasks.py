"""Ask every model the tasks of `evaluate.tasks`, by lm-eval: a folder for each model and each name that was given."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.models.locating import Model, locate_model
from fuselm.results.tasks import answers, asking, catalogue, choices, heldout_questions
from fuselm.results.tasks.catalogue import FoundTasks
from fuselm.runs.estimates import Estimate, estimate_step
from fuselm.runs.options.evaluation import EvaluateOptions
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import merge, train
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.training.choices import METHODS

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Hold a model that is asked: where it is, what identifies it, and its number type."""

    name: str
    model: Model
    fingerprint: str
    dtype: str
    role: str


def make(pipeline: "Pipeline") -> dict[str, Path]:
    """Ask the target as it was, every source and every method's best model. Return folders by model and task."""
    if not pipeline.run.evaluate.tasks:
        return {}
    train.make(pipeline)
    merge.make(pipeline)
    names = ("base", *(n for n in pipeline.inputs.sources if n not in pipeline.inputs.servers), *METHODS)
    return {key: path for name in names for key, path in ask_model(pipeline, name).items()}


def ask_model(pipeline: "Pipeline", name: str) -> dict[str, Path]:
    """Ask `base`, a source or a method's best model. Return its folders by model and task; none without tasks.

    A source that is the target shares its folders.
    """
    if not pipeline.run.evaluate.tasks or name in pipeline.inputs.servers:
        return {}
    asked, found = _identify(pipeline, name), find_tasks(pipeline)
    folders = {f"{name} {task}": _declare(pipeline, asked, task, found) for task in found.members}
    pipeline.steps.make_all(list(folders.values()))
    return folders


def find_tasks(pipeline: "Pipeline") -> FoundTasks:
    """Load the tasks of a run. Raises `ValueError` if one cannot be asked."""
    options = pipeline.run.evaluate
    names = choices.expand_presets(options.tasks, run_code=options.run_code, has_documents=True)
    own: Mapping[str, Any] = {}
    if set(names) & set(choices.HELDOUT):
        heldout = [d for d in pipeline.documents.select("heldout") if isinstance(d.text, str)]
        own = {n: s for n, s in heldout_questions.write_settings(heldout).items() if n in names}
    found = catalogue.find_tasks(
        names, include_path=options.include_path, limit=options.limit, num_fewshot=options.num_fewshot, own=own
    )
    asking.check_code(found.tasks, run_code=options.run_code)
    return found


def make_recipe(
    options: EvaluateOptions, found: FoundTasks, name: str, *, model: Model, fingerprint: str, dtype: str
) -> Recipe:
    """Return what the answers of a model to the tasks of a name are made from."""
    tasks = found.choose(name)
    return Recipe(
        stage=STAGE.name,
        parameters={
            "tasks": {task: found.hashes[task] for task in tasks},
            "limit": options.limit,
            "num_fewshot": {task: of.get_config("num_fewshot") for task, of in tasks.items()},
            "chat_template": options.chat_template,
            "dtype": dtype,
            "lm_eval": catalogue.find_version(),
        },
        inputs={"model": fingerprint, "tokenizer": model.tokenizer_fingerprint},
        about={"name": name, "by_size": found.by_size[name]},
    )


def answer_tasks(
    out: Path, options: EvaluateOptions, tasks: Mapping[str, Any], model: Model, *, dtype: str, progress: Progress
) -> dict[str, int]:
    """Ask a model the questions of some tasks, write its answers to a folder, and count both."""
    rows, numbers = asking.ask_model(
        model,
        tasks,
        dtype=dtype,
        batch_tokens=options.batch_tokens,
        limit=options.limit,
        chat_template=options.chat_template,
        run_code=options.run_code,
        progress=progress,
    )
    answers.write_answers(out, rows, numbers)
    return {"tasks": len(tasks), "questions": sum(of["questions"] for of in numbers.values())}


def _identify(pipeline: "Pipeline", name: str) -> _Asked:
    inputs, run, precision = pipeline.inputs, pipeline.run, pipeline.precision
    if name in METHODS:
        key = pipeline.steps.get_key(merge.find_trained(pipeline, name, needs_weights=False))
        return _Asked(name=name, model=inputs.target, fingerprint=key, dtype=run.target.dtype, role="target")
    if name in inputs.sources:
        source, dtype = inputs.sources[name], precision.read_option(f"source {name}")
        same = (source.fingerprint, source.tokenizer_fingerprint, dtype)
        if same != (inputs.target.fingerprint, inputs.target.tokenizer_fingerprint, run.target.dtype):
            role = f"source {name}"
            return _Asked(name=name, model=source, fingerprint=source.fingerprint, dtype=dtype, role=role)
    target = inputs.target
    return _Asked(name="base", model=target, fingerprint=target.fingerprint, dtype=run.target.dtype, role="target")


def _declare(pipeline: "Pipeline", asked: _Asked, name: str, found: FoundTasks) -> Path:
    options, tasks = pipeline.run.evaluate, found.choose(name)
    recipe = make_recipe(options, found, name, model=asked.model, fingerprint=asked.fingerprint, dtype=asked.dtype)

    def build(out: Path, shown: Progress) -> dict:
        located = asked.model
        if asked.name in METHODS:
            located = locate_model(str(merge.find_trained(pipeline, asked.name) / train.WEIGHTS))
        counts = answer_tasks(
            out, options, tasks, located, dtype=pipeline.precision.choose_dtype(asked.role, located), progress=shown
        )
        for task in tasks.values():
            if name in choices.HELDOUT:
                heldout_questions.write_task_files(task.config.to_dict(keep_callable=True), out)
        return counts

    folder = re.sub(r"[^\w.-]+", "_", f"{asked.name}-{name}")
    return pipeline.steps.declare(STAGE, folder, recipe, build, f"{asked.name} {name}")


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the answers, which are small; how many tokens the questions have is known when they are read."""
    return estimate_step(step, tokens=0)


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the memory of reading one batch; the time depends on the tasks."""
    measured = calibration.time_reading("")
    return row if measured is None else replace(row, memory=measured.memory)


STAGE = Stage(name="tasks", make=make, estimate=estimate, calibrate=calibrate, loads_models=True)
