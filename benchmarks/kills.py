"""kill -9 at random moments over one capture, which must end in the bytes of one that nothing happened to:
`python benchmarks/kills.py [--kills 200]`.

A tiny model with bytes for tokens reads the quickstart's corpus. It keeps a block of each batch, and its windows are
small, so that there is as much to interrupt as in a capture of days.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny_run
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fuselm import manifest
from fuselm.store import Store

CORPUS = Path(__file__).parents[1] / "examples" / "corpus" / "quickstart.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.kills)
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


def measure(folder: Path, kills: int) -> dict:
    run_file = run(folder)
    files = tiny_run.capture_watched(run_file, folder / "whole")
    began = time.monotonic()
    killed = tiny_run.kill(run_file, folder / "cut", kills=kills, files=files)
    seconds = time.monotonic() - began
    whole, cut = (next((folder / name / "capture").glob("tiny-*")) for name in ("whole", "cut"))
    whole_files = manifest.read(whole)["files"]
    (documents,) = tiny_run.captured(folder / "cut").values()
    return {
        "killed": killed,
        "seconds": seconds,
        "files_made_uninterrupted": files,
        "parts": len(whole_files) - 1,
        "documents": len(documents),
        "documents_twice": len(documents) - len(set(documents)),
        "documents_lost": len(set(Store(whole).documents) - set(documents)),
        "same_bytes": all((whole / name).read_bytes() == (cut / name).read_bytes() for name in whole_files),
        "verified": all(manifest.sha256(cut / n) == s for n, s in manifest.read(cut)["files"].items()),
    }


def run(folder: Path) -> Path:
    """A run file of the tiny model and the demo's corpus."""
    spelled = {string: n for n, string in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=spelled, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(spelled),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "tiny")
    rows = [json.loads(line) for line in CORPUS.read_text("utf-8").splitlines()]
    return tiny_run.write(
        folder,
        target=folder / "tiny",
        sources={"tiny": folder / "tiny"},
        rows=[{"domain": row["domain"], "text": row["text"]} for row in rows],
        corpus={"files": [str(folder / "corpus.jsonl")], "max_bytes": 256},
        capture={"batch_tokens": 256},
    )


if __name__ == "__main__":
    main()
