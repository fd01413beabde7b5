"""Capture tiny models in this process, and cut captures off, for tests."""

import io

import pytest
from rich.console import Console

from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources import capture
from fuselm.stores.retention import Policy
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

TOP_K = 7


PREFIX = 41  # tokens


KINDS = ["byte_level", "sentence_piece", "word_piece"]


@pytest.fixture
def documents(texts) -> list[Document]:
    rows = [*((row["domain"], row["text"]) for row in texts[::3]), ("odd", "a"), ("odd", "Ünïcödé – 漢字 🙂\n\n\ttabs")]
    return [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain=domain, split="train", text=text)
        for n, (domain, text) in enumerate(rows)
    ]


def source_of(folder) -> capture.LoadedSource:
    model = locate_model(str(folder))
    loaded = load_model(model, dtype="float32")
    return capture.LoadedSource(
        model=loaded,
        layer=forward.find_output_layer(loaded),
        vocabulary=Vocabulary(load_tokenizer(model), model.output_size),
        context_token=model.context_token,
        context_length=model.context_length,
    )


@pytest.fixture(params=KINDS)
def source(request) -> capture.LoadedSource:
    return source_of(request.getfixturevalue(request.param))


class Interrupted(Exception):
    pass


def captured(
    folder, source: capture.LoadedSource, documents: list[Document], *, stop_after=None, shown=None, **policy
) -> dict:
    """Return a finished store's manifest, or what is left if the capture is stopped after some batches."""
    progress = Progress(Console(file=shown or io.StringIO(), width=997), "capture")
    if stop_after is not None:
        left = [stop_after]

        def advance(amount: float, note: str = "") -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted

        progress.advance = advance
    how = {"policy": Policy(**(policy or {"policy": "top_k", "top_k": TOP_K})), "batch_tokens": 509}
    how |= {"prefix_tokens": PREFIX}
    manifest.build_once(
        folder,
        Recipe(stage="capture", inputs={"tokenizer": "0" * 16}),
        lambda out: capture.capture_from_model(source, documents, out, **how, progress=progress),
    )
    return manifest.read(folder)
