"""Compare aligner.py with the loops in reference.py, and check the identities of each method."""

import itertools
import json
import math
from pathlib import Path

import drawn
import numpy as np
import pytest
import reference
from aligned_rows import faithful, merged, span_rows, total  # noqa: F401
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fuselm.alignment.aligner import METHODS, Aligner
from fuselm.alignment.fidelity import Fidelity
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import check_distributions
from fuselm.stores.store import Trace

TINY = ["byte_level", "sentence_piece", "word_piece"]
PAIRS = list(itertools.product(TINY, repeat=2))
EVERYTHING = 10_000  # a top_k that keeps all entries
UNSEEN = Path(__file__).parents[1] / "data" / "unseen.jsonl"
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
few = settings(max_examples=40)


def load_vocabulary_of(folder: Path) -> Vocabulary:
    model = locate_model(str(folder))
    return Vocabulary(load_tokenizer(model), model.output_size)


@pytest.fixture(scope="module")
def tiny(byte_level, sentence_piece, word_piece) -> dict[str, Vocabulary]:
    return {folder.name: load_vocabulary_of(folder) for folder in (byte_level, sentence_piece, word_piece)}


# ---- span


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
def test_span_equals_the_reference_on_random_vocabularies(source_kind, target_kind):
    @few
    @given(
        drawn.kinds_of_vocabulary[source_kind],
        drawn.kinds_of_vocabulary[target_kind],
        drawn.texts,
        seeds,
        st.sampled_from([1, 2, 5, None]),
    )
    def equal(source, target, text, random, top_k):
        source, target = source(), target()
        trace = drawn.trace_of(source, text, random, top_k=top_k)
        aligned = Aligner(source, target, top_k=EVERYTHING, method="span").align(trace, text)
        check_distributions(aligned.distributions, target.size)
        if source.token_bytes == target.token_bytes and np.array_equal(aligned.tokens, trace.tokens):
            assert_rows_of_spelled_tokens_stay(source, trace, aligned, text)
            return
        rows, tails = span_rows(source, target, trace, text)
        drawn.assert_same(aligned.distributions, rows, tails)

    equal()


def assert_rows_of_spelled_tokens_stay(source: Vocabulary, trace: Trace, aligned: Trace, text: str) -> None:
    """Check that with the same tokens a row is the source's own, or has no entries if its token is not spelled."""
    for i, is_spelled in enumerate(source.find_spelled(trace.tokens, trace.starts, text)):
        kept, own = aligned.distributions.row(i), trace.distributions.row(i)
        assert all(map(np.array_equal, kept, own)) if is_spelled else not len(kept[0])


def test_the_same_vocabulary_keeps_even_the_entries_that_spell_nothing():
    vocabulary = drawn.word_pieces(["aa"], lower_case=True)
    trace = drawn.trace_of(vocabulary, "aé", np.random.default_rng(0), top_k=1)
    aligned = Aligner(vocabulary, drawn.word_pieces(["aa"], lower_case=True), method="span").align(trace, "aé")
    assert_rows_of_spelled_tokens_stay(vocabulary, trace, aligned, "aé")


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
def test_span_equals_the_reference_on_real_text(source_kind, target_kind, tiny, texts):
    source, target = tiny[source_kind], tiny[target_kind]
    text = texts[11]["text"][:97] + "\r\n\té e\u0301 日本 ▁ <s> [UNK]"
    trace = drawn.trace_of(source, text, np.random.default_rng(0), top_k=13)
    aligned = Aligner(source, target, top_k=EVERYTHING, method="span").align(trace, text)
    if source_kind != target_kind:
        drawn.assert_same(aligned.distributions, *span_rows(source, target, trace, text))


def texts_for(*kinds: str) -> st.SearchStrategy[str]:
    return drawn.word_texts if "word_piece" in kinds else drawn.texts


@pytest.mark.parametrize("target_kind", TINY)
@few
@given(data=st.data(), random=seeds)
def test_span_conserves_the_probability_of_a_text_if_the_source_reads_bytes(target_kind, data, random):
    source, target = drawn.byte_pairs([]), data.draw(drawn.kinds_of_vocabulary[target_kind])()
    text = data.draw(texts_for(target_kind))
    assume(faithful(target, text))
    trace = drawn.trace_of(source, text, random)
    assert total(Aligner(source, target, method="span").align(trace, text)) == pytest.approx(total(trace), rel=1e-6)


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
@few
@given(data=st.data(), random=seeds)
def test_span_loses_nothing_if_the_source_keeps_everything(source_kind, target_kind, data, random):
    """Other ways to the same tokens only add probability; a dummy prefix, which is not in the text, costs nothing."""
    source = data.draw(drawn.kinds_of_vocabulary[source_kind])()
    target = data.draw(drawn.kinds_of_vocabulary[target_kind])()
    text = data.draw(texts_for(source_kind, target_kind))
    assume(faithful(source, text) and faithful(target, text))
    trace = drawn.trace_of(source, text, random)
    assert total(Aligner(source, target, method="span").align(trace, text)) >= total(trace) * (1 + 1e-5) - 1e-5


def test_span_adds_up_all_ways_of_the_source_to_a_text():
    """Compare the rows of 'ab' with numbers by hand; the source has a, b and ab, and the target a and b."""
    source, target = drawn.byte_pairs([(0, 1)]), drawn.byte_pairs([])
    a, b, ab = (source.id_by_bytes[s] for s in (b"a", b"b", b"ab"))
    row = {ab: 0.5, a: 0.25, b: 0.125}
    trace = drawn.trace(source.segment("ab"), drawn.distributions_of([row], [0.125], [math.log(0.5)]))
    aligned = drawn.rows_of(Aligner(source, target, method="span").align(trace, "ab").distributions)
    assert aligned[0] == pytest.approx({target.id_by_bytes[b"a"]: 0.75, target.id_by_bytes[b"b"]: 0.125})
    assert aligned[1] == pytest.approx(
        {target.id_by_bytes[b"b"]: 0.5 / 0.75}
    )  # no other id of the source continues after a


def test_span_ignores_a_space_that_only_the_source_puts_before_the_text():
    source = drawn.byte_pairs([(2, 0), (2, 1)], dummy_prefix=True)
    target = drawn.byte_pairs([(2, 0), (2, 1)])
    after_space = {source.id_by_bytes[b" a"]: 0.5, source.id_by_bytes[b" b"]: 0.25}
    row = after_space | {source.id_by_bytes[b"b"]: 0.25}
    trace = drawn.trace(source.segment("a"), drawn.distributions_of([row], [0.0], [math.log(0.5)]))
    aligned = Aligner(source, target, method="span").align(trace, "a")
    expected = {target.id_by_bytes[b"a"]: 2 / 3, target.id_by_bytes[b"b"]: 1 / 3}
    assert drawn.rows_of(aligned.distributions) == [pytest.approx(expected)]


def test_span_accepts_a_gold_token_without_probability():
    source, target = drawn.byte_pairs([(0, 1)]), drawn.byte_pairs([])
    row = {source.id_by_bytes[b"b"]: 1.0}
    trace = drawn.trace(source.segment("ab"), drawn.distributions_of([row], [0.0], [-2000.0]))
    aligned = Aligner(source, target, method="span").align(trace, "ab")
    assert not np.isnan(aligned.distributions.gold).any()


def test_span_aligns_one_byte_and_an_empty_text():
    source, target = drawn.byte_pairs([(0, 0)]), drawn.byte_pairs([], dummy_prefix=True)
    for text, tokens in (("", 0), ("b", 2)):
        aligned = Aligner(source, target, method="span").align(
            drawn.trace_of(source, text, np.random.default_rng(0)), text
        )
        assert len(aligned.tokens) == len(aligned.distributions) == tokens
        check_distributions(aligned.distributions, target.size)


# ---- exact and mined


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
@few
@given(data=st.data(), random=seeds)
def test_exact_equals_the_reference(source_kind, target_kind, data, random):
    source = data.draw(drawn.kinds_of_vocabulary[source_kind])()
    target = data.draw(drawn.kinds_of_vocabulary[target_kind])()
    text = data.draw(drawn.texts)
    trace = drawn.trace_of(source, text, random, top_k=3)
    aligned = Aligner(source, target, method="exact").align(trace, text)
    if source.token_bytes == target.token_bytes:
        return
    segmentation = target.segment(text)
    rows, tails = reference.exact_rows(
        drawn.spans(segmentation.starts, segmentation.size),
        segmentation.ids.tolist(),
        drawn.source_trace(trace),
        source.token_bytes,
        target.token_bytes,
        {i for i, string in enumerate(target.token_strings) if string and string.startswith("<0x")},
    )
    own = source.segment(text)
    for i, start in enumerate(segmentation.starts):
        if not (segmentation.spelled[i] and own.spelled[own.starts == start].all()):  # it has other bytes than the text
            rows[i], tails[i] = {}, 1.0
    drawn.assert_same(aligned.distributions, rows, tails)


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
@few
@given(data=st.data(), random=seeds)
def test_mined_equals_the_reference(source_kind, target_kind, data, random):
    source = data.draw(drawn.kinds_of_vocabulary[source_kind])()
    target = data.draw(drawn.kinds_of_vocabulary[target_kind])()
    text = data.draw(drawn.texts)
    trace = drawn.trace_of(source, text, random, top_k=3)
    aligned = Aligner(source, target, method="mined").align(trace, text)
    segmentation = target.segment(text)
    if source.token_bytes == target.token_bytes or not (faithful(source, text) and faithful(target, text)):
        assert not (aligned.distributions.informed & ~segmentation.spelled).any()
        return
    marks = {"byte_level": "Ġ", "sentence_piece": "▁", "word_piece": ""}
    strings = {s: i for i, s in reversed(list(enumerate(target.token_strings))) if s is not None}
    id_map = {}
    for token, string in enumerate(source.token_strings):
        if string is not None:
            string = string.replace("Ġ", "▁").replace("▁", marks[target_kind])
            nearest = reference.min_edit_ids(string, strings, "▁", "▁")[1][0]
            if target.token_bytes[nearest] is not None:
                id_map[token] = nearest
    needed = set(trace.tokens.tolist()) | set(trace.distributions.ids.tolist())
    rows, tails = reference.mined_rows(
        [source.token_strings[i] for i in trace.tokens],
        [target.token_strings[i] for i in segmentation.ids],
        segmentation.ids.tolist(),
        drawn.source_trace(trace),
        {token: mapped for token, mapped in id_map.items() if token in needed},
    )
    if all(
        source.token_strings[i] is not None for i in needed
    ):  # rows of the output layer without a token are unmapped
        drawn.assert_same(aligned.distributions, rows, tails)


def test_exact_uses_the_token_that_the_target_uses():
    """ "a" and the byte fallback token <0x61> stand for the same byte, and the target uses "a"."""
    source, target = drawn.byte_pairs([]), drawn.byte_pairs([], dummy_prefix=False)
    trace = drawn.trace_of(source, "ab", np.random.default_rng(0))
    aligned = Aligner(source, target, method="exact").align(trace, "ab")
    assert total(aligned) == pytest.approx(total(trace), rel=1e-5)


# ---- all methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TINY)
def test_aligning_to_the_same_tokenizer_changes_nothing(method, kind, tiny, texts, request):
    vocabulary, same = tiny[kind], load_vocabulary_of(request.getfixturevalue(kind))
    for row in texts[::5]:
        trace = drawn.trace_of(vocabulary, row["text"], np.random.default_rng(0), top_k=5)
        aligned, spelled = Aligner(vocabulary, same, method=method).align(trace, row["text"]), True
        if not faithful(vocabulary, row["text"]):
            spelled = vocabulary.segment(row["text"]).spelled
            assert aligned.tokens.tolist() == trace.tokens.tolist() and aligned.nats > trace.nats
        else:
            assert aligned is trace
        assert np.array_equal(aligned.distributions.informed, trace.distributions.informed & spelled)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
def test_lossy_text_is_covered_and_no_special_token_appears(method, source_kind, target_kind, tiny):
    """The text has precomposed characters, capitals, U+2581, names of special tokens, CRLF, tabs and joined emoji."""
    source, target = tiny[source_kind], tiny[target_kind]
    rows = [json.loads(line)["text"] for line in UNSEEN.read_text(encoding="utf-8").splitlines()]
    odd = ["", "a", "\n", "\t", "é", "e\u0301", "▁", "<s>", "<|endoftext|>", "[CLS]", "👨‍👩‍👧‍👦", "a\r\nb", "  "]
    aligner = Aligner(source, target, method=method, top_k=7)
    sums = Fidelity()
    for text in [*odd, *(row[:211] for row in rows[5:20:2])]:
        trace = drawn.trace_of(source, text, np.random.default_rng(0), top_k=5)
        aligned = aligner.align(trace, text)
        check_distributions(aligned.distributions, target.size)
        assert aligned.distributions.counts.max(initial=0) <= 7
        if source.token_bytes != target.token_bytes:
            assert all(target.token_bytes[i] is not None for i in aligned.distributions.ids if i not in aligned.tokens)
        assert np.isfinite(aligned.distributions.gold).all()
        lacking = source.segment(text).unspelled_bytes
        assert aligned.size == trace.size and aligned.nats == pytest.approx(trace.nats + 8 * math.log(2) * lacking)
        has_text, spelled = np.diff(np.append(aligned.starts, aligned.size)) > 0, target.segment(text).spelled
        if method == "span" and len(trace.tokens) and not lacking and spelled.all() and aligned is not trace:
            assert np.array_equal(aligned.distributions.informed, has_text)
        assert not (aligned.distributions.informed & ~spelled).any()
        sums.add(trace, aligned, lacking)
    if source_kind != target_kind and method != "mined":
        assert 0 < sums.summarize()["coverage"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_only_the_top_k_entries_are_kept_and_the_rest_is_tail(method, tiny, texts):
    source, target, text = tiny["byte_level"], tiny["sentence_piece"], texts[0]["text"]
    trace = drawn.trace_of(source, text, np.random.default_rng(0), top_k=31)
    everything = Aligner(source, target, method=method, top_k=EVERYTHING).align(trace, text)
    cut = Aligner(source, target, method=method, top_k=3).align(trace, text)
    assert cut.distributions.counts.max() == 3
    np.testing.assert_array_equal(cut.distributions.gold, everything.distributions.gold)
    kept = drawn.rows_of(everything.distributions)
    for row, whole in zip(drawn.rows_of(cut.distributions), kept, strict=True):
        assert list(row.items()) == list(whole.items())[:3]


def test_another_text_is_refused(tiny):
    vocabulary = tiny["byte_level"]
    trace = drawn.trace_of(vocabulary, "some text", np.random.default_rng(0))
    aligner = Aligner(vocabulary, tiny["word_piece"], method="span")
    with pytest.raises(
        ValueError, match=r"^document d: captured from 9 bytes of text, which now has 10; capture again$"
    ):
        aligner.align(trace, "some text!")
