"""`fuselm merge --check` names every kind of mismatch in one line, and writes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file, save_file

UP = "model.layers.0.mlp.up_proj.weight"


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return what changes the tensors of a model's folder."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def change_json(name: str, **values: object) -> Callable[[Path], None]:
    """Return what sets values in a JSON file of a model's folder."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def tie(folder: Path) -> None:
    """Take the embeddings for the output layer's weights."""
    change_json("config.json", tie_word_embeddings=True)(folder)
    change_weights(lambda t: t.pop("lm_head.weight"))(folder)


def swap_tokens(folder: Path) -> None:
    """Give two tokens each other's rows."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[400:402]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def pickle_weights(folder: Path) -> None:
    """Write weights as torch pickles them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def add_adapter(**values: object) -> Callable[[Path], None]:
    """Return what writes a LoRA adapter beside a model's folder; its factors fit no tensor of the model."""

    def apply(folder: Path) -> None:
        adapter = folder.parent / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | values))
        module = "base_model.model.model.layers.0.mlp.up_proj"
        factors = {f"{module}.lora_A.weight": torch.ones(2, 3), f"{module}.lora_B.weight": torch.ones(5, 2)}
        save_file(factors, adapter / "adapter_model.safetensors")

    return apply


MISMATCHES = [
    (change_json("config.json", model_type="mistral"), "architectures llama and mistral"),
    (change_weights(lambda t: t.update({UP: torch.cat([t[UP], t[UP][:3]])})), f"other shapes of {UP} ("),
    (change_weights(lambda t: t.pop(UP)), f"other has no {UP}"),
    (change_weights(lambda t: t.update(extra=torch.ones(3))), "has no extra"),
    (tie, "other has no lm_head.weight"),
    (swap_tokens, "their tokenizers differ in 2 tokens besides added ones"),
    (change_weights(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})), "of type F8_E4M3, so the weights are"),
    (pickle_weights, "its weights are in pytorch_model.bin; load it with transformers and save it again"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: shutil.rmtree(folder), "other"),
    (add_adapter(), "does not fit the model; name the adapter's own base model"),
    (add_adapter(use_dora=True), "use_dora is True, and only plain LoRA is merged here"),
]


@pytest.fixture
def other(byte_level, tmp_path) -> Path:
    return Path(shutil.copytree(byte_level, tmp_path / "other"))


def check(folder: Path, recipe: dict) -> object:
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return tiny_run.fuselm("merge", path, "--check")


@pytest.mark.parametrize(("change", "message"), MISMATCHES, ids=[message for _, message in MISMATCHES])
def test_a_mismatch_is_named_in_one_line(byte_level, other, tmp_path, change, message):
    change(other)
    adapter = tmp_path / "adapter"
    spec = f"{other}+{adapter}" if adapter.exists() else str(other)
    recipe = {"method": "karcher", "models": [str(byte_level), spec], "output": str(tmp_path / "out")}
    before = sorted(tmp_path.rglob("*"))
    outcome = check(tmp_path, recipe)
    assert outcome.code == 2 and message in outcome.err
    assert len([line for line in outcome.err.splitlines() if line.startswith("fuselm: ")]) == 1
    assert "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == sorted({*before, tmp_path / "merge.yaml"})


def test_values_that_differ_are_noted(byte_level, other, tmp_path):
    change_json("config.json", rms_norm_eps=0.25)(other)
    outcome = check(tmp_path, {"method": "karcher", "models": [str(byte_level), str(other)]})
    assert outcome.code == 0 and "config.json has rms_norm_eps" in outcome.err and "and 0.25; the result" in outcome.err


@pytest.mark.parametrize("name", ["slices", "modules"])
def test_parts_of_models_are_refused_by_name(tmp_path, name):
    outcome = check(tmp_path, {"merge_method": "passthrough", name: [{"sources": [{"model": "a"}]}]})
    assert outcome.code == 2 and f"{name}: only whole models are merged here; write `models`" in outcome.err
