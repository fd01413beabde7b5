"""Make questions that only the context answers: what came after the same words before.

Distilled pretraining can cost in-context learning (arXiv 2509.01649), and these show it: lists of words in a random
order, of strings that are no words, and names with numbers.
"""

import random
from collections.abc import Callable
from typing import Any

from fuselm.results.tasks.suites.drawing import make_dataset

WORDS = "river stone apple window garden letter music winter paper silver morning bridge forest island market doctor engine flower summer kitchen mirror pocket ticket village basket candle dinner feather guitar hammer jacket ladder mountain needle orange pencil rabbit saddle table umbrella valley wagon yellow anchor butter castle desert farmer harbor ivory jungle kettle lemon magnet novel ocean pepper quarter ribbon sailor temple uncle velvet whisper circle".split()
NAMES = "Anna Peter Marie Paul Laura David Sarah Thomas Julia Robert Emma Daniel Alice Martin Clara Victor Helen Simon Nora Oscar Irene Felix Diana Hugo".split()
LENGTH, ASKED = 16, (4, 9, 14)  # words of a list, and after how many of its repetition the next is asked for
PAIRS = 8  # names with numbers
LISTS, RECALLS = 200, (125, 4)  # lists of words; of names, and how many of each are asked about
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def load(kind: str, **_: Any) -> dict[str, Any]:
    """Return the questions of one kind as a data set."""
    return make_dataset(KINDS[kind](random.Random(kind)))


def repeat_words(r: random.Random) -> list[dict[str, Any]]:
    """Ask for the next word of a list that is repeated."""
    return _repeat(r, lambda: r.sample(WORDS, LENGTH))


def repeat_strings(r: random.Random) -> list[dict[str, Any]]:
    """Ask for the next string of a list that is repeated; the strings are no words."""
    return _repeat(
        r, lambda: ["".join(r.choice(CONSONANTS) + r.choice(VOWELS) for _ in range(3)) for _ in range(LENGTH)]
    )


def recall_numbers(r: random.Random) -> list[dict[str, Any]]:
    """Ask for the number that a name has, among others."""
    rows = []
    lists, asked = RECALLS
    for n in range(lists):
        pairs = list(zip(r.sample(NAMES, PAIRS), r.sample(range(100, 1000), PAIRS), strict=True))
        told = "".join(f"{who}: {what}\n" for who, what in pairs)
        for name, number in r.sample(pairs, asked):
            rows.append({"document": f"{n}", "context": f"{told}{name}:", "word": str(number)})
    return rows


def _repeat(r: random.Random, draw: Callable[[], list[str]]) -> list[dict[str, Any]]:
    rows = []
    for n in range(LISTS):
        words = draw()
        for told in ASKED:
            context = " ".join([*words, *words[:told]])
            rows.append({"document": f"{n}", "context": context, "word": words[told]})
    return rows


KINDS = {"words": repeat_words, "strings": repeat_strings, "numbers": recall_numbers}
