"""Read and write distributions as other tools do: one record a document, in one of several layouts.

A layout is two functions: one from a record to `ForeignRecord`, one from a trace to a record. docs/store.md has
a table of the layouts. Nothing is checked here: derivation.py makes traces of what is read, and counts what it had to
derive because a layout cannot hold it.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.interchange import distillkit
from fuselm.sources.servers import prompt_logprobs
from fuselm.sources.servers.prompt_logprobs import Dialect, Prompt
from fuselm.stores.store import Trace

PADDING_LOGPROB = -1e9  # log-probability of padding
MINUS_INFINITY = -9999.0  # vLLM writes this for minus infinity, which JSON lacks

Entries = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutTokenizer:
    """Hold what layouts need of a tokenizer."""

    vocabulary: Vocabulary
    context: int  # the token that position 0 is predicted from
    compression: dict[str, Any] | None = None  # DistillKit's logprob_compressor

    @property
    def opening(self) -> str:
        return self.vocabulary.token_strings[self.context] or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignRecord:
    """Hold one document's rows in the file's own places, not yet in ours.

    `text` is None where the record has none, and `gold` is NaN where the record does not tell it.
    """

    text: str | None
    tokens: list[int]
    rows: list[Entries | None]
    gold: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Describe a layout: how it is read and written, and what it loses.

    With `is_ahead`, row i is the distribution of token i + 1, as a model's logits are, unless the user says otherwise.
    """

    read: Callable[[dict[str, Any], LayoutTokenizer], ForeignRecord]
    write: Callable[[Trace, str | None, LayoutTokenizer, bool], dict[str, Any]]
    is_ahead: bool
    is_fixed: bool  # no file of this layout has its rows elsewhere
    loses: str  # parts of a store that the layout can't hold


def load_layout_tokenizer(tokenizer: Model, compression: Mapping[str, Any] | None = None) -> LayoutTokenizer:
    return LayoutTokenizer(
        vocabulary=load_vocabulary(tokenizer),
        context=tokenizer.context_token,
        compression=None if compression is None else dict(compression),
    )


# ---- prompt log-probabilities of vLLM


def read_vllm(record: dict[str, Any], tokens: LayoutTokenizer) -> ForeignRecord:
    """Read the record itself, or the server's answer that has it as a choice."""
    choice = {**record, **(record.get("choices") or [{}])[0]}
    given, text = choice.get("prompt_logprobs"), _get_text(record)
    if not isinstance(given, list):
        raise ValueError("no list prompt_logprobs")
    ids = choice.get("prompt_token_ids")
    if ids is None:
        if text is None:
            raise ValueError("neither prompt_token_ids nor a text")
        ids = tokens.vocabulary.segment(text).ids.tolist()
        ids = [tokens.context, *ids] if len(given) == len(ids) + 1 else ids
    if len(ids) != len(given):
        raise ValueError(f"{len(ids)} prompt_token_ids, but {len(given)} prompt_logprobs")
    rows: list[Entries | None] = []
    gold = []
    for token, row in zip(ids, given, strict=True):
        entries = {
            _parse_id(i): e if isinstance(e, dict) else {"logprob": e, "rank": 1} for i, e in (row or {}).items()
        }
        gold.append(_restore_infinity(entries[token]["logprob"]) if token in entries else math.nan)
        kept = [  # the token itself is always there; it is an entry only if it ranks among the most probable
            (i, entry["logprob"])
            for i, entry in entries.items()
            if i != token or (entry.get("rank") is not None and entry["rank"] <= len(entries))
        ]
        rows.append(kept if row else None)
    return ForeignRecord(text=text, tokens=ids, rows=rows, gold=gold)


def _parse_id(key: str) -> int:
    """Return the id that a JSON key spells. Raises `ValueError` if the key is not a number as JSON writes it."""
    if not (key.isascii() and key.isdecimal() and str(int(key[:20])) == key):
        raise ValueError(f"{key!r:.40} is no id")
    return int(key)


def write_vllm(trace: Trace, text: str | None, tokens: LayoutTokenizer, _: bool) -> dict[str, Any]:
    """Write a record with null for a token without a row, as the first one of a prompt has."""
    d = trace.distributions
    rows: list[dict[str, Any] | None] = [None]
    for i, token in enumerate(trace.tokens.tolist()):
        if not d.informed[i]:
            rows.append(None)
            continue
        row = {
            str(entry): {"logprob": _round_logprob(value), "rank": rank, "decoded_token": _decode_token(entry, tokens)}
            for rank, (entry, value) in enumerate(zip(*map(np.ndarray.tolist, d.row(i)), strict=True), start=1)
        }
        own = row.get(str(token), {"rank": None, "decoded_token": _decode_token(token, tokens)})
        row[str(token)] = own | {"logprob": max(_round_logprob(float(d.gold[i])), MINUS_INFINITY)}
        rows.append(row)
    ids = [tokens.context, *trace.tokens.tolist()]
    return _start_record(trace, text) | {"prompt_token_ids": ids, "prompt_logprobs": rows}


# ---- completions with `echo` and `logprobs`, in OpenAI's dialect


def read_openai(record: dict[str, Any], tokens: LayoutTokenizer) -> ForeignRecord:
    """Read a record that has tokens as strings; their ids are found by tokenizing the text."""
    choice = (record.get("choices") or [record])[0]
    text = _get_text(record) or choice.get("text")
    if not isinstance(text, str):
        raise ValueError("no text")
    text = text.removeprefix(tokens.opening)
    ids = tokens.vocabulary.segment(text).ids.tolist()
    prompt, problem = Prompt(text=text, ids=ids, context=tokens.context), None
    for dialect in _list_dialects(tokens.vocabulary):
        try:
            found = prompt_logprobs.read_echo({"choices": [choice]}, prompt, dialect)
            return ForeignRecord(text=text, tokens=ids, rows=list(found.entries), gold=found.gold)
        except ValueError as error:
            problem = problem or error
    raise problem or ValueError("no logprobs")


@functools.lru_cache(1)
def _list_dialects(vocabulary: Vocabulary) -> list[Dialect]:
    """List the ways in which servers spell tokens."""
    ways = [(lossy, skip) for skip in (1, 0) for lossy in prompt_logprobs.DECODING_ERRORS]
    return [prompt_logprobs.make_dialect(vocabulary, lossy, opening="", skip=skip) for lossy, skip in ways]


def write_openai(trace: Trace, text: str | None, tokens: LayoutTokenizer, _: bool) -> dict[str, Any]:
    """Write the entries whose string no other token has; if there are none, the token that came."""
    d, ids = trace.distributions, _list_dialects(tokens.vocabulary)[0].ids
    own = [
        max(_round_logprob(x), MINUS_INFINITY) if known else None
        for x, known in zip(d.gold.tolist(), d.informed, strict=True)
    ]
    top: list[dict[str, float] | None] = [None]
    for i, gold in enumerate(trace.tokens.tolist()):
        entries = dict(zip(*map(np.ndarray.tolist, d.row(i)), strict=True))
        kept = [token for token in entries if token == gold or ids.get(_decode_token(token, tokens)) == token]
        row = {
            _decode_token(token, tokens): _round_logprob(entries[token]) for token in kept or [gold] if token in entries
        }
        if d.informed[i] and (gold in entries or not kept):
            row[_decode_token(gold, tokens)] = own[i]
        top.append(row or None)
    strings = [_decode_token(token, tokens) for token in trace.tokens.tolist()]
    logprobs = {"tokens": [tokens.opening, *strings], "token_logprobs": [None, *own], "top_logprobs": top}
    return _start_record(trace, text) | {"choices": [{"index": 0, "text": text, "logprobs": logprobs}]}


# ---- columns of training frameworks


def read_axolotl(record: dict[str, Any], _: LayoutTokenizer) -> ForeignRecord:
    ids, given, mask = (record.get(name) for name in ("target_token_ids", "target_logprobs", "target_mask"))
    tokens = _get_input_ids(record)
    if given is None or ids is None:
        raise ValueError("no columns target_token_ids and target_logprobs")
    masks = mask if mask is not None else [[1] * len(row) for row in ids]
    rows: list[Entries | None] = [
        [(i, p) for i, p, m in zip(*row, strict=True) if m] or None for row in zip(ids, given, masks, strict=True)
    ]
    return ForeignRecord(text=_get_text(record), tokens=tokens, rows=rows, gold=[math.nan] * len(rows))


def write_axolotl(trace: Trace, text: str | None, tokens: LayoutTokenizer, ahead: bool) -> dict[str, Any]:
    ids, logprobs = _pad_rows(trace, ahead)
    input_ids = [tokens.context, *trace.tokens.tolist()]
    return _start_record(trace, text) | {
        "input_ids": input_ids,
        "attention_mask": [1] * len(input_ids),
        "labels": [-100, *input_ids[1:]],
        "target_token_ids": ids.tolist(),
        "target_logprobs": [[_round_logprob(x) for x in row] for row in logprobs.tolist()],
        "target_mask": (logprobs > PADDING_LOGPROB).astype(int).tolist(),
    }


def read_distillkit(record: dict[str, Any], tokens: LayoutTokenizer) -> ForeignRecord:
    """Read plain or compressed columns, and refuse the legacy ones: their centred logits tell no probability."""
    if "compressed_logprobs" in record:
        if tokens.compression is None:
            raise ValueError("compressed columns; --compression names the compression_config.yaml they were made with")
        columns = (record[name] for name in ("compressed_logprobs", "bytepacked_indices"))
        packed = (np.array(c, np.uint8).reshape(len(c), len(c[0]) if c else 0) for c in columns)
        ids, logprobs = (column.tolist() for column in distillkit.decompress(*packed, tokens.compression))
    elif "token_ids" in record and "top_values" in record:
        ids, logprobs = record["token_ids"], record["top_values"]
    elif "packed_indices" in record:
        raise ValueError("DistillKit's legacy columns, which hold logits and no probabilities; capture again")
    else:
        raise ValueError("no columns token_ids and top_values, nor compressed_logprobs and bytepacked_indices")
    rows: list[Entries | None] = [list(zip(*row, strict=True)) or None for row in zip(ids, logprobs, strict=True)]
    return ForeignRecord(text=_get_text(record), tokens=_get_input_ids(record), rows=rows, gold=[math.nan] * len(rows))


def write_distillkit(trace: Trace, text: str | None, tokens: LayoutTokenizer, ahead: bool) -> dict[str, Any]:
    ids, logprobs = _pad_rows(trace, ahead)
    ids, logprobs = (ids[: len(trace.tokens)], logprobs[: len(trace.tokens)]) if ahead else (ids, logprobs)
    return _start_record(trace, text) | {
        "input_ids": [tokens.context, *trace.tokens.tolist()],
        "token_ids": ids.tolist(),
        "top_values": [[_round_logprob(x) for x in row] for row in logprobs.tolist()],
    }


def _pad_rows(trace: Trace, ahead: bool) -> tuple[Int[ndarray, "rows k"], Float[ndarray, "rows k"]]:
    """Pad all rows to equal length, with one for each token and for the context token before them."""
    d = trace.distributions
    shape = len(d) + 1, max(int(d.counts.max(initial=1)), 1)
    ids, logprobs = np.zeros(shape, np.int64), np.full(shape, PADDING_LOGPROB)
    rows = d.rows + (0 if ahead else 1)
    ranks = np.arange(len(d.ids)) - np.repeat(d.offsets[:-1], d.counts)
    ids[rows, ranks], logprobs[rows, ranks] = d.ids, d.logprobs
    return ids, logprobs


def _get_input_ids(record: dict[str, Any]) -> list[int]:
    if not isinstance(ids := record.get("input_ids"), list):
        raise ValueError("no column input_ids")
    return ids


def _get_text(record: dict[str, Any]) -> str | None:
    return next((record[name] for name in ("text", "prompt") if isinstance(record.get(name), str)), None)


def _start_record(trace: Trace, text: str | None) -> dict[str, Any]:
    return {"document": trace.document} | ({} if text is None else {"text": text})


def _decode_token(token: int, tokens: LayoutTokenizer) -> str:
    return (tokens.vocabulary.token_bytes[token] or b"").decode("utf-8", "replace")


def _restore_infinity(logprob: float) -> float:
    return -math.inf if logprob <= MINUS_INFINITY else logprob


def _round_logprob(x: float) -> float:
    """Round to as many digits as the store keeps."""
    return round(float(x), 6) if math.isfinite(x) else float(x)


def dump_record(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


_GOLD = "the log-probability of a token that is not among its row's entries"
LAYOUTS: dict[str, Layout] = {
    "vllm": Layout(read=read_vllm, write=write_vllm, is_ahead=False, is_fixed=True, loses="digits after the sixth"),
    "openai": Layout(
        read=read_openai,
        write=write_openai,
        is_ahead=False,
        is_fixed=True,
        loses="entries whose string is not one token's alone; they join the tail",
    ),
    "axolotl": Layout(
        read=read_axolotl,
        write=write_axolotl,
        is_ahead=False,
        is_fixed=False,
        loses=_GOLD,
    ),
    "distillkit": Layout(
        read=read_distillkit,
        write=write_distillkit,
        is_ahead=True,
        is_fixed=False,
        loses=_GOLD,
    ),
}
