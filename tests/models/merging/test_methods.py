"""Merging methods against their definitions, against mergekit, and against what must hold for any of them."""

import merge_reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fuselm.models.locating import locate_model
from fuselm.models.merging.blocks import kth_largest
from fuselm.models.merging.choices import METHODS
from fuselm.models.merging.methods import FUNCTIONS, begin_merge, merge_tensors

CASES = [
    ("linear", {"weight": [0.2, 0.5, 0.4]}),
    ("linear", {"weight": [0.2, -0.5, 0.4], "normalize": False}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": [0.3, 0.9]}),
    ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False}),
    ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("karcher", {}),
    ("task_arithmetic", {"weight": [0.2, 0.5, 0.4], "scale": 0.7}),
    ("task_arithmetic", {"weight": [0.2, 0.5, 0.4], "normalize": True}),
    ("ties", {"weight": [0.2, 0.5, 0.4], "density": [0.6, 0.3, 1.0]}),
    ("ties", {"weight": [0.2, 0.5, 0.4], "density": [0.6, 0.0, 0.01], "normalize": False, "scale": 1.5}),
    ("dare_linear", {"weight": [0.2, 0.5, 0.4], "density": [0.6, 0.3, 1.0]}),
    ("dare_linear", {"weight": [0.2, 0.5, 0.4], "density": [0.6, 0.3, 1.0], "rescale": "density"}),
    ("dare_ties", {"weight": [0.2, 0.5, 0.4], "density": [0.6, 0.3, 0.5], "rescale": False, "normalize": True}),
    ("dare_ties", {"weight": [0.2, 0.5, 0.4], "density": [0.6, 0.3, 0.5]}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 0.3, "select": "weights_only"}),
    ("varm", {}),
    ("widen", {}),
    ("widen", {"above_average_value_ratio": 1.3, "score_calibration_value": 0.7}),
]
SHAPES = [(13,), (11, 7), (1, 1), (5, 3, 2)]


def draw(shape: tuple[int, ...], models: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models that differ from it by a twentieth of its size."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + 0.05 * torch.randn(shape, generator=generator) for _ in range(models)]


def count_models(method: str, parameters: dict) -> int:
    return 2 if method == "nuslerp" else 1 if method == "slerp" else 3


def in_blocks(method: str, base, tensors, rows: int, **parameters) -> torch.Tensor:
    """Merge with blocks of so many rows."""
    models = [base, *tensors] if METHODS[method].base != "unused" else tensors
    defaults = {name: [value] * len(tensors) for name, value in METHODS[method].per_model.items() if value == 1.0}
    defaults |= {
        name: value for name, value in METHODS[method].shared.items() if isinstance(value, bool | int | float | str)
    }

    def blocks():
        return ([model[begin : begin + rows] for model in models] for begin in range(0, len(models[0]), rows))

    merge = begin_merge(method, blocks, parameters=defaults | parameters, has_base=METHODS[method].base != "unused")
    return torch.cat([merge(block) for block in blocks()])


def drawn_masks(shape, density, seed=0):
    """Return what DARE keeps of each model: each has a generator of its own."""
    made = []
    for number, share in enumerate(density):
        generator = torch.Generator().manual_seed(seed * 1009 + number)
        full = torch.full(shape, share)
        made.append((torch.bernoulli(full, generator=generator) if share < 1 else torch.ones(shape)).numpy())
    return made


def has_definition(parameters: dict, shape: tuple[int, ...]) -> bool:
    """Tell whether the definition covers a shape: methods by rows have one for matrices alone."""
    by_rows = parameters.get("nuslerp_flatten") is False or parameters.get("filter_wise", False)
    return not by_rows or len(shape) == 2


@pytest.mark.parametrize(
    ("method", "parameters", "shape"),
    [
        (method, parameters, shape)
        for method, parameters in CASES
        for shape in SHAPES
        if has_definition(parameters, shape)
    ],
    ids=str,
)
def test_a_method_is_what_its_definition_says(method, parameters, shape):
    base, tensors = draw(shape, count_models(method, parameters))
    if method.startswith("dare"):
        expected_parameters = parameters | {"masks": drawn_masks(shape, parameters["density"])}
    else:
        expected_parameters = parameters
    expected = merge_reference.merge(
        method, [t.double().numpy() for t in tensors], base.double().numpy(), **expected_parameters
    )
    merged = merge_tensors(method, tensors, base=base, **parameters)
    assert merged.dtype == torch.float32 and merged.shape == shape
    np.testing.assert_allclose(merged.numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("rows", [1, 4, 11])
@pytest.mark.parametrize(("method", "parameters"), [c for c in CASES if not METHODS[c[0]].draws], ids=str)
def test_blocks_of_any_size_give_the_same(method, parameters, rows):
    base, tensors = draw((11, 7), count_models(method, parameters))
    whole = in_blocks(method, base, tensors, 11, **parameters)
    torch.testing.assert_close(in_blocks(method, base, tensors, rows, **parameters), whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize("rescale", [True, "density", False])
def test_dare_drops_the_same_elements_whatever_it_measures_first(rescale):
    base, tensors = draw((11, 7), 2)
    merged = in_blocks("dare_linear", base, tensors, 3, weight=[1.0, 0.0], density=[0.5, 0.5], rescale=rescale)
    kept = merged != base
    again = in_blocks("dare_linear", base, tensors, 3, weight=[1.0, 0.0], density=[0.5, 0.5], rescale=False) != base
    assert 0 < kept.sum() < kept.numel() and bool((kept == again).all())


def test_widen_takes_tokens_for_the_columns_of_an_embedding():
    base, tensors = draw((11, 7), 3)
    expected = merge_reference.widen([t.double().numpy() for t in tensors], base.double().numpy(), by_row=True)
    merged = merge_tensors("widen", tensors, base=base, is_embedding=True)
    np.testing.assert_allclose(merged.numpy(), expected, atol=3e-6)


def test_widen_has_no_nan_where_columns_are_zero():
    base, tensors = draw((11, 7), 2)
    base[:, 3] = 0
    tensors[0][:, 3] = 0
    tensors[1][:, 5] = 0
    merged = merge_tensors("widen", tensors, base=base)
    assert torch.isfinite(merged).all()
    expected = merge_reference.widen([t.double().numpy() for t in tensors], base.double().numpy())
    np.testing.assert_allclose(merged.numpy(), expected, atol=3e-6)


MERGEKIT = [
    case
    for case in CASES
    if case[0] not in ("varm", "widen") and case[1].get("select") is None and case[1].get("rescale") != "density"
]


@pytest.mark.parametrize("spread", [0.01, 0.5])
@pytest.mark.parametrize(("method", "parameters"), MERGEKIT, ids=[f"{m} {p}" for m, p in MERGEKIT])
def test_mergekit_gives_the_same(method, parameters, spread):
    """Differences are 0.01 or more: below, mergekit's SCE gives all models the same weight."""
    shape, generator = (37, 53), torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    tensors = [base + spread * torch.randn(shape, generator=generator) for _ in range(count_models(method, parameters))]
    assert_merged_as_by_mergekit(method, parameters, base, tensors)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["self_attn.k_proj", "mlp.down_proj", "input_layernorm"])
@pytest.mark.parametrize(("method", "parameters"), MERGEKIT, ids=[f"{m} {p}" for m, p in MERGEKIT])
def test_mergekit_gives_the_same_of_real_weights(method, parameters, kind, real_models):
    """Layers of one real model stand for the models, so that differences are as large as weights are.

    mergekit computes in float64 here: in float32 its sums over a million weights are off by up to 1e-4 (`karcher`).
    The weights came from 4 bits, so many are equal in size; a little noise makes clear which of them are the largest.
    """
    if kind == "input_layernorm" and (parameters.get("nuslerp_row_wise") or parameters.get("filter_wise")):
        pytest.skip("a vector has no rows")
    [file] = locate_model(str(real_models["smollm2"])).folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    with safe_open(file, "pt") as weights:
        base, *tensors = (
            weights.get_tensor(f"model.layers.{layer}.{kind}.weight").float()
            for layer in range(1 + count_models(method, parameters))
        )
    tensors = [tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for tensor in tensors]
    assert_merged_as_by_mergekit(method, parameters, base, tensors, dtype=torch.float64)


def assert_merged_as_by_mergekit(
    method: str,
    parameters: dict,
    base: torch.Tensor,
    tensors: list[torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare with what mergekit computes in `dtype`, to 1e-6."""
    merge_state_dicts = pytest.importorskip("mergekit.merge_methods").merge_state_dicts
    described = METHODS[method]
    has_base = described.base != "unused"
    theirs = {
        {"scale": "lambda"}.get(name, name): {f"m{n}": v for n, v in enumerate(value)}
        if name in described.per_model
        else value
        for name, value in parameters.items()
    }
    if method.startswith("dare"):  # one model after the other is drawn from one stream there
        for n, share in enumerate(parameters["density"]):
            own = parameters | {"weight": [1.0], "density": [share]}
            torch.manual_seed(0)
            expected = merge_state_dicts(
                {"b": {"w": base}, "m0": {"w": tensors[n]}},
                method,
                base="b",
                parameters=theirs | {"weight": {"m0": 1.0}, "density": {"m0": share}},
                dtype=torch.float32,
            )["w"]
            merged = merge_tensors(method, [tensors[n]], base=base, **own)
            torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)
        return
    named = {f"m{n}": {"w": tensor.to(dtype)} for n, tensor in enumerate(tensors)}
    expected = merge_state_dicts(
        named | ({"b": {"w": base.to(dtype)}} if has_base else {}),
        method,
        base="b" if has_base else None,
        parameters=theirs,
        dtype=dtype,
    )["w"]
    merged = merge_tensors(method, tensors, base=base if has_base else None, **parameters)
    torch.testing.assert_close(merged.to(dtype), expected, atol=1e-6, rtol=0)


def all_parameters(method: str, count: int) -> dict:
    weights = {"weight": [1.0] * count} if "weight" in METHODS[method].per_model else {}
    return weights | ({"t": 0.4} if method == "slerp" else {})


@pytest.mark.parametrize("method", FUNCTIONS)
def test_models_equal_to_the_base_give_the_base(method):
    base, _ = draw((11, 7), 1)
    count = 1 if METHODS[method].most == 1 else 2
    merged = merge_tensors(method, [base.clone()] * count, base=base, **all_parameters(method, count))
    torch.testing.assert_close(merged, base, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [m for m in FUNCTIONS if METHODS[m].least == 1 and m not in ("slerp", "ties")])
def test_one_model_alone_is_what_comes_out(method):
    base, (model,) = draw((11, 7), 1)
    merged = merge_tensors(method, [model], base=base, **all_parameters(method, 1))
    torch.testing.assert_close(merged, model, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [m for m in FUNCTIONS if METHODS[m].most > 2 and not METHODS[m].draws])
def test_the_order_of_models_does_not_matter(method):
    base, tensors = draw((11, 7), 3)
    one = merge_tensors(method, tensors, base=base, **all_parameters(method, 3))
    other = merge_tensors(method, tensors[::-1], base=base, **all_parameters(method, 3))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_light_tuning_is_weighted_by_sce_and_not_by_mergekit():
    """The sum of mean squares is 5e-8 here, below mergekit's threshold of 1e-6."""
    merge_state_dicts = pytest.importorskip("mergekit.merge_methods").merge_state_dicts
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(40, 50)
    sign = torch.where(torch.rand(40, 50, generator=generator) < 0.5, -1.0, 1.0)
    near, far = 1e-4 * sign, 2e-4 * sign
    merged = merge_tensors("sce", [near, far], base=base)
    torch.testing.assert_close(merged, 1.8e-4 * sign, atol=1e-9, rtol=0)  # (1 * 1 + 4 * 2) / 5
    theirs = merge_state_dicts(
        {"b": {"w": base}, "n": {"w": near}, "f": {"w": far}}, "sce", base="b", parameters={}, dtype=torch.float32
    )["w"]
    torch.testing.assert_close(theirs, 1.5e-4 * sign, atol=1e-9, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 7),
)
def test_the_kth_largest_is_exact(values, count, size):
    count = min(count, len(values))
    tensor = torch.tensor(values, dtype=torch.float32)
    assert kth_largest(lambda: iter(tensor.split(size)), count) == sorted(tensor.tolist(), reverse=True)[count - 1]


@pytest.mark.parametrize(
    ("method", "tensors", "parameters", "message"),
    [
        ("ties", 2, {"weight": [1, 1]}, "ties: needs a base; give one"),
        ("slerp", 2, {"t": 0.5}, "slerp: merges exactly 1 model besides a base (got 2)"),
        ("model_stock", 1, {}, "model_stock: merges at least 2 models besides a base (got 1)"),
        ("linear", 2, {}, "linear: takes normalize, weight; check weight"),
        ("linear", 2, {"weight": [1, 1], "density": 0.5}, "linear: takes normalize, weight; check density"),
        ("linear", 2, {"weight": [1, -1]}, "linear: the weights sum to 0; change one, or set normalize: false"),
    ],
)
def test_what_a_method_cannot_do_is_said(method, tensors, parameters, message):
    base, models = draw((5, 3), tensors)
    with pytest.raises(ValueError) as error:
        merge_tensors(method, models, base=None if method == "ties" else base, **parameters)
    assert str(error.value) == message
