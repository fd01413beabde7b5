"""Test texts in front of held-out ones: what is read, and that scores are those of plain transformers on it."""

import math

import numpy as np
import pytest
import tiny_run
import torch
from tiny_run import fuselm
from transformers import AutoModelForCausalLM

from fuselm.documents.document import Document
from fuselm.documents.passages import tokenize_separator
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import bits_per_byte
from fuselm.results.texts_in_front import choose_texts_in_front, segment_behind

FRONT = ["one two three\n", "four, five", "six seven eight nine"]


def documents(domain: str, texts: list[str]) -> list[Document]:
    return [
        Document(id=f"{domain}-{n}", origin=f"{n}", domain=domain, split="train", text=t) for n, t in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def read(byte_level):
    model = locate_model(str(byte_level))
    return model, Vocabulary(load_tokenizer(model), model.output_size)


@pytest.mark.parametrize("tokens", [1, 7, 23, 1000])
def test_the_last_tokens_of_other_texts_are_read_in_front(read, tokens):
    model, vocabulary = read
    front = choose_texts_in_front([*documents("a", FRONT), *documents("b", ["not this"])], tokens)
    (asked,) = documents("a", ["and ten"])
    limits = {"context_token": model.context_token, "context_length": 10_000}
    found = segment_behind(front, asked, vocabulary, **limits)
    own = vocabulary.segment(asked.text)
    before = len(found.read_ids) - len(own.ids)
    np.testing.assert_array_equal(found.read_ids[before:], own.ids)
    np.testing.assert_array_equal(found.is_kept, np.arange(len(found.read_ids)) >= before)
    text = vocabulary.decode(found.read_ids[:before].tolist())
    rotations = ["\n\n".join(FRONT[k:] + FRONT[:k]) + "\n\n" for k in range(len(FRONT))]
    assert any(rotation.endswith(text) for rotation in rotations) and "not" not in text
    between = len(tokenize_separator(vocabulary))
    assert before == min(tokens, sum(len(vocabulary.segment(t).ids) + between for t in FRONT))
    short = segment_behind(front, asked, vocabulary, **limits | {"context_length": len(own.ids) + 4})
    assert len(short.read_ids) - len(own.ids) == min(3, before)
    assert segment_behind(front, documents("c", ["x y"])[0], vocabulary, **limits).reading is None


def test_scores_are_those_of_the_text_behind_the_others(read, byte_level):
    model, vocabulary = read
    front = choose_texts_in_front(documents("a", FRONT), 11)
    asked = documents("a", ["and ten", "eleven, twelve and so on", ""])
    score = bits_per_byte.open_scorer(model, vocabulary, dtype="float32", batch_tokens=64, front=front)
    plain = AutoModelForCausalLM.from_pretrained(byte_level)
    for document, found in zip(asked, score(asked, lambda tokens: None), strict=True):
        limits = {"context_token": model.context_token, "context_length": model.context_length}
        ids = segment_behind(front, document, vocabulary, **limits).read_ids
        own = len(vocabulary.segment(document.text).ids)
        row = torch.tensor([[model.context_token, *ids]])
        with torch.no_grad():
            logprobs = plain(row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
        assert found.bits == pytest.approx(-float(logprobs[len(ids) - own :].sum()) / math.log(2), rel=1e-4)


def test_a_run_scores_all_models_so(tmp_path, byte_level, sentence_piece, texts):
    options = {"train": tiny_run.TRAIN | {"passes": 1}}
    rows = tiny_run.short(texts)
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"other": sentence_piece}, rows=rows, **options)
    alone = fuselm("evaluate", run_file)
    assert alone.code == 0, alone.err
    behind = fuselm("evaluate", run_file, "evaluate.prefix_tokens=13")
    assert behind.code == 0, behind.err
    assert behind.stages == [name for name in alone.stages if name.startswith("evaluate")]  # nothing else is made again
