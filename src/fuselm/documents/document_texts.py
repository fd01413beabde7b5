"""Give the texts of documents one by one, so that they are never in memory together."""

import bisect
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.models.chat.messages import Dialogue

Text = str | Dialogue


class DocumentTexts(Sequence[Text]):
    """Hold documents, and show their texts."""

    def __init__(self, documents: Sequence[Document]):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Text]:
        return (document.text for document in self._documents)

    @overload
    def __getitem__(self, index: int) -> Text: ...

    @overload
    def __getitem__(self, index: slice) -> "DocumentTexts": ...

    def __getitem__(self, index: int | slice) -> "Text | DocumentTexts":
        if isinstance(index, slice):
            return DocumentTexts(self._documents[index])
        return self._documents[index].text


class TextsById(Mapping[str, Text]):
    """Hold documents, and show their texts by their ids."""

    def __init__(self, documents: DocumentList):
        self._documents = documents
        self._ids = documents.ids

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[str]:
        return (name.as_py() for name in self._ids)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> Text:
        if (at := self._find(name)) is None:
            raise KeyError(name)
        return self._documents[at].text

    @functools.cached_property
    def _order(self) -> Int[ndarray, "documents"]:
        import pyarrow.compute as pc

        return pc.sort_indices(self._ids).to_numpy().astype(np.int32)

    def _find(self, name: str) -> int | None:
        order = self._order
        place = bisect.bisect_left(order, name, key=lambda at: self._ids[int(at)].as_py())
        at = int(order[place]) if place < len(order) else None
        return at if at is not None and self._ids[at].as_py() == name else None
