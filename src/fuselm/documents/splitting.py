"""Assign each document to train, dev or held-out, and find repeated texts, from a few numbers for each document.

The numbers are the document's domain, the split that its row names, and a hash of its text: 21 bytes a document.
"""

import hashlib
import json
import random
from array import array
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt64
from numpy import ndarray

from fuselm.documents.document import SPLITS
from fuselm.models.chat.messages import Dialogue

UNNAMED = -1  # the split of a row that names none
TRAIN, DEV, HELDOUT = range(len(SPLITS))


class RowNumbers:
    """Collect the numbers of rows as they are read."""

    def __init__(self) -> None:
        self.domain_names: list[str] = []
        self._codes: dict[str, int] = {}
        self._domains, self._named = array("i"), array("b")
        self._hashes = bytearray()

    def __len__(self) -> int:
        return len(self._domains)

    def add(self, domain: str, split: str | None, text: str | Dialogue) -> None:
        """Add a row."""
        code = self._codes.setdefault(domain, len(self._codes))
        if code == len(self.domain_names):
            self.domain_names.append(domain)
        self._domains.append(code)
        self._named.append(UNNAMED if split is None else SPLITS.index(split))
        self._hashes += hashlib.blake2b(spell_text(text), digest_size=16).digest()

    @property
    def domains(self) -> Int[ndarray, "rows"]:
        """Return the number of each row's domain in `domain_names`."""
        return np.frombuffer(self._domains, np.int32)

    @property
    def named(self) -> Int[ndarray, "rows"]:
        """Return the number of the split that each row names, or `UNNAMED`."""
        return np.frombuffer(self._named, np.int8)

    @property
    def hashes(self) -> UInt64[ndarray, "rows 2"]:
        """Return a hash of each text, which is the same whatever white space is around it."""
        return np.frombuffer(self._hashes, np.uint64).reshape(-1, 2)


def spell_text(text: str | Dialogue) -> bytes:
    """Return the bytes that texts and conversations share if they say the same, whatever white space is around it."""
    if isinstance(text, str):
        return text.strip().encode()
    said = [[message.role, message.content.strip()] for message in text.messages]
    return json.dumps(said, ensure_ascii=False).encode("utf-8", "backslashreplace")


def count_held_out(count: int, dev: float, heldout: float) -> tuple[int, int]:
    """Return how many of `count` documents are drawn for dev and for held-out, at least one each."""
    return max(1, round(dev * count)), max(1, round(heldout * count))


def draw(
    domains: Int[ndarray, "rows"],
    named: Int[ndarray, "rows"],
    names: Sequence[str],
    *,
    dev: float,
    heldout: float,
    seed: int,
) -> Int[ndarray, "rows"]:
    """Return the split of each row: the one that it names, or one drawn from its domain's rows that name none.

    At least one row of a domain is drawn for dev and one for held-out.
    """
    splits = np.where(named == UNNAMED, TRAIN, named).astype(np.int8)
    for domain, name in enumerate(names):
        members = np.flatnonzero((domains == domain) & (named == UNNAMED))
        if not len(members):
            continue
        dev_count, heldout_count = count_held_out(len(members), dev, heldout)
        drawn = random.Random(f"{seed} {name}").sample(range(len(members)), dev_count + heldout_count)
        splits[members[drawn[:dev_count]]] = DEV
        splits[members[drawn[dev_count:]]] = HELDOUT
    return splits


def choose_by_hash(
    hashes: UInt64[ndarray, "rows 2"], named: Int[ndarray, "rows"], *, dev: float, heldout: float, seed: int
) -> Int[ndarray, "rows"]:
    """Return the split of each row: the one that it names, or one that depends on its text and the seed alone.

    So more text moves no document from one split to another, and a text that is there twice is in one split.
    """
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = hashes[:, 0] ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    place = (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
    chosen = np.where(place < heldout, HELDOUT, np.where(place < heldout + dev, DEV, TRAIN))
    return np.where(named == UNNAMED, chosen, named).astype(np.int8)


def find_unleaked(hashes: UInt64[ndarray, "rows 2"], splits: Int[ndarray, "rows"]) -> Bool[ndarray, "rows"]:
    """Flag the rows to keep: no training text that is also in dev or held-out, no dev text that is in held-out."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    texts = np.empty(len(order), np.int32 if len(order) < 1 << 31 else np.int64)
    texts[order] = np.cumsum(is_new) - 1
    del order
    strictest = np.zeros(int(is_new.sum()), np.int8)
    np.maximum.at(strictest, texts, splits)  # held-out is the last of `SPLITS`
    return splits == strictest[texts]


def choose_share(
    domains: Int[ndarray, "rows"],
    splits: Int[ndarray, "rows"],
    kept: Bool[ndarray, "rows"],
    names: Sequence[str],
    *,
    share: float,
    seed: int,
) -> Bool[ndarray, "rows"]:
    """Return `kept` with a share of each domain's training rows, at least one, and all dev and held-out rows.

    With the same seed, a larger share includes all rows of a smaller one.
    """
    if share == 1:
        return kept
    chosen = kept & (splits != TRAIN)
    for domain, name in enumerate(names):
        members = np.flatnonzero(kept & (splits == TRAIN) & (domains == domain)).tolist()
        members.sort(key="{:06d}".format)  # as their names are sorted
        random.Random(f"{seed} {name} part").shuffle(members)
        chosen[members[: max(1, round(share * len(members)))]] = True
    return chosen
