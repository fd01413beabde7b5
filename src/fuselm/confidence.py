"""How far a fused row is to be believed, a number from 0 to 1 for each token: for weights of the two losses by token.

Pure functions of what is known when training: the row itself, the gold token's log-probability in it, and what the
target gives to that token (its own aligned trace's, where it is a source; or, while it trains, minus its loss).
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm import tails
from fuselm.distributions import Distributions

PerToken = Float[ndarray, "tokens"]


def certainty(rows: Distributions, vocabulary_size: int) -> PerToken:
    """1 where a row is sure of one token, 0 where it has no idea. Does not know the token that comes."""
    return np.clip(1.0 - tails.entropy(rows, vocabulary_size) / np.log(vocabulary_size), 0.0, 1.0)


def posterior(fused: PerToken, own: PerToken) -> PerToken:
    """The probability that the fused row, and not the target's own, is what the gold token came from, at even odds.

    Takes log-probabilities of the gold token. Knows the token that comes. Where both rule it out, 1/2.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        beyond = np.where(fused == own, 0.0, own - fused)
        return 1.0 / (1.0 + np.exp(beyond))


def lambdas(confidence: PerToken, lambda_clm: float) -> PerToken:
    """Each token's weight of the causal-LM loss: `lambda_clm` where the fused row is believed, 1 where it is not."""
    return 1.0 - (1.0 - lambda_clm) * confidence
