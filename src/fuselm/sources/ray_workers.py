"""Read the corpus with one source on several machines: Ray's actors hold the model, and are handed batches.

The actors' results come back to the process that asks, which writes them as if it had made them itself. So the machines
share no disk, the batches and therefore the store's bytes are those of one process, and an interruption costs no more
than it does there. Ray restarts a worker that has died, and repeats the batches it had.
"""

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, fit_prefix
from fuselm.documents.token_counting import count_read_tokens
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.capture import load_source, read_passages
from fuselm.sources.resumable_writing import write_traces
from fuselm.stores.retention import Policy
from fuselm.stores.store import Trace
from fuselm.system.errors import summarize_error
from fuselm.system.progress import Progress


def capture_on_ray(
    model: Model,
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    out: Path,
    *,
    workers: int,
    revision: str | None,
    dtype: str,
    policy: Policy,
    prefix_tokens: int = 0,
    batch_tokens: int,
    reader: str | None = None,
    progress: Progress,
) -> dict | None:
    """Capture as `capture_from_model` does, with `workers` workers; each has a GPU if there are enough.

    It uses the cluster that the environment variable RAY_ADDRESS names, else starts one on this machine. Raises
    `ValueError` if Ray isn't installed, or if a worker fails other than by being killed.
    """
    ray = start_ray(workers)
    held: list[Any] = []

    def read_batches(batches: list[list[Passage]]) -> Iterator[list[Trace | None]]:
        if batches and not held:
            gpus = int(ray.cluster_resources().get("GPU", 0) >= workers)
            kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(CaptureWorker)
            held.extend(kind.remote(model, revision, dtype, policy) for _ in range(workers))
        rows = [pickle.dumps(_extract(vocabulary, documents, batch)) for batch in batches]
        try:
            yield from map(
                pickle.loads, ray.util.ActorPool(held).map(lambda worker, row: worker.read.remote(row), rows)
            )
        except ray.exceptions.RayError as error:
            raise ValueError(f"{model.name}: a Ray worker failed ({find_cause(error)})") from error

    lengths = count_read_tokens(vocabulary, documents, reader=reader)
    prefix = fit_prefix(vocabulary, model.context_length, prefix_tokens)
    try:
        counts = write_traces(
            read_batches, documents, lengths, out, prefix=prefix, batch_tokens=batch_tokens, progress=progress
        )
    finally:
        for worker in held:
            ray.kill(worker)
    return counts and counts | {"vocabulary_size": vocabulary.size}


def _extract(vocabulary: Vocabulary, documents: Sequence[Document], batch: Sequence[Passage]) -> tuple[list, list]:
    """Return the documents that a batch needs, with segmentations, and the batch renumbered.

    Workers tokenize texts; conversations are read here, where the run file's templates are known.
    """
    numbers, renumbered = passages.extract_batch(batch, range(len(documents)))
    read = [documents[n] for n in numbers]
    return [(d, None if isinstance(d.text, str) else vocabulary.segment(d.text)) for d in read], renumbered


class CaptureWorker:
    """Hold the model in a worker process of Ray."""

    def __init__(self, model: Model, revision: str | None, dtype: str, policy: Policy):

        here = model if model.folder.is_dir() else locate_model(model.name, revision=revision)
        if here.fingerprint != model.fingerprint:
            raise ValueError(f"{model.name}: another model on this machine than where the run was started")
        self._policy = policy
        self._source = load_source(here, load_vocabulary(here), dtype=dtype)

    def read(self, row: bytes) -> bytes:
        """Return the traces of a batch, both as bytes."""
        read, batch = pickle.loads(row)
        documents = [document for document, _ in read]
        segmentations = [found or self._source.vocabulary.segment(document.text) for document, found in read]
        traces = read_passages(self._source, documents, segmentations, batch, policy=self._policy)
        return pickle.dumps(list(traces))


def start_ray(workers: int):
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; return the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util
    except ImportError:
        raise ValueError("capture.engine: ray is not installed; pip install 'fuselm[ray]'") from None
    if not ray.is_initialized():
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            ray.init(num_cpus=workers + 1, include_dashboard=False, **quiet)
    return ray


def find_cause(error: Exception) -> str:
    """Return the innermost error, the one of the worker, in one line."""
    while isinstance(inner := getattr(error, "cause", None) or error.__cause__, Exception):
        error = inner
    return summarize_error(error)
