"""Draw what `doctor` found as tables for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from fuselm.runs.doctor import format_size
from fuselm.system import terminal


def draw_examination(found: Mapping[str, Any]) -> Group:
    """Return what was found as tables for the terminal, and below them what to fix."""
    parts: list[Any] = [_draw_table(title, rows) for title, rows in _list_tables(found)]
    for title in ("problems", "advice"):
        parts += [
            terminal.make_plain_text(f"{'fix' if title == 'problems' else 'advice'}: {line}") for line in found[title]
        ]
    if not found["problems"] and not found["advice"]:
        parts.append(terminal.make_plain_text("Nothing to fix."))
    return Group(*parts)


def _draw_table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title, *[""] * (max(map(len, rows)) - 1))
    for row in rows:
        table.add_row(*row)
    return table


def _list_tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    here, speeds = found["machine"], found["precision"]["measured"]
    seconds = found["kernels"]["seconds_to_compile"]
    yield "versions", list(found["versions"].items())
    instructions = {True: "yes", False: "no", None: "not known"}[found["precision"]["bf16_instructions"]]
    measured = (
        ["not measured yet"]
        if speeds is None
        else [
            f"{kind}: {', '.join(f'{name} {speed:,.0f}' for name, speed in by_type.items())} GFLOP/s"
            for kind, by_type in speeds.items()
        ]
    )
    yield (
        "machine",
        [
            ("system", here["system"]),
            ("cores", f"{here['usable_cores']} usable, {here['free_cores']} free"),
            ("memory", f"{format_size(here['available_memory'])} can be taken"),
            *(
                (device["device"], f"{device['name']} {format_size(device['memory'])}".removesuffix(" –"))
                for device in found["devices"]
            ),
            ("bf16 instructions", instructions),
            ("speed", "; ".join(measured)),
            ("kernels", f"compiled in the first run, {seconds:.0f} s" if seconds else "compiled"),
        ],
    )
    yield "disk", [(n, p["folder"], f"{format_size(p['free'])} free") for n, p in found["disk"].items()]
    yield "caches", [(n, p["folder"], format_size(p["bytes"])) for n, p in found["caches"].items()]
    extras = found["extras"].items()
    yield "extras", [(n, "installed" if not e["missing"] else f"missing; {e['install']}") for n, e in extras]
    if found["servers"]:
        yield "servers", [(n, s["server"], s["problem"] or f"serves {s['model']}") for n, s in found["servers"].items()]
