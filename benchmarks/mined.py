"""How long the paper's alignment takes, beside the obvious way to do it, and whether both find the same.

    python benchmarks/mined.py SOURCE TARGET TEXTS.jsonl

Of the map of all the source's vocabulary, and of pairing 2,048 positions with 2,048; each once after compilation.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fuselm import corpus, models
from fuselm.mined import pair_positions, unmarked
from fuselm.nearest import nearest_tokens
from fuselm.vocabulary import Vocabulary

POSITIONS = 2048
CHUNK = 512


def main(source: str, target: str, texts: str) -> None:
    vocabularies = [vocabulary_of(source), vocabulary_of(target)]
    marks = [vocabulary.word_mark for vocabulary in vocabularies]
    strings = [string.replace(*marks) for string in vocabularies[0].token_strings if string is not None]
    compare("map", nearest_tokens, brute_force, strings, vocabularies[1].token_strings)
    text = " ".join(text for _, text in corpus.read_texts(Path(texts)))
    tokens = [unmarked(vocabulary, vocabulary.segment(text).ids)[:POSITIONS] for vocabulary in vocabularies]
    compare("pairs", pair_positions, direct_path, *tokens)


def vocabulary_of(spec: str) -> Vocabulary:
    model = models.locate(spec)
    return Vocabulary(models.load_tokenizer(model), model.output_size)


def compare(name: str, ours: Callable, obvious: Callable, left: list, right: list) -> None:
    ours(left[:7], right[:7])
    found, seconds = timed(ours, left, right)
    expected, obvious_seconds = timed(obvious, left, right)
    same = "the same" if np.array_equal(found, expected) else "NOT THE SAME"
    ratio = obvious_seconds / seconds
    print(f"{name}: {seconds:.3f} s; the obvious way {obvious_seconds:.1f} s, {ratio:.0f} times as long; {same}")


def timed(function: Callable, *arguments: list) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def brute_force(strings: list[str], vocabulary: list[str | None]) -> np.ndarray:
    """All distances, in C and on all cores."""
    ids = np.array([i for i, token in enumerate(vocabulary) if token is not None])
    tokens = [token for token in vocabulary if token is not None]
    nearest = []
    for begin in range(0, len(strings), CHUNK):
        chunk = strings[begin : begin + CHUNK]
        distances = cdist(chunk, tokens, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        nearest.append(ids[distances.argmin(axis=1)])
    return np.concatenate(nearest)


def direct_path(source: list[str], target: list[str]) -> list[tuple[int, int]]:
    """The dynamic programme in Python; only distances are computed in C."""
    table = [[float("inf")] * (len(target) + 1) for _ in range(len(source) + 1)]
    table[0][0] = 0
    for i, left in enumerate(source, start=1):
        row, above = table[i], table[i - 1]
        for j, right in enumerate(target, start=1):
            row[j] = Levenshtein.distance(left, right) + min(above[j - 1], above[j], row[j - 1])
    path, (i, j) = [], (len(source), len(target))
    while (i, j) != (0, 0):
        path.append((i - 1, j - 1))
        i, j = min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda cell: table[cell[0]][cell[1]])
    return path[::-1]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
