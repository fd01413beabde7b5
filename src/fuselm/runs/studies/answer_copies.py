"""Copy what a model answered for another seed: a model as it is answers the same questions alike, whatever the seed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from fuselm.runs.steps import Step
from fuselm.system import manifest
from fuselm.system.remote_paths import is_remote

SEEDS = "seed-*"  # the folders of a study's seeds


def take_answers(study: Path, steps: Sequence[Step]) -> None:
    """Fill the folders of steps that are not done from those of other seeds that have the same key."""
    if is_remote(study):
        return
    for step in steps:
        others = [] if step.done else sorted(study.glob(f"{SEEDS}/{step.stage.name}/{step.folder.name}"))
        finished = [folder for folder in others if folder != step.folder and manifest.is_finished(folder)]
        if finished:
            copied = step.folder.with_name(f"{step.folder.name}.copied")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(finished[0], copied)
            copied.rename(step.folder)
