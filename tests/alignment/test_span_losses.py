"""Check spans made by hand, and sums that hold for any two tokenizers and every method."""

import drawn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.alignment import aligner as alignment
from fuselm.alignment import span_losses
from fuselm.alignment.aligner import Aligner
from fuselm.results.pages import fidelity_page

METHODS = list(alignment.METHODS)
vocabularies = st.one_of(*drawn.kinds_of_vocabulary.values())


def measure(source, target, text: str, method: str, *, top_k: int | None = 5) -> tuple:
    trace = drawn.trace_of(source, text, np.random.default_rng(7), top_k=top_k)
    aligner = Aligner(source, target, method=method, top_k=7)
    aligned = aligner.align(trace, text)
    cut = span_losses.cut_spans(trace, aligned, text, (source, target))
    mass = span_losses.compute_lost_mass(aligner, method, cut, trace, aligned)
    return trace, aligned, cut, mass, span_losses.judge_spans(cut, aligned, mass)


def by_hand() -> tuple:
    """Measure ab|a| |Ã|©| |ab against a|ba| |é| |a|b."""
    source, target = drawn.byte_pairs([(0, 1)]), drawn.byte_pairs([(1, 0), (3, 4)])
    return source, target, "aba é ab"


def test_kinds_and_shares_of_spans_made_by_hand():
    *_, cut, _, _ = measure(*by_hand(), "exact")
    assert cut.edges.tolist() == [0, 3, 4, 6, 7, 9]
    assert [span_losses.KINDS[k] for k in cut.kinds] == [
        "many_to_many",
        "one_to_one",
        "many_to_one",
        "one_to_one",
        "one_to_many",
    ]
    assert span_losses.summarize_kinds([cut]) == {
        "one_to_one": {"spans": 2, "target_tokens": pytest.approx(2 / 7), "bytes": pytest.approx(2 / 9)},
        "one_to_many": {"spans": 1, "target_tokens": pytest.approx(2 / 7), "bytes": pytest.approx(2 / 9)},
        "many_to_one": {"spans": 1, "target_tokens": pytest.approx(1 / 7), "bytes": pytest.approx(2 / 9)},
        "many_to_many": {"spans": 1, "target_tokens": pytest.approx(2 / 7), "bytes": pytest.approx(3 / 9)},
    }


def test_spans_without_information_count_as_lost():
    *_, cut, _, outcome = measure(*by_hand(), "exact")
    assert outcome.informed.tolist() == [False, True, False, True, False]
    assert outcome.aligned[[0, 2, 4]].tolist() == [0, 0, 0]
    lost = span_losses.compute_lost_bits(cut, outcome)
    assert lost[[0, 2, 4]] == pytest.approx(cut.own[[0, 2, 4]]) and lost[[1, 3]] == pytest.approx(0, abs=1e-5)
    bits = span_losses.summarize_causes([cut], [outcome])["bits"]
    assert bits["split_differently"] == pytest.approx(cut.own[[0, 2, 4]].sum() / cut.own.sum())
    assert bits["not_paired"] == 0
    assert span_losses.summarize_informed([cut], [outcome])["own_bits"] == pytest.approx(1 - bits["split_differently"])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60)
@given(source=vocabularies, target=vocabularies, text=drawn.texts)
def test_spans_sum_to_the_text(method, source, target, text):
    reader = source()
    trace, aligned, cut, mass, outcome = measure(reader, target(), text, method)
    bits = -trace.distributions.gold.sum(dtype=float) / np.log(2)
    assert cut.own.sum() == pytest.approx(bits + 8 * reader.segment(text).unspelled_bytes)
    assert outcome.aligned.sum() == pytest.approx(-aligned.distributions.gold.sum(dtype=float) / np.log(2))
    assert cut.sizes.sum() == trace.size and (cut.sizes[1:] > 0).all()
    assert cut.source_counts.sum() == len(trace.tokens) and cut.target_counts.sum() == len(aligned.tokens)
    assert outcome.informed_tokens.sum() == aligned.distributions.informed.sum()
    np.testing.assert_allclose(mass.sum(axis=1), aligned.distributions.tail, atol=1e-4)
    assert outcome.mass.sum() == pytest.approx(mass.sum()) and (mass >= -1e-6).all()


def test_spans_of_a_source_with_the_targets_tokens_are_one_to_one():
    vocabulary = drawn.byte_pairs([(0, 1)])
    trace, aligned, cut, _, outcome = measure(vocabulary, vocabulary, "ab éb", "span")
    assert aligned is trace and not cut.kinds.any() and outcome.informed.all()
    assert span_losses.compute_lost_bits(cut, outcome).tolist() == [0] * len(cut.own)
    causes = span_losses.summarize_causes([cut], [outcome])["mass"]
    assert causes["tail_of_the_source"] == pytest.approx(trace.distributions.tail.mean())


def test_an_empty_text_is_one_empty_span():
    vocabulary = drawn.byte_pairs([(0, 1)])
    *_, cut, _, outcome = measure(vocabulary, drawn.byte_pairs([]), "", "span")
    assert cut.edges.tolist() == [0, 0] and span_losses.summarize_informed([cut], [outcome])["own_bits"] == 1


def test_tokens_of_one_character_belong_to_its_span():
    """A token without text belongs to the byte before it, and a space before the text to the first span."""
    assert span_losses._find_spans(np.array([0, 2, 2]), 5, np.array([0, 2, 5])).tolist() == [0, 0, 1]
    assert span_losses._find_spans(np.array([-1, 0, 2]), 5, np.array([0, 2, 5])).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("part", "category"),
    [
        (" word", "words"),
        ("née", "words"),
        ("x_1y", "words"),
        (" 42", "digits"),
        ("():", "punctuation"),
        (" +=", "punctuation"),
        ("\n    ", "white_space"),
        ("你好", "CJK"),
        ("かな。", "CJK"),
        ("한", "CJK"),
        (" 🙂", "emoji"),
        ("❤️", "emoji"),
        ("\x07", "other"),
    ],
)
def test_the_category_is_the_one_of_most_bytes(part, category):
    before = "ab\n"
    found = span_losses._classify_spans(before + part, np.array([0, 3, 3 + len(part.encode())]))
    assert [span_losses.CATEGORIES[c] for c in found] == ["words", category]


def test_a_split_character_keeps_its_category():
    assert {span_losses.CATEGORIES[c] for c in span_losses._classify_spans("你", np.array([0, 1, 3]))} == {"CJK"}


def test_unknown_tokens_have_a_category_of_their_own():
    source, target = drawn.word_pieces([]), drawn.byte_pairs([])
    *_, cut, _, outcome = measure(source, target, "ab ?", "span")
    rows = span_losses.summarize_categories([cut], [outcome])
    assert "unknown_tokens" in rows and sum(row["bytes"] for row in rows.values()) == pytest.approx(1)


@settings(max_examples=40)
@given(source=vocabularies, target=vocabularies, text=drawn.texts)
def test_drawn_tokens_tile_the_grid(source, target, text):
    pair = source(), target()
    *_, cut, _, _ = measure(*pair, text, "exact")
    drawing = fidelity_page.draw_span(cut, len(cut.own) // 2, pair)
    for row in (1, 2):
        ends = 0
        for box in (b for b in drawing["boxes"] if b["row"] == row):
            assert box["end"] > box["begin"] >= ends
            ends = box["end"]
        assert ends <= drawing["columns"] + 1
