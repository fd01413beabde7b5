"""Make the corpus: read the texts, cut and split them into documents, and count their tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.documents import corpus
from fuselm.documents.document_list import DocumentList, identify_documents, read_documents
from fuselm.runs.estimates import Estimate, estimate_step
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step


def make(pipeline: "Pipeline") -> Path:
    """Return the folder of the corpus."""
    options, inputs, seed = pipeline.run.corpus, pipeline.inputs, pipeline.run.seed
    recipe = Recipe(
        stage=STAGE.name,
        parameters=options.model_dump(exclude={"files", "dataset"}) | {"seed": seed},
        inputs=inputs.identities | inputs.contexts,
    )

    def build(out: Path, shown: Progress) -> dict:
        from fuselm.results import notes

        counts = corpus.prepare_corpus(
            inputs.files,
            out,
            domains=inputs.file_domains,
            readers=inputs.list_readers(),
            max_bytes=options.max_bytes,
            dev=options.dev,
            heldout=options.heldout,
            share=options.share,
            seed=seed,
            progress=shown,
            columns=inputs.file_columns,
            skip_bad=options.bad_rows == "skip",
            split=options.split,
            near_repeats=options.near_repeats,
        )
        if near := counts.get("near_repeats"):
            done = "are dropped" if options.near_repeats == "drop" else "stay; corpus.near_repeats=drop leaves them out"
            shown.note(f"{near} training texts are nearly the same as one of dev or held-out; they {done}")
        if bad := counts.get("bad"):
            shown.note(f"{bad} conversations cannot be used; they are skipped")
        for tokenizer, found in counts.get("unspelled", {}).items():
            name = inputs.name_readers(tokenizer)
            shown.note(notes.describe_unspelled_text(name, found, is_trained_on=True))
        return counts

    return pipeline.steps.make(pipeline.steps.declare(STAGE, "", recipe, build))


def read(pipeline: "Pipeline") -> DocumentList:
    """Return the documents of all splits."""
    return read_documents(make(pipeline))


def identify(pipeline: "Pipeline") -> str:
    """Return the hash of the documents, for recipes of later stages."""
    folder = make(pipeline)
    return identify_documents(folder, manifest.read(folder)["files"])


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate nothing: the corpus is made before anything is estimated."""
    return estimate_step(step, tokens=0)


STAGE = Stage(name="corpus", make=make, estimate=estimate, needs_precision=False)
