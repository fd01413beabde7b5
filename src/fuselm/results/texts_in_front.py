"""Read held-out texts behind training texts of their domain, as sources read behind others in capture.

A model that has just read such texts expects more of the same. Scored like this, `base` shows how much of what training
gave it could have had from a prompt, and whether a trained model still gains from one.
"""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fuselm.documents.document import Document
from fuselm.documents.passages import Group, group_documents, tokenize_separator
from fuselm.models.segmentation import Reading, Segmentation
from fuselm.models.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsInFront:
    """Hold the texts that stand in front of others, and how many of their last tokens are read."""

    documents: Sequence[Document]
    members: Mapping[Group, Sequence[int]]  # the numbers of each domain's documents
    tokens: int


def choose_texts_in_front(documents: Sequence[Document], tokens: int) -> TextsInFront:
    """Return texts to read in front of others of their domains."""
    return TextsInFront(documents=documents, members=group_documents(documents), tokens=tokens)


def segment_behind(
    front: TextsInFront, document: Document, vocabulary: Vocabulary, *, context_token: int, context_length: int
) -> Segmentation:
    """Return the document's tokens, with those of other texts among the tokens that are read.

    A document's id decides which text stands right in front of it, and others of the domain precede that one. Fewer
    tokens are read where the context is too short, and none where the domain has no text.
    """
    own, separator = vocabulary.segment(document.text), tokenize_separator(vocabulary)
    members = front.members.get(Group(document.domain), ())
    wanted = max(min(front.tokens, context_length - 1 - len(own.ids)), 0)
    if not members or not wanted:
        return own
    last = zlib.crc32(document.id.encode()) % len(members)
    parts: list[np.ndarray] = []
    for number in itertools.islice(itertools.chain(range(last, -1, -1), range(len(members) - 1, last, -1)), wanted):
        parts[:0] = [vocabulary.segment(front.documents[members[number]].text).ids, separator]
        if sum(map(len, parts)) >= wanted:
            break
    before = np.concatenate(parts)[-wanted:]
    ids = np.concatenate([before, own.ids]).astype(own.ids.dtype)
    kept = np.arange(len(ids)) >= len(before)
    return Segmentation(
        ids=own.ids,
        starts=own.starts,
        spelled=own.spelled,
        size=own.size,
        reading=Reading(first=context_token, ids=ids, kept=kept),
    )
