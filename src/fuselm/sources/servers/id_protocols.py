"""Speak the two protocols that take token ids and name them: vLLM's `prompt_logprobs`, and SGLang's `/generate`."""

import itertools
from collections.abc import Sequence
from typing import Any

from fuselm.sources.servers.answers import (
    ROUNDING,
    Entries,
    Prompt,
    PromptRows,
    check_length,
    check_numbers,
    check_usage,
    describe,
    get_choice,
    make_entries,
    name_token,
    parse_id,
    require_type,
)


def request_vllm(model: str, prompt: Prompt, top_k: int, _: None) -> dict[str, Any]:
    ids = [prompt.context, *prompt.ids]
    return {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k}


def read_vllm(answer: Any, prompt: Prompt, _: None) -> PromptRows:
    """Read a dict of ids for each token, null for the first; it has the token itself, among the top ones or not."""
    choice = get_choice(answer)
    rows = choice.get("prompt_logprobs")
    check_length(rows, 1 + len(prompt.ids))
    check_usage(answer, prompt)
    if choice.get("prompt_token_ids") not in (None, [prompt.context, *prompt.ids]):
        raise ValueError("the answer is about another prompt")
    if rows[0] is not None:
        raise ValueError(f"the first row is {describe(rows[0])}, not null")
    entries, gold = [], []
    for n, (token, row) in enumerate(zip(prompt.ids, rows[1:], strict=True)):
        if row is None or row == {}:
            raise ValueError("a token without log-probabilities; start vLLM with --no-enable-prefix-caching")
        with name_token(n):
            values = [
                require_type(e, dict, "an entry").get("logprob") for e in require_type(row, dict, "its row").values()
            ]
            entries.append(make_entries([parse_id(key) for key in row], values))
            gold.append(_get_logprob(dict(entries[-1]), token))
    return PromptRows(entries=entries, gold=gold, lost=0.0)


def request_sglang(_: str, prompt: Prompt, top_k: int, __: None) -> dict[str, Any]:
    return {
        "input_ids": [prompt.context, *prompt.ids],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
    }


def read_sglang(answer: Any, prompt: Prompt, _: None) -> PromptRows:
    """Read lists of [log-probability, id, text]: one for the prompt's own tokens, and one for each token's top ones."""
    about = require_type(require_type(answer, dict, "the answer").get("meta_info") or {}, dict, "meta_info")
    own, top = about.get("input_token_logprobs"), about.get("input_top_logprobs")
    check_length(own, 1 + len(prompt.ids))
    check_length(top, 1 + len(prompt.ids))
    entries: list[Entries | None] = []
    for n, (token, entry, row) in enumerate(zip(prompt.ids, own[1:], top[1:], strict=True)):
        with name_token(n):
            if _read_triple(entry)[1] != token:
                raise ValueError(f"id {describe(entry[1])} is in the answer, {token} was asked for")
            check_numbers(entry[:1])
            triples = [_read_triple(e) for e in require_type(row, list, "its row of top entries")]
            values = [logprob for logprob, _ in triples]
            entries.append(make_entries([i for _, i in triples], values))
            if any(a < b for a, b in itertools.pairwise(values)):
                raise ValueError("its entries are not in the order of their probabilities")
            if values and token not in dict(entries[-1]) and entry[0] > values[-1] + ROUNDING:
                raise ValueError(
                    f"it has {entry[0]:.6g} and is not among the top entries, the last of {values[-1]:.6g}"
                )
    return PromptRows(entries=entries, gold=[float(entry[0]) for entry in own[1:]], lost=0.0)


def _read_triple(entry: Any) -> tuple[Any, int]:
    if len(require_type(entry, list, "an entry")) not in (2, 3) or type(entry[1]) is not int:
        raise ValueError("an entry is not [log-probability, id, text]")
    return entry[0], entry[1]


def list_spelled_tokens(api: str, answer: Any, prompt: Prompt) -> list[tuple[int, str]]:
    """Return the prompt's own ids with the strings that the server gives for them, where it gives any."""
    if api == "vllm":
        rows = (
            row[str(token)] for token, row in zip(prompt.ids, get_choice(answer)["prompt_logprobs"][1:], strict=True)
        )
        strings: Sequence[Any] = [row.get("decoded_token") for row in rows]
    else:
        strings = [entry[2] if len(entry) > 2 else None for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    for token, string in zip(prompt.ids, strings, strict=True):
        if string is not None and not isinstance(string, str):
            raise ValueError(f"token {token} is decoded to {describe(string)}, not to a string")
    return [(token, string) for token, string in zip(prompt.ids, strings, strict=True) if string is not None]


def _get_logprob(row: dict[int, float], token: int) -> float:
    if token not in row:
        raise ValueError(f"token {token} came, but its log-probability is not in the answer")
    return row[token]
