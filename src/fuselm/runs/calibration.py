"""How fast this machine is at a run: a model reads one batch, a server what it is asked for at a time, and the target
is trained on one batch, as the run will train it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.runs.pipeline import Pipeline
from fuselm.sources import capture
from fuselm.sources.servers import remote
from fuselm.sources.servers import server as servers
from fuselm.stores import retention
from fuselm.system import machine
from fuselm.system.progress import Progress
from fuselm.training import batches
from fuselm.training import train as training
from fuselm.training.objective import fusion_loss

TOKENS = 1024  # of the batch that a model reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one batch: how fast, and of the distributions that a capture keeps the mean of a token's entries and mass."""

    speed: float  # tokens a second
    entries: float = 0.0
    mass: float = 0.0


def read(pipeline: Pipeline, name: str, documents: Sequence[Document], *, dtype: str, prefix_tokens: int) -> Measured:
    """Of a source, or without a name of the target."""
    model = pipeline.inputs.sources[name] if name else pipeline.inputs.target
    vocabulary = pipeline.inputs.source_vocabulary(name) if name else pipeline.inputs.target_vocabulary
    segmentations = [vocabulary.segment(d.text) for d in documents]
    source = capture.load(model, vocabulary, dtype=dtype)
    prefix = passages.Prefix.of(vocabulary, model.context_length, prefix_tokens)
    members, lengths = passages.by_domain(d.domain for d in documents), [len(s.ids) for s in segmentations]
    window = slice(0, len(documents))
    planned = passages.plan(window, lengths, members, prefix=prefix, batch_tokens=TOKENS)
    batch = planned[len(planned) // 2]  # of usual length
    kept_share = passages.DOCUMENTS / (1 + passages.DOCUMENTS) if prefix.tokens else 1.0  # of what a whole corpus reads
    policy = retention.Policy(**(pipeline.run.capture_of(name) if name else pipeline.run.capture).retention)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        kept = capture.read(source, documents, segmentations, batch, policy=policy).kept
        seconds = time.perf_counter() - began
    return Measured(
        speed=kept_share * (len(kept.counts) + sum(row.prefix for row in batch)) / seconds,
        entries=float(kept.counts.mean()),
        mass=1 - float(kept.tail.mean()),
    )


def asked(pipeline: Pipeline, name: str, documents: Sequence[Document]) -> Measured:
    """Of a server, for as many documents as it is asked for at a time."""
    server, options = pipeline.inputs.servers[name], pipeline.run.capture_of(name)
    vocabulary = pipeline.inputs.source_vocabulary(name)
    documents = spread(documents, server.requests)
    segmentations = [vocabulary.segment(d.text) for d in documents]
    with servers.connect(server, vocabulary, top_k=options.top_k) as connection:
        began = time.perf_counter()
        found = remote.traces(connection, documents, segmentations)
        rows = [trace.distributions for trace, _ in found if trace is not None]
    tokens, policy = sum(map(len, rows)), retention.Policy(**options.retention)
    kept = [retention.shorten(policy, d) for d in rows]
    return Measured(
        speed=tokens / (time.perf_counter() - began),
        entries=sum(len(d.ids) for d in kept) / max(tokens, 1),
        mass=1 - sum(float(d.tail.sum()) for d in kept) / max(tokens, 1),
    )


def trained(pipeline: Pipeline, documents: Sequence[Document], *, precision: str) -> Measured:
    """Of one batch forwards and backwards, with its share of the optimizer's step; on the text alone, for fused rows
    cost next to nothing.
    """
    rate = pipeline.run.train.of("clm").learning_rates[0]
    settings = training.Settings(**pipeline.settings("clm", rate, precision=precision))
    machine.use_free_cores()
    target, shown = pipeline.inputs.target, Progress(pipeline.console, "calibrating")
    model = training.load(target, settings, shown)
    dataset = batches.Batches(
        documents,
        pipeline.inputs.target_vocabulary,
        None,
        passes=1,
        batch_documents=settings.batch_documents,
        pack_tokens=settings.pack_tokens,
        seed=settings.seed,
        processes=1,
    )
    inputs = batches.Collator(target.context_token, packed=dataset.packed)([dataset[0]])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "shift_labels"}
    labels = inputs.pop("labels")
    known = labels != -100

    def then(hidden: torch.Tensor, layer: forward.OutputLayer) -> dict[str, torch.Tensor]:
        return {"loss": fusion_loss(hidden, layer, labels[known], None, 1.0).total}

    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.0)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = model(**inputs, known=known, then=then)["loss"]
        loss.backward()
        seconds = time.perf_counter() - began
        optimizer.step()
        seconds += (time.perf_counter() - began - seconds) / settings.gradient_accumulation
    return Measured(speed=dataset.tokens(1) / seconds)


def spread(items: Sequence, count: int) -> list:
    """So many of them, or all, evenly."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]
