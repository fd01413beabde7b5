"""The papers' maps of a source's token ids to a target's: by spelling, by company, by pairing.

A map has a target id for each source id, or UNMAPPED: for a row of the output layer that has no token, and where the
target token that was found stands for no text. docs/paper.md
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm import fingerprints, manifest
from fuselm.nearest import nearest_tokens
from fuselm.vocabulary import UNMAPPED, Vocabulary

FORMAT = 1  # of a kept map; raise it when the same vocabularies would be mapped otherwise


def nearest_map(source: Vocabulary, target: Vocabulary) -> Int[ndarray, "source_vocabulary"]:
    """MinED (Wan et al. 2024, section 3.2): the token at least edit distance, the lowest of several; kept on disk.

    Strings are compared with the source's word mark replaced by the target's. A kept map that is missing or damaged is
    made again.
    """
    path = fingerprints.cache() / "maps" / f"{_fingerprint(source)}-{_fingerprint(target)}-{FORMAT}"
    if (ids := _kept(path, source.size)) is None:
        strings = _strings_for(source, target)
        tokens = [i for i, string in enumerate(source.token_strings) if string is not None]
        ids = np.full(source.size, UNMAPPED, np.int64)
        ids[tokens] = nearest_tokens([strings[i] for i in tokens], target.token_strings)
        ids = _of_text(ids, target)
        _keep(path, ids)
    return ids


def _strings_for(source: Vocabulary, target: Vocabulary) -> list[str]:
    """The source's token strings as the target would mark them."""
    strings = [string or "" for string in source.token_strings]
    if not source.word_mark:
        return strings
    return [string.replace(source.word_mark, target.word_mark) for string in strings]


def _of_text(ids: Int[ndarray, "source_vocabulary"], target: Vocabulary) -> Int[ndarray, "source_vocabulary"]:
    is_text = np.array([spelled is not None for spelled in target.token_bytes])
    return np.where((ids != UNMAPPED) & is_text[ids], ids, UNMAPPED)


def _fingerprint(vocabulary: Vocabulary) -> str:
    """Of all that `nearest_map` looks at."""
    is_text = [spelled is not None for spelled in vocabulary.token_bytes]
    return fingerprints.digest([json.dumps([vocabulary.token_strings, is_text, vocabulary.word_mark])])


def _kept(path: Path, size: int) -> Int[ndarray, "source_vocabulary"] | None:
    """The map in a file: its SHA-256, then its ids; None unless it is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    ids = data[32:]
    if len(ids) != 4 * size or hashlib.sha256(ids).digest() != data[:32]:
        return None
    return np.frombuffer(ids, "<i4").astype(np.int64)


def _keep(path: Path, ids: Int[ndarray, "source_vocabulary"]) -> None:
    """Where the folder can't be written to, the map is made again each time."""
    data = ids.astype("<i4").tobytes()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(path, lambda temporary: temporary.write_bytes(hashlib.sha256(data).digest() + data))
