"""mined.py against the golden data, the loops in reference.py and brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from fuselm import models
from fuselm.mined import CHUNK, nearest_tokens, pair_positions
from fuselm.vocabulary import Vocabulary

GOLDEN = Path(__file__).parent / "data" / "golden"
tokens = st.lists(st.text("abé日", max_size=3), max_size=7)


def target_to_source(path: np.ndarray, targets: int) -> list[list[int]]:
    return [path[path[:, 1] == i, 0].tolist() for i in range(targets)]


def test_pairs_of_positions_are_the_golden_ones():
    cases = json.loads((GOLDEN / "dtw_alignment.json").read_bytes())["cases"]
    for case in cases:
        source, target = ([reference.without_marks(t) for t in case[f"{side}_tokens"]] for side in ("source", "target"))
        path = pair_positions(source, target)
        assert target_to_source(path, len(target)) == case["target_to_source"], case["text"]
        assert sum(reference.levenshtein(source[i], target[j]) for i, j in path) == case["dtw_cost"]
    assert len(cases) == 57


@given(tokens, tokens)
def test_pairs_of_positions_equal_the_reference(source, target):
    assert target_to_source(pair_positions(source, target), len(target)) == reference.dtw_pairs(source, target)


@given(tokens, st.lists(st.none() | st.text("abé日", max_size=3), min_size=1, max_size=7).filter(any))
def test_nearest_tokens_equal_brute_force(source, vocabulary):
    ids = {}
    for i, string in enumerate(vocabulary):
        if string is not None:
            ids.setdefault(string, i)
    expected = [reference.min_edit_ids(token, ids, "Ġ", "Ġ")[1][0] for token in source]
    assert nearest_tokens(source, vocabulary).tolist() == expected


def test_nearest_tokens_are_right_across_chunks():
    vocabulary = [f"{i:04d}" for i in range(CHUNK + 7)]
    assert nearest_tokens(vocabulary, vocabulary).tolist() == list(range(CHUNK + 7))


def test_nearest_tokens_tell_long_distances_apart():
    """A byte would hold neither 300 nor 256."""
    assert nearest_tokens(["a" * 300], ["b" * 300, "b" * 256, "a" * 299]).tolist() == [2]


@pytest.mark.real
@pytest.mark.parametrize(("pair", "mark"), [("qwen2.5->smollm2", "Ġ"), ("gemma3->smollm2", "▁")])
def test_nearest_tokens_are_the_golden_ones(pair, mark, real_models):
    model = models.locate(str(real_models["smollm2"]))
    vocabulary = Vocabulary(models.load_tokenizer(model), model.output_size)
    cases = json.loads((GOLDEN / "min_edit_vocab.json").read_bytes())["pairs"][pair]
    found = nearest_tokens([case["source_token"].replace(mark, "Ġ") for case in cases], vocabulary.token_strings)
    assert found.tolist() == [case["ties"][0] for case in cases]
