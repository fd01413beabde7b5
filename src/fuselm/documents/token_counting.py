"""Know the tokens and bytes of documents, which plans need of all of them, without holding their texts."""

import itertools
from array import array
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.models.vocabulary import Vocabulary

BLOCK_DOCUMENTS = 4096


def count_read_tokens(
    vocabulary: Vocabulary, documents: Sequence[Document], *, reader: str | None = None
) -> Sequence[int]:
    """Return how many tokens of each document are read, of a conversation its template's too.

    The corpus knows them of the `reader` of this name; else they are counted, a block of documents at a time.
    """
    counts = array("i")
    if reader is not None and isinstance(documents, DocumentList):
        known = documents.token_counts(reader)
        if known is not None:
            counts.frombytes(np.asarray(known, np.int32).tobytes())
            return counts
    texts = iter(documents)
    while block := list(itertools.islice(texts, BLOCK_DOCUMENTS)):
        counts.extend(vocabulary.count_tokens([document.text for document in block]))
    return counts


def measure_sizes(documents: Sequence[Document]) -> Int[ndarray, "documents"]:
    """Return the bytes of each document's text, of a conversation those of its responses."""
    if isinstance(documents, DocumentList):
        return documents.sizes
    return np.fromiter((len(document.text.encode()) for document in documents), np.int64, len(documents))
