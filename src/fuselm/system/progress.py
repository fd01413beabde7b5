"""Show on stderr what is being done, how much of it, how fast and how long yet: a bar on a terminal, else lines."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from fuselm.system.durations import format_duration
from fuselm.system.foreign_text import escape_controls
from fuselm.system.terminal import make_plain_text

SECONDS_BETWEEN_LINES = 10.0
TITLE_WIDTH, BAR_WIDTH = 30, 15  # columns, so that the numbers fit beside them on a terminal of 80
SECONDS_OF_SILENCE = 1.0  # after which what is being done is said, before there is anything to count

_shown: "list[Progress]" = []  # stages that are on the screen, the innermost last
_screen: Console | None = None  # of the command, for what is done outside of any stage
_compiled: set[str] = set()  # stages of the command whose compilation was announced


class Progress:
    """Hold the progress of one stage, which `show_progress` shows."""

    def __init__(self, console: Console, title: str):
        self._console = console
        self._title = escape_controls(title)
        self._total = 0
        self._done = 0
        self._skipped = 0
        self._is_warm = False
        self._unit = ""
        self._began = self._line = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def start(self, total: int, *, unit: str, done: int = 0) -> None:
        """Begin to count up to `total`, of which an earlier run has done `done`."""
        self._total, self._done, self._skipped, self._unit = total, done, done, unit
        self._is_warm = False
        self._began = self._line = time.monotonic()
        if done:
            self.note(f"resuming after {done:,.0f} of {total:,.0f} {unit}")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Bar(
                TextColumn(
                    "  {task.description}", markup=False, table_column=Column(no_wrap=True, max_width=TITLE_WIDTH)
                ),
                BarColumn(BAR_WIDTH),
                TextColumn(
                    "{task.completed:,.0f} of {task.total:,.0f} " + unit + "{task.fields[note]}",
                    markup=False,
                    table_column=_one_line(),
                ),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more as done, and show `note` beside the bar until the next call."""
        self._done += amount
        speed = (self._done - self._skipped) / max(time.monotonic() - self._began, 1e-9)
        if not self._is_warm:  # the first of them is slower, and says little about the others
            self._is_warm, self._skipped, self._began = True, self._done, time.monotonic()
        left = format_duration((self._total - self._done) / max(speed, 1e-9), decimals=0)
        text = f", {speed:,.{0 if speed >= 10 else 2}f}/s" + (f", {note}" if note else "") + f", {left} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=escape_controls(text))
        elif time.monotonic() - self._line > SECONDS_BETWEEN_LINES:
            self._line = time.monotonic()
            self.note(f"{self._done:,.0f} of {self._total:,.0f} {self._unit}{text}")

    @property
    def is_counting(self) -> bool:
        """Tell whether a bar or a line says how much is done."""
        return self._total > 0

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self._console.print(make_plain_text(f"  {self._title}: {text}", style="dim"), soft_wrap=True)

    def note_compilation(self, stage: str, seconds: float) -> None:
        """Say, once a command and stage, that kernels are compiled; 0 seconds if most of the stage's are kept."""
        if stage in _compiled:
            return
        _compiled.add(stage)
        if seconds >= 1:
            self.note(f"compiling once for this machine, about {format_duration(seconds, decimals=0)}")
        else:
            self.note("compiling another kernel once for this machine, a few seconds at most")

    def leave_out_of_rate(self, seconds: float) -> None:
        """Leave seconds that happen once, as those of a compilation, out of the rate and of the time left."""
        self._began += seconds
        self._line = time.monotonic()

    def stop(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _one_line(width: int | None = None) -> Column:
    """Return a column of the bar whose text stays on one line."""
    return Column(no_wrap=True, max_width=width)


@contextmanager
def show_progress(console: Console, title: str) -> Iterator[Progress]:
    """Show a stage's progress within the `with` block, and take it off the screen however the stage ends."""
    progress = Progress(console, title)
    _shown.append(progress)
    try:
        yield progress
    finally:
        _shown.remove(progress)
        progress.stop()


def use_console(console: Console) -> None:
    """Let `announce` print to this console where no stage is on the screen."""
    global _screen
    _screen = console
    _compiled.clear()


@contextmanager
def announce(what: str) -> Iterator[None]:
    """Say what is being done, if it takes longer than `SECONDS_OF_SILENCE` and no bar says it."""
    timer = threading.Timer(SECONDS_OF_SILENCE, _print_announcement, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print_announcement(what: str) -> None:
    if not _shown or not _shown[-1].is_counting:
        note(what)


def note(what: str) -> None:
    """Print a line: a note of the stage on the screen, or a line of the command's console outside of any stage."""
    if _shown:
        _shown[-1].note(what)
    elif _screen is not None:
        _screen.print(make_plain_text(f"  {what}", style="dim"), soft_wrap=True)


def note_compilation(stage: str, seconds: float) -> None:
    """Tell the stage on the screen that a kernel is being compiled."""
    if _shown:
        _shown[-1].note_compilation(stage, seconds)
    elif _screen is not None:
        Progress(_screen, stage).note_compilation(stage, seconds)


def leave_out_of_rates(seconds: float) -> None:
    """Leave seconds that happen once out of the rates of all stages on the screen."""
    for shown in _shown:
        shown.leave_out_of_rate(seconds)
