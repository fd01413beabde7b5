"""Check branches.py against explicit hypotheses, by hand, and against what every row must keep."""

import branch_rows
import drawn
import enumeration
import numpy as np
import pytest

from fuselm.alignment import branch_splits
from fuselm.alignment.aligner import METHODS, Aligner, align_branches
from fuselm.alignment.branch_tails import _find_joined_bytes, _group_followers
from fuselm.alignment.follower_draws import draw_evenly, find_follower_end
from fuselm.alignment.followers import NOTHING, Followers
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model

LETTERS = enumeration.vocabulary([])
AB = enumeration.vocabulary([("a", "b")])
MERGES = [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a")]


def rows_of(text: str, rows: list[dict[str, float]], texts: list[str]) -> list[dict[str, float]]:
    """Return the target's rows of a source of letters, by the bytes of tokens."""
    segmentation = LETTERS.segment(text)
    by_id = [{LETTERS.id_by_bytes[c.encode()]: p for c, p in row.items()} for row in rows]
    trace = enumeration.trace_of(segmentation, by_id)
    aligned = Aligner(LETTERS, AB, method="branches", texts=texts).align(trace, text)
    return [{AB.token_bytes[i].decode(): p for i, p in row.items()} for row in drawn.rows_of(aligned.distributions)]


def test_the_branch_that_was_taken_is_lengthened_by_the_next_row():
    first, second, *_ = rows_of(
        "aacc", [{"a": 0.6, "b": 0.4}, {"a": 0.7, "b": 0.3}, {"c": 1.0}, {"c": 1.0}], ["ab" * 50]
    )
    assert first == pytest.approx({"a": 0.6 * 0.7, "ab": 0.6 * 0.3, "b": 0.4}, rel=1e-5)
    assert second["a"] == pytest.approx(1.0)  # b would have made the token before it longer


def test_branches_that_were_not_taken_go_on_as_texts_do():
    texts = ["abcabcaccaccbb" * 20]  # a comes before b and before c, as often
    first = rows_of("bbcc", [{"a": 0.6, "b": 0.4}, {"b": 1.0}, {"c": 1.0}, {"c": 1.0}], texts)[0]
    assert first == pytest.approx({"ab": 0.3, "a": 0.3, "b": 0.4}, abs=0.02)


def test_without_texts_a_branch_keeps_its_own_tokens():
    first = rows_of("bbcc", [{"a": 0.6, "b": 0.4}, {"b": 1.0}, {"c": 1.0}, {"c": 1.0}], [])[0]
    assert first == pytest.approx({"a": 0.6, "b": 0.4}, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_rows_equal_explicit_hypotheses(seed):
    source, target = AB, enumeration.vocabulary(MERGES)
    chain = enumeration.random_chain(seed)
    texts = [chain.write(40, np.random.default_rng(n)) for n in range(5)]
    aligner, followers = Aligner(source, target, method="branches", texts=texts, top_k=50), Followers(source, texts)
    follow = branch_rows.follow_with_words(source, target, followers)
    for text, trace in enumeration.write_documents(chain, source, count=7, length=13):
        segmentation = target.segment(text)
        expected = branch_rows.branch_rows(source, target, trace, segmentation, text.encode(), follow)
        found = drawn.rows_of(aligner.align(trace, text).distributions)
        for row, slow in zip(found, expected, strict=True):
            assert row == pytest.approx(slow, abs=1e-5)


def test_the_gold_probability_is_that_of_span_and_as_many_tokens_are_informed(byte_level, sentence_piece, texts):
    source, target = (load_vocabulary(locate_model(str(folder))) for folder in (byte_level, sentence_piece))
    for row in texts[:5]:
        trace = drawn.trace_of(source, row["text"], np.random.default_rng(0), top_k=5)
        span, branches = (
            Aligner(source, target, method=m, texts=[row["text"]]).align(trace, row["text"]).distributions
            for m in ("span", "branches")
        )
        np.testing.assert_array_equal(branches.gold, span.gold)
        np.testing.assert_array_equal(branches.informed, span.informed)


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_what_was_aligned_before(method, byte_level, sentence_piece, texts, monkeypatch):
    source, target = (load_vocabulary(locate_model(str(folder))) for folder in (byte_level, sentence_piece))
    documents = [row["text"] for row in texts[:12]]
    traces = [drawn.trace_of(source, text, np.random.default_rng(0), top_k=12) for text in documents]
    for trace in traces:  # as equal as a store makes them, so that many entries are level at the cut
        trace.distributions.logprobs[:] = np.round(trace.distributions.logprobs) - 0.5

    def align(order, most_bytes=branch_splits.MOST_BYTES):
        monkeypatch.setattr(branch_splits, "MOST_BYTES", most_bytes)
        aligner = Aligner(source, target, method=method, texts=documents, top_k=6)
        return {n: aligner.align(traces[n], documents[n]).distributions for n in order}

    forwards = align(range(12))
    for other in (align(reversed(range(12))), align(range(12), most_bytes=0)):
        for n in range(12):
            for field in ("offsets", "ids", "logprobs", "gold", "tail"):
                np.testing.assert_array_equal(getattr(other[n], field), getattr(forwards[n], field))


def test_what_follows_is_in_one_order_however_its_strings_are_numbered():
    first, cut = np.array([0, 4, 7]), np.zeros(7, bool)
    joined, following = np.array([3, 1, 3, 2, 0, 2, 0]), np.array([5, -1, 4, 7, 9, 9, 8])
    renumbered = np.array([2, 3, 0, 1])
    one = _group_followers(first, np.arange(1.0, 8.0), joined, cut, following)
    other = _group_followers(first, np.arange(1.0, 8.0), renumbered[joined], cut, following)
    np.testing.assert_array_equal(renumbered[one[1]], other[1])
    for k in (0, 2, 3, 4, 5):
        np.testing.assert_array_equal(one[k], other[k])


def test_followers_are_shares_and_rare_tokens_borrow():
    followers = Followers(LETTERS, ["abab" * 10, "acac" * 10])
    for token in range(LETTERS.size):
        assert sum(followers.of(token).values()) == pytest.approx(1.0)
    a, b = LETTERS.id_by_bytes[b"a"], LETTERS.id_by_bytes[b"b"]
    assert {follower[:1] for follower in followers.of(a)} >= {b"b", b"c"}
    assert Followers(LETTERS, []).of(b) == {NOTHING: 1.0}


def test_a_systematic_sample_has_the_shares_of_the_whole():
    chosen = draw_evenly(np.arange(1.0, 101.0), 10)
    assert (chosen > 0).sum() == 10 and chosen.sum() == pytest.approx(10.0)
    assert chosen[70:].sum() == pytest.approx(5.0, abs=1.1)
    assert draw_evenly(np.array([3.0, 1.0]), 10).tolist() == [7.5, 2.5]
    assert not len(draw_evenly(np.zeros(0), 10)) and not draw_evenly(np.zeros(2), 10).any()


def test_bytes_are_joined_if_a_token_has_one_behind_the_other():
    joined = _find_joined_bytes(enumeration.vocabulary([("a", "b"), ("ab", "c")]))
    assert {(chr(x), chr(y)) for x, y in np.argwhere(joined)} >= {("a", "b"), ("b", "c")}
    assert not joined[ord("b"), ord("a")] and not joined[ord("c"), ord("c")]


def test_what_follows_ends_with_the_turn():
    def cut(data: bytes, begin: int) -> bytes:
        return data[begin : find_follower_end(np.frombuffer(data, np.uint8), begin)]

    assert [cut(b"ab\xffabcdefgh", begin) for begin in (1, 2, 3, 11)] == [b"b\xff", b"\xff", b"", b""]
    assert [cut(data, 1) for data in (b"a       bc", b"a  ", "aééééé".encode())] == [b"       b", b"", "ééé".encode()]


def test_the_end_of_a_turn_is_a_token_like_others():
    source, target = LETTERS.spell_ends([0]), AB.spell_ends([0])
    end, (a, b) = 0, (LETTERS.id_by_bytes[c] for c in (b"a", b"b"))
    segmentation = drawn.Segmentation(
        ids=np.array([a, end], np.int32), starts=np.array([0, 1], np.int32), spelled=np.ones(2, bool), size=2
    )
    trace = enumeration.trace_of(segmentation, [{a: 0.6, b: 0.4}, {end: 0.7, b: 0.3}])
    aligned = align_branches(Aligner(source, target, method="branches"), trace, segmentation, b"a\xff")
    first, second = drawn.rows_of(aligned)
    assert first == pytest.approx({a: 0.6 * 0.7, AB.id_by_bytes[b"ab"]: 0.6 * 0.3, b: 0.4}, rel=1e-5)
    assert second == pytest.approx({end: 1.0})
