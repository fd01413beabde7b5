"""Ask servers for a prompt's log-probabilities, and read their answers. No network here.

Three dialects are spoken. Two take token ids and name them: vLLM's `prompt_logprobs`, and SGLang's own `/generate`. The
third is OpenAI's older one (`echo` with `logprobs`), which llama-cpp-python speaks: text goes in and token *strings*
come back. So its tokens must be compared with ours, and entries whose string may be one of several tokens are left to
the tail. Row i is the distribution of token i, and position 0 follows one context token.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.servers.answers import (
    ROUNDING,
    Entries,
    Prompt,
    PromptRows,
    check_length,
    check_mass,
    check_numbers,
    check_row,
    check_usage,
    describe,
    get_choice,
    name_token,
    require_type,
)
from fuselm.sources.servers.id_protocols import read_sglang, read_vllm, request_sglang, request_vllm
from fuselm.stores.distributions import Distributions

AMBIGUOUS = -1  # the id of a string that more than one token is decoded to
DECODING_ERRORS = ("replace", "ignore")  # ways to treat bytes that are not text

# Bytes of an answer: vLLM's JSON takes some 80 for an entry, more where its token is long or escaped. The rest is the
# text itself and what is said about the answer.
ENTRY_BYTES, ANSWER_BYTES = 256, 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Record how one server writes tokens as strings, found by asking it. Only the OpenAI dialect needs it."""

    ids: dict[str, int]  # by string; `AMBIGUOUS` where a string is no one token's
    strings: list[str]  # by id
    twins: frozenset[str]  # strings of tokens with the same bytes, such as "\n" and its byte fallback
    opening: str  # sent before the text, to be the context token; "" if the server puts that itself
    skip: int  # tokens in an answer before the text's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """Describe one way to ask. `more` says what lets a server give more entries."""

    path: str
    request: Callable[[str, Prompt, int, Dialect | None], dict[str, Any]]
    read: Callable[[Any, Prompt, Dialect | None], PromptRows]
    more: str


def request_openai(model: str, prompt: Prompt, top_k: int, dialect: Dialect | None) -> dict[str, Any]:
    assert dialect is not None
    return request_next_token(model, dialect.opening + prompt.text, top_k) | {"echo": True}


def request_next_token(model: str, text: str, top_k: int) -> dict[str, Any]:
    """Ask what may follow `text`, in the OpenAI dialect."""
    return {"model": model, "prompt": text, "max_tokens": 1, "temperature": 1.0, "logprobs": top_k}


def read_echo(answer: Any, prompt: Prompt, dialect: Dialect | None) -> PromptRows:
    """Read an echo: a string and a log-probability for each token, and the top strings of each."""
    assert dialect is not None
    own, top = check_echo(answer, prompt, dialect)
    entries: list[Entries | None] = []
    gold, lost = [], 0.0
    for n, token in enumerate(prompt.ids):
        if own[n] is None or top[n] is None:
            if n:
                raise ValueError(f"token {n} has no log-probabilities in the answer")
            entries.append(None)
            gold.append(math.nan)
            continue
        with name_token(n):
            check_numbers(own[n : n + 1])
            row, unclear = resolve_strings(top[n], dialect, {dialect.strings[token]: (token, float(own[n]))})
        entries.append(row)
        gold.append(float(own[n]))
        lost += unclear
    return PromptRows(entries=entries, gold=gold, lost=lost)


def read_completion(answer: Any, prompt: Prompt, dialect: Dialect | None) -> PromptRows:
    """Read an echo with one generated token at most after it, as it was asked for."""
    assert dialect is not None
    rows = read_echo(answer, prompt, dialect)
    logprobs, most = get_choice(answer)["logprobs"], dialect.skip + len(prompt.ids) + 1
    counts = [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs")]
    if max(counts) > most or min(counts) != max(counts):
        raise ValueError(f"{max(counts)} tokens in the answer, {most} at most were asked for")
    if {} in logprobs["top_logprobs"]:
        raise ValueError("a token has no entries in the answer")
    return rows


def check_echo(answer: Any, prompt: Prompt, dialect: Dialect) -> tuple[list, list]:
    """Return the log-probabilities of the text's tokens and those of each one's top strings.

    Raises `ValueError` with the first difference where the server's tokens are not ours.
    """
    logprobs = require_type(get_choice(answer).get("logprobs") or {}, dict, "logprobs")
    begin, end = dialect.skip, dialect.skip + len(prompt.ids)
    tokens, own, top = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    check_length(tokens, end, at_least=True)
    check_length(own, end, at_least=True)
    check_length(top, end, at_least=True)
    for n, (token, theirs) in enumerate(zip(prompt.ids, tokens[begin:end], strict=True)):
        if dialect.strings[token] != theirs:
            raise ValueError(
                f"token {n} is {describe(theirs)} to the server and {describe(dialect.strings[token])} to the local "
                "tokenizer"
            )
    check_usage(answer, prompt)
    return own[begin:end], top[begin:end]


def read_next_row(answer: Any, dialect: Dialect) -> tuple[Entries, float]:
    """Return the entries of the row that follows a text, and the mass of strings that may be several tokens."""
    return resolve_strings(_get_next(answer, "top_logprobs"), dialect)


def read_chosen_token(answer: Any) -> tuple[Any, float]:
    """Return the token that was generated, and its log-probability."""
    logprob = _get_next(answer, "token_logprobs")
    check_numbers([logprob])
    return _get_next(answer, "tokens"), float(logprob)


def _get_next(answer: Any, name: str) -> Any:
    values = require_type(get_choice(answer).get("logprobs") or {}, dict, "logprobs").get(name)
    if not isinstance(values, list) or not values or values[0] is None:
        raise ValueError("no log-probabilities of the next token in the answer")
    return values[0]


def resolve_strings(
    strings: Any, dialect: Dialect, known: dict[str, tuple[int, float]] | None = None
) -> tuple[Entries, float]:
    """Return the entries of one row by id, and the mass of strings that may be several tokens.

    `known` gives tokens that must be behind a string if it has exactly their log-probability. llama-cpp-python puts a
    string where its most probable token belongs, but gives it the value of its least probable one: a twin with less
    than a string after it may be either. Where strings are in no order, every twin may be.
    """
    values = list(require_type(strings, dict, "its row").values())
    check_numbers(values)
    check_mass(math.fsum(map(math.exp, values)))
    known = known or {}
    plain = [p for s, p in strings.items() if s not in dialect.twins and s not in known and dialect.ids.get(s, -1) >= 0]
    ordered = all(a >= b for a, b in itertools.pairwise(plain))
    row, unclear = [], 0.0
    most_after = -math.inf
    for string, logprob in reversed(strings.items()):
        token = dialect.ids.get(string, AMBIGUOUS)
        own = known.get(string, (token, logprob))
        if string in dialect.twins and (most_after > logprob or not ordered or own[1] != logprob):
            token = AMBIGUOUS
        most_after = max(most_after, logprob)
        if string in known and own[1] == logprob:
            token = own[0]
        if token == AMBIGUOUS:
            unclear += math.exp(logprob)
        else:
            row.append((token, float(logprob)))
    return row[::-1], unclear


def make_dialect(vocabulary: Vocabulary, lossy: str, *, opening: str, skip: int) -> Dialect:
    """Find how tokens are spelled by a server that decodes each one by itself.

    It does `lossy` with bytes that are not text. Of tokens with the same bytes, a string stands for the one that the
    tokenizer makes of it.
    """
    strings = [(spelled or b"").decode("utf-8", lossy) for spelled in vocabulary.token_bytes]
    ids: dict[str, int] = {"": AMBIGUOUS}  # special tokens, and others that stand for no text
    for spelled, token in vocabulary.id_by_bytes.items():
        string = spelled.decode("utf-8", lossy)
        ids[string] = AMBIGUOUS if string in ids else token
    bytes_of = Counter(filter(None, vocabulary.token_bytes))
    twins = frozenset(b.decode("utf-8", lossy) for b, count in bytes_of.items() if count > 1)
    return Dialect(ids=ids, strings=strings, twins=twins, opening=opening, skip=skip)


APIS = {
    "vllm": Api(
        path="completions", request=request_vllm, read=read_vllm, more="start vLLM with --max-logprobs {top_k}"
    ),
    "sglang": Api(path="../generate", request=request_sglang, read=read_sglang, more="raise the server's limit"),
    "openai": Api(path="completions", request=request_openai, read=read_completion, more="raise the server's limit"),
}


# Servers say these when they can't answer; each has its remedy
HINTS = {
    "logits_all": "start llama-cpp-python with --logits_all true",
    "no echo is supported": "llama-server gives no prompt log-probabilities; take llama-cpp-python[server]",
}


def check_rows(api: str, rows: PromptRows, prompt: Prompt, vocabulary_size: int, top_k: int | None = None) -> None:
    """Raise `ValueError`, with the token, where rows are not `top_k` entries each of one softmax.

    A row has one entry more if the prompt's token is not among them, and fewer where they are strings.
    """
    for n, (token, row, gold) in enumerate(zip(prompt.ids, rows.entries, rows.gold, strict=True)):
        if row is None:
            continue
        with name_token(n):
            check_row(row, gold, token, vocabulary_size)
            least = 0 if api == "openai" else top_k
            if top_k and not least <= len(row) <= top_k + (api != "sglang"):
                raise ValueError(f"{len(row)} entries are in the answer, {top_k} were asked for")
            if len(row) == 1 + (top_k or len(row)) and gold > ROUNDING + min(p for i, p in row if i != token):
                raise ValueError(f"{len(row)} entries are in the answer, but its token is one of the first {top_k}")


def limit_answer_bytes(prompt: Prompt, top_k: int) -> int:
    """Return the bytes that an answer may have: a fixed part, and so many for each entry that is asked for."""
    return ANSWER_BYTES + ENTRY_BYTES * (2 + len(prompt.ids)) * (2 + top_k)


def make_distributions(rows: PromptRows, top_k: int) -> Distributions:
    """Return the `top_k` most probable entries of each row; all else is its tail."""
    counts = np.array([len(row or ()) for row in rows.entries], np.int64)
    flat = np.array([entry for row in rows.entries for entry in row or ()], np.float64).reshape(-1, 2)
    of, ids, logprobs = np.repeat(np.arange(len(counts)), counts), flat[:, 0].astype(np.int32), flat[:, 1]
    order = np.lexsort((ids, -logprobs, of))
    order = order[np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) < top_k]
    masses = np.bincount(of[order], np.exp(logprobs[order]), minlength=len(counts))
    return Distributions(
        offsets=np.append(0, np.cumsum(np.minimum(counts, top_k))).astype(np.int64),
        ids=ids[order],
        logprobs=np.minimum(logprobs[order], 0.0).astype(np.float32),
        gold=np.minimum(np.array(rows.gold, np.float32), 0.0),
        tail=np.clip(1.0 - masses, 0.0, 1.0).astype(np.float32),
    )
