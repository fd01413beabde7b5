"""Write the pages of a study from the numbers in its `study.json`: Markdown with figures, and one HTML page.

Both have the same tables, with a dash for everything that is not made yet.
"""

import functools
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuselm.results.notes import describe_unspelled, mark_incomparable
from fuselm.results.pages import figures, rendering
from fuselm.results.pages.figures import Line, Mark
from fuselm.results.pages.formats import describe_settings, format_bits, format_interval, format_minus
from fuselm.results.pages.styles import style_source
from fuselm.results.pages.tasks_table import describe_rows, write_markdown
from fuselm.results.seed_intervals import SMALLEST
from fuselm.results.verdicts import judge
from fuselm.system import atomic_files
from fuselm.system.foreign_text import escape_controls

Draw = Callable[[int], str]  # from the width to the figure, empty if there is nothing to draw
DASH = "–"
FIGURES = {
    "bars": "Held-out text, all seeds together: bits per byte, lower is better, with 95% intervals.",
    "differences": "Paired differences on the same held-out documents, with 95% intervals.",
    "steps": "Bits per byte of the development split by step, of one seed; the ring is the checkpoint kept.",
    "tokens": "Held-out text: bits per byte over tokens of training text.",
}


def write_pages(out: Path, result: Mapping[str, Any]) -> None:
    """Write `results.md`, `figures/*.svg` and `study.html` into `out`.

    Figures of experiments that are no longer in the study are kept.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    shown = [_show_experiment(experiment, result) for experiment in result["experiments"]]
    css = rendering.render_template("figure.css.jinja")
    for experiment in shown:
        for kind, draw in experiment["figures"].items():
            svg = figures.make_standalone(draw(figures.WIDTH), css, experiment["legends"].get(kind, {}))
            atomic_files.write_text(out / "figures" / f"{experiment['name']}-{kind}.svg", svg)
    shared = {"result": result, "experiments": shown, "captions": FIGURES, "arms": _list_trainings(result)}
    shared |= {"dash": DASH, "describe_settings": describe_settings, "smallest": SMALLEST}
    atomic_files.write_text(out / "results.md", rendering.render_template("study.md.jinja", **shared))
    shared |= {"judge": judge, "interval": format_interval, "minus": format_minus, "prose": render_prose}
    shared |= {"verdict": describe_comparisons(result), "draw": figures.draw_for_all_widths}
    atomic_files.write_text(out / "study.html", rendering.render_template("study.html.jinja", **shared))


def describe_comparisons(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say how the trained arms of the first experiment compare, best first: the judgement and a sentence for each."""
    for experiment in result["experiments"]:
        cells = {n: c["average"] for n, c in experiment["differences"].items() if c and result["arms"][n]["method"]}
        if cells:
            return [
                (judge(cell), _describe_comparison(name, experiment["against"][name], cell))
                for name, cell in sorted(cells.items(), key=lambda pair: pair[1]["value"])
            ]
    return []


def _describe_comparison(name: str, rival: str, cell: Mapping[str, Any]) -> str:
    words = {
        "better": "is better than",
        "worse": "is worse than",
        "level": "is level with",
        "unknown": "cannot be judged against",
    }
    value = f"{name} − {rival} = {format_minus(cell['value'])} {format_interval(cell, format_minus)} bits per byte"
    return f"{name} {words[judge(cell)]} {rival}: {value} on average."


def render_prose(text: str) -> str:
    """Convert paragraphs, `code`, **bold** and links of Markdown to HTML, and escape the rest."""
    text = html.escape(escape_controls(text, keep="\n"), quote=False)
    text = re.sub(r"`([^`]+)`|\*\*([^*]+)\*\*", lambda found: f"<b>{found[1] or found[2]}</b>", text)
    text = re.sub(r"\[([^\]]+)\]\((https?://[^)\s\"]+)\)", r'<a href="\2">\1</a>', text)
    return "".join(f'<p class="note">{part.strip()}</p>' for part in text.split("\n\n") if part.strip())


def _show_experiment(experiment: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    columns = [*result["domains"], "average"]
    styles = style_arms(experiment["arms"], result["arms"])
    lines = list(experiment["lines"] or {})
    of_arms = style_arms([experiment["lines"][name][-1] for name in lines], result["arms"])
    line_styles = {name: of_arms[experiment["lines"][name][-1]] for name in lines}
    draws: dict[str, Draw] = {}
    if "bars" in experiment["figures"]:
        draws["bars"] = functools.partial(_draw_bars, experiment, styles)
        draws["differences"] = functools.partial(_draw_differences, experiment, result)
    if lines:
        draws["tokens"] = functools.partial(_draw_tokens, experiment, result, line_styles)
    if "steps" in experiment["figures"]:
        draws["steps"] = functools.partial(_draw_steps, experiment, result, styles)
    return {
        **{name: experiment[name] for name in ("name", "title", "says")},
        "columns": columns,
        "styles": styles,
        "legends": {
            "steps": {n: style for n, style in styles.items() if result["arms"][n]["method"] is not None},
            "tokens": line_styles,
        },
        "rows": [_show_arm(name, experiment, result["arms"][name], columns) for name in experiment["arms"]],
        "note": describe_unspelled(experiment.get("unspelled", {})),
        "seeds": experiment["seeds"],
        "differences": [
            _show_difference(name, rival, experiment, columns) for name, rival in experiment["against"].items()
        ],
        "tasks": describe_rows(experiment.get("tasks", [])),
        "tasks_markdown": write_markdown(experiment["tasks"]) if experiment.get("tasks") else "",
        "needed": _list_needed_tokens(experiment),
        "trials": _list_trials(experiment["arms"], result["arms"]),
        "figures": {kind: draw for kind, draw in draws.items() if draw(figures.WIDTH)},
    }


def style_arms(names: Sequence[str], arms: Mapping[str, Any]) -> dict[str, str]:
    """Return the style of each arm.

    The arm with a method's name, else the method's first arm, has the method's colour. `base` is grey. Other arms have
    the colours of sources.
    """
    first: dict[str, str] = {}
    for name in names:
        wanted = "base" if name == "base" else arms[name]["method"]
        if wanted is not None and (wanted not in first or name == wanted):
            first[wanted] = name
    of_methods = {name: method for method, name in first.items()}
    others = [name for name in names if name not in of_methods]
    return {n: of_methods.get(n) or style_source(others.index(n)) for n in names}


def _show_arm(
    name: str, experiment: Mapping[str, Any], arm: Mapping[str, Any], columns: Sequence[str]
) -> dict[str, Any]:
    cells, spread = experiment["values"][name], experiment["spread"][name]
    shares = experiment.get("unspelled", {}).get(name, {})
    done = sum(seed["bits_per_byte"] is not None for seed in arm["seeds"].values())
    return {
        "name": name,
        "cells": [f"{mark_incomparable(shares, c)}{cells[c]['value']:.4f}" if cells else DASH for c in columns],
        "interval": format_interval(cells["average"], format_bits) if cells else "",
        "spread": DASH if spread is None else f"{spread:.4f}",
        "seeds": f"{done}" if done == len(arm["seeds"]) else f"{done} of {len(arm['seeds'])}",
    }


def _show_difference(name: str, rival: str, experiment: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    cells, of = experiment["differences"][name], experiment["by_seed"]
    return {
        "name": f"{name} − {rival}",
        "cells": [cells[c] if cells else None for c in columns],
        "by_seed": [value - of[rival][seed] for seed, value in of[name].items()] if cells else [],
        "p": _format_p(experiment["p_adjusted"].get(name)),
    }


def _format_p(p: float | None) -> str:
    return DASH if p is None else "below 0.001" if p < 0.001 else f"{p:.3f}"


def _list_needed_tokens(experiment: Mapping[str, Any]) -> list[dict[str, Any]]:
    needed = experiment.get("curves", {}).get("needed", {})
    points = [point for line in experiment.get("curves", {}).get("lines", {}).values() for point in line]
    bounds = {"": "", "<": "at most ", ">": "more than "}
    return [
        {
            "arm": p["arm"],
            "tokens": p["tokens"],
            "value": p["value"],
            "needed": f"{bounds[needed[p['arm']]['bound']]}{needed[p['arm']]['tokens']:,.0f}",
            "times": f"{bounds[needed[p['arm']]['bound']]}{needed[p['arm']]['times']:.1f}",
            "interval": _format_times(needed[p["arm"]]),
        }
        for p in points
        if p["arm"] in needed
    ]


def _format_times(needed: Mapping[str, Any]) -> str:
    """Format an interval over documents; an end that the line does not reach is a dash, and nothing is known of two."""
    ends = [DASH if needed[end] is None else f"{needed[end]:.2f}" for end in ("low", "high")]
    return "" if ends == [DASH, DASH] else f"[{', '.join(ends)}]"


def _list_trials(names: Sequence[str], arms: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each trial gave by seed, for arms with several trials."""
    longest = {n: max((of["trials"] for of in arms[n]["seeds"].values()), key=len) for n in names}
    chosen = {n: arms[n]["seeds"] for n in names if len(longest[n]) > 1}
    seeds = sorted({seed for by_seed in chosen.values() for seed in by_seed}, key=int)
    rows = []
    for name, by_seed in chosen.items():
        for trial in longest[name]:
            cells = [_show_dev(trial["settings"], by_seed.get(seed)) for seed in seeds]
            rows.append({"arm": name, "trial": describe_settings(trial["settings"]), "cells": cells})
    return {"seeds": seeds, "rows": rows}


def _show_dev(settings: Mapping[str, Any], seed: Mapping[str, Any] | None) -> tuple[str, bool]:
    """Return what the trial with these settings gave on a seed's development split, and whether it was chosen."""
    trials = [trial for trial in (seed or {"trials": []})["trials"] if trial["settings"] == settings]
    if not trials:
        return DASH, False
    return f"{trials[0]['dev_bits_per_byte']:.4f}" if trials[0]["done"] else DASH, trials[0]["chosen"]


def _list_trainings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how the chosen trial of each arm was trained, by seed."""
    rows = []
    for name, arm in result["arms"].items():
        if arm["method"] is None:
            continue
        for seed, of in arm["seeds"].items():
            best = next((trial for trial in of["trials"] if trial["chosen"]), None)
            sets = {**arm["set"], **(best["settings"] if best else {})}
            if set(arm["sources"]) != set(result["sources"]):
                sets["sources"] = ", ".join(arm["sources"])
            rows.append(
                {"arm": name, "method": arm["method"], "seed": seed, "sets": describe_settings(sets), "trained": best}
            )
    return rows


def _draw_bars(experiment: Mapping[str, Any], styles: Mapping[str, str], width: int) -> str:
    marks = {n: [_make_mark(n, styles[n], c["average"])] for n, c in experiment["values"].items() if c}
    if not marks:
        return ""
    label = f"{experiment['title']}: bits per byte of each arm"
    return figures.draw_intervals(marks, axis="bits per byte", number=format_bits, width=width, label=label)


def _draw_differences(experiment: Mapping[str, Any], result: Mapping[str, Any], width: int) -> str:
    """Draw the differences of trained arms. Sources are so far off that nothing else could be seen."""
    trained = {n: c["average"] for n, c in experiment["differences"].items() if c and result["arms"][n]["method"]}
    cells = {f"{name} − {experiment['against'][name]}": cell for name, cell in trained.items()}
    if not cells:
        return ""
    return figures.draw_intervals(
        {n: [_make_mark(n, judge(c), c)] for n, c in cells.items()},
        axis="← better · bits per byte · worse →",
        number=format_minus,
        zero=True,
        width=width,
        label=f"{experiment['title']}: differences in bits per byte",
    )


def _make_mark(name: str, style: str, cell: Mapping[str, float]) -> Mark:
    return Mark(label=name, style=style, value=cell["value"], low=cell["low"], high=cell["high"])


def _draw_steps(experiment: Mapping[str, Any], result: Mapping[str, Any], styles: Mapping[str, str], width: int) -> str:
    """Draw the first seed that all arms have, because the development split of another seed is another text."""
    seed = str(next(iter(experiment["seeds"]), ""))

    def line(name: str, domain: str) -> Line | None:
        trained = result["arms"][name]["seeds"].get(seed, {"trials": []})["trials"]
        best = next((trial for trial in trained if trial["chosen"]), None)
        if best is None:
            return None
        points = [(float(row["step"]), row[domain]) for row in best["dev"]]
        ring = next((point for point in points if point[0] == best["best_step"]), None)
        return Line(label=name, style=styles[name], points=points, ring=ring, dots=True)

    panels = _make_panels(result, lambda domain: [line(name, domain) for name in experiment["arms"]])
    label = f"{experiment['title']}: bits per byte of the development split by step"
    return figures.draw_curves(panels, axis="step", width=width, label=label)


def _draw_tokens(
    experiment: Mapping[str, Any], result: Mapping[str, Any], styles: Mapping[str, str], width: int
) -> str:
    def line(name: str, domain: str) -> Line | None:
        arms = [point["arm"] for point in experiment["curves"]["lines"][name]]
        points = sorted((result["arms"][n]["given_tokens"], experiment["values"][n][domain]["value"]) for n in arms)
        return Line(label=name, style=styles[name], points=points, dots=True) if points else None

    panels = _make_panels(result, lambda domain: [line(name, domain) for name in experiment["lines"]])
    label = f"{experiment['title']}: bits per byte over tokens of text"
    return figures.draw_curves(panels, axis="tokens of text", width=width, label=label)


def _make_panels(result: Mapping[str, Any], lines: Callable[[str], list[Line | None]]) -> dict[str, list[Line]]:
    """Return the lines of each domain and of the average that there are."""
    return {domain: [n for n in lines(domain) if n is not None] for domain in ("average", *result["domains"])}
