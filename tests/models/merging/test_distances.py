"""Distances between models against plain numpy, whatever the blocks."""

import numpy as np
import pytest
import torch

from fuselm.models.merging.distances import Distances


def test_distances_are_those_of_whole_tensors():
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(37, 11, generator=generator) for _ in range(3))
    a[0], b[1] = base[0], base[1]
    found = Distances()
    found.add([models[begin : begin + 5] for models in (base, a, b)] for begin in range(0, 37, 5))
    x, y = (a - base).double().numpy().ravel(), (b - base).double().numpy().ravel()
    assert found.parameters == base.numel()
    lengths = [np.linalg.norm(d) / np.linalg.norm(base.double().numpy()) for d in (x, y)]
    assert found.relative_lengths == pytest.approx(lengths)
    assert found.compute_cosine(0, 1) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    both = (x != 0) & (y != 0)
    assert found.compute_agreement(0, 1) == pytest.approx((np.sign(x) == np.sign(y))[both].mean())


def test_models_that_have_not_moved_have_no_angle():
    base = torch.ones(3, 2)
    found = Distances()
    found.add([[base, base, 2 * base]])
    assert found.relative_lengths == [0.0, 1.0]
    assert found.compute_cosine(0, 1) is None and found.compute_agreement(0, 1) is None
    found = Distances()
    found.add([[0 * base, base, base]])
    assert found.relative_lengths == [None, None] and found.compute_cosine(0, 1) == pytest.approx(1)
