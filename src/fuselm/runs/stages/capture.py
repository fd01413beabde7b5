"""Keep every source's next-token distributions over the training documents and what sources wrote."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.runs.config import CaptureOptions, RunOptions
from fuselm.runs.estimates import ENTRY_BYTES, ROW_BYTES, Estimate, estimate_row_bytes, estimate_step
from fuselm.runs.options.sources import LocalSourceOptions, ServerOptions
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import write
from fuselm.system import fingerprints, manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly
from fuselm.system.remote_paths import open_path

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def declare(pipeline: "Pipeline") -> dict[str, Path]:
    """Return the store of each source, one of the run's or one that the user has; make none."""
    return {name: _declare_for_source(pipeline, name) for name in pipeline.inputs.sources}


def make(pipeline: "Pipeline") -> dict[str, Path]:
    """Capture every source, and return their stores."""
    if any(map(_find_given_store, pipeline.run.sources.values())):
        write.make(pipeline)  # a store that the user has is checked against these texts
    folders = declare(pipeline)
    pipeline.steps.make_all(folders.values())
    return folders


def _declare_for_source(pipeline: "Pipeline", name: str) -> Path:
    model, options = pipeline.inputs.sources[name], pipeline.run.sources[name]
    if (given := _find_given_store(options)) is not None:
        check_given_store(pipeline, name)
        return pipeline.steps.declare_existing(
            STAGE, name, given, fingerprints.hash_file_once(given / "manifest.json")[:16]
        )
    captured = pipeline.run.capture_options(name)
    reads_conversations_first = pipeline.inputs.has_dialogues and captured.prefix_tokens > 0
    recipe = Recipe(
        stage=STAGE.name,
        parameters={
            **captured.recipe,
            **({"prefix_conversations": True} if reads_conversations_first else {}),  # once, they were read alone
            "temperature": 1.0,
            "dtype": pipeline.precision.read_option(f"source {name}"),
            "split": "train",
        },
        about={"model": name_publicly(model.name), "revision": options.revision},
        inputs={
            "model": model.fingerprint,
            "tokenizer": model.tokenizer_fingerprint,
            **pipeline.inputs.identify_chat(f"source {name}"),
            **write.identify_fusion_documents(pipeline),
        },
    )

    def build(out: Path, shown: Progress) -> dict | None:
        return _capture(pipeline, name, out, shown)

    written = write.declare(pipeline).values()
    return pipeline.steps.declare(STAGE, name, recipe, build, inputs=list(written), by_parts=True)


def _capture(pipeline: "Pipeline", name: str, out: Path, shown: Progress) -> dict | None:
    """Capture from a server, on a cluster, or here."""
    from fuselm.sources import capture
    from fuselm.stores import retention

    inputs, run = pipeline.inputs, pipeline.run
    model, vocabulary = inputs.sources[name], inputs.load_source_vocabulary(name)
    documents = write.fusion_documents(pipeline)
    asked: dict[str, Any] = {"policy": retention.Policy(**run.capture_options(name).retention), "progress": shown}
    asked["reader"] = inputs.find_reader(f"source {name}")
    if name in inputs.servers:
        from fuselm.sources.servers import server_capture

        return server_capture.capture_from_server(inputs.servers[name], vocabulary, documents, out, **asked)
    asked |= {"prefix_tokens": run.capture.prefix_tokens, "batch_tokens": run.capture.batch_tokens}
    dtype = pipeline.precision.resume_dtype(f"source {name}", model, out)
    if run.capture.engine == "ray":
        from fuselm.sources import ray_workers

        asked |= {"workers": run.capture.process_count, "revision": run.sources[name].revision}
        counts = ray_workers.capture_on_ray(model, vocabulary, documents, out, dtype=dtype, **asked)
        return counts and counts | {"dtype": dtype}
    if run.capture.engine == "vllm":
        from fuselm.sources import vllm_engine

        counts = vllm_engine.capture_with_vllm(model, vocabulary, documents, out, dtype=dtype, **asked)
        return counts and counts | {"dtype": dtype}
    source = capture.load_source(model, vocabulary, dtype=dtype)
    counts = capture.capture_from_model(source, documents, out, **asked)
    return counts and counts | {"dtype": dtype}


def _find_given_store(options: LocalSourceOptions | ServerOptions) -> Path | None:
    """Return the store that the user has of a source, if any."""
    store = options.store if isinstance(options, LocalSourceOptions) else None
    return None if store is None else open_path(store)


def check_given_store(pipeline: "Pipeline", name: str) -> None:
    """Raise `ValueError` if the user's store of a source is not of this source and these texts.

    As long as sources have not written their texts, it is not known what the store must hold of those. So this is asked
    again before the store is aligned.
    """
    folder = _find_given_store(pipeline.run.sources[name])
    if folder is None or folder in pipeline.trusted_stores:
        return
    from fuselm.stores import store

    model = pipeline.inputs.sources[name]
    found = store.Store(folder, vocabulary_size=model.output_size)
    wanted = {"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint}
    wanted |= pipeline.inputs.identify_chat(f"source {name}")
    if all(manifest.is_finished(path) for path in write.declare(pipeline).values()):
        found.require_inputs(wanted, write.fusion_documents(pipeline), where=f"sources.{name}.store")
        pipeline.trusted_stores.add(folder)


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the tokens that a source reads, and its store with as many entries as a row can have."""
    from fuselm.sources import resumable_writing

    model = pipeline.inputs.sources[step.name]
    read = round(tokens[model.tokenizer_fingerprint]["train"] * write.compute_text_ratio(pipeline))
    entries = min(_most_entries(pipeline.run.capture_options(step.name)), model.output_size)
    window = max(resumable_writing.WINDOW_TOKENS, resumable_writing.WINDOW_BATCHES * pipeline.run.capture.batch_tokens)
    return estimate_step(step, tokens=read, disk=int(read * (ROW_BYTES + ENTRY_BYTES * entries)), parts=read / window)


def _most_entries(options: CaptureOptions) -> int:
    """Return the most entries that a row may have, whatever the model says.

    A row of draws has also the largest entry, the gold one, and one of a sliver.
    """
    limits = options.retention
    return min(limits.get("top_k", limits.get("draws", 0) + 3), int(1 / limits.get("threshold", 1e-9)))


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the time and memory of reading one batch, and what the policy keeps of it."""
    run, name = calibration.pipeline.run, step.name
    measured = calibration.time_reading(name)
    if measured is None:
        return row
    kept = f"{measured.entries:.1f}, {measured.mass:.0%}"
    is_served = name in calibration.pipeline.inputs.servers
    speed = measured.capture_speed * (1 if is_served else run.capture.process_count)
    return replace(
        row,
        keeps=f"{' '.join(map(str, run.capture_options(name).retention.values()))}: {kept}",
        kept=round(row.tokens * measured.row_share * estimate_row_bytes(measured.entries)),
        seconds=measured.loading + row.tokens / speed,
        memory=measured.memory,
    )


def count_passes(run: RunOptions, name: str, written: Mapping[str, float]) -> float:
    """Return the size of all text that is captured, for each byte of the training documents."""
    return 1.0 + sum(written.values())


STAGE = Stage(
    name="capture",
    make=make,
    estimate=estimate,
    calibrate=calibrate,
    count_passes=count_passes,
    loads_models=True,
    asks_servers=True,
    fills_stores=True,
    is_shared=True,
)
