"""Render the report of a run as one HTML page, and its model card.

All numbers are those of the run's summary, except for the training curves.
"""

import math
from collections.abc import Mapping, Sequence

import yaml

from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.results.notes import describe_unspelled, mark_incomparable, select_unspelled_shares
from fuselm.results.pages import figures
from fuselm.results.pages.formats import format_bits, format_interval, format_minus, typeset
from fuselm.results.pages.rendering import render_template
from fuselm.results.pages.styles import style_source
from fuselm.results.verdicts import TARGETS, describe_outcome, find_best_source, judge, select_cell
from fuselm.system.durations import format_duration
from fuselm.system.foreign_text import escape_controls


def render_page(summary: Mapping, histories: Mapping[str, Mapping]) -> str:
    """Render a run's report as one self-contained HTML page.

    `histories` are the training histories of `clm` and `fused`, by method.
    """
    sources = [n for n in summary["models"] if n not in TARGETS]
    styles = {n: style_source(k) for k, n in enumerate(sources)} | {t: t for t in TARGETS}
    best = find_best_source(summary)
    return _render_for_run(
        "report.html.jinja",
        summary,
        headline=typeset(describe_outcome(summary)),
        judge=judge,
        interval=format_interval,
        fewest=FEWEST_DOCUMENTS,
        bits=format_bits,
        minus=format_minus,
        sources=sources,
        styles=styles,
        tiles={
            "fused − clm": ("trained on the text alone", summary["differences"]["fused-clm"]["average"]),
            "fused − base": ("the target before training", summary["differences"]["fused-base"]["average"]),
            f"fused − {best}": ("the best single source", summary["differences"][f"fused-{best}"]["average"]),
        },
        figures=_draw_figures(summary, histories, styles),
        resolved=yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    )


def _draw_figures(summary: Mapping, histories: Mapping[str, Mapping], styles: Mapping[str, str]) -> dict[str, str]:
    domains = [*summary["heldout"], "average"]

    def model_marks(domain: str) -> list[figures.Mark]:
        cells = {name: select_cell(row, domain) for name, row in summary["models"].items()}
        return [
            figures.Mark(label=n, style=styles[n], value=c["bits_per_byte"], low=c["low"], high=c["high"])
            for n, c in cells.items()
        ]

    def difference_mark(pair: str, domain: str) -> figures.Mark:
        cell = select_cell(summary["differences"][pair], domain)
        return figures.Mark(label=pair, style=judge(cell), **cell)

    marks = {d: model_marks(d) for d in domains}
    drawn = {"models": figures.draw_intervals(marks, axis="bits per byte", number=format_bits)}
    for pair in ("fused-clm", "fused-base"):
        drawn[pair] = figures.draw_intervals(
            {d: [difference_mark(pair, d)] for d in domains},
            axis="← fused better · bits per byte · fused worse →",
            number=format_minus,
            zero=True,
            width=figures.WIDTH // 2 - 20,
        )
    drawn["dev"] = figures.draw_curves(
        {
            d: [_draw_dev_line(m, h["dev"], d, summary["training"][m]["best_step"]) for m, h in histories.items()]
            for d in ["average", *domains[:-1]]
        }
    )
    terms = {
        "cross-entropy of the text, nats a token": "clm_loss",
        "divergence from the fused rows, nats a token": "fusion_loss",
    }
    drawn["losses"] = figures.draw_curves(
        {title: _draw_loss_term(histories, term) for title, term in terms.items() if _draw_loss_term(histories, term)},
        columns=2,
    )
    sources = {n: s for n, s in styles.items() if n not in TARGETS}
    drawn["shares"] = figures.draw_shares(summary["fusion"]["shares"], sources)
    drawn["stages"] = figures.draw_bars(summary["stages"], number=format_duration)
    return drawn


def _draw_dev_line(method: str, rows: Sequence[Mapping], domain: str, best_step: int) -> figures.Line:
    points = [(float(row["step"]), float(row[domain])) for row in rows]
    best = next((p for p in points if p[0] == best_step), None)
    return figures.Line(label=method, style=method, points=points, ring=best, dots=True)


def _draw_loss_term(histories: Mapping[str, Mapping], term: str) -> list[figures.Line]:
    """Draw each method's term of the loss by step, faint, under its moving mean."""
    lines = []
    for method, history in histories.items():
        points = figures.thin_points([(float(row["step"]), float(row[term])) for row in history["log"] if term in row])
        if any(y for _, y in points):
            lines.append(figures.Line(label=f"{method}, by step", style=f"{method} faint", points=points))
            lines.append(
                figures.Line(label=f"{method}, moving mean", style=method, points=figures.smooth_points(points))
            )
    return lines


def render_model_card(summary: Mapping) -> str:
    """Render the model card of the fused model: Markdown with YAML front matter."""
    resolved = summary["config"]
    models = {"target": resolved["target"]["model"]} | {n: s["model"] for n, s in resolved["sources"].items()}
    models = {name: model.removesuffix(".gguf") for name, model in models.items()}
    front = {
        "library_name": "transformers",
        "base_model": escape_controls(models["target"]),
        "pipeline_tag": "text-generation",
        "tags": ["fuselm", "knowledge-fusion"],
    }
    front_matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=math.inf)
    return _render_for_run("card.md.jinja", summary, front_matter=front_matter, models=models)


def _render_for_run(template: str, summary: Mapping, **context) -> str:
    return render_template(
        template,
        summary=summary,
        config=summary["config"],
        domains=list(summary["heldout"]),
        prefix_tokens=_count_prefix_tokens(summary["config"]),
        targets=TARGETS,
        verdict=describe_outcome(summary),
        unspelled=describe_unspelled({name: select_unspelled_shares(row) for name, row in summary["models"].items()}),
        mark=lambda name, domain: mark_incomparable(select_unspelled_shares(summary["models"][name]), domain),
        written_bytes=sum(sum(of["bytes"].values()) for of in summary["written"].values()),
        **context,
    )


def _count_prefix_tokens(resolved: Mapping) -> int:
    """Return how many tokens the sources read before each document that the run captured.

    Servers read none, and an existing store states its own number.
    """
    captured = [s for s in resolved["sources"].values() if "server" not in s and s["store"] is None]
    return resolved["capture"]["prefix_tokens"] if captured else 0
