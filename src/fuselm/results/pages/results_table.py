"""Draw the results of a run as tables for the terminal, which fit into 80 columns for up to six models."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.results.notes import describe_unspelled, mark_incomparable, select_unspelled_shares
from fuselm.results.pages.formats import format_bits, format_interval, format_signed
from fuselm.results.pages.tasks_table import draw_tasks
from fuselm.results.verdicts import TARGETS, describe_outcome, find_best_source, judge, select_cell
from fuselm.system.terminal import make_plain_text

LABEL, NUMBER, DIFFERENCE = 24, 25, 29  # columns of a domain's name, of a number and of a difference with intervals
COLOURS = {"better": "green", "level": "yellow", "worse": "red", "unknown": "dim"}


@dataclass(frozen=True, slots=True)
class ResultsTable:
    """Draw every model's bits per byte, what fused differs from others by, and the verdict; domains go down the side.

    Where there is room, each number has its 95% interval beside it. On a narrower terminal the differences have theirs
    below them, and the models' own are on the page.
    """

    summary: Mapping

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        is_wide = options.max_width >= LABEL + NUMBER * len(self.summary["models"])
        shown = ", with 95% intervals" if is_wide else ""
        yield Text(f"bits per byte of held-out text{shown}; lower is better", style="bold")
        yield _draw_models(self.summary, is_wide)
        yield Text("\nfused - other, with 95% intervals; below zero fused is better", style="bold")
        yield _draw_differences(self.summary, options.max_width >= LABEL + 3 * DIFFERENCE)
        yield from _write_notes(self.summary)
        if self.summary.get("tasks"):
            yield Text("")
            yield from draw_tasks(self.summary["tasks"]).__rich_console__(console, options)
        yield Text(f"\n{describe_outcome(self.summary)}", style="bold")


def draw_results(summary: Mapping) -> ResultsTable:
    """Draw the results of a run, from what its `summary.json` holds."""
    return ResultsTable(summary)


def _draw_models(summary: Mapping, is_wide: bool) -> Table:
    table = _make_table()
    for name in summary["models"]:
        table.add_column(make_plain_text(name, style="bold" if name == "fused" else ""), justify="right")
    for domain in _list_rows(summary):
        cells = []
        for name, row in summary["models"].items():
            cell = select_cell(row, domain)
            best = _is_best(summary, name, domain)
            mark = mark_incomparable(select_unspelled_shares(row), domain)
            value = Text(f"{'*' * best}{mark}{format_bits(cell['bits_per_byte'])}", style="bold green" if best else "")
            if is_wide:
                value.append(f" {format_interval(cell, format_bits)}", style="dim not bold default")
            cells.append(value)
        table.add_row(_name_row(domain), *cells)
    return table


def _draw_differences(summary: Mapping, is_wide: bool) -> Table:
    table, best = _make_table(), find_best_source(summary)
    for other, what in {"clm": "the text alone", "base": "before training", best: "the best source"}.items():
        table.add_column(Text(f"{other}\n{what}"), justify="right")
    for domain in _list_rows(summary):
        cells = []
        for other in ("clm", "base", best):
            cell = select_cell(summary["differences"][f"fused-{other}"], domain)
            value = Text(format_signed(cell["value"]), style=COLOURS[judge(cell)])
            interval = format_interval(cell, format_signed)
            cells.append(value.append(f"{' ' if is_wide else chr(10)}{interval}", style="dim not bold default"))
        table.add_row(_name_row(domain), *cells)
    return table


def _make_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    return table


def _list_rows(summary: Mapping) -> list[str]:
    return [*summary["heldout"], "average"]


def _name_row(domain: str) -> Text:
    return make_plain_text(domain, style="bold" if domain == "average" else "")


def _is_best(summary: Mapping, name: str, domain: str) -> bool:
    """Tell whether a model of the target's size is the best of these, where there are enough documents to tell."""
    cell = select_cell(summary["models"][name], domain)
    least = min(select_cell(summary["models"][t], domain)["bits_per_byte"] for t in TARGETS)
    return name in TARGETS and cell["low"] is not None and cell["bits_per_byte"] == least


def _write_notes(summary: Mapping) -> Iterator[Text]:
    """Yield what the marks in the tables mean, of those that are there."""
    if any(_is_best(summary, name, domain) for name in TARGETS for domain in _list_rows(summary)):
        yield Text(f"* the best of {', '.join(TARGETS)}, which have one size", style="dim")
    if any(of["documents"] < FEWEST_DOCUMENTS for of in summary["heldout"].values()):
        yield Text(f"– fewer than {FEWEST_DOCUMENTS} held-out documents, too few for an interval", style="dim")
    if note := describe_unspelled({name: select_unspelled_shares(row) for name, row in summary["models"].items()}):
        yield make_plain_text(note, style="dim")
