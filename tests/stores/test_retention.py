"""retention.py: each policy retains the entries that it names, from logits and from rows retained by a wider policy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuselm.models import forward
from fuselm.stores import retention
from fuselm.stores.distributions import Distributions, check_distributions
from fuselm.stores.retention import Policy, RetainedEntries, narrow_rows, retain_entries

ROWS, VOCAB, GOLD = 7, 211, 97
LARGEST = [
    Policy(policy="top_k", top_k=5),
    Policy(policy="nucleus", mass=0.7, top_k=13),
    Policy(policy="nucleus", mass=0.999, top_k=VOCAB),
    Policy(policy="threshold", threshold=0.02, top_k=11),
    Policy(policy="threshold", threshold=0.9, top_k=3),
]


def drawn_logits(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32))


def kept_of(policy: Policy, logits: torch.Tensor, document: str = "d") -> RetainedEntries:
    gold = torch.full((len(logits),), GOLD)
    uniform = retention.draw_uniforms(document, len(logits))
    return retain_entries(policy, logits, forward.survey_logits(logits), gold=gold, uniform=uniform)


def distributions_of(kept: RetainedEntries) -> Distributions:
    return Distributions(
        offsets=np.append(0, np.cumsum(kept.counts)).astype(np.int64),
        ids=kept.ids,
        logprobs=kept.logprobs,
        gold=np.zeros(len(kept.counts), np.float32),
        tail=kept.tail,
    )


def wanted_ids(policy: Policy, row: np.ndarray) -> list[int]:
    """Return one row's ids, by going through them."""
    result, mass = [], 0.0
    for token in np.argsort(-row, kind="stable")[: policy.top_k].tolist():
        wanted = {"top_k": True, "nucleus": mass < policy.mass, "threshold": row[token] >= policy.threshold}
        if result and not wanted[policy.policy]:
            break
        result.append(token)
        mass += row[token]
    return result


@pytest.mark.parametrize("policy", LARGEST, ids=str)
def test_a_policy_keeps_what_it_says(policy):
    logits = drawn_logits()
    d = distributions_of(kept_of(policy, logits))
    check_distributions(d, VOCAB)
    for i, row in enumerate(torch.softmax(logits.double(), dim=1).numpy()):
        ids, logprobs = d.row(i)
        assert ids.tolist() == wanted_ids(policy, row)
        np.testing.assert_allclose(np.exp(logprobs), row[ids], rtol=1e-4)
        assert d.tail[i] == pytest.approx(1 - row[ids].sum(), abs=1e-5)


@pytest.mark.parametrize("policy", LARGEST, ids=str)
def test_narrowing_whole_rows_retains_what_the_policy_retains_of_logits(policy):
    logits = drawn_logits()
    everything = distributions_of(kept_of(Policy(policy="top_k", top_k=VOCAB), logits))
    one, other = narrow_rows(policy, everything), distributions_of(kept_of(policy, logits))
    assert np.array_equal(one.offsets, other.offsets) and np.array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.tail, other.tail, atol=1e-5)


@given(st.sampled_from(LARGEST), st.integers(1, 40), st.integers(0, 97))
def test_narrowing_retained_rows_is_right_or_refused(policy, top_k, seed):
    logits = drawn_logits(seed, rows=3)
    stored = distributions_of(kept_of(Policy(policy="top_k", top_k=top_k), logits))
    expected = distributions_of(kept_of(policy, logits))
    try:
        reduced = narrow_rows(policy, stored)
    except ValueError as error:
        assert str(error).startswith(f"{policy.policy}: row ") and (expected.counts >= top_k).any()
    else:
        assert np.array_equal(reduced.ids, expected.ids)
        np.testing.assert_allclose(reduced.tail, expected.tail, atol=1e-5)


def test_drawing_from_retained_entries_is_refused():
    stored = distributions_of(kept_of(LARGEST[0], drawn_logits()))
    with pytest.raises(ValueError, match=r"^sampled: cannot be drawn from kept entries"):
        narrow_rows(Policy(policy="sampled", draws=3), stored)


def test_rows_without_entries_stay_so():
    empty = Distributions(
        offsets=np.zeros(4, np.int64),
        ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        gold=np.zeros(3, np.float32),
        tail=np.ones(3, np.float32),
    )
    for policy in LARGEST:
        assert narrow_rows(policy, empty).tail.tolist() == [1, 1, 1]


def shared(kept: RetainedEntries) -> np.ndarray:
    """Return probabilities, with the tail's shared among the entries drawn from it."""
    rows = np.repeat(np.arange(len(kept.counts)), kept.counts)
    drawn = np.isneginf(kept.logprobs)
    times = np.bincount(rows[drawn], minlength=len(kept.counts))
    return np.where(drawn, kept.tail[rows] / np.maximum(times, 1)[rows], np.exp(kept.logprobs.astype(np.float64)))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])  # the last is read by torch alone
@pytest.mark.parametrize("draws", [1, 5, 17, 307])
def test_draws_are_right_on_average(draws, kind):
    times, logits = 2003, drawn_logits(rows=1).to(kind)
    policy = Policy(policy="sampled", draws=draws)
    kept = kept_of(policy, logits.expand(times, -1).contiguous())
    check_distributions(distributions_of(kept), VOCAB)
    exact = torch.softmax(logits[0].double(), dim=0).numpy()
    head = exact >= 1 / draws
    head[[exact.argmax(), GOLD]] = True
    tail = exact[~head].sum()
    rows, drawn = np.repeat(np.arange(times), kept.counts), np.isneginf(kept.logprobs)
    assert kept.counts.max() <= draws + 2
    np.testing.assert_allclose(kept.tail, tail, rtol=1e-5)
    for token in np.flatnonzero(head):  # as it is, each time
        np.testing.assert_allclose(
            np.exp(kept.logprobs[(kept.ids == token) & ~drawn]), [exact[token]] * times, rtol=1e-5
        )
    assert not head[kept.ids[drawn]].any()
    assert (np.bincount(rows[drawn], minlength=times) == max(int(tail * draws), 1)).all()
    assert len(set(zip(rows.tolist(), kept.ids.tolist(), strict=True))) == len(rows)
    mean = np.bincount(kept.ids, weights=shared(kept), minlength=VOCAB) / times
    spread = 4 * np.sqrt(exact / draws / times) + 2 / draws / times + 1e-5  # as of independent draws
    assert (np.abs(mean - exact) < spread).all()


@given(st.integers(0, 5), st.sampled_from([1, 63, 64, 131, 4099]), st.integers(1, 70), st.integers(0, 99))
def test_the_kernel_draws_what_torch_draws(rows, vocab, draws, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, vocab, generator=generator)
    gold = torch.randint(vocab, (rows,), generator=generator)
    uniform = retention.draw_uniforms("d", rows)
    found = forward.survey_logits(logits)
    counts, ids, _, tail = retention.scan.draw_entries(logits, found, gold, uniform, draws)
    other = retention._draw_with_torch(logits, found.log_z, gold, uniform, draws)
    np.testing.assert_allclose(tail, other[3], atol=1e-6)
    # A mass that is all but a whole number of draws may be rounded to either side of it.
    near = np.abs(tail * draws - np.round(tail * draws)) < 1e-4
    same = ~near & (np.abs(tail * draws - retention.scan.SLIVER) > 1e-4)
    assert np.array_equal(counts[same], other[0][same])
    one, two = (np.split(x, np.cumsum(c)[:-1]) for x, c in ((ids, counts), (other[1], other[0])))
    differ = sum(not np.array_equal(one[i], two[i]) for i in np.flatnonzero(same))
    assert differ <= 1  # a place on the edge of two tokens


def test_a_row_of_equal_probabilities_is_drawn_from():
    kept = kept_of(Policy(policy="sampled", draws=3), torch.zeros(5, VOCAB))
    assert (kept.counts == 4).all() and (np.isfinite(kept.logprobs).reshape(5, 4).sum(axis=1) == 2).all()


def test_draws_do_not_depend_on_the_other_documents_of_a_batch(monkeypatch):
    policy, logits = Policy(policy="sampled", draws=13), drawn_logits().double()
    whole = kept_of(policy, logits)
    monkeypatch.setattr(retention, "SAMPLED_AT_ONCE", 2 * VOCAB)
    apart = kept_of(policy, logits)
    other = kept_of(policy, logits, document="e")
    assert np.array_equal(whole.ids, apart.ids) and np.array_equal(whole.logprobs, apart.logprobs)
    assert not np.array_equal(whole.ids, other.ids)


@pytest.mark.parametrize("threshold", [0.01, 1 / 13, 0.3])
def test_narrowing_a_sampled_head_is_right_or_refused(threshold):
    policy, logits = Policy(policy="threshold", threshold=threshold, top_k=VOCAB), drawn_logits()
    kept = kept_of(Policy(policy="sampled", draws=13), logits)
    rows = np.repeat(np.arange(ROWS), kept.counts)
    order = np.lexsort((-kept.logprobs, rows))
    order = order[np.isfinite(kept.logprobs[order])]
    counts = np.bincount(rows[order], minlength=ROWS)
    stored = distributions_of(
        RetainedEntries(counts=counts, ids=kept.ids[order], logprobs=kept.logprobs[order], tail=kept.tail)
    )
    if threshold < 1 / 13:
        with pytest.raises(ValueError, match=r"^threshold: row 0 has \d+ entries and a tail of 0\.\d+, fewer than"):
            narrow_rows(policy, stored, draws=13)
        return
    expected = distributions_of(kept_of(policy, logits))
    reduced = narrow_rows(policy, stored, draws=13)
    assert np.array_equal(reduced.counts, expected.counts) and set(reduced.ids) == set(expected.ids)
