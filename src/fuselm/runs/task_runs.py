"""Ask the models of a run, or one model, tasks that no run file names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from fuselm.models.locating import locate_model
from fuselm.results.tasks import asking, catalogue, choices
from fuselm.results.tasks.summary import summarize_answers
from fuselm.runs import config
from fuselm.runs.options.evaluation import EvaluateOptions
from fuselm.runs.options.problems import describe_first_problem
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import tasks as stage
from fuselm.system import atomic_files, fingerprints, manifest, progress
from fuselm.system.foreign_text import write_json

FILE = "tasks.json"  # in a run's folder: the rows of what was asked last
CACHE = "answers"  # in the cache folder: what models outside of runs answered


def ask_run(run: Path, asked: Mapping[str, Any], overrides: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Ask all models of a run, by its file or its folder, and return the rows of `comparison.compare_models`.

    The rows are also written into the run's folder, as JSON and as Markdown. Raises `ValueError` if a task cannot be
    asked.
    """
    from fuselm.results.pages.tasks_table import write_markdown
    from fuselm.runs import plan

    given = [*overrides, *(f"evaluate.{name}={write_json(value)}" for name, value in asked.items())]
    with progress.announce(f"reading {run}, its texts and models"):
        pipeline = Pipeline(config.load(run / "config.yaml" if run.is_dir() else run, given), console)
        if not run.is_dir():
            pipeline.start()
    plan.check_disk(pipeline)
    pipeline.check("tasks", Pipeline.ask_tasks)
    rows = summarize_answers(pipeline.ask_tasks())
    atomic_files.write_text(pipeline.folder / FILE, write_json(rows, indent=1) + "\n")
    atomic_files.write_text((pipeline.folder / FILE).with_suffix(".md"), write_markdown(rows))
    return rows


def ask_model(spec: str, asked: Mapping[str, Any], *, dtype: str, console: Console) -> list[dict[str, Any]]:
    """Ask one model, and return the rows of `comparison.compare_models`; its answers are kept in the cache folder.

    Raises `ValueError` if a task cannot be asked.
    """
    try:
        options = EvaluateOptions(**asked)
    except ValidationError as error:
        raise ValueError(f"evaluate: {describe_first_problem(error, 'evaluate', EvaluateOptions)}") from None
    names = choices.expand_presets(options.tasks, run_code=options.run_code, has_documents=False)
    if heldout := [name for name in names if name in choices.HELDOUT]:
        raise ValueError(f"--tasks {heldout[0]}: asks about a run's held-out documents; name a run instead of a model")
    found = catalogue.find_tasks(
        names, include_path=options.include_path, limit=options.limit, num_fewshot=options.num_fewshot
    )
    asking.check_code(found.tasks, run_code=options.run_code)
    with progress.announce(f"reading {spec}"):
        model = locate_model(spec)
    folders = {}
    for name in found.members:
        tasks = found.choose(name)
        recipe = stage.make_recipe(options, found, name, model=model, fingerprint=model.fingerprint, dtype=dtype)
        folders[f"model {name}"] = folder = fingerprints.find_cache_folder() / CACHE / recipe.key
        if manifest.is_finished(folder):
            continue
        with progress.show_progress(console, f"{name}: {spec}") as shown:

            def build(out: Path, tasks=tasks, shown=shown) -> dict[str, int]:
                return stage.answer_tasks(out, options, tasks, model, dtype=dtype, progress=shown)

            manifest.build_once(folder, recipe, build)
    return summarize_answers(folders)
