"""Write the terms of a training for TensorBoard: scalars by step, without the machine's name or paths.

`torch.utils.tensorboard` puts the host's name into the file's name, and transformers' callback puts every path of its
arguments into the log. Their thread hides a full disk; here the step that meets it raises `OSError`.
"""

import io
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import TrainerCallback

from fuselm.system.foreign_text import escape_controls

VERSION = "brain.Event:2"  # TensorBoard reads this version of the format


class ScalarLog(TrainerCallback):
    """Write what is logged to a new file in a folder. It replaces the steps of earlier files from `first` on."""

    def __init__(self, folder: Path, *, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        began = int(time.time())
        while (folder / f"events.out.tfevents.{began}").exists():
            began += 1
        self._path = folder / f"events.out.tfevents.{began}"
        self._write(Event(file_version=VERSION))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=first))

    def on_log(self, args, state, control, logs, **kwargs):
        values = [
            Summary.Value(tag=_build_tag(name), simple_value=value)
            for name, value in logs.items()
            if isinstance(value, int | float)
        ]
        self._write(Event(summary=Summary(value=values), step=state.global_step))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        with open(self._path, "ab") as file:
            file.write(record.getvalue())


def _build_tag(name: str) -> str:
    """Return where TensorBoard shows a value, as transformers' own callback names it."""
    group, _, rest = name.partition("_")
    return escape_controls(f"{group}/{rest}" if group in ("eval", "test") and rest else f"train/{name}")
