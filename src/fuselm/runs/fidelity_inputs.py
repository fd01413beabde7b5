"""Gather what `results.fidelity_measurement.measure_captured_fidelity` needs of a run: what its sources captured."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.documents.document_list import read_documents
from fuselm.runs import config, run_folders
from fuselm.stores.store import Store
from fuselm.system import manifest

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline


def gather_from_folder(folder: Path, only: str | None) -> dict[str, dict[str, Any]]:
    """Return the arguments of `measure_captured_fidelity` by source, for the run in `folder`.

    `only` names the one source that is measured; None means all except the target itself. Raises `ValueError` if the
    run has no such source, or has captured nothing.
    """
    stages = run_folders.find_stages(folder)
    captured = {s.removeprefix("capture "): path for s, path in stages.items() if s.startswith("capture ")}
    target = run_folders.find_target(folder, stages)
    documents, vocabulary = read_documents(stages["corpus"], "train"), run_folders.read_vocabulary(folder, None)
    gathered = {}
    for name in _choose(sorted(captured), only, None if target is None else target[0], folder):
        options = _read_align_options(folder, stages.get(f"align {name}"))
        gathered[name] = {
            "captured": Store(captured[name], draws=options["draws"]),
            "documents": documents,
            "vocabularies": (run_folders.read_vocabulary(folder, name), vocabulary),
            "names": (name, "the target"),
            "methods": [options["method"]],
            "top_k": options["top_k"],
        }
    return gathered


def gather_from_pipeline(pipeline: "Pipeline", only: str | None) -> dict[str, dict[str, Any]]:
    """Return the arguments of `measure_captured_fidelity` by source; capture whatever is missing."""
    inputs, run = pipeline.inputs, pipeline.run
    own = [name for name, model in inputs.sources.items() if model.fingerprint == inputs.target.fingerprint]
    chosen = _choose(sorted(inputs.sources), only, next(iter(own), None), pipeline.folder)
    captured = pipeline.capture()
    return {
        name: {
            "captured": Store(captured[name], draws=run.is_linear_in_rows),
            "documents": pipeline.documents.select("train"),
            "vocabularies": (inputs.load_source_vocabulary(name), inputs.target_vocabulary),
            "names": (name, "the target"),
            "methods": [run.align.method],
            "top_k": run.align.top_k,
        }
        for name in chosen
    }


def _choose(names: list[str], only: str | None, target: str | None, folder: Path) -> list[str]:
    if only is None:
        return [name for name in names if name != target] or names
    if only not in names:
        raise ValueError(f"--source {only}: {folder} has no such source; there are {', '.join(names)}")
    return [only]


def _read_align_options(folder: Path, aligned: Path | None) -> dict[str, Any]:
    """Return how a source is aligned in a run: by its aligned store or, before there is one, by the run's options."""
    if aligned is not None:
        return manifest.read(aligned)["parameters"]
    run = config.load(folder / "config.yaml")
    return run.align.model_dump() | {"draws": run.is_linear_in_rows}
