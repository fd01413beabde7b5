"""Gather what `results.diagnosis.diagnose` needs, from the folder of a finished run or by running to the alignment."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fuselm.documents.document_list import read_documents
from fuselm.models.locating import Model, locate_model
from fuselm.runs import config, row_fusion, run_folders, target_capture
from fuselm.runs.options.sources import LocalSourceOptions
from fuselm.stores.store import Store
from fuselm.system import manifest
from fuselm.system.terminal import make_plain_text

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline


def gather_from_folder(folder: Path, console: Console) -> dict[str, Any]:
    """Return the arguments of `diagnose` for the finished run in `folder`. Raises `ValueError` if it is not one.

    The target is captured if it is not among the sources, unless the options or models of the run are gone.
    """
    if not (folder / run_folders.RECORD).is_file():
        raise ValueError(f"{folder}: no finished run there; name its run file, and what is missing will be made")
    stages = run_folders.read_record(folder)
    names = [stage.removeprefix("capture ") for stage in stages if stage.startswith("capture ")]
    captured = {name: run_folders.read_capture(folder, stages, name) for name in names}
    aligned = {name: Store(stages[f"align {name}"]) for name in sorted(captured)}
    documents = row_fusion.keep_aligned(read_documents(stages["corpus"], "train"), aligned)
    target = manifest.read(stages["train clm"])["inputs"]["model"]
    own = [name for name, record in captured.items() if record["inputs"]["model"] == target]
    servers = [name for name, record in captured.items() if record["parameters"].get("dtype") == "the server's"]
    local = [] if run_folders.has_given_store(folder) else sorted(captured.keys() - {*own, *servers})
    beside = None
    if not own and (model := _locate_target(folder, target, console)) is not None:
        vocabulary = run_folders.read_vocabulary(folder, None)
        beside = Store(target_capture.capture_target(model, vocabulary, documents, folder, console))
    return {
        "stores": aligned,
        "documents": documents,
        "own": next(iter(own), None),
        "target_store": beside,
        "writers": [] if any(stage.startswith("write ") for stage in stages) else local,
        "unprefixed": [name for name in local if not captured[name]["parameters"].get("prefix_tokens", 0)],
        "vocabulary_size": locate_model(str(folder / "model")).output_size,
        "drawn": any(
            store.manifest["parameters"].get("draws") and captured[name]["parameters"].get("policy") == "sampled"
            for name, store in aligned.items()
        ),
    }


def gather_from_pipeline(pipeline: "Pipeline") -> dict[str, Any]:
    """Return the arguments of `diagnose` for a pipeline; capture and align whatever is missing.

    The target is captured, too, if it is not among the sources.
    """
    folders = pipeline.align(draws=False)  # entropies need whole rows
    aligned = {name: Store(path) for name, path in sorted(folders.items())}
    inputs, run = pipeline.inputs, pipeline.run
    documents = row_fusion.keep_aligned(pipeline.documents.select("train"), aligned)
    own = [name for name, model in inputs.sources.items() if model.fingerprint == inputs.target.fingerprint]
    beside = None
    if not own:
        beside = Store(
            target_capture.capture_target(
                inputs.target, inputs.target_vocabulary, documents, pipeline.folder, pipeline.console
            )
        )
    readers = [n for n, s in run.sources.items() if isinstance(s, LocalSourceOptions) and s.store is None]
    return {
        "stores": aligned,
        "documents": documents,
        "own": next(iter(own), None),
        "target_store": beside,
        "writers": [] if inputs.writers else inputs.list_possible_writers(run),
        "unprefixed": [] if run.capture.prefix_tokens else sorted(set(readers) - set(own)),
        "vocabulary_size": inputs.target.output_size,
    }


def _locate_target(folder: Path, fingerprint: str, console: Console) -> Model | None:
    """Return the target of a finished run, or None if its options are gone or name another model by now."""
    try:
        options = config.load(folder / "config.yaml").target
        model = locate_model(options.model, revision=options.revision)
    except ValueError as error:
        console.print(make_plain_text(f"diagnose: the target is not read ({error})"), soft_wrap=True)
        return None
    return model if model.fingerprint == fingerprint else None
