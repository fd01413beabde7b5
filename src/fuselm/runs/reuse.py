"""Say which sources a run will capture again, and in what its recipe differs from the nearest capture that is there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.documents.document_list import identify_documents
from fuselm.runs.stages import capture, corpus
from fuselm.system import manifest
from fuselm.system.manifest import Recipe

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def explain_captures(pipeline: "Pipeline", steps: "Sequence[Step]") -> list[str]:
    """Return one line for each source that has to be captured: why no capture that is there can be used."""
    lines = []
    missing = [step for step in steps if step.is_needed and step.stage is capture.STAGE and step.recipe is not None]
    there = _read_manifests(pipeline.places.list_finished(capture.STAGE)) if missing else {}
    for step in missing:
        assert step.recipe is not None
        same_model = {f: m for f, m in there.items() if m["inputs"].get("model") == step.recipe.inputs["model"]}
        if same_model:
            nearest = min(same_model, key=lambda folder: len(_find_differences(step.recipe, same_model[folder])))
            reasons = _describe_differences(pipeline, step, same_model[nearest])
            lines.append(f"{step.title}: captured again, because {', '.join(reasons)} in {nearest}")
        else:
            lines.append(f"{step.title}: no capture of this model is there yet")
    return lines


def _read_manifests(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Return the manifests of those folders whose manifest can be read."""
    found = {}
    for folder in folders:
        try:
            found[folder] = manifest.read(folder)
        except ValueError:
            continue
    return found


def _find_differences(recipe: Recipe | None, other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the names of parameters and inputs in which a recipe differs from a manifest, with both values."""
    assert recipe is not None
    pairs = [(recipe.parameters, other["parameters"]), (recipe.inputs, other["inputs"])]
    return [
        (name, ours.get(name), theirs.get(name))
        for ours, theirs in pairs
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _describe_differences(pipeline: "Pipeline", step: "Step", other: Mapping[str, Any]) -> list[str]:
    """Name the options in which a capture differs, as a run file has them."""
    reasons = []
    for name, ours, theirs in _find_differences(step.recipe, other):
        if name == "corpus":
            reasons += _describe_corpus(pipeline, theirs)
        elif name.startswith("written by ") or name == "tokenizer":
            reasons.append(f"{'the tokenizer' if name == 'tokenizer' else f'the text {name}'} is another one than")
        else:
            option = f"sources.{step.name}.dtype" if name == "dtype" else f"capture.{name}"
            reasons.append(f"{option} is {_show(ours)}, but {_show(theirs)}")
    return reasons


def _describe_corpus(pipeline: "Pipeline", documents: str | None) -> list[str]:
    """Say in what the documents differ from those with another hash, if the corpus of these is there."""
    for folder, other in _read_manifests(pipeline.places.list_finished(corpus.STAGE)).items():
        if documents is not None and identify_documents(folder, other["files"]) == documents:
            own = manifest.read(pipeline.make_corpus())
            found = _find_differences(Recipe(stage="corpus", parameters=own["parameters"], inputs=own["inputs"]), other)
            options = [
                f"{'seed' if name == 'seed' else f'corpus.{name}'} is {_show(ours)}, but {_show(theirs)}"
                for name, ours, theirs in found
                if name in own["parameters"]
            ]
            kinds = {name.split()[0] for name, _, _ in found}
            options += ["corpus.files are other files or texts than"] if "file" in kinds else []
            options += ["documents are cut for other tokenizers or contexts than"] if "tokenizer" in kinds else []
            if options:
                return options
    return ["the training documents are others than"]


def _show(value: Any) -> str:
    return "not set" if value is None else str(value)
