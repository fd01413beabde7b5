"""Try every causal architecture of the installed transformers, tiny, as source, target and product.

All of them take minutes, and are run once before a release (`pytest -m slow tests/breadth`); a handful of unlike ones
is part of `make test`. `python benchmarks/breadth.py --write` puts the outcome into docs/architectures.md.
"""

import re
from pathlib import Path

import architectures
import checks
import pytest
import transformers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
HANDFUL = [
    "bart",  # its `labels` are not shifted
    "bert",  # sees later tokens: refused
    "bert (is_decoder)",
    "gemma2 (cap 1.5)",
    "gpt2",  # learned positions
    "llama",
    "mamba",  # a state instead of attention
    "mixtral",  # a router
    "mpt (logit_scale inv_sqrt_d_model)",
]
OTHERS = [name for name in architectures.names() if name not in HANDFUL]


@pytest.fixture(scope="module")
def tokenizer(training_texts) -> PreTrainedTokenizerFast:
    return architectures.tiny_tokenizer(training_texts)


@pytest.fixture(scope="module")
def documents(quickstart):
    return checks.documents_of(quickstart)


@pytest.mark.parametrize("name", HANDFUL)
def test_a_handful_of_architectures(name, tokenizer, documents, tmp_path):
    assert checks.examine(name, tokenizer, documents, tmp_path).faults == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_architecture(name, tokenizer, documents, tmp_path):
    assert checks.examine(name, tokenizer, documents, tmp_path).faults == ()


def test_a_vision_language_model_is_refused(tokenizer, documents, tmp_path):
    """Refuse a model that `AutoModelForCausalLM` does not load."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2VLConfig(
        text_config=sizes | {"vocab_size": architectures.ROWS, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 14},
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    outcome = checks.examine_folder("qwen2_vl", documents, tmp_path)
    assert (outcome.source, outcome.faults) == (checks.REFUSED, ())


def test_the_table_has_every_architecture_of_this_transformers():
    page = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" not in page:
        pytest.skip("the table is of another transformers; `python benchmarks/breadth.py --write`")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", page, re.MULTILINE)
    assert [name for name, _ in rows] == architectures.names() and "FAULT:" not in page
    assert sum(source.strip() not in (checks.NOT_BUILT, checks.REFUSED) for _, source in rows) >= 120


def test_a_gradient_that_differs_is_a_fault(tokenizer, documents, tmp_path, monkeypatch):
    """Check that the comparison itself notices a loss other than that of `labels`."""
    whole = checks.fusion_loss
    monkeypatch.setattr(checks, "fusion_loss", lambda *a, count: whole(*a, count=1.01 * count))
    faults = checks.examine("gpt2", tokenizer, documents, tmp_path).faults
    assert len(faults) == 2 and faults[0].startswith("target: loss") and faults[1].startswith("target: gradients")
