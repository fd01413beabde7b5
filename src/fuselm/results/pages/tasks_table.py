"""Draw what models answered to tasks: a table for the terminal, and the same rows for pages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from fuselm.results.pages.formats import format_interval
from fuselm.results.tasks.comparison import judge_difference
from fuselm.system.foreign_text import write_code
from fuselm.system.terminal import make_plain_text

COLOURS = {"better": "green", "level": "yellow", "worse": "red", "unknown": "dim"}
SHARES = ("acc", "acc_norm", "exact_match", "pass@1", "pass_at_1", "f1", "mcc")  # shown as percent


def describe_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each row with its numbers as text: `name`, `metric`, `questions`, `models` and `differences`.

    The name of a task within a group is indented. A difference has a `value`, an `interval`, a `test` of the questions
    that only one model has right, and a `judgement`.
    """

    def describe(cell: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
        return {
            "value": _format_change(cell["value"], row),
            "interval": format_interval(cell, lambda value: _format_change(value, row)),
            "test": f"{cell['only_first']} : {cell['only_second']}, p = {cell['p']:.2g}" if "p" in cell else "",
            "judgement": judge_difference(cell, higher_is_better=row["higher_is_better"]),
        }

    return [
        {
            "name": f"{'  ' if row['group'] else ''}{row['task']}",
            "task": row["task"],
            "group": row["group"],
            "metric": row["metric"],
            "questions": f"{row['questions']:,}",
            "models": {name: _format_value(cell["value"], row) for name, cell in row["models"].items()},
            "differences": {pair: describe(cell, row) for pair, cell in row["differences"].items()},
        }
        for row in rows
    ]


def write_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as two Markdown tables: numbers of models, and differences."""
    described = describe_rows(rows)
    models, pairs = list(rows[0]["models"]), list(rows[0]["differences"])
    lines = [["task", "metric", "questions", *models], ["---"] * (3 + len(models))]
    lines += [
        [write_code(d["task"]), write_code(d["metric"]), d["questions"], *d["models"].values()] for d in described
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if not pairs:
        return text
    lines = [["task", "metric", *(pair.replace("-", " − ", 1) for pair in pairs)], ["---"] * (2 + len(pairs))]
    for d in described:
        cells = [
            f"{of['value']} {of['interval']}{'; ' if of['test'] else ''}{of['test']}"
            for of in d["differences"].values()
        ]
        lines.append([write_code(d["task"]), write_code(d["metric"]), *cells])
    return text + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True, slots=True)
class TasksTable:
    """Draw the numbers of all models and how fused differs from clm and base, task by task."""

    rows: Sequence[Mapping[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        described = describe_rows(self.rows)
        yield Text("tasks", style="bold")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("task", "metric"):
            table.add_column(name, overflow="fold")
        for name in ("questions", *self.rows[0]["models"]):
            table.add_column(make_plain_text(name, style="bold" if name == "fused" else ""), justify="right")
        for d in described:
            cells = [d["metric"], d["questions"], *d["models"].values()]
            table.add_row(*map(make_plain_text, [d["name"], *cells]))
        yield table
        pairs = [pair for pair in self.rows[0]["differences"] if pair in ("fused-clm", "fused-base")]
        if not pairs:
            return
        yield Text(
            "\ndifferences with 95% intervals over questions or documents; a : b have it right alone", style="bold"
        )
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("task", "metric", *(pair.replace("-", " - ", 1) for pair in pairs)):
            table.add_column(name, overflow="fold", justify="left" if name in ("task", "metric") else "right")
        for d in described:
            found = [d["differences"][pair] for pair in pairs]
            cells = [
                make_plain_text(f"{of['value']} {of['interval']}\n{of['test']}".strip(), style=COLOURS[of["judgement"]])
                for of in found
            ]
            table.add_row(make_plain_text(d["name"]), make_plain_text(d["metric"]), *cells)
        yield table


def draw_tasks(rows: Sequence[Mapping[str, Any]]) -> TasksTable:
    """Draw the rows of `comparison.compare_models`."""
    return TasksTable(rows)


def _is_share(row: Mapping[str, Any]) -> bool:
    return row["metric"].partition(" (")[0] in SHARES


def _format_value(value: float, row: Mapping[str, Any]) -> str:
    return f"{100 * value:.1f}%" if _is_share(row) else f"{value:.3f}"


def _format_change(value: float, row: Mapping[str, Any]) -> str:
    """Format a difference; those of shares are in points."""
    text = f"{100 * value + 0.0:+.1f}" if _is_share(row) else f"{value + 0.0:+.3f}"
    return text.replace("-", "−")
