"""A run's results: `summary.json`, one self-contained HTML page, the model card, and the table on the terminal.

Everything shown is in `summary.json`, but for the training curves. Only its `stages`, the seconds, differ between two
runs of the same thing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import yaml
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fuselm.results.bootstrap import FEWEST_DOCUMENTS, summarize_scores
from fuselm.results.notes import describe_unspelled, mark_of, unspelled_of
from fuselm.results.pages import figures, pages
from fuselm.results.pages.pages import format_bits, format_duration, format_interval, format_minus, format_signed
from fuselm.results.scoring import Score, is_comparable
from fuselm.runs import config
from fuselm.system import manifest
from fuselm.system.foreign_text import escape_controls, write_json
from fuselm.system.public_names import name_options_publicly
from fuselm.system.terminal import plain

VERSION = 4
TARGETS = ("base", "clm", "fused")  # the rows of one size; the sources are before them
SOURCE_STYLES = 6  # colours of sources in the style sheet; more sources begin again


def write(out: Path, run: config.Run, folders: dict) -> dict:
    """Write `summary.json`, `report.html` and the model card `README.md` from the folders of all stages."""
    summary = summarize_run(run, folders)
    histories = {m: manifest.read_json(path / "history.json") for m, path in folders["train"].items()}
    manifest.write_text(out / "summary.json", write_json(summary, indent=1) + "\n")
    manifest.write_text(out / "report.html", page(summary, histories))
    manifest.write_text(out / "README.md", card(summary))
    return {"models": len(summary["models"]), "heldout": sum(d["documents"] for d in summary["heldout"].values())}


def summarize_run(run: config.Run, folders: dict) -> dict:
    """Every number of a run. What isn't finite (a fidelity, where a method gave the text no chance) is None."""
    scores = {
        name: [Score(**row) for row in manifest.read_json(path / "scores.json")]
        for name, path in folders["evaluate"].items()
    }
    scores = {name: scores[name] for name in [*(n for n in scores if n not in TARGETS), *TARGETS]}
    pairs = [("fused", "clm"), ("fused", "base"), ("clm", "base"), *(("fused", n) for n in scores if n not in TARGETS)]
    fused = manifest.read(folders["fuse"])["counts"]
    summary = summarize_scores(scores, pairs) | {
        "heldout": _sizes(scores["base"]),
        "corpus": _corpus(folders),
        "written": {name: manifest.read(path)["counts"] for name, path in folders["write"].items()},
        "training": {method: _training(path) for method, path in folders["train"].items()},
        "alignment": {name: manifest.read(path)["counts"]["fidelity"] for name, path in folders["align"].items()},
        "fusion": {
            "way": _way(run.fuse),
            "shares": {d: dict(zip(fused["sources"], values, strict=True)) for d, values in fused["shares"].items()},
            "bits_per_byte": fused["bits_per_byte"],
        },
        "stages": _seconds(folders),
        "config": public_options(run),
        "version": metadata.version("fuselm"),
    }
    return finite(summary)


def public_options(run: config.Run) -> dict:
    """Return every option of a run that its results may tell: no paths and no addresses of servers."""
    return name_options_publicly(run.model_dump(mode="json", exclude={"output"}))


def _corpus(folders: dict) -> dict:
    """What was counted of the texts, tokens by who reads them with one tokenizer."""
    counts = {"repeated": 0} | manifest.read(folders["corpus"])["counts"]  # older runs did not look
    readers: dict[str, list[str]] = {}
    for name, path in folders["evaluate"].items():
        if name not in TARGETS[1:]:
            tokenizer = manifest.read(path)["inputs"]["tokenizer"]
            readers.setdefault(tokenizer, []).append("target" if name == "base" else name)
    by_reader = [name for name in ("tokens", "unspelled") if name in counts]
    return counts | {
        name: {", ".join(readers[t]): of for t, of in counts[name].items() if t in readers} for name in by_reader
    }


def _way(options: config.Fuse) -> str:
    weights = ", weights learned by domain" if options.recipe["weights"] == "learned" else ""
    level = f" per {options.level}" if options.function not in ("fixed", "bayes") else ""
    return f"{options.function}{level}{weights}"


def _prefix_tokens(resolved: Mapping) -> int:
    """Of the documents that the run captured; servers read none, and a store that was there says for itself."""
    captured = [s for s in resolved["sources"].values() if "server" not in s and s["store"] is None]
    return resolved["capture"]["prefix_tokens"] if captured else 0


def _sizes(scores: Sequence[Score]) -> dict[str, dict[str, int]]:
    domains = sorted({s.domain for s in scores})
    members = {d: [s for s in scores if s.domain == d] for d in domains}
    return {d: {"documents": len(ss), "bytes": sum(s.bytes for s in ss)} for d, ss in members.items()}


def _training(folder: Path) -> dict:
    record = manifest.read(folder)
    names = ("learning_rate", "lr_schedule", "passes", "average", "lambda_clm", "lambda_final", "precision")
    settings = {n: record["parameters"][n] for n in names}
    counts = {n: record["counts"][n] for n in ("steps", "best_step", "dev_bits_per_byte", "tokens", "text_tokens")}
    planned = record["counts"].get("planned_steps", counts["steps"])  # older folders do not have it
    if counts["best_step"] < planned * settings["average"] / settings["passes"]:
        settings["average"] = False  # what is kept is from before the mean began
    return settings | counts


def _seconds(folders: dict) -> dict[str, float]:
    """Of each folder once: two models that are the same share their scores."""
    seconds: dict[Path, tuple[str, float]] = {}
    for stage, paths in folders.items():
        for name, path in paths.items() if isinstance(paths, dict) else [("", paths)]:
            seconds.setdefault(path, (f"{stage} {name}".strip(), float(manifest.read(path)["seconds"])))
    return dict(seconds.values())


def finite(value):
    """The same nested numbers, None for those that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judge(difference: Mapping[str, float | None]) -> str:
    """Judge a difference of bits per byte by its interval: `better` where that is below zero, `worse` above, else
    `level`; `unknown` where there is none.
    """
    if difference["low"] is None:
        return "unknown"
    if difference["high"] < 0:
        return "better"
    return "worse" if difference["low"] > 0 else "level"


def verdict(summary: Mapping) -> str:
    """What came out, in one sentence."""
    over_base = [judge(d) for d in summary["differences"]["fused-base"]["domains"].values()]
    others = [f"{word} on {over_base.count(word)}" for word in ("level", "worse", "unknown") if word in over_base]
    average = summary["differences"]["fused-clm"]["average"]
    value = format_signed(average["value"])
    interval = "" if average["low"] is None else f" {format_interval(average, format_signed)}"
    return (
        f"fused is better than base on {over_base.count('better')} of {len(over_base)} domains"
        f"{' (' + ', '.join(others) + ')' if others else ''}; fused - clm = {value}{interval} bits per byte on "
        f"average: {judge(average)}{_reason(average)}"
    )


def _reason(cell: Mapping) -> str:
    return f", for a domain has fewer than {FEWEST_DOCUMENTS} held-out documents" if cell["low"] is None else ""


def best_source(summary: Mapping) -> str:
    """The source with the fewest bits per byte on average; of those that spell all domains, if there are any."""
    models = summary["models"]
    sources = [n for n in models if n not in TARGETS]
    comparable = [n for n in sources if is_comparable(unspelled_of(models[n]), "average")]
    return min(comparable or sources, key=lambda n: models[n]["average"]["bits_per_byte"])


def table(summary: Mapping) -> Table:
    """Bits per byte of every model and the differences, each above its 95% interval; the verdict below."""
    models, differences = summary["models"], summary["differences"]
    domains = list(summary["heldout"])
    shown = Table(box=box.SIMPLE, show_edge=False, padding=0, title_justify="left", caption_justify="left")
    shown.title = Text("bits per byte of held-out text, with 95% intervals; lower is better", style="bold")
    few = f"\n– fewer than {FEWEST_DOCUMENTS} held-out documents, too few for an interval" if _has_few(summary) else ""
    note = describe_unspelled({name: unspelled_of(row) for name, row in models.items()})
    shown.caption = Text(
        f"* the best of {', '.join(TARGETS)}{few}{note and chr(10) + note}\n\n{verdict(summary)}", style="bold"
    )
    shown.title_style = shown.caption_style = ""
    shown.add_column("", overflow="fold")
    for domain in [*domains, "average"]:
        shown.add_column(plain(domain.replace("_", " ")), justify="right", overflow="fold")
    for name, row in models.items():
        cells = []
        for domain in [*domains, "average"]:
            cell = _cell(row, domain)
            least = min(_cell(models[t], domain)["bits_per_byte"] for t in TARGETS)
            best = name in TARGETS and cell["low"] is not None and cell["bits_per_byte"] == least
            mark = mark_of(unspelled_of(row), domain)
            value = Text(f"{'*' * best}{mark}{cell['bits_per_byte']:.3f}", style="bold green" if best else "")
            cells.append(Group(value, Text(_bare_interval(cell, format_bits), style="dim")))
        last = name in (list(models)[-len(TARGETS) - 1], TARGETS[-1])
        shown.add_row(plain(name, style="bold" if name == "fused" else ""), *cells, end_section=last)
    colours = {"better": "green", "level": "yellow", "worse": "red", "unknown": "dim"}
    for name in ("fused-clm", "fused-base", f"fused-{best_source(summary)}"):
        cells = []
        for domain in [*domains, "average"]:
            cell = _cell(differences[name], domain)
            value = Text(format_signed(cell["value"]), style=colours[judge(cell)])
            cells.append(Group(value, Text(_bare_interval(cell, format_signed), style="dim")))
        shown.add_row(plain(name), *cells)
    return shown


def _bare_interval(cell: Mapping, form: Callable[[float], str]) -> str:
    return format_interval(cell, form).strip("[]")


def _has_few(summary: Mapping) -> bool:
    return any(of["documents"] < FEWEST_DOCUMENTS for of in summary["heldout"].values())


def _cell(row: Mapping, domain: str) -> Mapping[str, float]:
    return row["average"] if domain == "average" else row["domains"][domain]


def page(summary: Mapping, histories: Mapping[str, Mapping]) -> str:
    """The report as one HTML page that needs nothing else. `histories` are those of `training`, by method."""
    sources = [n for n in summary["models"] if n not in TARGETS]
    styles = {n: f"source-{k % SOURCE_STYLES}" for k, n in enumerate(sources)} | {t: t for t in TARGETS}
    best = best_source(summary)
    return _render(
        "report.html.jinja",
        summary,
        headline=pages.typeset(verdict(summary)),
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
        figures=_figures(summary, histories, styles),
        resolved=yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    )


def _figures(summary: Mapping, histories: Mapping[str, Mapping], styles: Mapping[str, str]) -> dict[str, str]:
    domains = [*summary["heldout"], "average"]

    def model_marks(domain: str) -> list[figures.Mark]:
        cells = {name: _cell(row, domain) for name, row in summary["models"].items()}
        return [
            figures.Mark(label=n, style=styles[n], value=c["bits_per_byte"], low=c["low"], high=c["high"])
            for n, c in cells.items()
        ]

    def difference_mark(pair: str, domain: str) -> figures.Mark:
        cell = _cell(summary["differences"][pair], domain)
        return figures.Mark(label=pair, style=judge(cell), **cell)

    marks = {d: model_marks(d) for d in domains}
    drawn = {"models": figures.intervals(marks, axis="bits per byte", number=format_bits)}
    for pair in ("fused-clm", "fused-base"):
        drawn[pair] = figures.intervals(
            {d: [difference_mark(pair, d)] for d in domains},
            axis="← fused better · bits per byte · fused worse →",
            number=format_minus,
            zero=True,
            width=figures.WIDTH // 2 - 20,
        )
    drawn["dev"] = figures.curves(
        {
            d: [_dev(m, h["dev"], d, summary["training"][m]["best_step"]) for m, h in histories.items()]
            for d in ["average", *domains[:-1]]
        }
    )
    terms = {
        "cross-entropy of the text, nats a token": "clm_loss",
        "divergence from the fused rows, nats a token": "fusion_loss",
    }
    drawn["losses"] = figures.curves(
        {title: _terms(histories, term) for title, term in terms.items() if _terms(histories, term)}, columns=2
    )
    sources = {n: s for n, s in styles.items() if n not in TARGETS}
    drawn["shares"] = figures.shares(summary["fusion"]["shares"], sources)
    drawn["stages"] = figures.bars(summary["stages"], number=format_duration)
    return drawn


def _dev(method: str, rows: Sequence[Mapping], domain: str, best_step: int) -> figures.Line:
    points = [(float(row["step"]), float(row[domain])) for row in rows]
    best = next((p for p in points if p[0] == best_step), None)
    return figures.Line(label=method, style=method, points=points, ring=best, dots=True)


def _terms(histories: Mapping[str, Mapping], term: str) -> list[figures.Line]:
    """Each method's term by step, faint, under its moving mean."""
    lines = []
    for method, history in histories.items():
        points = figures.thin([(float(row["step"]), float(row[term])) for row in history["log"] if term in row])
        if any(y for _, y in points):
            lines.append(figures.Line(label=f"{method}, by step", style=f"{method} faint", points=points))
            lines.append(figures.Line(label=f"{method}, moving mean", style=method, points=figures.smooth(points)))
    return lines


def card(summary: Mapping) -> str:
    """The model card of the fused model, Markdown with YAML front matter."""
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
    return _render("card.md.jinja", summary, front_matter=front_matter, models=models)


def _render(template: str, summary: Mapping, **context) -> str:
    return pages.render(
        template,
        summary=summary,
        config=summary["config"],
        domains=list(summary["heldout"]),
        prefix_tokens=_prefix_tokens(summary["config"]),
        targets=TARGETS,
        verdict=verdict(summary),
        unspelled=describe_unspelled({name: unspelled_of(row) for name, row in summary["models"].items()}),
        mark=lambda name, domain: mark_of(unspelled_of(summary["models"][name]), domain),
        written_bytes=sum(sum(of["bytes"].values()) for of in summary["written"].values()),
        **context,
    )
