"""Align and fuse in the training loader (`fuse.when: load`): a sample for the stores, and all else as it is read.

The stages align and fuse a sample of the training documents into ordinary stores. Weights are learned from them, and
reports, `inspect` and `diagnose` show them. Training reads the captures and makes the rows of each document.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fuselm.fusion.choices import SAMPLE
from fuselm.runs.stages import capture
from fuselm.system import manifest

if TYPE_CHECKING:
    from fuselm.documents.document_list import DocumentList
    from fuselm.runs.pipeline import Pipeline
    from fuselm.stores.store import Store
    from fuselm.training.fusing import RowFusion

SAMPLE_TOKENS = 1 << 20  # of a domain, in the target's tokens: weights are learned from a million
RESPONSE_BYTES = 8  # of a token of a response, at most about


def describe_sample(pipeline: "Pipeline") -> dict[str, int]:
    """Return what the recipe of aligning says of the sample; nothing if all documents are aligned."""
    return {SAMPLE: SAMPLE_TOKENS} if pipeline.run.fuse.when == "load" else {}


def choose_sample(pipeline: "Pipeline", documents: "DocumentList") -> "DocumentList":
    """Return the first documents of each domain, up to `SAMPLE_TOKENS` tokens; all if all are aligned."""
    if pipeline.run.fuse.when != "load":
        return documents
    from fuselm.training import reading

    tokenizer = pipeline.inputs.target.tokenizer_fingerprint
    tokens = reading.count_tokens(documents, pipeline.inputs.target_vocabulary, tokenizer).astype(np.int64)
    tokens = np.where(documents.is_dialogue, documents.sizes // RESPONSE_BYTES, tokens)  # of responses alone
    codes, chosen = documents.domain_codes, np.zeros(len(documents), bool)
    for code in range(len(documents.domain_names)):
        own = np.flatnonzero(codes == code)
        chosen[own] = np.cumsum(tokens[own]) - tokens[own] < SAMPLE_TOKENS
    return documents.take(chosen)


def keep_aligned(documents: "DocumentList", aligned: "Mapping[str, Store]") -> "DocumentList":
    """Return the documents that all aligned stores have, if those are of a sample; else all."""
    if not any(SAMPLE in store.manifest["parameters"] for store in aligned.values()):
        return documents
    from fuselm.training import reading

    ids = reading.list_ids(documents)
    return documents.take(np.all([store.find_documents(ids) >= 0 for store in aligned.values()], axis=0))


def open_row_fusion(pipeline: "Pipeline", folder: Path) -> "RowFusion":
    """Return how rows are made of the captures, with the weights of the fused store of the sample in `folder`."""
    from fuselm.alignment.aligner import Aligner
    from fuselm.stores.store import Store
    from fuselm.training.batches import KEPT_TOKENS
    from fuselm.training.fusing import FUSE_OPTIONS, RowFusion

    inputs, captured = pipeline.inputs, capture.declare(pipeline)
    record = manifest.read(folder)
    names, recipe = record["counts"]["sources"], record["parameters"]
    stores = {
        name: Store(
            captured[name],
            draws=pipeline.run.is_linear_in_rows,
            keep_tokens=KEPT_TOKENS,
            vocabulary_size=inputs.sources[name].output_size,
        )
        for name in names
    }
    return RowFusion(
        captured=stores,
        aligners={
            name: Aligner(
                inputs.load_source_vocabulary(name),
                inputs.target_vocabulary,
                **pipeline.run.align.model_dump(),
                traces=stores[name],
            )
            for name in names
        },
        weights=record["counts"]["weights"],
        temperatures=[recipe["temperatures"].get(name, 1.0) for name in names],
        options={name: recipe[name] for name in FUSE_OPTIONS},
    )
