"""Diagnose before any training whether fusing can help, from the aligned stores of a run's training documents.

Each source, each way to fuse, and the oracle are compared in bits per byte of the same tokens: those for which every
source has a row. The oracle takes the best source of each token; no weights can do better. The target is compared as
well, whether or not it is a source: the gap between it and the fused rows is what it could learn. `expected` is the
loss that the rows themselves expect. A text that costs less than that was used to choose the weights, or was predicted
too vaguely; a text that costs more was predicted too confidently.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from fuselm.documents.corpus import Document
from fuselm.fusion import tails
from fuselm.fusion.fuse import fuse, learn_domain_weights, read_unspelled_shares
from fuselm.models.segmentation import COMPARABLE, compute_bits_per_byte
from fuselm.results.diagnosis_sources import GoldTokens, describe_sources, judge_sources
from fuselm.results.diagnosis_words import describe_diagnosis, judge_gain
from fuselm.results.json_numbers import replace_nonfinite
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, Trace
from fuselm.system.progress import Progress

# The ways to fuse that are tried: the options of `fuse`, by the name that tables show.
WAYS: dict[str, dict] = {
    "min_ce, document": {"function": "min_ce", "level": "document"},
    "avg_ce, document": {"function": "avg_ce", "level": "document"},
    "log_linear, document": {"function": "log_linear", "level": "document"},
    "entropy, token": {"function": "entropy", "level": "token"},
    "bayes": {"function": "bayes", "level": "token"},
    "fixed, learned weights": {"function": "fixed", "level": "token"},
}
NEED_WHOLE_TAILS = ("log_linear, document", "entropy, token")  # rows that hold draws from their tails are not enough
LEARNED = "fixed, learned weights"
ORACLE = "oracle"
TARGET = "the target"  # its row where it is not among the sources
# A source should write text of a domain if it saves this share of the target's bits there; docs/results.md shows why.
LEAST_SAVED_BY_WRITER = 0.2
WRITE_RATIO = 4  # bytes to write per byte of training text


def diagnose(
    stores: Mapping[str, Store],
    documents: Sequence[Document],
    *,
    own: str | None,
    vocabulary_size: int,
    target_store: Store | None = None,
    writers: Sequence[str] = (),
    unprefixed: Sequence[str] = (),
    drawn: bool = False,
    progress: Progress,
) -> dict:
    """Return every number of a diagnosis, and its verdict in words.

    `stores` are the aligned stores of all sources. `own` names the source that is the target itself, if one is;
    otherwise `target_store` may hold the target's own distributions, which are compared and not fused. `writers` are
    the sources that could write more text, and `unprefixed` those that could read other documents first and do not.
    `drawn` says that rows hold draws from their tails.

    In the result, `sources` and `ways` have `bits_per_byte` by domain and on average, and what was `expected`.
    `compared` is the share of bytes that these cover: a token for which some source has no row is left out. `wins` has
    the shares of tokens and of documents that each source predicts best. `agreement` has a row for each pair of
    sources. `own` has the target's bits, and is None if they are not known. `advice` judges each source by what the
    mixture loses without it. `write` is the `write.ratio` for writers that know far more than the target. `unspelled`
    has the share of bytes that a source's tokenizer cannot spell, by domain, if there are any; where it is above
    `COMPARABLE`, the source has no bits.

    Raises `ValueError` if no document, or no token of a domain, has rows of all sources.
    """
    names = list(stores)
    needed = [*stores.values(), *([] if target_store is None else [target_store])]
    missing = sum(any(d.id not in s for s in needed) for d in documents)
    documents = [d for d in documents if all(d.id in s for s in needed)]
    if not documents:
        raise ValueError("no training document is in the aligned stores of all sources; align again")
    domains = sorted({d.domain for d in documents})
    learned = learn_domain_weights(
        stores, documents, {d: [1.0] * len(names) for d in domains}, [1.0] * len(names), vocabulary_size
    )
    ways = {way: options for way, options in WAYS.items() if not (drawn and way in NEED_WHOLE_TAILS)}
    unspelled = {name: read_unspelled_shares(store) for name, store in stores.items()}
    left_out = {domain: _find_left_out(names, unspelled, domain, own) for domain in domains}
    sums = {name: _NatsByDomain(domains) for name in [*names, *ways, ORACLE, TARGET]}
    gold = GoldTokens(domains)
    wins = {domain: {"tokens": np.zeros(len(names)), "documents": np.zeros(len(names))} for domain in domains}
    pairs = {pair: np.zeros(3) for pair in combinations(range(len(names)), 2)}
    progress.start(len(documents), unit="documents")
    for document in documents:
        traces = [store.read(document.id) for store in stores.values()]
        heard = np.array([name not in left_out[document.domain] for name in names])
        common = np.logical_and.reduce([traces[n].distributions.informed for n in np.flatnonzero(heard)])
        for name, trace in zip(names, traces, strict=True):
            sums[name].add(document.domain, trace, common, vocabulary_size)
        if target_store is not None:
            sums[TARGET].add(document.domain, target_store.read(document.id), common, vocabulary_size)
        gold.add(document.domain, traces, common)
        for way, options in ways.items():
            prior = learned[document.domain] if way == LEARNED else None
            fused = fuse(traces, vocabulary_size=vocabulary_size, prior=prior, **options)
            sums[way].add(document.domain, fused, common, vocabulary_size)
        best = fuse(traces, vocabulary_size=vocabulary_size, function=ORACLE)
        sums[ORACLE].add(document.domain, best, common, vocabulary_size)
        wins[document.domain]["tokens"] += best.weights.sum(axis=0, dtype=float) * heard
        nats = np.where(heard, [trace.nats for trace in traces], np.inf)
        wins[document.domain]["documents"] += (nats == nats.min()) / (nats == nats.min()).sum()
        for (a, b), total in pairs.items():
            total += _measure_agreement(traces[a].distributions, traces[b].distributions, vocabulary_size)
        progress.advance(1)
    compared = sums[ORACLE].share_compared()
    for domain, share in compared.items():
        if share == 0:
            raise ValueError(
                f"no token of domain '{domain}' has rows of all sources; take another align.method, such as branches, "
                "or other sources"
            )
    for domain, silent in left_out.items():
        for name in silent:
            sums[name].nats[domain] = sums[name].expected[domain] = math.inf
    values = {name: total.summarize() for name, total in sums.items()}
    result = {
        "documents": len(documents),
        "left_out": missing,
        "drawn": drawn,
        "tokens": int(sum(sums[names[0]].tokens.values())),
        "bytes": int(sum(sums[names[0]].size.values())),
        "compared": compared,
        "domains": domains,
        "target": own,
        "own": values[own or TARGET] if own or target_store is not None else None,
        "mixture": LEARNED,
        "sources": {name: values[name] for name in names},
        "ways": {way: values[way] for way in ways},
        "oracle": values[ORACLE],
        "weights": {domain: dict(zip(names, weights, strict=True)) for domain, weights in learned.items()},
        "wins": {
            domain: {unit: dict(zip(names, (w / max(w.sum(), 1e-9)).tolist(), strict=True)) for unit, w in of.items()}
            for domain, of in wins.items()
        },
        "agreement": [
            {"sources": [names[a], names[b]], "same_first": same / max(count, 1), "overlap": overlap / max(count, 1)}
            for (a, b), (count, same, overlap) in pairs.items()
        ],
    }
    if any(unspelled.values()):
        result["unspelled"] = {name: of for name, of in unspelled.items() if of}
    result["best_source"] = _find_best_source(result)
    result["gains"] = _compute_gains(result)
    if result["own"] is not None:
        result["judged"] = {domain: judge_gain(result, domain) for domain in [*domains, "average"]}
        result["write"] = _choose_writers(result, writers)
    result["advice"] = judge_sources(result, gold.measure_added(names, left_out), unprefixed)
    return replace_nonfinite(
        result | {"verdict": describe_diagnosis(result), "source_verdicts": describe_sources(result)}
    )


def _find_left_out(
    names: Sequence[str], unspelled: Mapping[str, Mapping[str, float]], domain: str, own: str | None
) -> set[str]:
    """Return the sources that spell too little of a domain to be compared.

    The target is never left out, and no source is if all spell too little.
    """
    lacking = {name for name in names if unspelled[name].get(domain, 0.0) > COMPARABLE}
    return set() if len(lacking) == len(names) else lacking - {own}


class _NatsByDomain:
    """Add up the nats that texts cost, and those that they were expected to cost, by domain."""

    def __init__(self, domains: Sequence[str]):
        self.size, self.bytes, self.tokens, self.nats, self.expected = (dict.fromkeys(domains, 0.0) for _ in range(5))

    def add(self, domain: str, trace: Trace, compared: Bool[ndarray, "tokens"], vocabulary_size: int) -> None:
        rows = trace.distributions
        self.size[domain] += trace.size
        self.bytes[domain] += float(trace.lengths[compared].sum())
        self.tokens[domain] += len(rows)
        self.nats[domain] -= float(rows.gold[compared].sum(dtype=float))
        self.expected[domain] += float(tails.compute_entropy(rows, vocabulary_size)[compared].sum())

    def share_compared(self) -> dict[str, float]:
        """Return the share of bytes that the sums cover, by domain and on average."""
        shares = {domain: self.bytes[domain] / max(size, 1) for domain, size in self.size.items()}
        return shares | {"average": sum(shares.values()) / len(shares)}

    def summarize(self) -> dict[str, dict[str, float]]:
        """Return bits per byte and the expected bits per byte, by domain and on average."""
        return {"bits_per_byte": self._per_byte(self.nats), "expected": self._per_byte(self.expected)}

    def _per_byte(self, nats: Mapping[str, float]) -> dict[str, float]:
        values = {domain: compute_bits_per_byte(n, self.bytes[domain]) for domain, n in nats.items()}
        return values | {"average": sum(values.values()) / len(values)}


def _measure_agreement(left: Distributions, right: Distributions, vocabulary_size: int) -> np.ndarray:
    """Return how many tokens have rows in both, how many of these have one first id, and their sum of min(p, q)."""
    both = left.informed & right.informed
    firsts, keys, masses = [], [], []
    for d in (left, right):
        order = np.lexsort((d.ids, -d.logprobs, d.rows))
        first = np.full(len(d), -1)
        first[d.informed] = d.ids[order][d.offsets[:-1][d.informed]]
        firsts.append(first)
        keys.append(d.rows * vocabulary_size + d.ids)
        masses.append(np.exp(d.logprobs.astype(np.float64)))
    _, at, other = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    overlap = np.minimum(masses[0][at], masses[1][other]).sum()
    return np.array([both.sum(), (both & (firsts[0] == firsts[1])).sum(), overlap], np.float64)


def _find_best_source(result: Mapping) -> str:
    """Return the source other than the target with the fewest bits per byte on average."""
    others = [name for name in result["sources"] if name != result["target"]] or list(result["sources"])
    return min(others, key=lambda n: result["sources"][n]["bits_per_byte"]["average"])


def _compute_gains(result: Mapping) -> dict[str, dict]:
    """Return by domain and on average the best source, the best way to fuse, and its gains in bits per byte.

    `over_target` is how far the best way is below the target's own bits (None without the target), `over_best_source`
    how far below the source that is best on average, and `oracle_beyond` how far the oracle is below the best way.
    """
    sources, ways = result["sources"], result["ways"]
    found = {}
    for domain in [*result["domains"], "average"]:
        way = min(ways, key=lambda n: ways[n]["bits_per_byte"][domain])
        bits = ways[way]["bits_per_byte"][domain]
        own = result["own"]["bits_per_byte"][domain] if result["own"] else None
        found[domain] = {
            "best_source": min(sources, key=lambda n: sources[n]["bits_per_byte"][domain]),
            "best_way": way,
            "over_target": None if own is None else own - bits,
            "over_best_source": sources[result["best_source"]]["bits_per_byte"][domain] - bits,
            "oracle_beyond": bits - result["oracle"]["bits_per_byte"][domain],
        }
    return found


def _choose_writers(result: Mapping, writers: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the domains in which each source should write text: where it is the best writer, far beyond the target."""
    sources, ratio = result["sources"], {}
    for domain in result["domains"] if writers else ():
        best = min(writers, key=lambda name: sources[name]["bits_per_byte"][domain])
        own = result["own"]["bits_per_byte"][domain]
        if sources[best]["bits_per_byte"][domain] < (1 - LEAST_SAVED_BY_WRITER) * own:
            ratio.setdefault(best, {})[domain] = WRITE_RATIO
    return ratio
