"""benchmarks/apart.py: ensembles beside whole softmaxes in float64, means of weights, and all of it on tiny models."""

import json
import math
from pathlib import Path

import apart
import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fuselm.documents.corpus import Document
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import bits_per_byte
from fuselm.system.progress import Progress

DOMAINS = ("french", "german")


@pytest.fixture(scope="module")
def model(byte_level) -> Model:
    return locate_model(str(byte_level))


@pytest.fixture(scope="module")
def other(byte_level, tmp_path_factory) -> Model:
    """One of the same tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("other")
    for path in byte_level.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    changed = AutoModelForCausalLM.from_pretrained(byte_level)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        for weight in changed.parameters():
            weight += 0.1 * torch.randn_like(weight)
    changed.save_pretrained(folder)
    return locate_model(str(folder))


@pytest.fixture(scope="module")
def vocabulary(model) -> Vocabulary:
    return Vocabulary(load_tokenizer(model), model.output_size)


@pytest.fixture(scope="module")
def documents(texts) -> list[Document]:
    """The last two are of one document that was cut."""
    return [
        Document(id=str(n), origin=str(min(n, 5)), domain=row["domain"], split="heldout", text=row["text"])
        for n, row in enumerate(texts[:7])
    ]


def bits(scores) -> dict[str, float]:
    return {score.document: score.bits for score in scores}


@pytest.mark.parametrize("mean", apart.MEANS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_model_with_itself_scores_as_that_model(model, vocabulary, documents, mean, times):
    ours = apart.score_ensemble([model] * times, vocabulary, documents, mean=mean, batch_tokens=131)
    alone = bits_per_byte.score_model(
        model, vocabulary, documents, dtype="auto", batch_tokens=131, progress=Progress(apart.Console(quiet=True), "")
    )
    assert bits(ours) == pytest.approx(bits(alone), rel=1e-6)


@pytest.mark.parametrize("mean", apart.MEANS)
def test_an_ensemble_predicts_the_mean_of_whole_softmaxes(model, other, vocabulary, documents, mean):
    loaded = [AutoModelForCausalLM.from_pretrained(m.folder) for m in (model, other)]
    expected: dict[str, float] = {}
    for document in documents:
        ids = vocabulary.segment(document.text).ids.tolist()
        with torch.no_grad():
            inputs = torch.tensor([[model.context_token, *ids[:-1]]])
            logits = [m(inputs).logits[0].double() for m in loaded]
        for row, gold in enumerate(ids):
            rows = np.stack([of[row].softmax(0).numpy() for of in logits])
            pooled = rows.mean(0) if mean == "ensemble" else np.sqrt(rows[0] * rows[1])
            expected[document.origin] = expected.get(document.origin, 0.0) - math.log2(pooled[gold] / pooled.sum())
    ours = apart.score_ensemble([model, other], vocabulary, documents, mean=mean)
    assert bits(ours) == pytest.approx(expected, rel=1e-5)


def test_merged_weights_are_the_mean_and_load_as_any_model(model, other, tmp_path):
    apart.merge([model, other, other], model, tmp_path / "merged")
    one, two = (load_file(m.folder / "model.safetensors") for m in (model, other))
    merged = load_file(locate_model(str(tmp_path / "merged")).folder / "model.safetensors")
    assert merged.keys() == one.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, (one[name] + 2 * two[name]) / 3)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, byte_level, texts) -> list[str]:
    """Those of a comparison that takes a second."""
    folder = tmp_path_factory.mktemp("apart")
    rows = tiny_run.short(texts, domains=4)
    run_file = tiny_run.write(folder, target=byte_level, sources={"own": byte_level}, rows=rows)
    return ["--run", str(run_file), "--output", str(folder / "out"), "--domains", ",".join(DOMAINS)]


def run(arguments: list[str], capsys) -> dict:
    apart.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_whole_comparison(arguments, capsys, monkeypatch):
    result = run(arguments, capsys)
    alone = [f"{domain}-alone" for domain in DOMAINS]
    assert list(result["models"]) == ["base", *alone, "merged", "ensemble", "ensemble-geometric", "clm", "fused"]
    assert {name for name, passes in result["forward_passes"].items() if passes != 1} == set(apart.MEANS)
    assert result["forward_passes"]["ensemble"] == len(DOMAINS)
    assert set(result["differences"]) == {f"fused-{rival}" for rival in apart.RIVALS}
    assert set(result["models"]["fused"]["domains"]) == set(DOMAINS)
    assert set(result["elsewhere"]["models"]["fused"]["domains"]) == {"english", "python"}
    clm, fused = result["training"]["clm"], result["training"]["fused"]
    assert clm["tokens"] / clm["passes"] == fused["tokens"] / fused["passes"]
    tokens = [result["training"][name]["text_tokens"] for name in alone]
    assert sum(tokens) == result["training"]["clm"]["text_tokens"]
    monkeypatch.setenv("COLUMNS", "211")
    apart.main(arguments)
    assert "fused - merged" in capsys.readouterr().out


def test_nothing_that_is_scored_was_trained_on(arguments, capsys):
    run(arguments, capsys)
    out = Path(arguments[3])
    rows = [json.loads(line) for path in out.glob("corpus/*/documents.jsonl") for line in path.read_text().splitlines()]
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["text"], set()).add(row["split"])
    assert len(rows) > len(splits) and all(len(of) == 1 for of in splits.values())


def test_a_second_time_nothing_is_made_again(arguments, capsys):
    first = run(arguments, capsys)
    stages = ("corpus", "capture", "align", "fuse", "train", "merge", "evaluate")
    before = [tiny_run.files(Path(arguments[3]), stage) for stage in stages]
    assert all(before)
    assert run(arguments, capsys) == first
    assert [tiny_run.files(Path(arguments[3]), stage) for stage in stages] == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--domains", "french"], "--domains french: takes two or more, each once"),
        (["--domains", "french,klingon"], "--domains: no text is of 'klingon'; there are"),
        (["sources.more=x"], "sources.more=x: set by this benchmark; leave it out"),
        (["train.lamda_clm=1"], "train.lamda_clm: unknown option; did you mean 'lambda_clm'?"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, capsys, changed, message):
    with pytest.raises(SystemExit) as ended:
        apart.main([*arguments, *changed])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
