"""Turn traces into the rows of a part file and back. docs/store.md describes every column."""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.models.segmentation import count_bytes
from fuselm.stores import rounding
from fuselm.stores.distributions import Distributions
from fuselm.system import manifest


def _make_list_field(name: str, kind: pa.DataType) -> pa.Field:
    metadata = {"rounded": rounding.GRIDS[name]} if name in rounding.GRIDS else None
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False, metadata=metadata)


SCHEMA = pa.schema(
    [
        pa.field("document", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("bytes", pa.int32(), nullable=False),
        pa.field("nats", pa.float64(), nullable=False),
        _make_list_field("tokens", pa.int32()),
        _make_list_field("starts", pa.int32()),
        _make_list_field("gold", pa.float32()),
        _make_list_field("tail", pa.float32()),
        _make_list_field("counts", pa.int32()),
        _make_list_field("ids", pa.int32()),
        _make_list_field("logprobs", pa.float32()),
        _make_list_field("weights", pa.float32()),
    ],
    metadata={"fuselm": json.dumps({"format": manifest.FORMAT, "rounded": rounding.GRIDS})},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Hold the tokens of one document, with a distribution for each.

    - `size`: bytes of the document's text.
    - `nats`: cross-entropy of the whole document under the source, in the source's own vocabulary; alignment keeps it.
    - `tokens`, shape (tokens): token ids.
    - `starts`, shape (tokens): the byte of the text where each token begins.
    - `distributions`: one row per token; row i predicts token i from the tokens before it.
    - `weights`, shape (tokens, sources): each source's weight in the fused distribution; without columns before fusion.

    >>> store = fuselm.load_run("mine.yaml", quiet=True).capture()["other"]
    >>> trace = store.read(store.documents[0])
    >>> len(trace.tokens) == len(trace.starts) == len(trace.distributions)
    True
    >>> int(trace.lengths.sum()) == trace.size
    True
    >>> trace.weights.shape[1]
    0
    """

    document: str
    text: str = ""  # its `fingerprint_text`; empty where it isn't known
    size: int  # bytes of text
    nats: float
    tokens: Int[ndarray, "tokens"]
    starts: Int[ndarray, "tokens"]  # bytes; -1 for a space that the tokenizer put before the text
    distributions: Distributions
    weights: Float[ndarray, "tokens sources"]

    def __repr__(self) -> str:
        sources = f", {self.weights.shape[1]} sources" if self.weights.shape[1] else ""
        return (
            f"Trace({self.document!r}, {len(self.tokens):,} tokens, {self.size:,} bytes, "
            f"{len(self.distributions.ids):,} entries{sources})"
        )

    @property
    def lengths(self) -> Int[ndarray, "tokens"]:
        """Count the bytes of text that each token covers."""
        return count_bytes(self.starts, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """Hold the parts of a trace that training reads: tokens, and rows one after the other, by ascending id."""

    tokens: Int[ndarray, "tokens"]
    offsets: Int[ndarray, "edges"]
    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]
    tail: Float[ndarray, "tokens"]


TRAINING_COLUMNS = ("document", "tokens", "tail", "counts", "ids", "logprobs")  # the columns that `TrainingRows` needs


GOLD_COLUMNS = ("document", "tokens", "gold", "counts")


def build_table(traces: Iterable[Trace]) -> pa.Table:
    """Turn traces into rows of a table, with rounded values."""
    traces = list(traces)
    arrays: dict[str, list[ndarray]] = {field.name: [] for field in SCHEMA if pa.types.is_list(field.type)}
    for trace in traces:
        d = trace.distributions
        ids, logprobs = rounding.sort_rows_by_id(d.offsets, d.ids, d.logprobs)
        row = {
            "tokens": trace.tokens,
            "starts": trace.starts,
            "gold": rounding.round_gold(d.gold),
            "tail": rounding.round_tail(d.tail),
            "counts": d.counts,
            "ids": ids,
            "logprobs": rounding.round_logprobs(logprobs),
            "weights": rounding.round_weights(trace.weights.ravel()),
        }
        for name, values in row.items():
            arrays[name].append(values)
    columns: dict[str, pa.Array | list] = {
        "document": [trace.document for trace in traces],
        "text": [trace.text for trace in traces],
        "bytes": [trace.size for trace in traces],
        "nats": [trace.nats for trace in traces],
    }
    for name, parts in arrays.items():
        kind = SCHEMA.field(name).type
        offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        values = pa.array(np.concatenate([np.zeros(0), *parts]).astype(kind.value_type.to_pandas_dtype()))
        columns[name] = pa.ListArray.from_arrays(offsets, values, type=kind)
    return pa.table(columns, schema=SCHEMA)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatColumns:
    """Hold the columns of a row group as flat arrays.

    `edges[name]` says where the values of each document begin in a list column; the entries of token i are `offsets[i]`
    to `offsets[i + 1]`.
    """

    documents: pa.Array
    texts: pa.Array | None
    flat: dict[str, ndarray]
    edges: dict[str, ndarray]
    offsets: Int[ndarray, "_"]

    @property
    def largest_id(self) -> int:
        """Return the largest token or id; -1 if there is none."""
        return max(int(self.flat[name].max(initial=-1)) for name in ("tokens", "ids"))


def flatten_columns(table: pa.Table) -> FlatColumns:
    """Return the columns of a row group as flat arrays. Raises `ValueError` if they do not fit together."""
    flat: dict[str, ndarray] = {}
    edges: dict[str, ndarray] = {}
    for field in table.schema:
        column = join_chunks(table, field.name)
        if column.null_count:
            raise ValueError(f"column {field.name} has nulls")
        if pa.types.is_list(field.type):
            begins = column.offsets.to_numpy()
            edges[field.name] = begins - begins[0]
            column = column.flatten()
        if not pa.types.is_string(column.type):
            flat[field.name] = column.to_numpy(zero_copy_only=False)
    counts = flat["counts"]
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    fits = {name: edges["tokens"] for name in ("starts", "gold", "tail", "counts")}
    for name, wanted in fits.items():
        if name in edges and not np.array_equal(edges[name], wanted):
            raise ValueError(f"column {name} does not fit the document's tokens")
    if counts.min(initial=0) < 0:
        raise ValueError("column counts does not fit the document's tokens")
    for name in ("ids", "logprobs"):
        if name in edges and not np.array_equal(edges[name], offsets[edges["tokens"]]):
            raise ValueError(f"column {name} does not fit the document's tokens")
    weights = np.diff(edges.get("weights", 0 * edges["tokens"]))
    if (weights % np.maximum(np.diff(edges["tokens"]), 1)).any():
        raise ValueError("column weights does not fit the document's tokens")
    texts = join_chunks(table, "text") if "text" in table.schema.names else None
    return FlatColumns(documents=join_chunks(table, "document"), texts=texts, flat=flat, edges=edges, offsets=offsets)


class RowGroup:
    """Read the documents of a row group from its flat columns, which this object takes over.

    `read_training_rows` needs only `TRAINING_COLUMNS`, and `read_gold` only `GOLD_COLUMNS`; `read_trace` needs all
    columns. `draws` is as in `Store`.
    """

    def __init__(self, columns: FlatColumns, *, draws: bool = True):
        self._flat, edges, self._offsets = columns.flat, columns.edges, columns.offsets
        self._documents = columns.documents.to_pylist()
        self._texts = [] if columns.texts is None else columns.texts.to_pylist()
        if not draws:
            head = self._flat["logprobs"] > -np.inf
            self._offsets = np.append(0, np.cumsum(head, dtype=np.int64))[self._offsets]
            edges["ids"] = self._offsets[edges["tokens"]]
            self._flat |= {name: self._flat[name][head] for name in ("ids", "logprobs")}
        self._edges = {name: edges[name].tolist() for name in ("tokens", "ids", "weights") if name in edges}

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Trace]:
        return map(self.read_trace, range(len(self)))

    @property
    def tokens(self) -> int:
        return len(self._flat["tokens"])

    def read_training_rows(self, n: int) -> TrainingRows:
        tokens, entries = self._slice("tokens", n), self._slice("ids", n)
        logprobs, tail = self._normalised
        return TrainingRows(
            tokens=self._flat["tokens"][tokens],
            offsets=self._offsets[tokens.start : tokens.stop + 1] - entries.start,
            ids=self._flat["ids"][entries],
            logprobs=logprobs[entries],
            tail=tail[tokens],
        )

    def read_gold(self, n: int) -> tuple[Float[ndarray, "tokens"], Bool[ndarray, "tokens"]]:
        """Return the gold log-probabilities of a document's tokens, and which of them have entries."""
        tokens = self._slice("tokens", n)
        return self._flat["gold"][tokens], self._flat["counts"][tokens] > 0

    @functools.cached_property
    def _normalised(self) -> tuple[Float[ndarray, "entries"], Float[ndarray, "tokens"]]:
        """Normalise all documents at once, which is faster than one by one, and free the arrays as they were read."""
        return rounding.normalise_rows(self._offsets, self._flat.pop("logprobs"), self._flat.pop("tail"))

    def read_trace(self, n: int) -> Trace:
        tokens, entries, weights = self._slice("tokens", n), self._slice("ids", n), self._slice("weights", n)
        flat, count = self._flat, tokens.stop - tokens.start
        offsets = self._offsets[tokens.start : tokens.stop + 1] - entries.start
        ids, logprobs, tail = rounding.restore_rows(
            offsets, flat["ids"][entries], flat["logprobs"][entries], flat["tail"][tokens]
        )
        return Trace(
            document=self._documents[n],
            text=self._texts[n],
            size=int(flat["bytes"][n]),
            nats=float(flat["nats"][n]),
            tokens=flat["tokens"][tokens],
            starts=flat["starts"][tokens],
            distributions=Distributions(
                offsets=offsets, ids=ids, logprobs=logprobs, gold=flat["gold"][tokens], tail=tail
            ),
            weights=flat["weights"][weights].reshape(count, -1) if count else np.zeros((0, 0), np.float32),
        )

    def _slice(self, name: str, n: int) -> slice:
        edges = self._edges[name]
        return slice(edges[n], edges[n + 1])


def read_traces(table: pa.Table, *, draws: bool = True) -> list[Trace]:
    """Turn rows of a table into traces. Raises `ValueError` if columns do not fit together.

    `draws` is as in `Store`.
    """
    return list(RowGroup(flatten_columns(table), draws=draws))


def round_trace(trace: Trace) -> Trace:
    """Return a trace as it is read after it was written."""
    d, count = trace.distributions, len(trace.tokens)
    offsets = d.offsets.astype(np.int64)
    ids, logprobs, tail = rounding.restore_rows(offsets, *_round_rows(d))
    weights = rounding.round_weights(trace.weights.ravel())
    return replace(
        trace,
        tokens=trace.tokens.astype(np.int32),
        starts=trace.starts.astype(np.int32),
        distributions=Distributions(
            offsets=offsets, ids=ids, logprobs=logprobs, gold=rounding.round_gold(d.gold), tail=tail
        ),
        weights=weights.reshape(count, -1) if count else np.zeros((0, 0), np.float32),
    )


def round_training_rows(trace: Trace) -> TrainingRows:
    """Return what training reads of a trace after it was written."""
    offsets = trace.distributions.offsets.astype(np.int64)
    ids, logprobs, tail = _round_rows(trace.distributions)
    logprobs, tail = rounding.normalise_rows(offsets, logprobs, tail)
    return TrainingRows(tokens=trace.tokens.astype(np.int32), offsets=offsets, ids=ids, logprobs=logprobs, tail=tail)


def _round_rows(d: Distributions) -> tuple[Int[ndarray, "entries"], Float[ndarray, "entries"], Float[ndarray, "_"]]:
    """Return the entries and tails of rows as they are on disk."""
    ids, logprobs = rounding.sort_rows_by_id(d.offsets, d.ids, d.logprobs)
    return ids, rounding.round_logprobs(logprobs), rounding.round_tail(d.tail)


def join_chunks(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [pa.array([], table.schema.field(name).type)])
