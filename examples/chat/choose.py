"""Give answers numbers, for `write.choose: examples/chat/choose.py:closest`: the higher, the better."""

import difflib
from collections.abc import Mapping


def closest(answer: str, row: Mapping) -> float:
    """Return how much of an answer is the one that people gave, 1 if it is the same; short answers must be the same."""
    wanted = row["messages"][-1]["content"]
    if row["domain"] == "reasoning":
        return float(answer.strip(" .\n").casefold() == wanted.casefold())
    return difflib.SequenceMatcher(None, wanted, answer, autojunk=False).ratio()
