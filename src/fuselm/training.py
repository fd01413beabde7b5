"""Continual training of the target on fused distributions, by `transformers.Trainer` with our loss and collator.

The causal-LM baseline (`clm`) is the same training without the distributions: same tokens, same order, same steps.
Either keeps the checkpoint with the fewest bits per byte on the development split. Wan et al. 2024, section 3.4.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fuselm import evaluation, forward, manifest
from fuselm.corpus import Document
from fuselm.models import Model, load_model
from fuselm.objective import FusedRows, fusion_loss
from fuselm.progress import Progress
from fuselm.store import Store
from fuselm.vocabulary import Vocabulary

WINDOW = 8  # batches whose documents are grouped by length


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train; `config.Train` has the same options with their meaning."""

    learning_rate: float
    lambda_clm: float
    lambda_final: float | None
    passes: int
    batch_documents: int
    gradient_accumulation: int
    evaluations_per_pass: int
    warmup: float
    weight_decay: float
    max_grad_norm: float
    precision: str
    seed: int


def train(
    target: Model,
    vocabulary: Vocabulary,
    train_documents: Sequence[Document],
    dev_documents: Sequence[Document],
    out: Path,
    *,
    fused: Store | None,
    settings: Settings,
    progress: Progress,
) -> dict:
    """Write the best checkpoint to `out/model`, an ordinary folder, and its history to `out/history.json`.

    Goes on from the last whole checkpoint in `out/checkpoints`. Returns what was counted.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("train: started in several processes, which this version does not support; start it in one")
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    checkpoint = last_checkpoint(out / "checkpoints")
    model = load_model(target, dtype="float32" if settings.precision == "bf16" else settings.precision)
    dataset = _Passes(train_documents, vocabulary, fused, settings)
    steps = _steps(len(dataset), settings)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=1,  # the dataset holds all passes
        per_device_train_batch_size=settings.batch_documents,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,  # as the paper
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=steps + 1,  # _Report says when
        save_strategy="steps",
        save_steps=steps + 1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="bits_per_byte",
        greater_is_better=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] if checkpoint else 0
    trainer = _FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dev_documents,
        data_collator=_Collator(target.context_token),
        callbacks=[TensorBoardCallback(SummaryWriter(str(out / "logs"), purge_step=step or None))],
        settings=settings,
        score_dev=lambda m: evaluation.score(
            m, forward.output_layer(m), vocabulary, target.context_token, dev_documents
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    progress.start(steps, unit="steps", done=step)
    if not checkpoint:
        manifest.write_text(out / ".start.json", json.dumps(trainer.dev_bits_per_byte()))
    trainer.add_callback(_Report(progress, dev_steps(steps, settings.passes * settings.evaluations_per_pass)))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    state = trainer.state
    dev = [{"step": 0, **json.loads((out / ".start.json").read_text())}]
    dev += [{"step": r["step"], **r["eval_domains"]} for r in state.log_history if "eval_domains" in r]
    (out / "history.json").write_text(json.dumps({"dev": dev, "log": _loss_rows(state.log_history)}, sort_keys=True))
    save_folder(trainer.model, target, out / "model")
    shutil.rmtree(out / "checkpoints")
    return {
        "steps": state.global_step,
        "tokens": settings.passes * dataset.tokens,
        "best_step": state.best_global_step,
        "dev_bits_per_byte": state.best_metric,
        "resumed_at_step": step,
    }


def _steps(items: int, settings: Settings) -> int:
    batches = -(-items // settings.batch_documents)
    return -(-batches // settings.gradient_accumulation)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written whole: its last file, the trainer's state, is there and readable."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return path
    return None


def save_folder(model: torch.nn.Module, target: Model, folder: Path) -> None:
    """An ordinary model folder: weights in the target's precision, its tokenizer files byte for byte."""
    dtype = getattr(transformers.AutoConfig.from_pretrained(target.folder), "dtype", None) or torch.float32
    model.to(dtype).save_pretrained(folder)
    for path in sorted(target.folder.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def reading_order(lengths: Sequence[int], *, passes: int, batch: int, seed: int) -> list[int]:
    """Indices of all passes in training order: each pass shuffled, then documents of like length put into one batch."""
    stream: list[int] = []
    for n in range(passes):
        stream.extend(random.Random(f"{seed} {n}").sample(range(len(lengths)), len(lengths)))
    order: list[int] = []
    for begin in range(0, len(stream), WINDOW * batch):
        window = sorted(stream[begin : begin + WINDOW * batch], key=lambda i: lengths[i])
        batches = [window[k : k + batch] for k in range(0, len(window), batch)]
        whole, rest = [b for b in batches if len(b) == batch], [b for b in batches if len(b) < batch]
        random.Random(f"{seed} {begin}").shuffle(whole)
        order.extend(i for b in whole + rest for i in b)
    return order


def dev_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the development split is scored and a checkpoint written: even, and the last."""
    return {round(steps * (n + 1) / evaluations) for n in range(evaluations)} - {0}


class _Passes(torch.utils.data.Dataset):
    """The training documents of all passes, in order, each with its fused rows if there are any."""

    def __init__(
        self, documents: Sequence[Document], vocabulary: Vocabulary, fused: Store | None, settings: Settings
    ) -> None:
        self._documents = documents
        self._ids = [vocabulary.segment(d.text).ids for d in documents]
        self._fused = fused
        self.tokens = sum(map(len, self._ids))
        self._order = reading_order(
            list(map(len, self._ids)), passes=settings.passes, batch=settings.batch_documents, seed=settings.seed
        )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        i = self._order[index]
        if self._fused is None:
            return {"tokens": self._ids[i]}
        trace = self._fused.read(self._documents[i].id)
        if not np.array_equal(trace.tokens, self._ids[i]):
            raise ValueError(
                f"{self._fused.folder}: document {trace.document}: other tokens than the target's; fuse again"
            )
        return {"tokens": self._ids[i], "distributions": trace.distributions}


class _Collator:
    """Documents to one padded batch; rows of all documents' tokens, flat, for the loss."""

    def __init__(self, context_token: int):
        self._context_token = context_token

    def __call__(self, items: list[dict]) -> dict:
        inputs, mask = forward.pad([item["tokens"] for item in items], self._context_token)
        labels = torch.full_like(inputs, -100)
        labels[mask.bool()] = torch.as_tensor(np.concatenate([item["tokens"] for item in items]), dtype=torch.long)
        batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels, "shift_labels": labels}
        if "distributions" in items[0]:
            batch |= _pad_rows([item["distributions"] for item in items])
        return batch


def _pad_rows(distributions: Sequence) -> dict[str, torch.Tensor]:
    counts = np.concatenate([d.counts for d in distributions])
    real = np.arange(counts.max(initial=1)) < counts[:, None]
    ids = np.zeros(real.shape, np.int64)
    logprobs = np.full(real.shape, -np.inf, np.float32)
    ids[real] = np.concatenate([d.ids for d in distributions])
    logprobs[real] = np.concatenate([d.logprobs for d in distributions])
    tail = np.concatenate([d.tail for d in distributions])
    return {
        "fused_ids": torch.from_numpy(ids),
        "fused_logprobs": torch.from_numpy(logprobs),
        "fused_tail": torch.from_numpy(tail),
    }


class _FusionTrainer(Trainer):
    def __init__(self, *args, settings: Settings, score_dev: Callable, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole accumulated batch
        self.model_accepts_loss_kwargs = True  # ... which the Trainer counts only for models that say so
        self._settings = settings
        self._score_dev = score_dev
        self._layer = forward.output_layer(self.model)
        self._terms = {"clm_loss": 0.0, "fusion_loss": 0.0}
        self._lambda = settings.lambda_clm

    def lambda_now(self) -> float:
        """Constant, or linear from the first step to the last."""
        start, end = self._settings.lambda_clm, self._settings.lambda_final
        if end is None:
            return start
        return start + (end - start) * self.state.global_step / max(self.state.max_steps - 1, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["attention_mask"].bool()
        fused = None
        if "fused_ids" in inputs:
            fused = FusedRows(ids=inputs["fused_ids"], logprobs=inputs["fused_logprobs"], tail=inputs["fused_tail"])
        self._lambda = self.lambda_now()
        with self.accelerator.autocast():  # the Trainer leaves it to model.forward, which isn't what is called
            hidden = forward.hidden_states(model, self._layer, inputs["input_ids"], inputs["attention_mask"])[mask]
            loss = fusion_loss(hidden, self._layer, inputs["labels"][mask], fused, self._lambda)
        self._terms["clm_loss"] += float(loss.clm / num_items_in_batch)
        self._terms["fusion_loss"] += float(loss.fusion / num_items_in_batch)
        return loss.total / num_items_in_batch

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self._terms, "lambda": self._lambda}  # of the step that is over
            self._terms = dict.fromkeys(self._terms, 0.0)
        super().log(logs, start_time)

    def dev_bits_per_byte(self) -> dict[str, float]:
        self.model.eval()
        with self.accelerator.autocast():
            return evaluation.bits_per_byte(self._score_dev(self.model))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        domains = self.dev_bits_per_byte()
        metrics = {"eval_bits_per_byte": domains["average"], "eval_domains": domains}
        self.log({"eval_bits_per_byte": domains["average"]} | {f"eval_{d}": v for d, v in domains.items()})
        self.state.log_history[-1]["eval_domains"] = domains
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Report(TrainerCallback):
    """Says when to score and save; tells the progress what happens."""

    def __init__(self, progress: Progress, steps: set[int]):
        self._progress = progress
        self._steps = steps
        self._dev = ""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = state.global_step in self._steps

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self._dev = f"dev {metrics['eval_bits_per_byte']:.4f} bits/byte"
        self._progress.note(f"step {state.global_step}: {self._dev}")

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self._progress.advance(1, f"loss {logs['loss']:.3f}" + (f", {self._dev}" if self._dev else ""))


def _loss_rows(history: list[dict]) -> list[dict]:
    names = ("step", "loss", "clm_loss", "fusion_loss", "lambda", "learning_rate")
    return [{n: row[n] for n in names if n in row} for row in history if "loss" in row]
