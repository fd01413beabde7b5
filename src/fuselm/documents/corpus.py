"""Text into documents: read, split per domain into train, dev and held-out, cut to what every model can read.

A document is drawn whole into one split, unless its row says which. One too long for a model is then cut into pieces,
the same for all models, at the last paragraph, line, sentence, word or else character that fits; joined again, the
pieces are the document.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from fuselm.documents import cutting
from fuselm.documents.cutting import Reader
from fuselm.documents.texts import SPLITS, Row, read_texts
from fuselm.system import manifest
from fuselm.system.progress import Progress

DRAWN = "drawn"  # in counts, the split of rows that say none
FILE = "documents.jsonl"
RESERVED = ("average", "step")  # columns of results


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A piece of text that every model reads whole. Pieces of one document have one `origin`."""

    id: str
    origin: str
    domain: str
    split: str
    text: str


def prepare(
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
) -> dict:
    """Write `documents.jsonl` to `out`; return what was counted: `unspelled` only if a reader does not spell all.

    `domains` are those of rows that say none, by file. `dev` and `heldout` are shares of those of each domain's
    documents that say no split, `share` is what is kept of its training documents. Raises `ValueError` on files that
    can't be read, or a domain too small to hold out from.
    """
    rows = [row for file, domain in zip(files, domains, strict=True) for row in read_texts(file, domain)]
    kept = [row for row in rows if row.text.strip()]
    check_domains(count_domains(kept), files, dev=dev, heldout=heldout)
    drawn = list(split(kept, dev=dev, heldout=heldout, seed=seed))
    apart = without_repeated(drawn)
    whole = part(apart, share, seed=seed)
    progress.start(sum(len(d.text) for d in whole), unit="characters")
    pieces = list(cut_to_fit(whole, readers, max_bytes, advance=progress.advance))
    counts, unspelled = _count_read(pieces, readers)
    read = counts.all(axis=0)
    documents = [d for d, of_all in zip(pieces, read, strict=True) if of_all]
    _check_read(pieces, documents)
    splits = np.array([d.split for d in pieces])
    lines = (json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in documents)
    manifest.write_text(out / FILE, "".join(lines))
    return {
        "documents": {f"{d}/{s}": n for (d, s), n in sorted(Counter((d.domain, d.split) for d in documents).items())},
        "empty": len(rows) - len(kept) + len(pieces) - len(documents),
        "repeated": len(drawn) - len(apart),
        "cut": len(pieces) - len(whole),
        "bytes": {s: sum(len(d.text.encode()) for d in documents if d.split == s) for s in SPLITS},
        "tokens": {
            reader.name: {s: int(of[read & (splits == s)].sum()) for s in SPLITS}
            for reader, of in zip(readers, counts, strict=True)
        },
        **({"unspelled": shares} if (shares := _unspelled_shares(documents, readers, unspelled[:, read])) else {}),
    }


def count_tokens(documents: Sequence[Document], readers: Sequence[Reader]) -> Int[np.ndarray, "readers documents"]:
    """Of each document for each reader; some tokenizers drop control characters, and so whole documents of them."""
    texts = [document.text for document in documents]
    return np.array([r.vocabulary.count_tokens(texts) for r in readers], int).reshape(len(readers), len(texts))


def _count_read(
    pieces: Sequence[Document], readers: Sequence[Reader]
) -> tuple[Int[np.ndarray, "readers pieces"], Int[np.ndarray, "readers pieces"]]:
    """Count the tokens of each piece for each reader, and the bytes that they do not spell."""
    texts = [piece.text for piece in pieces]
    counts = [reader.vocabulary.count_tokens_and_unspelled(texts) for reader in readers]
    both = np.array(counts, int).reshape(len(readers), 2, len(texts))
    return both[:, 0], both[:, 1]


def _unspelled_shares(
    documents: Sequence[Document], readers: Sequence[Reader], unspelled: Int[np.ndarray, "readers documents"]
) -> dict[str, dict]:
    """Return the share of bytes that a reader does not spell, in all and by domain, of those that do not spell all."""
    return {
        reader.name: share_by_domain(documents, of.tolist())
        for reader, of in zip(readers, unspelled, strict=True)
        if of.any()
    }


def share_by_domain(documents: Sequence[Document], unspelled: Sequence[int]) -> dict:
    """Return the `share` of all bytes that are not spelled, and that of those `domains` where there are any."""
    lacking, whole = Counter[str](), Counter[str]()
    for document, count in zip(documents, unspelled, strict=True):
        lacking[document.domain] += count
        whole[document.domain] += len(document.text.encode())
    return {
        "share": lacking.total() / max(whole.total(), 1),
        "domains": {domain: lacking[domain] / whole[domain] for domain in sorted(lacking) if lacking[domain]},
    }


def _check_read(pieces: Sequence[Document], documents: Sequence[Document]) -> None:
    for domain, name in sorted({(d.domain, d.split) for d in pieces} - {(d.domain, d.split) for d in documents}):
        raise ValueError(
            f"corpus: all of domain '{domain}' in {name} is text that a model's tokenizer has no tokens for; drop it"
        )


def read_documents(folder: Path, split: str | None = None) -> list[Document]:
    """The documents that `prepare` wrote, of one split or all."""
    try:
        with open(folder / FILE, encoding="utf-8") as file:
            documents = [Document(**json.loads(line)) for line in file]
    except (ValueError, TypeError, FileNotFoundError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ValueError(f"{folder / FILE}: {what}; delete {folder} and run again") from None
    return [d for d in documents if split in (None, d.split)]


def count_domains(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """How many documents that are not empty say each split or none (`DRAWN`), by domain."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if row.text.strip():
            counts.setdefault(row.domain, Counter())[row.split or DRAWN] += 1
    return {domain: dict(said) for domain, said in counts.items()}


def check_domains(
    counts: Mapping[str, Mapping[str, int]], files: Sequence[Path], *, dev: float, heldout: float
) -> None:
    """Raises `ValueError` where there is nothing to split, or a domain is too small for it or lacks a split."""
    if not counts:
        raise ValueError(f"corpus: no text in {', '.join(map(str, files))}; each line needs a 'text' that is not empty")
    for domain, said in counts.items():
        if domain in RESERVED:
            raise ValueError(f"corpus: a domain is named '{domain}', which results use for themselves; rename it")
        count = said.get(DRAWN, 0)
        missing = [split for split in SPLITS if split not in said]
        if not count and missing:
            raise ValueError(
                f"corpus: domain '{domain}' has no document in {' and '.join(missing)}, for each of its rows says its "
                "'split'; it needs some in each, or 3 or more that say none"
            )
        if count and count < sum(_held_out_counts(count, dev, heldout)) + 1:
            which = " that say no split" if count < sum(said.values()) else ""
            raise ValueError(
                f"corpus: domain '{domain}' has {count} documents{which}, "
                "too few to hold some out; it needs 3 or more, and dev and heldout shares that leave some to train on"
            )


def _held_out_counts(count: int, dev: float, heldout: float) -> tuple[int, int]:
    """Of so many documents of one domain how many are drawn for dev and held-out: at least one of each."""
    return max(1, round(dev * count)), max(1, round(heldout * count))


def split(rows: Sequence[Row], *, dev: float, heldout: float, seed: int) -> Iterator[Document]:
    """Draw dev and held-out documents, at least one of each, from those of each domain that say no split, whatever the
    others are; keep the order of the files.
    """
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.split is None:
            members.setdefault(row.domain, []).append(i)
    splits = [row.split or "train" for row in rows]
    for domain, indices in members.items():
        dev_count, heldout_count = _held_out_counts(len(indices), dev, heldout)
        drawn = random.Random(f"{seed} {domain}").sample(indices, dev_count + heldout_count)
        for i in drawn[:dev_count]:
            splits[i] = "dev"
        for i in drawn[dev_count:]:
            splits[i] = "heldout"
    for i, row in enumerate(rows):
        yield Document(id=f"{i:06d}", origin=f"{i:06d}", domain=row.domain, split=splits[i], text=row.text)


def without_repeated(documents: Sequence[Document]) -> list[Document]:
    """Those whose text is not in a split that is read later, too: what is held out nobody has seen. Raises `ValueError`
    where that leaves a domain none of a split.
    """
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    for document in documents:
        texts[document.split].add(document.text.strip())
    texts["dev"] -= texts["heldout"]
    texts["train"] -= texts["dev"] | texts["heldout"]
    kept = [d for d in documents if d.text.strip() in texts[d.split]]
    for domain, name in sorted({(d.domain, d.split) for d in documents} - {(d.domain, d.split) for d in kept}):
        raise ValueError(f"corpus: all texts of domain '{domain}' in {name} are held out too; drop what is there twice")
    return kept


def part(documents: Sequence[Document], share: float, *, seed: int) -> list[Document]:
    """All documents but training documents, and of each domain's a share, at least one; a larger share has all those of
    a smaller.
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
    """Yield the documents, those in pieces that are longer than `max_bytes` or than a reader can take.

    `advance` is told the characters of each piece.
    """
    for document in documents:
        pieces = list(cutting.cut(document.text, readers, max_bytes, advance=advance))
        if len(pieces) == 1:
            yield document
            continue
        for n, piece in enumerate(pieces):
            yield replace(document, id=f"{document.id}.{n}", text=piece)
