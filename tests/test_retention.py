"""retention.py: each policy keeps what it says, of logits and of rows that are kept already."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuselm import forward, retention
from fuselm.distributions import Distributions, check
from fuselm.retention import Kept, Policy, keep, reduce

ROWS, VOCAB = 7, 211
LARGEST = [
    Policy(policy="top_k", top_k=5),
    Policy(policy="nucleus", mass=0.7, top_k=13),
    Policy(policy="nucleus", mass=0.999, top_k=VOCAB),
    Policy(policy="threshold", threshold=0.02, top_k=11),
    Policy(policy="threshold", threshold=0.9, top_k=3),
]


def drawn_logits(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32))


def kept_of(policy: Policy, logits: torch.Tensor, document: str = "d") -> Kept:
    return keep(policy, logits, *forward.survey(logits), retention.uniforms(document, len(logits)))


def distributions_of(kept: Kept) -> Distributions:
    return Distributions(
        offsets=np.append(0, np.cumsum(kept.counts)).astype(np.int64),
        ids=kept.ids,
        logprobs=kept.logprobs,
        gold=np.zeros(len(kept.counts), np.float32),
        tail=kept.tail,
    )


def wanted_ids(policy: Policy, row: np.ndarray) -> list[int]:
    """One row's ids, by going through them."""
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
    check(d, VOCAB)
    for i, row in enumerate(torch.softmax(logits.double(), dim=1).numpy()):
        ids, logprobs = d.row(i)
        assert ids.tolist() == wanted_ids(policy, row)
        np.testing.assert_allclose(np.exp(logprobs), row[ids], rtol=1e-4)
        assert d.tail[i] == pytest.approx(1 - row[ids].sum(), abs=1e-5)


@pytest.mark.parametrize("policy", LARGEST, ids=str)
def test_what_is_kept_of_all_entries_is_what_is_kept_of_logits(policy):
    logits = drawn_logits()
    everything = distributions_of(kept_of(Policy(policy="top_k", top_k=VOCAB), logits))
    one, other = reduce(policy, everything), distributions_of(kept_of(policy, logits))
    assert np.array_equal(one.offsets, other.offsets) and np.array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.tail, other.tail, atol=1e-5)


@given(st.sampled_from(LARGEST), st.integers(1, 40), st.integers(0, 97))
def test_a_narrower_policy_of_kept_rows_is_right_or_refused(policy, top_k, seed):
    logits = drawn_logits(seed, rows=3)
    stored = distributions_of(kept_of(Policy(policy="top_k", top_k=top_k), logits))
    expected = distributions_of(kept_of(policy, logits))
    try:
        reduced = reduce(policy, stored)
    except ValueError as error:
        assert str(error).startswith(f"{policy.policy}: row ") and (expected.counts >= top_k).any()
    else:
        assert np.array_equal(reduced.ids, expected.ids)
        np.testing.assert_allclose(reduced.tail, expected.tail, atol=1e-5)


def test_draws_of_kept_entries_are_refused():
    stored = distributions_of(kept_of(LARGEST[0], drawn_logits()))
    with pytest.raises(ValueError, match=r"^sampled: cannot be drawn from kept entries"):
        reduce(Policy(policy="sampled", draws=3), stored)


def test_rows_without_entries_stay_so():
    empty = Distributions(
        offsets=np.zeros(4, np.int64),
        ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        gold=np.zeros(3, np.float32),
        tail=np.ones(3, np.float32),
    )
    for policy in LARGEST:
        assert reduce(policy, empty).tail.tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_draws_are_right_on_average(temperature):
    draws, times = 17 if temperature == 1 else 211, 2003
    logits = drawn_logits(rows=1)
    policy = Policy(policy="sampled", draws=draws, temperature=temperature)
    repeated = logits.expand(times, -1)
    kept = kept_of(policy, repeated)
    check(distributions_of(kept), VOCAB)
    assert (kept.tail == 0).all() and kept.counts.max() <= draws
    mean = np.bincount(kept.ids, weights=np.exp(kept.logprobs.astype(np.float64)), minlength=VOCAB) / times
    exact = torch.softmax(logits[0].double(), dim=0).numpy()
    # Independent draws would deviate by sqrt(p / draws / times); weights of another temperature sum to 1 only so far.
    spread = 4 * np.sqrt(exact / draws / times) + 1e-4 + (0 if temperature == 1 else 0.03) * exact
    assert (np.abs(mean - exact) < spread).all()
    if temperature == 1:
        counts = np.exp(kept.logprobs.astype(np.float64)) * draws
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
        rows = np.repeat(np.arange(times), kept.counts)
        for token in np.flatnonzero(exact > 1 / draws):  # systematic: as often as can be
            mine = counts[kept.ids == token]
            assert len(np.unique(rows[kept.ids == token])) == times
            assert np.abs(mine - draws * exact[token]).max() < 1 + 1e-4


def test_draws_do_not_depend_on_what_a_document_is_read_with(monkeypatch):
    policy, logits = Policy(policy="sampled", draws=13), drawn_logits()
    whole = kept_of(policy, logits)
    monkeypatch.setattr(retention, "SAMPLED_AT_ONCE", 2 * VOCAB)
    apart = kept_of(policy, logits)
    other = kept_of(policy, logits, document="e")
    assert np.array_equal(whole.ids, apart.ids) and np.array_equal(whole.logprobs, apart.logprobs)
    assert not np.array_equal(whole.ids, other.ids)
