"""Test fused_models.py: a run's folder is named wherever a model is, and stands for its fused model."""

import shutil
from pathlib import Path

import pytest
import tiny_run
from tiny_run import fuselm

from fuselm.models.locating import locate_model, locate_tokenizer


@pytest.fixture
def run(tmp_path, byte_level) -> Path:
    """Return a folder as a finished run leaves it: its options, and a model in `model`."""
    folder = tmp_path / "mine"
    shutil.copytree(byte_level, folder / "model")
    (folder / "config.yaml").write_text("output: mine\n", encoding="utf-8")
    return folder


def test_a_run_stands_for_its_fused_model(run, byte_level):
    model, fused = locate_model(str(run)), locate_model(str(byte_level))
    assert (model.name, model.folder, model.fingerprint) == (str(run), run / "model", fused.fingerprint)
    assert locate_tokenizer(str(run)).tokenizer_fingerprint == fused.tokenizer_fingerprint


@pytest.mark.parametrize("locate", [locate_model, locate_tokenizer])
def test_a_run_without_a_fused_model_says_what_to_do(run, locate):
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError) as caught:
        locate(str(run))
    assert str(caught.value) == (
        f"{run}: a run without a fused model yet; finish it with `fuselm run {run}/config.yaml`, or name a model"
    )


def test_a_model_with_options_beside_it_stands_for_itself(run):
    shutil.copy(run / "config.yaml", run / "model")
    assert locate_model(str(run / "model")).folder == run / "model"


def test_a_real_run_is_evaluated_measured_and_made_a_source(tmp_path, byte_level, sentence_piece, texts):
    rows = tiny_run.short(texts)
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"other": sentence_piece}, rows=rows)
    unfinished = fuselm("capture", run_file)
    assert unfinished.code == 0
    refused = fuselm("evaluate", tmp_path / "out", "--texts", tmp_path / "corpus.jsonl")
    assert refused.code == 2 and f"{tmp_path}/out: a run without a fused model yet; finish it with" in refused.err
    assert fuselm("run", f"{tmp_path}/out/config.yaml").code == 0
    said = f"{tmp_path}/out is a run: reading its fused model, {tmp_path}/out/model"
    by_run, by_model = (
        fuselm("evaluate", folder, "--texts", tmp_path / "corpus.jsonl", "--json")
        for folder in (tmp_path / "out", tmp_path / "out" / "model")
    )
    assert by_run.out == by_model.out and said in by_run.err and said not in by_model.err
    models = ("--source", sentence_piece, "--target", tmp_path / "out", "--texts", tmp_path / "corpus.jsonl")
    measured = fuselm("fidelity", *models)
    assert measured.code == 0 and said in measured.err
    later = tiny_run.write(tmp_path / "later", target=tmp_path / "out", sources={"other": sentence_piece}, rows=rows)
    outcome = fuselm("capture", later)
    assert outcome.code == 0 and said in outcome.err
