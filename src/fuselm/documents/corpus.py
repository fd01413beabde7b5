"""Turn texts into documents: read them, split each domain into train, dev and held-out, and cut what is too long.

A document is drawn whole into one split, unless its row says which. A document too long for any model is then cut into
pieces, the same for all models, at the last paragraph, line, sentence, word or else character that fits; joined again,
the pieces are the document. Conversations are cut between turns (dialogue_cutting.py).
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from fuselm.documents import cutting, dialogue_cutting
from fuselm.documents.cutting import Reader
from fuselm.documents.document import SPLITS, Document
from fuselm.documents.document_writing import DocumentWriter
from fuselm.documents.texts import TextRow, read_texts
from fuselm.models.chat.messages import Dialogue
from fuselm.system.progress import Progress

UNASSIGNED = "drawn"  # in counts, the split of rows that name none
RESERVED_DOMAINS = ("average", "step")  # columns in the tables of results


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
) -> dict:
    """Write `documents.jsonl` to `out`; return the counts of documents, bytes and tokens.

    `domains` gives, for each file, the domain of rows that name none. `dev` and `heldout` are shares of each domain's
    documents whose rows name no split; `share` is the share of its training documents that is kept. `columns` renames
    each file's fields, as for `read_texts`. With `skip_bad`, conversations that cannot be used, or that a model's chat
    template refuses, are left out and counted as `bad`. The counts include `dialogues` only if there are any, and
    `unspelled` only if some reader's tokenizer cannot spell all of the text.

    Raises `ValueError` if a file can't be read, or a domain is too small to hold documents out from.
    """
    named = zip(files, domains, columns or [{}] * len(files), strict=True)
    bad: list[str] = []
    skip = bad.append if skip_bad else None
    rows = [row for file, domain, renamed in named for row in read_texts(file, domain, renamed, skip=skip)]
    filled = [row for row in rows if not is_empty(row.text)]
    kept = [row for row in filled if dialogue_cutting.is_readable(row, readers, skip=skip)]
    check_domains(count_domains(kept), files, dev=dev, heldout=heldout)
    drawn = list(draw_splits(kept, dev=dev, heldout=heldout, seed=seed))
    unleaked = drop_leaked(drawn)
    whole = keep_share(unleaked, share, seed=seed)
    progress.start(sum(count_characters(d.text) for d in whole), unit="characters")
    pieces = list(cut_to_fit(whole, readers, max_bytes, advance=progress.advance))
    counts, unspelled = _count_tokens_and_unspelled(pieces, readers)
    read = counts.all(axis=0)
    documents = [d for d, of_all in zip(pieces, read, strict=True) if of_all]
    _check_splits_are_read(pieces, documents)
    splits = np.array([d.split for d in pieces])
    writer = DocumentWriter(out, [reader.name for reader in readers])
    for piece, given, of_all in zip(pieces, counts.T.tolist(), read.tolist(), strict=True):
        if of_all:
            writer.add(piece, given)
    writer.finish()
    dialogues = sum(isinstance(document.text, Dialogue) for document in documents)
    return {
        "documents": {f"{d}/{s}": n for (d, s), n in sorted(Counter((d.domain, d.split) for d in documents).items())},
        "empty": len(rows) - len(filled) + len(pieces) - len(documents),
        **({"bad": len(bad)} if bad else {}),
        **({"dialogues": dialogues} if dialogues else {}),
        "repeated": len(drawn) - len(unleaked),
        "cut": len(pieces) - len(whole),
        "bytes": {s: sum(len(d.text.encode()) for d in documents if d.split == s) for s in SPLITS},
        "tokens": {
            reader.name: {s: int(of[read & (splits == s)].sum()) for s in SPLITS}
            for reader, of in zip(readers, counts, strict=True)
        },
        **({"unspelled": shares} if (shares := _list_unspelled(documents, readers, unspelled[:, read])) else {}),
    }


def count_tokens(documents: Sequence[Document], readers: Sequence[Reader]) -> Int[np.ndarray, "readers documents"]:
    """Count the tokens of each document for each reader.

    The count can be 0, because some tokenizers drop control characters, and so whole documents of them.
    """
    texts = [document.text for document in documents]
    return np.array([r.vocabulary.count_tokens(texts) for r in readers], int).reshape(len(readers), len(texts))


def _count_tokens_and_unspelled(
    pieces: Sequence[Document], readers: Sequence[Reader]
) -> tuple[Int[np.ndarray, "readers pieces"], Int[np.ndarray, "readers pieces"]]:
    """Count the tokens of each piece for each reader, and the bytes that the reader's tokenizer cannot spell."""
    texts = [piece.text for piece in pieces]
    counts = [reader.vocabulary.count_tokens_and_unspelled(texts) for reader in readers]
    both = np.array(counts, int).reshape(len(readers), 2, len(texts))
    return both[:, 0], both[:, 1]


def _list_unspelled(
    documents: Sequence[Document], readers: Sequence[Reader], unspelled: Int[np.ndarray, "readers documents"]
) -> dict[str, dict]:
    """Return, for each reader that cannot spell all of the text, the share of bytes it cannot, in all and by domain."""
    return {
        reader.name: compute_unspelled_shares(documents, of.tolist())
        for reader, of in zip(readers, unspelled, strict=True)
        if of.any()
    }


def compute_unspelled_shares(documents: Sequence[Document], unspelled: Sequence[int]) -> dict:
    """Return the `share` of all bytes that are not spelled, and the share in each of the `domains` that has any."""
    lacking, whole = Counter[str](), Counter[str]()
    for document, count in zip(documents, unspelled, strict=True):
        lacking[document.domain] += count
        whole[document.domain] += len(document.text.encode())
    return {
        "share": lacking.total() / max(whole.total(), 1),
        "domains": {domain: lacking[domain] / whole[domain] for domain in sorted(lacking) if lacking[domain]},
    }


def _check_splits_are_read(pieces: Sequence[Document], documents: Sequence[Document]) -> None:
    for domain, name in sorted({(d.domain, d.split) for d in pieces} - {(d.domain, d.split) for d in documents}):
        raise ValueError(
            f"corpus: all of domain '{domain}' in {name} is text that a model's tokenizer has no tokens for; drop it"
        )


def is_empty(text: str | Dialogue) -> bool:
    """Tell whether there is nothing in a text; a conversation has always something."""
    return isinstance(text, str) and not text.strip()


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
        if count and count < sum(count_held_out(count, dev, heldout)) + 1:
            which = " that name no split" if count < sum(said.values()) else ""
            raise ValueError(
                f"corpus: domain '{domain}' has {count} documents{which}, "
                "too few to hold some out; it needs 3 or more, and dev and heldout shares that leave some to train on"
            )


def count_held_out(count: int, dev: float, heldout: float) -> tuple[int, int]:
    """Return how many of `count` documents are drawn for dev and for held-out, at least one each."""
    return max(1, round(dev * count)), max(1, round(heldout * count))


def draw_splits(rows: Sequence[TextRow], *, dev: float, heldout: float, seed: int) -> Iterator[Document]:
    """Draw each domain's dev and held-out documents, and yield all documents in the order of the files.

    Only documents whose rows name no split are drawn, at least one for each of the two splits.
    """
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.split is None:
            members.setdefault(row.domain, []).append(i)
    splits = [row.split or "train" for row in rows]
    for domain, indices in members.items():
        dev_count, heldout_count = count_held_out(len(indices), dev, heldout)
        drawn = random.Random(f"{seed} {domain}").sample(indices, dev_count + heldout_count)
        for i in drawn[:dev_count]:
            splits[i] = "dev"
        for i in drawn[dev_count:]:
            splits[i] = "heldout"
    for i, row in enumerate(rows):
        yield Document(id=f"{i:06d}", origin=f"{i:06d}", domain=row.domain, split=splits[i], text=row.text)


def drop_leaked(documents: Sequence[Document]) -> list[Document]:
    """Drop training texts that are also in dev or held-out, and dev texts that are also in held-out.

    Raises `ValueError` if that leaves a domain without any document of a split.
    """
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    for document in documents:
        texts[document.split].add(_identify_text(document.text))
    texts["dev"] -= texts["heldout"]
    texts["train"] -= texts["dev"] | texts["heldout"]
    kept = [d for d in documents if _identify_text(d.text) in texts[d.split]]
    for domain, name in sorted({(d.domain, d.split) for d in documents} - {(d.domain, d.split) for d in kept}):
        raise ValueError(f"corpus: all texts of domain '{domain}' in {name} are held out too; drop the repeated ones")
    return kept


def _identify_text(text: str | Dialogue) -> str:
    """Return what texts and conversations share if they say the same, whatever white space is around it."""
    if isinstance(text, str):
        return text.strip()
    return json.dumps([[message.role, message.content.strip()] for message in text.messages], ensure_ascii=False)


def keep_share(documents: Sequence[Document], share: float, *, seed: int) -> list[Document]:
    """Keep a share of each domain's training documents, at least one, and all dev and held-out documents.

    With the same seed, a larger share includes all documents of a smaller one.
    """
    chosen: set[str] = set()
    for domain in {d.domain for d in documents}:
        members = sorted(d.id for d in documents if d.domain == domain and d.split == "train")
        random.Random(f"{seed} {domain} part").shuffle(members)
        chosen.update(members[: max(1, round(share * len(members)))])
    return [d for d in documents if d.split != "train" or d.id in chosen]


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
