"""Draw a diagnosis as tables for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fuselm.results.diagnosis import ORACLE, TARGET
from fuselm.results.diagnosis_words import COLUMNS_NOTE, DRAWN_NOTE, describe_compared_share, describe_unspelled_sources
from fuselm.system.terminal import make_plain_text


def draw_diagnosis(result: Mapping) -> Group:
    """Draw bits per byte of sources, ways to fuse and the oracle; who predicts what best; and the verdict."""
    columns = [*result["domains"], "average"]
    bits = Table("", *columns, "expected", box=box.SIMPLE, show_edge=False, padding=0, title_justify="left")
    bits.title = Text("bits per byte of the training documents; lower is better", style="bold")
    for column in bits.columns[1:]:
        column.justify = "right"
    beside = {f"{TARGET} (not fused)": result["own"]} if result["own"] and result["target"] is None else {}
    rows = {**result["sources"], **beside, **result["ways"], ORACLE: result["oracle"]}
    ends = {list({**result["sources"], **beside})[-1], list(result["ways"])[-1]}
    for name, row in rows.items():
        label = f"{name} (the target)" if name == result["target"] else name
        cells = [
            _format_cell(row["bits_per_byte"][c], [r["bits_per_byte"][c] for r in _select_group(result, name)])
            for c in columns
        ]
        bits.add_row(
            make_plain_text(label), *cells, _format_cell(row["expected"]["average"], []), end_section=name in ends
        )
    wins = Table("", *result["domains"], box=box.SIMPLE, show_edge=False, padding=0, title_justify="left")
    wins.title = Text("predicted best: share of tokens, of documents", style="bold")
    for column in wins.columns[1:]:
        column.justify = "right"
    for name in result["sources"]:
        cells = [
            f"{result['wins'][d]['tokens'][name]:.0%}, {result['wins'][d]['documents'][name]:.0%}"
            for d in result["domains"]
        ]
        wins.add_row(make_plain_text(name), *cells)
    agreement = [
        make_plain_text(
            f"{' and '.join(pair['sources'])}: the same first token at {pair['same_first']:.0%} of positions, "
            f"{pair['overlap']:.0%} of the probability in common"
        )
        for pair in result["agreement"]
    ]
    lines = [
        COLUMNS_NOTE,
        describe_compared_share(result),
        describe_unspelled_sources(result),
        DRAWN_NOTE if result["drawn"] else "",
    ]
    notes = [make_plain_text(line, style="dim") for line in lines if line]
    verdict = [make_plain_text(line, style="bold") for line in result["verdict"]]
    verdict += [Text(), make_plain_text("Source by source:", style="bold")]
    verdict += [make_plain_text(line) for line in result["source_verdicts"]]
    return Group(bits, Text(), *notes, *([Text()] if notes else []), wins, Text(), *agreement, Text(), *verdict)


def _select_group(result: Mapping, name: str) -> list[Mapping]:
    group = next((result[kind] for kind in ("sources", "ways") if name in result[kind]), {})
    return list(group.values())


def _format_cell(value: float | None, others: Sequence[float | None]) -> Text:
    if value is None:
        return Text("∞")
    best = others and value == min(v for v in others if v is not None)
    return Text(f"{value:.3f}", style="bold green" if best else "")
