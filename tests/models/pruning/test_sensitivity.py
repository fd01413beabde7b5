import math

import pruning_models
import pytest
import torch

from fuselm.models.pruning import importance, layers, sensitivity
from fuselm.models.pruning.coupling import find_coupling
from fuselm.models.pruning.gradients import compute_loss
from fuselm.models.pruning.removal import remove_units

SAMPLES = [(torch.arange(n) * k) % 384 for n, k in ((13, 7), (11, 5))]


def bits(model):
    with torch.inference_mode():
        return sum(float(compute_loss(model, sample)) for sample in SAMPLES) / len(SAMPLES) / math.log(2)


@pytest.mark.parametrize(("family", "structure"), [("llama", "mlp"), ("llama", "groups"), ("mixtral", "mlp")])
def test_a_rise_is_that_of_a_model_in_which_one_layer_is_pruned(family, structure):
    """A unit of zeros is as good as none, so a layer of the pruned model is put beside layers of the whole one."""
    model = pruning_models.make_model(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coupling = find_coupling(model.config, structure)
    kept = importance.choose_units(importance.draw_scores(coupling, 0), coupling.units // 2)
    read = []
    rises = sensitivity.measure_rises(
        model, [coupling], {structure: kept}, SAMPLES, with_layers=True, advance=read.append
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(read) == 22 * sensitivity.count_passes([coupling], 3) == 22 * (1 + 3 + 3)
    pruned = remove_units(model, [coupling], {structure: kept})
    whole = bits(model)
    ours, theirs = layers.find_layers(model), layers.find_layers(pruned)
    for n in range(3):
        model.model.layers[n] = theirs[n]
        assert rises[structure][n] == pytest.approx(bits(model) - whole, abs=1e-5)
        model.model.layers[n] = ours[n]
        fewer = remove_units(model, [], {}, [k for k in range(3) if k != n])
        assert rises["layers"][n] == pytest.approx(bits(fewer) - whole, abs=1e-5)
