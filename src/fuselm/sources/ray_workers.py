"""Read the corpus with one source on several machines: Ray Data hands batches to actors that hold the model.

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
    progress: Progress,
) -> dict:
    """Capture as `capture_from_model` does, with `workers` workers; each has a GPU if there are enough.

    It uses the cluster that the environment variable RAY_ADDRESS names, else starts one on this machine. Raises
    `ValueError` if Ray isn't installed, or if a worker fails other than by being killed.
    """
    ray = _start_ray(workers)
    gpus = int(ray.cluster_resources().get("GPU", 0) >= workers)

    def read_batches(batches: list[list[Passage]]) -> Iterator[list[Trace | None]]:
        if not batches:
            return
        rows = [{"batch": pickle.dumps(passages.extract_batch(batch, read))} for batch in batches]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            CaptureWorker,
            fn_constructor_args=(model, revision, dtype, policy),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus,
        )
        try:
            for row in made.iter_rows():
                yield pickle.loads(row["traces"])
        except ray.exceptions.RayError as error:
            raise ValueError(f"{model.name}: a Ray worker failed ({_find_cause(error)})") from error

    # Workers tokenize texts; conversations are read here, where the run file's templates are known.
    dialogues = {d.id: vocabulary.segment(d.text) for d in documents if not isinstance(d.text, str)}
    read = [(document, dialogues.get(document.id)) for document in documents]
    counts_of_texts = iter(vocabulary.count_tokens([d.text for d in documents if isinstance(d.text, str)]))
    lengths = [next(counts_of_texts) if found is None else len(found.read_ids) for _, found in read]
    prefix = fit_prefix(vocabulary, model.context_length, prefix_tokens)
    counts = write_traces(
        read_batches, documents, lengths, out, prefix=prefix, batch_tokens=batch_tokens, progress=progress
    )
    return counts | {"vocabulary_size": vocabulary.size}


class CaptureWorker:
    """Hold the model in a worker process of Ray."""

    def __init__(self, model: Model, revision: str | None, dtype: str, policy: Policy):

        here = model if model.folder.is_dir() else locate_model(model.name, revision=revision)
        if here.fingerprint != model.fingerprint:
            raise ValueError(f"{model.name}: another model on this machine than where the run was started")
        self._policy = policy
        self._source = load_source(here, load_vocabulary(here), dtype=dtype)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        read, batch = pickle.loads(row["batch"])
        documents = [document for document, _ in read]
        segmentations = [found or self._source.vocabulary.segment(document.text) for document, found in read]
        traces = read_passages(self._source, documents, segmentations, batch, policy=self._policy)
        return {"traces": pickle.dumps(list(traces))}


def _start_ray(workers: int):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("capture.engine: ray is not installed; pip install 'fuselm[ray]'") from None
    if not ray.is_initialized():
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            ray.init(num_cpus=workers + 1, include_dashboard=False, **quiet)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _find_cause(error: Exception) -> str:
    """Return the innermost error, the one of the worker, in one line."""
    while isinstance(inner := getattr(error, "cause", None) or error.__cause__, Exception):
        error = inner
    return summarize_error(error)
