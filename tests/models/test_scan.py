"""Test scan.py against torch, in both types of logits that it reads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuselm.models import forward, scan
from fuselm.stores import retention
from fuselm.stores.retention import Policy

KINDS = [torch.float32, torch.bfloat16]


def drawn(rows: int, vocab: int, seed: int, kind: torch.dtype) -> torch.Tensor:
    return (7 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(kind)


@given(st.integers(0, 5), st.sampled_from([1, 63, 64, 131, 4099]), st.integers(0, 99), st.sampled_from(KINDS))
def test_log_sum_exp_and_maxima_are_torchs(rows, vocab, seed, kind):
    logits = drawn(rows, vocab, seed, kind)
    found = scan.survey_logits(logits)
    log_z, maxima = found.log_z, found.maxima
    torch.testing.assert_close(log_z.double(), logits.double().logsumexp(dim=1), rtol=2e-7, atol=2e-6)
    expected = [block.float().amax(dim=1) for block in logits.split(scan.BLOCK, dim=1)]
    assert torch.equal(maxima, torch.stack(expected, dim=1))
    masses = [
        (b.double() - logits.amax(dim=1, keepdim=True).double()).exp().sum(dim=1) for b in logits.split(64, dim=1)
    ]
    torch.testing.assert_close(found.sums.double(), torch.stack(masses, dim=1), rtol=1e-6, atol=1e-12)


@given(st.integers(0, 5), st.sampled_from([1, 63, 64, 131, 4099]), st.integers(0, 99), st.sampled_from(KINDS))
def test_entries_above_a_bound_are_found(rows, vocab, seed, kind):
    logits = drawn(rows, vocab, seed, kind)
    bound = torch.linspace(-9, 9, rows)
    counts, ids, values = scan.find_above(logits, scan.survey_logits(logits).maxima, bound)
    found = logits.float() >= bound[:, None]
    assert counts.tolist() == found.sum(dim=1).tolist()
    assert ids.tolist() == found.nonzero()[:, 1].tolist() and values.tolist() == logits.float()[found].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 77, 130])
@pytest.mark.parametrize("odd", [math.nan, -math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_odd_values_stay_what_they_are(odd, at, kind):
    logits = drawn(3, 131, 0, kind)
    logits[1, at] = odd
    logits[2] = -math.inf
    expected = logits.float().logsumexp(dim=1)
    assert torch.allclose(scan.survey_logits(logits).log_z, expected, equal_nan=True)
    logits[2, at] = odd
    assert torch.allclose(scan.survey_logits(logits).log_z, logits.float().logsumexp(dim=1), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_the_rows(kind):
    logits, threads = drawn(17, 211, 0, kind), torch.get_num_threads()
    alone = scan.survey_logits(logits)
    try:
        torch.set_num_threads(3)
        together = scan.survey_logits(logits)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(getattr(alone, name), getattr(together, name)) for name in ("log_z", "maxima", "sums"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 5, 211])
@pytest.mark.parametrize("threshold", [1e-6, 0.02, 0.9])
def test_a_threshold_keeps_the_same_without_looking_for_the_largest(kind, top_k, threshold):
    logits = drawn(7, 211, 0, kind) / 5
    policy = Policy(policy="threshold", threshold=threshold, top_k=top_k)
    found = forward.survey_logits(logits)
    keepers = retention._retain_above_threshold, retention._retain_most_probable
    one, other = (keep(policy, logits, found) for keep in keepers)
    assert np.array_equal(one.counts, other.counts)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)
    np.testing.assert_allclose(one.tail, other.tail, atol=1e-6)
