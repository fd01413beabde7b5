"""Turn texts into documents: read them, split each domain into train, dev and held-out, and cut what is too long.

A document is drawn whole into one split, unless its row says which. A document too long for any model is then cut into
pieces, the same for all models, at the last paragraph, line, sentence, word or else character that fits; joined again,
the pieces are the document. Conversations are cut between turns (dialogue_cutting.py).

The files are read twice, row by row: first to decide with a few numbers for each row what becomes of it (splitting.py),
then to cut, tokenize and write what is kept. So memory grows by some 30 bytes a document.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.documents import cutting, dialogue_cutting, splitting
from fuselm.documents.cutting import Reader
from fuselm.documents.document import SPLITS, Document
from fuselm.documents.document_writing import DocumentWriter
from fuselm.documents.splitting import RowNumbers
from fuselm.documents.texts import TextRow, read_texts
from fuselm.models.chat.messages import Dialogue
from fuselm.system.progress import Progress, announce

UNASSIGNED = "drawn"  # in counts, the split of rows that name none
RESERVED_DOMAINS = ("average", "step")  # columns in the tables of results
BLOCK_DOCUMENTS, BLOCK_BYTES = 512, 1 << 20  # of texts that are tokenized together


def prepare_corpus(
    files: Sequence[Path],
    out: Path,
    *,
    domains: Sequence[str],
    readers: Sequence[Reader],
    max_bytes: int,
    dev: float,
    heldout: float,
    share: float,
    seed: int,
    progress: Progress,
    columns: Sequence[Mapping[str, str]] | None = None,
    skip_bad: bool = False,
    split: str = "draw",
    near_repeats: str = "ignore",
) -> dict:
    """Write the documents to `out`; return the counts of documents, bytes and tokens.

    `domains` gives, for each file, the domain of rows that name none. `dev` and `heldout` are shares of each domain's
    documents whose rows name no split, and `split` says how they are chosen; `share` is the share of its training
    documents that is kept. `columns` renames each file's fields, as for `read_texts`. With `skip_bad`, conversations
    that cannot be used, or that a model's chat template refuses, are left out and counted as `bad`. `near_repeats` says
    what becomes of training texts that are nearly the same as one of dev or held-out. The counts include `dialogues`
    only if there are any, and `unspelled` only if some reader's tokenizer cannot spell all of the text.

    Raises `ValueError` if a file can't be read, or a domain is too small to hold documents out from.
    """
    bad: list[None] = []

    def read_rows(skip: Callable[[str], None] | None) -> Iterator[TextRow]:
        for file, domain, renamed in zip(files, domains, columns or [{}] * len(files), strict=True):
            yield from read_texts(file, domain, renamed, skip=skip)

    with announce("reading the texts once, to decide which are held out"):
        scanned = _scan(read_rows, readers, skip=(lambda problem: bad.append(None)) if skip_bad else None)
    numbers = scanned.numbers
    check_domains(_count_rows(numbers), files, dev=dev, heldout=heldout)
    if split == "hash":
        splits = splitting.choose_by_hash(numbers.hashes, numbers.named, dev=dev, heldout=heldout, seed=seed)
        _check_hashed(numbers, splits)
    else:
        splits = splitting.draw(
            numbers.domains, numbers.named, numbers.domain_names, dev=dev, heldout=heldout, seed=seed
        )
    unleaked = splitting.find_unleaked(numbers.hashes, splits)
    _check_unleaked(numbers, splits, unleaked, "texts")
    kept, near = unleaked, None
    if near_repeats != "ignore":
        from fuselm.documents import near_repeating

        near = near_repeating.find(lambda: _pick(read_rows, scanned, unleaked), splits[unleaked], progress=progress)
        if near_repeats == "drop":
            kept = unleaked.copy()
            kept[np.flatnonzero(unleaked)[near]] = False
            _check_unleaked(numbers, splits, kept, "texts, or texts that are nearly the same,")
    chosen = splitting.choose_share(numbers.domains, splits, kept, numbers.domain_names, share=share, seed=seed)
    progress.start(int(chosen.sum()), unit="documents")
    sums = _Sums([reader.name for reader in readers])
    writer = DocumentWriter(out, [reader.name for reader in readers])
    documents = (
        Document(id=(name := f"{n:06d}"), origin=name, domain=row.domain, split=SPLITS[splits[n]], text=row.text)
        for n, row in _pick(read_rows, scanned, chosen)
    )
    for piece in cut_and_count(documents, readers, max_bytes, advance=progress.advance):
        sums.add(piece)
        if piece.is_read:
            writer.add(piece.document, piece.tokens)
    sums.check_splits_are_read()
    writer.finish()
    return {
        "documents": {f"{d}/{s}": n for (d, s), n in sorted(sums.documents.items())},
        "empty": scanned.empty + sums.unread,
        **({"bad": len(bad)} if bad else {}),
        **({"dialogues": sums.dialogues} if sums.dialogues else {}),
        "repeated": int(len(unleaked) - unleaked.sum()),
        **({} if near is None else {"near_repeats": len(near)}),
        "cut": sums.pieces - int(chosen.sum()),
        "bytes": {s: sums.bytes_by_split[s] for s in SPLITS},
        "tokens": {name: {s: of[s] for s in SPLITS} for name, of in sums.tokens.items()},
        **({"unspelled": shares} if (shares := sums.list_unspelled()) else {}),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scanned:
    """Hold what the first reading found: flags of the rows that are used, numbers of these, and the empty ones."""

    is_used: bytearray
    numbers: RowNumbers
    empty: int


def _scan(
    read_rows: Callable[..., Iterator[TextRow]], readers: Sequence[Reader], *, skip: Callable[[str], None] | None
) -> _Scanned:
    numbers, is_used, empty = RowNumbers(), bytearray(), 0
    for row in read_rows(skip):
        used = not is_empty(row.text)
        empty += not used
        used = used and dialogue_cutting.is_readable(row, readers, skip=skip)
        is_used.append(used)
        if used:
            numbers.add(row.domain, row.split, row.text)
    return _Scanned(is_used=is_used, numbers=numbers, empty=empty)


def _pick(
    read_rows: Callable[..., Iterator[TextRow]], scanned: _Scanned, chosen: Bool[ndarray, "rows"]
) -> Iterator[tuple[int, TextRow]]:
    """Read the rows again, and yield those that are chosen with their numbers among the used ones."""
    number = 0
    for row, used in zip(read_rows(lambda problem: None), scanned.is_used, strict=True):
        if used:
            if chosen[number]:
                yield number, row
            number += 1


def _count_rows(numbers: RowNumbers) -> dict[str, dict[str, int]]:
    """Count rows by domain and by the split that they name, as `count_domains` does."""
    result = {}
    for code, name in enumerate(numbers.domain_names):
        found, counts = np.unique(numbers.named[numbers.domains == code], return_counts=True)
        names = [UNASSIGNED if split == splitting.UNNAMED else SPLITS[split] for split in found.tolist()]
        result[name] = dict(zip(names, counts.tolist(), strict=True))
    return result


def _check_hashed(numbers: RowNumbers, splits: Int[ndarray, "rows"]) -> None:
    for code, name in enumerate(numbers.domain_names):
        for split in sorted(set(range(len(SPLITS))) - set(np.unique(splits[numbers.domains == code]).tolist())):
            raise ValueError(
                f"corpus.split: by hashes, domain '{name}' has no document in {SPLITS[split]}; add more text, or leave "
                "the option out to have a fixed share drawn"
            )


def _check_unleaked(numbers: RowNumbers, splits: Int[ndarray, "rows"], kept: Bool[ndarray, "rows"], what: str) -> None:
    """Raise `ValueError` if a domain has lost all documents of a split."""
    pairs = numbers.domains.astype(np.int64) * len(SPLITS) + splits
    lost = set(np.unique(pairs).tolist()) - set(np.unique(pairs[kept]).tolist())
    for domain, split in sorted((numbers.domain_names[n // len(SPLITS)], SPLITS[n % len(SPLITS)]) for n in lost):
        raise ValueError(f"corpus: all {what} of domain '{domain}' in {split} are held out too; drop the repeated ones")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedPiece:
    """Hold a piece of a document with its tokens, and its bytes that are not spelled, for each reader."""

    document: Document
    tokens: Sequence[int]
    unspelled: Sequence[int]

    @property
    def is_read(self) -> bool:
        """Tell whether every reader has tokens for it: some tokenizers drop control characters."""
        return all(self.tokens)


def cut_and_count(
    documents: Iterable[Document],
    readers: Sequence[Reader],
    max_bytes: int | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[CountedPiece]:
    """Yield documents as `cut_to_fit` cuts them, with their tokens. Many are tokenized at once, on all cores.

    `advance` is called with the number of documents that are done.
    """
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text) if isinstance(document.text, str) else document.text.count_bytes()
        if len(block) >= BLOCK_DOCUMENTS or size >= BLOCK_BYTES:
            yield from _cut_block(block, readers, max_bytes)
            advance(len(block))
            block, size = [], 0
    yield from _cut_block(block, readers, max_bytes)
    advance(len(block))


def _cut_block(
    documents: Sequence[Document], readers: Sequence[Reader], max_bytes: int | None
) -> Iterator[CountedPiece]:
    is_short = [isinstance(d.text, str) and (max_bytes is None or _has_at_most(d.text, max_bytes)) for d in documents]
    counted = _count([d for d, short in zip(documents, is_short, strict=True) if short], readers)
    limits = [reader.max_tokens - 1 for reader in readers]  # one for the context token
    for document, short in zip(documents, is_short, strict=True):
        if short:
            tokens, unspelled = next(counted)
            if all(count <= limit for count, limit in zip(tokens, limits, strict=True)):
                yield CountedPiece(document=document, tokens=tokens, unspelled=unspelled)
                continue
        pieces = list(cut_to_fit([document], readers, max_bytes))
        for piece, (tokens, unspelled) in zip(pieces, _count(pieces, readers), strict=True):
            yield CountedPiece(document=piece, tokens=tokens, unspelled=unspelled)


def _has_at_most(text: str, size: int) -> bool:
    return len(text) <= size and (len(text) * 4 <= size or len(text.encode()) <= size)


def _count(documents: Sequence[Document], readers: Sequence[Reader]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, for each document, its tokens and its unspelled bytes by reader."""
    texts = [document.text for document in documents]
    found = [reader.vocabulary.count_tokens_and_unspelled(texts) for reader in readers]
    for n in range(len(texts)):
        yield [tokens[n] for tokens, _ in found], [unspelled[n] for _, unspelled in found]


@dataclass(slots=True)
class _Sums:
    """Sum what the counts of the corpus say, piece by piece."""

    readers: Sequence[str]
    pieces: int = 0
    unread: int = 0
    dialogues: int = 0
    documents: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes_by_split: Counter[str] = field(default_factory=Counter)
    bytes_by_domain: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, Counter[str]] = field(default_factory=dict)
    unspelled: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.readers:
            self.tokens[name], self.unspelled[name] = Counter(), Counter()

    def add(self, piece: CountedPiece) -> None:
        document, self.pieces = piece.document, self.pieces + 1
        if not piece.is_read:
            self.unread += 1
            self.lost[document.domain, document.split] += 1
            return
        size = len(document.text.encode())
        self.documents[document.domain, document.split] += 1
        self.dialogues += isinstance(document.text, Dialogue)
        self.bytes_by_split[document.split] += size
        self.bytes_by_domain[document.domain] += size
        for name, count, lacking in zip(self.readers, piece.tokens, piece.unspelled, strict=True):
            self.tokens[name][document.split] += count
            if lacking:
                self.unspelled[name][document.domain] += lacking

    def check_splits_are_read(self) -> None:
        for domain, name in sorted(set(self.lost) - set(self.documents)):
            raise ValueError(
                f"corpus: all of domain '{domain}' in {name} is text that a model's tokenizer has no tokens for; "
                "drop it"
            )

    def list_unspelled(self) -> dict[str, dict]:
        """Return, for each reader that cannot spell all of the text, the share of bytes it cannot."""
        return {name: _compute_shares(of, self.bytes_by_domain) for name, of in self.unspelled.items() if of}


def count_tokens(documents: Sequence[Document], readers: Sequence[Reader]) -> Int[np.ndarray, "readers documents"]:
    """Count the tokens of each document for each reader.

    The count can be 0, because some tokenizers drop control characters, and so whole documents of them.
    """
    texts = [document.text for document in documents]
    return np.array([r.vocabulary.count_tokens(texts) for r in readers], int).reshape(len(readers), len(texts))


def compute_unspelled_shares(documents: Sequence[Document], unspelled: Sequence[int]) -> dict:
    """Return the `share` of all bytes that are not spelled, and the share in each of the `domains` that has any."""
    lacking, whole = Counter[str](), Counter[str]()
    for document, count in zip(documents, unspelled, strict=True):
        lacking[document.domain] += count
        whole[document.domain] += len(document.text.encode())
    return _compute_shares(lacking, whole)


def _compute_shares(lacking: Counter[str], whole: Counter[str]) -> dict:
    return {
        "share": lacking.total() / max(whole.total(), 1),
        "domains": {domain: lacking[domain] / whole[domain] for domain in sorted(lacking) if lacking[domain]},
    }


def is_empty(text: str | Dialogue) -> bool:
    """Tell whether there is nothing in a text; a conversation has always something."""
    return isinstance(text, str) and (not text or text.isspace())


def count_characters(text: str | Dialogue) -> int:
    """Count the characters of a text, or of all messages of a conversation."""
    return len(text) if isinstance(text, str) else sum(len(message.content) for message in text.messages)


def count_domains(rows: Iterable[TextRow]) -> dict[str, dict[str, int]]:
    """Count, by domain, the documents that are not empty and name each split, or none (`UNASSIGNED`)."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if not is_empty(row.text):
            counts.setdefault(row.domain, Counter())[row.split or UNASSIGNED] += 1
    return {domain: dict(said) for domain, said in counts.items()}


def check_domains(
    counts: Mapping[str, Mapping[str, int]], files: Sequence[Path], *, dev: float, heldout: float
) -> None:
    """Raise `ValueError` if there is no text, or if a domain is too small to split or lacks a split."""
    if not counts:
        raise ValueError(f"corpus: no text in {', '.join(map(str, files))}; each line needs a 'text' that is not empty")
    for domain, said in counts.items():
        if domain in RESERVED_DOMAINS:
            raise ValueError(f"corpus: a domain is named '{domain}', which results use for themselves; rename it")
        count = said.get(UNASSIGNED, 0)
        missing = [split for split in SPLITS if split not in said]
        if not count and missing:
            raise ValueError(
                f"corpus: domain '{domain}' has no document in {' and '.join(missing)}, and each of its rows names "
                "its 'split'; add some to each split, or 3 or more that name none"
            )
        if count and count < sum(splitting.count_held_out(count, dev, heldout)) + 1:
            which = " that name no split" if count < sum(said.values()) else ""
            raise ValueError(
                f"corpus: domain '{domain}' has {count} documents{which}, "
                "too few to hold some out; it needs 3 or more, and dev and heldout shares that leave some to train on"
            )


def draw_splits(rows: Iterable[TextRow], *, dev: float, heldout: float, seed: int) -> Iterator[Document]:
    """Draw each domain's dev and held-out documents, and yield all documents in the order of the files.

    Only documents whose rows name no split are drawn, at least one for each of the two splits.
    """
    rows, numbers = list(rows), RowNumbers()
    for row in rows:
        numbers.add(row.domain, row.split, row.text)
    splits = splitting.draw(numbers.domains, numbers.named, numbers.domain_names, dev=dev, heldout=heldout, seed=seed)
    for n, row in enumerate(rows):
        yield Document(id=f"{n:06d}", origin=f"{n:06d}", domain=row.domain, split=SPLITS[splits[n]], text=row.text)


def cut_to_fit(
    documents: Iterable[Document],
    readers: Sequence[Reader],
    max_bytes: int | None = None,
    *,
    advance: Callable[[int], None] = lambda characters: None,
) -> Iterator[Document]:
    """Yield the documents, cutting those that are longer than `max_bytes` or than any reader can take.

    `advance` is called with the number of characters of each piece.
    """
    for document in documents:
        if isinstance(document.text, str):
            pieces: list[str | Dialogue] = list(cutting.cut_text(document.text, readers, max_bytes, advance=advance))
        else:
            pieces = list(dialogue_cutting.cut_dialogue(document.text, readers, max_bytes))
            advance(count_characters(document.text))
        if len(pieces) == 1:
            yield document
            continue
        for n, piece in enumerate(pieces):
            yield replace(document, id=f"{document.id}.{n}", text=piece)
