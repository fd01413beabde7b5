"""Several sources' distributions of the same tokens become one. DESIGN.md section 5; Wan et al. 2024, section 3.3.

A source's weight comes from how well it predicts the text: its cross-entropy, in nats per byte, on the document (the
paper) or on the token. At document level that is the source's own, in its own vocabulary; at token level that of its
aligned distribution. A source that says nothing of a token has no part in it; where none says anything, the gold token
gets all.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from fuselm.corpus import Document
from fuselm.distributions import Distributions
from fuselm.progress import Progress
from fuselm.store import Store, Trace, write_parts


def min_ce(nats_per_byte: Float[ndarray, "tokens sources"]) -> Float[ndarray, "tokens sources"]:
    """The paper's MinCE: the source with the least cross-entropy. Equal ones share, so order does not matter."""
    best = (nats_per_byte == nats_per_byte.min(axis=1, keepdims=True)).astype(np.float64)
    return best / best.sum(axis=1, keepdims=True)


def avg_ce(nats_per_byte: Float[ndarray, "tokens sources"]) -> Float[ndarray, "tokens sources"]:
    """The paper's AvgCE: weights by the softmax of the negative cross-entropy."""
    weights = np.exp(nats_per_byte.min(axis=1, keepdims=True) - nats_per_byte)
    return weights / weights.sum(axis=1, keepdims=True)


FUNCTIONS: dict[str, Callable[[Float[ndarray, "tokens sources"]], Float[ndarray, "tokens sources"]]] = {
    "min_ce": min_ce,
    "avg_ce": avg_ce,
}


def _document_level(traces: Sequence[Trace]) -> Float[ndarray, "tokens sources"]:
    nats = np.array([t.nats / max(t.size, 1) for t in traces])
    return np.broadcast_to(nats, (len(traces[0].tokens), len(traces)))


def _token_level(traces: Sequence[Trace]) -> Float[ndarray, "tokens sources"]:
    sizes = np.append(traces[0].starts[1:], traces[0].size)[: len(traces[0].starts)] - traces[0].starts
    gold = np.stack([t.distributions.gold for t in traces], axis=1).astype(np.float64)
    return -gold / np.maximum(sizes, 1)[:, None]


LEVELS: dict[str, Callable[[Sequence[Trace]], Float[ndarray, "tokens sources"]]] = {
    "document": _document_level,
    "token": _token_level,
}


def fuse(traces: Sequence[Trace], *, function: str = "min_ce", level: str = "document") -> Trace:
    """One trace of several, which are aligned to the same tokens of the same document.

    Its `weights` say what each source gave to each token; they are all 0 where none says anything.
    """
    first = traces[0]
    for other in traces[1:]:
        if other.document != first.document or not np.array_equal(other.tokens, first.tokens):
            raise ValueError(f"document {first.document}: the sources are aligned to different tokens; align again")
    informed = np.stack([t.distributions.informed for t in traces], axis=1)
    nats = np.where(informed, np.minimum(LEVELS[level](traces), np.finfo(np.float64).max), np.inf)
    some = informed.any(axis=1)
    weights = np.zeros(informed.shape)
    weights[some] = FUNCTIONS[function](nats[some])
    return replace(
        first,
        nats=float(min(t.nats for t in traces)),
        distributions=_mixture(traces, weights, ~some),
        weights=weights.astype(np.float32),
    )


def fuse_stores(
    stores: Mapping[str, Store],
    documents: Sequence[Document],
    out: Path,
    *,
    function: str,
    level: str,
    progress: Progress,
) -> dict:
    """Write the fused traces of those `documents` that are in all stores to parts in `out`; return what was counted.

    `shares` says how much each source gave to the tokens of a domain, `missing` how many documents only some have.
    """
    having = [sum(d.id in store for store in stores.values()) for d in documents]
    documents = [d for d, n in zip(documents, having, strict=True) if n == len(stores)]
    progress.start(len(documents), unit="documents")
    given = {d.domain: np.zeros(len(stores)) for d in documents}
    tokens, size, nats = Counter[str](), Counter[str](), dict.fromkeys(given, 0.0)

    def fused() -> Iterator[Trace]:
        for document in documents:
            trace = fuse([store.read(document.id) for store in stores.values()], function=function, level=level)
            given[document.domain] += trace.weights.sum(axis=0, dtype=float)
            tokens[document.domain] += len(trace.tokens)
            size[document.domain] += trace.size
            nats[document.domain] -= float(trace.distributions.gold.sum(dtype=float))
            progress.advance(1)
            yield trace

    counts = write_parts(out, fused())
    return {
        **counts,
        "missing": sum(0 < n < len(stores) for n in having),
        "sources": list(stores),
        "shares": {domain: (sums / max(tokens[domain], 1)).tolist() for domain, sums in given.items()},
        "bits_per_byte": {domain: nats[domain] / max(size[domain], 1) / math.log(2) for domain in nats},
    }


def _mixture(
    traces: Sequence[Trace], weights: Float[ndarray, "tokens sources"], unknown: Bool[ndarray, "tokens"]
) -> Distributions:
    """The weighted mean of the rows; one-hot on the gold token where nothing is known (the paper's fallback)."""
    tokens = traces[0].tokens
    rows, ids, masses = [np.flatnonzero(unknown)], [tokens[unknown]], [np.ones(unknown.sum())]
    gold = unknown.astype(np.float64)
    for s, trace in enumerate(traces):
        d = trace.distributions
        used = weights[d.rows, s] > 0
        rows.append(d.rows[used])
        ids.append(d.ids[used])
        masses.append(weights[d.rows[used], s] * np.exp(d.logprobs[used].astype(np.float64)))
        gold += weights[:, s] * np.exp(d.gold.astype(np.float64))
    mixed = Distributions.from_masses(
        np.concatenate(rows),
        np.concatenate(ids),
        np.concatenate(masses),
        tokens,
        np.ones(len(tokens), bool),
        top_k=sum(int(t.distributions.counts.max(initial=1)) for t in traces),
    )
    with np.errstate(divide="ignore"):
        return replace(mixed, gold=np.log(gold).astype(np.float32))
