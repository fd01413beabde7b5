"""Test loading.py and config_claims.py: folders with random weights, and the demo's real models."""

import json
from pathlib import Path

import pytest
import torch
from model_folders import TEXT, change_json, folder, message, own_cache, pristine, tiny_llama, tokenizer  # noqa: F401
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
)

from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import Model, locate_model

REAL = Path(__file__).parents[2] / "models"


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
