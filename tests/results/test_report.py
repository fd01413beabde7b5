"""Test the report of a run whose stages' folders are real and whose numbers are drawn."""

import io
import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from html_page import Page
from rich.console import Console

from fuselm.results import report, run_summary, verdicts
from fuselm.results.bootstrap import Bootstrap
from fuselm.results.pages import figures, report_page, results_table
from fuselm.results.scoring import Score
from fuselm.runs import config
from fuselm.runs.options.sources import LocalSourceOptions
from fuselm.system.manifest import Recipe, build_once

HELDOUT = {"<b>&\"'": 7, "french": 11, "a|b\nc": 13}  # documents of each domain
STEPS = 13
LEVELS = {"gemma": 1.05, "qwen": 0.9, "base": 1.2, "clm": 1.1, "fused": 1.0}  # bits per byte, about


@pytest.fixture
def make(tmp_path):
    """Return a function that makes the folders of all stages from `levels` in bits per byte, and pairs' `noise`."""
    made = 0

    def folders(levels: dict[str, float] = LEVELS, noise: float = 0.01, **training: float) -> dict:
        nonlocal made
        made += 1
        return make_folders(tmp_path / str(made), levels, HELDOUT, noise=noise, **training)

    return folders


def make_folders(
    root: Path,
    levels: dict[str, float],
    heldout: dict[str, int],
    *,
    noise: float = 0.01,
    lambda_clm: float = 0.5,
    average: float = 1.2,
    steps: int = STEPS,
    planned_steps: int = STEPS,
) -> dict:
    sources = [name for name in levels if name not in verdicts.TARGETS]
    rng = random.Random(0)

    def folder(
        stage: str, name: str, counts: dict, parameters: dict | None = None, inputs: dict | None = None, **files
    ) -> Path:
        def build(out: Path) -> dict:
            for file, content in files.items():
                (out / f"{file}.json").write_text(json.dumps(content))
            return counts

        path = root / stage / (name or "only")
        build_once(path, Recipe(stage=stage, parameters=parameters or {}, inputs=inputs or {}), build)
        return path

    def training(method: str) -> Path:
        losses = {"loss": 2.0, "clm_loss": 3.0} | ({"fusion_loss": 1.0} if method == "fused" else {})
        log = [{"step": k, **{n: v + rng.random() - k / steps for n, v in losses.items()}} for k in range(1, steps + 1)]
        dev = [
            {"step": k, **{d: levels[method] + abs(k - 8) / 50 for d in [*heldout, "average"]}}
            for k in range(2, steps + 1, 3)
        ]
        counts = {
            "steps": steps,
            "planned_steps": planned_steps,
            "tokens": 34_000,
            "text_tokens": 23_000,  # patience ended it in the second pass
            "best_step": 8,
            "dev_bits_per_byte": levels[method],
        }
        rest = {
            "lambda_final": None,
            "precision": "float32",
            "lr_schedule": "constant",
            "average": method == "fused" and average,
        }
        parameters = {"learning_rate": 1e-4, "passes": 2, "lambda_clm": lambda_clm if method == "fused" else 1.0}
        return folder("train", method, counts, parameters | rest, history={"dev": dev, "log": log})

    documents = [
        (d, f"{d}{k}", rng.gauss(0, 0.1), rng.randint(500, 3000)) for d, n in heldout.items() for k in range(n)
    ]
    scores = {
        name: [
            Score(document=i, domain=d, bits=(level + hard + rng.gauss(0, noise)) * size, bytes=size)
            for d, i, hard, size in documents
        ]
        for name, level in levels.items()
    }
    fidelity = {
        "own_bits_per_byte": 1.0,
        "aligned_bits_per_byte": 1.004,
        "fidelity": 1.004,
        "coverage": 1.0,
        "mass_lost": 0.013,
    }
    splits = ("train", "dev", "heldout")
    return {
        "corpus": folder(
            "corpus",
            "",
            {
                "documents": {f"{d}/{s}": n for d, n in heldout.items() for s in splits},
                "empty": 2,
                "repeated": 4,
                "cut": 3,
                "bytes": dict.fromkeys(splits, 17_000),
                "tokens": {"0f1e": dict.fromkeys(splits, 4_300), "2d3c": dict.fromkeys(splits, 5_100)},
            },
        ),
        "write": {"gemma": folder("write", "gemma", {"documents": 31, "bytes": {d: 2_000 for d in heldout}})},
        "capture": {name: folder("capture", name, {"documents": 41}) for name in sources},
        "align": {
            name: folder("align", name, {"fidelity": {d: fidelity for d in sorted(heldout)}}) for name in sources
        },
        "fuse": folder(
            "fuse",
            "",
            {
                "sources": sorted(sources),
                "shares": {d: [0.9 / len(sources)] * len(sources) for d in heldout},
                "bits_per_byte": dict.fromkeys(heldout, 0.8),
            },
            {"function": "fixed", "level": "token", "weights": "learned"},
        ),
        "train": {method: training(method) for method in ("clm", "fused")},
        "evaluate": {
            name: folder(
                "evaluate",
                name,
                {},
                inputs={"tokenizer": "2d3c" if name == "qwen" else "0f1e"},
                scores=[asdict(s) for s in rows],
            )
            for name, rows in scores.items()
        },
    }


@pytest.fixture
def run() -> config.RunOptions:
    return config.RunOptions.model_validate(
        {
            "output": "runs/a",
            "target": "owner/Target-135M",
            "sources": {"gemma": "owner/Gemma", "qwen": "owner/Qwen"},
            "corpus": {"files": ["texts/mixed.jsonl"]},
        }
    )


def options_of(run: config.RunOptions) -> dict:
    return run.model_dump(mode="json")


def read_scores(folders: dict, name: str) -> list[Score]:
    return [Score(**row) for row in json.loads((folders["evaluate"][name] / "scores.json").read_text())]


def test_summary_has_every_number_of_the_run(make, run, tmp_path):
    assert report.write_report(tmp_path, options_of(run), make()) == {"models": 5, "heldout": sum(HELDOUT.values())}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["models"]) == ["gemma", "qwen", "base", "clm", "fused"]
    assert set(summary["differences"]) == {"fused-clm", "fused-base", "clm-base", "fused-gemma", "fused-qwen"}
    for rows, key in ((summary["models"], "bits_per_byte"), (summary["differences"], "value")):
        for row in rows.values():
            assert set(row["domains"]) == set(HELDOUT)
            for cell in [*row["domains"].values(), row["average"]]:
                assert set(cell) == {key, "low", "high"}
                assert cell["low"] <= cell[key] <= cell["high"]
    assert {d: v["documents"] for d, v in summary["heldout"].items()} == HELDOUT
    assert summary["training"]["fused"] == {
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "passes": 2,
        "average": 1.2,
        "lambda_clm": 0.5,
        "lambda_final": None,
        "precision": "float32",
        "steps": STEPS,
        "best_step": 8,
        "dev_bits_per_byte": 1.0,
        "tokens": 34_000,
        "text_tokens": 23_000,
    }
    assert summary["fusion"]["shares"]["french"] == {"gemma": 0.45, "qwen": 0.45}
    assert summary["fusion"]["way"] == "fixed, weights learned by domain"
    assert summary["written"] == {"gemma": {"documents": 31, "bytes": dict.fromkeys(sorted(HELDOUT), 2_000)}}
    assert set(summary["alignment"]["qwen"]) == set(HELDOUT)
    assert summary["corpus"]["documents"]["french/heldout"] == 11
    assert {name: of["dev"] for name, of in summary["corpus"]["tokens"].items()} == {
        "gemma, target": 4_300,
        "qwen": 5_100,
    }
    assert summary["stages"].keys() >= {"corpus", "capture gemma", "train fused", "evaluate base"}
    assert "output" not in summary["config"] and summary["config"]["align"]["method"] == "branches"


def test_differences_are_those_of_the_bootstrap(make, run):
    folders = make()
    summary = run_summary.summarize_run(options_of(run), folders)
    bootstrap = Bootstrap(read_scores(folders, "base"))
    for pair, row in summary["differences"].items():
        expected = bootstrap.find_intervals(*(read_scores(folders, name) for name in pair.split("-")))
        assert row["average"] == asdict(expected.pop("average"))
        assert row["domains"] == {d: asdict(i) for d, i in expected.items()}


def test_two_writes_are_the_same_bytes(make, run, tmp_path):
    folders = make()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write_report(tmp_path / name, options_of(run), folders)
    for file in ("summary.json", "report.html", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_output_folder_is_not_in_the_results(make, run):
    folders = make()
    moved = run.model_copy(update={"output": "elsewhere/b"})
    assert run_summary.summarize_run(options_of(run), folders) == run_summary.summarize_run(options_of(moved), folders)


def test_what_is_not_finite_is_null(make, run, tmp_path):
    folders = make()
    path = folders["align"]["qwen"] / "manifest.json"
    record = json.loads(path.read_text())
    record["counts"]["fidelity"]["french"] |= {"aligned_bits_per_byte": float("inf"), "fidelity": float("inf")}
    path.write_text(json.dumps(record))
    report.write_report(tmp_path, options_of(run), folders)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["alignment"]["qwen"]["french"]["fidelity"] is None
    assert "∞" in (tmp_path / "report.html").read_text()


def test_a_model_that_is_target_and_source_is_timed_once(make, run):
    folders = make()
    folders["evaluate"]["gemma"] = folders["evaluate"]["base"]
    summary = run_summary.summarize_run(options_of(run), folders)
    assert len({"evaluate gemma", "evaluate base"} & set(summary["stages"])) == 1
    assert summary["differences"]["fused-gemma"] == summary["differences"]["fused-base"]


@pytest.mark.parametrize(
    ("fused", "noise", "word"), [(1.0, 0.001, "better"), (1.1, 0.05, "level"), (1.2, 0.001, "worse")]
)
def test_verdict_says_better_level_or_worse(make, run, fused, noise, word):
    summary = run_summary.summarize_run(options_of(run), make(LEVELS | {"base": 1.3, "fused": fused}, noise))
    difference = summary["differences"]["fused-clm"]["average"]
    assert verdicts.judge(difference) == word
    value, low, high = (f"{difference[n]:+.4f}" for n in ("value", "low", "high"))
    assert verdicts.describe_outcome(summary) == (
        "fused is better than base on 3 of 3 domains; "
        f"fused - clm = {value} [{low}, {high}] bits per byte on average: {word}" + describe_best(summary)
    )


def describe_best(summary: dict) -> str:
    """Return the verdict's end, about the best source, in these runs always qwen or gemma and never the target."""
    best = verdicts.find_best_source(summary)
    difference = summary["differences"][f"fused-{best}"]["average"]
    words = {"better": "is worse than fused", "worse": "is still better than fused", "level": "is level with fused"}
    said = words.get(verdicts.judge(difference), "has no interval against fused")
    value, low, high = (None if (n := difference[k]) is None else f"{n:+.4f}" for k in ("value", "low", "high"))
    interval = "" if low is None else f" [{low}, {high}]"
    return f"; the best single source, {best}, {said}: fused - {best} = {value}{interval}"


@pytest.mark.parametrize(("fused", "is_said"), [(0.9, False), (1.05, True)])
def test_a_source_that_is_better_than_fused_is_named_first(make, run, fused, is_said):
    """The best source has one bit per byte in these runs."""
    summary = run_summary.summarize_run(options_of(run), make(LEVELS | {"fused": fused}, 0.001))
    best = verdicts.find_best_source(summary)
    said = f"{best} alone is better" in verdicts.describe_answer(summary)
    assert said == is_said == ("is still better than fused" in verdicts.describe_outcome(summary))
    assert f"fused-{best}" in report_page.render_model_card(summary)


def test_the_target_is_not_said_to_be_a_better_source(make, run):
    folders = make(LEVELS | {"base": 0.5})
    folders["evaluate"]["gemma"] = folders["evaluate"]["base"]
    assert "source" not in verdicts.describe_outcome(run_summary.summarize_run(options_of(run), folders))


def test_verdict_says_where_fused_is_not_better_than_base(make, run):
    summary = run_summary.summarize_run(options_of(run), make(LEVELS | {"base": 0.9}, 0.001))
    assert verdicts.describe_outcome(summary).startswith("fused is better than base on 0 of 3 domains (worse on 3);")


def test_nothing_is_judged_by_few_documents(run, tmp_path):
    """A domain of five has no interval, so the average has none; the other domain has."""
    folders = make_folders(tmp_path, LEVELS | {"base": 1.3}, {"few": 5, "enough": 6}, noise=0.001)
    summary = run_summary.summarize_run(options_of(run), folders)
    for rows in (summary["models"], summary["differences"]):
        for row in rows.values():
            cells = {"few": row["domains"]["few"], "average": row["average"]}
            assert all(cell["low"] is cell["high"] is None for cell in cells.values())
            assert row["domains"]["enough"]["low"] <= row["domains"]["enough"]["high"]
    assert verdicts.describe_outcome(summary) == (
        "fused is better than base on 1 of 2 domains (unknown on 1); "
        f"fused - clm = {summary['differences']['fused-clm']['average']['value']:+.4f} bits per byte on average: "
        "unknown, because a domain has fewer than 6 held-out documents" + describe_best(summary)
    )
    text = printed(results_table.draw_results(summary), 80)
    assert "– fewer than 6 held-out documents, too few for an interval" in " ".join(text.split()) and "None" not in text
    models = text[: text.index("fused - other")].splitlines()
    starred = {line.split()[0]: line.split()[-1].startswith("*") for line in models if line[:1] in "efa" and line}
    assert starred == {"enough": True, "few": False, "average": False}
    histories = {m: json.loads((p / "history.json").read_text()) for m, p in folders["train"].items()}
    page = report_page.render_page(summary, histories)
    assert "no interval: too few documents" in page and "None" not in page and "unknown" in page
    assert "(–)" in report_page.render_model_card(summary) and "None" not in report_page.render_model_card(summary)


def test_the_same_model_twice_is_level(make, run):
    folders = make(lambda_clm=1.0)
    folders["evaluate"]["fused"] = folders["evaluate"]["clm"]
    summary = run_summary.summarize_run(options_of(run), folders)
    assert summary["differences"]["fused-clm"]["average"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "fused - clm = +0.0000 [+0.0000, +0.0000] bits per byte on average: level" in verdicts.describe_outcome(
        summary
    )
    report_page.render_page(
        summary, {m: json.loads((p / "history.json").read_text()) for m, p in folders["train"].items()}
    )


def test_a_checkpoint_from_before_the_mean_began_is_no_mean(run, make):
    """Step 8 of 13 is in the second of two passes."""
    kept = {
        average: run_summary.summarize_run(options_of(run), make(average=average))["training"]["fused"]
        for average in (1.2, 1.3)
    }
    assert {given: of["average"] for given, of in kept.items()} == {1.2: 1.2, 1.3: False}
    stopped = make(average=1.2, planned_steps=STEPS + 2)  # by patience; the mean begins at a step of the plan
    assert run_summary.summarize_run(options_of(run), stopped)["training"]["fused"]["average"] is False


@pytest.mark.parametrize("width", [80, 120, 200])
def test_table_shows_every_number_whole(make, run, width):
    summary = run_summary.summarize_run(options_of(run), make())
    text = printed(results_table.draw_results(summary), width)
    assert max(map(len, text.splitlines())) <= width
    for rows, form in ((summary["models"], "{:.3f}"), (summary["differences"], "{:+.4f}")):
        for name in set(rows) - {"fused-gemma", "clm-base"}:  # of sources, only the best has its difference here
            for cell in [*rows[name]["domains"].values(), rows[name]["average"]]:
                shown = [cell["bits_per_byte"]] if "bits_per_byte" in cell and width < 200 else cell.values()
                assert all(form.format(number) in text for number in shown)
    assert " ".join(verdicts.describe_outcome(summary).split()) in " ".join(text.split())
    assert "1.0" in text and "…" not in text


def test_table_marks_the_best_of_one_size(make, run):
    text = printed(results_table.draw_results(run_summary.summarize_run(options_of(run), make())), 120)
    marked = [line for line in text.splitlines() if "*" in line and not line.startswith("*")]
    assert len(marked) == 4 and all(line.split()[-1].startswith("*") for line in marked)  # domains and their average


def printed(table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_page_is_whole_self_contained_and_escaped(make, run, tmp_path):
    report.write_report(tmp_path, options_of(run), make())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert page.foreign_scripts == [] and "link" not in page.seen and page.seen.count("b") == html.count("<b>")
    assert "<b>&" not in html  # the domain's name
    assert page.texts.count("<b>&\"'") >= 5
    assert not [r for r in page.references if "/" in r] and "url(" not in html and "@import" not in html
    assert "://" not in html
    assert len(html.encode()) < 300_000
    assert page.seen.count("svg") == html.count('<svg viewBox="0 0 ') == html.count('role="img" aria-label="')


def test_a_page_without_token_rows_has_no_token_view(make, run):
    summary = run_summary.summarize_run(options_of(run), folders := make())
    histories = {m: json.loads((path / "history.json").read_text()) for m, path in folders["train"].items()}
    for rows in (None, {"documents": []}):
        assert "token-data" not in report_page.render_page(summary, histories, rows)


def test_page_stays_small_in_a_long_training(run, tmp_path):
    domains = {f"domain {n}": 3 for n in range(11)}
    folders = make_folders(tmp_path / "long", LEVELS, domains, steps=20_011)
    report.write_report(tmp_path, options_of(run), folders)
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_card_says_what_the_model_is(make, run, tmp_path):
    local = tmp_path / "somewhere" / "local-model.gguf"
    local.parent.mkdir()
    local.touch()
    run = run.model_copy(update={"sources": run.sources | {"gemma": LocalSourceOptions(model=str(local))}})
    summary = run_summary.summarize_run(options_of(run), make())
    _, front, body = report_page.render_model_card(summary).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": "owner/Target-135M",
        "pipeline_tag": "text-generation",
        "tags": ["fuselm", "knowledge-fusion"],
    }
    assert "`gemma`: local-model\n" in body and str(tmp_path) not in body
    assert "`qwen`: owner/Qwen\n" in body and "mixed.jsonl" in body and "texts/" not in body
    assert "arXiv" in body and "2401.10491" in body
    assert "The licences of the target and of the sources apply" in body and "license:" not in front
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 + 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(HELDOUT) + 3}
    first = next(iter(summary["models"]["fused"]["domains"].values()))["bits_per_byte"]
    assert f"| **fused** | {first:.3f} (" in body
    assert "&lt;b&gt;" in body and "<b>" not in body


def test_card_of_a_local_target_names_no_base_model(make, run, tmp_path):
    local = tmp_path / "models" / "local-model"
    local.mkdir(parents=True)
    run = run.model_copy(update={"target": run.target.model_copy(update={"model": str(local)})})
    _, front, body = report_page.render_model_card(run_summary.summarize_run(options_of(run), make())).split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front) and "**Target:** local-model\n" in body
    run = run.model_copy(update={"target": run.target.model_copy(update={"model": f"{local}.gguf"})})
    card = report_page.render_model_card(run_summary.summarize_run(options_of(run), make()))
    assert "**Target:** local-model, read from a GGUF file, whose weights may have been quantised\n" in card


def test_thinned_points_keep_their_mean():
    points = [(float(x), float(x * x)) for x in range(30)]
    thinned = figures.thin_points(points, 10)
    assert len(thinned) == 10
    assert sum(y for _, y in thinned) / 10 == pytest.approx(sum(y for _, y in points) / 30)
    assert figures.thin_points(points, 31) == points and figures.thin_points([], 3) == []


def test_smoothing_leaves_a_straight_line():
    points = [(float(x), 3.0 * x) for x in range(53)]
    assert figures.smooth_points(points) == [pytest.approx(p) for p in points]


def test_figures_draw_one_point_and_equal_values():
    line = figures.Line(label="a", style="clm", points=[(5.0, 1.0)], ring=(5.0, 1.0), dots=True)
    assert figures.draw_curves({"one": [line]}, label="x").count("<circle") == 2
    mark = figures.Mark(label="a", style="clm", value=0.0, low=0.0, high=0.0)
    assert figures.draw_intervals({"d": [mark]}, axis="x", number=str, zero=True, label="x").count("<circle") == 1
    assert (
        figures.draw_curves({}, label="x") == ""
        and figures.draw_shares({"d": {}}, {"a": "source-0"}, label="x").count("<rect") == 1
    )
    assert "nan" not in figures.draw_bars({"a": 0.0, "b": 0.0}, number=str, label="x")


def test_layers_and_steps_have_whole_ticks():
    for points, below in (([(0.0, 3.0), (1.0, 7.0)], ["0", "1"]), ([(0.5, 3.0), (1.0, 7.0)], ["0.5", "0.6"])):
        drawn = figures.draw_curves({"one": [figures.Line(label="a", style="clm", points=points)]}, label="x")
        assert re.findall(r'"tick middle"[^>]*>([^<]*)<', drawn)[:2] == below


@pytest.mark.parametrize("values", [(-0.0537, -0.0336), (-0.2, -0.1), (0.004, 0.009), (-0.003, 0.002), (0.0, 0.0)])
@pytest.mark.parametrize("width", [figures.WIDTH, figures.WIDTH // 2 - 20, figures.NARROW_WIDTH])
def test_zero_is_drawn_and_named_in_every_figure_of_differences(values, width):
    marks = {f"d{v}": [figures.Mark(label="a", style="clm", value=v, low=v - 0.001, high=v + 0.001)] for v in values}
    drawn = figures.draw_intervals(marks, axis="x", number=str, zero=True, label="x", width=width)
    line = re.search(r'<line class="zero" x1="([\d.]+)"', drawn)
    tick = re.search(r'<text class="tick middle" x="([\d.]+)" y="\d+">0(\.0+)?</text>', drawn)
    assert line and tick and float(line[1]) == float(tick[1])
    places = [float(x) for x in re.findall(r' c?x="([\d.]+)"', drawn)]
    assert min(places) >= 0 and max(places) <= width


def test_a_figure_is_drawn_for_phones_too():
    marks = {
        "a long name of a domain": [figures.Mark(label="m", style="clm", value=v, low=v, high=v) for v in (1.0, 2.0)]
    }
    both = figures.draw_for_all_widths(
        lambda width: figures.draw_intervals(marks, axis="x", number=str, label="x", width=width)
    )
    assert [int(w) for w in re.findall(r'viewBox="0 0 (\d+) ', both)] == [figures.WIDTH, figures.NARROW_WIDTH]
    assert figures.draw_for_all_widths(lambda width: "") == ""


@pytest.mark.parametrize(("tokens", "said"), [(0, False), (96, True)])
def test_page_and_card_say_what_sources_read_first(make, run, tokens, said):
    run = run.model_copy(update={"capture": run.capture.model_copy(update={"prefix_tokens": tokens})})
    summary = run_summary.summarize_run(options_of(run), folders := make())
    histories = {m: json.loads((path / "history.json").read_text()) for m, path in folders["train"].items()}
    assert ("Sources read <b>96</b> tokens of a domain" in report_page.render_page(summary, histories)) == said
    card = report_page.render_model_card(summary)
    assert ("96 tokens of the domain in front of each document\n- **Fusion:**" in card) == said
