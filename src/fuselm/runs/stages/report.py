"""Write the results of a run, and publish them with the fused model in the run's folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.models.locating import locate_model
from fuselm.runs import config, publish
from fuselm.runs.estimates import Estimate
from fuselm.runs.stage import Made, Stage, TokenCounts
from fuselm.runs.stages import align, capture, corpus, evaluate, fuse, merge, tasks, train, write
from fuselm.system import manifest, processes
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.training.choices import METHODS

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

WRITING_SECONDS = 3.0  # of the page, the card and the intervals, and of loading three small models


def make(pipeline: "Pipeline") -> Path:
    """Write `summary.json`, `report.html` and the model card, publish them, and return their folder."""
    from fuselm.results import report, run_summary

    options = pipeline.run.model_dump(mode="json", exclude={"processes"})
    folders: dict[str, Made] = {
        corpus.STAGE.name: corpus.make(pipeline),
        write.STAGE.name: write.declare(pipeline),
        capture.STAGE.name: capture.declare(pipeline),
        align.STAGE.name: align.declare(pipeline),
        fuse.STAGE.name: fuse.declare_all(pipeline),
        train.STAGE.name: train.make(pipeline),
        merge.STAGE.name: merge.make(pipeline),
        evaluate.STAGE.name: evaluate.make(pipeline),
        **({tasks.STAGE.name: asked} if (asked := tasks.make(pipeline)) else {}),
    }
    # The report has numbers of all of these except captures, which may be deleted.
    needed = [path for stage in (write, align, fuse) for path in _list_folders(folders[stage.STAGE.name])]
    folder_of = _flatten(folders)
    recipe = Recipe(
        stage=STAGE.name,
        parameters={"version": report.VERSION, "run": run_summary.select_public_options(options)},
        inputs={f"{stage} {name}": pipeline.steps.get_key(path) for (stage, name), path in folder_of.items()},
    )

    def build(out: Path, shown: Progress) -> dict:
        return report.write_report(out, options, folders, _gather_token_rows(pipeline, folder_of, shown))

    path = pipeline.steps.make(pipeline.steps.declare(STAGE, "", recipe, build, inputs=needed))
    if processes.rank() == 0:
        publish.publish(
            pipeline.folder,
            path,
            _find_model(folder_of, config.FUSED) / train.WEIGHTS,
            key=pipeline.steps.get_key(path),
            folders={f"{stage} {name}".strip(): made for (stage, name), made in folder_of.items()},
        )
    return path


def _gather_token_rows(pipeline: "Pipeline", folder_of: Mapping[tuple[str, str], Path], shown: Progress) -> dict:
    """Return what sources, the fusion and the target's models say about the tokens of a few documents."""
    from fuselm.results.token_rows import ReadModel, gather_token_rows

    models = {"base": pipeline.inputs.target}
    for method in METHODS:
        weights = _find_model(folder_of, method) / train.WEIGHTS
        if weights.is_dir():  # those of clm may have been deleted
            models[method] = locate_model(str(weights))
    return gather_token_rows(
        pipeline.documents,
        pipeline.inputs.target_vocabulary,
        {
            name: ReadModel(model=model, dtype=_find_dtype(folder_of[evaluate.STAGE.name, name]))
            for name, model in models.items()
        },
        {name: path for (stage, name), path in folder_of.items() if stage == align.STAGE.name},
        folder_of.get((fuse.STAGE.name, "")),
        progress=shown,
    )


def _find_model(folder_of: Mapping[tuple[str, str], Path], method: str) -> Path:
    """Return the folder of a method's model: the merge's, where `fused` is merged."""
    merged = folder_of.get((merge.STAGE.name, "")) if method == config.FUSED else None
    return merged or folder_of[train.STAGE.name, method]


def _find_dtype(evaluated: Path) -> str:
    """Return the precision in which a model was read for its scores; older folders do not say it."""
    return manifest.read(evaluated)["counts"].get("dtype", "auto")


def _list_folders(made: Made) -> list[Path]:
    return list(made.values()) if isinstance(made, dict) else [made]


def _flatten(folders: dict[str, Made]) -> dict[tuple[str, str], Path]:
    """Return the folders by stage and name; the name is empty where a stage has one folder."""
    return {
        (stage, name): path
        for stage, made in folders.items()
        for name, path in (made.items() if isinstance(made, dict) else [("", made)])
    }


def estimate_published(pipeline: "Pipeline", tokens: TokenCounts) -> Estimate:
    """Estimate the published model, which is beside the one of before while it is copied, and the token view.

    The target's models read the same few documents, at most all of those that are chosen from.
    """
    from fuselm.results import token_rows

    size = pipeline.inputs.target.parameters_bytes
    counted = tokens[pipeline.inputs.target.tokenizer_fingerprint]
    most = token_rows.MOST_DOCUMENTS * token_rows.MOST_TOKENS
    read = sum(min(most, counted[split]) for split in token_rows.SPLITS)
    return Estimate(title=STAGE.name, tokens=read * (1 + len(METHODS)), disk=size, scratch=size)


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the published model and the token view; the results themselves are small."""
    return estimate_published(pipeline, tokens)


def calibrate_published(calibration: "Calibration", row: Estimate) -> Estimate:
    """Add the time of writing the page and of loading and reading the models of the token view, and their memory."""
    measured = calibration.time_reading("")
    if measured is None:
        return replace(row, seconds=WRITING_SECONDS)
    loading = (1 + len(METHODS)) * measured.loading
    return replace(row, seconds=WRITING_SECONDS + loading + row.tokens / measured.speed, memory=measured.memory)


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add time and memory, as `calibrate_published` does."""
    return calibrate_published(calibration, row)


STAGE = Stage(name="report", make=make, estimate=estimate, calibrate=calibrate, needs_precision=False)
