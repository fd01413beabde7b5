"""What servers are asked for a prompt's log-probabilities, and how their answers are read. No network here.

Three dialects are spoken. Two take token ids and name them: vLLM's `prompt_logprobs`, and SGLang's own `/generate`.
The third is OpenAI's older one (`echo` with `logprobs`), which llama-cpp-python speaks: text goes in and token
*strings* come back, so that the tokens must be compared with ours, and entries whose string may be one of several are
left to the tail. DESIGN.md section 3: row i is the distribution of token i, position 0 follows one context token.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuselm.distributions import Distributions
from fuselm.vocabulary import Vocabulary

SEVERAL = -1  # the id of a string that more than one token is decoded to
LOSSY = ("replace", "ignore")  # what a server may do with bytes that are no text

Entries = list[tuple[int, float]]  # ids and log-probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One text for a server: `ids` are its tokens, without the context token that comes before them."""

    text: str
    ids: list[int]
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one server writes tokens as strings, found out by asking it. Only the OpenAI dialect needs it."""

    ids: dict[str, int]  # of strings; `SEVERAL` where a string is no one token's
    strings: list[str]  # of ids
    twins: frozenset[str]  # strings of tokens with the same bytes, such as "\n" and its byte fallback
    opening: str  # what is sent before the text, to be the context token; "" if the server puts that itself
    skip: int  # tokens in an answer before the text's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The entries of each token of a prompt, most probable first, and its own log-probability.

    The first row is `None` if the server does not tell it. `lost` is the mass of strings that may be several tokens.
    """

    entries: list[Entries | None]
    gold: list[float]
    lost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """One way to ask. `more` says what lets a server give more entries."""

    path: str
    ask: Callable[[str, Prompt, int, Dialect | None], dict[str, Any]]
    read: Callable[[dict[str, Any], Prompt, Dialect | None], Rows]
    more: str


def ask_vllm(model: str, prompt: Prompt, top_k: int, _: Dialect | None) -> dict[str, Any]:
    ids = [prompt.context, *prompt.ids]
    return {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k}


def read_vllm(answer: dict[str, Any], prompt: Prompt, _: Dialect | None) -> Rows:
    """A dict of ids for each token, null for the first; the token's own is there, among the top ones or not."""
    rows = _choice(answer).get("prompt_logprobs")
    _check_length(rows, 1 + len(prompt.ids))
    entries, gold = [], []
    for token, row in zip(prompt.ids, rows[1:], strict=True):
        if not row:
            raise ValueError("a token without log-probabilities; start vLLM with --no-enable-prefix-caching")
        entries.append([(int(i), entry["logprob"]) for i, entry in row.items()])
        gold.append(_of(dict(entries[-1]), token))
    return Rows(entries=entries, gold=gold, lost=0.0)


def ask_sglang(_: str, prompt: Prompt, top_k: int, __: Dialect | None) -> dict[str, Any]:
    return {
        "input_ids": [prompt.context, *prompt.ids],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
    }


def read_sglang(answer: dict[str, Any], prompt: Prompt, _: Dialect | None) -> Rows:
    """Lists of [log-probability, id, text]: one of the prompt's own tokens, and one for each token's top ones."""
    about = answer.get("meta_info") or {}
    own, top = about.get("input_token_logprobs"), about.get("input_top_logprobs")
    _check_length(own, 1 + len(prompt.ids))
    _check_length(top, 1 + len(prompt.ids))
    for n, (token, entry) in enumerate(zip(prompt.ids, own[1:], strict=True)):
        if entry[1] != token:
            raise ValueError(f"token {n} is {entry[1]} in the answer, {token} was asked for")
    return Rows(
        entries=[[(entry[1], entry[0]) for entry in row or ()] for row in top[1:]],
        gold=[float(entry[0]) for entry in own[1:]],
        lost=0.0,
    )


def ask_openai(model: str, prompt: Prompt, top_k: int, dialect: Dialect | None) -> dict[str, Any]:
    assert dialect is not None
    return next_token(model, dialect.opening + prompt.text, top_k) | {"echo": True}


def next_token(model: str, text: str, top_k: int) -> dict[str, Any]:
    """The question what may follow `text`, in the OpenAI dialect."""
    return {"model": model, "prompt": text, "max_tokens": 1, "temperature": 1.0, "logprobs": top_k}


def read_openai(answer: dict[str, Any], prompt: Prompt, dialect: Dialect | None) -> Rows:
    assert dialect is not None
    own, top = echoed(answer, prompt, dialect)
    entries: list[Entries | None] = []
    gold, lost = [], 0.0
    for n, token in enumerate(prompt.ids):
        if own[n] is None or top[n] is None:
            if n:
                raise ValueError(f"token {n} has no log-probabilities in the answer")
            entries.append(None)
            gold.append(math.nan)
            continue
        row, unclear = named(top[n], dialect, {dialect.strings[token]: (token, own[n])})
        entries.append(row)
        gold.append(own[n])
        lost += unclear
    return Rows(entries=entries, gold=gold, lost=lost)


def echoed(answer: dict[str, Any], prompt: Prompt, dialect: Dialect) -> tuple[list, list]:
    """The log-probabilities of the text's tokens and those of each one's top strings.

    Raises `ValueError` with the first difference where the server's tokens are not ours.
    """
    logprobs = _choice(answer).get("logprobs") or {}
    begin, end = dialect.skip, dialect.skip + len(prompt.ids)
    tokens, own, top = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    _check_length(tokens, end, at_least=True)
    _check_length(own, end, at_least=True)
    _check_length(top, end, at_least=True)
    for n, (token, theirs) in enumerate(zip(prompt.ids, tokens[begin:end], strict=True)):
        if dialect.strings[token] != theirs:
            raise ValueError(
                f"token {n} is {theirs!r} to the server and {dialect.strings[token]!r} to the local tokenizer"
            )
    if (count := (answer.get("usage") or {}).get("prompt_tokens")) not in (None, 1 + len(prompt.ids)):
        raise ValueError(f"{count} tokens to the server, 1 + {len(prompt.ids)} to the local tokenizer")
    return own[begin:end], top[begin:end]


def named(
    strings: dict[str, float], dialect: Dialect, known: dict[str, tuple[int, float]] | None = None
) -> tuple[Entries, float]:
    """The entries of one row by id, and the mass of strings that may be several tokens.

    `known` gives tokens that must be behind a string if it has just that log-probability. llama-cpp-python puts a
    string where its most probable token belongs, but gives it the value of its least probable one: a twin with less
    than a string after it may be either.
    """
    row, unclear = [], 0.0
    most_after = -math.inf
    for string, logprob in reversed(strings.items()):
        token = dialect.ids.get(string, SEVERAL)
        if string in dialect.twins and most_after > logprob:
            token = SEVERAL
        most_after = max(most_after, logprob)
        if known and string in known and known[string][1] == logprob:
            token = known[string][0]
        if token == SEVERAL:
            unclear += math.exp(logprob)
        else:
            row.append((token, logprob))
    return row[::-1], unclear


def dialect(vocabulary: Vocabulary, lossy: str, *, opening: str, skip: int) -> Dialect:
    """How tokens are spelled by a server that decodes each by itself and does `lossy` with bytes that are no text.

    Of tokens with the same bytes, a string is the one that the tokenizer makes of them.
    """
    strings = [(spelled or b"").decode("utf-8", lossy) for spelled in vocabulary.token_bytes]
    ids: dict[str, int] = {"": SEVERAL}  # special tokens, and others that stand for no text
    for spelled, token in vocabulary.id_of.items():
        string = spelled.decode("utf-8", lossy)
        ids[string] = SEVERAL if string in ids else token
    bytes_of = Counter(filter(None, vocabulary.token_bytes))
    twins = frozenset(b.decode("utf-8", lossy) for b, count in bytes_of.items() if count > 1)
    return Dialect(ids=ids, strings=strings, twins=twins, opening=opening, skip=skip)


APIS = {
    "vllm": Api(path="completions", ask=ask_vllm, read=read_vllm, more="start vLLM with --max-logprobs {top_k}"),
    "sglang": Api(path="../generate", ask=ask_sglang, read=read_sglang, more="raise the server's limit"),
    "openai": Api(path="completions", ask=ask_openai, read=read_openai, more="raise the server's limit"),
}


# What servers are known to say when they can't, and what to do about it
HINTS = {
    "logits_all": "start llama-cpp-python with --logits_all true",
    "no echo is supported": "llama-server gives no prompt log-probabilities; take llama-cpp-python[server]",
}


def distributions(rows: Rows, top_k: int) -> Distributions:
    """The `top_k` most probable entries of each row; all else is its tail.

    Raises `ValueError` on what log-probabilities under one softmax can't be.
    """
    counts = np.array([len(row or ()) for row in rows.entries], np.int64)
    flat = np.array([entry for row in rows.entries for entry in row or ()], np.float64).reshape(-1, 2)
    of, ids, logprobs = np.repeat(np.arange(len(counts)), counts), flat[:, 0].astype(np.int32), flat[:, 1]
    order = np.lexsort((ids, -logprobs, of))
    order = order[np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) < top_k]
    masses = np.bincount(of[order], np.exp(np.minimum(logprobs[order], 1.0)), minlength=len(counts))
    if (masses > 1.001).any():  # NaN is for the caller to find
        n = int((masses > 1.001).argmax())
        raise ValueError(
            f"token {n}: the entries' probabilities add up to {masses[n]:.4f}, more than 1; the server must give "
            "log-probabilities at temperature 1 (vLLM: --logprobs-mode raw_logprobs)"
        )
    return Distributions(
        offsets=np.append(0, np.cumsum(np.minimum(counts, top_k))).astype(np.int64),
        ids=ids[order],
        logprobs=np.minimum(logprobs[order], 0.0).astype(np.float32),
        gold=np.minimum(np.array(rows.gold, np.float32), 0.0),
        tail=np.clip(1.0 - masses, 0.0, 1.0).astype(np.float32),
    )


def spelled_by(api: str, answer: dict[str, Any], prompt: Prompt) -> list[tuple[int, str]]:
    """The prompt's own ids with the strings that the server gives for them, where it gives any."""
    if api == "vllm":
        rows = (row[str(token)] for token, row in zip(prompt.ids, _choice(answer)["prompt_logprobs"][1:], strict=True))
        strings: Sequence[str | None] = [row.get("decoded_token") for row in rows]
    else:
        strings = [entry[2] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    return [(token, string) for token, string in zip(prompt.ids, strings, strict=True) if string is not None]


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _check_length(values: Any, needed: int, *, at_least: bool = False) -> None:
    if not isinstance(values, list):
        raise ValueError("no prompt log-probabilities in the answer")
    if len(values) < needed or (len(values) > needed and not at_least):
        raise ValueError(f"{len(values)} tokens in the answer, {needed} are needed")


def _of(row: dict[int, float], token: int) -> float:
    if token not in row:
        raise ValueError(f"token {token} came, but its log-probability is not in the answer")
    return row[token]
