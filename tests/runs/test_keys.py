"""Pin the keys of a whole run: people keep captures for years, so the same recipe must find the same folder.

The models are written here byte by byte, so that no library's version is in their fingerprints.
"""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from rich.console import Console

from fuselm.models.token_strings import build_byte_alphabet
from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline

HIDDEN, LAYERS, MIDDLE, VOCABULARY = 8, 1, 16, 257


def write_model(folder: Path, seed: int) -> Path:
    """Write a Llama with one token a byte: config.json, safetensors and tokenizer.json, each byte given here."""
    folder.mkdir(parents=True)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 256,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        **{f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (MIDDLE, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (MIDDLE, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, MIDDLE),
        "model.norm.weight": (HIDDEN,),
    }
    header, data = {}, b""
    for number, (name, shape) in enumerate(shapes.items()):
        count = int(np.prod(shape))
        values = np.sin(np.arange(count) * 12.9898 + 78.233 * (seed + number)).round(3).astype("<f4")
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + 4 * count]}
        data += values.tobytes()
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 256, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    letters = {letter: byte for letter, byte in sorted(build_byte_alphabet().items(), key=lambda item: item[1])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end | {"normalized": False, "special": True}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": letters | {"<|endoftext|>": 256}, "merges": []},
    }
    for part in ("truncation", "padding", "normalizer", "post_processor"):
        tokenizer[part] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


OPTIONS = {
    "defaults": {"capture": {}, "train": {"precision": "bf16"}},
    "span": {"capture": {}, "align": {"method": "span"}, "train": {"precision": "bf16"}},  # the default of before
    "options": {
        "capture": {"policy": "threshold", "top_k": 7, "threshold": 0.01, "prefix_tokens": 0},
        "align": {"method": "mined"},
        "fuse": {"function": "min_ce", "level": "document"},
        "write": {"ratio": {"other": 0.5}, "tokens": 50, "prompt_tokens": 20},
        "train": {"precision": "float32", "passes": 1, "pack_tokens": 128},
    },
}
KEYS = {
    "defaults": [
        "corpus/ef020358b8dbe003",
        "capture/own-40d131268d7c2bd6",
        "capture/other-0d9c44716a036a3a",
        "align/own-206b94a731a46fc9",
        "align/other-e9fd13733ef4957d",
        "fuse/3667602b92b86982",
        "train/clm-beaf471950cb4fe5",
        "train/fused-a8a9a5c3d28d8229",
        "evaluate/base-8a52364cd8521d35",
        "evaluate/other-988a799fd8071cf7",
        "evaluate/clm-520a376a700ffc6f",
        "evaluate/fused-9e7fedee874d801f",
    ],
    "span": [
        "corpus/ef020358b8dbe003",
        "capture/own-40d131268d7c2bd6",
        "capture/other-0d9c44716a036a3a",
        "align/own-076a8482848f1782",
        "align/other-a30d607a5571b91f",
        "fuse/62fc3c76566ba7c5",
        "train/clm-beaf471950cb4fe5",
        "train/fused-971395d65c6ca948",
        "evaluate/base-8a52364cd8521d35",
        "evaluate/other-988a799fd8071cf7",
        "evaluate/clm-520a376a700ffc6f",
        "evaluate/fused-ee0fa4f1005ef5e3",
    ],
    "options": [
        "corpus/ef020358b8dbe003",
        "write/other-6a58b9843da1068d",
        "capture/own-9adfb12cdf9a05ae",
        "capture/other-ae6e0af55ee3a913",
        "align/own-38e6b6285f5d7407",
        "align/other-2b1780fabe76b901",
        "fuse/0fef1874a19544ca",
        "train/clm-ea8295cfabb8a4d4",
        "train/fused-27c7f85793752060",
        "evaluate/base-8a52364cd8521d35",
        "evaluate/other-988a799fd8071cf7",
        "evaluate/clm-e1b0ae847cabf63f",
        "evaluate/fused-5de47b8e16ea03d1",
    ],
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_same_recipe_finds_the_folders_of_before(tmp_path, name):
    models = {n: write_model(tmp_path / n, seed) for seed, n in enumerate(("target", "other"))}
    rows = [{"domain": f"d{n % 2}", "text": f"Text number {n} of this corpus. " * 3} for n in range(12)]
    run_file = tiny_run.write(
        tmp_path / "run",
        target=models["target"],
        sources={"own": models["target"], "other": models["other"]},
        rows=rows,
        **OPTIONS[name],
    )
    pipeline = Pipeline(config.load(run_file, []), Console(file=io.StringIO()))
    made = [str(step.folder.relative_to(pipeline.folder)) for step in pipeline.dry_run()]
    assert made == KEYS[name]
