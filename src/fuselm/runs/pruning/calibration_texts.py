"""Draw the texts that units are scored by: from files, or from the training documents of a run's corpus."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from fuselm.models.locating import Model
from fuselm.models.pruning.gradients import Sample
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.command_texts import read_rows
from fuselm.runs import config
from fuselm.runs.options.sources import ModelOptions


def read_texts(named: str, console: Console) -> dict[str, list[str]]:
    """Return the texts of files, by domain."""
    texts: dict[str, list[str]] = {}
    for row in read_rows(named, "prune", console):
        texts.setdefault(row.domain, []).append(row.text)
    return texts


def read_training_texts(run_file: Path, model: Model, console: Console) -> dict[str, list[str]]:
    """Return the training documents of a run's corpus, by domain. The run's target may be the model yet to be made."""
    from fuselm.runs.pipeline import Pipeline

    options = config.load(run_file)
    run = options.model_copy(update={"target": ModelOptions(model=model.name)})
    pipeline = Pipeline(run, console)
    texts: dict[str, list[str]] = {}
    for document in pipeline.documents:
        if document.split == "train":
            texts.setdefault(document.domain, []).append(document.text)
    return texts


def draw_samples(
    texts: Mapping[str, Sequence[str]],
    vocabulary: Vocabulary,
    context_token: int,
    *,
    count: int,
    length: int,
    seed: int,
) -> list[Sample]:
    """Return the beginnings of `count` texts, at most `length` tokens each, in turn from every domain.

    Raises `ValueError` if no text has two tokens.
    """
    generator = random.Random(seed)
    shuffled = {domain: generator.sample(list(own), len(own)) for domain, own in sorted(texts.items())}
    longest = max(map(len, shuffled.values()), default=0)
    in_turn = [own[n] for n in range(longest) for own in shuffled.values() if n < len(own)]
    samples: list[Sample] = []
    for text in in_turn:
        if len(samples) == count:
            break
        ids = vocabulary.segment(text[: 64 * length]).ids[:length]
        if len(ids) > 1:
            samples.append(torch.tensor([context_token, *ids]))
    if not samples:
        raise ValueError("no text has two tokens to score by; name other texts")
    return samples


def hash_samples(samples: Sequence[Sample]) -> str:
    """Return what identifies the samples, for a recipe."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.tolist()}\n".encode())
    return digest.hexdigest()[:16]
