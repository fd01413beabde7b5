import pruning_models
import pytest
import torch
from breadth import architectures
from pruning_models import COUPLED, FAMILIES

from fuselm.models.pruning import twins
from fuselm.models.pruning.coupling import Coupling, Part, Slices, find_coupling


@pytest.mark.parametrize(("family", "structure"), COUPLED)
def test_units_can_change_places(family, structure):
    """Logits cannot tell units apart, if each is moved with all that belongs to it."""
    model = pruning_models.make_model(family)
    coupling = find_coupling(model.config, structure)
    generator = torch.Generator().manual_seed(7)
    orders = {place: torch.randperm(coupling.units, generator=generator) for place in coupling.slices}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved = coupling.select(tensors, orders)
    assert any(not torch.equal(moved[name], tensor) for name, tensor in tensors.items())
    inputs = {"input_ids": pruning_models.IDS, "use_cache": False}
    with torch.inference_mode():
        logits = torch.func.functional_call(model, moved, kwargs=inputs, tie_weights=True).logits
    expected = pruning_models.read_logits(model)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "structure"),
    [(f, s) for f, has in FAMILIES.items() for s in ("mlp", "groups", "hidden") if s not in has],
)
def test_what_cannot_be_removed_is_refused_in_one_line(family, structure):
    with pytest.raises(ValueError, match=r"^[a-z_0-9]+: [^\n]+$"):
        find_coupling(pruning_models.make_model(family).config, structure)


def test_heads_with_slopes_of_their_own_are_refused():
    """ALiBi's slopes are in no tensor, so heads cannot be moved."""
    with pytest.raises(ValueError, match="falcon"):
        find_coupling(architectures.tiny_config("falcon (alibi)"), "groups")


@pytest.mark.parametrize(("family", "structure"), COUPLED)
def test_the_proof_fails_without_any_of_the_slices(family, structure):
    twin = twins.make_twin(pruning_models.make_model(family).config)
    coupling = find_coupling(twin.config, structure)
    assert twins.is_unmoved(twin, coupling)
    place = next(iter(coupling.slices))
    for n, missing in enumerate(coupling.slices[place]):
        if missing.tensor.endswith("k_proj.bias"):
            continue  # a bias of keys adds the same to all scores of a query, unless keys are rotated
        fewer = [own for m, own in enumerate(coupling.slices[place]) if m != n]
        wrong = Coupling(structure=structure, units=coupling.units, slices={**coupling.slices, place: fewer})
        assert not twins.is_unmoved(twin, wrong), missing


def test_fused_projections_are_told_apart():
    coupling = find_coupling(pruning_models.make_model("phi3").config, "mlp")
    fused = next(own for own in coupling.slices[(0,)] if own.tensor.endswith("gate_up_proj.weight"))
    assert fused.parts == (Part(size=1), Part(size=1))
    interleaved = find_coupling(pruning_models.make_model("gpt_oss").config, "mlp")
    own = next(s for s in interleaved.slices[(0, 0)] if s.tensor.endswith("gate_up_proj"))
    assert own.parts == (Part(size=2),)


def test_indices_and_sums_of_parts():
    slices = Slices(tensor="x", axis=0, parts=(Part(size=2), Part(size=1), Part(size=3, is_fixed=True)))
    assert slices.index(torch.tensor([2, 0]), 3).tolist() == [4, 5, 0, 1, 8, 6, 9, 10, 11]
    assert slices.sum_by_unit(torch.arange(12.0), 3).tolist() == [0 + 1 + 6, 2 + 3 + 7, 4 + 5 + 8]
