import pruning_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.models.pruning.configs import read_size, resize_config
from fuselm.models.pruning.shapes import count_parameters, read_shapes
from fuselm.models.pruning.sizes import count_with_sizes, solve_sizes

CONFIG = pruning_models.make_model("qwen2").config
WHOLE = count_parameters(read_shapes(CONFIG))


@settings(max_examples=30)
@given(
    st.sets(st.sampled_from(["mlp", "groups", "layers", "hidden"]), min_size=1),
    st.floats(0.02, 0.5),
    st.sampled_from([1, 4, 8, 13]),
)
def test_no_other_width_is_nearer(structures, ratio, multiple):
    wanted = round(WHOLE * (1 - ratio))
    try:
        sizes = solve_sizes(CONFIG, sorted(structures), wanted, multiple=multiple)
    except ValueError as error:
        assert "are left" in str(error)
        return
    before = {name: read_size(CONFIG, name) for name in structures}
    assert all(1 <= sizes[name] <= before[name] for name in structures)
    assert "mlp" not in sizes or sizes["mlp"] % multiple == 0 or sizes["mlp"] == before["mlp"]
    if structures == {"mlp"}:
        reached = abs(count_with_sizes(CONFIG, sizes) - wanted)
        others = [{"mlp": width} for width in range(multiple, before["mlp"] + 1, multiple)]
        assert reached == min(abs(count_with_sizes(CONFIG, other) - wanted) for other in [*others, before])


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match="5 parameters: with as little of mlp"):
        solve_sizes(CONFIG, ["mlp"], 5, multiple=8)


def test_a_configuration_keeps_the_size_of_a_head():
    smaller = resize_config(CONFIG, {"groups": 1, "hidden": 24})
    assert (smaller.num_attention_heads, smaller.num_key_value_heads) == (2, 1)
    assert (smaller.head_dim, smaller.hidden_size) == (8, 24)


def test_lists_by_layer_follow_the_kept_layers():
    config = pruning_models.make_model("gemma3_text").config
    config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    assert resize_config(config, {"layers": 2}, [0, 2]).layer_types == ["sliding_attention", "full_attention"]
