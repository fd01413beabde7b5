"""Unite the vocabularies of models that differ by added tokens: by token, whatever its id."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitedVocabulary:
    """Hold the result's vocabulary: its rows, where each model has them, and the tokens that the first one lacks."""

    rows: int
    places: Sequence[Int[ndarray, "rows"]]  # by model, the row that each row of the result is there; -1 for none
    added: Sequence[AddedToken]

    @property
    def is_shared(self) -> bool:
        """Tell whether every model has the result's rows as they are."""
        return all((place == np.arange(self.rows)).all() for place in self.places)


def unite_vocabularies(models: Sequence[Model]) -> UnitedVocabulary:
    """Append to the first model's vocabulary the added tokens that others have. The first may be the base.

    Raises `ValueError` if two tokenizers differ in more than their added tokens.
    """
    loaded = {model.tokenizer_fingerprint: load_tokenizer(model) for model in models}
    spelled = {fingerprint: tokenizer.get_vocab() for fingerprint, tokenizer in loaded.items()}
    tokenizers = [loaded[model.tokenizer_fingerprint] for model in models]
    vocabularies = [spelled[model.tokenizer_fingerprint] for model in models]
    ids, added = dict(vocabularies[0]), []
    for model, tokenizer, vocabulary in zip(models[1:], tokenizers[1:], vocabularies[1:], strict=True):
        if tokenizer is tokenizers[0]:
            continue
        _check_same_core(models[0], tokenizers[0], model, tokenizer)
        own = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        for token in sorted(set(vocabulary) - set(ids), key=vocabulary.__getitem__):
            ids[token] = max(ids.values()) + 1
            added.append(own[token])
    rows = max(models[0].output_size, max(ids.values()) + 1)
    places = []
    for model, vocabulary in zip(models, vocabularies, strict=True):
        place = np.arange(rows)
        place[place >= model.output_size] = -1
        for token, number in ids.items():
            place[number] = vocabulary.get(token, -1)
        places.append(place)
    return UnitedVocabulary(rows=rows, places=places, added=added)


def _check_same_core(first: Model, first_tokenizer: Tokenizer, model: Model, tokenizer: Tokenizer) -> None:
    cores = []
    for of in (first_tokenizer, tokenizer):
        extra = {token.content for token in of.get_added_tokens_decoder().values()}
        cores.append({token: number for token, number in of.get_vocab().items() if token not in extra})
    differing = {token for token, number in cores[0].items() if cores[1].get(token, number) != number}
    lone = [
        token
        for core, other in ((cores[0], tokenizer), (cores[1], first_tokenizer))
        for token in core
        if other.token_to_id(token) is None
    ]
    if differing or lone:
        example = min([*differing, *lone])
        raise ValueError(
            f"{first.name} and {model.name}: their tokenizers differ in {len(differing) + len(lone)} tokens besides "
            f"added ones ({example!r} for example), so rows of one mean nothing in the other; fuse them instead"
        )


def read_united_rows(
    readers: Sequence[Callable[[int, int], Float[Tensor, "n *rest"]]],
    vocabulary: UnitedVocabulary,
    begin: int,
    end: int,
) -> list[Float[Tensor, "n *rest"]]:
    """Return rows of every model in the order of the result, from functions that return rows from one to another.

    A row that a model lacks is the mean of the others' rows for this token.
    """
    found, has_row = [], []
    for read, place in zip(readers, vocabulary.places, strict=True):
        wanted = place[begin:end]
        known = wanted >= 0
        rows = None
        for first, last in _runs(wanted):
            part = read(int(wanted[first]), int(wanted[last - 1]) + 1)
            if rows is None:
                rows = part.new_zeros(end - begin, *part.shape[1:])
            rows[first:last] = part
        found.append(rows)
        has_row.append(torch.from_numpy(known))
    shape = next(rows.shape for rows in found if rows is not None)
    found = [torch.zeros(shape) if rows is None else rows for rows in found]
    count = torch.stack(has_row).sum(dim=0).clamp(min=1).reshape(-1, *[1] * (len(shape) - 1))
    mean = sum(found[1:], found[0]) / count
    for rows, known in zip(found, has_row, strict=True):
        rows[~known] = mean[~known]
    return found


def _runs(places: Int[ndarray, "rows"]) -> list[tuple[int, int]]:
    """Return stretches of places that follow one another, leaving out -1."""
    runs, begin = [], 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1 or places[end - 1] < 0:
            if places[begin] >= 0:
                runs.append((begin, end))
            begin = end
    return runs
