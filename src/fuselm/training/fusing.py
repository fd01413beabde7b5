"""Align and fuse the documents of a batch when it is read, with nothing stored in between.

The rows are those of the aligned and fused stores, bit for bit: each document goes through the same functions, and its
values are rounded as if they had been written and read again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuselm.alignment.aligner import Aligner
from fuselm.documents.document import Document
from fuselm.fusion.fuse import fuse
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.rows import TrainingRows, round_trace, round_training_rows
from fuselm.stores.store import Store, Trace
from fuselm.training import reading

FUSE_OPTIONS = ("vocabulary_size", "function", "level", "window", "sharpness", "switch")  # of `fusion.fuse.fuse`


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFusion:
    """Say what fused rows are made of, in training: captured stores, aligners, and weights by domain.

    Sources are in the order of their weights. `options` has `FUSE_OPTIONS`.
    """

    captured: Mapping[str, Store]
    aligners: Mapping[str, Aligner]
    weights: Mapping[str, Sequence[float]]
    temperatures: Sequence[float]
    options: Mapping[str, Any]

    def choose_documents(self, documents: Sequence[Document]) -> Sequence[Document]:
        """Return the documents that all sources have."""
        ids = reading.list_ids(documents)
        found = np.all([store.find_documents(ids) >= 0 for store in self.captured.values()], axis=0)
        return reading.take(documents, found)

    def fuse_document(self, document: Document, segmentation: Segmentation, places: Mapping[str, int]) -> TrainingRows:
        """Return the fused rows of a document, as training would read them from a store.

        `segmentation` is the document in the target's tokens, and `places` says where it is in each captured store.
        """
        traces = [self._align(name, document, segmentation, places[name]) for name in self.captured]
        weights = self.weights[document.domain]
        fused = fuse(traces, prior=weights, temperatures=self.temperatures, **self.options)
        return round_training_rows(fused)

    def _align(self, name: str, document: Document, segmentation: Segmentation, place: int) -> Trace:
        trace = self.captured[name].read_at(place)
        return round_trace(self.aligners[name].align(trace, document.text, segmentation))


class FusingReader:
    """Read documents with fused rows that are made as they are read. `lengths` are those of `count_tokens`."""

    def __init__(
        self, documents: Sequence[Document], vocabulary: Vocabulary, fusion: RowFusion, *, reader: str | None = None
    ):
        self._documents, self._vocabulary, self._fusion = documents, vocabulary, fusion
        self.lengths = reading.count_tokens(documents, vocabulary, reader)
        ids = reading.list_ids(documents)
        self._places = {name: store.find_documents(ids).astype(np.int32) for name, store in fusion.captured.items()}
        if len(documents):  # what aligners spell and learn first is then there for all processes that read ahead
            self.read([0])

    def read(self, numbers: Sequence[int]) -> list[dict]:
        """Return the tokens of some documents, with their fused rows."""
        return [self._read_document(int(i)) for i in numbers]

    def _read_document(self, i: int) -> dict:
        document = self._documents[i]
        read = self._vocabulary.segment(document.text)
        rows = self._fusion.fuse_document(document, read, {name: int(at[i]) for name, at in self._places.items()})
        return reading.describe_reading(read) | {"fused": rows}
