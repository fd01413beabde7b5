"""Show how far the models of a merge are apart: a table for the terminal, and a page with figures."""

from collections.abc import Mapping, Sequence
from importlib import metadata

from rich import box
from rich.table import Column, Table

from fuselm.results.pages import figures, rendering
from fuselm.results.pages.figures import Line
from fuselm.results.pages.styles import style_source
from fuselm.system.terminal import make_plain_text

DASH = "–"
EXPLANATION = (
    "Moved is the length of a model's difference from the base, over the length of the base. A merge without a base is "
    "measured from its first model. Cosine compares the differences of two models: 1 is the same direction, 0 "
    "independent, −1 opposite. Signs is the share of the elements changed by both that they changed in the same "
    "direction; 50% is chance."
)

ALIKE, APART = 0.5, 0.2  # cosines from which differences agree, and below which they are nearly independent


def describe_distances(result: Mapping) -> str:
    """Say in a sentence how far the models moved, and whether their differences agree."""
    lengths = result["all"]["relative_lengths"]
    (first, moved), *others = ((name, _format(value, "{:.2%}")) for name, value in lengths.items())
    said = f"{first} moved by {moved} of the base's length" + "".join(f", {name} by {value}" for name, value in others)
    cosines = [pair["cosine"] for pair in result["all"]["pairs"] if pair["cosine"] is not None]
    if not cosines:
        return f"{said}."
    mean = sum(cosines) / len(cosines)
    if mean >= ALIKE:
        advice = "they agree, so average them: a sum would go too far"
    elif mean >= APART:
        advice = "they agree in part"
    elif mean > -APART:
        advice = "they are nearly independent, so they may be added up"
    else:
        advice = "they oppose each other, so a merge loses much of both"
    return f"{said}. The mean cosine of their differences is {_format(mean, '{:.2f}')}: {advice}."


def draw_distances(result: Mapping) -> Table:
    """Draw a row for each layer: how far each model moved, and how far each pair agrees."""
    numbered = {name: str(n + 1) for n, name in enumerate(result["models"])}
    columns = [f"{n} moved" for n in numbered.values()]
    for pair in result["all"]["pairs"]:
        a, b = (numbered[name] for name in pair["models"])
        columns += [f"{a}, {b} cosine", f"{a}, {b} signs"]
    table = Table("layer", *(Column(name, justify="right") for name in columns), box=box.SIMPLE_HEAD, pad_edge=False)
    told = "; ".join(f"{number} {name}" for name, number in numbered.items())
    table.title = make_plain_text(f"base {result['base']}; {told}")
    table.caption = make_plain_text(f"{describe_distances(result)}\n{EXPLANATION}")
    for layer, row in result["layers"].items():
        table.add_row(layer, *list_cells(row))
    table.add_section()
    table.add_row("all", *list_cells(result["all"]))
    return table


def list_cells(row: Mapping) -> list[str]:
    """Return the numbers of a layer as they are shown."""
    cells = [_format(value, "{:.2%}") for value in row["relative_lengths"].values()]
    for pair in row["pairs"]:
        cells += [_format(pair["cosine"], "{:.3f}"), _format(pair["sign_agreement"], "{:.1%}")]
    return cells


def _format(value: float | None, form: str) -> str:
    """Format a number with a typographic minus, and without one where it rounds to zero."""
    if value is None:
        return DASH
    text = form.format(value)
    return (text if text.strip("-0.%") else text.removeprefix("-")).replace("-", "−")


def render_page(result: Mapping) -> str:
    """Render the result of `diagnose_merge` as one self-contained HTML page."""
    pairs = [" and ".join(pair["models"]) for pair in result["all"]["pairs"]]
    of_models = {name: style_source(n) for n, name in enumerate(result["models"])}
    of_pairs = {name: style_source(n) for n, name in enumerate(pairs)}
    layers = [name for name in result["layers"] if name.isdigit()]
    moved = [
        _make_line(name, style, layers, [result["layers"][n]["relative_lengths"][name] for n in layers], scale=100.0)
        for name, style in of_models.items()
    ]
    agreements = {
        title: [
            _make_line(name, style, layers, [result["layers"][n]["pairs"][k][key] for n in layers], scale=scale)
            for k, (name, style) in enumerate(of_pairs.items())
        ]
        for title, key, scale in (
            ("cosine of differences", "cosine", 1.0),
            ("same sign, % of elements", "sign_agreement", 100.0),
        )
    }
    return rendering.render_template(
        "merge.html.jinja",
        result=result,
        explanation=EXPLANATION,
        verdict=describe_distances(result),
        cells=list_cells,
        styles=of_models,
        pair_styles=of_pairs,
        moved=_draw({"moved, % of the base's length": moved}, "How far each model moved"),
        agreements=_draw(agreements, "How far models agree") if pairs else "",
        version=metadata.version("fuselm"),
    )


def _make_line(name: str, style: str, layers: Sequence[str], values: Sequence[float | None], *, scale: float) -> Line:
    points = [(float(n), scale * value) for n, value in zip(layers, values, strict=True) if value is not None]
    return Line(label=name, style=style, points=points, dots=True)


def _draw(panels: Mapping[str, Sequence[Line]], label: str) -> str:
    return figures.draw_for_all_widths(
        lambda width: figures.draw_curves(panels, axis="layer", columns=2, width=width, label=f"{label}, by layer")
    )
