"""One source over the corpus: the next-token distribution of every token, kept sparsely. DESIGN.md sections 2 and 3.

Wan et al. 2024 keep the top 10 logits; here log-probabilities of the full softmax, as many as the policy wants
(retention.py), the mass of all others, and the gold token's own.

Documents are read a window at a time, in batches of like length, others of their domain in front of them (passages.py),
and written in their own order, a part a window. What is read of a window goes to blocks beside the parts until all of
it is: an interruption costs what no block holds.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedModel

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, Prefix
from fuselm.models import forward, probe
from fuselm.models.model import Model
from fuselm.models.vocabulary import Segmentation, Vocabulary
from fuselm.stores import retention, store
from fuselm.stores.distributions import Distributions, check
from fuselm.stores.retention import Kept, Policy
from fuselm.stores.store import Trace
from fuselm.system import machine, manifest
from fuselm.system.background import Background
from fuselm.system.progress import Progress, doing

SECONDS_PER_BLOCK = 15  # what an interruption may cost
WINDOW_TOKENS = 1 << 17  # enough documents to find some of like length, few enough to hold
WINDOW_BATCHES = 32
MOST_SKIPPED = 0.01  # share of the documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model in memory, with what is needed to read text."""

    model: PreTrainedModel
    layer: forward.OutputLayer
    vocabulary: Vocabulary
    context_token: int
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Documents that were read together, and what was kept of them, row after row."""

    documents: Sequence[Document]
    segmentations: Sequence[Segmentation]
    kept: Kept
    gold: Float[ndarray, "rows"]
    vocabulary_size: int


def load(model: Model, vocabulary: Vocabulary, *, dtype: str) -> Source:
    """Load a model that can be read, tried if it was not before."""
    machine.use_free_cores()
    loaded, layer = probe.load(model, dtype=dtype)
    return Source(
        model=loaded,
        layer=layer,
        vocabulary=vocabulary,
        context_token=model.context_token,
        context_length=model.context_length,
    )


def capture(
    source: Source,
    documents: Sequence[Document],
    out: Path,
    *,
    policy: Policy,
    prefix_tokens: int = 0,
    batch_tokens: int,
    progress: Progress,
) -> dict:
    """Write traces of `documents` to `out`, a finished store but for its manifest; return what was counted.

    `prefix_tokens` of other documents of its domain are read in front of each, as far as they are there, and of a fifth
    of the source's context at most.

    Goes on after the parts and blocks that are there. Batches don't depend on where an earlier run was cut off, so
    neither does any byte. A document that the model gives NaN for is left out, and named in the counts' `skipped`.
    Raises `ValueError` where those are more than `MOST_SKIPPED`.
    """
    with doing("tokenizing"):
        segmentations = [source.vocabulary.segment(d.text) for d in documents]

    def read_all(batches: list[list[Passage]]) -> Iterator[Iterable[Trace | None]]:
        for batch in batches:
            yield read_passages(source, documents, segmentations, batch, policy=policy)

    lengths = [len(s.ids) for s in segmentations]
    prefix = Prefix.of(source.vocabulary, source.context_length, prefix_tokens)
    counts = write_all(read_all, documents, lengths, out, prefix=prefix, batch_tokens=batch_tokens, progress=progress)
    return counts | {"vocabulary_size": source.vocabulary.size}


def write_all(
    read_all: Callable[[list[list[Passage]]], Iterator[Iterable[Trace | None]]],
    documents: Sequence[Document],
    lengths: Sequence[int],
    out: Path,
    *,
    prefix: Prefix,
    batch_tokens: int,
    progress: Progress,
) -> dict:
    """Write what `read_all` makes of batches of passages: of each batch its documents' traces, None where a document
    can have none. It is called once, with the batches of all windows; a thread writes what comes.
    """
    writer = _Writer(out, documents, progress)
    members = passages.by_domain(d.domain for d in documents)
    windows = list(_windows(lengths, max(WINDOW_TOKENS, WINDOW_BATCHES * batch_tokens)))
    resumed = {w: writer.resume(w, documents[window]) for w, window in enumerate(windows)}
    done = set().union(*resumed.values())
    tokens_done = sum(n for n, d in zip(lengths, documents, strict=True) if d.id in done)
    progress.start(sum(lengths), unit="tokens", done=tokens_done)
    todo = {
        w: [
            batch
            for batch in passages.plan(window, lengths, members, prefix=prefix, batch_tokens=batch_tokens)
            if not done.issuperset(documents[i].id for i in passages.documents_of(batch))
        ]
        for w, window in enumerate(windows)
        if not store.part_path(out, w).exists()
    }
    with writer, Background(writer.write) as background:
        made = iter(read_all([batch for batches in todo.values() for batch in batches]))
        for w, batches in todo.items():
            for batch in batches:
                read = passages.documents_of(batch)
                background.put((w, [documents[i] for i in read], next(made)))
                progress.advance(sum(lengths[i] for i in read if documents[i].id not in done))
            background.put((w, [], None))
    counts = store.finish(out)
    writer.check_skipped()
    return {**counts, "skipped": writer.skipped, "resumed_documents": len(done)}


def trace_batch(
    source: Source, documents: Sequence[Document], segmentations: Sequence[Segmentation], *, policy: Policy
) -> Iterator[Trace]:
    """Traces of documents that are read together, each by itself. Raises `ValueError`, with the document, where the
    model gives NaN.
    """
    batch = read(source, documents, segmentations, passages.alone(range(len(documents))), policy=policy)
    for document, trace in zip(documents, traces(batch), strict=True):
        if trace is None:
            raise ValueError(f"{_named(document)}: the model gives NaN; leave the document or the model out")
        yield trace


def read_passages(
    source: Source,
    documents: Sequence[Document],
    segmentations: Sequence[Segmentation],
    batch: Sequence[Passage],
    *,
    policy: Policy,
) -> Iterator[Trace | None]:
    """A trace for each document of the batch, None where the model gives NaN for it; all is read before the first.

    Behind a document that the model gives NaN for it gives NaN too: those are read again, each by itself, if there is
    such a document.
    """
    made = read(source, documents, segmentations, batch, policy=policy)
    again = {}
    bad = {n for n, of in zip(passages.documents_of(batch), _nan(made), strict=True) if of}
    for passage in batch:
        behind = bad.intersection(passage.documents) if passage.before or len(passage.documents) > 1 else set()
        if not behind:
            continue
        apart = {
            n: read(source, documents, segmentations, passages.alone([n]), policy=policy)
            for n in behind.union(passage.before)
        }
        if any(_nan(of)[0] for of in apart.values()):
            again |= {n: apart[n] for n in behind}
    return _traces(made, passages.documents_of(batch), again)


def _traces(made: Batch, numbers: Sequence[int], again: Mapping[int, Batch]) -> Iterator[Trace | None]:
    for n, trace in zip(numbers, traces(made), strict=True):
        yield from traces(again[n]) if n in again else (trace,)


def _nan(batch: Batch) -> list[bool]:
    """Of each document."""
    ends = np.cumsum([len(s.ids) for s in batch.segmentations])
    rows = np.isnan(batch.gold)
    rows[np.repeat(np.arange(len(rows)), batch.kept.counts)[np.isnan(batch.kept.logprobs)]] = True
    return [bool(of.any()) for of in np.split(rows, ends[:-1])]


def read(
    source: Source,
    documents: Sequence[Document],
    segmentations: Sequence[Segmentation],
    batch: Sequence[Passage],
    *,
    policy: Policy,
) -> Batch:
    """One forward pass; of the logits, never more than a chunk. Passages have numbers of `documents`."""
    numbers = passages.documents_of(batch)
    documents_read, tokens_read = [documents[n] for n in numbers], [segmentations[n] for n in numbers]
    gap = passages.between(source.vocabulary)
    texts, of_documents = zip(*(passages.tokens_of(p, segmentations, gap) for p in batch), strict=True)
    with torch.inference_mode():
        inputs, mask = forward.pad(texts, source.context_token, source.model.device)
        chosen = mask.bool()
        chosen[chosen.clone()] = torch.from_numpy(np.concatenate(of_documents)).to(chosen.device)
        hidden = forward.hidden_states(source.model, source.layer, inputs, mask)[chosen]
        ids = np.concatenate([s.ids for s in tokens_read])
        gold_ids = torch.as_tensor(ids, dtype=torch.long, device=hidden.device)
        uniform = np.zeros(len(ids))
        if policy.policy == "sampled":
            drawn = zip(documents_read, tokens_read, strict=True)
            uniform = np.concatenate([retention.uniforms(d.id, len(s.ids)) for d, s in drawn])
        kept, gold = [], []
        for rows, logits in source.layer.logits_by_chunk(hidden):
            found = forward.survey(logits)
            kept.append(retention.keep(policy, logits, found, gold=gold_ids[rows], uniform=uniform[rows]))
            gold_logprobs = logits.gather(1, gold_ids[rows, None])[:, 0].float() - found.log_z
            gold.append(gold_logprobs.clamp(max=0).cpu().numpy())
    return Batch(
        documents=documents_read,
        segmentations=tokens_read,
        kept=Kept(
            **{name: np.concatenate([getattr(k, name) for k in kept]) for name in ("counts", "ids", "logprobs", "tail")}
        ),
        gold=np.concatenate(gold),
        vocabulary_size=source.vocabulary.size,
    )


def traces(batch: Batch) -> Iterator[Trace | None]:
    """A trace for each document of the batch; None where the model gave NaN."""
    offsets = np.append(0, np.cumsum(batch.kept.counts)).astype(np.int64)
    begin = 0
    for document, segmentation, nan in zip(batch.documents, batch.segmentations, _nan(batch), strict=True):
        rows = slice(begin, begin + len(segmentation.ids))
        entries = slice(offsets[rows.start], offsets[rows.stop])
        gold, logprobs = batch.gold[rows], batch.kept.logprobs[entries]
        begin = rows.stop
        if nan:
            yield None
            continue
        distributions = Distributions(
            offsets=offsets[rows.start : rows.stop + 1] - offsets[rows.start],
            ids=batch.kept.ids[entries],
            logprobs=logprobs,
            gold=gold,
            tail=batch.kept.tail[rows],
        )
        check(distributions, batch.vocabulary_size)
        yield Trace(
            document=document.id,
            text=store.text_fingerprint(document.text),
            size=segmentation.size,
            nats=float(-gold.astype(np.float64).sum()),
            tokens=segmentation.ids,
            starts=segmentation.starts,
            distributions=distributions,
            weights=np.zeros((len(gold), 0), np.float32),
        )


class _Writer:
    """Rows of the window that is being read, on their way to the disk."""

    def __init__(self, out: Path, documents: Sequence[Document], progress: Progress):
        self.skipped: list[str] = []
        self._out = out
        self._documents = documents
        self._place = {d.id: n for n, d in enumerate(documents)}
        self._progress = progress
        self._tables: dict[int, list[pa.Table]] = {}  # of windows
        self._there: set[str] = set()
        self._unwritten: list[pa.Table] = []  # of `_window`
        self._window = 0
        self._written = time.monotonic()

    def resume(self, window: int, documents: Sequence[Document]) -> set[str]:
        """The documents of a window that are there."""
        blocks = self._blocks(window)
        part = store.part_path(self._out, window)
        for path in (part, *blocks):
            if path.exists() and not manifest.is_whole(path):
                self._progress.note(f"{path} is damaged; its documents are read again")
                path.unlink()
        if part.exists():
            for block in blocks:
                block.unlink(missing_ok=True)
            there = set(pq.read_table(part, columns=["document"])["document"].to_pylist())
            self.skipped += [d.id for d in documents if d.id not in there]
            return {d.id for d in documents}
        self._tables[window] = [pq.read_table(block).cast(store.SCHEMA) for block in self._blocks(window)]
        there = {document for table in self._tables[window] for document in table["document"].to_pylist()}
        self._there |= there
        return there

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """What was read before something went wrong is not lost."""
        if self._unwritten:
            self._write_block(self._window)

    def write(self, item: tuple[int, Sequence[Document], Iterable[Trace | None] | None]) -> None:
        """Traces of documents of a window; None once that is all there is."""
        self._window, documents, traces = item
        window = self._window
        if traces is not None:
            self._add(window, documents, traces)
            if time.monotonic() - self._written >= SECONDS_PER_BLOCK:
                self._write_block(window)
            return
        table = self._in_order(self._tables.pop(window))
        store.write_tables(store.part_path(self._out, window), [table], seal=True)
        for block in self._blocks(window):
            block.unlink()
        self._unwritten, self._written = [], time.monotonic()

    def check_skipped(self) -> None:
        if len(self.skipped) > MOST_SKIPPED * len(self._documents):
            first = _named(self._documents[self._place[self.skipped[0]]])
            raise ValueError(
                f"capture: the model gives NaN for {len(self.skipped)} of {len(self._documents)} documents (first: "
                f"{first}), more than {MOST_SKIPPED:.0%}; try another dtype or capture.prefix_tokens=0, or leave the "
                "model out"
            )

    def _add(self, window: int, documents: Sequence[Document], traces: Iterable[Trace | None]) -> None:
        good = []
        for document, trace in zip(documents, traces, strict=True):
            if trace is None:
                self.skipped.append(document.id)
                self._progress.note(f"skipped {_named(document)}: the model gives NaN")
                self.check_skipped()
            elif document.id not in self._there:
                good.append(trace)
        self._tables[window].append(store.to_table(good))
        self._unwritten.append(self._tables[window][-1])

    def _write_block(self, window: int) -> None:
        numbers = [int(path.stem.rpartition("-")[2]) for path in self._blocks(window)]
        number = max(numbers, default=-1) + 1
        path = self._out / f".block-{window:05d}-{number:05d}.parquet"
        store.write_tables(path, [pa.concat_tables(self._unwritten)], seal=True)
        self._unwritten, self._written = [], time.monotonic()

    def _blocks(self, window: int) -> list[Path]:
        return sorted(self._out.glob(f".block-{window:05d}-*.parquet"))

    def _in_order(self, tables: Sequence[pa.Table]) -> pa.Table:
        """Of the documents' order; one that is in two blocks, as after a failure to sync the first, once."""
        table = pa.concat_tables([store.SCHEMA.empty_table(), *tables])
        places = np.array([self._place[document] for document in table["document"].to_pylist()], np.int64)
        return table.take(pa.array(np.unique(places, return_index=True)[1]))


def _windows(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Documents one after another, until there are so many tokens."""
    begin = tokens = 0
    for n, length in enumerate(lengths):
        tokens += length
        if tokens >= most or n == len(lengths) - 1:
            yield slice(begin, n + 1)
            begin, tokens = n + 1, 0


def _named(document: Document) -> str:
    return f"document {document.id} ({document.domain})"
