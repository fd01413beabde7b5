"""Choose among answers to a question: by what several models say of them, by majority, or by a user's function.

Every way gives each answer a number, and the greatest is the best.
"""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.models.chat.messages import Dialogue, Message
from fuselm.sources.choices import CHOICES

UserFunction = Callable[[str, Mapping[str, Any]], float]
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_ANNOUNCED = re.compile(r"(?:answer|result)(?: is|:)[ \t*]*([^\n]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Hold several answers to the last question of a conversation of the corpus, `reference`, which has one itself."""

    reference: Dialogue
    domain: str
    answers: Sequence[str]

    def put_in(self, answer: str) -> Dialogue:
        """Return the conversation with an answer as its last message, and all before it as context."""
        before, _ = split_last_response(self.reference)
        return replace(self.reference, messages=(*before, Message(role="assistant", content=answer)))


Choose = Callable[[Sequence[Answers]], list[list[float]]]


def split_last_response(dialogue: Dialogue) -> tuple[list[Message], Message]:
    """Return all messages before the last response, in which nothing is learned, and that response."""
    last = max(n for n, message in enumerate(dialogue.messages) if message.is_response)
    before = [
        replace(m, extra={**m.extra, "weight": 0}, is_unfinished=False) if m.role == "assistant" else m
        for m in dialogue.messages[:last]
    ]
    return before, dialogue.messages[last]


def extract_answer(text: str) -> str:
    """Return what an answer says in short, for comparing it with others.

    That is what stands in the last `\\boxed{}`, or else behind the last "answer is", "answer:" or "result:", or else
    all of it; without what makes it no other answer: case, white space, emphasis and a full stop.
    """
    found = _BOXED.findall(text) or _ANNOUNCED.findall(text) or [text]
    return " ".join(found[-1].replace("*", " ").split()).rstrip(".").strip().casefold()


def choose_by_majority(asked: Sequence[Answers]) -> list[list[float]]:
    """Give each answer the share of answers that say the same in short."""
    result = []
    for of in asked:
        short = [extract_answer(answer) for answer in of.answers]
        counts = Counter(short)
        result.append([counts[answer] / len(short) for answer in short])
    return result


def mix_scores(nats: Float[ndarray, "models answers"], sizes: Sequence[int]) -> Float[ndarray, "answers"]:
    """Return the log-probability per byte of answers under the equal mixture of models that give them `nats`."""
    mixed = np.logaddexp.reduce(-nats, axis=0) - np.log(len(nats))
    return mixed / np.maximum(np.asarray(sizes, float), 1.0)


def check_choice(name: str) -> None:
    """Raise `ValueError` if a choice is neither one of `CHOICES` nor names a function that is there."""
    if name not in CHOICES:
        load_function(name)


def load_function(name: str) -> UserFunction:
    """Return the function that FILE.py:FUNCTION names. Raises `ValueError` if it is not there."""
    file, _, function = name.rpartition(":")
    if not file or not Path(file).is_file():
        raise ValueError(
            f"write.choose: no file '{file or name}'; take one of {', '.join(CHOICES)}, or write FILE.py:FUNCTION"
        )
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    if specification is None or specification.loader is None:
        raise ValueError(f"write.choose: {file} is no Python file; write FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"write.choose: {file} fails: {type(error).__name__}: {error}; correct it") from None
    if not callable(found := getattr(module, function, None)):
        raise ValueError(f"write.choose: {file} has no function '{function}'; name one that it has")
    return found


def choose_by_function(name: str) -> Choose:
    """Return the choice by a user's function, which gets an answer and the conversation's row, with its own answer."""
    function = load_function(name)

    def choose(asked: Sequence[Answers]) -> list[list[float]]:
        result = []
        for of in asked:
            row = json.loads(json.dumps(of.reference.as_row())) | {"domain": of.domain}
            result.append([_call(name, function, answer, row) for answer in of.answers])
        return result

    return choose


def _call(name: str, function: UserFunction, answer: str, row: Mapping[str, Any]) -> float:
    try:
        number = float(function(answer, row))
    except Exception as error:
        raise ValueError(
            f"write.choose: {name} fails for the answer {answer[:40]!r}: {type(error).__name__}: {error}; correct it"
        ) from None
    if np.isnan(number):
        raise ValueError(f"write.choose: {name} gives NaN for the answer {answer[:40]!r}; it must give numbers")
    return number
