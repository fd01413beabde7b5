"""Test tokenizer_pipeline.py: compiled merges, and tokenizers for text that continues another."""

import json

import aligned_rows
import drawn
import pytest
from hypothesis import given
from tokenizers import Tokenizer

from fuselm.models import tokenizer_pipeline


def pipeline_of(vocabulary) -> dict:
    return json.loads(vocabulary._tokenizer.to_str())


@given(drawn.byte_level, drawn.texts)
def test_compiled_merges_make_the_tokenizers_own_tokens(make, text):
    vocabulary = make()
    merges = tokenizer_pipeline.compile_pipeline(pipeline_of(vocabulary), set())
    assert aligned_rows.merged(merges, text.encode()) == vocabulary.segment(text).ids.tolist()


def test_word_pieces_are_not_compiled():
    assert tokenizer_pipeline.compile_pipeline(pipeline_of(drawn.word_pieces(["ab"])), set()) is None


def test_a_tokenizer_with_corrected_tokens_is_not_compiled():
    vocabulary = drawn.byte_pairs([(0, 1)])
    assert tokenizer_pipeline.compile_pipeline(pipeline_of(vocabulary), {vocabulary.id_by_bytes[b"ab"]}) is None


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_a_continuing_tokenizer_puts_no_space_before_a_text(dummy_prefix):
    tokenizer = drawn.byte_pairs([], dummy_prefix=dummy_prefix)._tokenizer
    continuing = tokenizer_pipeline.build_continuing_tokenizer(tokenizer)
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["▁"] * dummy_prefix + ["a", "b"]
    assert continuing.encode("ab", add_special_tokens=False).tokens == ["a", "b"]


def test_a_completed_added_token_takes_the_place_of_at_most_as_many_as_bounded():
    tokenizer = Tokenizer.from_str(drawn.byte_pairs([])._tokenizer.to_str())
    tokenizer.add_tokens(["ab" * 300])
    before, after = (len(tokenizer.encode("ab" * 299 + end).ids) for end in ("a", "ab"))
    assert 0 < before - after <= tokenizer_pipeline.bound_collapse(json.loads(tokenizer.to_str()))
