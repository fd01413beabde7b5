"""Regroup texts into rows that can be split, where files alone give a domain too few documents to hold some out.

Domains with fewer than `FEWEST` documents become one. A domain with less than `ENOUGH` is cut into pieces, which then
count as documents of their own, if that gives `PIECES`. So a single long file, or a folder with two notes, is enough.
"""

import glob
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fuselm.documents import cutting
from fuselm.documents.corpus import is_empty
from fuselm.documents.text_files import find_copies, find_files, name_domains, strip_endings
from fuselm.documents.texts import TextRow, read_texts

FEWEST = 3  # documents of a domain without splits: one to train on, one for dev, one held out
ENOUGH = 12  # documents of a domain that can hold out six, which an interval needs, and train on as many
PIECES = 24  # of a domain that has to be cut: a quarter of them are six
LONGEST, SHORTEST = 2048, 256  # bytes of a piece
MERGED = "texts"  # the domain of several that had too few documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrouped:
    """Hold texts after regrouping: `rows` copied from some of the files, and the `names` of the files that stay.

    `domains` are the regrouped ones.
    """

    rows: list[TextRow]
    names: list[str]
    domains: list[str]


def regroup_texts(names: Sequence[str | Path], columns: Mapping[str, str] | None = None) -> Regrouped | None:
    """Return the texts regrouped, or None if the files can be split as they are.

    `columns` renames fields, as for `read_texts`.

    Raises:
        ValueError: If a file cannot be read, or if there is too little text for any split.
    """
    found = find_files(names)
    copies = find_copies(found, names)
    rows = _read_files([file for file in found if file not in copies], columns)
    together = [row for of_file in rows.values() for row in of_file]
    counts = Counter(row.domain for row in together if row.split is None)
    tiny = sorted(domain for domain, count in counts.items() if count < FEWEST)
    name = tiny[0] if len(tiny) == 1 else MERGED
    groups = {domain: [r for r in together if r.domain == domain and r.split is None] for domain in counts}
    if tiny:
        merged = [row for domain in tiny for row in groups.pop(domain)]
        groups[name] = [replace(row, domain=name) for row in [*merged, *groups.get(name, [])]]
    split = {row.domain for row in together if row.split is not None}
    whole = {domain for domain, group in groups.items() if domain in split and len(group) >= FEWEST}
    cut = {domain: _cut_group(group) for domain, group in groups.items() if domain not in whole}
    changed = {domain: pieces for domain, pieces in cut.items() if pieces is not None}
    if len(tiny) > 1 and name not in changed:
        changed[name] = groups[name]
    touched = {*changed, *tiny}
    if not changed and together:
        return None
    if not together:
        raise ValueError(f"{', '.join(map(str, names))}: no text in it; add some")
    is_copied = {file: any(r.domain in touched and r.split is None for r in of_file) for file, of_file in rows.items()}
    if columns or not _are_domains_kept(rows, is_copied, columns):
        is_copied = dict.fromkeys(rows, True)
    copied = [row for file, of_file in rows.items() if is_copied[file] for row in of_file]
    copied = [row for row in copied if row.domain not in touched or row.split is not None]
    return Regrouped(
        rows=copied + [row for found in changed.values() for row in found],
        names=_name_files(names, {file for file, is_one in is_copied.items() if not is_one}, copies),
        domains=sorted(changed),
    )


def read_rows(names: Sequence[str | Path], columns: Mapping[str, str] | None = None) -> list[TextRow]:
    """Return the rows of the named files that hold something. `columns` renames fields, as for `read_texts`."""
    found = find_files(names)
    copies = find_copies(found, names)
    read = _read_files([file for file in found if file not in copies], columns)
    return [row for of_file in read.values() for row in of_file]


def write_rows(rows: Sequence[TextRow]) -> str:
    """Return rows as JSON lines."""
    lines = (
        {"domain": r.domain}
        | ({"text": r.text} if isinstance(r.text, str) else r.text.as_row())
        | ({"split": r.split} if r.split else {})
        for r in rows
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _read_files(files: Sequence[Path], columns: Mapping[str, str] | None) -> dict[Path, list[TextRow]]:
    """Return the rows of each file that hold something, with their domains."""
    domains = name_domains(files, lambda file: {row.domain for row in read_texts(file, strip_endings(file), columns)})
    return {
        file: [row for row in read_texts(file, domain, columns) if not is_empty(row.text)]
        for file, domain in zip(files, domains, strict=True)
    }


def _are_domains_kept(
    rows: Mapping[Path, list[TextRow]], is_copied: Mapping[Path, bool], columns: Mapping[str, str] | None
) -> bool:
    """Tell whether the files that stay give the same rows without the others."""
    alone = _read_files([file for file, is_one in is_copied.items() if not is_one], columns)
    return all(of_file == rows[file] for file, of_file in alone.items())


def _name_files(names: Sequence[str | Path], kept: set[Path], copies: set[Path]) -> list[str]:
    """Return names that stand for those files of `names` that are kept: as they were given, patterns, or files.

    A pattern may stand for `copies`, too, because a run does not read them.
    """
    result: list[str] = []
    for name in names:
        files = find_files([name])
        if (kept | copies).issuperset(files):
            result += [str(name)] if kept.intersection(files) else []
            continue
        groups: dict[str, list[Path]] = {}
        for file in files:
            if file in kept:
                groups.setdefault(f"{glob.escape(str(file.parent))}/*{file.suffix}", []).append(file)
        for pattern, members in groups.items():
            is_pattern_exact = len(members) > 1 and set(find_files([pattern])) - copies == set(members)
            result += [pattern] if is_pattern_exact else map(str, members)
    return result


def _cut_group(rows: Sequence[TextRow]) -> list[TextRow] | None:
    """Return a domain's rows, cut so far that there are enough of them; None if they stay as they are.

    Conversations stay whole. Raises `ValueError` if there is too little text for any split.
    """
    if len(rows) >= ENOUGH:
        return None
    size = LONGEST
    while True:
        pieces = [
            replace(row, text=piece)
            for row in rows
            for piece in (cutting.cut_text(row.text, [], size) if isinstance(row.text, str) else [row.text])
            if not is_empty(piece)
        ]
        if len(pieces) >= PIECES:
            return pieces
        if size <= SHORTEST:
            break
        size //= 2
    if len(rows) >= FEWEST:
        return None
    if len(pieces) >= FEWEST:
        return pieces
    have = sum(len(row.text.encode()) for row in rows)
    raise ValueError(
        f"{', '.join(dict.fromkeys(row.where or row.domain for row in rows))}: {have} bytes of text are too little to "
        f"train on and to hold some out; needed are {FEWEST} documents, better {ENOUGH}, or some "
        f"{PIECES * SHORTEST // 1000} kB of text"
    )
