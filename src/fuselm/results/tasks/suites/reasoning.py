"""Make questions of the package reasoning-gym, and judge answers by its own scoring.

Each kind is drawn from a fixed seed, nearly as easy as it comes: small models are to answer some. No question is asked
twice, and none is among the examples. Other versions of the package may make other questions.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

SEED = 26
QUESTIONS, EXAMPLES = 100, 16  # of each kind; `num_fewshot` are the first of the examples
DRAWN = 3 * (QUESTIONS + EXAMPLES)  # enough for so many different ones
KINDS: Mapping[str, Mapping[str, Any]] = {
    "calendar_arithmetic": {},
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "family_relationships": {"max_family_size": 5},
    "gcd": {"max_value": 100},
    "letter_counting": {"max_words": 8},
    "needle_haystack": {"min_num_statements": 4, "max_num_statements": 8},
    "number_sequence": {"max_complexity": 2},
    "products": {"max_digits": 2},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "spell_backward": {"max_word_len": 6},
}


def load(kind: str, **_: Any) -> dict[str, Any]:
    """Return the questions of one kind as the test split of a data set, and examples as its training split."""
    from datasets import Dataset

    rows = draw_questions(kind)
    return {"train": Dataset.from_list(rows[:EXAMPLES]), "test": Dataset.from_list(rows[EXAMPLES:])}


def draw_questions(kind: str) -> list[dict[str, Any]]:
    """Return different questions of one kind, with their answers and what the package needs to score others."""
    import reasoning_gym

    found: dict[str, dict[str, Any]] = {}
    for entry in reasoning_gym.create_dataset(kind, seed=SEED, size=DRAWN, **KINDS[kind]):
        question = entry["question"].strip()
        details = json.dumps(entry["metadata"], sort_keys=True, default=str)
        found.setdefault(question, {"kind": kind, "question": question, "answer": entry["answer"], "metadata": details})
    rows = list(found.values())[: EXAMPLES + QUESTIONS]
    if len(rows) < EXAMPLES + QUESTIONS:
        raise ValueError(f"reasoning-gym makes {len(rows)} different questions of {kind}; take version 0.1.25 of it")
    source = f"reasoning-gym {metadata.version('reasoning-gym')}"  # another may score otherwise, so it is asked anew
    return [{"document": f"{kind} {n}", "source": source, **row} for n, row in enumerate(rows)]


def judge_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the package scores an answer as right. What it gives for answers that are partly right counts 0."""
    entry = {**doc, "metadata": json.loads(doc["metadata"])}
    return {"acc": float(_find_scorer(doc["kind"])(extract_answer(results[0]), entry) >= 1)}


def extract_answer(text: str) -> str:
    """Return what is between the package's tags, or else the first line with text, without a full stop at its end."""
    from reasoning_gym.utils import extract_answer

    tagged = extract_answer(text)
    first = tagged if tagged is not None else next((line for line in text.splitlines() if line.strip()), "")
    return first.strip().removesuffix(".").rstrip()


@functools.cache
def _find_scorer(kind: str) -> Callable[[str, Mapping[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(kind)
