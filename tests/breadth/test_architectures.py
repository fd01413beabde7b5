"""Every causal architecture of the installed transformers, tiny, as source, target and product.

All of them take minutes, and are run once before a release (`pytest -m slow tests/breadth`); a handful of unlike ones
is part of `make test`. `python benchmarks/breadth.py --write` puts the outcome into docs/architectures.md.
"""

import re
from pathlib import Path

import architectures
import checks
import pytest
import transformers
from transformers import PreTrainedTokenizerFast

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
HANDFUL = ["gemma2 (cap 1.5)", "gpt2", "llama", "mamba", "mixtral", "bert (is_decoder)", "bart"]
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


def test_the_table_has_every_architecture_of_this_transformers():
    page = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" not in page:
        pytest.skip("the table is of another transformers; `python benchmarks/breadth.py --write`")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", page, re.MULTILINE)
    assert [name for name, _ in rows] == architectures.names()
    assert sum(source.strip() not in (checks.NOT_BUILT, checks.REFUSED) for _, source in rows) >= 120


def test_a_gradient_that_differs_is_a_fault(tokenizer, documents, tmp_path, monkeypatch):
    """The comparison itself notices a loss that is not the one of `labels`."""
    whole = checks.fusion_loss
    monkeypatch.setattr(checks, "fusion_loss", lambda *a, count: whole(*a, count=1.01 * count))
    faults = checks.examine("gpt2", tokenizer, documents, tmp_path).faults
    assert len(faults) == 2 and faults[0].startswith("target: loss") and faults[1].startswith("target: gradients")
