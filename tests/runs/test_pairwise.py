"""Fuse each source into a copy of the target and merge the copies: stages, plans, results, interruptions, refusals."""

import json
import shutil
from pathlib import Path

import chat_models
import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import files, fuselm, summary
from transformers import AutoModelForCausalLM

from fuselm.models.merging.methods import merge_tensors
from fuselm.runs import config


@pytest.fixture(scope="module")
def rows(texts):
    return tiny_run.short(texts)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, word_piece, rows, cache) -> Path:
    """Return the folder of a finished run with its run file; tests must not change it."""
    folder = tmp_path_factory.mktemp("pairwise")
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "first": sentence_piece, "second": word_piece},
        rows=rows,
        fuse={"pairwise": True},
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """Return a copy of the finished run that tests may change; its run file names the copy."""
    shutil.copytree(finished, tmp_path / "again")
    run = yaml.safe_load((finished / "run.yaml").read_text())
    run["output"] = str(tmp_path / "again" / "out")
    (tmp_path / "again" / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "again"


def find(out: Path, pattern: str) -> Path:
    (found,) = out.glob(pattern)
    return found


def test_the_fused_model_is_the_merge_of_one_copy_for_each_source(finished, byte_level):
    out = finished / "out"
    copies = [load_file(find(out, f"train/{name}-*/model/model.safetensors")) for name in ("first", "second")]
    base, merged = load_file(byte_level / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        expected = merge_tensors("sce", [copy[name] for copy in copies], base=base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(copies[0][name], copies[1][name]) for name in base)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.vocab_size == AutoModelForCausalLM.from_pretrained(byte_level).config.vocab_size


def test_each_copy_learns_from_its_source_and_the_target(finished):
    for name in ("first", "second"):
        manifest = json.loads((find(finished / "out", f"fuse/{name}-*") / "manifest.json").read_text())
        assert sorted(manifest["inputs"]) == sorted([f"source {name}", "source own"])


def test_the_report_tells_of_the_copies_and_of_the_merge(finished):
    numbers, page = summary(finished / "out"), (finished / "out" / "report.html").read_text()
    assert list(numbers["training"]) == ["clm", "first", "second"]
    assert numbers["merge"]["method"] == "sce" and numbers["merge"]["models"] == ["first", "second"]
    assert set(numbers["merge"]["trained_dev_bits_per_byte"]) == {"first", "second"}
    assert set(numbers["fusion"]["copies"]) == {"first", "second"}
    for shares in numbers["fusion"]["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
    assert "merged from first, second by" in page and "sce of first, second" in page
    assert "copies of the target" in (finished / "out" / "model" / "README.md").read_text()


def test_another_method_merges_the_same_copies(again, cache):
    trained = files(again / "out", "train")
    outcome = fuselm("run", again / "run.yaml", "merge.method=linear", "merge.parameters={weight: 1}", cache=cache)
    assert outcome.code == 0, outcome.err
    assert outcome.stages == ["merge", "evaluate fused", "report"]
    assert files(again / "out", "train") == trained


def test_copies_that_are_not_kept_are_made_again_for_another_merge(again, cache):
    assert fuselm("run", again / "run.yaml", "merge.keep_copies=false", cache=cache).code == 0
    assert not list((again / "out").glob("train/first-*/model")) and list((again / "out").glob("train/clm-*/model"))
    before = (again / "out" / "model" / "model.safetensors").read_bytes()
    outcome = fuselm("run", again / "run.yaml", "merge.keep_copies=false", cache=cache)
    assert outcome.stages == [] and "Nothing to do" in outcome.err
    outcome = fuselm("run", again / "run.yaml", "merge.method=varm", cache=cache)
    trained = [f"train a copy on {name} at 0.003" for name in ("first", "second")]
    assert outcome.stages == [*trained, "merge", "evaluate fused", "report"], outcome.err
    assert fuselm("run", again / "run.yaml", cache=cache).code == 0
    assert (again / "out" / "model" / "model.safetensors").read_bytes() == before


def test_a_soup_is_learned_on_the_development_split(again, cache):
    outcome = fuselm(
        "run", again / "run.yaml", "merge.method=soup", "merge.parameters={steps: 3, grid: 2}", cache=cache
    )
    assert outcome.code == 0, outcome.err
    (soup,) = (again / "out").glob("merge/*/soup.json")
    tried = [row["bits_per_byte"] for row in json.loads(soup.read_text())["tried"]]
    numbers = summary(again / "out")["merge"]
    assert numbers["dev_bits_per_byte"] == pytest.approx(min(tried), abs=2e-3)
    assert numbers["dev_bits_per_byte"] <= max(numbers["trained_dev_bits_per_byte"].values())


def test_the_plan_has_the_copies_and_the_merge(finished, tmp_path, cache):
    outcome = fuselm("plan", finished / "run.yaml", f"output={tmp_path / 'out'}", cache=cache)
    assert outcome.code == 0, outcome.err
    for title in ("fuse first", "fuse second", "train a copy on first", "train a copy on second", "merge"):
        assert title in outcome.out


def test_the_merge_command_makes_a_runs_merge(again, cache):
    shutil.rmtree(find(again / "out", "merge/*"))
    outcome = fuselm("merge", again / "run.yaml", cache=cache)
    assert outcome.code == 0 and outcome.stages == ["merge"], outcome.err


def test_a_document_is_inspected(finished, cache):
    outcome = fuselm("inspect", finished / "out", "--doc", "0", cache=cache)
    assert outcome.code == 0 and "Fused pairwise" in outcome.out, outcome.err


def test_the_fused_model_is_merged_with_others(tmp_path, byte_level, sentence_piece, rows, cache):
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"other": sentence_piece},
        rows=rows,
        merge={
            "method": "linear",
            "models": {"before": str(byte_level)},
            "parameters": {"weight": {"fused": 0.75, "before": 0.25}},
        },
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    trained = load_file(find(out, "train/fused-*/model/model.safetensors"))
    before, merged = load_file(byte_level / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * trained[name] + 0.25 * before[name])
    assert list(summary(out)["training"]) == ["clm", "fused"]
    assert summary(out)["merge"]["by_model"] == {"fused": {"weight": 0.75}, "before": {"weight": 0.25}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": {}}, "merge: sce of one model is that model"),
        ({"merge": {"models": {"clm": "a"}}}, "merge.models.clm: names something else"),
        ({"merge": {"models": {"a": "b"}, "keep_copies": False}}, "merge.keep_copies: does nothing without"),
        (
            {"merge": {"models": {"a": "b"}, "method": "linear", "base": "c", "parameters": {"weight": 1}}},
            "merge.base: does nothing here, because linear",
        ),
        ({"merge": {"models": {"a": "b"}, "method": "linear"}}, "merge: weight: linear needs it for fused"),
        ({"merge": {"models": {"a": "b"}, "parameters": {"density": 1}}}, "sce has no parameter density"),
        (
            {"merge": {"models": {"a": "b"}, "method": "ties", "parameters": {"weight": {"fusde": 1}}}},
            "merge.parameters.weight: no model 'fusde' is merged; did you mean 'fused'?",
        ),
        ({"merge": {"method": "average"}}, "merge.method"),
    ],
)
def test_a_merge_that_cannot_be_meant_is_refused(tmp_path, byte_level, sentence_piece, rows, options, message):
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"other": sentence_piece}, rows=rows, **options)
    with pytest.raises(ValueError, match="merge") as error:
        config.load(run_file)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_single_copy_is_refused(tmp_path, byte_level, sentence_piece, rows, cache):
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=rows,
        fuse={"pairwise": True},
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 2 and "fuse.pairwise: merges copies of the target, and there is one (other)" in outcome.err


def test_models_that_do_not_fit_are_named_before_anything_is_captured(
    tmp_path, byte_level, sentence_piece, rows, cache
):
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"other": sentence_piece},
        rows=rows,
        merge={"models": {"gemma": str(sentence_piece)}},
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 2 and "architectures llama and gemma3_text" in outcome.err
    assert not (tmp_path / "out" / "capture").exists()


def test_a_soup_of_chat_models_is_learned_on_responses(tmp_path, byte_level, sentence_piece, texts, cache):
    target = chat_models.add_template(byte_level, tmp_path / "target")
    run_file = tiny_run.write(
        tmp_path / "run",
        target=target,
        sources={"other": chat_models.add_template(sentence_piece, tmp_path / "other", chat_models.BRACKETS)},
        rows=chat_models.make_rows(texts),
        train=tiny_run.TRAIN | {"passes": 1},
        merge={"method": "soup", "models": {"before": str(target)}, "parameters": {"steps": 2, "grid": 2}},
    )
    outcome = fuselm("run", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    (soup,) = (tmp_path / "run" / "out").glob("merge/*/soup.json")
    tried = [row["bits_per_byte"] for row in json.loads(soup.read_text())["tried"]]
    assert len(tried) == 3 + 2
    assert summary(tmp_path / "run" / "out")["merge"]["dev_bits_per_byte"] == pytest.approx(min(tried), abs=2e-3)
