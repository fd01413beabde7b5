"""Plan a pruning: the sizes that come out, whether the architecture can lose such units, and what that saves."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fuselm.models import precision
from fuselm.models.locating import Model
from fuselm.models.pruning.choices import EXACT_SIZES
from fuselm.models.pruning.configs import read_head_size, read_size, resize_config
from fuselm.models.pruning.coupling import Coupling, find_coupling
from fuselm.models.pruning.layers import find_layer_prefix
from fuselm.models.pruning.shapes import count_parameters, read_shapes
from fuselm.models.pruning.sizes import solve_sizes
from fuselm.runs.pruning.options import MULTIPLE, PruneOptions
from fuselm.system import machine
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_library_output

BATCH, LENGTH = 1, 256  # tokens that are read to measure speed
REPETITIONS = 3
BYTES = {"float32": 4, "float64": 8}  # of a number; two for other types


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """Hold what is to be removed, once it is known that it can be."""

    model: Model
    options: PruneOptions
    config: PretrainedConfig
    smaller: PretrainedConfig
    dtype: str  # of the weights
    before: dict[str, int]  # sizes by structure, as far as the configuration names them
    after: dict[str, int]
    parameters: tuple[int, int]  # before and after
    couplings: Sequence[Coupling]  # of the structures that become smaller

    @property
    def removed_structures(self) -> list[str]:
        """Return the structures that become smaller."""
        return [name for name, size in self.after.items() if size < self.before[name]]


def plan_pruning(model: Model, options: PruneOptions) -> PrunePlan:
    """Choose the sizes and find what is coupled. Raises `ValueError`, one line, if that cannot be done."""
    try:
        with hide_library_output():
            config = AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged or unknown configuration may raise anything
        raise ValueError(
            f"{model.name}: transformers cannot read its config.json ({summarize_error(error)})"
        ) from error
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{model.name}: its weights are quantised; load it with transformers, dequantize() and save it"
        )
    whole = count_parameters(read_shapes(config))
    before = {name: size for name in EXACT_SIZES if (size := read_size(config, name)) is not None}
    after = before | _choose_sizes(config, options, before, whole)
    smaller_than = [name for name, size in after.items() if size < before[name]]
    couplings = [find_coupling(config, name) for name in smaller_than if name != "layers"]
    if "layers" in smaller_than:
        find_layer_prefix(config)
    if options.importance is None:
        shares_experts = any(own.expert is not None for c in couplings for of in c.slices.values() for own in of)
        options = options.model_copy(update={"importance": "param_first" if shares_experts else "activations"})
    try:
        smaller = resize_config(config, {name: after[name] for name in smaller_than})
        parameters = count_parameters(read_shapes(smaller))
    except Exception as error:  # a configuration's class may raise anything on sizes that it does not take
        shown = ", ".join(f"{EXACT_SIZES[name]} {after[name]}" for name in smaller_than)
        raise ValueError(
            f"{model.name}: transformers takes no {shown} ({summarize_error(error)}); choose others"
        ) from None
    return PrunePlan(
        model=model,
        options=options,
        config=config,
        smaller=smaller,
        dtype=precision.find_checkpoint_dtype(model) or "float32",
        before=before,
        after=after,
        parameters=(whole, parameters),
        couplings=couplings,
    )


def _choose_sizes(
    config: PretrainedConfig, options: PruneOptions, before: Mapping[str, int], whole: int
) -> dict[str, int]:
    if options.exact_sizes:
        for name, size in options.exact_sizes.items():
            if name not in before:
                raise ValueError(f"{EXACT_SIZES[name]}: {config.model_type} has no one such number; leave it out")
            if size > before[name]:
                raise ValueError(
                    f"{EXACT_SIZES[name]}: the model has {before[name]} (got {size}); pruning only removes, give fewer"
                )
        return options.exact_sizes
    structures = options.structures or ["mlp"]
    for name in structures:
        if name not in before:
            raise ValueError(f"structures: {config.model_type} has no one number for {name} in config.json; drop it")
    target = round(whole * (1 - options.ratio)) if options.ratio is not None else options.params
    assert target is not None
    if target > whole:
        raise ValueError(f"params: the model has {whole:,} (got {target:,}); pruning only removes, ask for fewer")
    if target == whole:
        return {}
    return solve_sizes(config, structures, target, multiple=options.multiple or MULTIPLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Hold what a model takes: bytes of weights, bytes of keys and values for each token, tokens read in a second."""

    weights: int
    cache_per_token: int
    speed: float | None  # None if it was not measured


def measure_costs(plan: PrunePlan) -> tuple[Costs, Costs]:
    """Return what the model takes before and after. Speeds are of random weights, measured in turn."""
    configs = (plan.config, plan.smaller)
    size = BYTES.get(plan.dtype, 2)
    speeds: Sequence[float | None] = (None, None)
    free = machine.measure_available_memory()
    if free is None or 1.2 * size * sum(plan.parameters) < free:
        speeds = _measure_speeds(configs, plan.dtype)
    before, after = (
        Costs(
            weights=count * size,
            cache_per_token=2
            * size
            * read_head_size(config)
            * (read_size(config, "groups") or 0)
            * _count_layers(config),
            speed=speed,
        )
        for config, count, speed in zip(configs, plan.parameters, speeds, strict=True)
    )
    return before, after


def _count_layers(config: PretrainedConfig) -> int:
    return read_size(config, "layers") or 0


def _measure_speeds(configs: Sequence[PretrainedConfig], dtype: str) -> list[float]:
    """Return the tokens that each model reads in a second, the best of some tries that take turns."""
    models = []
    device = precision.find_device()
    for config in configs:
        with hide_library_output(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        models.append(made.eval().to(device))
    rows = min(model.get_input_embeddings().weight.shape[0] for model in models)
    ids = (torch.arange(BATCH * LENGTH, device=device) % rows).reshape(BATCH, LENGTH)
    best = [float("inf")] * len(models)
    with torch.inference_mode():
        for _ in range(REPETITIONS + 1):
            for n, model in enumerate(models):
                began = time.perf_counter()
                float(model(input_ids=ids, use_cache=False).logits[0, -1, 0])
                best[n] = min(best[n], time.perf_counter() - began)
    return [BATCH * LENGTH / seconds for seconds in best]


def describe_sizes(plan: PrunePlan) -> list[tuple[str, str, str]]:
    """Return rows of a table: a size's name, before, and after."""
    rows = [(EXACT_SIZES[name], f"{size:,}", f"{plan.after[name]:,}") for name, size in plan.before.items()]
    return [("parameters", *(f"{count:,}" for count in plan.parameters)), *rows]


def describe_costs(before: Costs, after: Costs) -> list[tuple[str, str, str]]:
    """Return rows of a table: what is measured, before, and after."""
    rows = [
        ("weights", *(f"{costs.weights / (1 << 20):,.1f} MiB" for costs in (before, after))),
        (
            "keys and values of 1,000 tokens",
            *(f"{1000 * c.cache_per_token / (1 << 20):,.1f} MiB" for c in (before, after)),
        ),
    ]
    if before.speed is not None and after.speed is not None:
        rows.append(
            (
                "tokens read in a second",
                f"{before.speed:,.0f}",
                f"{after.speed:,.0f} ({after.speed / before.speed:.2f}x)",
            )
        )
    return rows


def dump_sizes(plan: PrunePlan) -> str:
    """Return the sizes before and after as JSON."""
    return json.dumps({"before": plan.before, "after": plan.after, "parameters": plan.parameters}, indent=1)
