"""What a merge file may say, and what is said of one that is wrong."""

import pytest
import yaml

from fuselm.runs.merging.recipe import load_recipe


def load(tmp_path, recipe: dict):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path)


def test_both_forms_say_the_same(tmp_path):
    short = {
        "method": "ties",
        "base": "w0",
        "models": {"chat": {"model": "a", "weight": 0.5, "density": 0.6}, "code": {"model": "b", "weight": [0.1, 0.9]}},
        "parameters": {"scale": 0.7},
        "dtype": "bfloat16",
    }
    long = {
        "merge_method": "ties",
        "base_model": "w0",
        "models": [
            {"model": "w0"},
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.6}},
            {"model": "b", "parameters": {"weight": [0.1, 0.9]}},
        ],
        "parameters": {"lambda": 0.7},
        "dtype": "bfloat16",
    }
    ours, theirs = load(tmp_path, short)[0], load(tmp_path, long)[0]
    for place in (0.0, 0.25, 1.0):
        assert ours.find_parameters("x", place) == theirs.find_parameters("x", place)
    assert ours.find_parameters("x", 0.25) == {
        "weight": [0.5, pytest.approx(0.3)],
        "density": [0.6, 1.0],
        "normalize": True,
        "scale": 0.7,
    }
    assert [m.model for m in ours.inputs] == [m.model for m in theirs.inputs] == ["w0", "a", "b"]


def test_the_first_filter_that_a_name_has_counts(tmp_path):
    weight = [{"filter": "mlp.down", "value": 0.1}, {"filter": "mlp", "value": [0.2, 0.4]}, {"value": 0.9}]
    options, _ = load(tmp_path, {"method": "linear", "models": [{"model": "a", "parameters": {"weight": weight}}]})
    assert options.find_parameters("layers.3.mlp.down.weight", 0.5)["weight"] == [0.1]
    assert options.find_parameters("layers.3.mlp.up.weight", 0.5)["weight"] == [pytest.approx(0.3)]
    assert options.find_parameters("norm.weight", 0.5)["weight"] == [0.9]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "ties", "models": ["a"]}, "base: ties merges differences from a base; name one"),
        (
            {"method": "slerp", "base": "w", "models": ["a", "b"]},
            "models: slerp needs 1 besides the base (got 2); name others",
        ),
        ({"method": "linear", "models": ["a"]}, "weight: linear needs it for a; set it for every tensor"),
        (
            {"method": "linear", "models": [{"model": "a", "weight": 1, "densty": 1}]},
            "a: linear has no parameter densty; known: normalize, weight",
        ),
        (
            {"method": "ties", "base": "w", "models": [{"model": "a", "weight": 1, "density": 1.5}]},
            "a.density: needs a share from 0 to 1 (got 1.5); write one",
        ),
        (
            {"method": "sce", "base": "w", "models": ["a", "b"], "parameters": {"select": "all"}},
            "parameters.select: 'all' is none of deltas, weights_only; choose one of them",
        ),
        (
            {"method": "linear", "models": [{"model": "a", "weight": 1}], "parameters": {"normalize": 1}},
            "parameters.normalize: true or false (got 1); write one of them",
        ),
        (
            {"merge_method": "linear", "slices": []},
            "slices: only whole models are merged here; write `models`, or run mergekit-yaml on this file",
        ),
        ({"method": "linear", "modls": ["a"]}, "modls: unknown option; did you mean 'models'?"),
        (
            {"method": "linear", "models": ["a"], "dtype": "int8"},
            "dtype: input should be 'float32', 'bfloat16' or 'float16'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, recipe, message):
    with pytest.raises(ValueError) as error:
        load(tmp_path, recipe)
    assert message in str(error.value) and "\n" not in str(error.value)
