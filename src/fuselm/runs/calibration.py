"""Measure how fast this machine is at a run, on one batch of each kind of work.

Each model is loaded once and reads one batch, a server is asked for as many documents as at a time, and the target is
trained on one batch, as the run will do it. Loading models and writing checkpoints do not grow with the text; they are
measured too, because they take most of a small run.
"""

import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.models.locating import Model
from fuselm.runs.estimates import Estimate
from fuselm.runs.stages.train import collect_settings
from fuselm.sources import capture
from fuselm.sources.servers import server_capture
from fuselm.sources.servers.connection import connect
from fuselm.stores import retention
from fuselm.system import compiling, machine, manifest
from fuselm.system.local_copies import find_disk
from fuselm.system.progress import Progress
from fuselm.system.terminal import make_plain_text
from fuselm.training import batches, target_training
from fuselm.training.objective import fusion_loss
from fuselm.training.trainer import TrainingSettings

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

BATCH_TOKENS = 512  # in the batch that a model reads
WRITTEN_BYTES = 1 << 26  # to measure how fast checkpoints are written
DOCUMENTS = 64  # at most, from all parts of the corpus
# These settings decide how fast a training is.
SETTINGS_OF_SPEED = (
    "batch_documents",
    "pack_tokens",
    "gradient_accumulation",
    "gradient_checkpointing",
    "precision",
    "lora_rank",
    "lora_modules",
    "quantize",
)
# These were measured on one core; they are small beside the time of models.
ALIGN_SECONDS = 1e-5  # a token that is aligned or fused
SPELL_SECONDS = 1.2e-5  # a token of both vocabularies, to spell the source's tokens in the target's


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Hold what was measured on one batch: the speed, and what a capture keeps of a token on average."""

    speed: float  # tokens a second
    capture_speed: float = 0.0  # tokens of documents a second, behind the tokens that captures read in front
    loading: float = 0.0  # seconds until the model is in memory
    entries: float = 0.0
    mass: float = 0.0  # probability of the kept entries
    row_share: float = 1.0  # of the tokens that are read, those that have a row: of conversations, the responses'
    memory: int = 0  # the most bytes that this process has held so far


class Calibration:
    """Measure each kind of work once. `failures` says why some could not be tried.

    A calibration for another run may use what an `earlier` one has measured.
    """

    def __init__(self, pipeline: "Pipeline", earlier: "Calibration | None" = None):
        machine.use_free_cores()
        self.pipeline = pipeline
        self.chosen: Mapping[str, str] = pipeline.precision.choose_all(pipeline.local_models)
        self.failures: list[str] = earlier.failures if earlier else []
        self._measured: dict[Hashable, Measured | None] = earlier._measured if earlier else {}
        self._compiled: set[str] = earlier._compiled if earlier else set()

    @cached_property
    def _documents(self) -> list[Document]:
        return pick_evenly(self.pipeline.documents.select("train"), DOCUMENTS)

    def time_reading(self, name: str) -> Measured | None:
        """Measure a source, or the target for an empty name, reading one batch; None if it can't be tried."""
        pipeline = self.pipeline
        if name in pipeline.inputs.servers:
            server_options = pipeline.inputs.servers[name], pipeline.run.capture_options(name)
            return self._measure_once(
                ("server", name, *map(repr, server_options)),
                f"ask {name}",
                lambda: measure_server(pipeline, name, self._documents),
            )
        name = name or self._find_target_among_sources()
        model, dtype = self._describe_reader(name)
        options = pipeline.run.capture_options(name) if name else pipeline.run.capture
        key = ("read", model.fingerprint, model.tokenizer_fingerprint, dtype, options.prefix_tokens, options.retention)
        return self._measure_once(
            tuple(map(repr, key)),
            f"read {name or 'target'}",
            lambda: measure_reading(pipeline, name, self._documents, dtype=dtype),
        )

    def time_training(self, method: str) -> Measured | None:
        """Measure the target trained on one batch, by the settings of a method; None if it can't be tried."""
        pipeline, precision = self.pipeline, self.chosen["train"]
        target, settings = pipeline.inputs.target, read_settings(pipeline, method, precision)
        key = ("train", target.fingerprint, *(getattr(settings, name) for name in SETTINGS_OF_SPEED))
        return self._measure_once(
            tuple(map(repr, key)),
            "train target",
            lambda: measure_training(pipeline, self._documents, settings=settings),
        )

    def time_writing(self, size: int) -> float:
        """Return the seconds that writing so many bytes of a checkpoint takes."""
        measured = self._measure_once(
            ("write",), "write a checkpoint", lambda: Measured(speed=measure_writing(self.pipeline.folder))
        )
        return 0.0 if measured is None else size / measured.speed

    def count_tokens(self, split: str) -> int:
        """Count the target's tokens in a split of the corpus."""
        counts = manifest.read(self.pipeline.make_corpus())["counts"]["tokens"]
        count = counts[self.pipeline.inputs.target.tokenizer_fingerprint][split]
        return round(count * self.pipeline.sampled_factor)

    def add_kernel_time(self, step: "Step", row: Estimate, *, spelled: int = 0) -> Estimate:
        """Return an estimate with the time of aligning or fusing, and of compiling that before the first step.

        `spelled` counts the tokens of vocabularies that have to be spelled.
        """
        stage = step.stage.name
        compilation = 0.0 if stage in self._compiled else compiling.estimate_seconds(stage)
        self._compiled.add(stage)
        return replace(
            row,
            seconds=row.tokens * ALIGN_SECONDS + spelled * SPELL_SECONDS + compilation,
            memory=machine.measure_peak_memory(),
        )

    def _find_target_among_sources(self) -> str:
        """Return the name of a local source that is the target, read in the same type; empty if there is none."""
        target, dtype = self._describe_reader("")
        for name in self.pipeline.inputs.sources.keys() - self.pipeline.inputs.servers.keys():
            source, source_dtype = self._describe_reader(name)
            if (source.fingerprint, source.tokenizer_fingerprint, source_dtype) == (
                target.fingerprint,
                target.tokenizer_fingerprint,
                dtype,
            ):
                return name
        return ""

    def _describe_reader(self, name: str) -> tuple[Model, str]:
        """Return a source, or the target for an empty name, and the type that it is read in."""
        if not name:
            return self.pipeline.inputs.target, self.chosen["target"]
        return self.pipeline.inputs.sources[name], self.chosen[f"source {name}"]

    def _measure_once(self, key: Hashable, title: str, measure: Callable[[], Measured]) -> Measured | None:
        if key not in self._measured:
            self.pipeline.console.print(make_plain_text(f"calibrating: {title}", style="dim"))
            try:
                self._measured[key] = replace(measure(), memory=machine.measure_peak_memory())
            except ValueError as error:
                self._measured[key] = None
                self.failures.append(str(error))
        return self._measured[key]


def measure_reading(pipeline: "Pipeline", name: str, documents: Sequence[Document], *, dtype: str) -> Measured:
    """Measure a source, or the target for an empty name, reading one batch as a capture does."""
    model = pipeline.inputs.sources[name] if name else pipeline.inputs.target
    options = pipeline.run.capture_options(name) if name else pipeline.run.capture
    began = time.perf_counter()
    vocabulary = pipeline.inputs.load_source_vocabulary(name) if name else pipeline.inputs.target_vocabulary
    segmentations = [vocabulary.segment(d.text) for d in documents]
    source = capture.load_source(model, vocabulary, dtype=dtype)
    loading = time.perf_counter() - began
    prefix = passages.fit_prefix(vocabulary, model.context_length, options.prefix_tokens)
    members = passages.group_documents(documents)
    lengths = [len(s.read_ids) for s in segmentations]
    window = slice(0, len(documents))
    planned = passages.plan_batches(window, lengths, members, prefix=prefix, batch_tokens=BATCH_TOKENS)
    batch = planned[len(planned) // 2]  # of usual length
    policy = retention.Policy(**options.retention)
    for read in (planned[-1], batch):  # the first one is short, and its time does not count
        began = time.perf_counter()
        kept = capture.read_batch(source, documents, segmentations, read, policy=policy).kept
        seconds = time.perf_counter() - began
    speed = sum(row.prefix + sum(lengths[n] for n in row.documents) for row in batch) / seconds
    is_whole = len(documents) == len(pipeline.documents.select("train")) and pipeline.sampled_factor == 1
    return Measured(
        speed=speed,
        capture_speed=speed * _find_share_of_documents(prefix, planned, lengths, is_whole=is_whole),
        loading=loading,
        entries=float(kept.counts.mean()),
        mass=1 - float(kept.tail.mean()),
        row_share=sum(len(s.ids) for s in segmentations) / max(sum(lengths), 1),
    )


def _find_share_of_documents(
    prefix: passages.Prefix, planned: Sequence[Sequence[passages.Passage]], lengths: Sequence[int], *, is_whole: bool
) -> float:
    """Return the share of documents in what a capture reads; the rest is read in front of them.

    It is counted if the documents are the whole corpus. A large corpus has as much in front as `passages` allows.
    """
    if not prefix.tokens:
        return 1.0
    if not is_whole:
        return passages.DOCUMENTS_PER_PREFIX / (1 + passages.DOCUMENTS_PER_PREFIX)
    own = sum(lengths)
    return own / (own + sum(row.prefix for batch in planned for row in batch))


def measure_server(pipeline: "Pipeline", name: str, documents: Sequence[Document]) -> Measured:
    """Measure a server that is asked for as many documents as at a time in a run."""
    asked, options = pipeline.inputs.servers[name], pipeline.run.capture_options(name)
    vocabulary = pipeline.inputs.load_source_vocabulary(name)
    documents = pick_evenly(documents, asked.requests)
    segmentations = [vocabulary.segment(d.text) for d in documents]
    with connect(asked, vocabulary, top_k=options.top_k) as connection:
        began = time.perf_counter()
        found = server_capture.trace_documents(connection, documents, segmentations)
        rows = [trace.distributions for trace, _ in found if trace is not None]
    seconds = time.perf_counter() - began
    tokens, policy = sum(map(len, rows)), retention.Policy(**options.retention)
    kept = [retention.drop_unwanted_entries(policy, d) for d in rows]
    return Measured(
        speed=tokens / seconds,
        capture_speed=tokens / seconds,
        entries=sum(len(d.ids) for d in kept) / max(tokens, 1),
        mass=1 - sum(float(d.tail.sum()) for d in kept) / max(tokens, 1),
    )


def read_settings(pipeline: "Pipeline", method: str, precision: str) -> TrainingSettings:
    """Return the settings of a method's training with its first learning rate."""
    rate = pipeline.run.train.for_method(method).learning_rates[0]
    return TrainingSettings(**collect_settings(pipeline, method, rate, precision=precision))


def measure_training(pipeline: "Pipeline", documents: Sequence[Document], *, settings: TrainingSettings) -> Measured:
    """Measure one batch forwards and backwards, with its share of the optimizer's step.

    It is trained on the text alone, because fused rows cost next to nothing.
    """
    machine.use_free_cores()
    target, shown = pipeline.inputs.target, Progress(pipeline.console, "calibrating")
    began = time.perf_counter()
    model = target_training.load_target(target, settings, shown)
    loading = time.perf_counter() - began
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
    return Measured(speed=dataset.count_tokens(1) / seconds, loading=loading)


def measure_writing(folder: Path) -> float:
    """Return the bytes a second at which torch writes a checkpoint into a folder."""
    content = torch.zeros(WRITTEN_BYTES, dtype=torch.uint8)
    with tempfile.TemporaryFile(dir=find_disk(folder)) as file:
        began = time.perf_counter()
        torch.save(content, file)
        return WRITTEN_BYTES / (time.perf_counter() - began)


def pick_evenly(items: Sequence, count: int) -> list:
    """Return `count` of the items, or all if they are fewer, from evenly spaced places."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]
