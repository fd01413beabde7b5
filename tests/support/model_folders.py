"""Make small model folders with random weights for tests of models, and read what refuses them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import fuselm

TEXT = "the cat sat on the mat in 2024, and then it sat in the sun; the sun sat on the cat\n" * 3
ROWS = 293  # of the output layer, a few more than the tokenizer has tokens


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Keep what is remembered apart for each test."""
    if "real" not in request.keywords:
        monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return a small byte-level tokenizer."""
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
    """Write a folder that no test changes."""
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    tiny_llama(seed=0).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """Return a copy of the folder for one test."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def tiny_llama(seed: int, **changes) -> LlamaForCausalLM:
    """Return a random Llama."""
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
    """Start Python with this code in a process of its own."""
    source = str(Path(fuselm.__file__).parents[1])
    settings = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE, text=True)
