"""Merge tensors from the definitions of the methods: dense, float64, slow and obvious. Streamed code is tested on it.

References: linear 2203.05482, task arithmetic 2212.04089, TIES 2306.01708, DARE 2311.03099, model stock 2403.19522,
SCE 2408.07990, VaRM 2402.16107, WIDEN 2408.03092, Karcher mean 2603.04972.
"""

import math

import numpy as np
from numpy import ndarray


def linear(tensors, base=None, *, weight, normalize=True):
    total = sum(w * t for w, t in zip(weight, tensors, strict=True))
    return total / sum(weight) if normalize else total


def _arc(a, b, t, straight):
    lengths = [np.linalg.norm(x) for x in (a, b)]
    cosine = float((a * b).sum()) / (lengths[0] * lengths[1]) if min(lengths) > 1e-8 else 0.0
    if straight(np.clip(cosine, -1, 1)):
        return (1 - t) * a + t * b
    angle = math.acos(np.clip(cosine, -1, 1))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def slerp(tensors, base, *, t):
    return _arc(base, tensors[0], t, lambda cosine: abs(cosine) > 0.9995)


def nuslerp(tensors, base=None, *, weight, nuslerp_flatten=True, nuslerp_row_wise=False):
    t = weight[1] / sum(weight)
    a, b = (x - base for x in tensors) if base is not None else tensors
    straight = lambda cosine: 1 - cosine**2 <= 1e-16  # noqa: E731
    if nuslerp_flatten:
        mixed = _arc(a, b, t, straight)
    elif nuslerp_row_wise:
        columns = [_arc(a[..., j], b[..., j], t, straight) for j in range(a.shape[-1])]
        mixed = np.stack(columns, axis=-1)
    else:
        mixed = np.stack([_arc(x, y, t, straight) for x, y in zip(a, b, strict=True)])
    return mixed if base is None else base + mixed


def karcher(tensors, base=None, *, max_iter=10, tol=1e-5):
    lengths = [np.linalg.norm(x) for x in tensors]
    units = [x / n for x, n in zip(tensors, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros_like(tensors[0])
    mean = sum(units) / len(units)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip((mean * unit).sum(), -1, 1)
            angle = math.acos(cosine)
            if angle >= tol:
                step += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        length = np.linalg.norm(step)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean /= np.linalg.norm(mean)
    return mean * sum(lengths) / len(lengths)


def _add_up(differences, weight, normalize):
    total = sum(w * d for w, d in zip(weight, differences, strict=True))
    return total / sum(weight) if normalize else total


def _add_agreeing(differences, weight, normalize):
    total = sum(w * d for w, d in zip(weight, differences, strict=True))
    sign = np.where(total >= 0, 1.0, -1.0)
    result, divisor = np.zeros_like(total), np.zeros_like(total)
    for w, d in zip(weight, differences, strict=True):
        agrees = np.sign(w * d) == sign
        result += w * d * agrees
        divisor += w * agrees
    return result / np.where(divisor == 0, 1, divisor) if normalize else result


def task_arithmetic(tensors, base, *, weight, normalize=False, scale=1.0):
    return base + scale * _add_up([x - base for x in tensors], weight, normalize)


def ties(tensors, base, *, weight, density, normalize=True, scale=1.0):
    trimmed = []
    for x, share in zip(tensors, density, strict=True):
        d = x - base
        count = max(1, int(share * d.size)) if share > 0 else 0
        kept = np.zeros(d.size, bool)
        kept[np.argsort(-np.abs(d).ravel(), kind="stable")[:count]] = True
        trimmed.append(d * kept.reshape(d.shape))
    return base + scale * _add_agreeing(trimmed, weight, normalize)


def dare(tensors, base, *, masks, weight, density, rescale=True, normalize=False, scale=1.0, elects=False):
    dropped = []
    for x, mask, share in zip(tensors, masks, density, strict=True):
        d = x - base
        kept = d * mask
        if rescale == "density":
            kept = kept / share
        elif rescale in (True, "l1") and np.abs(kept).sum() >= 1e-7:
            kept = kept * np.abs(d).sum() / np.abs(kept).sum()
        dropped.append(kept)
    return base + scale * (_add_agreeing if elects else _add_up)(dropped, weight, normalize)


def model_stock(tensors, base, *, filter_wise=False):
    if filter_wise and base.ndim > 1:
        return np.stack([model_stock([x[i] for x in tensors], base[i]) for i in range(len(base))])
    d = [x - base for x in tensors]
    n = len(d)
    cosines = [
        (d[i] * d[j]).sum() / max(np.linalg.norm(d[i]) * np.linalg.norm(d[j]), 1e-30)
        for i in range(n)
        for j in range(i + 1, n)
    ]
    cosine = float(np.mean(np.clip(cosines, -1, 1)))
    divisor = 1 + (n - 1) * cosine
    share = n * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    return base + share * sum(d) / n


def _shares(squares):
    total = sum(squares)
    return [s / total if total > 0 else 1 / len(squares) for s in squares]


def varm(tensors, base):
    d = [x - base for x in tensors]
    return base + sum(w * x for w, x in zip(_shares([(x**2).mean() for x in d]), d, strict=True))


def sce(tensors, base, *, select_topk=1.0, select="deltas"):
    d = np.stack([x - base for x in tensors])
    selected = np.ones(base.size, bool)
    if select_topk < 1:
        variance = d.var(axis=0).ravel()
        count = int(select_topk * np.count_nonzero(variance))
        selected[:] = False
        selected[np.argsort(-variance, kind="stable")[:count]] = True
    selected = selected.reshape(base.shape)
    weights = _shares([((x * selected) ** 2).mean() for x in d])
    merged = d * selected if select == "deltas" else d
    sign = np.where(merged.sum(axis=0) >= 0, 1.0, -1.0)
    result, divisor = np.zeros_like(base), np.zeros_like(base)
    for w, x in zip(weights, merged, strict=True):
        agrees = np.sign(x) == sign
        result += w * x * agrees
        divisor += w * agrees
    return base + result / np.where(divisor == 0, 1, divisor)


def _widen_scores(ranks, above, calibration):
    scores = np.exp(ranks) / np.exp(ranks).sum(axis=0)
    scores[above] = calibration
    return scores


def widen(tensors, base, *, above_average_value_ratio=1.0, score_calibration_value=1.0, by_row=False):
    ratio, calibration = above_average_value_ratio, score_calibration_value
    if base.ndim != 2:
        divergence = np.stack([np.abs(x - base).ravel() for x in tensors])
        above = divergence > ratio * divergence.mean(axis=1, keepdims=True)
        scores = _widen_scores(divergence, above, calibration)
        return base + sum(s.reshape(base.shape) * (x - base) for s, x in zip(scores, tensors, strict=True))
    if by_row:
        return widen(
            [x.T for x in tensors], base.T, above_average_value_ratio=ratio, score_calibration_value=calibration
        ).T
    columns = base.shape[1]
    moved, turned = np.zeros((len(tensors), columns)), np.zeros((len(tensors), columns))
    for n, x in enumerate(tensors):
        for j in range(columns):
            own, start = np.linalg.norm(x[:, j]), np.linalg.norm(base[:, j])
            moved[n, j] = abs(own - start)
            if own and start:
                turned[n, j] = 1 - (x[:, j] * base[:, j]).sum() / (own * start)
            else:
                turned[n, j] = float(own != start)
    both = []
    for values in (moved, turned):
        places = np.zeros(values.shape, int)  # whole numbers: the middle one is not above the mean of all
        for n, row in enumerate(values):
            places[n, np.argsort(row, kind="stable")] = np.arange(columns)
        both.append(_widen_scores(places / columns, places > ratio * (columns - 1) / 2, calibration))
    scores = (both[0] + both[1]) / 2
    return base + sum(s[None] * (x - base) for s, x in zip(scores, tensors, strict=True))


def merge(method: str, tensors: list[ndarray], base: ndarray | None, **parameters) -> ndarray:
    """Merge by a method's name; DARE takes the `masks` of what it keeps."""
    if method.startswith("dare"):
        return dare(tensors, base, elects=method == "dare_ties", **parameters)
    return globals()[method](tensors, base, **parameters)
