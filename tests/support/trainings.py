"""Train tiny models in this process or another, for tests."""

import dataclasses
import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_settings import make_settings

from fuselm.documents.corpus import Document
from fuselm.fusion import fuse as fusion
from fuselm.models import forward
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources import capture
from fuselm.stores import store
from fuselm.stores.retention import Policy
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.training import target_training

SETTINGS = make_settings(
    learning_rate=3e-3,
    lambda_clm=0.5,
    lambda_final=None,
    passes=2,
    batch_documents=3,
    gradient_accumulation=1,
    evaluations_per_pass=2,
    warmup=0.1,
    weight_decay=0.1,
    max_grad_norm=1.0,
    precision="float32",
    seed=0,
)


@pytest.fixture(scope="module")
def documents(texts) -> list[Document]:
    return [
        Document(
            id=f"{n:06d}",
            origin=f"{n:06d}",
            domain=row["domain"],
            split="dev" if n % 5 == 4 else "train",
            text=row["text"][: 61 + 13 * (n % 7)],
        )
        for n, row in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def target(byte_level, tmp_path_factory) -> Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSELM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return locate_model(str(byte_level))


def vocabulary_of(model: Model) -> Vocabulary:
    return Vocabulary(load_tokenizer(model), model.output_size)


@pytest.fixture(scope="module")
def fused(target, documents, tmp_path_factory) -> Path:
    """Return the target's own distributions of the training documents fused with those of another model like it."""
    folder = tmp_path_factory.mktemp("fused") / "store"
    model = load_model(target, dtype="float32")
    vocabulary = vocabulary_of(target)
    chosen = [d for d in documents if d.split == "train"]
    segmentations = [vocabulary.segment(d.text) for d in chosen]

    def traces() -> list[store.Trace]:
        source = capture.LoadedSource(
            model=model,
            layer=forward.find_output_layer(model),
            vocabulary=vocabulary,
            context_token=target.context_token,
            context_length=target.context_length,
        )
        return list(capture.trace_batch(source, chosen, segmentations, policy=Policy(policy="top_k", top_k=7)))

    own = traces()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.25)
    mixed = [
        fusion.fuse(pair, vocabulary_size=target.output_size, level="token") for pair in zip(own, traces(), strict=True)
    ]
    manifest.build_once(folder, Recipe(stage="fuse"), lambda out: store.write_parts(out, mixed))
    return folder


def train(out: Path, target: Model, documents: list[Document], fused: Path | None, **settings) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    return target_training.train_target(
        target,
        vocabulary_of(target),
        [d for d in documents if d.split == "train"],
        [d for d in documents if d.split == "dev"],
        out,
        fused=store.Store(fused) if fused else None,
        settings=dataclasses.replace(SETTINGS, **settings),
        progress=Progress(Console(file=io.StringIO()), "train"),
    )


def read_losses(out: Path) -> dict:
    """Return the history of a training without its speed, which is another each time."""
    history = json.loads((out / "history.json").read_text())
    assert len(history.pop("speed")) == len(history["log"])
    return history


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def python_path() -> str:
    """Return where another process finds this module."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, folders))
