"""The page of `fuselm diagnose --report`: can fusing help, where, how much at most, and which way to fuse is best.

All its numbers are those of the command's result.
"""

from collections.abc import Mapping
from importlib import metadata

from fuselm.results import diagnosis
from fuselm.results.pages import figures, rendering
from fuselm.results.pages.figures import Dot
from fuselm.results.pages.formats import format_ratio
from fuselm.results.pages.styles import style_source

JUDGED = {"helps": "better", "hardly helps": "clm", "does not help": "worse"}
BEST = "best way to fuse"


def page(result: Mapping) -> str:
    """One HTML page that needs nothing else."""
    styles = source_styles(result)
    columns = [*result["domains"], "average"]
    return rendering.render(
        "diagnosis.html.jinja",
        result=result,
        drawn=diagnosis.DRAWN,
        partly=diagnosis.partly(result),
        lacking=diagnosis.lacking(result),
        columns=columns,
        styles=styles | {BEST: "fused", diagnosis.ORACLE: "better"},
        judged=result.get("judged"),
        judged_styles=JUDGED,
        bounds=diagnosis.JUDGED,
        dots=figures.dots({c: _dots(result, c, styles) for c in columns}, axis="bits per byte", number=format_ratio),
        wins={
            unit: figures.shares({d: result["wins"][d][unit] for d in result["domains"]}, styles)
            for unit in ("tokens", "documents")
        },
        weights=figures.shares(result["weights"], styles),
        bits=format_ratio,
        version=metadata.version("fuselm"),
    )


def source_styles(result: Mapping) -> dict[str, str]:
    """The target is grey among its sources."""
    others = [name for name in result["sources"] if name != result["target"]]
    styles = {name: style_source(k) for k, name in enumerate(others)}
    return {name: styles.get(name, "base") for name in result["sources"]}


def _dots(result: Mapping, column: str, styles: Mapping[str, str]) -> list[Dot]:
    """Of what has a finite value."""
    way = result["gains"][column]["best_way"]
    rows = [(name, styles[name], row) for name, row in result["sources"].items()]
    rows += [(way, "fused", result["ways"][way]), (diagnosis.ORACLE, "better", result["oracle"])]
    return [
        Dot(label=label, style=style, value=row["bits_per_byte"][column], ring=label == diagnosis.ORACLE)
        for label, style, row in rows
        if row["bits_per_byte"][column] is not None
    ]
