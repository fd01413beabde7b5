"""What is being done, how much of it is done, how fast, how long yet: on stderr, a bar on a terminal, else lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fuselm.foreign_text import escape_controls
from fuselm.terminal import plain

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress of one stage, shown by `show`."""

    def __init__(self, console: Console, title: str):
        self._console = console
        self._title = escape_controls(title)
        self._total = 0
        self._done = 0
        self._skipped = 0
        self._unit = ""
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def start(self, total: int, *, unit: str, done: int = 0) -> None:
        """Begin to count up to `total`; `done` of it an earlier run has done."""
        self._total, self._done, self._skipped, self._unit = total, done, done, unit
        self._began = self._line = time.monotonic()
        if done:
            self.note(f"resuming after {done:,.0f} of {total:,.0f} {unit}")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Bar(
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                TextColumn(
                    "{task.completed:,.0f} of {task.total:,.0f} " + unit + "  {task.fields[note]}", markup=False
                ),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more is done; `note` stays beside the bar until the next."""
        self._done += amount
        elapsed = time.monotonic() - self._began
        speed = (self._done - self._skipped) / max(elapsed, 1e-9)
        text = f"{speed:,.{0 if speed >= 10 else 2}f}/s" + (f", {note}" if note else "")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=escape_controls(text))
        elif time.monotonic() - self._line > SECONDS_BETWEEN_LINES:
            self._line = time.monotonic()
            left = (self._total - self._done) / max(speed, 1e-9)
            self.note(f"{self._done:,.0f} of {self._total:,.0f} {self._unit}, {text}, {left:,.0f} s left")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(plain(f"  {self._title}: {text}", style="dim"), soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def show(console: Console, title: str) -> Iterator[Progress]:
    """A stage's progress, taken off the screen however the stage ends."""
    progress = Progress(console, title)
    try:
        yield progress
    finally:
        progress.stop()
