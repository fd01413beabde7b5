"""Measure how fast this machine is at a run, on one batch of each kind of work.

A model reads one batch, a server is asked for as many documents as at a time, and the target is trained on one batch,
as the run will do it.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.runs.estimates import Estimate
from fuselm.runs.stages.train import collect_settings
from fuselm.sources import capture
from fuselm.sources.servers import remote, server
from fuselm.stores import retention
from fuselm.system import compiling, machine
from fuselm.system.progress import Progress
from fuselm.system.terminal import make_plain_text
from fuselm.training import batches, target_training
from fuselm.training.objective import fusion_loss

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

BATCH_TOKENS = 1024  # in the batch that a model reads
DOCUMENTS = 64  # at most, from all parts of the corpus
ALIGN_SECONDS = 1e-4  # a token; measured, and small beside the other stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Hold what was measured on one batch: the speed, and what a capture keeps of a token on average."""

    speed: float  # tokens a second
    entries: float = 0.0
    mass: float = 0.0  # probability of the kept entries
    memory: int = 0  # the most bytes that this process has held so far


class Calibration:
    """Measure each kind of work once. `failures` says why some could not be tried."""

    def __init__(self, pipeline: "Pipeline"):
        machine.use_free_cores()
        self.pipeline = pipeline
        self.chosen: Mapping[str, str] = pipeline.precision.choose_all(pipeline.local_models)
        self.failures: list[str] = []
        self._documents = pick_evenly([d for d in pipeline.documents if d.split == "train"], DOCUMENTS)
        self._measured: dict[str, Measured | None] = {}
        self._compiled: set[str] = set()

    def time_reading(self, name: str, *, prefix_tokens: int = 0) -> Measured | None:
        """Measure a source, or the target for an empty name, reading one batch; None if it can't be tried."""

        def measure() -> Measured:
            if name in self.pipeline.inputs.servers:
                return measure_server(self.pipeline, name, self._documents)
            dtype = self.chosen[f"source {name}" if name else "target"]
            return measure_reading(self.pipeline, name, self._documents, dtype=dtype, prefix_tokens=prefix_tokens)

        return self._measure_once(f"{'capture' if prefix_tokens else 'read'} {name or 'target'}", measure)

    def time_training(self) -> Measured | None:
        """Measure the target trained on one batch; None if it can't be tried."""

        def measure() -> Measured:
            return measure_training(self.pipeline, self._documents, precision=self.chosen["train"])

        return self._measure_once("train target", measure)

    def add_kernel_time(self, step: "Step", row: Estimate) -> Estimate:
        """Return an estimate with the time of aligning or fusing, and of compiling that before the first step."""
        stage = step.stage.name
        compilation = 0.0 if stage in self._compiled else compiling.estimate_seconds(stage)
        self._compiled.add(stage)
        return replace(row, seconds=row.tokens * ALIGN_SECONDS + compilation, memory=peak_memory())

    def _measure_once(self, title: str, measure: Callable[[], Measured]) -> Measured | None:
        if title not in self._measured:
            self.pipeline.console.print(make_plain_text(f"calibrating: {title}", style="dim"))
            try:
                self._measured[title] = replace(measure(), memory=peak_memory())
            except ValueError as error:
                self._measured[title] = None
                self.failures.append(str(error))
        return self._measured[title]


def peak_memory() -> int:
    """Return the most that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_reading(
    pipeline: "Pipeline", name: str, documents: Sequence[Document], *, dtype: str, prefix_tokens: int
) -> Measured:
    """Measure a source, or the target for an empty name, reading one batch."""
    model = pipeline.inputs.sources[name] if name else pipeline.inputs.target
    vocabulary = pipeline.inputs.load_source_vocabulary(name) if name else pipeline.inputs.target_vocabulary
    segmentations = [vocabulary.segment(d.text) for d in documents]
    source = capture.load(model, vocabulary, dtype=dtype)
    prefix = passages.fit_prefix(vocabulary, model.context_length, prefix_tokens)
    members, lengths = passages.group_by_domain(d.domain for d in documents), [len(s.ids) for s in segmentations]
    window = slice(0, len(documents))
    planned = passages.plan_batches(window, lengths, members, prefix=prefix, batch_tokens=BATCH_TOKENS)
    batch = planned[len(planned) // 2]  # of usual length
    per_prefix = passages.DOCUMENTS_PER_PREFIX
    kept_share = per_prefix / (1 + per_prefix) if prefix.tokens else 1.0  # of what a whole corpus reads
    policy = retention.Policy(**(pipeline.run.capture_options(name) if name else pipeline.run.capture).retention)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        kept = capture.read(source, documents, segmentations, batch, policy=policy).kept
        seconds = time.perf_counter() - began
    return Measured(
        speed=kept_share * (len(kept.counts) + sum(row.prefix for row in batch)) / seconds,
        entries=float(kept.counts.mean()),
        mass=1 - float(kept.tail.mean()),
    )


def measure_server(pipeline: "Pipeline", name: str, documents: Sequence[Document]) -> Measured:
    """Measure a server that is asked for as many documents as at a time in a run."""
    asked, options = pipeline.inputs.servers[name], pipeline.run.capture_options(name)
    vocabulary = pipeline.inputs.load_source_vocabulary(name)
    documents = pick_evenly(documents, asked.requests)
    segmentations = [vocabulary.segment(d.text) for d in documents]
    with server.connect(asked, vocabulary, top_k=options.top_k) as connection:
        began = time.perf_counter()
        found = remote.traces(connection, documents, segmentations)
        rows = [trace.distributions for trace, _ in found if trace is not None]
    tokens, policy = sum(map(len, rows)), retention.Policy(**options.retention)
    kept = [retention.drop_unwanted_entries(policy, d) for d in rows]
    return Measured(
        speed=tokens / (time.perf_counter() - began),
        entries=sum(len(d.ids) for d in kept) / max(tokens, 1),
        mass=1 - sum(float(d.tail.sum()) for d in kept) / max(tokens, 1),
    )


def measure_training(pipeline: "Pipeline", documents: Sequence[Document], *, precision: str) -> Measured:
    """Measure one batch forwards and backwards, with its share of the optimizer's step.

    It is trained on the text alone, because fused rows cost next to nothing.
    """
    rate = pipeline.run.train.for_method("clm").learning_rates[0]
    settings = target_training.TrainingSettings(**collect_settings(pipeline, "clm", rate, precision=precision))
    machine.use_free_cores()
    target, shown = pipeline.inputs.target, Progress(pipeline.console, "calibrating")
    model = target_training.load_target(target, settings, shown)
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
    token_mask = labels != -100

    def compute_loss(hidden: torch.Tensor, layer: forward.OutputLayer) -> dict[str, torch.Tensor]:
        return {"loss": fusion_loss(hidden, layer, labels[token_mask], None, 1.0).total}

    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.0)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = model(**inputs, token_mask=token_mask, loss_fn=compute_loss)["loss"]
        loss.backward()
        seconds = time.perf_counter() - began
        optimizer.step()
        seconds += (time.perf_counter() - began - seconds) / settings.gradient_accumulation
    return Measured(speed=dataset.count_tokens(1) / seconds)


def pick_evenly(items: Sequence, count: int) -> list:
    """Return `count` of the items, or all if they are fewer, from evenly spaced places."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]
