"""Regroup texts into rows that can be split, where files alone give a domain too few documents to hold some out.

Domains with too few documents become one. If that is still too few, its documents are cut into pieces, which then count
as documents of their own. So a single long file, or a folder with two notes, is enough for a run.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fuselm.documents import cutting
from fuselm.documents.corpus import is_empty
from fuselm.documents.text_files import find_files, name_domains, strip_endings
from fuselm.documents.texts import TextRow, read_texts

FEWEST = 3  # documents of a domain without splits: one to train on, one for dev, one held out
ENOUGH = 12  # pieces of a domain that has to be cut
LONGEST, SHORTEST = 2048, 256  # bytes of a piece
MERGED = "texts"  # the domain of all that had too few documents, beside others


def regroup_texts(names: Sequence[str | Path]) -> list[TextRow] | None:
    """Return the rows of the texts, regrouped, or None if the files can be split as they are.

    Raises:
        ValueError: If a file cannot be read, or if there is too little text for any split.
    """
    files = find_files(names)
    domains = name_domains(files, lambda file: {row.domain for row in read_texts(file, strip_endings(file))})
    rows = [row for file, domain in zip(files, domains, strict=True) for row in read_texts(file, domain)]
    rows = [row for row in rows if not is_empty(row.text)]
    counts = Counter(row.domain for row in rows if row.split is None)
    small = {domain for domain, count in counts.items() if count < FEWEST}
    if not small and rows:
        return None
    kept = [row for row in rows if row.domain not in small or row.split is not None]
    merged = [replace(row, domain=MERGED) for row in rows if row.domain in small and row.split is None]
    if len(merged) + counts.get(MERGED, 0) < FEWEST or MERGED in small:
        merged = _cut_rows(merged)
    return kept + merged


def write_rows(rows: Sequence[TextRow]) -> str:
    """Return rows as JSON lines."""
    lines = (
        {"domain": r.domain}
        | ({"text": r.text} if isinstance(r.text, str) else r.text.as_row())
        | ({"split": r.split} if r.split else {})
        for r in rows
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _cut_rows(rows: Sequence[TextRow]) -> list[TextRow]:
    """Cut documents into pieces, as long as there are enough of them; conversations stay whole."""
    size = LONGEST
    whole = [row for row in rows if not isinstance(row.text, str)]
    while True:
        pieces = whole + [
            replace(row, text=piece)
            for row in rows
            if isinstance(row.text, str)
            for piece in cutting.cut_text(row.text, [], size)
            if piece.strip()
        ]
        if len(pieces) >= ENOUGH:
            return pieces
        if size <= SHORTEST:
            if len(pieces) >= FEWEST:
                return pieces
            have = sum(len(row.text.encode()) for row in rows)
            raise ValueError(f"texts: {have} bytes are too little to train on and to hold some out; add text")
        size //= 2
