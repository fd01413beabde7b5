"""Capture the target's own distributions for a diagnosis, where the target is not among the sources.

The target reads each document by itself, as it does in training. The stores are kept in a folder of their own inside
the run's folder, so no stage of the run takes them for those of a source.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fuselm.documents.corpus import Document
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.runs import run_folders
from fuselm.system import fingerprints, manifest, progress
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

TOP_K = 64  # entries kept of each row
BATCH_TOKENS = 1024


def capture_target(
    model: Model, vocabulary: Vocabulary, documents: Sequence[Document], folder: Path, console: Console
) -> Path:
    """Return the aligned store of the target's distributions over `documents`, which is made if it is not there."""
    from fuselm.alignment.aligner import Aligner, align_store
    from fuselm.sources import capture
    from fuselm.stores.retention import Policy
    from fuselm.stores.store import Store, fingerprint_text

    texts = fingerprints.hash_lines(f"{d.id} {fingerprint_text(d.text)}" for d in documents)
    inputs = {"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint, "texts": texts}
    inputs |= {} if vocabulary.chat_fingerprint is None else {"chat": vocabulary.chat_fingerprint}
    recipe = Recipe(stage="capture", parameters={"policy": "top_k", "top_k": TOP_K}, inputs=inputs)
    captured = folder / run_folders.DIAGNOSIS / "capture" / f"target-{recipe.key}"
    aligned = folder / run_folders.DIAGNOSIS / "align" / f"target-{recipe.key}"

    def build_capture(out: Path, shown: Progress) -> dict:
        source = capture.load_source(model, vocabulary, dtype="auto")
        policy = Policy(policy="top_k", top_k=TOP_K)
        return capture.capture_from_model(
            source, documents, out, policy=policy, batch_tokens=BATCH_TOKENS, progress=shown
        )

    def build_aligned(out: Path, shown: Progress) -> dict:
        aligner = Aligner(vocabulary, vocabulary, top_k=TOP_K)
        return align_store(aligner, Store(captured), documents, out, progress=shown)

    if not manifest.is_finished(captured):
        with progress.show_progress(console, "diagnose: reading the target, which is not among the sources") as shown:
            manifest.build_once(captured, recipe, lambda out: build_capture(out, shown))
    if not manifest.is_finished(aligned):
        keys = {"captured": recipe.key, "tokenizer": model.tokenizer_fingerprint}
        with progress.show_progress(console, "diagnose: aligning the target") as shown:
            manifest.build_once(aligned, Recipe(stage="align", inputs=keys), lambda out: build_aligned(out, shown))
    return aligned
