"""Train by `transformers.Trainer` with the fusion loss, its terms in the log, and scores on the development split."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fuselm.documents.document import Document
from fuselm.models import forward
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import scoring
from fuselm.system import atomic_files, stopping
from fuselm.system.errors import name_model_errors
from fuselm.system.progress import Progress
from fuselm.training.averaging import Averaging
from fuselm.training.decay import decay_towards_start
from fuselm.training.loader_processes import BatchesAhead, name_worker_errors
from fuselm.training.objective import CONFIDENCES, Divergence, FusedRows, fusion_loss
from fuselm.training.sharded_checkpoints import ShardedCheckpoints
from fuselm.training.speed import SpeedCounts

TERMS = ("clm_loss", "fusion_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Hold how to train. The options of `train` in a run file describe each setting, and have its default."""

    lambda_clm: float
    lambda_final: float | None
    confidence: str
    divergence: str
    jsd_beta: float | None
    temperature: float
    tail: str
    learning_rate: float
    lr_schedule: str
    warmup: float
    passes: int
    average: float | Literal[False]
    batch_documents: int | None
    pack_tokens: int | None
    gradient_accumulation: int
    gradient_checkpointing: bool
    evaluations_per_pass: int
    patience: int | None
    weight_decay: float
    max_grad_norm: float
    precision: str
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    lora_modules: Sequence[str] | None
    quantize: str | None
    trackers: Sequence[str]
    seed: int
    on: str = "assistant"
    loader_workers: int | None = None
    label_smoothing: float = 0.0
    dropout: float = 0.0
    decay_towards: str = "zero"

    def build_divergence(self) -> Divergence:
        """Return the divergence that these settings name."""
        return Divergence(name=self.divergence, beta=self.jsd_beta or 0.5, temperature=self.temperature, tail=self.tail)


class FusionTrainer(Trainer):
    """Train a model whose forward computes the loss (trainable.py) by the objective on fused rows."""

    def __init__(self, *args, settings: TrainingSettings, reader: tuple[Vocabulary, int], **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole accumulated batch
        self.model_accepts_loss_kwargs = True  # the Trainer counts them only for models that say so
        self._settings = settings
        self._reader = reader
        self._unspelled: dict[str, int] | None = (
            None  # bytes of development documents that no token spells, counted once
        )
        self._terms = torch.zeros(len(TERMS))
        self._lambda = settings.lambda_clm
        self._averaging: Averaging | None = None
        self._speed = SpeedCounts()
        self._logged_step: int | None = None  # the last one
        self._ahead: BatchesAhead | None = None
        self._sharded = ShardedCheckpoints(self)

    def start_averaging(self, *, first: int) -> None:
        """Score and save the mean of the weights since step `first` in their place."""
        self._averaging = Averaging(first)
        self.add_callback(self._averaging)

    def create_optimizer(self, *arguments):
        optimizer = super().create_optimizer(*arguments)
        if self._settings.decay_towards == "start":
            decay_towards_start(optimizer)
        if self._averaging is not None:
            self._averaging.watch(optimizer)
        return optimizer

    def compute_lambda(self) -> float:
        """Return the weight of the causal-LM loss: constant, or linear from the first step to the last."""
        start, end = self._settings.lambda_clm, self._settings.lambda_final
        if end is None:
            return start
        return start + (end - start) * self.state.global_step / max(self.state.max_steps - 1, 1)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self._speed.begin()
        if self._logged_step is None:
            self._logged_step = self.state.global_step
        if self.args.dataloader_num_workers and self._ahead is None:
            self._ahead = BatchesAhead(epoch_iterator)
        with name_worker_errors():
            batches = self._speed.time_waits(self._ahead or epoch_iterator)
            return super().get_batch_samples(batches, num_batches, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._lambda, divergence = self.compute_lambda(), self._settings.build_divergence()
        count = num_items_in_batch / self.accelerator.num_processes  # the gradients of processes are averaged
        labels = inputs.pop("labels")
        del inputs["shift_labels"]
        token_mask = labels != -100
        fused = None
        if "fused_ids" in inputs:
            rows = {name: inputs.pop(f"fused_{name}") for name in ("ids", "logprobs", "tail")}
            fused = FusedRows(**rows)
        weights = self._lambda
        if fused is not None and self._settings.confidence != "none":
            weights = 1 - (1 - weights) * CONFIDENCES[self._settings.confidence](fused, labels[token_mask])

        def loss_fn(hidden, layer):
            smoothing = {"label_smoothing": self._settings.label_smoothing}
            loss = fusion_loss(hidden, layer, labels[token_mask], fused, weights, divergence, count=count, **smoothing)
            return {"loss": loss.total, "terms": torch.stack([loss.clm, loss.fusion])}

        result = model(**inputs, token_mask=token_mask, loss_fn=loss_fn)
        self._terms = self._terms.to(result["terms"].device) + result["terms"]
        return result["loss"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer and the schedule, and the model if its checkpoints are sharded."""
        if not self._sharded.is_used:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self._sharded.save(Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_checkpoint(self, *arguments) -> None:
        limit = self.args.save_total_limit
        if self._sharded.is_used:
            self.args.save_total_limit = None  # older ones are deleted when this one is whole
            folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)  # the Trainer looks for it before anything is in it
        try:
            super()._save_checkpoint(*arguments)
        finally:
            self.args.save_total_limit = limit

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written."""
        self._sharded.wait()

    def stop_reading(self) -> None:
        """Read no more batches ahead."""
        if self._ahead is not None:
            self._ahead.stop()

    def _load_best_model(self) -> None:
        self.finish_saving()
        super()._load_best_model()

    def training_step(self, model, *arguments, **options):
        with name_model_errors(self.accelerator.unwrap_model(model).name_or_path, "training"):
            return super().training_step(model, *arguments, **options)

    def log(self, logs, start_time=None):
        if "loss" in logs:  # steps are over, one or more
            counts = torch.tensor(self._speed.end(), device=self._terms.device)
            steps = self.state.global_step - (self._logged_step or 0)
            self._logged_step = self.state.global_step
            terms = (self.accelerator.reduce(torch.cat([self._terms, counts]), "mean") / max(steps, 1)).tolist()
            logs = {**logs, **dict(zip(TERMS, terms, strict=False)), "lambda": self._lambda}
            logs |= self._speed.describe(*terms[len(TERMS) :], processes=self.accelerator.num_processes)
            self._terms = torch.zeros(len(TERMS))
        super().log(logs, start_time)

    def score_documents(self, documents: Sequence[Document]) -> dict[str, float]:
        """Score documents, in bits; each process scores its share. The model trains afterwards as before."""
        model, (vocabulary, context_token) = self.model_wrapped, self._reader
        model.eval()
        before = _count_changes(model)

        def gold_logprobs(inputs, mask, kept, gold):
            def loss_fn(hidden, layer):
                return {"gold_logprobs": forward.compute_gold_logprobs(hidden, layer, gold)}

            return model(input_ids=inputs, attention_mask=mask, token_mask=kept, loss_fn=loss_fn)["gold_logprobs"]

        share = (self.accelerator.process_index, self.accelerator.num_processes)
        with torch.no_grad(), self.accelerator.autocast():
            bits = scoring.compute_document_bits(
                gold_logprobs, self.args.device, vocabulary, context_token, documents, share=share
            )
        everyones: dict[str, float] = {}
        for some in gather_object([bits]):
            everyones |= some
        model.train()
        if (
            _count_changes(model) != before
        ):  # RWKV divides weights in place to score, and multiplies them again to train
            inputs = torch.full((1, 2), context_token, device=self.args.device)
            mask = torch.ones_like(inputs)
            with torch.no_grad(), torch.random.fork_rng():
                model(
                    input_ids=inputs,
                    attention_mask=mask,
                    token_mask=mask.bool(),
                    loss_fn=lambda hidden, _: {"sum": hidden.sum()},
                )
        return everyones

    def score_dev_split(self) -> dict[str, float]:
        """Return the score on the development split, by domain and on average."""
        bits = self.score_documents(self.eval_dataset)
        if self._unspelled is None:
            self._unspelled = scoring.count_unspelled(self._reader[0], self.eval_dataset)
        return scoring.compute_bits_per_byte(scoring.sum_pieces(bits, self.eval_dataset, self._unspelled))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        try:
            domains = self.score_dev_split()
        except ValueError as error:
            raise ValueError(
                f"train, step {self.state.global_step}: {error}; lower train.learning_rate (it is "
                f"{self._settings.learning_rate:g})"
            ) from None
        metrics = {"eval_bits_per_byte": domains["average"], "eval_domains": domains}
        self.log({"eval_bits_per_byte": domains["average"]} | {f"eval_{d}": v for d, v in domains.items()})
        self.state.log_history[-1]["eval_domains"] = domains
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _count_changes(model: torch.nn.Module) -> list[int]:
    """Count how often each weight was changed in place."""
    return [weight._version for weight in model.parameters()]


class ProgressReport(TrainerCallback):
    """Say when to score and save, and show what happens."""

    def __init__(self, progress: Progress, steps: set[int], trainer: FusionTrainer, start: Path):
        self._progress = progress
        self._steps = steps
        self._trainer = trainer
        self._start = start
        self._shown = 0  # steps

    def on_train_begin(self, args, state, control, **kwargs):
        """Score the untrained target, unless an earlier attempt has, and begin to count."""
        stopping.note_resumption(f"training resumes after step {state.global_step}")
        if state.global_step == 0:
            self._progress.note("scoring the target on the development split first")
            domains = self._trainer.score_dev_split()
            if state.is_world_process_zero:
                atomic_files.write_text(self._start, json.dumps(domains))
        self._progress.start(state.max_steps, unit="steps", done=state.global_step)
        self._shown = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        stopping.hold()  # until the step is over, and what was learned can be kept

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = state.global_step in self._steps
        control.should_log |= state.global_step == state.max_steps
        if stopping.is_requested():
            self._progress.note(f"writing a checkpoint of step {state.global_step}, to resume from")
            control.should_save = True

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self._progress.note(f"step {state.global_step}: dev {metrics['eval_bits_per_byte']:.4f} bits/byte")

    def on_save(self, args, state, control, **kwargs):
        stopping.note_resumption(f"training resumes after step {state.global_step}")
        stopping.raise_if_requested()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self._progress.advance(state.global_step - self._shown, f"loss {logs['loss']:.3f}")
            self._shown = state.global_step
