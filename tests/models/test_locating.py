"""Test locating.py, hub.py and checkpoints.py: folders with random weights, and a hub played by a function."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_folders import (  # noqa: F401
    ROWS,
    change_json,
    folder,
    message,
    own_cache,
    pristine,
    run_python,
    tiny_llama,
    tokenizer,
    write_json,
)
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    MambaConfig,
)

from fuselm.models.loading import load_model
from fuselm.models.locating import UNLIMITED, locate_model, locate_tokenizer
from fuselm.system import atomic_files, fingerprints

# ---- a folder


def test_a_folder_is_located_with_its_facts(folder):
    model = locate_model(str(folder))
    assert (model.name, model.folder) == (str(folder), folder)
    assert (model.output_size, model.context_length) == (ROWS, 67)
    assert model.context_token == 0
    assert model.parameters_bytes == (folder / "model.safetensors").stat().st_size
    assert len(model.fingerprint) == len(model.tokenizer_fingerprint) == 16
    assert int(model.fingerprint, 16) != int(model.tokenizer_fingerprint, 16)


def test_locating_a_folder_loads_neither_torch_nor_transformers(folder):
    code = f"import sys; from fuselm.models import locating; locating.locate_model({str(folder)!r}); "
    out, _ = run_python(code + "print({'torch', 'transformers'} & set(sys.modules))").communicate()
    assert out.strip() == "set()"


def test_a_copy_elsewhere_has_the_same_fingerprints(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    first, second = locate_model(str(folder)), locate_model(str(copy))
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer_fingerprint == second.tokenizer_fingerprint


def test_other_weights_are_another_model_with_the_same_tokenizer(folder):
    before = locate_model(str(folder))
    tiny_llama(seed=1).save_pretrained(folder)
    after = locate_model(str(folder))
    assert before.fingerprint != after.fingerprint
    assert before.tokenizer_fingerprint == after.tokenizer_fingerprint


def test_another_config_is_another_model(folder):
    before = locate_model(str(folder)).fingerprint
    change_json(folder / "config.json", rms_norm_eps=1e-3)
    assert locate_model(str(folder)).fingerprint != before


def test_another_tokenizer_or_choice_of_bos_is_another_tokenizer_of_the_same_model(folder):
    seen = [locate_model(str(folder))]
    change_json(folder / "tokenizer_config.json", bos_token=None)
    seen.append(locate_model(str(folder)))
    change_json(folder / "tokenizer.json", normalizer={"type": "NFC"})
    seen.append(locate_model(str(folder)))
    assert len({model.tokenizer_fingerprint for model in seen}) == 3
    assert len({model.fingerprint for model in seen}) == 1


def test_what_does_not_change_tokens_does_not_change_the_tokenizers_fingerprint(folder):
    before = locate_model(str(folder)).tokenizer_fingerprint
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=5)
    assert locate_model(str(folder)).tokenizer_fingerprint == before


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, {}, 0),
        ({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}, {}, 0),
        ({"bos_token": None, "eos_token": "</s>"}, {"bos_token_id": 0}, 1),
        ({"eos_token": "</s>"}, {"bos_token_id": None}, 1),
        ({}, {"bos_token_id": 7, "eos_token_id": 1}, 7),
        ({}, {"bos_token_id": None, "eos_token_id": [1, 5]}, 1),
    ],
)
def test_position_0_is_predicted_from_bos_or_else_from_end_of_text(folder, settings, config, expected):
    write_json(folder / "tokenizer_config.json", settings)
    change_json(folder / "config.json", **config)
    assert locate_model(str(folder)).context_token == expected


def test_the_special_tokens_map_decides_where_the_tokenizers_config_says_nothing(folder):
    write_json(folder / "tokenizer_config.json", {})
    write_json(folder / "special_tokens_map.json", {"bos_token": "</s>"})
    assert locate_model(str(folder)).context_token == 1


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(folder):
    write_json(folder / "tokenizer_config.json", {"bos_token": None, "eos_token": None})
    assert "neither a BOS nor an EOS" in message(locate_model, str(folder))


# ---- sizes


def replace_config(folder: Path, config, architecture: str) -> None:
    config.save_pretrained(folder)
    change_json(folder / "config.json", architectures=[architecture], bos_token_id=0)
    save_file({"rows": torch.zeros(1 << 18, dtype=torch.int8)}, folder / "model.safetensors")


def test_sizes_of_a_nested_config_are_the_language_models(folder):
    config = Gemma3Config(text_config={"vocab_size": 311, "max_position_embeddings": 71, "hidden_size": 16})
    replace_config(folder, config, "Gemma3ForConditionalGeneration")
    model = locate_model(str(folder))
    assert (model.output_size, model.context_length) == (311, 71)


def test_sizes_left_out_of_a_config_are_the_defaults_of_its_class(folder):
    replace_config(folder, Gemma3TextConfig(), "Gemma3ForCausalLM")
    change_json(folder / "config.json", vocab_size=..., max_position_embeddings=...)
    model = locate_model(str(folder))
    assert model.output_size == Gemma3TextConfig().vocab_size
    assert model.context_length == Gemma3TextConfig().max_position_embeddings


def test_a_recurrent_model_has_no_limit(folder):
    replace_config(folder, MambaConfig(vocab_size=ROWS), "MambaForCausalLM")
    assert locate_model(str(folder)).context_length == UNLIMITED


# ---- its weights


def test_sharded_weights_are_one_model(folder, tmp_path):
    whole = locate_model(str(folder))
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    tiny_llama(seed=0).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    model = locate_model(str(sharded))
    assert model.parameters_bytes >= whole.parameters_bytes
    assert model.fingerprint != whole.fingerprint
    first, second = load_model(whole), load_model(model)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    tiny_llama(seed=0).save_pretrained(folder, max_shard_size="20KB")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert message(locate_model, str(folder)).startswith(f"{lost}: this part of the weights is missing")


def test_weights_in_pickle_files_are_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert locate_model(str(folder)).parameters_bytes == (folder / "pytorch_model.bin").stat().st_size


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_weights_cut_off_are_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert message(locate_model, str(folder)).startswith(f"{path}: not a whole safetensors file")


def test_a_pointer_in_place_of_weights_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_text("version 1\noid sha256:4d7a\nsize 12345\n")
    assert "only a pointer to large-file storage" in message(locate_model, str(folder))


# ---- what is not a model


def test_an_empty_folder_is_refused(tmp_path):
    assert message(locate_model, str(tmp_path)).startswith(f"{tmp_path}: empty folder; needs a Hugging Face model")


def test_a_folder_without_config_weights_or_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert ": no tokenizer (tokenizer.json" in message(locate_model, str(folder))
    (folder / "model.safetensors").unlink()
    assert ": no weights (model.safetensors" in message(locate_model, str(folder))
    (folder / "config.json").unlink()
    assert ": no config.json; needs a Hugging Face model folder" in message(locate_model, str(folder))


def test_a_folder_of_gguf_files_is_refused_with_the_file_to_name(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert message(locate_model, str(tmp_path)).endswith(f"no config.json; name the file: {tmp_path / 'a.gguf'}")


def test_an_adapter_is_refused(tmp_path):
    write_json(tmp_path / "adapter_config.json", {})
    assert "an adapter (PEFT) without its base model" in message(locate_model, str(tmp_path))
    assert f"models: ['BASE+{tmp_path}']" in message(locate_model, str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert f"models: ['org/base+{tmp_path}']" in message(locate_model, str(tmp_path))


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "LlamaForSequenceClassification", "LlamaModel"])
def test_what_does_not_predict_the_next_token_is_refused(folder, architecture):
    change_json(folder / "config.json", architectures=[architecture])
    assert f"not a causal language model (config.json: {architecture})" in message(locate_model, str(folder))


def test_an_encoder_decoder_is_refused(folder):
    change_json(folder / "config.json", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    assert "not a causal language model" in message(locate_model, str(folder))


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_config_that_is_not_a_json_object_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    assert message(locate_model, str(folder)).startswith(f"{folder}/config.json: ")


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "cannot load a fast tokenizer" in message(locate_model, str(folder))


def test_other_files_are_refused(folder):
    path = folder / "model.safetensors"
    assert message(locate_model, str(path)) == f"{path}: not a GGUF file; needs a model folder or a .gguf file"


# ---- hub ids


def test_a_missing_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for spec in ("./foo", "../foo/bar", "/foo/bar", "~/foo", "owner/name.gguf"):
        assert message(locate_model, spec) == f"{spec}: no such folder or GGUF file; check the path"
    assert "check the path (models is a folder here" in message(locate_model, "models/foo")


@pytest.mark.parametrize("spec", ["foo", "a/b/c", "owner/", "own er/name"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(spec):
    wanted = f"{spec}: no such folder or GGUF file, and not a hub id (owner/name); check the path"
    assert message(locate_model, spec) == wanted


def test_an_address_without_a_model_is_refused():
    wanted = "https://example.org/a/b: no model there; name a folder with its weights, config.json and tokenizer"
    assert message(locate_model, "https://example.org/a/b") == wanted


def test_a_local_path_has_no_revision(folder):
    assert "a local path has no revision (got 'main')" in message(locate_model, str(folder), revision="main")


@pytest.fixture
def hub(monkeypatch):
    """Play the hub by a function: `hub(folder)` makes it hold one repository, `hub(error)` makes it fail."""
    asked = []

    def hold(answer):
        def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
            asked.append((repository, revision, allow_patterns))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    return hold


def test_a_hub_id_is_downloaded_at_its_revision_without_pickles(hub, folder):
    asked = hub(folder)
    model = locate_model("owner/name-1.5B", revision="v2")
    assert (model.name, model.folder) == ("owner/name-1.5B", folder)
    ((repository, revision, patterns),) = asked
    assert (repository, revision) == ("owner/name-1.5B", "v2")
    assert "model*.safetensors" in patterns and not any(pattern.endswith(".bin") for pattern in patterns)


def test_pickles_are_downloaded_where_there_is_nothing_else(hub, folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    asked = hub(folder)
    locate_model("owner/name")
    assert [patterns for _, _, patterns in asked][1] == ["pytorch_model*.bin"]


def hub_errors():
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    yield errors.GatedRepoError("403\nno", response=response), "gated on the hub; accept its terms"
    yield errors.RevisionNotFoundError("404\nno", response=response), "no revision 'v2' on the hub"
    yield errors.RepositoryNotFoundError("404\nno", response=response), "not on the hub, or private"
    yield errors.HfHubHTTPError("500\nno", response=response), "could not be downloaded (HfHubHTTPError: 500)"
    yield errors.LocalEntryNotFoundError("ConnectError\nno"), "could not be downloaded (LocalEntryNotFoundError: Conn"
    yield OSError(28, "No space left on device"), "No space left on device"


@pytest.mark.parametrize(("error", "expected"), list(hub_errors()), ids=lambda value: type(value).__name__)
def test_what_goes_wrong_with_the_hub_is_said_in_one_line(hub, error, expected):
    hub(error)
    text = message(locate_model, "owner/name", revision="v2")
    assert text.startswith("owner/name: ") and expected in text


# ---- hashes kept


@pytest.fixture
def big(folder) -> Path:
    """Return a model whose weights are large enough for their hash to be kept."""
    tiny_llama(seed=0, head_dim=2048).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 1 << 20
    return folder


def test_large_files_are_read_once(big, monkeypatch):
    first = locate_model(str(big))
    read = []
    hash_file = atomic_files.hash_file
    monkeypatch.setattr(atomic_files, "hash_file", lambda path: read.append(path.name) or hash_file(path))
    assert locate_model(str(big)) == first
    assert sorted(read) == ["config.json", "tokenizer.json"]


def test_a_file_changed_in_place_is_read_again(big):
    before = locate_model(str(big)).fingerprint
    with open(big / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x01\x02\x03\x04")
    os.utime(big / "model.safetensors", ns=(1, 1))
    assert locate_model(str(big)).fingerprint != before


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_store_of_hashes_is_replaced(big, content):
    first = locate_model(str(big))
    (fingerprints.find_cache_folder() / "fingerprints.json").write_bytes(content)
    assert locate_model(str(big)) == first
    assert locate_model(str(big)) == first
    assert json.loads((fingerprints.find_cache_folder() / "fingerprints.json").read_text())


def test_a_cache_that_cannot_be_written_only_costs_time(big, tmp_path, monkeypatch):
    first = locate_model(str(big))
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "file" / "cache"))
    assert locate_model(str(big)) == first


# ---- tokenizers alone


def test_a_tokenizer_needs_no_weights(byte_level, tmp_path):
    whole = locate_model(str(byte_level))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(byte_level / name, tmp_path / name)
    alone = locate_tokenizer(str(tmp_path))
    same = ("tokenizer_fingerprint", "output_size", "context_token")
    assert all(getattr(alone, name) == getattr(whole, name) for name in same)
    assert (alone.fingerprint, alone.folder) == ("", tmp_path)
    (tmp_path / "config.json").unlink()
    assert locate_tokenizer(str(tmp_path)).output_size == whole.output_size - 41
    with pytest.raises(ValueError, match="no such folder or GGUF file"):
        locate_tokenizer(str(tmp_path / "nowhere"))
