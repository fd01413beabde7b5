"""Compute every number of a study from the scores that exist: `study.json`, which its pages are made of.

An experiment uses the seeds that all its arms have; arms without any scores are left out of that. An arm's bits per
byte are those of these seeds' held-out documents together; a resample draws a document with its scores of all seeds.
Intervals of several seeds are over seeds and documents together. Those of one seed are over its documents alone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.results import bootstrap, scoring
from fuselm.results.bootstrap import Bootstrap, Interval, Resampled
from fuselm.results.json_numbers import replace_nonfinite
from fuselm.results.scoring import Score
from fuselm.results.seed_intervals import SMALLEST, adjust_for_comparisons, find_seed_interval
from fuselm.results.tasks.summary import summarize_seeds
from fuselm.runs.options.study import ExperimentOptions
from fuselm.runs.studies import trials
from fuselm.runs.studies.study import Study, list_arms
from fuselm.system import atomic_files, manifest
from fuselm.system.foreign_text import write_json
from fuselm.system.public_names import name_options_publicly

ROUNDING = 1e-9  # so near to an end of a line a point is that end
Scores = Mapping[str, Mapping[int, Sequence[Score]]]  # of arms, by seed


def compare_arms(grid: trials.Grid) -> dict[str, Any]:
    """Return the contents of `study.json`; None stands for numbers that do not exist yet."""
    study = grid.study
    arms: dict[str, Any] = {}
    scores: dict[str, dict[int, list[Score]]] = {}
    answers: dict[str, dict[int, list[Path]]] = {}
    for name, arm in study.arms.items():
        scores[name], answers[name], seeds = {}, {}, {}
        for seed in arm.seeds:
            state = grid.read_state(arm, seed)
            if state.scores_folder is not None:
                scores[name][seed] = [Score(**row) for row in manifest.read_json(state.scores_folder / "scores.json")]
            if state.is_measured and state.answers_folders:
                answers[name][seed] = state.answers_folders
            seeds[str(seed)] = {
                "trials": [_summarize_trial(trial, state) for trial in state.trials if trial.training_step is not None],
                "bits_per_byte": scoring.compute_bits_per_byte(scores[name][seed]) if seed in scores[name] else None,
            }
        arms[name] = {
            "method": arm.method,
            "set": name_options_publicly(arm.settings),
            "sources": list(arm.sources),
            "seeds": seeds,
            "given_tokens": _average_given_tokens(seeds),
        }
    pools = Pools(scores)
    return replace_nonfinite(
        {
            "file": study.file.name,
            "run": study.run_file.name,
            "seeds": list(study.seeds),
            "set": name_options_publicly(study.settings),
            "models": _name_models(study),
            "sources": list(study.sources),
            "domains": pools.domains,
            "heldout": _count_heldout(scores),
            "arms": arms,
            "experiments": [_compute_experiment(experiment, arms, pools, answers) for experiment in study.experiments],
            "version": metadata.version("fuselm"),
        }
    )


def _name_models(study: Study) -> dict[str, str]:
    """Return the file, folder or hub id of the target, as `base`, and of each source that arms have."""
    names: dict[str, str] = {}
    for arm in study.arms.values():
        run = study.run_options(arm, arm.seeds[0], arm.trials[0])
        names |= {"base": run.target.model, **{name: source.model for name, source in run.sources.items()}}
    return {name: Path(model).name for name, model in names.items()}


class Pools:
    """Compute intervals of arms and of their differences, resampling each arm once."""

    def __init__(self, scores: Scores):
        self._scores = scores
        self._bootstraps: dict[tuple[int, ...], Bootstrap] = {}
        self._resampled: dict[tuple[str, tuple[int, ...]], Resampled] = {}
        self.domains = sorted({s.domain for by_seed in scores.values() for rows in by_seed.values() for s in rows})

    def find_shared_seeds(self, arms: Sequence[str]) -> tuple[int, ...]:
        """Return the seeds that all arms have. Arms without any are ignored."""
        scored = [self._scores[arm] for arm in arms if self._scores[arm]]
        return tuple(seed for seed in scored[0] if all(seed in by_seed for by_seed in scored)) if scored else ()

    def compute_intervals(self, seeds: tuple[int, ...], arm: str, against: str | None = None) -> dict[str, Any] | None:
        """Return the intervals of an arm, or of it minus another; None where one has none of the seeds."""
        names = [name for name in (arm, against) if name is not None]
        if not seeds or not all(self._scores[name] for name in names):
            return None
        resampled, drawn = [self._resample(name, seeds) for name in names], self._build_bootstrap(seeds, arm)
        intervals, errors = drawn.compare(*resampled), drawn.compute_errors(*resampled)
        each = [[scoring.compute_bits_per_byte(self._scores[name][seed]) for name in names] for seed in seeds]
        by_seed = {n: [of[0][n] - sum(rival[n] for rival in of[1:]) for of in each if n in of[0]] for n in intervals}
        cells = {name: _widen(interval, by_seed[name], errors[name]) for name, interval in intervals.items()}
        for cell in cells.values() if against is not None and len(seeds) == 1 else ():
            cell["too_small"] = abs(cell["value"]) < SMALLEST
        return cells

    def sample_averages(self, seeds: tuple[int, ...], arm: str) -> Float[ndarray, "resamples"]:
        """Return an arm's average bits per byte on each resample of documents."""
        return self._resample(arm, seeds).samples[:, -1]

    def compute_averages(self, seeds: tuple[int, ...], arm: str) -> dict[str, float]:
        """Return an arm's average bits per byte, by seed."""
        by_seed = self._scores[arm]
        return {str(s): scoring.compute_bits_per_byte(by_seed[s])["average"] for s in seeds if s in by_seed}

    def compute_unspelled_shares(self, seeds: tuple[int, ...], arm: str) -> dict[str, float]:
        """Return the shares of bytes that an arm does not spell, by domain; empty if there are none."""
        rows = self._scores[arm]
        return scoring.compute_unspelled_shares(bootstrap.pool_seeds([rows[seed] for seed in seeds if seed in rows]))

    def _build_bootstrap(self, seeds: tuple[int, ...], arm: str) -> Bootstrap:
        if seeds not in self._bootstraps:
            self._bootstraps[seeds] = Bootstrap(bootstrap.pool_seeds([self._scores[arm][seed] for seed in seeds]))
        return self._bootstraps[seeds]

    def _resample(self, arm: str, seeds: tuple[int, ...]) -> Resampled:
        if (arm, seeds) not in self._resampled:
            pooled = bootstrap.pool_seeds([self._scores[arm][seed] for seed in seeds])
            self._resampled[arm, seeds] = self._build_bootstrap(seeds, arm).resample(pooled)
        return self._resampled[arm, seeds]


def interpolate_tokens_needed(points: Sequence[tuple[float, float]], value: float) -> tuple[float, str]:
    """Return how many tokens a line of (tokens, bits per byte) takes to reach a value, and `<`, `>` or nothing.

    The line is linear in the logarithm of tokens between its points. `<` says that its first point is already better
    than the value, `>` that no point reaches it.
    """
    points = sorted(points)
    if points[0][1] <= value:
        return points[0][0], "<" if points[0][1] < value else ""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= value:
            return math.exp(math.log(x0) + (y0 - value) / (y0 - y1) * (math.log(x1) - math.log(x0))), ""
    return points[-1][0], ">"


def _summarize_trial(trial: trials.Trial, state: trials.State) -> dict[str, Any]:
    assert trial.training_step is not None
    summary = {
        "settings": name_options_publicly(trial.settings),
        "chosen": state.best_trial is trial,
        "done": trial.training_step.done,
    }
    if not trial.training_step.done:
        return summary
    record = manifest.read(trial.training_step.folder)
    history = manifest.read_json(trial.training_step.folder / "history.json")
    counted = ("steps", "best_step", "tokens", "text_tokens", "dev_bits_per_byte")
    return summary | {
        **{name: record["counts"][name] for name in counted},
        "given_tokens": trial.given_tokens,
        "parameters": record["parameters"],
        "seconds": record["seconds"],
        "dev": history["dev"],
    }


def _average_given_tokens(seeds: Mapping[str, Any]) -> float | None:
    """Return the tokens of the training text without what sources wrote, in the mean over seeds."""
    chosen = [trial["given_tokens"] for state in seeds.values() for trial in state["trials"] if trial["chosen"]]
    return float(np.mean(chosen)) if chosen else None


def _count_heldout(scores: Scores) -> dict[str, dict[str, int]]:
    """Return the number of held-out documents and bytes, by seed."""
    rows = {seed: found for by_seed in scores.values() for seed, found in by_seed.items()}
    return {str(s): {"documents": len(r), "bytes": sum(score.bytes for score in r)} for s, r in sorted(rows.items())}


def _widen(interval: Interval, by_seed: Sequence[float], error: float) -> dict[str, Any]:
    """Return the interval over seeds and documents, that over `documents` alone, and the p-value of its value."""
    cell = asdict(interval)
    if interval.low is None:
        return cell
    found = find_seed_interval(interval.value, by_seed, error)
    cell["p"] = found.p
    if len(by_seed) == 1:
        return cell  # the bootstrap's own is exact in its tails
    return cell | {"low": found.low, "high": found.high, "documents": [interval.low, interval.high]}


def _adjust_p_values(differences: Mapping[str, Any]) -> dict[str, float]:
    """Return the p-values of the averages' differences, adjusted for the number of comparisons in the experiment."""
    found = {name: cells["average"]["p"] for name, cells in differences.items() if cells and "p" in cells["average"]}
    return adjust_for_comparisons(found)


def _compute_experiment(
    options: ExperimentOptions,
    arms: Mapping[str, Any],
    pools: Pools,
    answers: Mapping[str, Mapping[int, Sequence[Path]]],
) -> dict[str, Any]:
    names, rivals = list_arms(options), _find_rivals(options)
    seeds = pools.find_shared_seeds(names)
    values = {name: pools.compute_intervals(seeds, name) for name in names}
    averages = {name: pools.compute_averages(seeds, name) for name in names}
    result = options.model_dump() | {
        "arms": names,
        "against": rivals,
        "seeds": list(seeds),
        "values": values,
        "by_seed": averages,
        "spread": {n: float(np.std(list(v.values()), ddof=1)) if len(v) > 1 else None for n, v in averages.items()},
        "differences": {name: pools.compute_intervals(seeds, name, rival) for name, rival in rivals.items()},
    }
    if rows := _compare_answers(names, rivals, answers):
        result["tasks"] = rows
    result["p_adjusted"] = _adjust_p_values(result["differences"])
    shares = {name: found for name in names if (found := pools.compute_unspelled_shares(seeds, name))}
    result |= {"unspelled": shares} if shares else {}
    return result | {"curves": _compute_curves(options, arms, values, pools, seeds)} if options.lines else result


def _compare_answers(
    names: Sequence[str], rivals: Mapping[str, str], answers: Mapping[str, Mapping[int, Sequence[Path]]]
) -> list[dict[str, Any]]:
    """Return a row for each task that all arms with answers were asked, over the seeds that all of them have."""
    asked = [name for name in names if answers[name]]
    seeds = [seed for seed in answers[asked[0]] if all(seed in answers[name] for name in asked)] if asked else []
    if not seeds:
        return []
    pairs = [(name, rival) for name, rival in rivals.items() if name in asked and rival in asked]
    return summarize_seeds([{name: answers[name][seed] for name in asked} for seed in seeds], pairs)


def _find_rivals(options: ExperimentOptions) -> dict[str, str]:
    """Return the arm that each arm is compared with. Lines are compared point by point."""
    if options.against is None:
        return {}
    if options.lines is None:
        return {name: options.against for name in list_arms(options) if name != options.against}
    rival = options.lines[options.against]
    others = {line: names for line, names in options.lines.items() if line != options.against}
    return {a: b for names in others.values() for a, b in zip(names, rival, strict=False)}


def _compute_curves(
    options: ExperimentOptions,
    arms: Mapping[str, Any],
    values: Mapping[str, Any],
    pools: Pools,
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """Return the points of each line, and the tokens that line `against` needs to reach each point of the others.

    Intervals of tokens are over documents. An end is None where the line does not reach as far.
    """
    lines = {
        line: [
            {"arm": n, "tokens": arms[n]["given_tokens"], **values[n]["average"]}
            for n in names
            if values[n] is not None and arms[n]["given_tokens"] is not None
        ]
        for line, names in (options.lines or {}).items()
    }
    against = lines.get(options.against or "", [])
    rival = [(p["tokens"], p["value"]) for p in against]
    known = [pools.sample_averages(seeds, p["arm"]) for p in against]
    needed = {}
    for point in [p for line, points in lines.items() if line != options.against for p in points] if rival else []:
        tokens, bound = interpolate_tokens_needed(rival, point["value"])
        drawn = zip(*known, pools.sample_averages(seeds, point["arm"]), strict=True)
        found = [
            interpolate_tokens_needed([(p["tokens"], y) for p, y in zip(against, ys, strict=True)], value)[0]
            for *ys, value in drawn
        ]
        ends = np.quantile(found, [(1 - bootstrap.LEVEL) / 2, (1 + bootstrap.LEVEL) / 2], method="nearest").tolist()
        least, most = min(rival)[0] * (1 + ROUNDING), max(rival)[0] * (1 - ROUNDING)
        low, high = (end / point["tokens"] if least < end < most else None for end in ends)
        needed[point["arm"]] = {
            "tokens": tokens,
            "bound": bound,
            "times": tokens / point["tokens"],
            "low": low,
            "high": high,
        }
    return {"lines": lines, "needed": needed}


def write_comparison(study: Study, result: Mapping[str, Any]) -> Path:
    """Write `study.json` into the study's folder, and return its path."""
    path = study.output / "study.json"
    atomic_files.write_text(path, write_json(result, indent=1) + "\n")
    return path
