"""Gather what `results.diagnosis.diagnose` needs, from the folder of a finished run or by running to the alignment."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.documents import corpus
from fuselm.models.locating import locate_model
from fuselm.runs import run_folders
from fuselm.stores.store import Store
from fuselm.system import manifest

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline


def gather_from_folder(folder: Path) -> dict[str, Any]:
    """Return the arguments of `diagnose` for the finished run in `folder`. Raises `ValueError` if it is not one."""
    if not (folder / run_folders.RECORD).is_file():
        raise ValueError(f"{folder}: no finished run there; name its run file, and what is missing will be made")
    stages = run_folders.read_record(folder)
    captured = {
        stage.removeprefix("capture "): manifest.read(path)
        for stage, path in stages.items()
        if stage.startswith("capture ")
    }
    aligned = {name: Store(stages[f"align {name}"]) for name in sorted(captured)}
    target = manifest.read(stages["train clm"])["inputs"]["model"]
    own = [name for name, record in captured.items() if record["inputs"]["model"] == target]
    own_stores = all(path.is_relative_to(folder) for stage, path in stages.items() if stage.startswith("capture "))
    servers = [name for name, record in captured.items() if record["parameters"].get("dtype") == "the server's"]
    local = sorted(captured.keys() - {*own, *servers})
    return {
        "stores": aligned,
        "documents": corpus.read_documents(stages["corpus"], "train"),
        "own": next(iter(own), None),
        "writers": local if own_stores and not any(stage.startswith("write ") for stage in stages) else [],
        "vocabulary_size": locate_model(str(folder / "model")).output_size,
        "drawn": any(
            store.manifest["parameters"].get("draws") and captured[name]["parameters"].get("policy") == "sampled"
            for name, store in aligned.items()
        ),
    }


def gather_from_pipeline(pipeline: "Pipeline") -> dict[str, Any]:
    """Return the arguments of `diagnose` for a pipeline; capture and align whatever is missing."""
    aligned = pipeline.align(draws=False)  # entropies need whole rows
    inputs = pipeline.inputs
    own = [name for name, model in inputs.sources.items() if model.fingerprint == inputs.target.fingerprint]
    return {
        "stores": {name: Store(path) for name, path in sorted(aligned.items())},
        "documents": [d for d in pipeline.documents if d.split == "train"],
        "own": next(iter(own), None),
        "writers": [] if inputs.writers else inputs.list_possible_writers(pipeline.run),
        "vocabulary_size": inputs.target.output_size,
    }
