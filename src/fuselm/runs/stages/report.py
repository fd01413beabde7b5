"""Write the results of a run, and publish them with the fused model in the run's folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.runs import publish
from fuselm.runs.estimates import Estimate
from fuselm.runs.stage import Made, Stage, TokenCounts
from fuselm.runs.stages import align, capture, corpus, evaluate, fuse, train, write
from fuselm.system import processes
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def make(pipeline: "Pipeline") -> Path:
    """Write `summary.json`, `report.html` and the model card, publish them, and return their folder."""
    from fuselm.results import report, run_summary

    options = pipeline.run.model_dump(mode="json")
    folders: dict[str, Made] = {
        stage.name: stage.make(pipeline)
        for stage in (corpus.STAGE, write.STAGE, capture.STAGE, align.STAGE, fuse.STAGE, train.STAGE, evaluate.STAGE)
    }
    folder_of = _flatten(folders)
    recipe = Recipe(
        stage=STAGE.name,
        parameters={"version": report.VERSION, "run": run_summary.select_public_options(options)},
        inputs={f"{stage} {name}": pipeline.steps.get_key(path) for (stage, name), path in folder_of.items()},
    )

    def build(out: Path, _: Progress) -> dict:
        return report.write_report(out, options, folders)

    path = pipeline.steps.make(STAGE, "", recipe, build)
    if processes.rank() == 0:
        publish.publish(
            pipeline.folder,
            path,
            folder_of[train.STAGE.name, "fused"] / train.WEIGHTS,
            key=pipeline.steps.get_key(path),
            folders={f"{stage} {name}".strip(): made for (stage, name), made in folder_of.items()},
        )
    return path


def _flatten(folders: dict[str, Made]) -> dict[tuple[str, str], Path]:
    """Return the folders by stage and name; the name is empty where a stage has one folder."""
    return {
        (stage, name): path
        for stage, made in folders.items()
        for name, path in (made.items() if isinstance(made, dict) else [("", made)])
    }


def estimate_published(pipeline: "Pipeline") -> Estimate:
    """Estimate the published model, which is beside the one of before while it is copied."""
    size = pipeline.inputs.target.parameters_bytes
    return Estimate(title=STAGE.name, tokens=0, disk=size, scratch=size)


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the published model; the results themselves are small."""
    return estimate_published(pipeline)


STAGE = Stage(name="report", make=make, estimate=estimate, needs_precision=False)
