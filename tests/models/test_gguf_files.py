"""Test gguf_files.py and gguf_claims.py with GGUF files written here."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import ROWS, TEXT, message, own_cache, run_python, tiny_llama, tokenizer, write_json  # noqa: F401
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
)

from fuselm.models import gguf_files
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.system import fingerprints


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


def test_a_gguf_file_becomes_an_ordinary_folder_with_the_same_predictions(gguf_file, capfd):
    capfd.readouterr()
    model = locate_model(str(gguf_file))
    assert capfd.readouterr() == ("", "")
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
    assert message(locate_model, str(path)).startswith(f"{path}: not a GGUF file; needs a model folder")


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
