"""Make studies with tiny models: trained, killed and resumed, shown half done; and what a study file cannot say."""

import itertools
import json
import math
import shutil
import time
from pathlib import Path

import measured
import numpy as np
import pytest
import reference
import tiny_run
import yaml
from html_page import Page
from rich.console import Console
from tiny_run import fuselm

from fuselm.results import bootstrap, verdicts
from fuselm.results.bootstrap import Bootstrap, pool_seeds
from fuselm.results.pages import study_page
from fuselm.results.scoring import Score, compute_bits_per_byte
from fuselm.runs.options.study import ExperimentOptions
from fuselm.runs.pipeline import STAGES
from fuselm.runs.steps import Step
from fuselm.runs.studies import comparison, study, study_plan, trials
from fuselm.system import manifest

ARMS = {
    "clm": {"method": "clm", "try": {"train.learning_rate": [1e-6, 3e-3]}},
    "fused": {"method": "fused", "set": {"train.learning_rate": 3e-3}},
    "half": {"like": "fused", "set": {"corpus.share": 0.5}, "seeds": [0]},
    "alone": {"like": "fused", "sources": ["other"], "seeds": [0]},
}
EXPERIMENTS = [
    {"name": "main", "title": "Main", "says": "`fused` is **it**.", "arms": ["base", "other", "clm", "fused"],
     "against": "clm", "figures": ["bars", "steps"]},
    {"name": "tokens", "title": "Tokens", "lines": {"a": ["clm"], "b": ["half", "fused"]}, "against": "a"},
    {"name": "single", "title": "Single", "arms": ["alone", "fused"], "against": "alone"},
]  # fmt: skip


def write(folder: Path, byte_level: Path, sentence_piece: Path, texts, **options) -> Path:
    """Write a study file with its run file beside it, and return its path."""
    tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=tiny_run.short(texts),
        capture={"policy": "top_k", "top_k": 13, "batch_tokens": 131},
        train=tiny_run.TRAIN | {"passes": 1},
    )
    given = {
        "run": "run.yaml",
        "output": str(folder / "study"),
        "seeds": [0, 1],
        "arms": ARMS,
        "experiments": EXPERIMENTS,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(given | options, sort_keys=False))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Return the folder of a finished study that was killed in between; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    study_file = write(folder, byte_level, sentence_piece, texts)
    cache, killed = tmp_path_factory.getbasetemp() / "cache", 0
    for moment in ("seed-0/train/clm-*.partial/checkpoints/*", "seed-1/train/fused-*"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSELM_CACHE", str(cache))
            process = tiny_run.start("study", study_file)
        while process.exitcode is None and not list((folder / "study").glob(moment)):
            time.sleep(0.002)
        killed += process.exitcode is None
        process.kill()
        process.join()
    assert killed
    outcome = fuselm("study", study_file, cache=cache)
    assert outcome.code == 0, outcome.err
    return folder


def result_of(folder: Path) -> dict:
    return json.loads((folder / "study" / "study.json").read_text())


def test_a_study_resumes_elsewhere_with_what_was_measured(finished, tmp_path, tmp_path_factory):
    shutil.copytree(finished / "study", tmp_path / "here/study")
    assert measured.keep(tmp_path / "here", tmp_path / "kept") > 0
    assert measured.unpack(tmp_path / "elsewhere", tmp_path / "kept") > 0
    assert measured.unpack(tmp_path / "elsewhere", tmp_path / "kept") == 0
    cache = tmp_path_factory.getbasetemp() / "cache"
    outcome = fuselm("study", finished / "study.yaml", f"output={tmp_path / 'elsewhere/study'}", cache=cache)
    assert outcome.code == 0 and outcome.stages == [], outcome.err
    study = tmp_path / "elsewhere/study"
    assert json.loads((study / "study.json").read_text())["experiments"] == result_of(finished)["experiments"]
    assert not (study / "seed-0/capture").exists() and not list(study.glob("seed-*/train/*/model"))
    before = (tmp_path / "kept").read_bytes()
    measured.keep(tmp_path / "elsewhere", tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == before


def test_what_was_kept_is_not_lost_and_what_is_missing_comes_back(finished, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(finished / "study", tmp_path / "here/study")
    measured.keep(tmp_path / "here", kept)
    before = kept.read_bytes()
    with pytest.raises(ValueError, match=r"nowhere: nothing there that was measured; name the folder that has"):
        measured.keep(tmp_path / "nowhere", kept)
    shutil.rmtree(tmp_path / "here/study/seed-1")
    measured.keep(tmp_path / "here", kept)
    assert kept.read_bytes() == before
    scores = next((tmp_path / "here/study").glob("seed-0/evaluate/fused-*/scores.json"))
    text = scores.read_bytes()
    scores.unlink()
    assert measured.unpack(tmp_path / "here", kept) > 1 and scores.read_bytes() == text
    kept.write_bytes(before[:-100])
    with pytest.raises(ValueError, match=r"kept: damaged \(.*\); take it from the repository again"):
        measured.unpack(tmp_path / "here", kept)


def test_every_arm_of_every_seed_has_its_numbers(finished):
    arms = result_of(finished)["arms"]
    assert list(arms) == ["base", "other", "clm", "fused", "half", "alone"]
    assert {name: list(arm["seeds"]) for name, arm in arms.items()} == {
        name: ["0"] if name in ("half", "alone") else ["0", "1"] for name in arms
    }
    assert all(of["bits_per_byte"]["average"] > 0 for arm in arms.values() for of in arm["seeds"].values())
    main, tokens, single = result_of(finished)["experiments"]
    assert (main["seeds"], tokens["seeds"], single["seeds"]) == ([0, 1], [0], [0])
    for name in ("clm", "fused"):
        for cell in main["values"][name].values():
            assert cell["low"] is cell["high"] is None  # of few documents
        assert tokens["values"][name]["average"]["value"] == arms[name]["seeds"]["0"]["bits_per_byte"]["average"]
    difference = single["values"]["fused"]["average"]["value"] - single["values"]["alone"]["average"]["value"]
    assert single["differences"]["fused"]["average"]["value"] == pytest.approx(difference)


def test_the_trial_that_is_best_on_the_development_split_is_scored(finished):
    for seed in ("0", "1"):
        of = result_of(finished)["arms"]["clm"]["seeds"][seed]["trials"]
        assert {t["settings"]["train.learning_rate"] for t in of} == {3e-3, 1e-6}
        best = min(of, key=lambda t: t["dev_bits_per_byte"])
        assert [t["chosen"] for t in of] == [t is best for t in of]
        made = finished / "study" / f"seed-{seed}"
        key = {
            manifest.read(p)["parameters"]["learning_rate"]: manifest.read(p)["key"] for p in made.glob("train/clm-*")
        }
        (scored,) = made.glob("evaluate/clm-*")
        assert manifest.read(scored)["inputs"]["model"] == key[best["settings"]["train.learning_rate"]]


def test_one_seed_chooses_among_several_arms_for_all(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    given = yaml.safe_load((tmp_path / "copy/study.yaml").read_text())
    arms = {
        "clm": {**given["arms"]["clm"], "seeds": [1]},
        "other-clm": {"method": "clm", "set": {"train.learning_rate": 1e-6}, "seeds": [1]},
        "best": {"best_of": ["other-clm", "clm"], "chosen_on": 1},
    }
    shown = [{"name": "main", "title": "Main", "arms": list(arms), "against": "best"}]
    study_file = tmp_path / "copy/study.yaml"
    changed = given | {"arms": arms, "experiments": shown, "output": str(tmp_path / "copy/study")}
    study_file.write_text(yaml.safe_dump(changed, sort_keys=False))
    outcome = fuselm("study", study_file)
    assert outcome.code == 0 and "train" not in outcome.stages, outcome.err  # all of it was trained before
    titles = [line for line in outcome.err.splitlines() if line.startswith("arm ")]
    assert titles[0] == "arm 2 of 3, seed 1: other-clm"  # the seed that chooses comes first
    best = result_of(tmp_path / "copy")["arms"]["best"]["seeds"]
    trials = best["1"]["trials"]
    assert [t["settings"]["train.learning_rate"] for t in trials] == [1e-6, 3e-3]  # each once
    (chosen,) = (t for t in trials if t["chosen"])
    assert chosen["dev_bits_per_byte"] == min(t["dev_bits_per_byte"] for t in trials)
    assert [t["settings"] for t in best["0"]["trials"]] == [chosen["settings"]] and best["0"]["trials"][0]["chosen"]
    page = (tmp_path / "copy/study/results.md").read_text()
    assert page.count("\n| best | ") >= 3  # a row of scores, and one of each trial


def test_models_as_they_are_may_be_scored_behind_other_texts(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    given = yaml.safe_load((tmp_path / "copy/study.yaml").read_text())
    arms = {"behind": {"method": "base", "set": {"evaluate.prefix_tokens": 17}, "seeds": [0]}}
    shown = [{"name": "main", "title": "Main", "arms": ["base", "behind"], "against": "base"}]
    changed = given | {"arms": arms, "experiments": shown, "output": str(tmp_path / "copy/study")}
    (tmp_path / "copy/study.yaml").write_text(yaml.safe_dump(changed))
    outcome = fuselm("study", tmp_path / "copy/study.yaml")
    assert outcome.code == 0 and outcome.stages == ["evaluate base"], outcome.err
    (experiment,) = result_of(tmp_path / "copy")["experiments"]
    assert experiment["differences"]["behind"]["average"]["value"] != 0
    for method in ("clm", "base"):
        bad = {"method": method, "set": {"evaluate.batch_tokens" if method == "clm" else "train.passes": 7}}
        (tmp_path / "copy/study.yaml").write_text(yaml.safe_dump(changed | {"arms": {"behind": bad}}))
        outcome = fuselm("study", tmp_path / "copy/study.yaml")
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
        assert ("arms differ in" if method == "clm" else "does nothing to base") in outcome.err


def test_a_difference_of_one_seed_may_be_too_small_to_judge():
    rows = [Score(document=str(n), domain="d", bits=1000.0 + n, bytes=1000) for n in range(60)]
    for more, is_small in ((2.9, True), (3.1, False)):
        others = [Score(document=s.document, domain="d", bits=s.bits + more, bytes=1000) for s in rows]
        pools = comparison.Pools({"a": {0: rows, 1: rows}, "b": {0: others, 1: others}})
        cell = pools.compute_intervals((0,), "b", "a")["average"]
        assert cell["too_small"] is is_small and verdicts.judge(cell) == ("unknown" if is_small else "worse")
        several = pools.compute_intervals((0, 1), "b", "a")["average"]
        assert "too_small" not in several and verdicts.judge(several) == "worse"
        assert "too_small" not in pools.compute_intervals((0,), "b")["average"]


def test_a_seed_waits_for_the_one_that_chooses(tmp_path, byte_level, sentence_piece, texts):
    arms = ARMS | {"clm": ARMS["clm"] | {"chosen_on": 1}}
    study_file = write(tmp_path, byte_level, sentence_piece, texts, arms=arms)
    grid = trials.Grid(study.load(study_file), Console(quiet=True))
    assert [seed for seed, arm in grid.iterate_arms() if arm.name == "clm"] == [1, 0]
    waiting = grid.read_state(grid.study.arms["clm"], 0)
    assert waiting.awaits_choice and waiting.best_trial is None and not waiting.is_measured
    assert len(waiting.trials) == 1 and len(grid.read_state(grid.study.arms["clm"], 1).trials) == 2


def test_weights_are_dropped_and_nothing_is_made_again(finished, tmp_path):
    assert not list((finished / "study").glob("seed-*/train/*/model"))
    assert len(list((finished / "study").glob("seed-*/train/*/history.json"))) == 3 * 2 + 2
    before = {p: p.stat().st_mtime_ns for p in (finished / "study").glob("seed-*/**/*")}
    outcome = fuselm("study", finished / "study.yaml")
    assert outcome.code == 0 and outcome.stages == [] and "arm " not in outcome.err
    assert {p: p.stat().st_mtime_ns for p in (finished / "study").glob("seed-*/**/*")} == before
    outcome = fuselm("study", finished / "study.yaml", "--plan")
    assert "10 of 10 done" in outcome.out


def test_a_seeds_arms_of_one_text_share_captures(finished):
    for seed, texts in ((0, 2), (1, 1)):  # of seed 0 there is an arm with half of it
        captured = (finished / "study" / f"seed-{seed}" / "capture").iterdir()
        assert sorted(p.name.split("-")[0] for p in captured) == ["other"] * texts + ["own"] * texts


def test_differences_are_those_of_the_looped_bootstrap_over_documents_of_all_seeds(finished, monkeypatch):
    """Draw documents, each with its bits of every seed that holds it out, in loops."""
    scores = {
        name: {seed: scores_of(finished, name, seed) for seed in (0, 1)} for name in ("clm", "fused")
    }  # fmt: skip
    documents = sorted({(s.domain, s.document) for of in scores["clm"].values() for s in of})
    domains = sorted({domain for domain, _ in documents})
    sums = {name: {d: [0.0, 0] for d in documents} for name in scores}
    for name, by_seed in scores.items():
        for score in itertools.chain(*by_seed.values()):
            sums[name][score.domain, score.document][0] += score.bits
            sums[name][score.domain, score.document][1] += score.bytes
    draws: list[dict[str, list[int]]] = [{} for _ in range(10_000)]
    for n, domain in enumerate(domains):
        members = [i for i, (of, _) in enumerate(documents) if of == domain]
        counts = np.random.default_rng([0, n]).multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=len(draws)
        )
        for draw, row in zip(draws, counts, strict=True):
            draw[domain] = np.repeat(members, row).tolist()
    bits = [sums["fused"][d][0] - sums["clm"][d][0] for d in documents]
    expected = reference.bootstrap(bits, [sums["clm"][d][1] for d in documents], [d for d, _ in documents], draws=draws)
    monkeypatch.setattr(bootstrap, "FEWEST_DOCUMENTS", 1)
    grid = trials.Grid(study.load(finished / "study.yaml"), Console(quiet=True))
    found = comparison.compare_arms(grid)["experiments"][0]["differences"]["fused"]
    for name, triple in expected.items():
        assert [found[name]["value"], *found[name]["documents"]] == pytest.approx(triple, rel=1e-9, abs=1e-12)


def scores_of(finished: Path, name: str, seed: int) -> list[Score]:
    checked = study.load(finished / "study.yaml")
    folder = trials.Grid(checked, Console(quiet=True)).read_state(checked.arms[name], seed).scores_folder
    assert folder is not None
    return [Score(**row) for row in json.loads((folder / "scores.json").read_text())]


def test_one_seed_pools_to_itself_and_two_of_the_same_to_its_intervals():
    rng = np.random.default_rng(0)
    one = [Score(document=f"{n}", domain="ab"[n % 2], bits=rng.uniform(1, 9), bytes=7 + n) for n in range(13)]
    assert sorted(pool_seeds([one]), key=lambda s: s.document) == sorted(one, key=lambda s: s.document)
    twice = Bootstrap(one, resamples=211).find_intervals(pool_seeds([one, one]))
    assert twice == Bootstrap(one, resamples=211).find_intervals(one)
    assert compute_bits_per_byte(pool_seeds([one, one])) == pytest.approx(compute_bits_per_byte(one))


def test_the_pages_show_every_experiment(finished):
    out = finished / "study"
    text, page = (out / "results.md").read_text(), (out / "study.html").read_text()
    for title in ("Main", "Tokens", "Single"):
        assert f"\n## {title}\n" in text and f"<h2>{title}</h2>" in page
    assert "`fused` is **it**." in text and "<b>fused</b> is <b>it</b>." in page
    Page().feed(page)
    shown = {p.stem for p in (out / "figures").iterdir()}
    assert shown == {
        "main-bars", "main-differences", "main-steps", "tokens-bars", "tokens-differences", "tokens-tokens",
        "single-bars", "single-differences",
    }  # fmt: skip
    for name in shown:
        assert f"figures/{name}.svg" in text
        assert (out / "figures" / f"{name}.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") == text.splitlines()[text.splitlines().index(line)].count(
            "|"
        )


def test_arms_of_other_seeds_have_their_scores_in_columns_of_their_own(finished, tmp_path):
    result = result_of(finished)
    arms = {name: dict(arm) for name, arm in result["arms"].items()}
    tried = next(name for name, arm in arms.items() if len(arm["seeds"]["0"]["trials"]) > 1)
    seeds = arms[tried]["seeds"]
    arms[tried]["seeds"] = {"0": seeds["0"]}
    arms |= {"later": arms[tried] | {"seeds": {"1": seeds["1"]}}}
    found = study_page._list_trials([tried, "later"], arms)
    assert found["seeds"] == ["0", "1"]
    dev = {seed: [f"{t['dev_bits_per_byte']:.4f}" for t in of["trials"]] for seed, of in seeds.items()}
    dash = study_page.DASH
    assert [[value for value, _ in row["cells"]] for row in found["rows"]] == [
        *([value, dash] for value in dev["0"]),
        *([dash, value] for value in dev["1"]),
    ]


def test_half_a_study_is_shown_with_dashes(finished, tmp_path):
    shutil.copytree(finished / "study", tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "seed-1")
    for path in (tmp_path / "study" / "seed-0" / "evaluate").glob("fused-*"):
        shutil.rmtree(path)
    outcome = fuselm("study", finished / "study.yaml", f"output={tmp_path / 'study'}", "--report")
    assert outcome.code == 0 and outcome.stages in ([], ["corpus"])
    result = result_of(tmp_path)
    main = result["experiments"][0]
    assert main["values"]["fused"] is None and main["differences"]["fused"] is None
    assert main["seeds"] == [0] and result["arms"]["clm"]["seeds"]["1"]["bits_per_byte"] is None
    text = (tmp_path / "study" / "results.md").read_text()
    assert "| fused | – | – | – |" in text and "| 1 of 2 |" in text
    assert not list((tmp_path / "study").glob("seed-1/train"))
    plan = fuselm("study", finished / "study.yaml", f"output={tmp_path / 'study'}", "--plan")
    assert "3 of 10 done" in plan.out and " s" in plan.out


def test_the_plan_of_a_study_measures_what_has_not_run_yet(tmp_path, byte_level, sentence_piece, texts):
    outcome = fuselm("study", write(tmp_path, byte_level, sentence_piece, texts), "--plan")
    assert outcome.code == 0 and "0 of 10 done" in outcome.out and "unknown" not in outcome.out
    for work in ("read own", "read other", "train target", "write a checkpoint"):
        assert outcome.err.count(f"calibrating: {work}\n") == 1, work
    assert not list((tmp_path / "study").glob("seed-*/capture"))


def test_scores_of_bytes_that_are_not_spelled_are_marked_and_explained(finished, tmp_path):
    shutil.copytree(finished / "study", tmp_path / "study")
    before = result_of(tmp_path)
    assert not any("unspelled" in experiment for experiment in before["experiments"])
    assert "†" not in (tmp_path / "study/results.md").read_text() + (tmp_path / "study/study.html").read_text()
    for path in (tmp_path / "study").glob("seed-*/evaluate/base-*/scores.json"):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([row | {"unspelled": row["bytes"] * (row["domain"] == "french")} for row in rows]))
    outcome = fuselm("study", finished / "study.yaml", f"output={tmp_path / 'study'}", "--report")
    assert outcome.code == 0, outcome.err
    main = result_of(tmp_path)["experiments"][0]
    assert main["unspelled"] == {"base": {"french": 1.0, "average": 0.5}}
    text, page = ((tmp_path / "study" / name).read_text() for name in ("results.md", "study.html"))
    cells = main["values"]["base"]
    row = f"| base | {cells['english']['value']:.4f} | †{cells['french']['value']:.4f} | †"
    assert row in text and f"<b>†{cells['average']['value']:.4f}</b>" in page
    for shown in (text, page):
        assert "Bytes that a tokenizer cannot spell: base 100.0% of french; " in shown


def test_weights_that_were_dropped_are_made_again_if_they_are_needed(finished, tmp_path):
    """Run in the folder of a seed, with the options of its arm."""
    shutil.copytree(finished / "study", tmp_path / "study")
    outcome = fuselm(
        "run", finished / "run.yaml", f"output={tmp_path / 'study' / 'seed-0'}", "seed=0", "train.learning_rate=3e-3"
    )
    assert outcome.code == 0, outcome.err
    assert [s for s in outcome.stages if s.startswith("train")] == [
        f"train {method} at 0.003" for method in ("clm", "fused")
    ]
    assert (tmp_path / "study" / "seed-0" / "model" / "model.safetensors").is_file()


def test_an_arm_that_fails_is_reported_and_the_others_continue(
    tmp_path, byte_level, sentence_piece, texts, monkeypatch
):
    arms = {"bad": ARMS["half"] | {"like": None, "method": "fused"}, "good": {"method": "clm"}}
    experiments = [{"name": "one", "title": "One", "arms": ["bad", "good"], "against": "good"}]
    study_file = write(tmp_path, byte_level, sentence_piece, texts, arms=arms, experiments=experiments, seeds=[0])
    make = trials._make_arm

    def fail(grid, arm, seed):
        if arm.name == "bad":
            raise ValueError("the model gives NaN")
        make(grid, arm, seed)

    monkeypatch.setattr(trials, "_make_arm", fail)
    outcome = fuselm("study", study_file)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        "fuselm: 1 of the arms failed, the first: bad, seed 0: the model gives NaN; "
        "run the same command to try them again"
    )
    assert result_of(tmp_path)["experiments"][0]["values"]["good"] is not None


BAD = {
    "unknown option": ({"arm": {}}, "arm: unknown option; did you mean 'arms'?"),
    "unknown option of an arm": (
        {"arms": {"clm": {"methd": "clm"}}},
        "arms.clm.methd: unknown option; did you mean 'method'?",
    ),
    "no method": (
        {"arms": ARMS | {"clm": {}}}, "arms.clm.method: missing; clm, fused or base, or `like` an arm that has one"
    ),
    "like nothing": ({"arms": ARMS | {"clm": {"like": "fsed"}}}, "arms.clm.like: no arm 'fsed'; did you mean 'fused'?"),
    "like itself": (
        {"arms": ARMS | {"clm": {"like": "fused"}, "fused": {"like": "clm"}}},
        "arms.fused.like: 'clm' is like this one; one of them must say what it is",
    ),
    "a source's name": ({"arms": ARMS | {"own": ARMS["clm"]}}, "arms.own: the name of a model as it is; take another"),
    "an override that is none": (
        {"arms": ARMS | {"clm": {"method": "clm", "set": {"train.lamda": 1}}}},
        "arms.clm: {folder}/run.yaml: train.lamda: unknown option; did you mean 'lambda_clm'?",
    ),
    "a trial out of range": (
        {"arms": ARMS | {"clm": {"method": "clm", "try": {"train.passes": [1, 0]}}}},
        "arms.clm: {folder}/run.yaml: train.clm.passes: input should be greater than or equal to 1 (got 0)",
    ),
    "a source that the run has not": (
        {"arms": ARMS | {"fused": ARMS["fused"] | {"set": {"fuse.weights": {"gemma": 1}}}}},
        "arms.fused: {folder}/run.yaml: fuse.weights.gemma: no such source; there are own, other",
    ),
    "a weight of a source left out": (
        {"arms": ARMS | {"alone": {"like": "fused", "sources": ["other"], "set": {"fuse.weights": {"own": 1}}}}},
        "arms.alone: fuse.weights.own: no such source; there are other",
    ),
    "sources that are none": (
        {"arms": ARMS | {"alone": {"like": "fused", "sources": ["othr"]}}},
        "arms.alone.sources: no source 'othr'; did you mean 'other'?",
    ),
    "an option of all arms": (
        {"arms": ARMS | {"clm": {"method": "clm", "set": {"corpus.max_bytes": 99}}}},
        "arms.clm: corpus.max_bytes: arms differ in corpus.files, corpus.share, write, capture, align",
    ),
    "an option of fused rows for clm": (
        {"arms": ARMS | {"clm": {"method": "clm", "try": {"train.divergence": ["jsd", "forward_kl"]}}}},
        "arms.clm: train.divergence: does nothing to clm, which is trained on the text alone; drop it",
    ),
    "sources for clm": (
        {"arms": ARMS | {"clm": {"method": "clm", "sources": ["other"]}}},
        "arms.clm: sources: does nothing to clm, which is trained on the text alone; drop it",
    ),
    "an option of clm for fused": (
        {"arms": ARMS | {"fused": {"method": "fused", "set": {"train.clm.passes": 1}}}},
        "arms.fused: train.clm.passes: does nothing to fused; drop it, or write train.passes",
    ),
    "set and tried": (
        {"arms": ARMS | {"fused": {"method": "fused", "set": {"train.passes": 1}, "try": {"train.passes": [1, 2]}}}},
        "arms.fused: train.passes: is in `set` and in `try`, which would win; drop one",
    ),
    "a seed below 0": ({"seeds": [0, -1]}, "seeds.2: input should be greater than or equal to 0 (got -1)"),
    "its own output": ({"set": {"output": "x"}}, "set.output: the study's own (output); set that instead"),
    "no such arm": (
        {"experiments": [{"name": "a", "title": "A", "arms": ["clm", "fuse"]}]},
        "experiments.a: no arm 'fuse'; did you mean 'fused'?",
    ),
    "against what is not there": (
        {"experiments": [{"name": "a", "title": "A", "arms": ["clm", "fused"], "against": "base"}]},
        "experiments.a.against: 'base' is not in it; known: clm, fused",
    ),
    "nothing to show": (
        {"experiments": [{"name": "a", "title": "A"}]}, "experiments.a: needs arms, or lines, but not both"
    ),
    "no lines": (
        {"experiments": [{"name": "a", "title": "A", "lines": {}}]},
        "experiments.1.lines: dictionary should have at least 1 item after validation, not 0 (got {{}})",
    ),
    "a name twice": (
        {"experiments": [EXPERIMENTS[0], EXPERIMENTS[0]]},
        "experiments.main: not a usable name; take letters, digits, '-' and '_', and each once",
    ),
    "a weight in a domain that is not there": (
        {"arms": ARMS | {"fused": ARMS["fused"] | {"set": {"fuse.weights": {"other": {"frnch": 2}}}}}},
        "arms.fused: fuse.weights.other: no text is of domain 'frnch'; there are english, french",
    ),
    "a seed twice": ({"seeds": [0, 1, 0]}, "seeds: 0 is there twice; drop one (got [0, 1, 0])"),
    "a source twice": (
        {"arms": ARMS | {"alone": {"like": "fused", "sources": ["other", "other"]}}},
        "arms.alone.sources: other is there twice; drop one",
    ),
    "a value tried twice": (
        {"arms": ARMS | {"fused": {"method": "fused", "try": {"train.passes": [2, 2]}}}},
        "arms.fused.try.train.passes: 2 is there twice; drop one",
    ),
    "an option set twice": (
        {"arms": ARMS | {"fused": {"method": "fused", "set": {"train.passes": 3, "train": {"passes": 4}}}}},
        "arms.fused.set: train.passes is there twice; drop one",
    ),
    "all of clm for fused": (
        {"arms": ARMS | {"fused": {"method": "fused", "set": {"train.clm": {"passes": 1}}}}},
        "arms.fused: train.clm: does nothing to fused; drop it",
    ),
    "an arm that nothing shows": (
        {"arms": ARMS | {"idle": {"like": "fused", "set": {"train.pases": 9}}}},
        "arms.idle: {folder}/run.yaml: train.pases: unknown option; did you mean 'passes'?",
    ),
    "a line of what is not trained": (
        {"experiments": [{"name": "a", "title": "A", "lines": {"x": ["other", "clm"]}}]},
        "experiments.a.lines.x: 'other' is not trained on any tokens; drop it",
    ),
    "an arm in two lines": (
        {"experiments": [{"name": "a", "title": "A", "lines": {"x": ["clm"], "y": ["fused", "clm"]}}]},
        "experiments.a.lines.y: 'clm' is in another line too; drop one",
    ),
    "no seed of all": (
        {
            "arms": ARMS | {"late": {"like": "fused", "seeds": [1]}},
            "experiments": [{"name": "a", "title": "A", "arms": ["half", "late"]}],
        },
        "experiments.a: no seed is one of all its arms', so nothing can be compared; set their seeds",
    ),
    "nothing to choose": (
        {"arms": ARMS | {"fused": ARMS["fused"] | {"chosen_on": 0}}},
        "arms.fused.chosen_on: does nothing, because there is nothing to choose; give it a `try`",
    ),
    "a choice by another's seed": (
        {"arms": ARMS | {"clm": ARMS["clm"] | {"chosen_on": 7}}},
        "arms.clm.chosen_on: 7 is not one of the arm's seeds; add it to seeds",
    ),
    "the best of what is not trained": (
        {"arms": ARMS | {"best": {"best_of": ["clm", "base"]}}},
        "arms.best.best_of: no trained arm 'base'; known: clm, fused, half, alone",
    ),
    "the best of two methods": (
        {"arms": ARMS | {"best": {"best_of": ["clm", "fused"]}}},
        "arms.best.best_of: 'fused' has another method or other sources than 'clm'; name arms that share both",
    ),
    "options beside the best of others": (
        {"arms": ARMS | {"best": {"best_of": ["clm"], "set": {"train.passes": 1}}}},
        "arms.best.set: does nothing beside best_of, which takes arms as they are; drop one",
    ),
    "no title": (
        {"experiments": [{"name": "a", "arms": ["clm"]}]}, "experiments.1.title: missing; every study needs it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_before_anything_is_made(case, tmp_path, byte_level, sentence_piece, texts):
    options, message = BAD[case]
    study_file = write(tmp_path, byte_level, sentence_piece, texts, **options)
    outcome = fuselm("study", study_file)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith(f"fuselm: {study_file}: {message.format(folder=tmp_path)}"), outcome.err
    assert not (tmp_path / "study").exists()


def test_what_training_lacks_is_reported_before_any_arm_is_trained(tmp_path, byte_level, sentence_piece, texts):
    arms = ARMS | {"alone": {"like": "fused", "set": {"train.lora_rank": 2, "train.lora_modules": ["nope"]}}}
    study_file = write(tmp_path, byte_level, sentence_piece, texts, arms=arms)
    outcome = fuselm("study", study_file)
    assert outcome.code == 2 and "arms.alone: train.lora_modules: " in outcome.err.splitlines()[-1], outcome.err
    assert not list((tmp_path / "study").glob("seed-*/capture"))


def test_arms_may_have_more_training_text_and_no_other_held_out(tmp_path, byte_level, sentence_piece, texts):
    more = [row | {"split": "train"} for row in tiny_run.short(texts, length=97)]
    files = [str(tmp_path / "corpus.jsonl"), str(tiny_run.write_rows(tmp_path / "more.jsonl", more))]

    def planned(*of: str) -> tiny_run.Outcome:
        arms = ARMS | {"half": {"like": "fused", "set": {"corpus.files": list(of)}, "seeds": [0]}}
        return fuselm("study", write(tmp_path, byte_level, sentence_piece, texts, arms=arms), "--plan")

    assert planned(*files).code == 0
    counts = [manifest.read(folder)["counts"]["documents"] for folder in (tmp_path / "study/seed-0/corpus").iterdir()]
    assert len({of["english/train"] for of in counts}) == 2 and len({of["english/heldout"] for of in counts}) == 1
    outcome = planned(*reversed(files))
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith(
        f"fuselm: {tmp_path / 'study.yaml'}: arms.half, seed 0: holds out different text from 'base'; "
        "an arm may only add rows whose `split` is train, in files after those that all arms have; if a source "
    )


def test_what_sources_write_is_not_counted_as_text_that_was_given(tmp_path, byte_level, sentence_piece, texts):
    wrote = {"write.ratio": 1, "write.tokens": 7, "write.prompt_tokens": 5}
    arms = {"clm": {"method": "clm"}, "written": {"method": "fused", "set": wrote}}
    lines = {"a": ["clm"], "b": ["written"]}
    experiments = [{"name": "tokens", "title": "Tokens", "lines": lines, "against": "a"}]
    options = {"arms": arms, "experiments": experiments, "seeds": [0]}
    outcome = fuselm("study", write(tmp_path, byte_level, sentence_piece, texts, **options))
    assert outcome.code == 0, outcome.err
    found = result_of(tmp_path)
    (trial,) = found["arms"]["written"]["seeds"]["0"]["trials"]
    assert trial["given_tokens"] < trial["text_tokens"]
    (clm,), (written,) = found["experiments"][0]["curves"]["lines"].values()
    assert clm["tokens"] == written["tokens"] == trial["given_tokens"]


def test_a_plan_goes_by_the_tokens_that_steps_read(tmp_path, byte_level, sentence_piece, texts):
    checked = study.load(write(tmp_path, byte_level, sentence_piece, texts))
    run = checked.run_options(checked.arms["fused"], 0, {"train.passes": 3, "train.clm.passes": 2})
    trial = trials.Trial(number=0, settings={}, run=run, given_tokens=101, written={"other": 0.5, "own": 1.5}, steps=[])

    def work(stage: str, name: str) -> float:
        state = {"done": False, "is_asked_for": True, "is_needed": True}
        step = Step(stage=STAGES[stage], name=name, title="", folder=tmp_path, recipe=None, inputs=(), **state)
        return study_plan._count_work(step, trial)

    assert (work("write", "own"), work("capture", "own"), work("fuse", "")) == (151.5, 303, 303)
    assert (work("train", "fused"), work("train", "clm"), work("evaluate", "fused")) == (909, 202, 1)


def test_arms_whose_sources_cut_held_out_text_otherwise_are_refused(tmp_path, byte_level, sentence_piece, texts):
    short = shutil.copytree(sentence_piece, tmp_path / "short")
    options = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(options | {"max_position_embeddings": 61}))
    arms = ARMS | {"alone": {"like": "fused", "sources": ["own"], "seeds": [0]}}
    study_file = write(tmp_path, byte_level, short, texts, arms=arms)
    outcome = fuselm("study", study_file)
    assert outcome.code == 2, outcome.err
    assert ": arms.alone, seed 0: holds out different text from 'base'; " in outcome.err
    assert not list((tmp_path / "study").glob("seed-*/capture"))
    assert fuselm("study", study_file, "set.corpus.max_bytes=50", "--plan").code == 0


def test_a_damaged_file_is_named_with_what_to_delete(finished, tmp_path, tmp_path_factory):
    shutil.copytree(finished, tmp_path / "copy")
    (scores,) = (tmp_path / "copy/study/seed-0/evaluate").glob("other-*/scores.json")
    scores.write_bytes(scores.read_bytes()[:-20])
    cache = tmp_path_factory.getbasetemp() / "cache"
    output = f"output={tmp_path / 'copy/study'}"
    outcome = fuselm("study", tmp_path / "copy/study.yaml", output, "--report", cache=cache)
    assert outcome.err.splitlines()[-1] == f"fuselm: {scores}: damaged; delete {scores.parent} and run again"
    shutil.rmtree(scores.parent)
    outcome = fuselm("study", tmp_path / "copy/study.yaml", output, cache=cache)
    assert outcome.code == 0 and outcome.stages == ["evaluate other"], outcome.err


def test_a_missing_run_file_is_named(tmp_path, byte_level, sentence_piece, texts):
    study_file = write(tmp_path, byte_level, sentence_piece, texts, run="absent.yaml")
    assert fuselm("study", study_file).err == f"fuselm: {study_file}: {tmp_path}/absent.yaml: no such file\n"


def test_arms_inherit_what_they_do_not_say(tmp_path, byte_level, sentence_piece, texts):
    arms = {
        "a": {
            "method": "fused",
            "set": {"train.passes": 5, "align.top_k": 7},
            "try": {"train.learning_rate": [1e-3, 1e-4]},
        },
        "b": {"like": "a", "set": {"align.top_k": 5}, "seeds": [3]},
        "c": {"like": "b", "set": {"train.learning_rate": 1e-5}, "try": {"train.passes": [1, 2]}},
    }  # fmt: skip
    experiments = [{"name": n, "title": "X", "arms": shown} for n, shown in (("x", ["a"]), ("y", ["b", "c"]))]
    checked = study.load(write(tmp_path, byte_level, sentence_piece, texts, arms=arms, experiments=experiments))
    a, b, c = checked.arms.values()
    assert [t["train.learning_rate"] for t in a.trials] == [1e-3, 1e-4] and list(a.seeds) == [0, 1]
    assert b.settings == {"train.passes": 5, "align.top_k": 5} and b.trials == a.trials and list(b.seeds) == [3]
    assert c.settings == {"align.top_k": 5, "train.learning_rate": 1e-5}
    assert c.trials == [{"train.passes": 1}, {"train.passes": 2}]
    arms["c"]["set"]["train.learning_rate"] = [1e-5, 1e-6]
    several = study.load(write(tmp_path, byte_level, sentence_piece, texts, arms=arms, experiments=experiments))
    assert [tuple(t.values()) for t in several.arms["c"].trials] == [(1, 1e-5), (1, 1e-6), (2, 1e-5), (2, 1e-6)]
    run = checked.run_options(c, 3, c.trials[1])
    assert (run.seed, run.train.passes, run.align.top_k, run.output) == (
        3,
        2,
        5,
        str(tmp_path / "study" / "seed-3"),
    )


def test_a_section_that_is_set_leaves_what_it_does_not_say(tmp_path, byte_level, sentence_piece, texts):
    study_file = write(tmp_path, byte_level, sentence_piece, texts)
    checked = study.load(study_file, ["set.train.passes=5", "arms.half.set.train.weight_decay=0.5"])
    run = checked.run_options(checked.arms["half"], 0, {})
    train = run.train
    assert (train.passes, train.weight_decay, run.corpus.share) == (5, 0.5, 0.5)
    assert train.batch_documents == tiny_run.TRAIN["batch_documents"] and train.precision == "float32"


def test_names_may_have_any_character(tmp_path, byte_level, sentence_piece, texts):
    output = tmp_path / "\N{GRINNING FACE} \N{CJK UNIFIED IDEOGRAPH-20000}"
    checked = study.load(write(tmp_path, byte_level, sentence_piece, texts, output=str(output)))
    assert checked.run_options(checked.arms["clm"], 0, {}).output == str(output / "seed-0")


def test_an_arm_of_clm_may_be_like_one_of_fused(tmp_path, byte_level, sentence_piece, texts):
    """Check that options of its own must have an effect; inherited ones need not."""
    arms = ARMS | {"alike": {"like": "alone", "method": "clm", "set": {"train.passes": 3}}}
    experiments = [{"name": "x", "title": "X", "arms": ["alike", "alone"]}]
    checked = study.load(write(tmp_path, byte_level, sentence_piece, texts, arms=arms, experiments=experiments))
    assert checked.run_options(checked.arms["alike"], 0, {}).train.for_method("clm").passes == 3


def test_the_rate_of_an_arm_of_clm_is_that_of_clm(tmp_path, byte_level, sentence_piece, texts):
    study_file = write(tmp_path, byte_level, sentence_piece, texts, set={"train.clm.learning_rate": 0.5})
    checked = study.load(study_file)
    clm = checked.arms["clm"]
    assert [checked.run_options(clm, 0, t).train.for_method("clm").learning_rates for t in clm.trials] == [
        [1e-6],
        [3e-3],
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, (1000.0, "")),
        (1.2, (1000.0, "<")),
        (0.95, (math.sqrt(2) * 1000, "")),
        (0.9, (2000.0, "")),
        (0.7, (8000.0, ">")),
    ],
)
def test_tokens_needed_are_interpolated_in_their_logarithm(value, expected):
    tokens, bound = comparison.interpolate_tokens_needed([(2000.0, 0.9), (1000.0, 1.0), (8000.0, 0.8)], value)
    assert (tokens, bound) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(("bits", "low", "high"), [(950.0, 2**0.5, 2**0.5), (900.0, None, None), (700.0, None, None)])
def test_the_tokens_needed_have_an_interval_over_documents(bits, low, high):
    lines = {"clm": ["clm-1", "clm-2"], "fused": ["fused-1"]}
    given = {"clm-1": (1000.0, 1000.0), "clm-2": (2000.0, 900.0), "fused-1": (1000.0, bits)}
    scores = {  # all documents are alike, so there is nothing to be uncertain of
        name: {0: [Score(document=str(n), domain="d", bits=of, bytes=1000) for n in range(7)]}
        for name, (_, of) in given.items()
    }
    pools = comparison.Pools(scores)
    values = {name: pools.compute_intervals((0,), name) for name in scores}
    options = ExperimentOptions(name="a", title="A", lines=lines, against="clm")
    arms = {name: {"given_tokens": tokens} for name, (tokens, _) in given.items()}
    (needed,) = comparison._compute_curves(options, arms, values, pools, (0,))["needed"].values()
    assert (needed["low"], needed["high"]) == (pytest.approx(low), pytest.approx(high))


def test_prose_is_text_with_a_little_markup():
    assert study_page.render_prose("a <b> `c<d`\n\n**e** [f](https://g.h/)") == (
        '<p class="note">a &lt;b&gt; <b>c&lt;d</b></p><p class="note"><b>e</b> <a href="https://g.h/">f</a></p>'
    )


def test_the_examples_are_valid():
    examples = Path(__file__).parents[2] / "examples"
    names = {path.stem: study.load(path) for path in sorted(examples.glob("study*.yaml"))}
    shown = {name: {e.name for e in of.experiments} for name, of in names.items()}
    assert {"main", "sources", "single", "written"} <= shown["study"] and shown["study-tokens"] == {"tokens"}
    assert {"paper", "alignment", "fusion", "sources", "lambda", "averaging", "largest"} <= shown["study-parts"]
    assert len(names["study-tokens"].arms) == 9
    tried = {name: sum(len(arm.trials) for arm in of.arms.values() if arm.method) for name, of in names.items()}
    assert tried["study-baseline"] == 65 and tried["study-controls"] == 15
    assert verdicts.TARGETS == ("base", "clm", "fused")
