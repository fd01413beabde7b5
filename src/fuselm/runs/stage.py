"""Describe what every stage of a run has: a name, how it is made, and what it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.runs.estimates import Estimate

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.config import RunOptions
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

TokenCounts = Mapping[str, Mapping[str, int]]  # tokens of each split, by the fingerprint of the tokenizer
Made = Path | dict[str, Path]  # one folder, or one for each source, method or model


def skip_calibration(calibration: "Calibration", step: "Step", estimate: Estimate) -> Estimate:
    """Return the estimate as it is: how long the stage takes is not known before it is made."""
    return estimate


def read_no_text(run: "RunOptions", name: str, written: Mapping[str, float]) -> None:
    """Return None: the time of the stage does not depend on the amount of training text."""
    return


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Describe one stage of a run.

    `make(pipeline)` makes the stages before it, then its own folders, and returns their paths. `estimate(pipeline,
    step, tokens)` returns what one of its folders will take, from the tokens of the corpus alone, and
    `calibrate(calibration, step, estimate)` adds time and memory to that. `count_passes(run, name, written)` returns
    how often the folder of `name` reads the training text, where sources have `written` so many bytes for each byte of
    it; None where its time does not depend on that.
    """

    name: str
    make: Callable[["Pipeline"], Made]
    estimate: Callable[["Pipeline", "Step", TokenCounts], Estimate]
    calibrate: Callable[["Calibration", "Step", Estimate], Estimate] = skip_calibration
    count_passes: Callable[["RunOptions", str, Mapping[str, float]], float | None] = read_no_text
    needs_precision: bool = True  # the run's precision is chosen and written down before the stage is made
    loads_models: bool = False  # every model is tried before the stage begins
    asks_servers: bool = False  # the server of a step's source is tried before the stage begins
    fills_stores: bool = False  # takes hours, so existing stores of the user are read whole before it begins
    is_shared: bool = False  # runs with the same recipe use the same folder, in their `store_dir`
    is_on_cpu: bool = False  # so that several processes of one machine make its parts faster
    merges: bool = False  # the models that a run merges are compared before the first stage begins
    trains: bool = False  # what training needs is tried before the stage begins
