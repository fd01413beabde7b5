"""Refuse answers about a prompt that one softmax can't have given. Nothing is repaired."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fuselm.system.foreign_text import put_on_one_line

Entries = list[tuple[int, float]]  # ids and log-probabilities

# How far probabilities may be above 1, one or those of a row together, and two values of one probability apart, all as
# shares of it. A log-softmax in any precision gives none above 1; kernels with fast exponentials are off by some 1e-6.
ROUNDING = 1e-3
LOWEST_LOGPROB = (
    -3.4e38
)  # log-probabilities are kept as float32; minus infinity is no log-probability of a token that came


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Hold one text for a server; `ids` are its tokens, without the context token that comes before them."""

    text: str
    ids: list[int]
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """Hold the entries of each token of a prompt, most probable first, and its own log-probability.

    The first row is `None` if the server does not tell it. `lost` is the mass of strings that may be several tokens.
    """

    entries: list[Entries | None]
    gold: list[float]
    lost: float


def describe(value: Any) -> str:
    """Return a JSON value as part of an error: what it is, cut to the length that fits."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = put_on_one_line(repr(value[:60]) if isinstance(value, str) else repr(value))
    return text if len(text) <= 60 else text[:60] + "…"


@contextlib.contextmanager
def name_token(n: int) -> Iterator[None]:
    """Let every `ValueError` within begin with the number of a prompt's token."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"token {n}: {problem}") from None


def require_type(value: Any, kind: type[list] | type[dict], what: str) -> Any:
    """Return `value` if it is a list or an object, as it should be. Raises `ValueError` that names it as `what`."""
    if not isinstance(value, kind):
        needed = "a list" if kind is list else "an object"
        raise ValueError(f"{what} is {describe(value)}, not {needed}")
    return value


def parse_id(key: str) -> int:
    """Return the id that a name in an object spells. Raises `ValueError` on anything else, even if `int` takes it."""
    if not (key.isascii() and key.isdecimal() and len(key) < 10 and (key[0] != "0" or key == "0")):
        raise ValueError(f"the id of an entry is {describe(key)}, not a number")
    return int(key)


def check_numbers(values: Sequence[Any]) -> None:
    """Raise `ValueError` unless all are numbers that log-probabilities can be. NaN is one: a model may give it."""
    if (
        set(map(type, values)) <= {float}
        and min(values, default=0) >= LOWEST_LOGPROB
        and max(values, default=0) <= ROUNDING
    ):
        return
    for value in values:
        if type(value) is not float and (type(value) is not int or abs(value) > 1 << 31):
            raise ValueError(f"a log-probability is {describe(value)}, not a number")
        if value > ROUNDING:
            raise ValueError(f"a log-probability is {describe(value)}, above 0")
        if value < LOWEST_LOGPROB:
            raise ValueError(f"a log-probability is {describe(value)}, which float32 cannot hold")


def make_entries(ids: Sequence[Any], logprobs: Sequence[Any]) -> Entries:
    """Return the entries of a row. Raises `ValueError` on invalid or repeated ids, and as `check_numbers` does."""
    for i in ids:
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise ValueError(f"the id of an entry is {describe(i)}, not a token's")
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ValueError(f"two entries have the id {twice}")
    check_numbers(logprobs)
    return list(zip(ids, map(float, logprobs), strict=True))


def check_row(row: Entries, gold: float, token: int, vocabulary_size: int) -> None:
    """Raise `ValueError` if a row's entries and its token's log-probability can't come from one softmax.

    A row that is NaN throughout is the model's own: the caller leaves the document out.
    """
    known = dict(row)
    if max(known, default=0) >= vocabulary_size:
        raise ValueError(f"id {max(known)} is outside the vocabulary of {vocabulary_size}; is `tokenizer` the model's?")
    nan = [math.isnan(value) for value in (gold, *known.values())]
    if all(nan):
        return
    if any(nan):
        raise ValueError("some of its log-probabilities are NaN and others are not")
    if token in known and abs(known[token] - gold) > ROUNDING:
        raise ValueError(f"token {token} has {known[token]:.6g} among the entries and {gold:.6g} by itself")
    check_mass(math.fsum(map(math.exp, (known | {token: gold}).values())))


def check_mass(mass: float) -> None:
    """Raise `ValueError` if the probabilities of one row add up to more than 1."""
    if mass > 1 + ROUNDING:
        raise ValueError(
            f"the entries' probabilities add up to {mass:.4f}, more than 1; the server must give "
            "log-probabilities at temperature 1 (vLLM: --logprobs-mode raw_logprobs)"
        )


def get_choice(answer: Any) -> dict[str, Any]:
    """Return the only choice of an answer, or an empty one. Raises `ValueError` if there are several."""
    choices = require_type(answer, dict, "the answer").get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        raise ValueError(f"{len(choices)} choices in the answer, 1 was asked for")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def check_usage(answer: dict[str, Any], prompt: Prompt) -> None:
    """Raise `ValueError` if the server counts other tokens than the prompt has."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if count is not None and (type(count) is not int or count != 1 + len(prompt.ids)):
        raise ValueError(f"{describe(count)} tokens to the server, 1 + {len(prompt.ids)} to the local tokenizer")


def check_length(values: Any, needed: int, *, at_least: bool = False) -> None:
    """Raise `ValueError` unless there are as many values as tokens are needed."""
    if not isinstance(values, list):
        raise ValueError("no prompt log-probabilities in the answer")
    if len(values) < needed or (len(values) > needed and not at_least):
        raise ValueError(f"{len(values)} tokens in the answer, {needed} are needed")
