"""Make whole runs with tiny models: what is made again and what is not, killed runs, every kind of tokenizer."""

import fnmatch
import io
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import captured, files, fuselm, summary
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline
from fuselm.sources import resumable_writing
from fuselm.system import manifest
from fuselm.system.manifest import Recipe

KINDS = ["byte_level", "sentence_piece", "word_piece"]


@pytest.fixture(scope="module")
def rows(texts):
    return tiny_run.short(texts)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, rows, cache) -> Path:
    """Return the folder of a finished run with its run file; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    run_file = tiny_run.write(
        folder, target=byte_level, sources={"own": byte_level, "other": sentence_piece}, rows=rows
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """Return a copy of the finished run that tests may change; its run file still names the first one's output."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def test_a_run_ends_with_results_in_its_folder(finished):
    out = finished / "out"
    assert {"summary.json", "report.html", "model", "run.json", "config.yaml"} <= {p.name for p in out.iterdir()}
    assert not list(out.rglob("*.partial"))
    numbers = summary(out)
    assert list(numbers["models"]) == ["own", "other", "base", "clm", "fused"]
    assert {"fused-clm", "fused-base"} <= set(numbers["differences"])
    for name, key in [
        *((m, "bits_per_byte") for m in numbers["models"]),
        *((d, "value") for d in numbers["differences"]),
    ]:
        row = (numbers["models"] | numbers["differences"])[name]
        assert set(row) == {"domains", "average"} and set(row["domains"]) == {"english", "french"}
        for cell in [row["average"], *row["domains"].values()]:
            assert set(cell) == {key, "low", "high"} and cell["low"] is cell["high"] is None  # of few
    assert numbers["models"]["own"] == numbers["models"]["base"]


def test_the_product_is_an_ordinary_model(finished, byte_level):
    model = AutoModelForCausalLM.from_pretrained(finished / "out" / "model")
    ids = AutoTokenizer.from_pretrained(finished / "out" / "model")("one", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 2
    product = (finished / "out" / "model" / "tokenizer.json").read_bytes()
    assert product == (byte_level / "tokenizer.json").read_bytes()
    assert "own" in (finished / "out" / "model" / "README.md").read_text()


def test_no_split_shares_a_document(finished):
    (folder,) = (finished / "out" / "corpus").iterdir()
    documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    assert {d["split"] for d in documents} == {"train", "dev", "heldout"}
    train = {d["id"] for d in documents if d["split"] == "train"}
    assert all(set(ids) == train for ids in captured(finished / "out").values())
    (base,) = (finished / "out" / "evaluate").glob("base-*")
    scored = {row["document"] for row in json.loads((base / "scores.json").read_text())}
    assert scored == {d["id"] for d in documents if d["split"] == "heldout"}


def test_a_second_run_does_nothing_and_says_so(finished, tmp_path):
    before = files(finished, "out")
    del before["out/config.yaml"]
    outcome = tiny_run.fuselm_apart("run", finished / "run.yaml", folder=tmp_path)
    after = files(finished, "out")
    del after["out/config.yaml"]
    assert outcome.code == 0 and outcome.err == "Nothing to do: every stage of this run is done.\n"
    assert before == after
    assert not {"torch", "transformers"} & set(outcome.loaded)


def test_the_same_run_elsewhere_has_the_same_numbers(finished, tmp_path):
    assert fuselm("run", finished / "run.yaml", f"output={tmp_path / 'out'}").code == 0
    assert summary(tmp_path / "out") == summary(finished / "out")


def test_a_document_that_a_source_gives_nan_for_is_not_trained_on(
    tmp_path, byte_level, sentence_piece, rows, cache, monkeypatch
):
    monkeypatch.setattr(resumable_writing, "MOST_SKIPPED", 0.5)
    odd = {"domain": rows[0]["domain"], "text": "Ωρες στο Αιγαίο, και πάλι Ωρες.", "split": "train"}
    tokenizer = AutoTokenizer.from_pretrained(sentence_piece)
    common = {i for row in rows for i in tokenizer(row["text"])["input_ids"]}
    model = AutoModelForCausalLM.from_pretrained(sentence_piece)
    with torch.no_grad():
        model.get_input_embeddings().weight[min(set(tokenizer(odd["text"])["input_ids"][:-1]) - common)] = math.nan
    shutil.copytree(sentence_piece, tmp_path / "bad")
    model.save_pretrained(tmp_path / "bad")
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"bad": tmp_path / "bad"}, rows=[*rows, odd])
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    trained = summary(tmp_path / "out")["training"]
    assert "skipped document" in outcome.err and trained["fused"]["text_tokens"] < trained["clm"]["text_tokens"]


def test_another_lambda_trains_the_fused_model_again_and_nothing_else(finished, again):
    before = files(again, ".")
    outcome = fuselm("run", finished / "run.yaml", f"output={again}", "train.lambda_clm=0.25")
    assert outcome.code == 0
    assert outcome.stages == ["train fused at 0.003", "evaluate fused", "report"]
    after = files(again, ".")
    unchanged = {name for name in before if after.get(name) == before[name]}
    replaced = ("config.yaml", "run.json", "steps.json", "summary.json", "report.html", "model/*")
    assert all(any(fnmatch.fnmatch(name, r) for r in replaced) for name in set(before) - unchanged)
    added = {name.split("-")[0] for name in set(after) - set(before)}
    assert {"train/fused", "evaluate/fused"} <= added and all(
        a.startswith(("train/fused", "evaluate/fused", "report/")) for a in added
    )
    assert summary(again) != summary(finished / "out")

    outcome = fuselm("run", finished / "run.yaml", f"output={again}")
    assert outcome.code == 0 and outcome.stages == [] and "Nothing to do" in outcome.err
    assert summary(again) == summary(finished / "out")
    for name in ("model/model.safetensors", "report.html"):
        assert (again / name).read_bytes() == (finished / "out" / name).read_bytes()


def test_another_source_is_the_only_one_captured(finished, again, word_piece):
    before = files(again, "capture") | files(again, "align")
    outcome = fuselm("run", finished / "run.yaml", f"output={again}", f"sources.third={word_piece}")
    assert outcome.code == 0
    assert outcome.stages == [
        "corpus",
        "capture third",
        "align third",
        "fuse",
        "train fused at 0.003",
        "evaluate third",
        "evaluate fused",
        "report",
    ]
    after = files(again, "capture") | files(again, "align")
    assert {name: after[name] for name in before} == before
    assert list(summary(again)["models"]) == ["own", "other", "third", "base", "clm", "fused"]


def test_dropping_a_source_captures_and_aligns_nothing(finished, again, tmp_path):
    options = yaml.safe_load((finished / "run.yaml").read_text())
    del options["sources"]["other"]
    fewer = tmp_path / "fewer.yaml"
    fewer.write_text(yaml.safe_dump(options | {"output": str(again)}))
    outcome = fuselm("fuse", fewer)
    assert outcome.code == 0 and outcome.stages == ["corpus", "fuse"]


def test_changed_text_is_read_again(finished, again, tmp_path, rows):
    changed = tiny_run.write_rows(tmp_path / "changed.jsonl", [*rows[:-1], rows[-1] | {"text": "something else"}])
    outcome = fuselm("align", finished / "run.yaml", f"output={again}", f"corpus.files=[{changed}]")
    assert outcome.code == 0
    assert outcome.stages == ["corpus", "capture own", "capture other", "align own", "align other"]


def test_a_renamed_file_is_read_again(finished, again, tmp_path):
    """Check that a name is part of the key: it may give the domain, and its ending says how to read the file."""
    (tmp_path / "renamed.jsonl").write_bytes((finished / "corpus.jsonl").read_bytes())
    outcome = fuselm("align", finished / "run.yaml", f"output={again}", f"corpus.files=[{tmp_path}/renamed.jsonl]")
    assert outcome.code == 0 and outcome.stages == ["corpus"]  # the texts are the same


def test_another_tokenizer_is_another_model(tmp_path, byte_level, rows, cache):
    folder = tmp_path / "target"
    shutil.copytree(byte_level, folder)
    run_file = tiny_run.write(tmp_path, target=folder, sources={"own": byte_level}, rows=rows)

    def evaluated() -> dict[str, Path]:
        steps = Pipeline(config.load(run_file), Console(file=io.StringIO())).dry_run()
        return {step.name: step.folder for step in steps if step.stage.name == "evaluate"}

    before = evaluated()
    given = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(given | {"bos_token": given["eos_token"]}))
    after = evaluated()
    assert "own" not in before and "own" in after  # the target no more
    assert all(after[name] != before[name] for name in before)


def test_every_stage_can_be_run_by_itself(finished, tmp_path):
    made = []
    for stage in ("capture", "align", "fuse", "train", "evaluate", "report"):
        outcome = fuselm(stage, finished / "run.yaml", f"output={tmp_path / 'out'}")
        assert outcome.code == 0 and {s.split()[0] for s in outcome.stages} - set(made) == (
            {"corpus", "capture"} if stage == "capture" else {stage}
        )
        made += {s.split()[0] for s in outcome.stages}
        outcome = fuselm(stage, finished / "run.yaml", f"output={tmp_path / 'out'}")
        assert outcome.code == 0 and outcome.err.endswith(
            f"{stage}: nothing to do, all of it is in {tmp_path / 'out'}\n"
        )
    assert summary(tmp_path / "out") == summary(finished / "out")


def test_lambda_1_gives_the_weights_of_clm(finished, again):
    alike = "train.clm={lr_schedule: null, passes: null, average: null}"
    assert fuselm("train", finished / "run.yaml", f"output={again}", "train.lambda_clm=1", alike).code == 0
    parameters = {p: json.loads((p / "manifest.json").read_text())["parameters"] for p in (again / "train").iterdir()}
    folders = [p for p, of in parameters.items() if of["lambda_clm"] == 1 and of["lr_schedule"] == "constant"]
    clm, fused = (load_file(p / "model" / "model.safetensors") for p in sorted(folders))
    assert [p.name.split("-")[0] for p in sorted(folders)] == ["clm", "fused"]
    assert all((clm[name] == fused[name]).all() for name in clm)


def test_the_best_of_several_learning_rates_is_kept(finished, again):
    outcome = fuselm(
        "run",
        finished / "run.yaml",
        f"output={again}",
        "train.learning_rate=[3e-3, 1e-6]",
        "train.clm.learning_rate=1e-6",
    )
    assert outcome.code == 0
    training = summary(again)["training"]
    dev = {
        m["parameters"]["learning_rate"]: m["counts"]["dev_bits_per_byte"]
        for p in (again / "train").glob("fused-*")
        if (m := manifest.read(p))
    }
    assert training["fused"]["learning_rate"] == min(dev, key=dev.get) and len(dev) == 2
    assert training["clm"]["learning_rate"] == 1e-6
    again_reversed = ["train.learning_rate=[1e-6, 3e-3]", "train.clm.learning_rate=1e-6"]
    run = config.load(finished / "run.yaml", [f"output={again}", *again_reversed])
    assert not any(
        step.is_needed for step in Pipeline(run, Console(file=io.StringIO())).dry_run()
    )  # the best is not the first


@pytest.mark.parametrize("target", KINDS)
def test_every_kind_of_tokenizer_is_a_target_of_every_other(tmp_path, request, target, rows):
    folders = {kind: request.getfixturevalue(kind) for kind in KINDS}
    run_file = tiny_run.write(
        tmp_path, target=folders[target], sources=folders, rows=rows, train=tiny_run.TRAIN | {"passes": 1}
    )
    outcome = fuselm("run", run_file)
    assert outcome.code == 0, outcome.err
    numbers = summary(tmp_path / "out")
    assert all(numbers["models"][kind]["average"]["bits_per_byte"] > 0 for kind in KINDS)
    own = numbers["alignment"][target]
    if target == "word_piece":  # it makes capitals small: rows of the others are as they were
        assert all(row["coverage"] < 1 and row["fidelity"] < 1 and 0 < row["unspelled"] < 0.3 for row in own.values())
    else:
        assert all(row["fidelity"] == 1 and row["coverage"] == 1 for row in own.values())


@pytest.mark.parametrize(
    "options",
    [
        ["align.method=exact"],
        ["align.method=mined", "fuse.function=avg_ce"],
        ["align.method=cooccurrence"],
        ["align.method=statistics"],
        ["fuse.function=min_ce", "fuse.level=document"],
    ],
)
def test_other_methods_run_to_the_end(finished, again, options):
    outcome = fuselm("run", finished / "run.yaml", f"output={again}", *options)
    assert outcome.code == 0, outcome.err
    assert not [s for s in outcome.stages if s.startswith("capture")]


MOMENTS = (  # a file or folder that has just appeared when a run is killed
    "corpus/*",
    "capture/own-*.partial/.block-00000-00001.parquet",
    "capture/other-*.partial/.block-00000-00002.parquet",
    "align/other-*",
    "train/clm-*.partial/checkpoints/*/trainer_state.json",
    "train/fused-*.partial/checkpoints/*/optimizer.pt",
    "train/fused-*.partial/checkpoints/*/trainer_state.json",
    "evaluate/*",
    "report/*",
)


def test_a_run_killed_again_and_again_ends_the_same(finished, tmp_path):
    out, rng, killed = tmp_path / "out", random.Random(0), 0
    for moment in MOMENTS:
        process = tiny_run.start("run", finished / "run.yaml", f"output={out}")
        while process.exitcode is None and not list(out.glob(moment)):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        killed += process.exitcode is None
        process.kill()
        process.join()
    assert killed >= 4  # a quick machine may be past a moment before it is seen
    outcome = fuselm("run", finished / "run.yaml", f"output={out}")
    assert outcome.code == 0, outcome.err
    assert summary(out) == summary(finished / "out")
    for documents in captured(out).values():
        assert len(documents) == len(set(documents)) > 0
    assert (out / "model" / "model.safetensors").read_bytes() == (
        finished / "out" / "model" / "model.safetensors"
    ).read_bytes()
    assert not list(out.glob("*/*.partial"))


def test_a_second_process_on_a_run_is_refused_and_the_first_continues(finished, tmp_path):
    out = tmp_path / "out"
    process = tiny_run.start("run", finished / "run.yaml", f"output={out}")
    while process.exitcode is None and not list(out.glob("train/*.partial/checkpoints/*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    outcome = fuselm("run", finished / "run.yaml", f"output={out}")
    os.kill(process.pid, signal.SIGCONT)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("fuselm: ")]
    assert line.endswith(".partial: another fuselm process is working on it; wait for it to end")
    process.join()
    assert process.exitcode == 0 and summary(out) == summary(finished / "out")


def test_the_key_of_a_recipe_differs_wherever_the_outcome_may():
    recipes = [
        Recipe(stage="a"),
        Recipe(stage="b"),
        Recipe(stage="a", parameters={"x": 1}),
        Recipe(stage="a", parameters={"x": 2}),
        Recipe(stage="a", inputs={"x": "1"}),
        Recipe(stage="a", inputs={"y": "1"}),
    ]
    assert len({recipe.key for recipe in recipes}) == len(recipes)


@pytest.mark.real
def test_three_real_models_become_one(tmp_path, real_models, quickstart):
    smollm2, *_ = real_models.values()
    rows = [
        {"domain": domain, "text": row["text"][:401]}
        for domain in ("english", "python")
        for row in [r for r in quickstart if r["domain"] == domain][:4]
    ]
    run_file = tiny_run.write(
        tmp_path,
        target=smollm2,
        sources=real_models,
        rows=rows,
        train={"learning_rate": 1e-4, "passes": 1, "batch_documents": 2, "evaluations_per_pass": 1},
    )
    outcome = fuselm("run", run_file)
    assert outcome.code == 0, outcome.err
    numbers = summary(tmp_path / "out")
    assert list(numbers["models"]) == [*real_models, "base", "clm", "fused"]
    assert numbers["models"]["smollm2"] == numbers["models"]["base"]
    assert all(
        row["fidelity"] < 1.1 and row["coverage"] == 1
        for rows in numbers["alignment"].values()
        for row in rows.values()
    )
    assert all(0.2 < row["average"]["bits_per_byte"] < 2 for row in numbers["models"].values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("The capital of France is ") and len(text) > len("The capital of France is ")


def test_a_store_that_is_there_is_a_source(finished, tmp_path, byte_level):
    (own,) = (finished / "out" / "capture").glob("own-*")
    outcome = fuselm("run", finished / "run.yaml", f"output={tmp_path / 'out'}", f"sources.own.store={own}")
    assert outcome.code == 0, outcome.err
    assert "capture own" not in outcome.stages and "align own" in outcome.stages
    assert not list((tmp_path / "out" / "capture").glob("own-*"))
    expected, found = summary(finished / "out"), summary(tmp_path / "out")
    assert found["models"] == expected["models"] and found["alignment"] == expected["alignment"]


def test_a_store_of_something_else_is_refused(finished, tmp_path):
    (own,), (other,) = ((finished / "out" / "capture").glob(f"{name}-*") for name in ("own", "other"))
    again = ["run", finished / "run.yaml", f"output={tmp_path / 'out'}"]

    def message(*options: str) -> str:
        outcome = fuselm(*again, *options)
        assert outcome.code == 2
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("fuselm: ")]
        return line

    assert f"sources.own.store: {other} was captured with model " in message(f"sources.own.store={other}")
    assert message(f"sources.own.store={tmp_path}").endswith(
        "not a finished stage (no manifest.json); run `fuselm run` again"
    )
    line = message(f"sources.own.store={own}", "seed=7")
    assert f"sources.own.store: {own} has no document " in line and line.endswith("capture this run's corpus again")
