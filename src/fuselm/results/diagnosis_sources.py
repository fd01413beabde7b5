"""Judge each source of a diagnosis by what the mixture loses without it, and say what to do with it next."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from fuselm.fusion.fuse import LEARNED_ON
from fuselm.fusion.weights import learn_weights
from fuselm.models.segmentation import compute_bits_per_byte
from fuselm.stores.store import Trace

# The share of the mixture's bits that a source has to save: to be kept, and to be kept although it adds little.
LEAST_ADDED = {"keep": 0.02, "keep, it adds little": 0.005}
PREFIX_TOKENS = 256


class GoldTokens:
    """Collect what every source gives to the tokens that came, up to `LEARNED_ON` tokens of a domain."""

    def __init__(self, domains: Sequence[str]):
        self._gold: dict[str, list[ndarray]] = {domain: [] for domain in domains}
        self._tokens = dict.fromkeys(domains, 0)
        self._bytes = dict.fromkeys(domains, 0)

    def add(self, domain: str, traces: Sequence[Trace], compared: Bool[ndarray, "tokens"]) -> None:
        """Add the compared tokens of a document."""
        if self._tokens[domain] >= LEARNED_ON:
            return
        gold = np.stack([trace.distributions.gold for trace in traces], axis=1)
        self._gold[domain].append(gold[compared].astype(np.float64))
        self._tokens[domain] += int(compared.sum())
        self._bytes[domain] += int(traces[0].lengths[compared].sum())

    def measure_added(
        self, names: Sequence[str], left_out: Mapping[str, Set[str]]
    ) -> dict[str, dict[str, float | None]]:
        """Return by source and domain how many bits per byte the best fixed mixture needs more without the source.

        The weights are learned again without it. A value is None where the source is not compared, by `left_out`, or is
        the only one that is. `average` is the mean over the domains with a value.
        """
        added: dict[str, dict[str, float | None]] = {name: {} for name in names}
        for domain, parts in self._gold.items():
            gold = np.concatenate(parts)
            heard = [n for n, name in enumerate(names) if name not in left_out[domain]]
            whole = _measure_mixture(gold[:, heard])
            for n, name in enumerate(names):
                others = [other for other in heard if other != n]
                added[name][domain] = None
                if n in heard and others:
                    more = _measure_mixture(gold[:, others]) - whole
                    added[name][domain] = compute_bits_per_byte(max(more, 0.0), self._bytes[domain])
        for of_source in added.values():
            known = [value for value in of_source.values() if value is not None]
            of_source["average"] = sum(known) / len(known) if known else None
        return added


def _measure_mixture(gold: ndarray) -> float:
    """Return the nats of a text under the mixture of sources that gives it the greatest probability."""
    weights = learn_weights(gold, np.ones(gold.shape, bool), np.ones(gold.shape[1]))
    with np.errstate(divide="ignore"):
        return float(-np.log(np.exp(gold) @ weights).sum())


def judge_sources(result: Mapping, added: Mapping[str, Mapping], unprefixed: Sequence[str]) -> dict[str, dict]:
    """Return for each source what it `added`, a `word` on it, and what to do `next`; the most useful source first.

    `result` is that of `diagnose` so far, and `unprefixed` names the sources that could read a prefix and do not.
    """
    judged = {}
    for name in sorted(added, key=lambda n: -(added[n]["average"] or 0.0)):
        word, best_in = _judge_source(result, name, added[name])
        next_steps = []
        if word == "drop":
            next_steps.append("leave it out of the next run, and save its capture")
        else:
            if domains := list(result.get("write", {}).get(name, {})):
                next_steps.append(f"let it write text of {', '.join(domains)}")
            if name in unprefixed:
                next_steps.append(f"give it a prefix (capture.prefix_tokens={PREFIX_TOKENS})")
        judged[name] = {"added": added[name], "word": word, "best_in": best_in, "next": next_steps}
    return judged


def _judge_source(result: Mapping, name: str, added: Mapping[str, float | None]) -> tuple[str, list[str]]:
    """Return a word on a source, and the domains in which it is worth keeping."""
    mixture = result["ways"][result["mixture"]]["bits_per_byte"]
    shares = {d: v / max(mixture[d], 1e-9) for d, v in added.items() if v is not None and mixture[d] is not None}
    if not shares:  # there is no other source that it could be compared with
        helps = result.get("judged", {}).get("average")
        return {"does not help": "replace"}.get(helps, "keep"), []
    best_in = [d for d, share in shares.items() if d != "average" and share >= LEAST_ADDED["keep"]]
    word = next((word for word, least in LEAST_ADDED.items() if shares["average"] >= least), "drop")
    if best_in and word != "keep":
        word = f"keep for {', '.join(best_in)}"
    return word, best_in


def describe_sources(result: Mapping) -> list[str]:
    """Describe in a line for each source what it adds and what to do with it."""
    return [_describe_source(result, name, row) for name, row in result["advice"].items()]


def _describe_source(result: Mapping, name: str, row: Mapping[str, Any]) -> str:
    called = f"{name} (the target)" if name == result["target"] else name
    if row["added"]["average"] is None:
        text = "there is no other source to compare it with."
    else:
        ranked = sorted(
            ((value, domain) for domain, value in row["added"].items() if domain != "average" and value is not None),
            reverse=True,
        )
        by_domain = ", ".join(f"{domain} {value:.3f}" for value, domain in ranked)
        text = f"without it the mixture needs {row['added']['average']:.3f} bits per byte more ({by_domain})."
    following = f" Next: {'; '.join(row['next'])}." if row["next"] else ""
    return f"{called}: {row['word']}; {text}{following}"
