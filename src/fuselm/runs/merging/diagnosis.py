"""Tell how far the models of a merge are apart, layer by layer, before anything is merged."""

import itertools
from typing import Any

from fuselm.models.merging.distances import Distances
from fuselm.runs.merging.merge import MergePlan, find_layer, read_blocks
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly

EMBEDDINGS, OTHERS, ALL = "embeddings", "others", "all"


def diagnose_merge(plan: MergePlan, progress: Progress) -> dict[str, Any]:
    """Return for each layer the length of each model's difference, and cosine and agreement in sign of each pair.

    Differences are from the base, or from the first model if the merge has none. Layers have their numbers; `all` is
    the whole model. A value is None where a model does not differ, or the base is all 0.
    """
    found: dict[str, Distances] = {}
    progress.start(total=plan.parameters, unit="parameters")
    for name, (shape, _) in plan.tensors.items():
        layer = find_layer(name)
        place = str(layer) if layer is not None else EMBEDDINGS if name in plan.embeddings else OTHERS
        found.setdefault(place, Distances())
        for models in read_blocks(plan, name, shape or (1,)):
            found[place].add([models])
            progress.advance(models[0].numel(), name)
    numbered = sorted((place for place in found if place.isdigit()), key=int)
    order = [place for place in (EMBEDDINGS, *numbered, OTHERS) if place in found]
    base, *names = _name_apart(plan)
    return {
        "base": base,
        "models": names,
        "layers": {place: _describe(found[place], names) for place in order},
        ALL: _describe(_sum_up(list(found.values())), names),
    }


def _name_apart(plan: MergePlan) -> list[str]:
    """Return a name for each model, numbered where two are alike."""
    names = [name_publicly(model.name) for model in plan.options.inputs]
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names)]


def _sum_up(parts: list[Distances]) -> Distances:
    total = Distances()
    for part in parts:
        total.parameters += part.parameters
        total.base += part.base
        if part.products is not None:
            total.products = part.products if total.products is None else total.products + part.products
        for own, more in ((total.same_signs, part.same_signs), (total.moved, part.moved)):
            for pair, count in more.items():
                own[pair] = own.get(pair, 0) + count
    return total


def _describe(distances: Distances, names: list[str]) -> dict[str, Any]:
    return {
        "parameters": distances.parameters,
        "relative_lengths": dict(zip(names, distances.relative_lengths, strict=True)),
        "pairs": [
            {
                "models": [names[a], names[b]],
                "cosine": distances.compute_cosine(a, b),
                "sign_agreement": distances.compute_agreement(a, b),
            }
            for a, b in itertools.combinations(range(len(names)), 2)
        ],
    }
