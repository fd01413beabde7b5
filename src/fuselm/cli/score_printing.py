"""Print the numbers that a model or an alignment has on texts."""

import json

from fuselm.system.streams import print_line


def print_scores(result: dict, as_json: bool) -> None:
    """Print the numbers of each domain and their average, as JSON or as a table."""
    if as_json:
        print_line(json.dumps(result))
        return
    from rich.table import Table

    from fuselm.results.notes import describe_conditional, describe_unspelled_bytes
    from fuselm.system import terminal

    console = terminal.open_console()
    for method, scores in result.get("methods", {"": result}).items():
        table = Table("domain", *scores["average"], title=method or None)
        for name, values in [*scores["domains"].items(), ("average", scores["average"])]:
            table.add_row(name, *map(_format_number, values.values()))
        console.print(table)
        if "verdict" in scores:
            arrives, fidelity = scores["informed"]["own_bits"], scores["informed"]["fidelity"]
            verdict = terminal.make_plain_text(scores["verdict"], style="bold").append_text(
                terminal.make_plain_text(
                    f": {arrives:.1%} of the source's bits lie in spans with information; "
                    f"fidelity there {_format_number(fidelity)}; {scores['candidates_spelled']:.1%} of its other "
                    "candidates spell what their bytes say",
                    style="not bold",
                )
            )
            console.print(verdict)
            console.print(terminal.make_plain_text(describe_conditional(scores["conditional"])))
        for note in describe_unspelled_bytes(scores):
            console.print(terminal.make_plain_text(note, style="dim"))


def print_fidelity_scale() -> None:
    """Print once, below the numbers of all sources and methods, how a fidelity is read."""
    from fuselm.results.notes import FIDELITY_SCALE
    from fuselm.system import terminal

    terminal.open_console().print(terminal.make_plain_text(f"Fidelity: {FIDELITY_SCALE}", style="dim"))


def _format_number(value: float | int | None) -> str:
    if value is None:
        return "∞"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
