"""Keep the precision that a run began with in `precision.json` of its folder, so that it continues so on any machine.

The choice is not part of a capture's key (its recipe says `auto`), so it has to be written down beside it.
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
PARTIAL_FILE = ".dtype"  # in the folder of a stage until the stage is finished
TRAIN = "train"


class RunPrecision:
    """Hold the choices of one run for options that say `auto`, by role: "train", "target" and "source NAME"."""

    def __init__(self, run: config.RunOptions, file: Path):
        self._run = run
        self._file = file

    def read_option(self, role: str) -> str:
        """Return the `dtype` that the run file gives to `target` or `source NAME`, or "the server's"."""
        options = self._run.target if role == "target" else self._run.sources[role.removeprefix("source ")]
        return "the server's" if isinstance(options, config.ServerOptions) else options.dtype

    def resume_dtype(self, role: str, model: Model, out: Path) -> str:
        """Return the dtype that a model is read in for the folder `out`, which may have been begun with another one."""
        return keep_dtype(out, self.choose_dtype(role, model), model)

    def choose_dtype(self, role: str, model: Model) -> str:
        """Return the dtype that a model is read in: what the run file says, the run began with, or is fastest here."""
        given = self.read_option(role)
        if given != "auto":
            return given
        known = self._read_record().get(role)
        if known in precision.AS_PRECISE.get(precision.find_checkpoint_dtype(model) or "", ()):
            return str(known)
        return precision.choose_reading_dtype(model)

    def choose_training(self, *, is_dry_run: bool = False) -> str:
        """Return the precision of training, chosen as in `choose_dtype`. A dry run measures and writes nothing."""
        given = self._run.train.precision
        if given != "auto":
            return given
        if (known := self._find_training_precision()) is not None:
            return known
        if is_dry_run:
            return precision.TRAINING_PRECISIONS[0]  # nothing was trained yet, so no key depends on it
        if processes.rank() > 0:  # the first process decides for all
            processes.wait_until(lambda: self._find_training_precision() is not None)
            return str(self._find_training_precision())
        chosen = precision.choose_training_precision()
        self._write_record({TRAIN: chosen})
        return chosen

    def choose_all(self, models: Mapping[str, Model]) -> dict[str, str]:
        """Return the precision of all models, by role, and of training; write nothing."""
        chosen = {role: self.choose_dtype(role, model) for role, model in models.items()}
        given = self._run.train.precision
        return chosen | {
            TRAIN: given
            if given != "auto"
            else self._find_training_precision() or precision.choose_training_precision()
        }

    def record_choices(self, models: Mapping[str, Model]) -> None:
        """Choose what the run file leaves to the machine, and write that down."""
        left = {role: model for role, model in models.items() if self.read_option(role) == "auto"}
        if processes.rank() > 0:
            processes.wait_until(lambda: left.keys() <= self._read_record().keys())
            return
        chosen = self.choose_all(left)
        if self._run.train.precision != "auto":
            del chosen[TRAIN]
        self._write_record(chosen)

    def _find_training_precision(self) -> str | None:
        """Return the precision in the record; for runs older than the record, the one that all trainings had."""
        known = self._read_record().get(TRAIN)
        if known in precision.TRAINING_PRECISIONS:
            return str(known)
        found_precisions = set()
        for file in [f for seed in ("", "seed-*/") for f in self._file.parent.glob(f"{seed}train/*/manifest.json")]:
            parameters = manifest.read_json(file, drop=file.parent).get("parameters")
            found_precisions.add(parameters.get("precision") if isinstance(parameters, dict) else None)
        found = next(iter(found_precisions)) if len(found_precisions) == 1 else None
        return found if found in precision.TRAINING_PRECISIONS else None

    def _read_record(self) -> dict[str, Any]:
        try:
            known = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write_record(self, chosen: Mapping[str, str]) -> None:
        if not chosen.items() <= (known := self._read_record()).items():
            atomic_files.write_text(self._file, json.dumps({**known, **chosen}, indent=1, sort_keys=True))


def keep_dtype(out: Path, dtype: str, model: Model) -> str:
    """Return the dtype that an interrupted stage began with; for a stage that begins now, write down `dtype`.

    A folder with work but without that file is of an earlier version, which read every model in its checkpoint's dtype.
    """
    file = out / PARTIAL_FILE
    begun = file.read_text(encoding="utf-8") if file.is_file() else ""
    if begun in DTYPES:
        return begun
    if dtype != "auto" and any(path.suffix in (".parquet", ".json") for path in out.iterdir()):
        dtype = precision.find_checkpoint_dtype(model) or "auto"
    if begun or not atomic_files.create_exclusively(file, dtype.encode()):
        if not begun:
            return file.read_text(encoding="utf-8")  # another process has begun just now
        atomic_files.write_text(file, dtype)
    return dtype
