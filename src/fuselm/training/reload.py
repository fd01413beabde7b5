"""Load a trained model's folder again, as a user will, and compare its scores with those of training.

A folder may differ from what was trained: a library may rescale weights when it scores, tie or drop some, or save
another state. The numbers of a run say nothing about such a folder, so the run fails.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from fuselm.documents.document import Document
from fuselm.models import forward
from fuselm.models.loading import load_model
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import scoring

SAMPLE_TOKENS = 1024  # so much of the development split is scored: one batch
# Bits may differ by these parts.
SAME = 1e-3  # with the same weights and arithmetic, in batches of another process
ROUNDED = 2e-2  # if weights were rounded to half precision, or adapters merged, in between
QUANTIZED = 0.2  # if adapters were trained beside 4-bit weights, and merged into whole ones


def choose_sample(documents: Sequence[Document], vocabulary: Vocabulary) -> list[Document]:
    """Return the first documents, as many as one batch holds."""
    lengths = vocabulary.count_tokens([d.text for d in documents[:SAMPLE_TOKENS]])
    total, count = 0, 0
    for length in lengths:
        total += length
        if count and total > SAMPLE_TOKENS:
            break
        count += 1
    return list(documents[:count])


def score_folder(
    folder: Path,
    target: Model,
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    *,
    device: torch.device,
    autocast: AbstractContextManager,
) -> dict[str, float]:
    """Score documents, in bits, by the model in `folder` in float32 under training's `autocast`."""
    loaded = load_model(replace(target, name=str(folder), folder=folder), dtype="float32", device=str(device))
    layer = forward.find_output_layer(loaded)

    def gold_logprobs(inputs, mask, kept, gold):
        return forward.compute_gold_logprobs(
            forward.compute_hidden_states(loaded, layer, inputs, mask)[kept], layer, gold
        )

    with torch.no_grad(), autocast:
        return scoring.compute_document_bits(gold_logprobs, loaded.device, vocabulary, target.context_token, documents)


def compare_scores(
    where: str, trained: Mapping[str, float], loaded: Mapping[str, float], documents: Sequence[Document], allowed: float
) -> None:
    """Raise `ValueError` unless the folder's score is that of training, except for a part `allowed` of it."""
    size = sum(len(d.text.encode()) for d in documents)
    before, after = (sum(bits[d.id] for d in documents) / max(size, 1) for bits in (trained, loaded))
    if not abs(before - after) <= allowed * before:
        raise ValueError(
            f"{where}: loaded again, the trained model scores {after:.4f} bits per byte on {len(documents)} documents "
            f"of the development split, and in training it scored {before:.4f}, so the folder does not hold what was "
            "trained; take another target, or another version of transformers"
        )


def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the weights in place to `dtype`, as a saved folder holds them."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.copy_(weight.to(dtype))
