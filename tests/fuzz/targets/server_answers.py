"""Mutate good answers of vLLM, SGLang and llama-cpp-python: each is read right, or refused with `ValueError`.

What right is, is told by a slow reading of the same JSON below, which shares no code with fuselm.
"""

import copy
import functools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuselm.sources.servers import client, prompt_logprobs
from fuselm.sources.servers.answers import Prompt
from fuselm.sources.servers.exchange import Answer
from fuselm.sources.servers.prompt_logprobs import APIS, Dialect
from fuselm.stores import distributions

KINDS = ("vllm", "sglang", "openai")
STRINGS = [*"abcdefghijklmno", "\n", "\n", "", "", " a", "é", "<s>"]  # of ids: a pair of twins, and two of no string
SIZE = len(STRINGS)
CONTEXT = SIZE - 1
DIALECT = Dialect(
    ids={
        s: t if STRINGS.count(s) == 1 else 15 if s == "\n" else prompt_logprobs.AMBIGUOUS for t, s in enumerate(STRINGS)
    },
    strings=STRINGS,
    twins=frozenset("\n"),
    opening="<s>",
    skip=0,
)
NEAR = 1e-3  # what an answer may be off by rounding
VALUES = [
    *(None, True, False, 0, -1, 1, 5, 5.0, 5.7, -0.5, 1e-4, 1e-2, 50, 1e308, -1e308, 10**30, -(10**400), 2**32 + 5),
    *(math.nan, math.inf, -math.inf, "", "x", "5", "-1.5", " 0_0_5", "٥", "+3", "\x1b[31m", "\ud800", "9" * 5000),
    *([], {}, [[]], [None], [5], {"5": 5}, {"logprob": -1.0}, {"a": -1.0}, [-1.0, 5, None]),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Hold a server's answer to a question about a prompt."""

    kind: str
    prompt: Prompt
    top_k: int
    body: bytes


def make_case(rng: random.Random) -> Case:
    """Return a good answer with up to three mutations."""
    kind = rng.choice(KINDS)
    ids = [rng.randrange(15) for _ in range(rng.randint(1, 5))]
    prompt = Prompt(text="".join(STRINGS[i] for i in ids), ids=ids, context=CONTEXT)
    top_k = rng.randint(1, SIZE)
    value = write_answer(kind, prompt, top_k, rng)
    for _ in range(rng.randint(0, 3)):
        mutate_value(value, rng)
    body = json.dumps(value).encode()
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        body = mutate_bytes(body, rng)
    return Case(kind=kind, prompt=prompt, top_k=top_k, body=body)


def prepare(folder: Path) -> None:
    """Make nothing: each case is an answer of its own."""


def case(_: None, rng: np.random.Generator, __: Path) -> None:
    """Read one mutated answer, and compare what is read with a slow reading. Raises what the reader raised."""
    check_case(make_case(random.Random(int(rng.integers(1 << 62)))))


def check_case(case: Case) -> None:
    """Raise `ValueError` if the answer is refused, and `AssertionError` if it is read as something else."""
    try:
        found = read(case)
    except ValueError as problem:
        assert str(problem).isprintable() and 0 < len(str(problem)) < 1500
        raise
    expected = read_slowly(case)
    for i, (token, gold, most, least) in enumerate(expected):
        ids, logprobs = found.row(i)
        entries = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
        assert len(entries) == len(ids) and all(0 <= entry < SIZE for entry in entries)
        assert found.gold[i] == np.float32(min(gold, 0.0)), (token, gold)
        assert all(math.isfinite(p) and p <= 0 for p in [gold - NEAR, *entries.values()])
        assert all(p == np.float32(min(most[entry], 0.0)) for entry, p in entries.items())
        best = sorted(least, key=lambda entry: (-least[entry], entry))[: case.top_k]
        assert set(best) <= set(entries) or len(entries) == case.top_k
        mass = math.fsum(math.exp(most[entry]) for entry in entries)
        assert mass < 1 + 2 * NEAR and math.isclose(found.tail[i], max(0.0, 1 - mass), abs_tol=1e-6)
        assert token not in most or case.kind == "openai" or abs(most[token] - gold) <= NEAR


def read(case: Case) -> distributions.Distributions:
    """Read an answer as a run does."""
    asked = _client()
    with client.name_server(asked):
        value = client._parse_answer(asked, Answer(status=200, headers={}, body=case.body))
        rows = APIS[case.kind].read(value, case.prompt, DIALECT if case.kind == "openai" else None)
        if rows.entries and rows.entries[0] is None:
            raise ValueError("the first row is asked for by itself")
        prompt_logprobs.check_rows(case.kind, rows, case.prompt, SIZE, case.top_k)
        found = prompt_logprobs.make_distributions(rows, case.top_k)
        if np.isnan(found.gold).any() or np.isnan(found.logprobs).any():
            raise ValueError("the document is left out")
        distributions.check_distributions(found, SIZE)
    return found


@functools.cache
def _client() -> client.Client:
    return client.open_client("http://127.0.0.1:9/v1", key_env=None, timeout=1.0, requests=1)  # it never asks


def read_slowly(case: Case) -> list[tuple[int, float, dict[int, float], dict[int, float]]]:
    """Return for each token: itself, its value, the entries that its row may have, and those that it must have."""
    value = json.loads(case.body)
    result = []
    for n, token in enumerate(case.prompt.ids):
        if case.kind == "vllm":
            (choice,) = value["choices"]
            row = choice["prompt_logprobs"][1 + n]
            assert all(key == str(int(key)) for key in row)
            entries = {int(key): entry["logprob"] for key, entry in row.items()}
            result.append((token, entries[token], entries, entries))
        elif case.kind == "sglang":
            own, top = (value["meta_info"][f"input_{name}_logprobs"][1 + n] for name in ("token", "top"))
            assert own[1] == token and type(own[1]) is int and all(type(entry[1]) is int for entry in top)
            assert len({entry[1] for entry in top}) == len(top) == case.top_k
            entries = {entry[1]: entry[0] for entry in top}
            result.append((token, own[0], entries, entries))
        else:
            (choice,) = value["choices"]
            tokens, own, top = (choice["logprobs"][k][n] for k in ("tokens", "token_logprobs", "top_logprobs"))
            assert tokens == STRINGS[token]
            may = {t: top[s] for t, s in enumerate(STRINGS) if s in top}
            must = {t: p for t, p in may.items() if STRINGS.count(STRINGS[t]) == 1}
            result.append((token, own, may, must))
    assert all(type(p) in (int, float) for _, gold, may, _ in result for p in [gold, *may.values()])
    return result


def write_answer(kind: str, prompt: Prompt, top_k: int, rng: random.Random) -> dict[str, Any]:
    """Answer as a server of that kind does, with rows drawn at random."""
    rows = []
    for _ in prompt.ids:
        logits = [rng.gauss(0, 3) for _ in range(SIZE)]
        total = math.log(math.fsum(map(math.exp, logits)))
        rows.append([logit - total for logit in logits])
    ranked = [sorted(range(SIZE), key=lambda t, row=row: -row[t])[:top_k] for row in rows]
    of = list(zip(prompt.ids, rows, ranked, strict=True))
    if kind == "vllm":
        listed = [None, *({str(t): {"logprob": row[t], "rank": 1} for t in [own, *best]} for own, row, best in of)]
        usage = {"prompt_tokens": 1 + len(of)}
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": listed}], "usage": usage}
    if kind == "sglang":
        own = [[None, prompt.context, None], *([row[token], token, None] for token, row, _ in of)]
        top = [None, *([[row[t], t, None] for t in best] for _, row, best in of)]
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}
    tops = []
    for token, row, best in of:
        tops.append({STRINGS[t]: row[t] for t in best} | {STRINGS[token]: row[token]})
    logprobs = {
        "tokens": [STRINGS[t] for t in prompt.ids],
        "token_logprobs": [row[token] for token, row, _ in of],
        "top_logprobs": tops,
    }
    return {"choices": [{"text": "x", "logprobs": logprobs}], "usage": {"prompt_tokens": 1 + len(of)}}


def mutate_value(value: Any, rng: random.Random) -> None:
    """Change one place of a JSON value: another value, one less, one more, two swapped, another name."""
    places = [(v, k) for v in _containers(value) for k in (v if isinstance(v, dict) else range(len(v)))]
    if not places:
        return
    where, key = rng.choice(places)
    other = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
    match rng.randrange(6):
        case 0:
            where[key] = copy.deepcopy(rng.choice(VALUES))
        case 1:
            del where[key]
        case 2:
            where[key], where[other] = where[other], where[key]
        case 3 if isinstance(where, dict):
            where[rng.choice([str(rng.randrange(SIZE)), "05", " 5", "5_0", "-1", "99", "٥", "a"])] = where[key]
        case 3:
            where.insert(rng.randint(0, len(where)), copy.deepcopy(where[key]))
        case 4 if isinstance(where[key], int | float) and not isinstance(where[key], bool):
            where[key] = rng.choice([lambda x: x + 1e-4, lambda x: x / 2, lambda x: -x, lambda x: x + 1])(where[key])
        case _ if isinstance(where, dict):
            where[rng.choice([*"abc", "5", "05", "logprob", "choices"])] = where.pop(key)
        case _:
            rng.shuffle(where)


def mutate_bytes(body: bytes, rng: random.Random) -> bytes:
    """Change some bytes: flip a bit, delete, repeat or move a part, or cut off the end."""
    a, b = sorted(rng.randrange(len(body) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 2, 8, 64]))
    match rng.randrange(5):
        case 0 if a < len(body):
            return body[:a] + bytes([body[a] ^ 1 << rng.randrange(8)]) + body[a + 1 :]
        case 1:
            return body[:a] + body[b:]
        case 2:
            return body[:b] + body[a:b] + body[b:]
        case 3:
            return body[:a] + rng.choice([b"0", b"-", b".", b"e9", b'"', b",", b"\xff", b"[", b"}"]) + body[a:]
        case _:
            return body[:a]


def _containers(value: Any) -> list[Any]:
    if not isinstance(value, list | dict) or not value:
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for part in inner for found in _containers(part))]
