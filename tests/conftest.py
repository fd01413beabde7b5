"""Provide what several test modules need: tiny models of each kind of tokenizer, texts, and the demo's models."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as a command does, before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches here are tiny

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# The same examples every time, however slow the machine.
hypothesis.settings.register_profile(
    "fuselm", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fuselm")

ROOT = Path(__file__).parents[1]
REAL = {
    "smollm2": ROOT / "models" / "smollm2-135m-instruct.gguf",
    "gemma3": ROOT / "models" / "gemma-3-270m.gguf",
    "qwen2.5": ROOT / "models" / "qwen2.5-coder-0.5b-instruct.gguf",
}


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache_apart(nothing_left_behind, request, tmp_path_factory, monkeypatch):
    """Keep tests out of the user's cache, except those on real models, which are converted once and kept there."""
    if "real" not in request.keywords:
        monkeypatch.setenv("FUSELM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


OURS = ("FUSELM_", "HF_HUB_", "TRANSFORMERS_", "TQDM_", "TOKENIZERS_", "COLUMNS", "SLURM_", "JOB_", "SHARD_LOG")
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "OMP_", "CUDA_", "PYTHONPATH")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that leaves this process another one: its variables, its folder, its place among shards."""
    before = describe_process()
    yield
    assert describe_process() == before


def describe_process() -> dict[str, object]:
    """Return what later tests, and the processes that they start, would take over; libraries set more when imported."""
    from fuselm.system import processes, stopping

    variables = {name: value for name, value in os.environ.items() if name.startswith(OURS + OF_LAUNCHERS)}
    return {"folder": os.getcwd(), "shard": processes._shard, "signal": stopping._requested} | variables


@pytest.fixture(scope="session")
def quickstart() -> list[dict[str, str]]:
    """Return the demo's corpus: rows with `domain` and `text`."""
    lines = (ROOT / "examples" / "corpus" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def texts(quickstart) -> list[dict[str, str]]:
    """Return the beginnings of five documents of each domain."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in quickstart:
        rows.setdefault(row["domain"], []).append({"domain": row["domain"], "text": row["text"][:307]})
    return [row for of_domain in rows.values() for row in of_domain[:5]]


@pytest.fixture(scope="session")
def training_texts(quickstart) -> list[str]:
    return [row["text"] for row in quickstart[::7]]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory, training_texts) -> Path:
    """Write a Llama with byte-level BPE: digits apart, an end-of-text token, no BOS, 41 rows more than tokens."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts, trainer)
    return saved(
        tmp_path_factory.mktemp("models") / "byte_level",
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            vocab_size=tokenizer.get_vocab_size() + 41,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=0,
        ),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"),
    )


@pytest.fixture(scope="session")
def sentence_piece(tmp_path_factory, training_texts) -> Path:
    """Write a Gemma 3 with SentencePiece BPE as in Llama 2: byte fallback, a space before the text, BOS."""
    learned = Tokenizer(kinds.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=244, limit_alphabet=61, show_progress=False)
    learned.train_from_iterator(training_texts, trainer)
    model = json.loads(learned.to_str())["model"]
    strings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        kinds.BPE(
            vocab={string: i for i, string in enumerate(strings)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return saved(
        tmp_path_factory.mktemp("models") / "sentence_piece",
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES,
            vocab_size=tokenizer.get_vocab_size(),
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    )


@pytest.fixture(scope="session")
def word_piece(tmp_path_factory, training_texts) -> Path:
    """Write a GPT-2 with lower-casing WordPiece as in BERT, and [CLS] as its BOS."""
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(training_texts, trainer)
    return saved(
        tmp_path_factory.mktemp("models") / "word_piece",
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size() + 9,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            initializer_range=0.4,
            bos_token_id=2,
            eos_token_id=3,
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
        ),
    )


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # so that distributions are far from uniform
    "tie_word_embeddings": False,
}


def saved(folder: Path, architecture: type[PreTrainedModel], config, tokenizer: PreTrainedTokenizerFast) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(len(architecture.__name__))
        architecture(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_models() -> dict[str, Path]:
    """Return the demo's models by short name, as GGUF files; `locate_model` converts them at first use."""
    missing = [path.name for path in REAL.values() if not path.is_file()]
    if missing:
        pytest.skip(f"models/{missing[0]} is not there; `make models` fetches the real models")
    return REAL
