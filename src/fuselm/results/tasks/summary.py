"""Gather what all models of a run, or of the seeds of a study, answered, from the folders of their answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fuselm.results.tasks.answers import TaskAnswers, read_answers
from fuselm.results.tasks.comparison import PAIRS, compare_models
from fuselm.results.verdicts import TARGETS
from fuselm.system import manifest


def summarize_answers(
    folders: Mapping[str, Path], pairs: Sequence[tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each task and metric, as `comparison.compare_models` does.

    `folders` are those of a run, by the model's name, a space, and the name that stands for the task.
    """
    by_model: dict[str, list[Path]] = {}
    for key, folder in folders.items():
        by_model.setdefault(key.partition(" ")[0], []).append(folder)
    ordered = [*(n for n in by_model if n not in TARGETS), *(n for n in TARGETS if n in by_model)]
    if pairs is None:
        pairs = [*PAIRS, *(("fused", name) for name in ordered if name not in TARGETS)]
    return summarize_seeds([{name: by_model[name] for name in ordered}], pairs)


def summarize_seeds(
    seeds: Sequence[Mapping[str, Sequence[Path]]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return the rows of several seeds together, each with the folders of every model's answers."""
    members: dict[str, list[str]] = {}
    by_size: dict[str, bool] = {}
    numbers: dict[str, Any] = {}
    found: list[dict[str, dict[str, TaskAnswers]]] = []
    for by_model in seeds:
        found.append({name: {} for name in by_model})
        for name, folders in by_model.items():
            for folder in folders:
                answers, told = read_answers(folder)
                about = manifest.read(folder)["about"]
                members.setdefault(about["name"], list(told))
                by_size[about["name"]] = about["by_size"]
                numbers |= told
                found[-1][name].update(answers)
    return compare_models(found, numbers, members, pairs, by_size)
