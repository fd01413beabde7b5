"""Read what training needs of documents: their lengths at the start, and their tokens and fused rows by the batch.

Tokens come from the store of fused rows, and are made by the tokenizer where there is none. Of a conversation, a store
has the tokens of its responses, so what the target reads around them is made when it is read.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.models.chat.messages import Dialogue
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.rows import TrainingRows
from fuselm.stores.store import Store

BLOCK = 1024  # documents that are read and counted together
TRIED = 4  # documents of a store whose tokens are compared with the tokenizer's before training


class TextReader:
    """Read documents without any rows. `lengths` are those of `count_tokens`."""

    def __init__(self, documents: Sequence[Document], vocabulary: Vocabulary, *, reader: str | None = None):
        self._documents, self._vocabulary = documents, vocabulary
        self.lengths = count_tokens(documents, vocabulary, reader)

    def read(self, numbers: Sequence[int]) -> list[dict]:
        """Return the tokens of some documents, and which of them are learned unless context is learned, too."""
        return _make_items([self._documents[i].text for i in numbers], self._vocabulary)


class StoreReader:
    """Read documents with their fused rows from a store."""

    def __init__(
        self, documents: Sequence[Document], vocabulary: Vocabulary, store: Store, *, reader: str | None = None
    ):
        self._documents, self._vocabulary, self._store = documents, vocabulary, store
        self._places = store.find_documents(list_ids(documents)).astype(np.int32)
        if (self._places < 0).any():
            raise KeyError(documents[int(np.argmax(self._places < 0))].id)
        self._is_dialogue = flag_dialogues(documents)
        self.lengths = store.token_counts[self._places].astype(np.int32, copy=False)
        if self._is_dialogue.any():
            self.lengths[self._is_dialogue] = count_tokens(documents, vocabulary, reader, only=self._is_dialogue)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raise `ValueError` if texts have other sizes, or some of them other tokens, than the store says."""
        sizes = list_sizes(self._documents)
        if len(wrong := np.flatnonzero(sizes != self._store.byte_counts[self._places])):
            self._refuse(int(wrong[0]))
        plain = np.flatnonzero(~self._is_dialogue)
        for i in plain[:: max(len(plain) // TRIED, 1)].tolist():
            (ids,) = self._vocabulary.tokenize([self._documents[i].text])
            if not np.array_equal(ids, self._store.read_for_training_at(int(self._places[i])).tokens):
                self._refuse(i)

    def _refuse(self, number: int) -> None:
        name = self._documents[number].id
        raise ValueError(f"{self._store.folder}: document {name}: other tokens than the target's; fuse again")

    def read(self, numbers: Sequence[int]) -> list[dict]:
        """Return the tokens of some documents, with their fused rows."""
        return [self._read_document(int(i)) for i in numbers]

    def _read_document(self, i: int) -> dict:
        rows = self._store.read_for_training_at(int(self._places[i]))
        if not self._is_dialogue[i]:
            return {"tokens": rows.tokens, "kept": np.ones(len(rows.tokens), bool), "first": None, "fused": rows}
        read = self._vocabulary.segment(self._documents[i].text)
        if not np.array_equal(rows.tokens, read.ids):
            self._refuse(i)
        return describe_reading(read) | {"fused": rows}


def _make_items(texts: Sequence[str | Dialogue], vocabulary: Vocabulary) -> list[dict]:
    """Tokenize texts as they are trained on."""
    ids = iter(vocabulary.tokenize([text for text in texts if isinstance(text, str)]))
    return [
        describe_reading(vocabulary.segment(text))
        if isinstance(text, Dialogue)
        else {"tokens": (own := next(ids)), "kept": np.ones(len(own), bool), "first": None}
        for text in texts
    ]


def describe_reading(read: Segmentation) -> dict:
    """Return all tokens that the target reads, and which of them belong to the text."""
    first = None if read.reading is None else read.reading.first
    return {"tokens": read.read_ids, "kept": read.is_kept, "first": first}


def insert_empty_rows(item: dict) -> dict:
    """Return an item whose context is learned, too: it has rows without entries, so only its tokens are learned."""
    if item["first"] is not None and "fused" in item:
        rows, kept = item["fused"], item["kept"]
        counts, tail = np.zeros(len(kept), np.int64), np.ones(len(kept), np.float32)
        counts[kept], tail[kept] = np.diff(rows.offsets), rows.tail
        offsets = np.append(0, np.cumsum(counts))
        item = item | {
            "fused": TrainingRows(
                tokens=item["tokens"], offsets=offsets, ids=rows.ids, logprobs=rows.logprobs, tail=tail
            )
        }
    return item | {"kept": np.ones(len(item["kept"]), bool)}


# ---- arrays of all documents


def count_tokens(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    reader: str | None,
    *,
    only: Bool[ndarray, "documents"] | None = None,
) -> Int[ndarray, "_"]:
    """Return the tokens that are read of each document, or of those that are chosen (`only`).

    They were counted when the corpus was made, under the name of the `reader`. Other documents are counted by blocks.
    """
    is_listed = isinstance(documents, DocumentList) and reader is not None
    if is_listed and (known := documents.token_counts(reader)) is not None:
        return (known if only is None else known[only]).astype(np.int32)
    counts = [np.zeros(0, np.int32)]
    for block in _walk_blocks(documents, only):
        counts.append(np.array(vocabulary.count_tokens([document.text for document in block]), np.int32))
    return np.concatenate(counts)


def _walk_blocks(
    documents: Sequence[Document], only: Bool[ndarray, "documents"] | None = None
) -> Iterator[list[Document]]:
    for begin in range(0, len(documents), BLOCK):
        block = documents[begin : begin + BLOCK]
        wanted = np.ones(len(block), bool) if only is None else only[begin : begin + BLOCK]
        if wanted.any():
            yield [document for document, is_wanted in zip(block, wanted.tolist(), strict=True) if is_wanted]


def take(documents: Sequence[Document], chosen: Bool[ndarray, "documents"]) -> Sequence[Document]:
    """Return the documents that are chosen, in order."""
    if chosen.all():
        return documents
    if isinstance(documents, DocumentList):
        return documents.take(chosen)
    return [document for document, is_chosen in zip(documents, chosen.tolist(), strict=True) if is_chosen]


def list_ids(documents: Sequence[Document]) -> pa.Array:
    """Return the ids of documents."""
    if isinstance(documents, DocumentList):
        return pa.concat_arrays([pa.array([], pa.string()), *documents.ids.chunks])
    return pa.array([document.id for document in documents], pa.string())


def list_sizes(documents: Sequence[Document]) -> Int[ndarray, "documents"]:
    """Return the bytes of each document's text, or of a conversation's responses."""
    if isinstance(documents, DocumentList):
        return documents.sizes
    return np.array([len(document.text.encode()) for document in documents], np.int32)


def flag_dialogues(documents: Sequence[Document]) -> Bool[ndarray, "documents"]:
    """Flag the conversations."""
    if isinstance(documents, DocumentList):
        return documents.is_dialogue
    return np.array([isinstance(document.text, Dialogue) for document in documents], bool)
