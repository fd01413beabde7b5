"""Read documents with a model: keep the next-token distribution of every token, sparsely.

Wan et al. 2024 keep the top 10 logits. Here the log-probabilities of the full softmax are kept, as many as the policy
wants (stores/retention.py), with the mass of all others and the log-probability of the token that came.

Documents of similar length are read together in batches, each behind other documents of its domain
(documents/passages.py). resumable_writing.py writes what is read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedModel

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, fit_prefix
from fuselm.documents.token_counting import count_read_tokens
from fuselm.models import forward, probe
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Segmentation, Vocabulary
from fuselm.sources.resumable_writing import name_document, write_traces
from fuselm.stores import retention, store
from fuselm.stores.distributions import Distributions, check_distributions
from fuselm.stores.retention import Policy, RetainedEntries
from fuselm.stores.store import Trace
from fuselm.system import machine
from fuselm.system.progress import Progress, announce


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSource:
    """Hold a model in memory, with what is needed to read text."""

    model: PreTrainedModel
    layer: forward.OutputLayer
    vocabulary: Vocabulary
    context_token: int
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedBatch:
    """Hold documents that were read together and what was kept of them, row after row."""

    documents: Sequence[Document]
    segmentations: Sequence[Segmentation]
    kept: RetainedEntries
    gold: Float[ndarray, "rows"]
    vocabulary_size: int


def load_source(model: Model, vocabulary: Vocabulary, *, dtype: str) -> LoadedSource:
    """Load a model to read with. At its first use, check that its rows can be trusted."""
    machine.use_free_cores()
    machine.use_own_gpu()
    loaded, layer = probe.load_tried_model(model, dtype=dtype)
    return LoadedSource(
        model=loaded,
        layer=layer,
        vocabulary=vocabulary,
        context_token=model.context_token,
        context_length=model.context_length,
    )


def capture_from_model(
    source: LoadedSource,
    documents: Sequence[Document],
    out: Path,
    *,
    policy: Policy,
    prefix_tokens: int = 0,
    batch_tokens: int,
    reader: str | None = None,
    progress: Progress,
) -> dict | None:
    """Write traces of `documents` to `out`, which is then complete except for its manifest; return the counts.

    In front of each document, `prefix_tokens` of other documents of its domain are read, if there are any, up to a
    fifth of the source's context. `reader` names the source's among the corpus's readers, which counted tokens.

    The capture resumes after the parts and blocks that are there. Batches don't depend on where an earlier run was cut
    off, so the bytes written don't either. A document for which the model gives NaN is left out, and named in the
    counts' `skipped`. Several processes may do this together; it returns None in those that did not finish. Raises
    `ValueError` if more than `MOST_SKIPPED` of the documents are left out.
    """
    with announce("counting tokens"):
        lengths = count_read_tokens(source.vocabulary, documents, reader=reader)
    segmentations = Segmentations(source.vocabulary, documents)

    def read_batches(batches: list[list[Passage]]) -> Iterator[Iterable[Trace | None]]:
        segmentations.forget()
        for batch in batches:
            yield read_passages(source, documents, segmentations, batch, policy=policy)

    prefix = fit_prefix(source.vocabulary, source.context_length, prefix_tokens)
    counts = write_traces(
        read_batches, documents, lengths, out, prefix=prefix, batch_tokens=batch_tokens, progress=progress
    )
    return counts and counts | {"vocabulary_size": source.vocabulary.size}


class Segmentations(Sequence[Segmentation]):
    """Make the segmentation of a document when it is first asked for, and keep it until `forget`."""

    def __init__(self, vocabulary: Vocabulary, documents: Sequence[Document]):
        self._vocabulary, self._documents = vocabulary, documents
        self._kept: dict[int, Segmentation] = {}

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number):
        if number not in self._kept:
            self._kept[number] = self._vocabulary.segment(self._documents[number].text)
        return self._kept[number]

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept = {}


def trace_batch(
    source: LoadedSource, documents: Sequence[Document], segmentations: Sequence[Segmentation], *, policy: Policy
) -> Iterator[Trace]:
    """Yield traces of documents that are read together, each without a prefix.

    Raises `ValueError` that names the document where the model gives NaN.
    """
    batch = read_batch(source, documents, segmentations, passages.put_each_alone(range(len(documents))), policy=policy)
    for document, trace in zip(documents, make_traces(batch), strict=True):
        if trace is None:
            raise ValueError(f"{name_document(document)}: the model gives NaN; leave the document or the model out")
        yield trace


def read_passages(
    source: LoadedSource,
    documents: Sequence[Document],
    segmentations: Sequence[Segmentation],
    batch: Sequence[Passage],
    *,
    policy: Policy,
) -> Iterator[Trace | None]:
    """Yield a trace for each document of the batch, or None where the model gives NaN. All are read before the first.

    Behind a document for which the model gives NaN, everything is NaN. If there is such a document, those behind it are
    read again, each by itself.
    """
    made = read_batch(source, documents, segmentations, batch, policy=policy)
    again = {}
    bad = {n for n, of in zip(passages.list_documents(batch), _flag_documents_with_nan(made), strict=True) if of}
    for passage in batch:
        behind = bad.intersection(passage.documents) if passage.before or len(passage.documents) > 1 else set()
        if not behind:
            continue
        read_alone = {
            n: read_batch(source, documents, segmentations, passages.put_each_alone([n]), policy=policy)
            for n in behind.union(passage.before)
        }
        if any(_flag_documents_with_nan(of)[0] for of in read_alone.values()):
            again |= {n: read_alone[n] for n in behind}
    return _replace_reread(made, passages.list_documents(batch), again)


def _replace_reread(
    made: CapturedBatch, numbers: Sequence[int], again: Mapping[int, CapturedBatch]
) -> Iterator[Trace | None]:
    """Yield the traces of a batch, with those of documents that were read `again` in place of their own."""
    for n, trace in zip(numbers, make_traces(made), strict=True):
        yield from make_traces(again[n]) if n in again else (trace,)


def _flag_documents_with_nan(batch: CapturedBatch) -> list[bool]:
    """Say for each document whether its rows have NaN."""
    ends = np.cumsum([len(s.ids) for s in batch.segmentations])
    rows = np.isnan(batch.gold)
    rows[np.repeat(np.arange(len(rows)), batch.kept.counts)[np.isnan(batch.kept.logprobs)]] = True
    return [bool(of.any()) for of in np.split(rows, ends[:-1])]


def read_batch(
    source: LoadedSource,
    documents: Sequence[Document],
    segmentations: Sequence[Segmentation],
    batch: Sequence[Passage],
    *,
    policy: Policy,
) -> CapturedBatch:
    """Run one forward pass, holding at most a chunk of the logits. Passages number the `documents`."""
    numbers = passages.list_documents(batch)
    documents_read, tokens_read = [documents[n] for n in numbers], [segmentations[n] for n in numbers]
    separator = passages.tokenize_separator(source.vocabulary)
    texts, of_documents = zip(*(passages.join_tokens(p, segmentations, separator) for p in batch), strict=True)
    with torch.inference_mode():
        firsts = [_find_first_token(passage, segmentations) for passage in batch]
        inputs, mask = forward.pad_inputs(texts, source.context_token, source.model.device, firsts=firsts)
        chosen = forward.flag_kept(mask, of_documents)
        hidden = forward.compute_hidden_states(source.model, source.layer, inputs, mask)[chosen]
        ids = np.concatenate([s.ids for s in tokens_read])
        gold_ids = torch.as_tensor(ids, dtype=torch.long, device=hidden.device)
        uniform = np.zeros(len(ids))
        if policy.policy == "sampled":
            drawn = zip(documents_read, tokens_read, strict=True)
            uniform = np.concatenate([retention.draw_uniforms(d.id, len(s.ids)) for d, s in drawn])
        kept, gold = [], []
        for rows, logits in source.layer.compute_logits_by_chunk(hidden):
            found = forward.survey_logits(logits)
            kept.append(retention.retain_entries(policy, logits, found, gold=gold_ids[rows], uniform=uniform[rows]))
            gold_logprobs = logits.gather(1, gold_ids[rows, None])[:, 0].float() - found.log_z
            gold.append(gold_logprobs.clamp(max=0).cpu().numpy())
    return CapturedBatch(
        documents=documents_read,
        segmentations=tokens_read,
        kept=RetainedEntries(
            **{name: np.concatenate([getattr(k, name) for k in kept]) for name in ("counts", "ids", "logprobs", "tail")}
        ),
        gold=np.concatenate(gold),
        vocabulary_size=source.vocabulary.size,
    )


def _find_first_token(passage: Passage, segmentations: Sequence[Segmentation]) -> int | None:
    """Return the token that stands first in a conversation's row; None for texts, behind the context token."""
    reading = segmentations[(*passage.before, *passage.documents)[0]].reading
    return None if reading is None else reading.first


def make_traces(batch: CapturedBatch) -> Iterator[Trace | None]:
    """Yield a trace for each document of the batch; None where the model gave NaN."""
    offsets = np.append(0, np.cumsum(batch.kept.counts)).astype(np.int64)
    begin = 0
    for document, segmentation, nan in zip(
        batch.documents, batch.segmentations, _flag_documents_with_nan(batch), strict=True
    ):
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
        check_distributions(distributions, batch.vocabulary_size)
        yield Trace(
            document=document.id,
            text=store.fingerprint_text(document.text),
            size=segmentation.size,
            nats=float(-gold.astype(np.float64).sum()),
            tokens=segmentation.ids,
            starts=segmentation.starts,
            distributions=distributions,
            weights=np.zeros((len(gold), 0), np.float32),
        )
