"""Fuse several sources' distributions of the same tokens into one (Wan et al. 2024, section 3.3).

weights.py computes each source's weight, and pooling.py makes one row of several. A source without information about a
token has weight 0 there; where no source has information, the gold token gets all the mass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.fusion import fused_sums, pooling, tails
from fuselm.fusion.choices import LEVELS
from fuselm.fusion.priors import spread_weights
from fuselm.fusion.weights import WEIGHT_FUNCTIONS, Evidence, learn_weights
from fuselm.models.segmentation import COMPARABLE, describe_shares
from fuselm.stores import part_writing
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, Trace
from fuselm.system import part_work
from fuselm.system.progress import Progress

LEARNED = "learned"
LEARNED_ON = 1_000_000  # tokens of a domain, at most, that weights are learned from


def fuse(
    traces: Sequence[Trace],
    *,
    vocabulary_size: int,
    function: str = "min_ce",
    level: str = "document",
    window: int = 256,
    sharpness: float = 1.0,
    switch: float = 0.05,
    prior: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
) -> Trace:
    """Fuse several traces, which are aligned to the same tokens of the same document, into one.

    >>> from fuselm.fusion.fuse import fuse
    >>> store = fuselm.load_run("mine.yaml", quiet=True).align()["other"]
    >>> trace = store.read(store.documents[0])
    >>> fused = fuse([trace, trace], vocabulary_size=fuselm.locate_model("models/target").output_size)
    >>> fused.weights.shape == (len(trace.tokens), 2)
    True

    Args:
        traces: One trace for each source: `tokens` is Int[tokens], its distributions' `gold` and `tail` are
            Float[tokens], their `ids` and `logprobs` Int[entries] and Float[entries].
        vocabulary_size: The number of ids in the target's output layer.
        function: How sources are weighed: "min_ce", "avg_ce", "log_linear", "entropy", "bayes" or "fixed"; choices.py
            says what each does.
        level: The part of the text that cross-entropies are averaged over: "document", "window" or "token".
        window: The size of a window in bytes.
        sharpness: The factor of the cross-entropy in `avg_ce` and the functions like it.
        switch: The probability that another source takes over at the next token, in `bayes`.
        prior: The sources' initial weights, Float[sources]; equal if None.
        temperatures: The temperatures that are applied to sources' rows first, Float[sources]; 1 if None.

    Returns:
        The fused trace, for the same Int[tokens]. Its `weights`, Float[tokens sources], hold each source's weight at
        each token; they are all 0 where no source has information, and there the gold token has all the mass.

    Raises:
        ValueError: If the traces are aligned to different tokens, or an argument cannot be used.
    """
    _check_arguments(traces, function, level, window, sharpness, switch, prior, temperatures)
    first = traces[0]
    for other in traces[1:]:
        if other.document != first.document or not np.array_equal(other.tokens, first.tokens):
            raise ValueError(f"document {first.document}: the sources are aligned to different tokens; align again")
    traces = [
        _apply_temperature(trace, temperature, vocabulary_size)
        for trace, temperature in zip(traces, temperatures or [1.0] * len(traces), strict=True)
    ]
    start = np.ones(len(traces)) if prior is None else np.array(prior, np.float64)
    rows = [trace.distributions for trace in traces]
    given = WEIGHT_FUNCTIONS[function](
        Evidence(
            traces=traces,
            allowed=np.stack([d.informed for d in rows], axis=1) & (start > 0),
            prior=start,
            level=level,
            window=window,
            sharpness=sharpness,
            switch=switch,
            vocabulary_size=vocabulary_size,
        )
    )
    if function == "log_linear":
        pooled = pooling.pool_geometric(rows, given, vocabulary_size)
    else:
        pooled = pooling.pool_arithmetic(rows, given)
    return replace(
        first,
        nats=float(min(t.nats for t in traces)),
        distributions=_fill_unknown_rows(pooled, first),
        weights=given.astype(np.float32),
    )


def _check_arguments(
    traces: Sequence[Trace],
    function: str,
    level: str,
    window: int,
    sharpness: float,
    switch: float,
    prior: Sequence[float] | None,
    temperatures: Sequence[float] | None,
) -> None:
    if not traces:
        raise ValueError("traces: there are none; needs one for each source")
    for name, value, known in (("function", function, WEIGHT_FUNCTIONS), ("level", level, LEVELS)):
        if value not in known:
            raise ValueError(f"{name} {value!r}: unknown; needs one of {', '.join(known)}")
    if window < 1 or sharpness < 0 or not 0 <= switch <= 1:
        raise ValueError(
            f"window {window}, sharpness {sharpness}, switch {switch}: needs a window of 1 or more, a sharpness of 0 "
            "or more, and a switch from 0 to 1"
        )
    for name, values in (("prior", prior), ("temperatures", temperatures)):
        if values is not None and len(values) != len(traces):
            raise ValueError(f"{name}: {len(values)} values for {len(traces)} sources; needs one for each")


def _apply_temperature(trace: Trace, temperature: float, vocabulary_size: int) -> Trace:
    """Apply a temperature to a trace's rows; its `nats` change by as much as those of the aligned gold tokens."""
    rows = tails.apply_temperature(trace.distributions, temperature, vocabulary_size)
    possible = np.isfinite(rows.gold)
    added = trace.distributions.gold[possible].astype(np.float64) - rows.gold[possible]
    return replace(trace, distributions=rows, nats=trace.nats + float(added.sum()))


def _fill_unknown_rows(rows: Distributions, trace: Trace) -> Distributions:
    """Put all mass on the gold token where no source has information: the paper's fallback."""
    unknown = np.flatnonzero(~rows.informed)
    if not len(unknown):
        return rows
    places, tail = rows.offsets[unknown], rows.tail.copy()
    tail[unknown] = 0.0
    return replace(
        rows,
        ids=np.insert(rows.ids, places, trace.tokens[unknown]),
        logprobs=np.insert(rows.logprobs, places, np.float32(0.0)),
        offsets=rows.offsets + np.append(0, np.cumsum(~rows.informed)),
        tail=tail,
    )


def fuse_stores(
    stores: Mapping[str, Store],
    documents: Sequence[Document],
    out: Path,
    *,
    vocabulary_size: int,
    function: str,
    level: str,
    window: int,
    sharpness: float,
    switch: float,
    weights: str | Mapping[str, float | Mapping[str, float]],
    temperatures: Mapping[str, float],
    learn_from: Sequence[Document] | None = None,
    progress: Progress,
) -> dict | None:
    """Write the fused traces of those `documents` that all stores have to parts in `out`; return the counts.

    `weights` are the sources' initial weights, in all domains or by domain, and 1 where none is given. If they are
    `learned`, they are learned from the documents `learn_from`, or else from all documents; text that a source wrote
    itself should be kept out, because the source predicts it best. `temperatures` are given by source and default to 1.
    In the counts, `shares` holds each source's mean weight in a domain, and `lacking` the number of documents that were
    left out because a source does not have them. Several processes may do this together; it returns None in those that
    did not finish.
    """
    tempered = [temperatures.get(name, 1.0) for name in stores]
    domains = _list_shared_domains(stores, documents)
    priors = spread_weights({} if weights == LEARNED else weights, list(stores), domains)
    if weights == LEARNED:
        learned_from = documents if learn_from is None else learn_from
        priors = part_work.prepare_once(
            out, lambda: learn_domain_weights(stores, learned_from, priors, tempered, vocabulary_size)
        )
        for name, store in stores.items():
            if lacking_text := describe_shares(read_unspelled_shares(store)):
                progress.note(f"{name} cannot spell {lacking_text}; it has no learned weight there")
    options = {"vocabulary_size": vocabulary_size, "function": function, "level": level, "window": window}
    options |= {"sharpness": sharpness, "switch": switch, "temperatures": tempered}

    def fuse_window(of_window: Sequence[Document]) -> tuple[Iterator[Trace], Callable[[], dict]]:
        sums = fused_sums.FusedSums([0] * len(stores))
        return fuse_documents(stores, of_window, priors, sums, progress=progress, **options), sums.as_row

    made = part_writing.write_windows(out, documents, fuse_window, progress=progress)
    if made is None:
        return None
    counts, by_window = made
    total = fused_sums.add_up(list(stores), by_window)
    for name, count in zip(stores, total.lacking, strict=True):
        if count:
            progress.note(f"{count} documents are not in {stores[name].folder}; they are left out")
    return {
        **counts,
        "lacking": dict(zip(stores, total.lacking, strict=True)),
        "sources": list(stores),
        "weights": priors,
        **total.summarize(),
    }


def fuse_documents(
    stores: Mapping[str, Store],
    documents: Sequence[Document],
    priors: Mapping[str, Sequence[float]],
    sums: fused_sums.FusedSums,
    *,
    progress: Progress,
    **options: Any,
) -> Iterator[Trace]:
    """Yield the fused traces of those documents that all stores have, and count them in `sums`.

    `options` are those of `fuse`, except the prior, which is given by domain.
    """
    for document in documents:
        has = [document.id in store for store in stores.values()]
        if all(has):
            traces = [store.read(document.id) for store in stores.values()]
            fused = fuse(traces, prior=priors[document.domain], **options)
            sums.add(document.domain, fused)
            yield fused
        elif any(has):
            sums.lacking = [count + (not is_there) for count, is_there in zip(sums.lacking, has, strict=True)]
        progress.advance(1)


def _list_shared_domains(stores: Mapping[str, Store], documents: Sequence[Document]) -> list[str]:
    """Return the domains of the documents that all stores have, in alphabetical order."""
    if not isinstance(documents, DocumentList):
        return sorted({d.domain for d in documents if all(d.id in store for store in stores.values())})
    is_shared = np.ones(len(documents), bool)
    for store in stores.values():
        is_shared &= store.has_documents(documents.ids)
    return sorted({documents.domain_names[code] for code in np.unique(documents.domain_codes[is_shared]).tolist()})


def read_unspelled_shares(store: Store) -> dict[str, float]:
    """Return by domain the share of bytes that an aligned store's source does not spell, where there are any."""
    fidelity = store.manifest["counts"].get("fidelity", {})
    return {domain: sums["unspelled"] for domain, sums in fidelity.items() if sums.get("unspelled")}


def learn_domain_weights(
    stores: Mapping[str, Store],
    documents: Sequence[Document],
    priors: Mapping[str, Sequence[float]],
    temperatures: Sequence[float],
    vocabulary_size: int,
) -> dict[str, list[float]]:
    """Learn for each domain the weights under which the mixture gives its text the greatest probability.

    A source has weight 0 in a domain where its tokenizer leaves more than `COMPARABLE` of the bytes unspelled and other
    sources spell them, because its predictions of the remaining bytes do not measure it.
    """
    learned = {}
    unspelled = [read_unspelled_shares(store) for store in stores.values()]
    for domain, prior in priors.items():
        gold, allowed, tokens = [], [], 0
        is_indexed = isinstance(documents, DocumentList)
        of_domain = documents.select(domain=domain) if is_indexed else [d for d in documents if d.domain == domain]
        for document in of_domain:
            if tokens >= LEARNED_ON:
                break
            if any(document.id not in store for store in stores.values()):
                continue
            rows = [
                _read_gold(store, document.id, temperature, vocabulary_size)
                for store, temperature in zip(stores.values(), temperatures, strict=True)
            ]
            gold.append(np.stack([of for of, _ in rows], axis=1).astype(np.float64))
            allowed.append(np.stack([informed for _, informed in rows], axis=1))
            tokens += len(gold[-1])
        start = np.array(prior, np.float64)
        comparable = np.array([shares.get(domain, 0.0) <= COMPARABLE for shares in unspelled])
        if (start * comparable).any():
            start = start * comparable
        best = learn_weights(np.concatenate(gold), np.concatenate(allowed), start) if gold else start
        learned[domain] = best.tolist()
    return learned


def _read_gold(
    store: Store, document: str, temperature: float, vocabulary_size: int
) -> tuple[Float[ndarray, "tokens"], Bool[ndarray, "tokens"]]:
    """Return the gold log-probabilities of a document's rows at a temperature, and which rows carry information."""
    if temperature == 1.0:
        return store.read_gold(document)
    rows = tails.apply_temperature(store.read(document).distributions, temperature, vocabulary_size)
    return rows.gold, rows.informed
