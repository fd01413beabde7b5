"""Find the folders that belong together in a run's folder, whether or not the run is finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fuselm.documents.document_list import identify_documents
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.runs import config, step_records
from fuselm.runs.dialogue_options import DialogueOptions
from fuselm.runs.step_records import RecordedStep
from fuselm.system import manifest
from fuselm.system.remote_paths import open_path

RECORD = "run.json"  # the record of a finished run
SERVED = "the server's"  # the dtype of a source that a server has
DIAGNOSIS = "diagnosis"  # the folder, in a run's folder, of what only a diagnosis needs


def resolve_folder(run: Path) -> Path:
    """Return the folder of a run, which is given by its folder or by its run file."""
    return open_path(config.load(run).output) if run.is_file() else run


def find_target(folder: Path, stages: dict[str, Path]) -> tuple[str | None, Path] | None:
    """Return the target's name as a source, and the aligned store of its own distributions.

    The name is None if the target is not among the sources and only a diagnosis captured it. Return None if there is no
    such store.
    """
    fingerprint = _read_target_fingerprint(folder, stages)
    for stage in stages:
        name = stage.removeprefix("capture ")
        if name != stage and read_capture(folder, stages, name)["inputs"].get("model") == fingerprint:
            return (name, stages[f"align {name}"]) if f"align {name}" in stages else None
    captured = [path for path in _list_finished(folder / DIAGNOSIS, "capture") if _read_model(path) == fingerprint]
    keys = [manifest.read(path)["key"] for path in captured]
    for aligned in reversed(_list_finished(folder / DIAGNOSIS, "align")):
        if manifest.read(aligned)["inputs"]["captured"] in keys:
            return None, aligned
    return None


def read_capture(folder: Path, stages: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Return the manifest of a source's capture.

    A finished run's capture may have been deleted. Then return the parameters and inputs that the results of the run
    tell.
    """
    captured = stages[f"capture {name}"]
    if manifest.is_finished(captured) or f"evaluate {name}" not in stages:
        return manifest.read(captured)
    scored = manifest.read(stages[f"evaluate {name}"])
    is_served = scored["parameters"].get("dtype") == SERVED
    options = {"policy": "threshold"} if is_served else _read_summary(folder)["config"]["capture"]
    return {"parameters": {**options, "dtype": scored["parameters"].get("dtype")}, "inputs": scored["inputs"]}


def has_given_store(folder: Path) -> bool:
    """Tell whether the user gave a finished run the store of a source, which the run did not capture itself."""
    sources = _read_summary(folder)["config"]["sources"]
    return any(source.get("store") for source in sources.values())


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return manifest.read_json(path, drop=path)


def _read_target_fingerprint(folder: Path, stages: dict[str, Path]) -> str | None:
    """Return the fingerprint of a run's target; None if neither its stages nor its options say it."""
    if "train clm" in stages:
        return _read_model(stages["train clm"])
    try:
        target = config.load(folder / "config.yaml").target
        return locate_model(target.model, revision=target.revision).fingerprint
    except ValueError:
        return None


def _read_model(stage: Path) -> str | None:
    return manifest.read(stage)["inputs"].get("model")


def find_stages(folder: Path) -> dict[str, Path]:
    """Return the folders of a run's stages by name, such as `corpus`, `capture NAME`, `align NAME` and `fuse`.

    A finished run has a record of them. For another one they are the newest that were made from one another. Raises
    `ValueError` if `folder` is not the folder of a run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a run's folder, the `output` of its run file")
    if (folder / RECORD).is_file():
        return read_record(folder)
    if recorded := _find_recorded(folder, step_records.read_steps(folder)):
        return recorded
    stages = _find_newest_by_source(_list_finished(folder, "capture"), "capture")
    stages |= _find_newest_by_source(_sort_by_use(folder, _list_finished(folder, "align")), "align")
    for stage, aligned in list(stages.items()):
        name = stage.removeprefix("align ")
        if name != stage and (captured := _find_key(folder, "capture", manifest.read(aligned)["inputs"]["captured"])):
            stages[f"capture {name}"] = captured
    if not stages:
        raise ValueError(
            f"{folder}: no run there that captured anything; start it with `fuselm run`, or name another folder"
        )
    if (text := _find_corpus(folder, stages)) is None:
        raise ValueError(f"{folder}: the corpus of what was captured is not there; run the same command again")
    stages["corpus"] = text
    keys = sorted(manifest.read(path)["key"] for stage, path in stages.items() if stage.startswith("align "))
    for fused in _list_finished(folder, "fuse"):
        if sorted(manifest.read(fused)["inputs"].values()) == keys:
            stages["fuse"] = fused
    return stages


def read_record(folder: Path) -> dict[str, Path]:
    """Return the folders of a finished run's stages. Raises `ValueError` if its record is damaged."""
    path = folder / RECORD
    record = manifest.read_json(path, drop=path)
    named = record.get("folders") if isinstance(record, dict) else None
    if not isinstance(named, dict) or not all(isinstance(place, str) for place in named.values()):
        raise ValueError(f"{path}: damaged; delete {path} and run again")
    sources = [stage.removeprefix("capture ") for stage in named if stage.startswith("capture ")]
    by_source = [f"{stage} {name}" for stage in ("align", "evaluate") for name in sources]
    has_copies = any(stage.startswith("fuse ") for stage in named)  # each has a store of its own
    for stage in ("corpus", *(() if has_copies else ("fuse",)), "train clm", *by_source):
        if stage not in named:
            raise ValueError(f"{path}: damaged (it has no folder of {stage}); delete {path} and run again")
    return {stage: step_records.expand(folder, place) for stage, place in named.items()}


def read_vocabulary(folder: Path, source: str | None) -> Vocabulary:
    """Return the vocabulary of a source of the run in `folder`; None means the target.

    It reads conversations if the run's corpus has any. Raises `ValueError` if the run file has no such source.
    """
    has_dialogues = _has_dialogues(folder)
    run = config.load(folder / "config.yaml") if has_dialogues or source or not (folder / "model").is_dir() else None
    if source is None and (folder / "model").is_dir():
        model = locate_model(str(folder / "model"))
    else:
        assert run is not None
        if source is not None and source not in run.sources:
            raise ValueError(f"{folder}: its run file has no source '{source}' any more; run the same command again")
        options = run.target if source is None else run.sources[source]
        if isinstance(options, config.ServerOptions):
            model = locate_model(options.tokenizer)
        else:
            model = locate_model(options.model, revision=options.revision)
    vocabulary = load_vocabulary(model)
    if run is None or not has_dialogues:
        return vocabulary
    role = "target" if source is None else f"source {source}"
    return DialogueOptions(run, locate_model(run.target.model, revision=run.target.revision)).add_template(
        role, model, vocabulary
    )


def _has_dialogues(folder: Path) -> bool:
    """Tell whether the corpus of the run in `folder` has conversations."""
    made = manifest.read(find_stages(folder)["corpus"])
    return any(name.startswith("chat ") for name in made["inputs"])


def _find_recorded(folder: Path, steps: Sequence[RecordedStep]) -> dict[str, Path]:
    """Return the newest folders of a record that were made from one another; none if nothing was captured yet."""
    by_folder = {step.folder: step for step in steps if manifest.is_finished(step.folder)}
    made = sorted(by_folder.values(), key=lambda step: (step.folder / "manifest.json").stat().st_mtime_ns)
    fused = [step for step in made if step.stage == "fuse"]
    fused = [step for step in fused if step.name] if fused and fused[-1].name else fused[-1:]
    inputs = {path for step in fused for path in step.inputs}
    aligned = [step for step in made if step.stage == "align" and (not fused or step.folder in inputs)]
    inputs = {path for step in aligned for path in step.inputs}
    names = {step.name for step in aligned}
    captured = [s for s in made if s.stage == "capture" and (s.folder in inputs or s.name not in names)]
    stages = {step.title: step.folder for step in (*captured, *aligned, *fused)}
    text = _find_corpus(folder, stages) if captured or aligned else None
    return {"corpus": text, **stages} if text is not None else {}


def _list_finished(folder: Path, stage: str) -> list[Path]:
    """List a stage's finished folders, the newest last."""
    found = [
        path
        for path in (folder / stage).glob("*")
        if path.suffix not in (".partial", ".deleted") and manifest.is_finished(path)
    ]
    return sorted(found, key=lambda path: ((path / "manifest.json").stat().st_mtime_ns, path.name))


def _sort_by_use(folder: Path, aligned: list[Path]) -> list[Path]:
    """Sort alignments that only a diagnosis uses before those that the run uses; each keep their order."""
    try:
        draws = config.load(folder / "config.yaml").is_linear_in_rows
    except ValueError:
        return aligned
    return sorted(aligned, key=lambda path: manifest.read(path)["parameters"].get("draws") == draws)


def _find_newest_by_source(paths: list[Path], stage: str) -> dict[str, Path]:
    """Return the last of the folders of each source."""
    return {f"{stage} {path.name.rpartition('-')[0]}": path for path in paths}


def _find_key(folder: Path, stage: str, key: str) -> Path | None:
    return next((path for path in _list_finished(folder, stage) if path.name.rpartition("-")[2] == key), None)


def _find_corpus(folder: Path, stages: dict[str, Path]) -> Path | None:
    """Return the corpus that was captured, or the newest one if only stores of the user's were aligned."""
    captured = [manifest.read(path) for stage, path in stages.items() if stage.startswith("capture ")]
    wanted = {record["inputs"].get("corpus") for record in captured}
    texts = _list_finished(folder, "corpus")
    if not wanted:
        return texts[-1] if texts else None
    return next((t for t in reversed(texts) if identify_documents(t, manifest.read(t)["files"]) in wanted), None)
