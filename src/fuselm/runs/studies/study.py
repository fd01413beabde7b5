"""Read a study file: a grid of experiments on one run file. All of it is checked before anything is made.

An *arm* is one way to train (a method and what it sets), its *trials* are what it may choose from by the development
split, and an *experiment* shows some arms beside each other. All arms of a seed share one run folder.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fuselm.runs import config
from fuselm.runs.options import files
from fuselm.runs.options.problems import describe_first_problem, suggest_name
from fuselm.runs.options.study import ArmOptions, ExperimentOptions, StudyOptions
from fuselm.runs.options.training import BaselineOptions
from fuselm.runs.stages.train import FUSED_ONLY_OPTIONS
from fuselm.system.foreign_text import escape_controls

# Arms may differ in these. All of them hold out the same text: `trials.Grid.check_texts` makes sure of it.
SCORED_WITH = "evaluate.prefix_tokens"  # the option of scoring that arms may differ in
ARM_OPTIONS = ("corpus.files", "corpus.share", "write", "capture", "align", "fuse", "train", "merge", SCORED_WITH)
FUSED_ONLY_SECTIONS = ("sources", "write", "capture", "align", "fuse", "merge")  # do nothing to clm
FORBIDDEN = ("output", "seed")  # a study has its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Hold one row of a study. Without a method it is a model as it is: `base`, or a source."""

    name: str
    model: str  # what is scored: the method, `base`, or a source
    method: str | None
    settings: Mapping[str, Any]  # its options of the run, beside its trials'
    sources: Sequence[str]
    trials: Sequence[Mapping[str, Any]]  # the options of each, beside `settings`
    seeds: Sequence[int]
    chosen_on: int | None = None  # the seed that chooses a trial for all; None: each for itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Hold a study file, checked."""

    file: Path
    run_file: Path
    output: Path
    seeds: Sequence[int]
    settings: Mapping[str, Any]
    sources: Sequence[str]  # of the run
    arms: Mapping[str, Arm]  # those that experiments show, in the file's order
    experiments: Sequence[ExperimentOptions]

    def run_options(self, arm: Arm, seed: int, trial: Mapping[str, Any]) -> config.RunOptions:
        """Return the run whose method, trained and scored, is this trial of this arm."""
        given = {**self.settings, **arm.settings, **trial, "seed": seed, "output": str(self.output / f"seed-{seed}")}
        for option in BaselineOptions.model_fields if arm.method == "clm" else ():
            if f"train.{option}" in {**arm.settings, **trial}:
                given[f"train.clm.{option}"] = given.pop(f"train.{option}")
        run = config.load(self.run_file, [f"{name}={_write_yaml(value)}" for name, value in given.items()])
        if run.store_dir == "auto":  # beside the study, not beside the run of a seed
            run = run.model_copy(update={"store_dir": str(self.output.parent / "stores")})
        if set(arm.sources) == set(run.sources):
            return run
        chosen = {"sources": {n: s for n, s in run.model_dump()["sources"].items() if n in arm.sources}}
        try:
            return config.RunOptions.model_validate(run.model_dump() | chosen)
        except ValidationError as error:
            raise ValueError(config.describe_problem(error)) from None


def _write_yaml(value: Any) -> str:
    """Return JSON with characters as they are, because YAML reads half of an escaped pair as a character.

    Characters that YAML refuses are escaped in the way that both languages share.
    """
    return escape_controls(json.dumps(value, ensure_ascii=False))


def list_arms(experiment: ExperimentOptions) -> list[str]:
    """Return the names of the arms that an experiment shows, each once."""
    names = experiment.arms or [name for line in (experiment.lines or {}).values() for name in line]
    return list(dict.fromkeys(names))


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file. Raises `ValueError`, one line, on whatever is wrong with it or any of its runs."""
    given = files.read_options(path, "study", "options such as run, output, arms and experiments")
    files.refuse_other_kind(path, "study", given)
    for override in overrides:
        files.override_option(given, override)
    try:
        read = StudyOptions.model_validate(given)
    except ValidationError as error:
        problem = describe_first_problem(error, "study", StudyOptions, shorten=_count_from_one)
        raise ValueError(f"{path}: {problem}") from None
    run_file = path.parent / read.run
    try:
        return _check_study(path, run_file, read)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _count_from_one(location: list[str]) -> list[str]:
    """Return an option's place, `experiments.0.arms.0`, with the members of lists counted from 1."""
    return [str(int(part) + 1) if part.isdigit() else part for part in location]


def _check_study(file: Path, run_file: Path, read: StudyOptions) -> Study:
    """Return the study with every arm resolved. Raises `ValueError` on whatever cannot be meant."""
    for name in set(read.set) & set(FORBIDDEN):
        raise ValueError(f"set.{name}: the study's own ({'seeds' if name == 'seed' else name}); set that instead")
    sources = list(config.load(run_file, [f"{k}={_write_yaml(v)}" for k, v in read.set.items()]).sources)
    base = Study(
        file=file,
        run_file=run_file,
        output=Path(files.expand_home(read.output, "output")),
        seeds=read.seeds,
        settings=read.set,
        sources=sources,
        arms={},
        experiments=read.experiments,
    )
    as_they_are = {
        name: Arm(name=name, model=name, method=None, settings={}, sources=sources, trials=({},), seeds=read.seeds)
        for name in ("base", *sources)
    }
    for name in read.arms:
        if name in as_they_are or name == "average":
            raise ValueError(f"arms.{name}: the name of a model as it is; take another")
    known = as_they_are | {name: _build_arm(name, read, sources) for name in read.arms if not read.arms[name].best_of}
    for name in read.arms:  # the best of others may be one of those that are named after it
        if read.arms[name].best_of:
            known[name] = _join_arms(name, read, known)
    known = {name: known[name] for name in (*as_they_are, *read.arms)}  # in the file's order
    _check_experiments(read.experiments, known)
    shown = {name for experiment in read.experiments for name in list_arms(experiment)}
    arms = {}
    for name, arm in known.items():
        try:
            arms[name] = _expand_trials(base, arm)
        except ValueError as error:
            raise ValueError(f"arms.{name}: {error}") from None
    return replace(base, arms={name: arm for name, arm in arms.items() if name in shown})


def _build_arm(name: str, read: StudyOptions, sources: Sequence[str]) -> Arm:
    """Return an arm with everything that it takes from the arms that it is like."""
    merged: dict[str, Any] = {"method": None, "sources": None, "seeds": None, "chosen_on": None, "set": {}, "try": {}}
    for of in reversed(_list_ancestors(name, read.arms)):
        merged["set"] = {n: v for n, v in merged["set"].items() if n not in of.trials} | of.set
        merged["try"] = {n: v for n, v in merged["try"].items() if n not in of.set} | of.trials
        for option in ("method", "sources", "seeds", "chosen_on"):
            if (value := getattr(of, option)) is not None:
                merged[option] = value
    where = f"arms.{name}"
    if merged["method"] is None:
        raise ValueError(f"{where}.method: missing; clm, fused or base, or `like` an arm that has one")
    for option in (*merged["set"], *merged["try"]):
        if "." not in option or not {option, option.split(".")[0]} & set(ARM_OPTIONS):
            raise ValueError(
                f"{where}: {option}: arms differ in {', '.join(ARM_OPTIONS)} alone, as train.passes; set what is for "
                "all of them in the study's `set`"
            )
    _check_use(where, read.arms[name], merged["method"])
    for source in merged["sources"] or ():
        if source not in sources:
            raise ValueError(f"{where}.sources: no source '{source}'; {suggest_name(source, list(sources))}")
    seeds = merged["seeds"] or read.seeds
    _check_choice(where, merged["chosen_on"], seeds, has_trials=bool(merged["try"]))
    combined = [dict(zip(merged["try"], values, strict=True)) for values in itertools.product(*merged["try"].values())]
    return Arm(
        name=name,
        model=merged["method"],
        method=None if merged["method"] == "base" else merged["method"],
        settings=merged["set"],
        sources=merged["sources"] or list(sources),
        trials=combined,
        seeds=seeds,
        chosen_on=merged["chosen_on"],
    )


def _join_arms(name: str, read: StudyOptions, known: Mapping[str, Arm]) -> Arm:
    """Return the arm whose trials are those of others together."""
    given, where = read.arms[name], f"arms.{name}"
    names = given.best_of or []
    own = [option for option in ("like", "method", "sources") if getattr(given, option) is not None]
    own += [option for option, of in (("set", given.set), ("try", given.trials)) if of]
    if own:
        raise ValueError(f"{where}.{own[0]}: does nothing beside best_of, which takes arms as they are; drop one")
    for other in names:
        if other not in known or known[other].method is None:
            able = [n for n, arm in known.items() if arm.method is not None]
            raise ValueError(f"{where}.best_of: no trained arm '{other}'; {suggest_name(other, able)}")
    arms = [known[other] for other in names]
    for arm in arms[1:]:
        if (arm.method, set(arm.sources)) != (arms[0].method, set(arms[0].sources)):
            raise ValueError(
                f"{where}.best_of: '{arm.name}' has another method or other sources than '{names[0]}'; name arms that "
                "share both"
            )
    trials: list[Mapping[str, Any]] = []
    for arm in arms:
        trials += [t for trial in arm.trials if (t := {**arm.settings, **trial}) not in trials]
    seeds = given.seeds or read.seeds
    _check_choice(where, given.chosen_on, seeds, has_trials=True)
    return Arm(
        name=name,
        model=arms[0].model,
        method=arms[0].method,
        settings={},
        sources=arms[0].sources,
        trials=trials,
        seeds=seeds,
        chosen_on=given.chosen_on,
    )


def _check_choice(where: str, chosen_on: int | None, seeds: Sequence[int], *, has_trials: bool) -> None:
    if chosen_on is None:
        return
    if not has_trials:
        raise ValueError(f"{where}.chosen_on: does nothing, because there is nothing to choose; give it a `try`")
    if chosen_on not in seeds:
        raise ValueError(f"{where}.chosen_on: {chosen_on} is not one of the arm's seeds; add it to seeds")


def _check_use(where: str, arm: ArmOptions, method: str) -> None:
    """Raise `ValueError` on an option that does nothing, except where it comes from the arm that this one is like."""
    for option in arm.set.keys() & arm.trials.keys():
        raise ValueError(f"{where}: {option}: is in `set` and in `try`, which would win; drop one")
    given = [*arm.set, *arm.trials, *(["sources"] if arm.sources is not None else [])]
    for option in given:
        stage, _, rest = option.partition(".")
        if method == "base" and (option != SCORED_WITH or option in arm.trials):
            raise ValueError(f"{where}: {option}: does nothing to base, which is not trained; drop it")
        of_rows = stage in FUSED_ONLY_SECTIONS or (stage == "train" and rest in ("lambda_clm", *FUSED_ONLY_OPTIONS))
        if of_rows and method == "clm":
            raise ValueError(f"{where}: {option}: does nothing to clm, which is trained on the text alone; drop it")
        if (rest == "clm" or rest.startswith("clm.")) and method == "fused":
            instead = f", or write train.{rest[4:]}" if rest[4:] else ""
            raise ValueError(f"{where}: {option}: does nothing to fused; drop it{instead}")


def _list_ancestors(name: str, arms: Mapping[str, ArmOptions]) -> list[ArmOptions]:
    """Return the arm, the arm that it is like, the arm that this one is like, and so on."""
    names, at = [name], arms[name].like
    while at is not None:
        if at not in arms:
            raise ValueError(f"arms.{names[-1]}.like: no arm '{at}'; {suggest_name(at, list(arms))}")
        if at in names:
            raise ValueError(f"arms.{names[-1]}.like: '{at}' is like this one; one of them must say what it is")
        names.append(at)
        at = arms[at].like
    return [arms[n] for n in names]


def _check_experiments(experiments: Sequence[ExperimentOptions], known: Mapping[str, Arm]) -> None:
    seen: set[str] = set()
    for experiment in experiments:
        where = f"experiments.{experiment.name}"
        if experiment.name in seen or not experiment.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"{where}: not a usable name; take letters, digits, '-' and '_', and each once")
        seen.add(experiment.name)
        if (experiment.arms is None) == (experiment.lines is None):
            raise ValueError(f"{where}: needs arms, or lines, but not both")
        for name in list_arms(experiment):
            if name not in known:
                raise ValueError(f"{where}: no arm '{name}'; {suggest_name(name, list(known))}")
        if experiment.lines is not None:
            _check_lines(where, experiment.lines, known)
        if not set.intersection(*(set(known[name].seeds) for name in list_arms(experiment))):
            raise ValueError(f"{where}: no seed is one of all its arms', so nothing can be compared; set their seeds")
        comparable = list(experiment.lines or list_arms(experiment))
        if experiment.against is not None and experiment.against not in comparable:
            raise ValueError(
                f"{where}.against: '{experiment.against}' is not in it; {suggest_name(experiment.against, comparable)}"
            )


def _check_lines(where: str, lines: Mapping[str, Sequence[str]], known: Mapping[str, Arm]) -> None:
    seen: set[str] = set()
    for line, names in lines.items():
        for name in names:
            if known[name].method is None:
                raise ValueError(f"{where}.lines.{line}: '{name}' is not trained on any tokens; drop it")
            if name in seen:
                raise ValueError(f"{where}.lines.{line}: '{name}' is in another line too; drop one")
            seen.add(name)


def _expand_trials(study: Study, arm: Arm) -> Arm:
    """Give each of several learning rates a trial of its own; every trial is checked by reading its run file."""
    if arm.method is None:
        return arm
    return replace(arm, trials=list(_split_rates(study, arm)))


def _split_rates(study: Study, arm: Arm) -> Iterator[dict[str, Any]]:
    assert arm.method is not None
    for trial in arm.trials:
        rates = study.run_options(arm, arm.seeds[0], trial).train.for_method(arm.method).learning_rates
        for rate in rates:
            yield {**trial, "train.learning_rate": rate} if len(rates) > 1 else dict(trial)
