"""Let sources answer the questions of training conversations, as a part of the stage `write`."""

from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.runs.stage import Stage
from fuselm.runs.stages import corpus
from fuselm.system import fingerprints
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.sources.answer_choice import Answers, Choose

SUFFIX = "+answers"  # of a step's name, behind the source's; no source has a plus sign in its name


def declare(pipeline: "Pipeline", stage: Stage) -> dict[str, Path]:
    """Return the folder with the answers of each source that answers, by the name of its step; make nothing."""
    return {f"{name}{SUFFIX}": _declare_for_source(pipeline, stage, name) for name in pipeline.inputs.answerers}


def compute_ratio(pipeline: "Pipeline") -> float:
    """Return the size of the answers of one source for each byte of the training documents, the same as theirs."""
    flags = pipeline.documents.select("train").is_dialogue
    return float(flags.mean()) if len(flags) else 0.0


def _choose_questions(pipeline: "Pipeline") -> DocumentList:
    """Return the training conversations."""
    documents = pipeline.documents.select("train")
    return documents.take(documents.is_dialogue)


def _declare_for_source(pipeline: "Pipeline", stage: Stage, name: str) -> Path:
    inputs, options, role = pipeline.inputs, pipeline.run.write, f"source {name}"
    model, count = inputs.sources[name], inputs.answerers[name]
    asked = {"answers": count, "tokens": options.tokens, "min_p": options.min_p, "seed": pipeline.run.seed}
    chosen = (options.choose or "mixture") if count > 1 else "majority"  # one answer is its own majority
    recipe = Recipe(
        stage=stage.name,
        parameters={**asked, "choose": chosen, "name": name, "dtype": pipeline.precision.read_option(role)},
        about={"model": name_publicly(model.name), "revision": pipeline.run.sources[name].revision},
        inputs={
            "model": model.fingerprint,
            "tokenizer": model.tokenizer_fingerprint,
            "corpus": corpus.identify(pipeline),
            **inputs.identify_chat(role),
            **inputs.contexts,
            **_identify_choice(pipeline, chosen),
        },
    )

    def build(out: Path, shown: Progress) -> dict:
        from fuselm.sources import answering, capture

        dtype = pipeline.precision.resume_dtype(role, model, out)
        source = capture.load_source(model, inputs.load_source_vocabulary(name), dtype=dtype)
        counts = answering.write_answers(
            source,
            _choose_questions(pipeline),
            out,
            readers=inputs.list_readers(),
            name=name,
            choose=_find_choice(pipeline, chosen, shown),
            progress=shown,
            **asked,
        )
        return counts | {"dtype": dtype}

    return pipeline.steps.declare(stage, f"{name}{SUFFIX}", recipe, build)


def _identify_choice(pipeline: "Pipeline", chosen: str) -> dict[str, str]:
    """Return what else the choice depends on: the models that it asks, or the file of the user's function."""
    if chosen == "majority":
        return {}
    if chosen == "mixture":
        sources = pipeline.inputs.sources
        return {f"choice {name}": sources[name].fingerprint for name in pipeline.inputs.list_local_sources()}
    return {"choice": fingerprints.hash_file_once(Path(chosen.rpartition(":")[0]))}


def _find_choice(pipeline: "Pipeline", chosen: str, shown: Progress) -> "Choose":
    from fuselm.sources import answer_choice

    if chosen == "majority":
        return answer_choice.choose_by_majority
    if chosen != "mixture":
        return answer_choice.choose_by_function(chosen)
    return lambda asked: _choose_by_mixture(pipeline, asked, shown)


def _choose_by_mixture(pipeline: "Pipeline", asked: "list[Answers]", shown: Progress) -> list[list[float]]:
    """Give each answer its log-probability per byte under the equal mixture of all sources that run here."""
    import math

    import numpy as np

    from fuselm.results import bits_per_byte
    from fuselm.sources import answer_choice

    texts = [(of, answer) for of in asked for answer in of.answers]
    documents = [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain=of.domain, split="train", text=of.put_in(answer))
        for n, (of, answer) in enumerate(texts)
    ]
    if not documents:
        return [[] for _ in asked]
    bits = []
    for name in pipeline.inputs.list_local_sources():
        model = pipeline.inputs.sources[name]
        scores = bits_per_byte.score_model(
            model,
            pipeline.inputs.load_source_vocabulary(name),
            documents,
            dtype=pipeline.precision.choose_dtype(f"source {name}", model),
            batch_tokens=pipeline.run.evaluate.batch_tokens,
            progress=shown,
        )
        found = {score.document: score.bits for score in scores}
        bits.append([found[document.id] for document in documents])
    sizes = [len(document.text.encode()) for document in documents]
    numbers = iter(answer_choice.mix_scores(np.array(bits) * math.log(2), sizes).tolist())
    return [[next(numbers) for _ in of.answers] for of in asked]
