"""Map a source's token ids to a target's as the papers do: by spelling, by neighbors, or by paired positions.

A map has a target id for each source id. It has UNMAPPED for a row of the output layer that has no token, and for a
source token whose target token stands for no text (docs/paper.md).
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import no_type_check

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.alignment import mined
from fuselm.alignment.nearest import find_nearest_tokens, find_tied_tokens
from fuselm.models.chat.messages import Dialogue
from fuselm.models.vocabulary import UNMAPPED, Segmentation, Vocabulary
from fuselm.system import atomic_files, fingerprints, index_checks
from fuselm.system.compiling import compiled

FORMAT = 1  # version of kept maps; increase it when the same vocabularies get another map
WINDOW = 5  # tokens on either side that are a token's neighbors
MOST_HELD_PAIRS = 1 << 22  # pairs that are held before they are counted
TIED_TOKENS = 4096  # tokens whose ties are held at a time


def build_nearest_map(source: Vocabulary, target: Vocabulary) -> Int[ndarray, "source_vocabulary"]:
    """Map each token to the lowest id at the least edit distance, and keep the map on disk.

    This is MinED (Wan et al. 2024, section 3.2). Strings are compared with the source's word mark replaced by the
    target's. A kept map that is missing or damaged is built again.
    """
    path = fingerprints.find_cache_folder() / "maps" / f"{_fingerprint(source)}-{_fingerprint(target)}-{FORMAT}"
    if (ids := _read_kept_map(path, source.size)) is None:
        strings = _mark_as_target(source, target)
        tokens = [i for i, string in enumerate(source.token_strings) if string is not None]
        ids = np.full(source.size, UNMAPPED, np.int64)
        ids[tokens] = find_nearest_tokens([strings[i] for i in tokens], target.token_strings)
        ids = _drop_textless(ids, target)
        _keep_map(path, ids)
    return ids


def build_cooccurrence_map(
    source: Vocabulary, target: Vocabulary, texts: Iterable[str | Dialogue]
) -> Int[ndarray, "source_vocabulary"]:
    """Map each token to the token of the most similar neighbors, among those at the least edit distance.

    A token's neighbors are the target's tokens around it, whichever vocabulary the token itself belongs to: the last
    WINDOW tokens that end where it begins or before, and the first WINDOW tokens that begin where it ends or after.
    Similarity is the cosine of counts. A token that is not in the texts has no neighbors and is similar to none. Of
    equally similar tokens, the lowest id is chosen.
    """
    ids = build_nearest_map(source, target)
    strings = _mark_as_target(source, target)
    pairs = [(source.segment(text), target.segment(text)) for text in texts]
    of_source = _build_sparse_matrix(
        *_count_pairs((_pair_with_neighbors(s, t) for s, t in pairs), target.size), source.size
    )
    of_target = _build_sparse_matrix(
        *_count_pairs((_pair_with_neighbors(t, t) for _, t in pairs), target.size), target.size
    )
    seen = np.flatnonzero(np.diff(of_source[0]))
    for begin in range(0, len(seen), TIED_TOKENS):
        tokens = seen[begin : begin + TIED_TOKENS]
        ties = find_tied_tokens([strings[i] for i in tokens], target.token_strings)
        index_checks.require_within("a tied token", np.concatenate(ties), target.size)
        ends = np.cumsum([len(tied) for tied in ties])
        ids[tokens] = _choose_most_similar(tokens, np.concatenate(ties), ends, of_source, of_target)
    return _drop_textless(ids, target)


def build_statistics_map(
    source: Vocabulary, target: Vocabulary, texts: Iterable[str | Dialogue]
) -> Int[ndarray, "source_vocabulary"]:
    """Map each token to the token that the texts most often pair with it by position; the lowest id of several.

    This is FuseChat's map (Wan et al. 2024, arXiv 2408.07990). A token that is not in the texts is mapped to the one at
    the least edit distance.
    """
    ids = build_nearest_map(source, target)
    sources, targets, counts = _count_pairs((_pair_by_position(source, target, text) for text in texts), target.size)
    order = np.lexsort((targets, -counts, sources))
    seen, first = np.unique(sources[order], return_index=True)
    ids[seen] = targets[order[first]]
    return _drop_textless(ids, target)


def _mark_as_target(source: Vocabulary, target: Vocabulary) -> list[str]:
    """Return the source's token strings with the target's word mark."""
    strings = [string or "" for string in source.token_strings]
    if not source.word_mark:
        return strings
    return [string.replace(source.word_mark, target.word_mark) for string in strings]


def _drop_textless(ids: Int[ndarray, "source_vocabulary"], target: Vocabulary) -> Int[ndarray, "source_vocabulary"]:
    """Return the map with UNMAPPED for target tokens that stand for no text."""
    is_text = np.array([spelled is not None for spelled in target.token_bytes])
    return np.where((ids != UNMAPPED) & is_text[ids], ids, UNMAPPED)


def _pair_with_neighbors(
    tokens: Segmentation, target: Segmentation
) -> tuple[Int[ndarray, "pairs"], Int[ndarray, "pairs"]]:
    """Pair each token with the target tokens around it."""
    before = np.searchsorted(target.ends, tokens.starts, side="right")[:, None]
    after = np.searchsorted(target.starts, tokens.ends, side="left")[:, None]
    steps = np.arange(WINDOW)
    places = np.concatenate([before - 1 - steps, after + steps], axis=1)
    exist = (places >= 0) & (places < len(target.ids))
    owners = np.broadcast_to(tokens.ids[:, None], places.shape)
    return owners[exist], target.ids[places[exist]]


def _pair_by_position(
    source: Vocabulary, target: Vocabulary, text: str | Dialogue
) -> tuple[Int[ndarray, "pairs"], Int[ndarray, "pairs"]]:
    """Pair source tokens with target tokens by their positions."""
    s, t = source.segment(text).ids, target.segment(text).ids
    path = mined.pair_positions(mined.strip_word_marks(source, s), mined.strip_word_marks(target, t))
    return s[path[:, 0]], t[path[:, 1]]


def _count_pairs(
    pairs: Iterable[tuple[Int[ndarray, "_"], Int[ndarray, "_"]]], width: int
) -> tuple[Int[ndarray, "pairs"], Int[ndarray, "pairs"], Int[ndarray, "pairs"]]:
    """Return the distinct pairs, in order, and their counts; the second number of a pair is below `width`."""
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for batch in _join_into_batches(
        (first.astype(np.int64) * width + second for first, second in pairs), MOST_HELD_PAIRS
    ):
        new, times = np.unique(batch, return_counts=True)
        keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times])).astype(np.int64)
    return keys // width, keys % width, counts


def _join_into_batches(arrays: Iterator[Int[ndarray, "_"]], least: int) -> Iterator[Int[ndarray, "_"]]:
    """Yield joined arrays that have at least `least` numbers, except the last."""
    held: list[ndarray] = []
    for array in arrays:
        held.append(array)
        if sum(map(len, held)) >= least:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _build_sparse_matrix(
    rows: Int[ndarray, "e"], columns: Int[ndarray, "e"], counts: Int[ndarray, "e"], size: int
) -> tuple:
    """Build a sparse matrix: where each of `size` rows begins, its columns, and its counts."""
    return np.searchsorted(rows, np.arange(size + 1)), columns, counts


@compiled()
@no_type_check  # numba cannot cache a function that a type checker wraps
def _choose_most_similar(tokens: ndarray, ties: ndarray, ends: ndarray, of_source: tuple, of_target: tuple) -> ndarray:
    """Choose the first of each token's ties whose row in `of_target` is most similar to its row in `of_source`.

    Similarity is the cosine.
    """
    offsets, columns, counts = of_target
    row = np.zeros(len(offsets) - 1, np.int64)
    chosen = np.empty(len(tokens), np.int64)
    begin = 0
    for k in range(len(tokens)):
        low, high = of_source[0][tokens[k]], of_source[0][tokens[k] + 1]
        row[of_source[1][low:high]] = of_source[2][low:high]
        best = -1.0
        for tie in ties[begin : ends[k]]:
            dot, square = 0.0, 0.0
            for at in range(offsets[tie], offsets[tie + 1]):
                dot += row[columns[at]] * counts[at]
                square += counts[at] ** 2
            likeness = dot * dot / square if square > 0.0 else 0.0  # cosine squared, without the token's own length
            if likeness > best:
                best, chosen[k] = likeness, tie
        row[of_source[1][low:high]] = 0
        begin = ends[k]
    return chosen


def _fingerprint(vocabulary: Vocabulary) -> str:
    """Fingerprint everything that `build_nearest_map` looks at."""
    is_text = [spelled is not None for spelled in vocabulary.token_bytes]
    return fingerprints.hash_lines([json.dumps([vocabulary.token_strings, is_text, vocabulary.word_mark])])


def _read_kept_map(path: Path, size: int) -> Int[ndarray, "source_vocabulary"] | None:
    """Read the map in a file, which holds its SHA-256 and then its ids; return None unless it is intact."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    ids = data[32:]
    if len(ids) != 4 * size or hashlib.sha256(ids).digest() != data[:32]:
        return None
    return np.frombuffer(ids, "<i4").astype(np.int64)


def _keep_map(path: Path, ids: Int[ndarray, "source_vocabulary"]) -> None:
    """Write the map to a file; if the folder cannot be written to, the map is built again each time."""
    data = ids.astype("<i4").tobytes()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_file(path, lambda temporary: temporary.write_bytes(hashlib.sha256(data).digest() + data))
