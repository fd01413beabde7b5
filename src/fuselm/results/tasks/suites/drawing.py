"""Draw the questions of a suite: the same ones everywhere, from a seed that is part of the suite."""

import random
from collections.abc import Callable, Iterable
from typing import Any

Make = Callable[[random.Random], tuple[str, str, str]]  # a good sentence, a bad one, and the words that it is about


def draw_pairs(makers: dict[str, Make], *, each: int) -> list[dict[str, Any]]:
    """Return that many pairs of each phenomenon, without repetitions; fewer where there are no more."""
    rows = []
    for phenomenon, make in makers.items():
        generator, seen = random.Random(phenomenon), set()
        for _ in range(60 * each):
            good, bad, about = make(generator)
            if good not in seen and good != bad and len(seen) < each:
                seen.add(good)
                rows.append({"phenomenon": phenomenon, "document": f"{phenomenon}: {about}", "good": good, "bad": bad})
    return rows


def make_dataset(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return rows as the test split of a data set, as lm-eval takes it."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(rows))}
