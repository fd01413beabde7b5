"""Render the page of `fuselm diagnose --report`: whether fusing can help, where, how much, and which way is best.

All its numbers are those of the command's result.
"""

from collections.abc import Mapping, Sequence
from importlib import metadata

from fuselm.results import diagnosis_words
from fuselm.results.diagnosis import ORACLE, TARGET
from fuselm.results.diagnosis_sources import LEAST_ADDED
from fuselm.results.pages import figures, rendering
from fuselm.results.pages.figures import Dot
from fuselm.results.pages.formats import format_ratio
from fuselm.results.pages.styles import style_source

JUDGEMENT_STYLES = {"helps": "better", "hardly helps": "clm", "does not help": "worse"}
BEST = "best way to fuse"


def render_page(result: Mapping) -> str:
    """Render the result of `diagnose` as one self-contained HTML page."""
    styles = style_sources(result)
    beside = result["own"] if result["target"] is None else None  # the target's bits, if it is not fused
    columns = [*result["domains"], "average"]
    return rendering.render_template(
        "diagnosis.html.jinja",
        result=result,
        drawn=diagnosis_words.DRAWN_NOTE,
        partly=diagnosis_words.describe_compared_share(result),
        lacking=diagnosis_words.describe_unspelled_sources(result),
        columns=columns,
        source_styles=styles,
        beside=beside,
        styles=styles
        | ({TARGET: "base"} if result["own"] and result["target"] is None else {})
        | {BEST: "fused", ORACLE: "better"},
        judged=result.get("judged"),
        judged_styles=JUDGEMENT_STYLES,
        bounds=diagnosis_words.LEAST_GAINS,
        least_added=LEAST_ADDED,
        dots=_draw_dots(result, columns, styles),
        wins={
            unit: _draw_shares(
                {d: result["wins"][d][unit] for d in result["domains"]}, styles, f"Share of {unit} predicted best"
            )
            for unit in ("tokens", "documents")
        },
        weights=_draw_shares(result["weights"], styles, "Weights of the best fixed mixture"),
        bits=format_ratio,
        version=metadata.version("fuselm"),
    )


def style_sources(result: Mapping) -> dict[str, str]:
    """Return the style of each source; the target is grey among them."""
    others = [name for name in result["sources"] if name != result["target"]]
    styles = {name: style_source(k) for k, name in enumerate(others)}
    return {name: styles.get(name, "base") for name in result["sources"]}


def _draw_dots(result: Mapping, columns: Sequence[str], styles: Mapping[str, str]) -> str:
    rows = {column: _make_dots(result, column, styles) for column in columns}
    return figures.draw_for_all_widths(
        lambda width: figures.draw_dots(
            rows,
            axis="bits per byte",
            number=format_ratio,
            width=width,
            label="Bits per byte of sources, the best way to fuse, and the oracle",
        )
    )


def _draw_shares(rows: Mapping[str, Mapping[str, float]], styles: Mapping[str, str], label: str) -> str:
    return figures.draw_for_all_widths(lambda width: figures.draw_shares(rows, styles, label=label, width=width))


def _make_dots(result: Mapping, column: str, styles: Mapping[str, str]) -> list[Dot]:
    """Return the dots of one domain or of the average, of rows with a finite value."""
    way = result["gains"][column]["best_way"]
    rows = [(name, styles[name], row) for name, row in result["sources"].items()]
    if result["own"] and result["target"] is None:
        rows.append((TARGET, "base", result["own"]))
    rows += [(way, "fused", result["ways"][way]), (ORACLE, "better", result["oracle"])]
    return [
        Dot(label=label, style=style, value=row["bits_per_byte"][column], ring=label == ORACLE)
        for label, style, row in rows
        if row["bits_per_byte"][column] is not None
    ]
