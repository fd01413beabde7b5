"""Keep the precision that a run began with, in `precision.json` of its folder: on another machine it continues with it.

What was chosen is no part of a capture's key (its recipe says `auto`), so it has to be written down beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselm.models import precision
from fuselm.models.choices import DTYPES
from fuselm.models.locating import Model
from fuselm.runs import config
from fuselm.system import atomic_files, manifest, processes

FILE = "precision.json"
PARTIAL_FILE = ".dtype"  # in a stage's folder until it is done
TRAIN = "train"


class RunPrecision:
    """Hold the choices of one run for options that say `auto`: by "train", "target" and "source NAME"."""

    def __init__(self, run: config.RunOptions, file: Path):
        self._run = run
        self._file = file

    def read_option(self, role: str) -> str:
        """Return what the run file says for `target` or `source NAME`, such as `auto`, or that the server decides."""
        options = self._run.target if role == "target" else self._run.sources[role.removeprefix("source ")]
        return "the server's" if isinstance(options, config.ServerOptions) else options.dtype

    def resume_dtype(self, role: str, model: Model, out: Path) -> str:
        """Return what a model is read in for the folder `out`: if that was interrupted, what it began with."""
        return keep_dtype(out, self.choose_dtype(role, model), model)

    def choose_dtype(self, role: str, model: Model) -> str:
        """Return what a model of the run is read in: what the run says, began with, or what is fastest here."""
        given = self.read_option(role)
        if given != "auto":
            return given
        known = self._known().get(role)
        if known in precision.AS_PRECISE.get(precision.checkpoint_dtype(model) or "", ()):
            return str(known)
        return precision.read_dtype(model)

    def choose_training(self, *, is_dry_run: bool = False) -> str:
        """Return what the run trains in, found as `dtype` is. In a dry run nothing is measured or written."""
        given = self._run.train.precision
        if given != "auto":
            return given
        if (known := self._trained()) is not None:
            return known
        if is_dry_run:
            return precision.TRAINING[0]  # whatever it is, nothing is trained in it yet
        if processes.rank() > 0:  # the first process decides for all
            processes.wait_until(lambda: self._trained() is not None)
            return str(self._trained())
        chosen = precision.training_precision()
        self._remember({TRAIN: chosen})
        return chosen

    def choose_all(self, models: Mapping[str, Model]) -> dict[str, str]:
        """Return the precision of all models, by role, and of training, as it will be; write nothing."""
        chosen = {role: self.choose_dtype(role, model) for role, model in models.items()}
        given = self._run.train.precision
        return chosen | {TRAIN: given if given != "auto" else self._trained() or precision.training_precision()}

    def record_choices(self, models: Mapping[str, Model]) -> None:
        """Choose, and write down what the run leaves to the machine."""
        if processes.rank() > 0:
            return
        left = {role: model for role, model in models.items() if self.read_option(role) == "auto"}
        chosen = self.choose_all(left)
        if self._run.train.precision != "auto":
            del chosen[TRAIN]
        self._remember(chosen)

    def _trained(self) -> str | None:
        """Return what was written down; or, for a run of before that was done, what all that it trained says."""
        known = self._known().get(TRAIN)
        if known in precision.TRAINING:
            return str(known)
        of_folders = set()
        for file in [f for of in ("", "seed-*/") for f in self._file.parent.glob(f"{of}train/*/manifest.json")]:
            parameters = manifest.read_json(file, drop=file.parent).get("parameters")
            of_folders.add(parameters.get("precision") if isinstance(parameters, dict) else None)
        found = next(iter(of_folders)) if len(of_folders) == 1 else None
        return found if found in precision.TRAINING else None

    def _known(self) -> dict[str, Any]:
        try:
            known = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _remember(self, chosen: Mapping[str, str]) -> None:
        if not chosen.items() <= (known := self._known()).items():
            atomic_files.write_text(self._file, json.dumps({**known, **chosen}, indent=1, sort_keys=True))


def keep_dtype(out: Path, dtype: str, model: Model) -> str:
    """Return the dtype that an interrupted stage began with; for a stage that begins now write down `dtype`.

    A folder with work but no such file is of an earlier version, which read every model in its checkpoint's type.
    """
    file = out / PARTIAL_FILE
    begun = file.read_text(encoding="utf-8") if file.is_file() else ""
    if begun in DTYPES:
        return begun
    if dtype != "auto" and any(path.suffix in (".parquet", ".json") for path in out.iterdir()):
        dtype = precision.checkpoint_dtype(model) or "auto"
    atomic_files.write_text(file, dtype)
    return dtype
