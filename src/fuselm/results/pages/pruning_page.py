"""Render the page of `fuselm prune`: what was removed from a model, and how much each layer lost by it."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from fuselm.models.pruning.choices import BY_GRADIENT, IMPORTANCES
from fuselm.results.pages import figures, rendering
from fuselm.results.pages.figures import Line
from fuselm.results.pages.formats import format_minus

STYLES = {"mlp": "fused", "groups": "clm", "layers": "source-1"}
LABELS = {"mlp": "MLP channels", "groups": "key-value heads", "layers": "the whole layer"}
MEANINGS = {
    "intermediate_size": "the channels in each MLP",
    "kv_heads": "the key-value heads in each layer",
    "hidden_size": "the channels between layers",
}


def render_page(result: Mapping[str, Any], *, model: str, rows: list[tuple[str, str, str]]) -> str:
    """Render what `pruning.json` holds as one self-contained HTML page; `rows` are sizes before and after."""
    removed = {name: places for name, places in result["removed"].items() if name in STYLES and name != "layers"}
    shares = {name: _average_by_layer(places) for name, places in removed.items()}
    rises = {
        name: {int(layer): rise for layer, rise in layers.items()}
        for name, layers in (result.get("sensitivity") or {}).items()
    }
    panels = {}
    if shares:
        panels["share of importance removed, %"] = _draw_lines(shares, scale=100.0)
    if rises:
        panels["rise of the loss, bits per token"] = _draw_lines(rises)
    used = [name for name in STYLES if name in shares or name in rises]
    return rendering.render_template(
        "pruning.html.jinja",
        model=model,
        rows=rows,
        meanings=", ".join(f"{name} counts {MEANINGS[name]}" for name, *_ in rows if name in MEANINGS),
        importance=result["importance"],
        meaning=_describe_importance(result["importance"]),
        removed_layers=result["removed"].get("layers", []),
        styles={LABELS[name]: STYLES[name] for name in used},
        drawn=figures.draw_for_all_widths(
            lambda width: figures.draw_curves(
                panels, label="What each layer lost", columns=2, axis="layer", width=width
            )
        ),
        shares=shares,
        rises=rises,
        format_rise=format_minus,
        most={name: max(layers, key=lambda layer: layers[layer]) for name, layers in rises.items()},
        labels=LABELS,
        version=metadata.version("fuselm"),
    )


def _describe_importance(importance: str) -> str:
    """Say how units were scored, and what the letters of its formula are."""
    meaning = IMPORTANCES[importance]
    letters = ["w is a weight"] * (importance in (*BY_GRADIENT, "magnitude")) + ["g its gradient"] * ("w g" in meaning)
    said = meaning[0].lower() + meaning[1:].replace("w g", "w\u00a0g")
    return f"{said} Here {' and '.join(letters)}." if letters else said


def _average_by_layer(places: Mapping[str, float]) -> dict[int, float]:
    """Return the mean share of each layer, whose experts may have several."""
    found: dict[int, list[float]] = {}
    for place, share in places.items():
        found.setdefault(int(place.split(".")[0]), []).append(share)
    return {layer: sum(values) / len(values) for layer, values in found.items()}


def _draw_lines(rows: Mapping[str, Mapping[int, float]], scale: float = 1.0) -> list[Line]:
    return [
        Line(
            label=LABELS[name],
            style=STYLES[name],
            points=[(float(layer), scale * value) for layer, value in sorted(layers.items())],
            dots=True,
        )
        for name, layers in rows.items()
    ]
