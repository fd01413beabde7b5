"""Test reload.py: it refuses a folder that does not hold what was trained, and no other."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from training_settings import make_settings
from transformers import AutoModelForCausalLM

from fuselm.documents.corpus import Document
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.progress import Progress
from fuselm.training import reload, target_training

ROWS = 641
SETTINGS = make_settings(
    learning_rate=3e-3,
    lambda_clm=1.0,
    passes=1,
    batch_documents=5,
    evaluations_per_pass=1,
    warmup=0.1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    precision="float32",
    trackers=(),
    seed=0,
)
SIZES = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 0}
LLAMA = {**SIZES, "intermediate_size": 37, "num_attention_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "rwkv": transformers.RwkvConfig(
        **{**SIZES, "num_hidden_layers": 5}, attention_hidden_size=32, rescale_every=2, context_length=512
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def documents(texts) -> list[Document]:
    splits = ["dev" if n % 5 == 4 else "train" for n in range(20)]
    rows = zip(splits, texts, strict=False)
    return [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain=row["domain"], split=split, text=row["text"][:79])
        for n, (split, row) in enumerate(rows)
    ]


def target(folder: Path, name: str, tokenizer: Path, dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        for parameter in made.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    made.to(dtype).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, folder / path.name)
    return locate_model(str(folder))


def train(model: Model, documents: list[Document], out: Path, **changes) -> dict:
    console = Console(file=io.StringIO())
    return target_training.train_target(
        model,
        Vocabulary(load_tokenizer(model), model.output_size),
        [d for d in documents if d.split == "train"],
        [d for d in documents if d.split == "dev"],
        out,
        fused=None,
        settings=replace(SETTINGS, **changes),
        progress=Progress(console, "train"),
    )


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"precision": "bf16"}),
        (torch.bfloat16, {"average": 0.5}),
    ],
    ids=["float32", "bfloat16", "averaged"],
)
def test_a_folder_that_holds_what_was_trained_is_finished(name, dtype, changes, byte_level, documents, tmp_path):
    train(target(tmp_path / "target", name, byte_level, dtype), documents, tmp_path / "out", **changes)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_adapters_are_finished(dtype, byte_level, documents, tmp_path):
    model = target(tmp_path / "target", "llama", byte_level, dtype)
    train(model, documents, tmp_path / "out", lora_rank=3, lora_alpha=6.0)


@pytest.mark.parametrize("name", ["rwkv", "llama"])
def test_a_training_that_learns_nothing_saves_the_target(name, byte_level, documents, tmp_path):
    """Try RWKV, which divides the weights of deep layers to score; saved so, they were divided again once loaded."""
    model = target(tmp_path / "target", name, byte_level)
    train(model, documents, tmp_path / "out", learning_rate=1e-12, evaluations_per_pass=2)
    before, after = (load_file(f / "model.safetensors") for f in (model.folder, tmp_path / "out" / "model"))
    for weight in before:
        torch.testing.assert_close(after[weight], before[weight], rtol=1e-6, atol=1e-9)


def halved(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"] /= 2


def swapped(weights: dict[str, torch.Tensor]) -> None:
    first, second = (f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1))
    weights[first], weights[second] = weights[second], weights[first]


def untrained(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones_like(weights["model.norm.weight"])


def turned(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)


@pytest.mark.parametrize("damage", [halved, swapped, untrained, turned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_that_holds_something_else_is_not_finished(
    damage, dtype, byte_level, documents, tmp_path, monkeypatch
):
    real = target_training.save_model_folder

    def save_folder(model, weights, model_target, folder):
        real(model, weights, model_target, folder)
        saved = load_file(folder / "model.safetensors")
        damage(saved)
        save_file(
            {k: v.contiguous() for k, v in saved.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )

    monkeypatch.setattr(target_training, "save_model_folder", save_folder)
    model = target(tmp_path / "target", "llama", byte_level, dtype)
    with pytest.raises(ValueError) as caught:
        train(model, documents, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "loaded again, the trained model scores" in str(caught.value)
    assert "so the folder does not hold what was trained" in str(caught.value)
    assert not (tmp_path / "out" / ".ended.json").exists()
    monkeypatch.setattr(target_training, "save_model_folder", real)  # fixed, the same training resumes and ends
    assert train(model, documents, tmp_path / "out")["resumed_at_step"] > 0


@pytest.mark.parametrize("lengths", [[1], [5000, 3], [300] * 9, [1] * 3])
def test_a_sample_is_at_most_a_batch_and_at_least_a_document(lengths, byte_level):
    vocabulary = Vocabulary(load_tokenizer(byte_level), ROWS)
    documents = [
        Document(id=f"{n}", origin=f"{n}", domain="d", split="dev", text="7" * length)
        for n, length in enumerate(lengths)
    ]
    sample = reload.choose_sample(documents, vocabulary)
    tokens = sum(vocabulary.count_tokens([d.text for d in sample]))
    assert sample == documents[: len(sample)] and sample
    assert tokens <= reload.SAMPLE_TOKENS or len(sample) == 1
