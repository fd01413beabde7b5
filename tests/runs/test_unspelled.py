"""Make whole runs of models that cannot spell some of the text: what is reported, marked and learned."""

import io
import json
from pathlib import Path

import lossy
import pytest
import tiny_run
from conftest import SIZES, saved
from rich.console import Console
from tiny_run import fuselm
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fuselm.runs import config
from fuselm.runs.inputs import Inputs
from fuselm.runs.pipeline import Pipeline
from fuselm.system import manifest

CHINESE = "知识融合是把几个不同结构的语言模型的长处合并到一个模型里的方法。它先记录每个模型对语料的下一个词的分布。"


@pytest.fixture(scope="module")
def unknowing(tmp_path_factory, training_texts) -> Path:
    """Make a Llama whose tokenizer makes `<unk>` of characters that it does not know, such as Chinese ones."""
    return llama(tmp_path_factory.mktemp("models") / "unknowing", lossy.metaspace(training_texts))


def llama(folder: Path, tokenizer: Tokenizer) -> Path:
    return saved(
        folder,
        LlamaForCausalLM,
        LlamaConfig(**SIZES, vocab_size=tokenizer.get_vocab_size(), num_key_value_heads=2, eos_token_id=1),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>"),
    )


def run(folder: Path, target: Path, sources: dict[str, Path]) -> tuple[tiny_run.Outcome, dict]:
    """Run to the end on English, which all models spell, and Chinese; return the outcome and the summary."""
    plain = "the model reads the text and so does the other one, "
    rows = [{"domain": "english", "text": plain[n:] + plain[:n]} for n in range(0, 24, 3)]
    rows += [{"domain": "chinese", "text": CHINESE[n:] + CHINESE[:n]} for n in range(0, 24, 3)]
    options = {"train": tiny_run.TRAIN | {"passes": 1}, "fuse": {"weights": "learned"}}
    run_file = tiny_run.write(folder, target=target, sources=sources, rows=rows, **options)
    outcome = fuselm("run", run_file)
    assert outcome.code == 0, outcome.err
    return outcome, json.loads((folder / "out/summary.json").read_text())


def counts_of(out: Path, stage: str) -> dict:
    return manifest.read(next((out / stage).iterdir()))["counts"]


def test_a_source_that_cannot_spell_a_domain_has_no_weight_there(tmp_path, byte_level, unknowing):
    sources = {"unknowing": unknowing, "own": byte_level}
    outcome, summary = run(tmp_path, byte_level, sources)
    said = "unknowing cannot spell "
    assert outcome.err.count(f"corpus: {said}") == 1 and outcome.err.index(said) < outcome.err.index("capture")
    assert "they cost 8 bits each and are not trained on; docs/tokenizers.md" in outcome.err
    found = summary["corpus"]["unspelled"]
    assert set(found) == {"unknowing"} and found["unknowing"]["domains"]["chinese"] > 0.9
    models = summary["models"]
    assert models["unknowing"]["domains"]["chinese"]["unspelled"] > 0.9
    assert not any("unspelled" in models[name]["domains"]["chinese"] for name in ("base", "own", "clm", "fused"))
    fused = counts_of(tmp_path / "out", "fuse")
    weights = dict(zip(fused["sources"], fused["weights"]["chinese"], strict=True))
    assert weights["unknowing"] == 0 < weights["own"]
    assert "†" in outcome.out and "Bytes that a tokenizer cannot spell: unknowing" in " ".join(outcome.out.split())
    page = (tmp_path / "out/report.html").read_text()
    assert f"†{models['unknowing']['average']['bits_per_byte']:.3f}</span>" in page
    assert f"†{models['own']['average']['bits_per_byte']:.3f}" not in page


def test_a_target_that_cannot_spell_a_domain_is_trained_and_marked(tmp_path, byte_level, unknowing):
    outcome, summary = run(tmp_path, unknowing, {"other": byte_level})
    assert outcome.err.count("corpus: target cannot spell ") == 1
    assert set(summary["corpus"]["unspelled"]) == {"target"}
    for name in ("base", "clm", "fused"):
        assert summary["models"][name]["domains"]["chinese"]["unspelled"] > 0.9
    assert "unspelled" not in summary["models"]["other"]["average"]
    assert "†" in outcome.out and "Bytes that a tokenizer cannot spell: base" in " ".join(outcome.out.split())


def test_what_a_corrected_tokenizer_had_aligned_is_aligned_again(tmp_path, byte_level, training_texts, monkeypatch):
    """Check that stores of older versions, whose keys say nothing of corrections, are not used."""
    sources = {"own": byte_level, "joined": llama(tmp_path / "joined", lossy.words(training_texts))}
    rows = [{"domain": "english", "text": f"the model and the other {n}"} for n in range(9)]
    run_file = tiny_run.write(tmp_path / "run", target=byte_level, sources=sources, rows=rows)

    def folders() -> dict[str, str]:
        steps = Pipeline(config.load(run_file, []), Console(file=io.StringIO())).dry_run()
        return {step.title: step.folder.name for step in steps}

    now = folders()
    monkeypatch.setattr(Inputs, "is_corrected", lambda self, model: False)
    before = folders()
    changed = {title.partition(",")[0] for title in now if now[title] != before.get(title)}
    assert now.keys() == before.keys() and changed == {"align joined", "fuse", "train fused at 0.003", "evaluate fused"}
