"""Test probe.py: it refuses models that are wrong in one way each, in one line, and takes those that are right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
import transformers
from tiny_run import fuselm
from transformers import AutoModelForCausalLM

from fuselm.models import forward, probe
from fuselm.models.loading import load_model
from fuselm.models.locating import locate_model
from fuselm.system import fingerprints

ROWS = 613
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 67,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gpt2": transformers.GPT2Config(vocab_size=ROWS, n_embd=24, n_layer=2, n_head=2, n_positions=67, bos_token_id=None),
    "bert decoder": transformers.BertConfig(**BERT, is_decoder=True),
    "roberta decoder": transformers.RobertaConfig(**BERT, is_decoder=True),
    "mixture of experts": transformers.MixtralConfig(
        **{**SIZES, "hidden_size": 32, "intermediate_size": 32}, num_local_experts=4, num_key_value_heads=1
    ),
    "bloom": transformers.BloomConfig(vocab_size=ROWS, hidden_size=24, n_layer=2, n_head=2, bos_token_id=None),
    "mamba": transformers.MambaConfig(vocab_size=ROWS, hidden_size=24, num_hidden_layers=2, state_size=5),
    "rwkv": transformers.RwkvConfig(vocab_size=ROWS, hidden_size=24, attention_hidden_size=24, num_hidden_layers=2),
}
NOT_CAUSAL = {
    "bert": transformers.BertConfig(**BERT),
    "roberta": transformers.RobertaConfig(**BERT),
    "electra": transformers.ElectraConfig(**BERT, embedding_size=24),
    "xlnet": transformers.XLNetConfig(vocab_size=ROWS, d_model=24, n_layer=2, n_head=2, d_inner=29),
    "xlm": transformers.XLMConfig(vocab_size=ROWS, emb_dim=24, n_layers=2, n_heads=2, max_position_embeddings=67),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))


def saved(
    folder: Path, config, tokenizer: Path, *, dtype: torch.dtype = torch.float32, std: float | None = None
) -> Path:
    """Save a random model of a configuration, with another's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).eval()
        for parameter in made.parameters() if std is not None else ():
            torch.nn.init.normal_(parameter, std=std)
    made.to(dtype).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, folder / path.name)
    return folder


def refusal(folder: Path, *, dtype: str = "auto") -> str:
    with pytest.raises(ValueError) as caught:
        probe.load_tried_model(locate_model(str(folder)), dtype=dtype)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{folder}: ")
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:.*is_decoder")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CAUSAL))
def test_causal_models_are_taken(name, dtype, byte_level, tmp_path):
    folder = saved(tmp_path / "m", CAUSAL[name], byte_level, dtype=dtype, std=0.3)
    probe.load_tried_model(locate_model(str(folder)), dtype="auto")


@pytest.mark.filterwarnings("ignore:.*is_decoder")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(NOT_CAUSAL))
def test_models_that_see_what_comes_later_are_refused_however_little_they_do(name, dtype, byte_level, tmp_path):
    """Try attention that is hardly trained: it moves rows by less than half precision shows."""
    if name == "xlnet" and dtype == torch.bfloat16:
        pytest.skip("transformers' XLNet does not run in bfloat16")
    folder = saved(tmp_path / "m", NOT_CAUSAL[name], byte_level, dtype=dtype)
    assert ": not causal: changing a later token changes an earlier row" in refusal(folder)


@pytest.fixture
def llama(byte_level, tmp_path) -> Path:
    return saved(tmp_path / "llama", CAUSAL["llama"], byte_level, std=0.3)


def peek(hidden: torch.Tensor) -> torch.Tensor:
    """Shift tokens the wrong way: each row gets a little of the next one."""
    return hidden + 0.01 * hidden.roll(-1, dims=1)


def prefix(hidden: torch.Tensor) -> torch.Tensor:
    """Let the first five rows see each other, as in a prefix language model."""
    return torch.cat([hidden[:, :5] + hidden[:, :5].mean(dim=1, keepdim=True), hidden[:, 5:]], dim=1)


def chunk(hidden: torch.Tensor) -> torch.Tensor:
    """Let rows of a chunk of four see each other."""
    whole = hidden.shape[1] - hidden.shape[1] % 4
    parts = hidden[:, :whole].unflatten(1, (-1, 4))
    return torch.cat([(parts + parts.mean(dim=2, keepdim=True)).flatten(1, 2), hidden[:, whole:]], dim=1)


def batch_norm(hidden: torch.Tensor) -> torch.Tensor:
    return hidden / hidden[:, :1].std(dim=(0, 2), keepdim=True)


def capacity(hidden: torch.Tensor) -> torch.Tensor:
    """Route tokens to an expert that has room for 40 tokens of a batch."""
    flat = hidden.flatten(0, 1).clone()
    flat[40:] = 0
    return flat.view_as(hidden)


def by_length(hidden: torch.Tensor) -> torch.Tensor:
    return hidden / hidden.shape[1]


def beside(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.1 * hidden.roll(1, dims=0)


@pytest.mark.parametrize("change", [peek, prefix, chunk], ids=lambda f: f.__name__)
def test_rows_that_see_later_ones_in_any_way_are_refused(change, llama, monkeypatch):
    changed(monkeypatch, change)
    assert ": not causal" in refusal(llama)


@pytest.mark.parametrize("change", [batch_norm, capacity, by_length, beside], ids=lambda f: f.__name__)
def test_rows_that_depend_on_their_batch_are_refused(change, llama, monkeypatch):
    changed(monkeypatch, change)
    assert "depend on the other texts of its batch, or on its length" in refusal(llama)


def test_rows_that_padding_moves_are_refused(llama, monkeypatch):
    real = transformers.LlamaModel.forward

    def forward(self, input_ids=None, attention_mask=None, **rest):
        output = real(self, input_ids=input_ids, attention_mask=attention_mask, **rest)
        if attention_mask is not None:
            output.last_hidden_state = output.last_hidden_state * attention_mask.float().mean(dim=1)[:, None, None]
        return output

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    assert "padding behind a text changes its rows" in refusal(llama)


def changed(monkeypatch, change) -> None:
    """Change every Llama's hidden states."""
    real = transformers.LlamaModel.forward

    def forward(self, *arguments, **options):
        output = real(self, *arguments, **options)
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)


def test_exceptions_of_a_models_own_code_are_said_in_one_line(llama, monkeypatch):
    def fail(error: Exception):
        def forward(self, *arguments, **options):
            raise error

        monkeypatch.setattr(transformers.LlamaModel, "forward", forward)

    fail(KeyError("a\nb"))
    assert "its own code fails (KeyError: 'a\\nb')" in refusal(llama)
    fail(
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] data. DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert "out of memory; make batches smaller" in refusal(llama)
    fail(MemoryError())
    assert "out of memory; make batches smaller" in refusal(llama)


def test_what_was_tried_is_remembered_by_fingerprint_and_dtype(llama, monkeypatch):
    tried = []
    monkeypatch.setattr(probe, "check_model", lambda *arguments: tried.append(arguments))
    model = locate_model(str(llama))
    for dtype in ("auto", "auto", "bfloat16", "auto"):
        probe.load_tried_model(model, dtype=dtype)
    probe.try_models([(model, "auto"), (model, "bfloat16")])
    assert len(tried) == 2
    (fingerprints.find_cache_folder() / "fingerprints.json").unlink()
    probe.try_models([(model, "auto")])
    assert len(tried) == 3


def test_a_run_tries_every_model_before_it_reads_the_first(llama, byte_level, texts, tmp_path):
    bert = saved(tmp_path / "bert", NOT_CAUSAL["bert"], byte_level)
    rows = tiny_run.short(texts)
    for target, sources in ((llama, {"a": byte_level, "b": bert}), (bert, {"a": byte_level})):
        run = tiny_run.write(tmp_path, target=target, sources=sources, rows=rows)
        for command in ("run", "capture"):
            ended = fuselm(command, run)
            assert ended.code == 2 and ended.err.splitlines()[-1].startswith(f"fuselm: {bert}: not causal: ")
            assert "Traceback" not in ended.err and not (tmp_path / "out" / "capture").exists()


def test_a_model_alone_is_tried_before_it_is_scored(byte_level, tmp_path):
    bert = saved(tmp_path / "bert", NOT_CAUSAL["bert"], byte_level)
    corpus = tiny_run.write_rows(tmp_path / "texts.jsonl", [{"text": "one two three"}])
    ended = fuselm("evaluate", bert, "--texts", corpus)
    assert ended.code == 2 and ended.out == "" and ": not causal: " in ended.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_make_every_row_nan_are_refused(dtype, byte_level, tmp_path):
    folder = saved(tmp_path / "model", CAUSAL["llama"], byte_level)
    made = AutoModelForCausalLM.from_pretrained(folder)
    made.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    made.save_pretrained(folder)
    assert refusal(folder, dtype=dtype).endswith(
        "gives NaN for every token of a text; its weights are damaged; download the model again"
    )


def test_an_output_layer_smaller_than_the_configuration_says_is_refused(llama, monkeypatch):
    model = locate_model(str(llama))
    loaded = load_model(model)
    layer = forward.find_output_layer(loaded)
    wider = json.loads((llama / "config.json").read_text()) | {"vocab_size": ROWS}
    assert wider["vocab_size"] == len(layer.weight)
    with pytest.raises(ValueError, match=r"config.json says 999 rows of the output layer, and it has 613"):
        probe.check_model(replace(model, output_size=999), loaded, layer)


@pytest.mark.parametrize("asked", [False, True])
def test_a_loss_with_more_than_the_next_tokens_is_described(asked):
    config = transformers.MixtralConfig(
        **{**SIZES, "hidden_size": 32, "intermediate_size": 32},
        num_local_experts=4,
        num_key_value_heads=1,
        output_router_logits=asked,
        router_aux_loss_coef=0.1,
    )
    said = probe.describe_other_loss(AutoModelForCausalLM.from_config(config).eval())
    assert (said is not None) == asked and (not asked or "without what a router or other parts add" in said)


@pytest.mark.parametrize("name", list(CAUSAL))
def test_the_loss_of_other_models_is_that_of_the_next_tokens(name):
    assert probe.describe_other_loss(AutoModelForCausalLM.from_config(CAUSAL[name]).eval()) is None


def test_a_models_own_loss_that_fails_is_described_and_not_needed(monkeypatch):
    model = AutoModelForCausalLM.from_config(CAUSAL[next(iter(CAUSAL))]).eval()
    forward = model.forward

    def failing(*arguments, labels=None, **options):
        if labels is not None:
            raise ValueError("a batch of 0")
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", failing)
    expected = "its own loss fails (ValueError: a batch of 0); fuselm trains on its logits"
    assert probe.describe_other_loss(model) == expected
