"""Give the texts of documents one by one, so that they are never in memory together."""

from collections.abc import Iterator, Sequence
from typing import overload

from fuselm.documents.document import Document
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
