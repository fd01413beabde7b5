"""Let sources write more text after training documents; the target is trained on it beside those."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.documents.document_list import DocumentList, read_documents
from fuselm.runs import answers
from fuselm.runs.config import RunOptions
from fuselm.runs.estimates import Estimate, estimate_step
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import corpus
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def declare(pipeline: "Pipeline") -> dict[str, Path]:
    """Return the folder of each source that writes, and of each that answers; make nothing but the corpus."""
    corpus.make(pipeline)
    texts = {name: _declare_for_source(pipeline, name) for name in pipeline.inputs.writers}
    return texts | answers.declare(pipeline, STAGE)


def make(pipeline: "Pipeline") -> dict[str, Path]:
    """Let sources write, and return the folder of each that does."""
    folders = declare(pipeline)
    pipeline.steps.make_all(folders.values())
    return folders


def _declare_for_source(pipeline: "Pipeline", name: str) -> Path:
    inputs, options, role = pipeline.inputs, pipeline.run.write, f"source {name}"
    model = inputs.sources[name]
    asked = {
        "size": inputs.writers[name],
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "min_p": options.min_p,
        "seed": pipeline.run.seed,
    }
    recipe = Recipe(
        stage=STAGE.name,
        parameters={**asked, "name": name, "dtype": pipeline.precision.read_option(role)},
        about={"model": name_publicly(model.name), "revision": pipeline.run.sources[name].revision},
        inputs={
            "model": model.fingerprint,
            "tokenizer": model.tokenizer_fingerprint,
            "corpus": corpus.identify(pipeline),
        }
        | inputs.contexts,
    )

    def build(out: Path, shown: Progress) -> dict | None:
        from fuselm.sources import capture, writing

        dtype = pipeline.precision.resume_dtype(role, model, out)
        source = capture.load_source(model, inputs.load_source_vocabulary(name), dtype=dtype)
        documents = _choose_prompts(pipeline.documents.select("train"))
        counts = writing.write_texts(
            source,
            documents,
            out,
            readers=inputs.list_readers(),
            name=name,
            reader=inputs.find_reader(role),
            **asked,
            progress=shown,
        )
        return counts and counts | {"dtype": dtype}

    return pipeline.steps.declare(STAGE, name, recipe, build, by_parts=True)


def _choose_prompts(documents: DocumentList) -> DocumentList:
    """Return the plain texts, which sources write after."""
    return documents.take(~documents.is_dialogue)


def fusion_documents(pipeline: "Pipeline") -> DocumentList:
    """Return the training documents and the texts that sources wrote: those that distributions are fused for."""
    documents = pipeline.documents.select("train")
    for folder in make(pipeline).values():
        documents += read_documents(folder)
    return documents


def identify_fusion_documents(pipeline: "Pipeline") -> dict[str, str]:
    """Return what identifies `fusion_documents`, for recipes of later stages."""
    written = {f"written by {name}": pipeline.steps.get_key(folder) for name, folder in declare(pipeline).items()}
    return {"corpus": corpus.identify(pipeline)} | written


def compute_written_ratio(pipeline: "Pipeline", name: str) -> float:
    """Return the bytes that a source writes for each byte of the training documents.

    Documents of a domain count as equally long.
    """
    if name.endswith(answers.SUFFIX):
        return answers.compute_ratio(pipeline)
    size = pipeline.inputs.writers.get(name, 0.0)
    if not isinstance(size, dict):
        return float(size)
    counts = manifest.read(corpus.make(pipeline))["counts"]["documents"]
    documents = {domain: counts.get(f"{domain}/train", 0) for domain in pipeline.inputs.domains}
    return sum(documents[domain] * ratio for domain, ratio in size.items()) / sum(documents.values())


def compute_text_ratio(pipeline: "Pipeline") -> float:
    """Return the size of `fusion_documents` for each byte of the training documents: 1 and what sources write."""
    return 1.0 + sum(compute_written_ratio(pipeline, name) for name in list_steps(pipeline))


def list_steps(pipeline: "Pipeline") -> list[str]:
    """Return the names of the steps in which sources write or answer."""
    return [*pipeline.inputs.writers, *(f"{name}{answers.SUFFIX}" for name in pipeline.inputs.answerers)]


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the tokens that a source writes. Nobody knows before it is tried how fast a model writes."""
    name = step.name.removesuffix(answers.SUFFIX)
    given = tokens[pipeline.inputs.sources[name].tokenizer_fingerprint]["train"]
    written = given * compute_written_ratio(pipeline, step.name)
    if step.name != name:
        return estimate_step(step, tokens=round(written * pipeline.inputs.answerers[name]))
    from fuselm.sources import prompts

    return estimate_step(step, tokens=round(written), parts=written / pipeline.run.write.tokens / prompts.BATCH)


def count_passes(run: RunOptions, name: str, written: Mapping[str, float]) -> float:
    """Return the share of the training text that a source writes."""
    return written[name]


STAGE = Stage(
    name="write",
    make=make,
    estimate=estimate,
    count_passes=count_passes,
    loads_models=True,
    fills_stores=True,
    is_shared=True,
)
