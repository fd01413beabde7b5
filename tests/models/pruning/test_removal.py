import pruning_models
import pytest
import torch
from pruning_models import COUPLED, FAMILIES, PAIRS
from transformers import AutoModelForCausalLM

from fuselm.models.pruning import configs, importance, layers
from fuselm.models.pruning.coupling import find_coupling
from fuselm.models.pruning.removal import remove_units


@pytest.mark.parametrize(("family", "structure"), COUPLED)
def test_removing_nothing_changes_no_bit(family, structure):
    model = pruning_models.make_model(family, dtype=torch.bfloat16)
    coupling = find_coupling(model.config, structure)
    every = {place: torch.arange(coupling.units) for place in coupling.slices}
    same = remove_units(model, [coupling], {structure: every}, range(3))
    ours, theirs = same.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert torch.equal(pruning_models.read_logits(same), pruning_models.read_logits(model))


@pytest.mark.parametrize(("family", "structure"), [p for p in COUPLED if p[1] != "hidden" and p[0] != "olmo2"])
def test_units_of_zeros_are_not_missed(family, structure):
    """Units whose weights are zero have the least magnitude, and put out zero. (OLMo 2's norm over heads counts them.)

    A head of gpt-oss has a sink, which is no weight of its output, so it stays as it is.
    """
    model = pruning_models.make_model(family)
    coupling = find_coupling(model.config, structure)
    generator = torch.Generator().manual_seed(3)
    zeros = {"mlp": 16, "groups": 2}[structure]  # transformers takes no other number of heads with this width
    parameters = dict(model.named_parameters())
    expected_kept = {}
    with torch.no_grad():
        for place, slices in coupling.slices.items():
            gone = torch.randperm(coupling.units, generator=generator)[:zeros]
            expected_kept[place] = sorted(set(range(coupling.units)) - set(gone.tolist()))
            for own in slices:
                if own.tensor.endswith("sinks"):
                    continue
                item, axis = parameters[own.tensor], own.axis
                if own.expert is not None:
                    item, axis = item[own.expert], axis - 1
                item.index_fill_(axis, own.index(gone, coupling.units), 0.0)
    scores = importance.score_units(
        coupling, lambda name: importance.score_weights("magnitude", parameters[name].detach())
    )
    kept = importance.choose_units(scores, coupling.units - zeros)
    assert {place: units.tolist() for place, units in kept.items()} == expected_kept
    smaller = remove_units(model, [coupling], {structure: kept})
    expected, logits = pruning_models.read_logits(model), pruning_models.read_logits(smaller)
    assert (logits - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "structure"), PAIRS)
def test_plain_transformers_loads_and_generates(family, structure, tmp_path):
    model = pruning_models.make_model(family)
    before = configs.read_size(model.config, structure)
    if structure == "layers":
        smaller = remove_units(model, [], {}, [0, 2])
    else:
        coupling = find_coupling(model.config, structure)
        keep = {"mlp": before - 16, "groups": before // 2, "hidden": before - 8}[structure]
        kept = importance.choose_units(importance.draw_scores(coupling, 0), keep)
        smaller = remove_units(model, [coupling], {structure: kept})
    smaller.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert configs.read_size(loaded.config, structure) < before
    torch.testing.assert_close(pruning_models.read_logits(loaded.eval()), pruning_models.read_logits(smaller))
    generated = loaded.generate(
        pruning_models.IDS[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generated.shape == (1, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_layer_is_the_model_that_skips_it(family):
    model = pruning_models.make_model(family)
    smaller = remove_units(model, [], {}, [0, 2])

    def skip(module, arguments, keywords, output):
        read = arguments[0] if arguments else keywords["hidden_states"]
        return (read, *output[1:]) if isinstance(output, tuple) else read

    layers.find_layers(model)[1].register_forward_hook(skip, with_kwargs=True)
    torch.testing.assert_close(pruning_models.read_logits(smaller), pruning_models.read_logits(model))


def test_several_structures_go_at_once():
    model = pruning_models.make_model("llama (tied)")
    couplings = [find_coupling(model.config, name) for name in ("mlp", "groups", "hidden")]
    sizes = {"mlp": 40, "groups": 2, "hidden": 24}
    kept = {
        c.structure: importance.choose_units(importance.draw_scores(c, n), sizes[c.structure])
        for n, c in enumerate(couplings)
    }
    smaller = remove_units(model, couplings, kept, [0, 2])
    one_by_one = model
    for coupling in couplings:
        one_by_one = remove_units(one_by_one, [coupling], {coupling.structure: kept[coupling.structure]})
    one_by_one = remove_units(one_by_one, [], {}, [0, 2])
    assert torch.equal(pruning_models.read_logits(smaller), pruning_models.read_logits(one_by_one))
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight
    named = {name: configs.read_size(smaller.config, name) for name in (*sizes, "layers")}
    assert named == sizes | {"layers": 2}
