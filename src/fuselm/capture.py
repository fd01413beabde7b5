"""One source over the corpus: the next-token distribution of every token, kept sparsely. DESIGN.md sections 2 and 3.

Wan et al. 2024 keep the top 10 logits; here the top k log-probabilities of the full softmax, the mass of all
others, and the gold token's own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from fuselm import forward, store
from fuselm.corpus import Document
from fuselm.distributions import Distributions, check
from fuselm.progress import Progress
from fuselm.store import Trace
from fuselm.vocabulary import Segmentation, Vocabulary

SECONDS_PER_PART = 15  # what an interruption may cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model in memory, with what is needed to read text."""

    model: PreTrainedModel
    layer: forward.OutputLayer
    vocabulary: Vocabulary
    context_token: int


def capture(
    source: Source, documents: Sequence[Document], out: Path, *, top_k: int, batch_tokens: int, progress: Progress
) -> dict:
    """Write traces of `documents` to parts in `out`, going on after the parts that are there; return what was counted.

    Batches don't depend on where an earlier run was cut off, so neither does any number.
    """
    segmentations = [source.vocabulary.segment(d.text) for d in documents]
    plan = forward.batches([len(s.ids) for s in segmentations], batch_tokens)

    def read(batches: list[list[int]]) -> Iterator[list[Trace]]:
        for batch in batches:
            chosen = [documents[i] for i in batch], [segmentations[i] for i in batch]
            yield list(trace_batch(source, *chosen, top_k=top_k))

    return write_batches(read, plan, documents, segmentations, out, progress=progress)


def write_batches(
    read: Callable[[list[list[int]]], Iterator[list[Trace]]],
    plan: Sequence[list[int]],
    documents: Sequence[Document],
    segmentations: Sequence[Segmentation],
    out: Path,
    *,
    progress: Progress,
) -> dict:
    """Write what `read` makes of those batches of `plan` that no part in `out` has; return what was counted.

    A part is written every few seconds, and before a `ValueError` of `read` goes on to the user.
    """
    done = _documents_in_parts(out)
    todo = [batch for batch in plan if not done.issuperset(documents[i].id for i in batch)]
    tokens = sum(len(s.ids) for s in segmentations)
    progress.start(tokens, unit="tokens", done=tokens - sum(len(segmentations[i].ids) for b in todo for i in b))

    part, pending, written = len(list(out.glob("part-*.parquet"))), [], time.monotonic()
    try:
        for batch, traces in zip(todo, read(todo), strict=True):
            pending.extend(traces)
            progress.advance(sum(len(segmentations[i].ids) for i in batch))
            if batch is todo[-1] or time.monotonic() - written > SECONDS_PER_PART:
                store.write_part(out, part, pending)
                part, pending, written = part + 1, [], time.monotonic()
    except ValueError:
        if pending:
            store.write_part(out, part, pending)
        raise
    return {"documents": len(documents), "tokens": tokens, "resumed_documents": len(done)}


def trace_batch(
    source: Source, documents: Sequence[Document], segmentations: Sequence[Segmentation], *, top_k: int
) -> Iterator[Trace]:
    """Traces of one batch of documents. Raises `ValueError`, with the document, where the model gives NaN."""
    layer = source.layer
    with torch.inference_mode():
        inputs, mask = forward.pad([s.ids for s in segmentations], source.context_token, source.model.device)
        hidden = forward.hidden_states(source.model, layer, inputs, mask)[mask.bool()]
        gold_ids = torch.as_tensor(
            np.concatenate([s.ids for s in segmentations]), dtype=torch.long, device=hidden.device
        )
        k = min(top_k, source.vocabulary.size)
        ids, logprobs, gold, tail = [], [], [], []
        for rows, logits in layer.logits_by_chunk(hidden):
            logsumexp = forward.logsumexp(logits)[:, None]
            values, indices = forward.top_k(logits, k)
            ids.append(indices.int().cpu().numpy())
            logprobs.append((values - logsumexp).cpu().numpy())
            gold.append((logits.gather(1, gold_ids[rows, None]) - logsumexp)[:, 0].cpu().numpy())
            kept = torch.logsumexp(values.double() - logsumexp.double(), dim=-1)
            tail.append((-torch.expm1(kept)).clamp(0, 1).float().cpu().numpy())
    begin = 0
    ids, logprobs, gold, tail = map(np.concatenate, (ids, logprobs, gold, tail))
    for document, segmentation in zip(documents, segmentations, strict=True):
        end = begin + len(segmentation.ids)
        distributions = Distributions(
            offsets=np.arange(end - begin + 1) * k,
            ids=ids[begin:end].ravel(),
            logprobs=np.minimum(logprobs[begin:end].ravel(), 0.0),
            gold=np.minimum(gold[begin:end], 0.0),
            tail=tail[begin:end],
        )
        try:
            check(distributions, source.vocabulary.size)
        except ValueError as error:
            raise ValueError(
                f"document {document.id} ({document.domain}): {error}; leave it or this model out"
            ) from None
        yield Trace(
            document=document.id,
            size=segmentation.size,
            nats=float(-gold[begin:end].astype(np.float64).sum()),
            tokens=segmentation.ids,
            starts=segmentation.starts,
            distributions=distributions,
            weights=np.zeros((end - begin, 0), np.float32),
        )
        begin = end


def _documents_in_parts(folder: Path) -> set[str]:
    return {
        document
        for path in folder.glob("part-*.parquet")
        for document in pq.read_table(path, columns=["document"]).column(0).to_pylist()
    }
