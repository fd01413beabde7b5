"""Prune tiny models whole: what `fuselm prune` makes loads, is what was planned, and survives interruptions."""

import json
import shutil
from pathlib import Path

import pruning_models
import pytest
import tiny_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselm.models.locating import locate_model
from fuselm.runs.pruning import prune as pruning
from fuselm.runs.pruning import scoring
from fuselm.runs.pruning.options import read_prune_options
from fuselm.runs.pruning.plan import plan_pruning
from fuselm.system import manifest
from fuselm.system.progress import Progress

QUIET = Progress(Console(quiet=True), "prune")


@pytest.fixture(scope="module")
def texts_file(texts, tmp_path_factory) -> Path:
    return tiny_run.write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", texts)


def prune(*words) -> tiny_run.Outcome:
    return tiny_run.fuselm("prune", *map(str, words))


def test_the_result_is_an_ordinary_model_with_its_card_and_manifest(byte_level, texts_file, tmp_path):
    out = tmp_path / "small"
    outcome = prune(byte_level, out, "--ratio", 0.1, "--multiple", 8, "--texts", texts_file, "--samples", 7)
    assert outcome.code == 0, outcome.err
    assert f"pruned into {out}" in outcome.out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    whole = AutoModelForCausalLM.from_pretrained(byte_level)
    assert model.config.intermediate_size == 8 * round(model.config.intermediate_size / 8) < 64
    assert model.num_parameters() == pytest.approx(0.9 * whole.num_parameters(), rel=0.02)
    generated = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=3, pad_token_id=0)
    assert generated.shape[1] > 1
    assert (out / "tokenizer.json").read_bytes() == (byte_level / "tokenizer.json").read_bytes()
    made = manifest.read(out)
    assert made["inputs"]["model"] == locate_model(str(byte_level)).fingerprint
    assert made["counts"] == {"parameters": model.num_parameters(), "samples": 7}
    assert "| `intermediate_size` | 64 |" in (out / "README.md").read_text()
    removed = json.loads((out / "pruning.json").read_text())["removed"]["mlp"]
    assert removed.keys() == {"0", "1"} and all(0 < share < 0.5 for share in removed.values())
    assert locate_model(str(out)).output_size == whole.config.vocab_size  # a target of a run


def test_the_weights_that_stay_are_those_with_the_highest_scores(byte_level, tmp_path):
    out = tmp_path / "small"
    assert prune(byte_level, out, "--intermediate-size", 40, "--importance", "magnitude").code == 0
    before, after = load_file(byte_level / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.mlp."
        rows = [before[f"{at}{name}.weight"].double() for name in ("gate_proj", "up_proj", "down_proj")]
        scores = rows[0].square().sum(1) + rows[1].square().sum(1) + rows[2].square().sum(0)
        kept = scores.argsort(descending=True)[:40].sort().values
        assert torch.equal(after[f"{at}gate_proj.weight"], before[f"{at}gate_proj.weight"][kept])
        assert torch.equal(after[f"{at}down_proj.weight"], before[f"{at}down_proj.weight"][:, kept])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_removing_nothing_writes_the_same_weights(byte_level, texts_file, tmp_path):
    out = tmp_path / "same"
    outcome = prune(byte_level, out, "--ratio", 0, "--texts", texts_file)
    assert outcome.code == 0, outcome.err
    before, after = load_file(byte_level / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_the_page_shows_what_each_layer_lost(byte_level, texts_file, tmp_path):
    out = tmp_path / "small"
    words = ("--layers", 1, "--intermediate-size", 40, "--texts", texts_file, "--samples", 3, "--sensitivity")
    outcome = prune(byte_level, out, *words)
    assert outcome.code == 0, outcome.err
    measured = json.loads((out / "pruning.json").read_text())["sensitivity"]
    assert {name: sorted(rises) for name, rises in measured.items()} == {"mlp": ["0", "1"], "layers": ["0", "1"]}
    page = (out / "pruning.html").read_text()
    assert "Sensitivity by layer" in page and f"{measured['mlp']['1']:.4f}" in page
    assert "share of importance removed" in page and "is the most sensitive" in page


@pytest.mark.parametrize("importance", ["param_second", "param_mix", "activations", "random"])
def test_every_importance_and_structure(byte_level, texts_file, tmp_path, importance):
    texts = () if importance == "random" else ("--texts", texts_file, "--samples", 3, "--tokens", 17)
    sizes = ("--layers", 1, "--intermediate-size", 48, "--kv-heads", 1, "--hidden-size", 24)
    outcome = prune(byte_level, tmp_path / "small", *sizes, "--importance", importance, *texts)
    assert outcome.code == 0, outcome.err
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "small").config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (1, 48, 24)
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (1, 2, 8)


@pytest.mark.parametrize(("family", "importance"), [("llama", "activations"), ("mixtral", "param_first")])
def test_what_is_scored_by_default_fits_the_model(byte_level, texts_file, tmp_path, family, importance):
    """Activations of experts that share one tensor cannot be read, so gradients score those."""
    whole = tmp_path / "whole"
    pruning_models.make_model(family, vocabulary=locate_model(str(byte_level)).output_size).save_pretrained(whole)
    for file in byte_level.glob("*token*.json"):
        shutil.copy(file, whole)
    outcome = prune(whole, tmp_path / "small", "--intermediate-size", 24, "--texts", texts_file, "--samples", 3)
    assert outcome.code == 0, outcome.err
    assert manifest.read(tmp_path / "small")["parameters"]["importance"] == importance
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.intermediate_size == 24


def test_the_texts_may_be_the_training_documents_of_a_run(byte_level, sentence_piece, texts, tmp_path):
    out = tmp_path / "small"
    run = tiny_run.write(tmp_path / "run", target=out, sources={"other": sentence_piece}, rows=texts)
    outcome = prune(byte_level, out, "--ratio", 0.1, "--multiple", 8, "--run", run)
    assert outcome.code == 0, outcome.err
    assert manifest.read(out)["counts"]["samples"] > 1


def test_the_plan_writes_nothing(byte_level, tmp_path):
    outcome = prune(byte_level, tmp_path / "small", "--ratio", 0.1, "--multiple", 8, "--plan")
    assert outcome.code == 0, outcome.err
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines()}
    assert rows["hidden_size"] == ["32", "->", "32"] and rows["intermediate_size"][0] == "64"
    assert "tokens read in a second" in outcome.out and "weights" in rows
    assert not (tmp_path / "small").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "how much goes is said by one of ratio, params or exact sizes (got nothing)"),
        (("--ratio", 0.1, "--params", 10), "(got ratio, params)"),
        (("--ratio", 0.1, "--layers", 1), "(got ratio, layers)"),
        (("--ratio", 1.5), "ratio: input should be less than 1 (got 1.5)"),
        (("--ratio", 0.9, "--importance", "random"), "are left; ask for more, or name another structure"),
        (("--layers", 3, "--importance", "random"), "layers: the model has 2 (got 3)"),
        (("--params", 10**9, "--importance", "random"), "pruning only removes, ask for fewer"),
        (("--layers", 1, "--structures", "mlp"), "structures: does nothing beside exact sizes"),
        (("--layers", 1, "--multiple", 8), "multiple: does nothing beside exact sizes"),
        (("--ratio", 0.1, "--structures", "mlp,heads"), "structures"),
        (("--ratio", 0.1, "--importance", "taylor"), "importance"),
        (("--ratio", 0.1, "--importance", "magnitude", "--texts", "x"), "magnitude reads no text; drop it"),
        (("--ratio", 0.1, "--importance", "random", "--samples", 3), "random reads no text; drop it"),
        (("--ratio", 0.1, "--multiple", 8), "add --texts FILE or --run RUN.yaml"),
        (("--ratio", 0.1, "--multiple", 8, "--texts", "x", "--run", "y"), "both name texts"),
        (("--ratio", 0.1, "--multiple", 8, "--texts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--ratio", 0.1, "--importance", "random", "--sensitivity"), "sensitivity: is measured on texts"),
        (("--ratio", 0.1, "--plan", "--sensitivity"), "a plan reads no text"),
        (("--hidden-size", 23, "--texts", "x"), "transformers takes no hidden_size 23"),
    ],
)
def test_errors_are_one_line_before_any_work(byte_level, tmp_path, words, said):
    outcome = prune(byte_level, tmp_path / "small", *words)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("fuselm: ")]
    assert said in line
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(byte_level, tmp_path):
    out = tmp_path / "small"
    words = ("--intermediate-size", 40, "--importance", "magnitude")
    assert prune(byte_level, out, *words).code == 0
    assert "nothing to do" in prune(byte_level, out, *words).out
    other = prune(byte_level, out, "--intermediate-size", 48, "--importance", "magnitude")
    assert other.code == 2 and "holds another model" in other.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert prune(byte_level, tmp_path / "mine", *words).code == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_scores_are_not_computed_again_after_an_interruption(byte_level, tmp_path, monkeypatch):
    options = read_prune_options(intermediate_size=40, importance="param_first")
    plan = plan_pruning(locate_model(str(byte_level)), options)
    samples = [torch.arange(19) * 5 % 400]
    pruning.prune_model(plan, samples, tmp_path / "whole", QUIET)

    class Killed(BaseException):
        """Stop a pruning in its middle."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pruning, "remove_units", die)
        pruning.prune_model(plan, samples, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_model", die)
        pruning.prune_model(plan, samples, tmp_path / "out", QUIET)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # scores of other texts are not taken for these
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pruning, "remove_units", die)
        pruning.prune_model(plan, samples, tmp_path / "out", QUIET)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring, "score_model", die)
        pruning.prune_model(plan, [torch.arange(19) * 3 % 400], tmp_path / "out", QUIET)
