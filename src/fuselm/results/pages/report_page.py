"""Render the report of a run as one HTML page, and its model card.

All numbers are those of the run's summary, except for the training curves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.results.notes import FIDELITY_SCALE, describe_unspelled, mark_incomparable, select_unspelled_shares
from fuselm.results.pages import figures
from fuselm.results.pages.figures import draw_for_all_widths
from fuselm.results.pages.formats import format_bits, format_interval, format_minus, typeset
from fuselm.results.pages.rendering import render_template
from fuselm.results.pages.styles import style_source
from fuselm.results.pages.tasks_table import describe_rows, write_markdown
from fuselm.results.pages.token_view import prepare_token_view
from fuselm.results.verdicts import TARGETS, describe_answer, describe_outcome, find_best_source, judge, select_cell
from fuselm.system.durations import format_duration
from fuselm.system.public_names import is_hub_name


def render_page(summary: Mapping, histories: Mapping[str, Mapping], token_rows: Mapping[str, Any] | None = None) -> str:
    """Render a run's report as one self-contained HTML page.

    `histories` are the training histories of `clm` and `fused`, by method. `token_rows` are those of
    `token_rows.gather_token_rows`; without them, or documents in them, the page has no token view.
    """
    sources = [n for n in summary["models"] if n not in TARGETS]
    styles = {n: style_source(k) for k, n in enumerate(sources)} | {t: t for t in TARGETS}
    best = find_best_source(summary)
    return _render_for_run(
        "report.html.jinja",
        summary,
        training_styles={name: styles[name] for name in summary["training"]},
        answer=describe_answer(summary),
        headline=typeset(describe_outcome(summary)),
        judge=judge,
        interval=format_interval,
        fewest=FEWEST_DOCUMENTS,
        bits=format_bits,
        minus=format_minus,
        sources=sources,
        styles=styles,
        source_styles={name: styles[name] for name in sources},
        token_view=prepare_token_view(token_rows, styles) if token_rows and token_rows["documents"] else None,
        tiles={
            "fused − clm": ("trained on the text alone", summary["differences"]["fused-clm"]["average"]),
            "fused − base": ("the target before training", summary["differences"]["fused-base"]["average"]),
            f"fused − {best}": ("the best single source", summary["differences"][f"fused-{best}"]["average"]),
        },
        figures=_draw_figures(summary, histories, styles),
        tasks=describe_rows(summary.get("tasks", [])),
        resolved=yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    )


def _draw_figures(summary: Mapping, histories: Mapping[str, Mapping], styles: Mapping[str, str]) -> dict[str, Any]:
    """Draw the figures of the page; those of `models` and `dev` by what the reader may choose."""
    domains = [*summary["heldout"], "average"]
    sources = {name: style for name, style in styles.items() if name not in TARGETS}
    terms = {
        title: lines
        for title, term in {
            "cross-entropy of the text, nats a token": "clm_loss",
            "divergence from the fused rows, nats a token": "fusion_loss",
        }.items()
        if (lines := _draw_loss_term(histories, term, styles))
    }
    return {
        "models": {
            "all": _draw_models(summary, domains, styles),
            **{domain: _draw_models(summary, [domain], styles) for domain in domains},
        },
        "fused-clm": _draw_difference(summary, "fused-clm", domains),
        "fused-base": _draw_difference(summary, "fused-base", domains),
        "dev": {
            "all": _draw_dev_curves(summary, histories, ["average", *domains[:-1]], styles),
            **{domain: _draw_dev_curves(summary, histories, [domain], styles) for domain in domains},
        },
        "losses": draw_for_all_widths(
            lambda width: figures.draw_curves(terms, columns=2, width=width, label="Terms of the loss by step")
        ),
        "shares": draw_for_all_widths(
            lambda width: figures.draw_shares(
                summary["fusion"]["shares"], sources, width=width, label="Share of tokens that each source gave"
            )
        ),
        "stages": draw_for_all_widths(
            lambda width: figures.draw_bars(
                summary["stages"], number=format_duration, width=width, label="Time of each stage"
            )
        ),
    }


def _draw_models(summary: Mapping, domains: Sequence[str], styles: Mapping[str, str]) -> str:
    """Draw every model's bits per byte with its interval, below the name of each domain."""
    groups = {}
    for domain in domains:
        cells = {name: select_cell(row, domain) for name, row in summary["models"].items()}
        groups[domain] = [
            figures.Mark(label=n, style=styles[n], value=c["bits_per_byte"], low=c["low"], high=c["high"])
            for n, c in cells.items()
        ]
    label = f"Bits per byte of every model: {', '.join(domains)}"
    return draw_for_all_widths(
        lambda width: figures.draw_intervals(groups, axis="bits per byte", number=format_bits, width=width, label=label)
    )


def _draw_difference(summary: Mapping, pair: str, domains: Sequence[str]) -> str:
    """Draw the difference of two models by domain, beside another such figure."""

    def make_mark(domain: str) -> figures.Mark:
        cell = select_cell(summary["differences"][pair], domain)
        return figures.Mark(label=pair, style=judge(cell), **cell)

    marks = {domain: [make_mark(domain)] for domain in domains}
    return draw_for_all_widths(
        lambda width: figures.draw_intervals(
            marks,
            axis="← fused better · bits per byte · fused worse →",
            number=format_minus,
            zero=True,
            width=width,
            label=f"{pair.replace('-', ' − ')} by domain, bits per byte",
        ),
        wide=figures.WIDTH // 2 - 20,
    )


def _draw_dev_curves(
    summary: Mapping, histories: Mapping[str, Mapping], domains: Sequence[str], styles: Mapping[str, str]
) -> str:
    """Draw bits per byte of the development split by step, a panel for each domain."""
    panels = {
        domain: [
            _draw_dev_line(method, styles[method], history["dev"], domain, summary["training"][method]["best_step"])
            for method, history in histories.items()
        ]
        for domain in domains
    }
    label = f"Bits per byte of the development split by step: {', '.join(domains)}"
    return draw_for_all_widths(lambda width: figures.draw_curves(panels, width=width, label=label))


def _draw_dev_line(name: str, style: str, rows: Sequence[Mapping], domain: str, best_step: int) -> figures.Line:
    points = [(float(row["step"]), float(row[domain])) for row in rows]
    best = next((p for p in points if p[0] == best_step), None)
    return figures.Line(label=name, style=style, points=points, ring=best, dots=True)


def _draw_loss_term(histories: Mapping[str, Mapping], term: str, styles: Mapping[str, str]) -> list[figures.Line]:
    """Draw each method's term of the loss by step, faint, under its moving mean."""
    lines = []
    for method, history in histories.items():
        points = figures.thin_points([(float(row["step"]), float(row[term])) for row in history["log"] if term in row])
        if any(y for _, y in points):
            lines.append(figures.Line(label=f"{method}, by step", style=f"{styles[method]} faint", points=points))
            lines.append(
                figures.Line(label=f"{method}, moving mean", style=styles[method], points=figures.smooth_points(points))
            )
    return lines


def render_model_card(summary: Mapping) -> str:
    """Render the model card of the fused model: Markdown with YAML front matter."""
    resolved = summary["config"]
    models = {"target": resolved["target"]["model"]} | {n: s["model"] for n, s in resolved["sources"].items()}
    models = {name: model.removesuffix(".gguf") for name, model in models.items()}
    front = {
        "library_name": "transformers",
        **({"base_model": models["target"]} if is_hub_name(models["target"]) else {}),
        "pipeline_tag": "text-generation",
        "tags": ["fuselm", "knowledge-fusion"],
    }
    front_matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=math.inf)
    best = find_best_source(summary)
    pairs = list(dict.fromkeys(["fused-clm", "fused-base", f"fused-{best}"]))
    tasks = write_markdown(summary["tasks"]) if summary.get("tasks") else ""
    return _render_for_run("card.md.jinja", summary, front_matter=front_matter, models=models, pairs=pairs, tasks=tasks)


def _render_for_run(template: str, summary: Mapping, **context) -> str:
    return render_template(
        template,
        summary=summary,
        config=summary["config"],
        domains=list(summary["heldout"]),
        trained=next(of for name, of in summary["training"].items() if name != "clm"),
        prefix_tokens=_count_prefix_tokens(summary["config"]),
        fidelity_scale=FIDELITY_SCALE,
        targets=TARGETS,
        verdict=describe_outcome(summary),
        unspelled=describe_unspelled({name: select_unspelled_shares(row) for name, row in summary["models"].items()}),
        mark=lambda name, domain: mark_incomparable(select_unspelled_shares(summary["models"][name]), domain),
        written_bytes=sum(sum(of.get("bytes", {}).values()) for of in summary["written"].values()),
        **context,
    )


def _count_prefix_tokens(resolved: Mapping) -> int:
    """Return how many tokens the sources read before each document that the run captured.

    Servers read none, and an existing store states its own number.
    """
    captured = [s for s in resolved["sources"].values() if "server" not in s and s["store"] is None]
    return resolved["capture"]["prefix_tokens"] if captured else 0
