"""Compare nearest.py with brute force and the golden data."""

import json
from pathlib import Path

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from fuselm.alignment.nearest import STRINGS_PER_TASK, find_nearest_tokens, find_tied_tokens
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
few_letters = st.text("abé日", max_size=5)
many_letters = st.text(max_size=7)
repeats = st.builds(str.__mul__, st.sampled_from(["a", "b", "ab", "日"]), st.integers(0, 71))  # over 64 characters
strings = few_letters | many_letters | repeats


def search_by_brute_force(string: str, vocabulary: list[str | None]) -> list[int]:
    distances = {i: reference.levenshtein(string, token) for i, token in enumerate(vocabulary) if token is not None}
    return [i for i, distance in distances.items() if distance == min(distances.values())]


def has_token(vocabulary: list[str | None]) -> bool:
    return any(token is not None for token in vocabulary)


@pytest.mark.parametrize("letters", [few_letters, strings])
def test_nearest_and_tied_tokens_equal_brute_force(letters):
    @given(st.lists(letters, max_size=7), st.lists(st.none() | letters, min_size=1, max_size=13).filter(has_token))
    def equal(wanted, vocabulary):
        expected = [search_by_brute_force(string, vocabulary) for string in wanted]
        assert [ids.tolist() for ids in find_tied_tokens(wanted, vocabulary)] == expected
        assert find_nearest_tokens(wanted, vocabulary).tolist() == [ids[0] for ids in expected]

    equal()


@given(st.text("ab", max_size=150), st.text("ab", max_size=150), st.integers(0, 40))
def test_the_nearer_of_two_long_tokens_is_found(wanted, other, edits):
    edited = wanted[:edits] + "c" + wanted[edits:][2:]
    vocabulary = [other, edited]
    assert find_tied_tokens([wanted], vocabulary)[0].tolist() == search_by_brute_force(wanted, vocabulary)


@pytest.mark.parametrize("shared", ["", "common prefix "])
def test_nearest_tokens_are_right_across_tasks(shared):
    vocabulary = [f"{shared}{i:04d}" for i in range(2 * STRINGS_PER_TASK + 7)]
    assert find_nearest_tokens(vocabulary[::-1], vocabulary).tolist() == list(range(2 * STRINGS_PER_TASK + 7))[::-1]


def test_the_same_string_under_two_ids_is_a_tie():
    assert find_tied_tokens(["ab", ""], ["b", "ab", None, "ab"])[0].tolist() == [1, 3]


def test_no_strings_have_no_nearest_tokens():
    assert find_nearest_tokens([], ["a"]).tolist() == [] == find_tied_tokens([], ["a"])


@pytest.mark.real
@pytest.mark.parametrize(("pair", "mark"), [("qwen2.5->smollm2", "Ġ"), ("gemma3->smollm2", "▁")])
def test_nearest_and_tied_tokens_equal_the_golden_ones(pair, mark, real_models):
    model = locate_model(str(real_models["smollm2"]))
    vocabulary = Vocabulary(load_tokenizer(model), model.output_size)
    cases = json.loads((GOLDEN / "min_edit_vocab.json").read_bytes())["pairs"][pair]
    wanted = [case["source_token"].replace(mark, "Ġ") for case in cases]
    assert find_nearest_tokens(wanted, vocabulary.token_strings).tolist() == [case["ties"][0] for case in cases]
    ties = find_tied_tokens(wanted, vocabulary.token_strings)
    assert [(len(ids), ids[:64].tolist()) for ids in ties] == [(case["num_ties"], case["ties"]) for case in cases]
