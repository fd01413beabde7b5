"""Compare what `auto` chooses with float32 and bfloat16, in seconds of work on one core, part by part.

    OMP_NUM_THREADS=1 python benchmarks/precision.py --json

Parts are those of `make demo` that multiply matrices: one batch that each source reads, and a step of training the
target. Each is measured on this machine as it is and as machines without bf16 instructions, which ONEDNN_MAX_CPU_ISA
imitates for oneDNN, the library that torch multiplies matrices with: AVX512_CORE (Intel's Skylake) and AVX2 (Haswell,
AMD's Zen 1 to 3; there torch itself then multiplies bfloat16, without vector instructions for it). Other kernels of
torch, element by element, are compiled for the real processor; they take no part in matrix products.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.models import forward, precision
from fuselm.models.loading import load_model, load_tokenizer, load_vocabulary
from fuselm.models.locating import Model, locate_model
from fuselm.sources import capture
from fuselm.sources.capture import LoadedSource
from fuselm.stores import retention
from fuselm.training.objective import fusion_loss
from fuselm.training.trainable import compute_loss_in_forward

ROOT = Path(__file__).parents[1]
MODELS = {
    "smollm2": ROOT / "models/smollm2-135m-instruct.gguf",
    "gemma": ROOT / "models/gemma-3-270m.gguf",
    "qwen": ROOT / "models/qwen2.5-coder-0.5b-instruct.gguf",
}
MACHINES = {"as it is": "", "without bf16, with AVX-512": "AVX512_CORE", "without AVX-512": "AVX2"}
TOKENS, WARM_UP = 128, 16
POLICY = retention.Policy(policy="sampled", draws=28)


def seconds_of(work: Callable[[int], object]) -> float:
    """Return the seconds that `work` on `TOKENS` tokens takes, after a short one that warms up."""
    work(WARM_UP)
    began = time.process_time()
    work(TOKENS)
    return time.process_time() - began


def text() -> str:
    lines = (ROOT / "examples/corpus/quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines[:3])


def read_batch(model: Model, dtype: str) -> float:
    """Return the seconds in which a source reads documents of `TOKENS` tokens, and keeps what a capture keeps."""
    vocabulary = load_vocabulary(model)
    loaded = load_model(model, dtype=dtype, device="cpu")
    source = LoadedSource(
        model=loaded,
        layer=forward.find_output_layer(loaded),
        vocabulary=vocabulary,
        context_token=model.context_token,
        context_length=model.context_length,
    )
    whole = vocabulary.segment(text())

    def work(tokens: int) -> None:
        cut = text().encode()[: whole.starts[tokens]].decode("utf-8", "ignore")
        document = Document(id="0", origin="0", domain="english", split="train", text=cut)
        segmentations = [vocabulary.segment(cut)]
        capture.read_batch(source, [document], segmentations, passages.put_each_alone([0]), policy=POLICY)

    return seconds_of(work)


def train_step(model: Model, chosen: str) -> float:
    """Return the seconds of a step on `TOKENS` tokens: forwards, backwards and AdamW."""
    loaded = load_model(model, dtype="float32", device="cpu").train()
    compute_loss_in_forward(loaded, forward.find_output_layer(loaded))
    ids = load_tokenizer(model).encode(text()).ids
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.0)

    def step(tokens: int) -> None:
        inputs, gold = torch.tensor([ids[:tokens]]), torch.tensor(ids[:tokens])

        def loss(hidden: torch.Tensor, layer: forward.OutputLayer) -> dict[str, torch.Tensor]:
            return {"loss": fusion_loss(hidden, layer, gold, None, 1.0).total}

        with torch.autocast("cpu", torch.bfloat16, enabled=chosen == "bf16"):
            result = loaded(input_ids=inputs, token_mask=torch.ones_like(inputs, dtype=torch.bool), loss_fn=loss)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds_of(step)


def measure() -> dict:
    """Return the parts of this process's machine."""
    parts, models = {}, {name: locate_model(str(path)) for name, path in MODELS.items()}
    for name, model in models.items():
        seconds = {dtype: read_batch(model, dtype) for dtype in ("bfloat16", "float32")}
        parts[f"{name} reads"] = seconds | {"auto": precision.choose_reading_dtype(model, device="cpu")}
    seconds = {chosen: train_step(models["smollm2"], chosen) for chosen in precision.TRAINING_PRECISIONS}
    parts["smollm2 is trained"] = seconds | {"auto": precision.choose_training_precision(device="cpu")}
    return {"products": precision.measure_speeds("cpu"), "parts": parts}


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(measure()))
        return
    results = {}
    for name, isa in MACHINES.items():
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa} if isa else dict(os.environ)
        command = [sys.executable, __file__, "--one"]
        ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(ended.stdout.splitlines()[-1])
    if "--json" in sys.argv:
        print(json.dumps(results, indent=1))
        return
    for name, found in results.items():
        for part, seconds in found["parts"].items():
            shown = ", ".join(f"{p} {s:.2f} s" for p, s in seconds.items() if p != "auto")
            ratio = seconds[seconds["auto"]] / seconds["float32"]
            print(f"{name}: {part}: {shown}; auto is {seconds['auto']}, {ratio:.2f} times float32")


if __name__ == "__main__":
    main()
