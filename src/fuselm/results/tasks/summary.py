"""Gather what all models of a run, or of the seeds of a study, answered, from the folders of their answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fuselm.results.tasks.answers import Answers, read_answers
from fuselm.results.tasks.comparison import PAIRS, compare_models
from fuselm.results.verdicts import TARGETS
from fuselm.system import manifest


def summarize_answers(
    folders: Mapping[str, Path], pairs: Sequence[tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each task and metric, as `comparison.compare_models` does.

    `folders` are those of a run, by the model's name, a space, and the name that stands for the task.
    """
    return summarize_seeds([folders], pairs)


def summarize_seeds(
    seeds: Sequence[Mapping[str, Path]], pairs: Sequence[tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of several seeds together, each with the folders of its own."""
    members: dict[str, list[str]] = {}
    by_size: dict[str, bool] = {}
    numbers: dict[str, Any] = {}
    found: list[dict[str, dict[str, Answers]]] = []
    for folders in seeds:
        found.append({})
        for key, folder in folders.items():
            answers, told = read_answers(folder)
            about = manifest.read(folder)["about"]
            members.setdefault(about["name"], list(told))
            by_size[about["name"]] = about["by_size"]
            numbers |= told
            found[-1].setdefault(key.partition(" ")[0], {}).update(answers)
    found = [{name: by[name] for name in _order(list(by))} for by in found]
    models = list(found[0])
    if pairs is None:
        pairs = [*PAIRS, *(("fused", name) for name in models if name not in TARGETS)]
    return compare_models(found, numbers, members, pairs, by_size)


def _order(models: list[str]) -> list[str]:
    """Put the sources before the models of the target's size, as tables of bits per byte do."""
    return [*(n for n in models if n not in TARGETS), *(n for n in TARGETS if n in models)]
