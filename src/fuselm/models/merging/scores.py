"""Merge differences from a base by how much they changed and how far they agree: nothing has to be set by hand."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fuselm.models.merging.blocks import Blocks, Merge, Models, add_agreeing, combine, differences, gram, kth_largest


def model_stock(blocks: Blocks, *, filter_wise: bool = False) -> Merge:
    """Move from the base towards the mean by how far the differences agree (arXiv 2403.19522, eq. 5).

    With N models whose differences have the mean cosine c, the share is N c / (1 + (N - 1) c): of the whole tensor, or
    with `filter_wise` of each row. Where that has no value, the base stays.
    """
    if not filter_wise:
        products = gram(blocks, from_first=True)
        share, count = float(_agreement(products)), len(products)
        return combine([1 - share, *[share / count] * count])

    def merge(models: Models) -> Float[Tensor, "*rows"]:
        moved = torch.stack(differences(models)).double()
        rows = moved.flatten(2) if moved.dim() > 2 else moved[:, None]
        products = torch.einsum("arx,brx->rab", rows, rows)
        share = torch.stack([_agreement(of) for of in products]).float()
        mean = rows.mean(dim=0).float() * share[:, None]
        return models[0] + mean.reshape(models[0].shape)

    return merge


def _agreement(products: Float[Tensor, "models models"]) -> Float[Tensor, ""]:
    """Return N c / (1 + (N - 1) c) of the mean cosine c between N differences; 0 where it has no value."""
    lengths, count = products.diagonal().sqrt(), len(products)
    cosines = (products / (lengths[:, None] * lengths[None]).clamp(min=1e-30)).clamp(-1, 1)
    cosine = cosines[tuple(torch.triu_indices(count, count, 1))].mean()
    divisor = 1 + (count - 1) * cosine
    return count * cosine / divisor if divisor.abs() >= 1e-6 else torch.zeros_like(cosine)


def varm(blocks: Blocks) -> Merge:
    """Weight each model's difference by its mean square (VaRM, arXiv 2402.16107, eq. 6)."""
    weights = _shares(gram(blocks, from_first=True).diagonal())
    return lambda models: models[0] + combine(weights)(differences(models))


def _shares(squares: Float[Tensor, "models"]) -> list[float]:
    """Normalise to sum 1; equal shares if all are 0."""
    total = float(squares.sum())
    return [float(square) / total if total > 0 else 1 / len(squares) for square in squares]


def sce(blocks: Blocks, *, select_topk: float = 1.0, select: str = "deltas") -> Merge:
    """Select, calculate, erase, merge (FuseChat, arXiv 2408.07990).

    The elements of largest variance between the models are selected (`select_topk` is their share of those with any),
    models are weighted by their mean square there, and elements against the elected sign are erased. With `select:
    weights_only` the selection decides the weights alone and everything is merged, as FuseChat's released code does;
    with `deltas` only what was selected is merged, as the paper and mergekit do. Weights are equal only if all selected
    differences are 0: mergekit makes them so below a sum of mean squares of 1e-6, which switches the weighting off for
    models that were tuned lightly.
    """
    least: float | None = None  # the smallest variance that is selected; None selects every element
    if select_topk < 1:
        count = sum(int(torch.count_nonzero(_variance(differences(models)))) for models in blocks())
        count = int(select_topk * count)
        variances = lambda: (_variance(differences(models)) for models in blocks())  # noqa: E731
        least = kth_largest(variances, count) if count else torch.inf
    if least is None:
        weights = _shares(gram(blocks, from_first=True).diagonal())
    else:
        weights = _shares(sum(_sum_squares(_select(differences(models), least)) for models in blocks()))

    def merge(models: Models) -> Float[Tensor, "*rows"]:
        moved = differences(models)
        if select == "deltas" and least is not None:
            moved = _select(moved, least)
        is_positive = sum(moved[1:], moved[0].clone()) >= 0
        return models[0] + add_agreeing(moved, weights, normalize=True, is_positive=is_positive)

    return merge


def _variance(moved: Models) -> Float[Tensor, "*rows"]:
    return torch.stack(list(moved)).var(dim=0, unbiased=False)


def _select(moved: Models, least: float) -> Models:
    """Return differences with 0 where the variance between models is below `least`."""
    selected = _variance(moved) >= least
    return [d.mul_(selected) for d in moved]


def _sum_squares(moved: Models) -> Float[Tensor, "models"]:
    return torch.stack([d.double().square().sum() for d in moved])


def widen(
    blocks: Blocks,
    *,
    above_average_value_ratio: float = 1.0,
    score_calibration_value: float = 1.0,
    by_row: bool = False,
) -> Merge:
    """Weight differences by how far each column's length and direction moved from the base (arXiv 2408.03092).

    A matrix's columns are ranked inside each model by the change of their length and by that of their direction. Scores
    are the softmax of ranks over the models, or the calibration value for ranks above the ratio times the model's mean.
    A vector's elements count by their absolute difference, unranked. `by_row` takes rows for columns, for embeddings:
    a row is a token there. A column of length 0 has no direction: it counts as unturned from another one of length 0
    and as turned by a right angle from any other, where the released code gives NaN.
    """
    ratio, calibration = above_average_value_ratio, score_calibration_value
    products = _column_products(blocks, by_row)
    if products is None:
        moved = torch.cat([torch.stack([d.abs() for d in differences(models)], dim=1) for models in blocks()])
        moved = moved.movedim(1, 0)
        scores = _score(
            moved, moved > ratio * moved.flatten(1).mean(dim=1).reshape(-1, *[1] * (moved.dim() - 1)), calibration
        )
    else:
        squares, dots = products
        lengths = squares.sqrt()
        cosine = dots / torch.where(lengths[1:] * lengths[0] > 0, lengths[1:] * lengths[0], 1.0)
        moved = (lengths[1:] - lengths[0]).abs()
        turned = torch.where((lengths[1:] == 0) & (lengths[0] == 0), 0.0, 1 - cosine)
        count, both = moved.shape[1], []
        for places in (_places(moved), _places(turned)):
            both.append(_score(places / count, places > ratio * (count - 1) / 2, calibration))
        scores = (both[0] + both[1]) / 2
    begin = 0

    def merge(models: Models) -> Float[Tensor, "*rows"]:
        nonlocal begin
        own = scores.float()
        if products is None:
            own = own[:, begin : begin + len(models[0])]
        elif by_row:
            own = own[:, begin : begin + len(models[0]), None]
        begin += len(models[0])
        return models[0] + sum(s * d for s, d in zip(own, differences(models), strict=True))

    return merge


def _column_products(blocks: Blocks, by_row: bool) -> tuple[Float[Tensor, "n columns"], Tensor] | None:
    """Return the squared lengths of every model's columns, and their products with the base's; None of a vector."""
    squares, dots = [], []
    for models in blocks():
        if models[0].dim() != 2:
            return None
        axis = 1 if by_row else 0
        wide = [model.double() for model in models]
        squares.append(torch.stack([model.square().sum(dim=axis) for model in wide]))
        dots.append(torch.stack([(model * wide[0]).sum(dim=axis) for model in wide[1:]]))
    if by_row:
        return torch.cat(squares, dim=1), torch.cat(dots, dim=1)
    return sum(squares[1:], squares[0]), sum(dots[1:], dots[0])


def _places(values: Float[Tensor, "models columns"]) -> Float[Tensor, "models columns"]:
    """Return each column's place inside its model, from 0 for the least; the first of equals has the lower."""
    order = torch.argsort(values, dim=1, stable=True)
    places = torch.arange(values.shape[1], dtype=values.dtype).expand_as(values)
    return torch.empty_like(values).scatter_(1, order, places)


def _score(
    ranks: Float[Tensor, "models *columns"], is_significant: Bool[Tensor, "models *columns"], calibration: float
) -> Float[Tensor, "models *columns"]:
    return torch.softmax(ranks, dim=0).masked_fill(is_significant, calibration)
