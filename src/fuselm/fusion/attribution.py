"""Attribute a fused probability to the sources that were fused."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def compute_shifts(
    weights: Float[ndarray, "tokens sources"],
    gold: Float[ndarray, "tokens sources"],
    target_gold: Float[ndarray, "tokens"] | None = None,
) -> Float[ndarray, "tokens sources"]:
    """Return how far each source moves the probability of the token that came: weight x (its probability - before).

    `before` is the target's own probability, or 0 if it is not known. In a mixture, a token's shifts sum to its fused
    probability less the one before; a geometric mean (`log_linear`) has no such sum. `gold` and `target_gold` are
    log-probabilities. A source without weight moves nothing.
    """
    before = 0.0 if target_gold is None else np.exp(target_gold.astype(np.float64))[:, None]
    return weights * (np.exp(gold.astype(np.float64)) - before)
