"""Choose what a source reads before it writes a text: some documents of a domain, in random order, behind one another.

Of few documents, all are put in order for each prompt, from one stream of random numbers, as earlier versions did. Of
more, each batch has a stream of its own, and as many documents are drawn as the prompt needs. So a batch is made
without those before it, in a time that does not grow with the corpus, and nothing is held but numbers of documents.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.documents import passages
from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.documents.token_counting import count_read_tokens
from fuselm.models.vocabulary import Vocabulary

FEW = 10_000  # documents
BATCH = 64  # texts that are written together
Prompt = tuple[Document, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Hold how many prompts are made, and how long they are.

    `size` is how much is to be written for each byte of the documents, as one number or by domain, in texts of `tokens`
    tokens. A prompt has `length` tokens, or all of its domain.
    """

    size: float | Mapping[str, float]
    length: int
    tokens: int
    seed: str


class PromptBatches(Sequence[list[Prompt]]):
    """Make batches of prompts, each when it is asked for, or all at once if there are few documents."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        documents: Sequence[Document],
        options: PromptOptions,
        *,
        reader: str | None = None,
    ):
        self._vocabulary, self._documents, self._options = vocabulary, documents, options
        self._between = passages.tokenize_separator(vocabulary).tolist()
        counts = np.asarray(count_read_tokens(vocabulary, documents, reader=reader), np.int64) + len(self._between)
        self._members = dict(sorted(_group_by_domain(documents).items()))
        self._lengths, self._sizes = dict[str, int](), list[int]()
        self._places: list[tuple[str, int]] = []  # of each batch: its domain, and its number there
        for domain, members in self._members.items():
            read = int(counts[members].sum())
            self._lengths[domain] = min(options.length, read)
            of_domain = options.size.get(domain, 0.0) if isinstance(options.size, Mapping) else options.size
            prompts = round(of_domain * read / options.tokens)
            begins = range(0, prompts, BATCH)
            self._places += [(domain, number) for number in range(len(begins))]
            self._sizes += [min(BATCH, prompts - begin) for begin in begins]
        self._made = list(self._put_all_in_order()) if len(documents) <= FEW else None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number):
        if self._made is not None:
            return self._made[number]
        domain, within = self._places[number]
        drawn = random.Random(f"{self._options.seed} {domain} {within}")
        return [self._draw(domain, drawn) for _ in range(self._sizes[number])]

    @property
    def domains(self) -> list[str]:
        """Return the domains of the documents in alphabetical order."""
        return list(self._members)

    @property
    def sizes(self) -> list[int]:
        """Return the number of prompts in each batch."""
        return self._sizes

    def _put_all_in_order(self) -> Iterator[list[Prompt]]:
        drawn = random.Random(self._options.seed)
        domain, tokens = "", dict[int, list[int]]()
        for (now, _), size in zip(self._places, self._sizes, strict=True):
            if now != domain:
                domain, tokens = now, {}
            members = self._members[domain].tolist()
            batch = []
            for _ in range(size):
                order = drawn.sample(members, len(members))
                batch.append(self._join(domain, iter(order), tokens))
            yield batch

    def _draw(self, domain: str, drawn: random.Random) -> Prompt:
        return self._join(domain, _draw_without_repeating(self._members[domain], drawn), {})

    def _join(self, domain: str, order: Iterator[int], tokens: dict[int, list[int]]) -> Prompt:
        """Return the prompt that ends with the first document of `order`, and that document."""
        last, ids = None, list[int]()
        for number in order:
            last = number if last is None else last
            if len(ids) >= self._lengths[domain]:
                break
            if number not in tokens:
                tokens[number] = self._vocabulary.segment(self._documents[number].text).ids.tolist() + self._between
            ids = tokens[number] + ids
        assert last is not None
        return self._documents[last], ids[len(ids) - self._lengths[domain] :]


def _draw_without_repeating(members: Int[ndarray, "members"], drawn: random.Random) -> Iterator[int]:
    seen = set[int]()
    while len(seen) < len(members):
        place = drawn.randrange(len(members))
        if place not in seen:
            seen.add(place)
            yield int(members[place])


def _group_by_domain(documents: Sequence[Document]) -> dict[str, Int[ndarray, "members"]]:
    """Return the numbers of the documents of each domain."""
    if isinstance(documents, DocumentList):
        codes, names = documents.domain_codes, documents.domain_names
    else:
        names = list(dict.fromkeys(document.domain for document in documents))
        codes = np.array([names.index(document.domain) for document in documents], np.int32)
    members = {name: np.flatnonzero(codes == code).astype(np.int32) for code, name in enumerate(names)}
    return {name: of_domain for name, of_domain in members.items() if len(of_domain)}
