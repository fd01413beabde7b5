"""Check the weights that sources begin with, and spread them over domains."""

import math
from collections.abc import Mapping, Sequence

Weights = Mapping[str, float | Mapping[str, float]]  # by source, or by source and domain; 1 where nothing is given


def check_weights(weights: Weights) -> None:
    """Raise `ValueError` if a weight is negative or not finite."""
    for name, given in weights.items():
        for weight in given.values() if isinstance(given, Mapping) else (given,):
            if not 0 <= weight < math.inf:
                raise ValueError(f"fuse.weights.{name}: a weight is 0 or more (got {weight:g})")


def spread_weights(weights: Weights, sources: Sequence[str], domains: Sequence[str]) -> dict[str, list[float]]:
    """Return each domain's weights in the order of `sources`.

    Raises:
        ValueError: If a weight is impossible, a domain is unknown, or no source has a weight above 0 in a domain.
    """
    check_weights(weights)
    for name, given in weights.items():
        for domain in given if isinstance(given, Mapping) else ():
            if domain not in domains:
                there = ", ".join(domains)
                raise ValueError(f"fuse.weights.{name}: no text is of domain '{domain}'; there are {there}")
    spread: dict[str, list[float]] = {}
    for domain in domains:
        given_to = [weights.get(name, 1.0) for name in sources]
        spread[domain] = [float(of.get(domain, 1.0) if isinstance(of, Mapping) else of) for of in given_to]
        if not any(spread[domain]):
            raise ValueError(f"fuse.weights: no source has a part in domain '{domain}'; give one a weight above 0")
    return spread
