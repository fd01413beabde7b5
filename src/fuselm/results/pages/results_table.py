"""Draw the results of a run as a table for the terminal."""

from collections.abc import Callable, Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.results.notes import describe_unspelled, mark_incomparable, select_unspelled_shares
from fuselm.results.pages.formats import format_bits, format_interval, format_signed
from fuselm.results.verdicts import TARGETS, describe_outcome, find_best_source, judge, select_cell
from fuselm.system.terminal import make_plain_text


def draw_results(summary: Mapping) -> Table:
    """Draw bits per byte of every model and the differences, each above its 95% interval, with the verdict below."""
    models, differences = summary["models"], summary["differences"]
    domains = list(summary["heldout"])
    table = Table(box=box.SIMPLE, show_edge=False, padding=0, title_justify="left", caption_justify="left")
    table.title = Text("bits per byte of held-out text, with 95% intervals; lower is better", style="bold")
    few = (
        f"\n– fewer than {FEWEST_DOCUMENTS} held-out documents, too few for an interval"
        if _has_small_domain(summary)
        else ""
    )
    note = describe_unspelled({name: select_unspelled_shares(row) for name, row in models.items()})
    table.caption = Text(
        f"* the best of {', '.join(TARGETS)}{few}{note and chr(10) + note}\n\n{describe_outcome(summary)}", style="bold"
    )
    table.title_style = table.caption_style = ""
    table.add_column("", overflow="fold")
    for domain in [*domains, "average"]:
        table.add_column(make_plain_text(domain.replace("_", " ")), justify="right", overflow="fold")
    for name, row in models.items():
        cells = []
        for domain in [*domains, "average"]:
            cell = select_cell(row, domain)
            least = min(select_cell(models[t], domain)["bits_per_byte"] for t in TARGETS)
            best = name in TARGETS and cell["low"] is not None and cell["bits_per_byte"] == least
            mark = mark_incomparable(select_unspelled_shares(row), domain)
            value = Text(f"{'*' * best}{mark}{cell['bits_per_byte']:.3f}", style="bold green" if best else "")
            cells.append(Group(value, Text(_format_bare_interval(cell, format_bits), style="dim")))
        last = name in (list(models)[-len(TARGETS) - 1], TARGETS[-1])
        table.add_row(make_plain_text(name, style="bold" if name == "fused" else ""), *cells, end_section=last)
    colours = {"better": "green", "level": "yellow", "worse": "red", "unknown": "dim"}
    for name in ("fused-clm", "fused-base", f"fused-{find_best_source(summary)}"):
        cells = []
        for domain in [*domains, "average"]:
            cell = select_cell(differences[name], domain)
            value = Text(format_signed(cell["value"]), style=colours[judge(cell)])
            cells.append(Group(value, Text(_format_bare_interval(cell, format_signed), style="dim")))
        table.add_row(make_plain_text(name), *cells)
    return table


def _format_bare_interval(cell: Mapping, form: Callable[[float], str]) -> str:
    return format_interval(cell, form).strip("[]")


def _has_small_domain(summary: Mapping) -> bool:
    return any(of["documents"] < FEWEST_DOCUMENTS for of in summary["heldout"].values())
