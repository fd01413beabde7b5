"""Compare models on tasks: shares of right answers and other means, and paired differences with 95% intervals.

Questions about one document are not independent, so documents are resampled, the same for all models. Where each answer
is right or wrong, the exact test of McNemar counts the questions that only one of two models has right.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.results.seed_intervals import find_seed_interval
from fuselm.results.tasks.answers import Answers

RESAMPLES = 4000
CHUNK = 1 << 22  # weights of documents that are drawn at once
LEVEL = 0.95
PAIRS = (("fused", "clm"), ("fused", "base"), ("clm", "base"))
SHOWN_MEMBERS = 12  # tasks of a group that have rows of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Hold the answers of several models to the same questions: sums over each document, by model, and counts."""

    sums: Float[ndarray, "documents models"]
    counts: Float[ndarray, "documents"]
    values: Float[ndarray, "questions models"]


def compare_models(
    seeds: Sequence[Mapping[str, Answers]],
    numbers: Mapping[str, Any],
    members: Mapping[str, Sequence[str]],
    pairs: Sequence[tuple[str, str]],
    by_size: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """Return a row for each task, or group of tasks, and metric that all models have.

    `seeds` are the answers of each seed by model and task; `numbers` are one model's, of `answers.read_answers`.
    `members` are the tasks that each asked-for name stands for, and `by_size` says whether the group's mean counts
    questions. Rows have `task`, `group`, `metric`, `questions`, `higher_is_better`, `models` and `differences`.
    """
    rows = []
    for name, tasks in members.items():
        metrics = _list_metrics(seeds, tasks)
        for metric in metrics if len(tasks) > 1 else ():
            rows.append(_compare(seeds, name, None, tasks, metric, numbers, pairs, weighs=by_size.get(name, True)))
        if len(tasks) <= SHOWN_MEMBERS or not metrics:
            for task in tasks:
                group = name if len(tasks) > 1 else None
                found = _list_metrics(seeds, [task])
                rows += [_compare(seeds, task, group, [task], m, numbers, pairs, weighs=True) for m in found]
    return rows


def _list_metrics(seeds: Sequence[Mapping[str, Answers]], tasks: Sequence[str]) -> list[str]:
    """Return the metrics that all models have a number of for each question of these tasks."""
    found = [
        answers[task].values if task in answers else {} for by in seeds for answers in by.values() for task in tasks
    ]
    return [metric for metric in (found[0] if found else {}) if all(metric in values for values in found)]


def _compare(
    seeds: Sequence[Mapping[str, Answers]],
    name: str,
    group: str | None,
    tasks: Sequence[str],
    metric: str,
    numbers: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
    *,
    weighs: bool,
) -> dict[str, Any]:
    models = list(seeds[0])
    parts = [list(tasks)] if weighs else [[task] for task in tasks]  # whose means are averaged
    compared = [_gather(seeds, part, metric, models) for part in parts]
    values = np.mean([c.sums.sum(0) / c.counts.sum() for c in compared], axis=0)
    drawn = np.mean([_resample(c, n) for n, c in enumerate(compared)], axis=0)
    of_seeds = [np.mean([_mean(_gather([by], part, metric, models)) for part in parts], axis=0) for by in seeds]
    is_known = sum(len(c.counts) for c in compared) >= FEWEST_DOCUMENTS
    higher = numbers[tasks[0]]["higher_is_better"].get(metric.partition(" (")[0], True)

    def make_cell(value: float, samples: ndarray, by_seed: list[float]) -> dict[str, Any]:
        low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        cell: dict[str, Any] = {"value": value, "low": float(low), "high": float(high)}
        if len(by_seed) > 1:
            wide = find_seed_interval(value, by_seed, float(samples.std()))
            cell |= {"low": wide.low, "high": wide.high, "by_seed": by_seed}
        return cell if is_known else cell | {"low": None, "high": None}

    def count_wins(a: int, b: int) -> dict[str, Any]:
        answered = np.concatenate([c.values for c in compared])
        if not np.isin(answered, (0.0, 1.0)).all():
            return {}
        first, second = (int((answered[:, x] > answered[:, y]).sum()) for x, y in ((a, b), (b, a)))
        return {"only_first": first, "only_second": second, "p": compute_mcnemar_p(first, second)}

    places = {model: n for n, model in enumerate(models)}
    chosen = [(places[a], places[b], f"{a}-{b}") for a, b in pairs if a in places and b in places]
    return {
        "task": name,
        "group": group,
        "metric": metric,
        "questions": sum(len(c.values) for c in compared),
        "higher_is_better": higher,
        "models": {
            model: make_cell(float(values[n]), drawn[:, n], [float(of[n]) for of in of_seeds])
            for model, n in places.items()
        },
        "differences": {
            pair: make_cell(
                float(values[a] - values[b]), drawn[:, a] - drawn[:, b], [float(of[a] - of[b]) for of in of_seeds]
            )
            | count_wins(a, b)
            for a, b, pair in chosen
        },
    }


def _gather(
    seeds: Sequence[Mapping[str, Answers]], tasks: Sequence[str], metric: str, models: Sequence[str]
) -> Compared:
    """Return the answers to all questions of some tasks; a document of several seeds is one document."""
    documents: dict[tuple[str, str], int] = {}
    places, values = [], []
    for by_model in seeds:
        for task in tasks:
            asked = by_model[models[0]][task]
            if any(by_model[model][task].questions != asked.questions for model in models):
                raise ValueError(f"{task}: models were asked different questions; delete their answers and ask again")
            places += [documents.setdefault((task, document), len(documents)) for document in asked.documents]
            values.append(np.array([by_model[model][task].values[metric] for model in models], np.float64).T)
    table, place = np.concatenate(values), np.array(places)
    sums = np.zeros((len(documents), len(models)))
    np.add.at(sums, place, table)
    return Compared(sums=sums, counts=np.bincount(place).astype(np.float64), values=table)


def _mean(compared: Compared) -> Float[ndarray, "models"]:
    return compared.sums.sum(0) / compared.counts.sum()


def _resample(compared: Compared, seed: int) -> Float[ndarray, "resamples models"]:
    """Return each model's mean on resamples of the documents, the same for all of them."""
    documents = len(compared.counts)
    generator, means = np.random.default_rng([seed, documents]), []
    chances, rows = np.full(documents, 1 / documents), max(CHUNK // documents, 1)
    for start in range(0, RESAMPLES, rows):
        drawn = generator.multinomial(documents, chances, size=min(rows, RESAMPLES - start)).astype(np.float64)
        means.append(drawn @ compared.sums / (drawn @ compared.counts)[:, None])
    return np.concatenate(means)


def compute_mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided probability that questions which could be either's are split as unevenly as this."""
    count, least = only_first + only_second, min(only_first, only_second)
    terms = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(least + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term - count * math.log(2)) for term in terms))


def judge_difference(cell: Mapping[str, Any], *, higher_is_better: bool) -> str:
    """Judge a difference by its interval: `better`, `worse`, `level` where it holds 0, `unknown` without one."""
    if cell["low"] is None:
        return "unknown"
    if cell["low"] <= 0 <= cell["high"]:
        return "level"
    return "better" if (cell["low"] > 0) == higher_is_better else "worse"
