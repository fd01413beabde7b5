"""Dropout drops what layers add to their inputs, in training only."""

import pytest
import torch
from pruning_models import IDS, make_model
from trainings import documents, read_losses, target, train  # noqa: F401

from fuselm.training.dropout import drop_what_layers_add


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_all_that_layers_add_is_dropped_in_training_alone(family):
    model = make_model(family, layers=2)
    expected = model(input_ids=IDS).logits
    drop_what_layers_add(model, 0.9999999)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)  # it is not trained now
    model.train()
    dropped = model(input_ids=IDS).logits
    model.eval()
    without = make_model(family, layers=2)
    for layer in next(of for of in without.modules() if isinstance(of, torch.nn.ModuleList)):
        layer.register_forward_hook(
            lambda _, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        )
    torch.testing.assert_close(dropped, without(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_made_up_for():
    model = make_model("llama", layers=1)
    layer = model.model.layers[0]
    given = torch.randn(1, 5, model.config.hidden_size)
    places = model.model.rotary_emb(given, torch.arange(5)[None])
    added = layer(given, position_embeddings=places) - given
    drop_what_layers_add(model, 0.5)
    model.train()
    found = layer(given, position_embeddings=places) - given
    ratios = found / added
    torch.testing.assert_close(ratios.detach(), torch.where(found == 0, 0.0, 2.0), rtol=1e-3, atol=1e-3)
    assert 0.3 < (found == 0).float().mean() < 0.7


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"label_smoothing": 0.1}])
def test_training_differs_and_is_the_same_twice(tmp_path, target, documents, options):
    for name in ("once", "again"):
        train(tmp_path / name, target, documents, None, lambda_clm=1.0, passes=1, average=False, **options)
    assert read_losses(tmp_path / "once") == read_losses(tmp_path / "again")
    train(tmp_path / "without", target, documents, None, lambda_clm=1.0, passes=1, average=False)
    assert read_losses(tmp_path / "once") != read_losses(tmp_path / "without")
