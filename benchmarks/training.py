"""Measure a fused training step: time and peak memory beside causal-LM training and a dense teacher.

    python benchmarks/training.py --json

Each model's step is made in three ways, with the same weights (float32, bf16 autocast), tokens and optimizer:

- `plain`: `model(input_ids, labels=labels).loss.backward()`, as transformers trains a causal language model;
- `fused`: fuselm's step, on rows of 64 entries and a tail, lambda 0.5;
- `dense`: the paper's, on the same rows: logits of the whole batch, a teacher of [batch, length, vocab] in float32,
  `kl_div`, and the cross-entropy.

Times are of the same process, a round of the three after the other, medians; peak memory is each way's in a process of
its own, over what the process had with the model loaded. Bars: fused / plain at most 1.05 in time and 1 in memory.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from fuselm.models import forward
from fuselm.models.loading import load_model
from fuselm.models.locating import locate_model
from fuselm.training.objective import FusedRows, fusion_loss
from fuselm.training.trainable import compute_loss_in_forward

MODELS = {"smollm2": "smollm2-135m-instruct.gguf", "gemma": "gemma-3-270m.gguf"}
WAYS = ("plain", "fused", "dense")
TOP_K, LAMBDA = 64, 0.5


class Trial:
    """Hold a model, a batch of random tokens with fused rows, and an optimizer."""

    def __init__(self, path: Path, *, batch: int, length: int):
        torch.manual_seed(0)
        self.model = load_model(locate_model(str(path)), dtype="float32")
        self.logits = self.model.forward
        compute_loss_in_forward(self.model, forward.find_output_layer(self.model))
        self.model.train()
        vocab = self.model.config.get_text_config().vocab_size
        device = self.model.device
        self.ids = torch.randint(vocab, (batch, length), device=device)
        self.labels = torch.randint(vocab, (batch, length), device=device)
        rows = batch * length
        self.top = torch.stack([torch.randperm(vocab, device=device)[:TOP_K] for _ in range(rows)])
        shares = torch.rand(rows, TOP_K + 1, device=device).pow(4).double()
        shares /= shares.sum(1, keepdim=True)
        self.logprobs, self.tail = shares[:, :-1].log().float(), shares[:, -1].float()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self, way: str) -> float:
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss = getattr(self, way)()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def plain(self) -> Tensor:
        return self.logits(input_ids=self.ids, labels=self.labels, shift_labels=self.labels, use_cache=False).loss

    def fused(self) -> Tensor:
        rows = FusedRows(ids=self.top, logprobs=self.logprobs, tail=self.tail)

        def loss_fn(hidden: Tensor, layer: forward.OutputLayer) -> dict[str, Tensor]:
            loss = fusion_loss(hidden, layer, self.labels.flatten(), rows, LAMBDA, count=float(len(hidden)))
            return {"loss": loss.total}

        return self.model(input_ids=self.ids, token_mask=torch.ones_like(self.ids, dtype=torch.bool), loss_fn=loss_fn)[
            "loss"
        ]

    def dense(self) -> Tensor:
        logits = self.logits(input_ids=self.ids, use_cache=False).logits.float()
        teacher = torch.zeros_like(logits).flatten(0, 1).scatter_(1, self.top, self.logprobs.exp())
        logprobs = torch.log_softmax(logits, dim=-1).flatten(0, 1)
        clm = torch.nn.functional.nll_loss(logprobs, self.labels.flatten())
        return LAMBDA * clm + (1 - LAMBDA) * torch.nn.functional.kl_div(logprobs, teacher, reduction="batchmean")


def resident() -> int:
    """Return the bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_memory(trial: Trial, way: str) -> int:
    """Return the bytes that the second step adds; the first one allocates the optimizer's state."""
    trial.step(way)
    if trial.model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trial.step(way)
        return torch.cuda.max_memory_allocated() - before
    before, peak, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    trial.step(way)
    over.set()
    watcher.join()
    return peak[0] - before


def measure(name: str, path: Path, options: argparse.Namespace) -> dict:
    trial = Trial(path, batch=options.batch, length=options.length)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = {way: trial.step(way) for way in WAYS}  # also warms up
    assert all(math.isfinite(loss) for loss in losses.values())
    for _ in range(options.runs):
        for way in WAYS:
            began = time.perf_counter()
            trial.step(way)
            seconds[way].append(time.perf_counter() - began)
    del trial
    memory = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--models", str(path.parent), "--memory", name, way]
        command += ["--batch", str(options.batch), "--length", str(options.length)]
        memory[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result: dict = {
        way: {
            "seconds": round(statistics.median(seconds[way]), 3),
            "all_seconds": [round(s, 3) for s in seconds[way]],
            "peak_mib": round(memory[way] / 2**20),
        }
        for way in WAYS
    }
    for way in ("fused", "dense"):
        of_rounds = [mine / plain for mine, plain in zip(seconds[way], seconds["plain"], strict=True)]
        result[way] |= {
            "time_of_plain": round(statistics.median(of_rounds), 3),
            "memory_of_plain": round(memory[way] / memory["plain"], 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the demo's GGUF files")
    parser.add_argument("--only", choices=MODELS, action="append", help="one of the models")
    parser.add_argument("--runs", type=int, default=3, help="rounds of each way")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        name, way = options.memory
        trial = Trial(options.models / MODELS[name], batch=options.batch, length=options.length)
        print(peak_memory(trial, way))
        return
    results = {name: measure(name, options.models / MODELS[name], options) for name in options.only or MODELS}
    report = {"batch": options.batch, "length": options.length, "threads": torch.get_num_threads(), "models": results}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, ways in results.items():
        for way, row in ways.items():
            ratios = (
                f"  {row['time_of_plain']:.2f} x time, {row['memory_of_plain']:.2f} x memory" if way != "plain" else ""
            )
            print(f"{name:8s} {way:6s} {row['seconds']:8.2f} s {row['peak_mib']:7,d} MiB{ratios}")


if __name__ == "__main__":
    main()
