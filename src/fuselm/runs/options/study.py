"""Define a study file: runs that differ in some options, and the experiments that show them beside each other."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fuselm.runs.options.base import OneOf, Options, Seed
from fuselm.training.choices import METHODS

SECTIONS = ("corpus", "write", "capture", "align", "fuse", "train", "merge", "evaluate")
ARM_METHODS: dict[str, str] = {**METHODS, "base": "Train nothing: score the target as it was."}
FIGURES: dict[str, str] = {
    "bars": "Draw a bar for each arm and domain.",
    "steps": "Draw the development split's bits per byte over the steps of training.",
}


def _flatten_sections(given: dict[str, Any]) -> dict[str, Any]:
    """Return {train.passes: 4} for {train: {passes: 4}}, which leaves the rest of the run file's section as it is."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        is_section = name in SECTIONS and isinstance(value, dict)
        options = {f"{name}.{option}": of for option, of in value.items()} if is_section else {name: value}
        for option, of in options.items():
            if option in flat:
                raise _build_repeat_error(option)
            flat[option] = of
    return flat


def _refuse_repeats(values: list[Any]) -> list[Any]:
    for n, value in enumerate(values):
        if value in values[:n]:
            raise _build_repeat_error(value)
    return values


def _build_repeat_error(what: Any) -> PydanticCustomError:
    return PydanticCustomError("twice", "{what} is there twice; drop one", {"what": str(what)})


Changes = Annotated[dict[str, Any], AfterValidator(_flatten_sections)]
Names = Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_refuse_repeats)]
Values = Annotated[list[Any], Field(min_length=1), AfterValidator(_refuse_repeats)]


class ArmOptions(Options):
    """Define an arm: one way to train."""

    like: str | None = Field(None, description="Take everything from this arm that is not given here.")
    method: Annotated[str, OneOf(ARM_METHODS)] | None = Field(
        None, description="Train by this method. An arm needs one, of its own or of the arm that it is `like`."
    )
    sources: Names | None = Field(None, description="Use only these of the run's sources; all if nothing is given.")
    set: Changes = Field(
        {}, description="Change these options of the run, `{train.passes: 4}` or `{train: {passes: 4}}`."
    )
    trials: dict[str, Values] = Field(
        {},
        alias="try",
        description="Train with each combination of these values, `{train.learning_rate: [5e-5, 1e-4]}`, and keep the "
        "best on the development split.",
    )
    best_of: Names | None = Field(
        None,
        description="Take the best of these arms' trainings on the development split, instead of any options of its "
        "own. They are trained once, for all.",
    )
    chosen_on: Seed | None = Field(
        None,
        description="Choose among the trainings with this seed, and train with the others what was best there. If "
        "nothing is given, each seed chooses for itself.",
    )
    seeds: Seeds | None = Field(None, description="Train with these seeds; with the study's if nothing is given.")


class ExperimentOptions(Options):
    """Define an experiment: some arms beside each other, in tables and figures."""

    name: str = Field(description="Name the files of the experiment's figures like this: letters, digits, '-', '_'.")
    title: str = Field(description="Show this as the experiment's title.")
    says: str = Field("", description="Show this text under the title; it is Markdown.")
    arms: Names | None = Field(
        None,
        description="Show these arms, in this order. `base` and the sources are there too, without being trained.",
    )
    lines: Annotated[dict[str, Names], Field(min_length=1)] | None = Field(
        None,
        description="Draw lines over tokens of training text instead of `arms`: each has a name and its arms, "
        "`{clm: [clm-50k, clm-100k]}`.",
    )
    against: str | None = Field(None, description="Compare the others with this arm or line.")
    figures: list[Annotated[str, OneOf(FIGURES)]] = Field(
        ["bars"], description="Draw these figures. Lines over tokens are drawn whatever is given."
    )


class StudyOptions(Options):
    """Hold all options of a study."""

    run: str = Field(description="Read this run file, from the study file's folder; all arms are made from it.")
    output: str = Field(description="Write everything that the study makes into this folder.")
    seeds: Seeds = Field([0, 1, 2], description="Train every arm with each of these seeds: other splits, other orders.")
    set: Changes = Field(
        {}, description="Change these options of the run for all arms, `{train.passes: 4}` or `{train: {passes: 4}}`."
    )
    arms: dict[str, ArmOptions] = Field(
        {}, description="Define these arms, each under its name. An arm that no experiment shows is not trained."
    )
    experiments: Annotated[list[ExperimentOptions], Field(min_length=1)] = Field(
        description="Show these experiments on the study's pages, in this order."
    )
