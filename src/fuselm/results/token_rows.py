"""Gather what the models of a run and its stores say about each token of a few documents.

The token view of a run's page shows it. Training documents have rows of every source and of the fusion, from the run's
stores. Held-out documents were never captured, so they have rows of the target's own models alone. Those are read here,
for a few hundred tokens, which takes seconds for a small model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fuselm.documents.corpus import Document
from fuselm.models.segmentation import Segmentation
from fuselm.models.token_text import show_token
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Store
from fuselm.system.foreign_text import escape_controls
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from fuselm.models.locating import Model
    from fuselm.stores.rows import Trace

MOST_DOCUMENTS = 6  # of each split
MOST_TOKENS = 128  # of a document, from its beginning
ENTRIES = 5  # the most probable ones of each row
BATCH_TOKENS = 1024
SPLITS = ("heldout", "train")
FUSION = "fusion"  # the name of the fused rows, beside the names of sources and models


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadModel:
    """Name a model of the target's tokens to read documents with, and the precision that it is read in."""

    model: "Model"
    dtype: str


def choose_documents(documents: Sequence[Document], split: str) -> list[Document]:
    """Choose up to `MOST_DOCUMENTS` documents of a split, as many of each domain, evenly spaced within it."""
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        if document.split == split and document.text:
            by_domain.setdefault(document.domain, []).append(document)
    domains = _pick_evenly(sorted(by_domain), MOST_DOCUMENTS)
    each = max(1, MOST_DOCUMENTS // max(len(domains), 1))
    return [document for domain in domains for document in _pick_evenly(by_domain[domain], each)]


def gather_token_rows(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    models: Mapping[str, ReadModel],
    aligned: Mapping[str, Path],
    fused: Path | None,
    *,
    progress: Progress,
) -> dict:
    """Return the tokens of a few documents, with what each source, the fusion and each model expect there.

    `models` are models with the target's tokens, by name, `aligned` the aligned stores by source, and `fused` the
    store of all sources' fused rows, if there is one. The result holds `names` in the order of showing, the `strings`
    of tokens that rows refer to by number, and `documents`: their tokens' `pieces` of text, and for each name the
    `bits` of the token that came and the `top` entries as string and probability, alternating, in thousandths. A token
    without a row has None.
    """
    chosen = [document for split in SPLITS for document in choose_documents(documents, split)]
    chosen = [document for document in chosen if len(vocabulary.segment(document.text).ids)]
    whole = [vocabulary.segment(document.text) for document in chosen]
    cut = [_cut_segmentation(segmentation, MOST_TOKENS) for segmentation in whole]
    traces: list[dict[str, "Trace"]] = [{} for _ in chosen]
    stores = {name: Store(folder) for name, folder in aligned.items()}
    stores |= {} if fused is None else {FUSION: Store(fused)}
    for name, store in stores.items():
        for document, segmentation, found in zip(chosen, whole, traces, strict=True):
            if document.id in store:
                trace = store.read(document.id)
                if np.array_equal(trace.tokens, segmentation.ids):
                    found[name] = trace
    progress.start(len(models) * sum(len(s.ids) for s in cut), unit="tokens")
    for name, of in models.items():
        for found, trace in zip(traces, _read_documents(of, vocabulary, chosen, cut, progress), strict=True):
            found[name] = trace
    strings = _Strings(vocabulary)
    return {
        "names": [*stores, *models],
        "sources": list(aligned),
        "models": list(models),
        "splits": {split: sum(d.split == split for d in documents) for split in SPLITS},
        "documents": [
            _describe_document(document, len(segmentation.ids), own, found, vocabulary, strings)
            for document, segmentation, own, found in zip(chosen, whole, cut, traces, strict=True)
        ],
        "strings": strings.shown,
    }


class _Strings:
    """Number the tokens that are shown, in the order in which they come."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._numbers: dict[int, int] = {}
        self.shown: list[str] = []

    def number(self, token: int) -> int:
        if token not in self._numbers:
            self._numbers[token] = len(self.shown)
            self.shown.append(show_token(self._vocabulary.token_bytes[token]))
        return self._numbers[token]


def _describe_document(
    document: Document,
    tokens: int,
    cut: Segmentation,
    traces: "Mapping[str, Trace]",
    vocabulary: Vocabulary,
    strings: _Strings,
) -> dict:
    ids = cut.ids.tolist()
    rows = {}
    for name, trace in traces.items():
        informed = trace.distributions.informed[: len(ids)]
        rows[name] = {
            "bits": [
                _round_bits(gold) if known else None
                for gold, known in zip(trace.distributions.gold.tolist(), informed, strict=False)
            ],
            "top": [_list_entries(trace, i, strings) if known else None for i, known in enumerate(informed)],
        }
    return {
        "id": document.id,
        "domain": document.domain,
        "split": document.split,
        "tokens": tokens,
        "bytes": int(cut.size),
        "gold": [strings.number(token) for token in ids],
        "pieces": [_show_piece(vocabulary.token_bytes[token]) for token in ids],
        "rows": rows,
    }


def _list_entries(trace: "Trace", i: int, strings: _Strings) -> list[int]:
    """Return the most probable entries of a row: a string's number and thousandths of probability, alternating."""
    ids, logprobs = trace.distributions.row(i)
    best = np.argsort(-logprobs, kind="stable")[:ENTRIES]
    pairs = [(strings.number(int(ids[k])), round(1000 * math.exp(logprobs[k]))) for k in best]
    return [number for pair in pairs for number in pair]


def _round_bits(gold: float) -> float | None:
    """Return the bits of a natural log-probability with three decimals; None if they are infinite."""
    return round(-gold / math.log(2), 3) + 0.0 if math.isfinite(gold) else None


def _show_piece(token: bytes | None) -> str:
    """Return a token's text as it stands in the document; what is no whole text is shown by escapes."""
    try:
        return escape_controls((token or b"").decode(), keep="\n")
    except UnicodeDecodeError:
        return show_token(token)


def _cut_segmentation(whole: Segmentation, most: int) -> Segmentation:
    """Return the first tokens of a text, at most `most`."""
    if len(whole.ids) <= most:
        return whole
    first = slice(0, most)
    return Segmentation(
        ids=whole.ids[first], starts=whole.starts[first], spelled=whole.spelled[first], size=int(whole.starts[most])
    )


def _read_documents(
    read: ReadModel,
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    segmentations: Sequence[Segmentation],
    progress: Progress,
) -> "list[Trace]":
    """Return the traces of documents under a model, each document by itself, in their order."""
    from fuselm.models import forward
    from fuselm.sources import capture
    from fuselm.stores.retention import Policy

    source = capture.load_source(read.model, vocabulary, dtype=read.dtype)
    policy = Policy(policy="top_k", top_k=ENTRIES)
    traces: dict[int, "Trace"] = {}
    for batch in forward.group_into_batches([len(s.ids) for s in segmentations], BATCH_TOKENS):
        members = [documents[i] for i in batch], [segmentations[i] for i in batch]
        for i, trace in zip(batch, capture.trace_batch(source, *members, policy=policy), strict=True):
            traces[i] = trace
            progress.advance(len(trace.tokens))
    return [traces[i] for i in range(len(documents))]


def _pick_evenly(items: Sequence, count: int) -> list:
    """Return `count` of the items from the middles of as many equal stretches; all if they are fewer."""
    count = min(count, len(items))
    return [items[(2 * n + 1) * len(items) // (2 * count)] for n in range(count)]
