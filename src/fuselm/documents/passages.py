"""Pack documents into the rows that a source reads, with other documents of their domain in front.

A model that has just read texts of a kind expects more of the same: its words, its layout, its subject. Its predictions
for a document then come closer to the text; and the target, trained on them without anything in front, learns the kind
(context distillation: Askell et al. 2021, arXiv 2112.00861; Snell et al. 2022, arXiv 2209.15189).

Documents that share a prefix are put one behind another in one row, each after all that is before it, so the prefix
costs little: a row has one part of prefix to four of documents, or to one document that is longer.

Conversations are read behind conversations, which are whole: each begins as it begins alone, with its own system
message. What a model reads is then what few-shot prompting shows it, in its own template.
"""

import itertools
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.models import forward
from fuselm.models.vocabulary import UNMAPPED, Segmentation, Vocabulary

# What rows hold depends on these two, which are in no key: when they change, raise manifest.FORMAT.
SEPARATOR = b"\n\n"  # stands between the documents of one row
DOCUMENTS_PER_PREFIX = 4  # tokens of documents in a row, per token of the prefix
MOST_TRIED = 16  # conversations that may be too long for what is left of a prefix


class Group(NamedTuple):
    """Name documents that may be read behind each other: texts, or conversations, of a domain."""

    domain: str
    is_conversations: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Say how much a source reads in front of documents, in its own tokens."""

    tokens: int = 0
    separator_tokens: int = 0
    context_length: int = 0  # tokens that the source can read in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Describe one row of a forward pass by the numbers of its documents."""

    documents: Sequence[int]
    before: Sequence[int] = ()
    prefix: int = 0  # how many of the last tokens of `before` are read


def fit_prefix(vocabulary: Vocabulary, context_length: int, tokens: int) -> Prefix:
    """Return a prefix of `tokens` tokens, or fewer, so that documents keep their share of the context."""
    return Prefix(
        tokens=min(tokens, context_length // (1 + DOCUMENTS_PER_PREFIX)),
        separator_tokens=len(tokenize_separator(vocabulary)),
        context_length=context_length,
    )


def group_documents(documents: Iterable[Document]) -> Mapping[Group, Sequence[int]]:
    """Return the numbers of each group's documents, in order; a list of documents on disk reads none of them."""
    members: dict[Group, list[int]] = {}
    if isinstance(documents, DocumentList):
        return _group_by_index(documents)
    for n, document in enumerate(documents):
        members.setdefault(Group(document.domain, not isinstance(document.text, str)), []).append(n)
    return members


def _group_by_index(documents: DocumentList) -> dict[Group, Sequence[int]]:
    codes = documents.domain_codes.astype(np.int64) * 2 + documents.is_dialogue
    found, first = np.unique(codes, return_index=True)
    members: dict[Group, Sequence[int]] = {}
    for code in found[np.argsort(first)].tolist():
        numbers = np.flatnonzero(codes == code).astype(np.int32)
        members[Group(documents.domain_names[code // 2], bool(code % 2))] = array("i", numbers.tobytes())
    return members


def plan_batches(
    window: slice, lengths: Sequence[int], members: Mapping[Group, Sequence[int]], *, prefix: Prefix, batch_tokens: int
) -> list[list[Passage]]:
    """Batch the documents of `window` into rows of similar length.

    A batch has at most `batch_tokens` tokens including padding, or a single row. `lengths` and `members` (from
    `group_documents`) cover all documents, because the documents in front may come from another window.
    """
    if not prefix.tokens:
        batches = forward.group_into_batches(lengths[window], batch_tokens)
        return [put_each_alone(window.start + k for k in batch) for batch in batches]
    rows, sizes = [], []
    for group, of_group in members.items():
        between = 1 if group.is_conversations else prefix.separator_tokens
        for row in _plan_rows(of_group, window, lengths, prefix, between=between, whole=group.is_conversations):
            rows.append(row)
            sizes.append(row.prefix + sum(lengths[n] + between for n in row.documents))
    return [[rows[k] for k in batch] for batch in forward.group_into_batches(sizes, batch_tokens)]


def put_each_alone(numbers: Iterable[int]) -> list[Passage]:
    """Return a passage for each document, without any prefix."""
    return [Passage(documents=[n]) for n in numbers]


def list_documents(batch: Sequence[Passage]) -> list[int]:
    """Return the numbers of the documents of all passages, in order."""
    return [n for passage in batch for n in passage.documents]


def extract_batch(batch: Sequence[Passage], documents: Sequence[Any]) -> tuple[list[Any], list[Passage]]:
    """Return the documents that the batch needs, and the batch renumbered to match them."""
    needed = sorted({n for p in batch for n in (*p.before, *p.documents)})
    place = {n: k for k, n in enumerate(needed)}
    renumbered = [
        replace(p, documents=[place[n] for n in p.documents], before=[place[n] for n in p.before]) for p in batch
    ]
    return [documents[n] for n in needed], renumbered


def pack_documents(lengths: Sequence[int] | Mapping[int, int], stream: Iterable[int], tokens: int) -> list[list[int]]:
    """Cut the stream into batches of at most `tokens` tokens each, or of one document that is longer."""
    result: list[list[int]] = []
    room = 0
    for i in stream:
        if not result or lengths[i] > room:
            result.append([])
            room = tokens
        result[-1].append(i)
        room -= lengths[i]
    return result


def join_tokens(
    passage: Passage, segmentations: Sequence[Segmentation], separator: Int[ndarray, "_"]
) -> tuple[Int[ndarray, "length"], Bool[ndarray, "length"]]:
    """Return a row's tokens, with `separator` between texts, and flags for those of its own documents.

    Between conversations stands the token with which the latter begins. Of a conversation, the flags are set for the
    tokens of its responses.
    """
    parts, own, front = [], [], 0
    for place, n in enumerate((*passage.before, *passage.documents)):
        found = segmentations[n]
        lead = separator if found.reading is None else np.array([found.reading.first])
        if place == 0:
            lead = separator[:0]
        parts += [lead, found.read_ids]
        is_own = place >= len(passage.before)
        own += [np.zeros(len(lead), bool), found.is_kept if is_own else np.zeros(len(found.read_ids), bool)]
        if place <= len(passage.before):
            front += len(lead)
        if not is_own:
            front += len(found.read_ids)
    begin = front - passage.prefix
    return np.concatenate(parts)[begin:], np.concatenate(own)[begin:]


def tokenize_separator(vocabulary: Vocabulary) -> Int[ndarray, "_"]:
    """Return the tokens that stand between documents; none if the tokenizer has no line breaks."""
    (ids,) = vocabulary.encode_bytes([SEPARATOR])
    return np.array([] if UNMAPPED in ids else ids, np.int64)


def _plan_rows(
    members: Sequence[int], window: slice, lengths: Sequence[int], prefix: Prefix, *, between: int, whole: bool
) -> Iterator[Passage]:
    """Yield the rows for those documents of a group that are in the window, with `between` tokens before each.

    In front of a row stand as many of the group's preceding documents as it takes; if there are too few, documents
    that follow it are used too. If they must be `whole`, those that are too long are left out.
    """

    def size(k: int) -> int:
        return lengths[members[k]] + between

    read = range(bisect_left(members, window.start), bisect_left(members, window.stop))
    room = prefix.context_length - 1  # one for the context token
    most = max(min(DOCUMENTS_PER_PREFIX * prefix.tokens, room - prefix.tokens), 1)
    if len(read) == len(members) and (total := sum(map(size, read))) <= most:
        most = -(-total // 2)  # read each half behind the other
    for pack in pack_documents({k: size(k) for k in read}, read, most):
        wanted = max(min(prefix.tokens, room - sum(map(size, pack))), 0)
        others = itertools.chain(range(pack[0] - 1, -1, -1), range(pack[-1] + 1, len(members)))
        before, tokens = [], 0
        for k in itertools.islice(others, MOST_TRIED if whole else None):
            if tokens >= wanted:
                break
            if not whole or tokens + size(k) <= wanted:
                before.append(k)
                tokens += size(k)
        before.sort(key=lambda k: (k < pack[0], k))  # the preceding document stands right in front
        yield Passage(
            documents=[members[k] for k in pack],
            before=[members[k] for k in before],
            prefix=min(wanted, tokens),
        )
