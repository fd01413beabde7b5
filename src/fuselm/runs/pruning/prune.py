"""Prune a model into a folder: score its units, remove the least, and write what remains with a card and a manifest."""

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuselm.models.choices import DTYPES
from fuselm.models.loading import load_model
from fuselm.models.pruning.choices import BY_TEXT, IMPORTANCES
from fuselm.models.pruning.gradients import Sample
from fuselm.models.pruning.importance import choose_units
from fuselm.models.pruning.removal import remove_units
from fuselm.models.pruning.sensitivity import count_passes, measure_rises
from fuselm.results.pages.pruning_page import render_page
from fuselm.results.pages.rendering import render_template
from fuselm.runs.pruning import scoring
from fuselm.runs.pruning.calibration_texts import hash_samples
from fuselm.runs.pruning.plan import PrunePlan, describe_sizes
from fuselm.runs.pruning.scoring import ModelScores
from fuselm.system import atomic_files, manifest
from fuselm.system.library_output import hide_library_output
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly
from fuselm.training.companions import copy_companions

RESULT_FILE, PAGE_FILE = "pruning.json", "pruning.html"
SENSITIVITY_SAMPLES = 8  # are read for each layer


def prune_model(plan: PrunePlan, samples: Sequence[Sample], out: Path, progress: Progress) -> bool:
    """Write the smaller model to `out`; return False if it is there already. Resume what was interrupted.

    Raises `ValueError` if the disk has no room for it.
    """
    size = plan.parameters[1] * torch.finfo(getattr(torch, plan.dtype)).bits // 8
    free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
    if free < size:
        raise ValueError(f"{out}: needs {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; free some space")
    recipe = Recipe(
        stage="prune",
        parameters={
            "sizes": {name: plan.after[name] for name in plan.removed_structures},
            "importance": plan.options.importance,
            "seed": plan.options.seed if plan.options.importance == "random" else None,
            **({"sensitivity": True} if plan.options.sensitivity else {}),
        },
        inputs={"model": plan.model.fingerprint, **({"texts": hash_samples(samples)} if samples else {})},
        about={"model": name_publicly(plan.model.name), "before": plan.before},
    )
    _require_same_recipe(out, recipe)
    return manifest.build_once(out, recipe, partial(_build, plan, samples, recipe, progress))


def _require_same_recipe(out: Path, recipe: Recipe) -> None:
    if manifest.is_finished(out) and manifest.read(out)["key"] != recipe.key:
        raise ValueError(f"{out}: holds another model, pruned or not; name another folder, or move it away")


def _build(plan: PrunePlan, samples: Sequence[Sample], recipe: Recipe, progress: Progress, out: Path) -> dict[str, Any]:
    _sweep_other_recipe(out, recipe)
    scores = scoring.read_scores(out)
    if scores is None:
        scores = _score(plan, samples, progress)
        scoring.write_scores(out, scores)
    kept = {c.structure: choose_units(scores.units[c.structure], plan.after[c.structure]) for c in plan.couplings}
    kept_layers = None
    if "layers" in plan.removed_structures:
        assert scores.layers is not None
        kept_layers = choose_units({(): scores.layers}, plan.after["layers"])[()].tolist()
    rises = _measure_sensitivity(plan, kept, samples, progress) if plan.options.sensitivity else None
    model = load_model(plan.model, dtype=plan.dtype if plan.dtype in DTYPES else "auto", device="cpu")
    smaller = remove_units(model, plan.couplings, kept, kept_layers)
    del model
    with hide_library_output():
        smaller.save_pretrained(out)
    copy_companions(plan.model.folder, out)
    atomic_files.share_modes(out)
    result = measure_removed_shares(plan, scores, kept, kept_layers) | {"sensitivity": rises}
    atomic_files.write_text(out / RESULT_FILE, json.dumps(result, indent=1))
    page = render_page(json.loads(json.dumps(result)), model=name_publicly(plan.model.name), rows=describe_sizes(plan))
    atomic_files.write_text(out / PAGE_FILE, page)
    atomic_files.write_text(out / "README.md", _write_card(plan, len(samples), out))
    return {"parameters": plan.parameters[1], "samples": len(samples)}


def _sweep_other_recipe(out: Path, recipe: Recipe) -> None:
    """Delete what an interrupted command with other options or another model has left in the partial folder."""
    mark = out / ".recipe"
    if not mark.exists() or mark.read_text() != recipe.key:
        (out / scoring.FILE).unlink(missing_ok=True)
        atomic_files.write_text(mark, recipe.key)


def _score(plan: PrunePlan, samples: Sequence[Sample], progress: Progress) -> ModelScores:
    model = load_model(plan.model, dtype="float32")  # gradients are squared and added up
    if plan.options.importance in BY_TEXT and plan.removed_structures:
        progress.start(sum(len(sample) - 1 for sample in samples), unit="tokens")
    if not plan.removed_structures:
        return ModelScores(units={}, layers=None)
    scores = scoring.score_model(plan, model, samples, advance=progress.advance)
    del model
    gc.collect()
    return scores


def _measure_sensitivity(
    plan: PrunePlan,
    kept: Mapping[str, Mapping[tuple[int, ...], Tensor]],
    samples: Sequence[Sample],
    progress: Progress,
) -> dict[str, dict[int, float]]:
    model = load_model(plan.model, dtype="float32")
    read, has_layers = samples[:SENSITIVITY_SAMPLES], "layers" in plan.removed_structures
    passes = count_passes(plan.couplings, plan.before["layers"] if has_layers else None)
    progress.start(passes * sum(len(sample) - 1 for sample in read), unit="tokens")
    return measure_rises(model, plan.couplings, kept, read, with_layers=has_layers, advance=progress.advance)


def measure_removed_shares(
    plan: PrunePlan,
    scores: ModelScores,
    kept: Mapping[str, Mapping[tuple[int, ...], Tensor]],
    kept_layers: Sequence[int] | None,
) -> dict[str, Any]:
    """Return, by structure and place, the share of all scores that was removed there; and which layers went."""
    removed: dict[str, Any] = {}
    for structure, places in scores.units.items():
        removed[structure] = {
            ".".join(map(str, place)): 1 - float(of_place[kept[structure][place]].sum() / of_place.sum())
            for place, of_place in places.items()
        }
    if kept_layers is not None:
        removed["layers"] = sorted({*range(plan.before["layers"])} - {*kept_layers})
    return {"importance": plan.options.importance, "before": plan.before, "after": plan.after, "removed": removed}


def _write_card(plan: PrunePlan, samples: int, out: Path) -> str:
    name = plan.model.name
    return render_template(
        "prune_card.md.jinja",
        model=name_publicly(name),
        base=name if not Path(name).exists() else None,
        rows=describe_sizes(plan),
        importance=plan.options.importance,
        meaning=IMPORTANCES[plan.options.importance],
        samples=samples,
        folder=out.name.removesuffix(".partial"),
    )
