"""Train the target on fused distributions, by `transformers.Trainer` with the fusion loss and its batches.

The causal-LM baseline (`clm`) trains on the same documents without the distributions, as `train.clm` says. Both keep
the checkpoint with the fewest bits per byte on the development split. Wan et al. 2024, section 3.4.

Of several processes (`accelerate launch`, `torchrun`) each reads its share of the batches. The loss of a step is the
mean over the tokens of all, so one process that accumulates as many batches makes the same steps.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations import WandbCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fuselm.documents.document import Document
from fuselm.models import forward, probe
from fuselm.models.choices import DTYPES
from fuselm.models.loading import load_model
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Store
from fuselm.system import atomic_files, machine, processes, stopping
from fuselm.system.library_output import hide_library_output
from fuselm.system.progress import Progress
from fuselm.training import adapters, companions, needs, reload, sharded_checkpoints
from fuselm.training.batches import Batches, Collator
from fuselm.training.dropout import drop_what_layers_add
from fuselm.training.fusing import RowFusion
from fuselm.training.scalar_log import ScalarLog
from fuselm.training.trainable import compute_loss_in_forward
from fuselm.training.trainer import FusionTrainer, ProgressReport, TrainingSettings

SCHEDULES = {  # our names, and those of transformers, whose own `constant` has no warm-up
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "inverse_sqrt": "inverse_sqrt",
}
FUSING_WORKERS = 2  # read batches ahead where they align and fuse, if nothing else is asked for
LOGGED = 20_000  # rows of the history at most: each is the mean of as many steps as that takes
PREFETCHED = 4  # batches of each such process
LOSS = ("step", "loss", "clm_loss", "fusion_loss", "lambda", "learning_rate")  # of each step, in the history
SPEED = ("step", "seconds", "tokens_per_second", "data_wait", "memory_bytes")


def train_target(
    target: Model,
    vocabulary: Vocabulary,
    train_documents: Sequence[Document],
    dev_documents: Sequence[Document],
    out: Path,
    *,
    fused: Store | RowFusion | None,
    settings: TrainingSettings,
    progress: Progress,
    reader: str | None = None,
) -> dict:
    """Write the best checkpoint to `out/model`, an ordinary folder, and its history to `out/history.json`.

    Training resumes from the last whole checkpoint in `out/checkpoints`, also with another number of processes: its
    steps are those of the first start. `reader` is the name under which the documents have the target's token counts.
    Stores in `fused` forget the names of their documents, to save memory. Returns what was counted. All processes call
    this, and the first one writes.
    """
    checkpoints, ended = out / "checkpoints", out / ".ended.json"
    if ended.is_file():  # only the checkpoints are left to delete
        shutil.rmtree(checkpoints, ignore_errors=True)
        return json.loads(ended.read_text(encoding="utf-8"))
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    needs.check_trackers(settings.trackers)
    world = processes.world_size()
    batches_of_step = _fix_batches_of_step(out, world * settings.gradient_accumulation)
    dataset = Batches(
        train_documents,
        vocabulary,
        fused,
        passes=settings.passes,
        batch_documents=settings.batch_documents,
        pack_tokens=settings.pack_tokens,
        seed=settings.seed,
        processes=world,
        learn_context=settings.on == "all",
        batches_of_step=batches_of_step,
        reader=reader,
    )
    for store in () if fused is None else [fused] if isinstance(fused, Store) else fused.captured.values():
        store.forget_names()
    steps = dataset.count_steps()
    settings = replace(settings, gradient_accumulation=-(-batches_of_step // world))
    arguments = _build_arguments(out, settings, steps, workers=_choose_workers(settings, fused))
    checkpoint, step, over = _find_resume_point(out, steps, settings.patience)
    batches = Subset(dataset, range(dataset.count_slots(step))) if over else dataset
    arguments.device  # noqa: B018  starts the group of processes, and gives each its device
    arguments._n_gpu = min(arguments.n_gpu, 1)  # without a launcher only the first GPU is used, without DataParallel
    machine.use_free_cores()
    model = load_target(target, settings, progress)
    trainer = FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        eval_dataset=dev_documents,
        data_collator=Collator(target.context_token, packed=dataset.packed),
        callbacks=_build_trackers(out, settings, step),
        settings=settings,
        reader=(vocabulary, target.context_token),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    start = out / ".start.json"
    trainer.add_callback(
        ProgressReport(
            progress, choose_dev_steps(steps, settings.passes * settings.evaluations_per_pass), trainer, start
        )
    )
    if settings.average:
        trainer.start_averaging(first=max(round(steps * settings.average / settings.passes), 1))
    if settings.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    if checkpoint is not None:
        progress.note(f"reading the checkpoint of step {step}")
    try:
        with hide_library_output():  # of every checkpoint's shards
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.stop_reading()
        trainer.finish_saving()
        stopping.release()
    progress.stop()
    progress.note("writing the best model, and reading it again to check it")
    if "wandb" in settings.trackers and processes.rank() == 0:
        import wandb

        wandb.finish()

    state = trainer.state
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process gives its share
    if processes.rank() == 0:
        dev = [{"step": 0, **json.loads(start.read_text(encoding="utf-8"))}]
        dev += [{"step": r["step"], **r["eval_domains"]} for r in state.log_history if "eval_domains" in r]
        history = {
            "dev": dev,
            "log": _list_rows(state.log_history, LOSS),
            "speed": _list_rows(state.log_history, SPEED),
        }
        (out / "history.json").write_text(json.dumps(history, sort_keys=True))
        save_model_folder(trainer.accelerator.unwrap_model(trainer.model), weights, target, out / "model")
    _check_saved_folder(trainer, target, vocabulary, dev_documents, out / "model", settings)
    counts = {
        "steps": state.global_step,
        "planned_steps": steps,  # more than `steps` if patience ended the training
        "tokens": dataset.count_tokens(state.global_step * batches_of_step),
        "text_tokens": dataset.tokens_per_pass,
        "best_step": state.best_global_step,
        "dev_bits_per_byte": state.best_metric,
        "resumed_at_step": step,
    }
    if processes.rank() == 0:
        atomic_files.write_text(ended, json.dumps(counts))
        shutil.rmtree(checkpoints)
    return counts


def _fix_batches_of_step(out: Path, batches: int) -> int:
    """Return how many batches a step has: as many as at the first start, whatever processes there are now."""
    file = out / ".steps.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["batches"]
    if processes.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(file, json.dumps({"batches": batches}))
    return batches


def _choose_workers(settings: TrainingSettings, fused: Store | RowFusion | None) -> int:
    """Return how many processes read batches ahead."""
    if settings.loader_workers is not None:
        return settings.loader_workers
    return FUSING_WORKERS if isinstance(fused, RowFusion) else int(torch.cuda.is_available())


def _build_arguments(out: Path, settings: TrainingSettings, steps: int, *, workers: int = 0) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=1,  # the dataset holds all passes
        per_device_train_batch_size=1,  # ... in batches
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.lr_schedule],
        warmup_steps=settings.warmup if steps > 1 else 0,  # the first step of a warm-up changes nothing
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,  # as in the paper
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=steps + 1,  # ProgressReport says when
        save_strategy="steps",
        save_steps=steps + 1,
        save_total_limit=1,
        restore_callback_states_from_checkpoint=settings.patience is not None,
        load_best_model_at_end=True,
        metric_for_best_model="bits_per_byte",
        greater_is_better=False,
        logging_steps=-(-steps // LOGGED) or 1,
        disable_tqdm=True,
        report_to=[],
        run_name=out.name.removesuffix(".partial"),
        seed=settings.seed,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=PREFETCHED if workers else None,
        dataloader_multiprocessing_context="fork" if workers else None,  # they share the arrays of all documents
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def load_target(target: Model, settings: TrainingSettings, progress: Progress) -> torch.nn.Module:
    """Load the target for training: its forward computes the loss, and it has adapters if the settings ask for them."""
    if settings.quantize is not None:
        model = adapters.load_in_4_bits(target, precision=settings.precision)
        layer = forward.find_output_layer(model)
    else:
        device = "auto" if processes.world_size() == 1 else "cpu"  # of several processes the Trainer places each
        model, layer = probe.load_tried_model(target, dtype="float32", device=device)
    if layer.weight is None:
        progress.note(f"{target.name}: its logits are no linear map of its hidden states; the loss reads whole logits")
    if (beside := probe.describe_other_loss(model)) is not None:
        progress.note(f"{target.name}: {beside}")
    if settings.pack_tokens is not None and not forward.keeps_documents_apart(model):
        raise ValueError(f"train.pack_tokens: {target.name} mixes documents of one row; leave pack_tokens out")
    if settings.gradient_checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )  # newer and older names
        enable({"use_reentrant": False})
    compute_loss_in_forward(model, layer)
    if settings.dropout:
        drop_what_layers_add(model, settings.dropout)
    if settings.lora_rank is None:
        return model
    transformers.set_seed(settings.seed)  # adapters start from random numbers, and the Trainer seeds later
    return adapters.add_adapters(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha or 2.0 * settings.lora_rank,
        dropout=settings.lora_dropout or 0.0,
        modules=settings.lora_modules,
    )


def _build_trackers(out: Path, settings: TrainingSettings, step: int) -> list[TrainerCallback]:
    if processes.rank() > 0:
        return []
    result: list[TrainerCallback] = []
    if "tensorboard" in settings.trackers:
        result.append(ScalarLog(out / "logs", first=step + 1))
    if "wandb" in settings.trackers:
        result.append(WandbCallback())
    return result


def _find_resume_point(out: Path, steps: int, patience: int | None) -> tuple[Path | None, int, bool]:
    """Return the checkpoint to resume from, if there is one, its step, and whether `patience` ended training there.

    Raises:
        ValueError: If it was made for another number of steps, or the best checkpoint is gone.
    """
    checkpoint = find_last_checkpoint(out / "checkpoints")
    if checkpoint is None:
        return None, 0, False
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    if state["max_steps"] != steps:
        raise ValueError(
            f"{out}: begun by an earlier version with another number of processes, for which this is "
            f"{state['max_steps']} steps and not {steps}; resume with that number of processes, or delete {out}"
        )
    waited = state["stateful_callbacks"].get("EarlyStoppingCallback", {}).get("attributes", {})
    over = patience is not None and waited.get("early_stopping_patience_counter", 0) >= patience
    if state["best_global_step"] is None:  # stopped before the first score
        return checkpoint, state["global_step"], over
    best = checkpoint.with_name(f"checkpoint-{state['best_global_step']}")
    if find_last_checkpoint(out / "checkpoints", best.name) is None:
        raise ValueError(f"{best}: the best checkpoint so far is gone or damaged; delete {out} to train again")
    if state["best_model_checkpoint"] != str(best) and processes.rank() == 0:  # the folder was moved
        atomic_files.write_text(file, json.dumps(state | {"best_model_checkpoint": str(best)}))
    return checkpoint, state["global_step"], over


def find_last_checkpoint(folder: Path, name: str = "checkpoint-*") -> Path | None:
    """Return the latest checkpoint that was written whole, so that its trainer's state can be read."""
    for path in sorted(folder.glob(name), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if sharded_checkpoints.is_whole(path):
            return path
    return None


def _check_saved_folder(
    trainer: FusionTrainer,
    target: Model,
    vocabulary: Vocabulary,
    dev_documents: Sequence[Document],
    folder: Path,
    settings: TrainingSettings,
) -> None:
    """Raise `ValueError` unless the folder, loaded again, has the scores of the model in memory."""
    sample, dtype = reload.choose_sample(dev_documents, vocabulary), find_saved_dtype(target)
    allowed = reload.SAME
    if settings.lora_rank is None:
        reload.round_weights(trainer.model, dtype)
    elif settings.quantize is not None:
        allowed = reload.QUANTIZED
    elif dtype != torch.float32:
        allowed = reload.ROUNDED
    trained = trainer.score_documents(sample)
    if processes.rank() == 0:
        options = {"device": trainer.args.device, "autocast": trainer.accelerator.autocast()}
        loaded = reload.score_folder(folder, target, vocabulary, sample, **options)
        reload.compare_scores(f"train, {folder}", trained, loaded, sample, allowed)


def find_saved_dtype(target: Model) -> torch.dtype:
    """Return the target's own type of weights. A model trained from it is saved in this type."""
    config = transformers.AutoConfig.from_pretrained(target.folder, local_files_only=True, trust_remote_code=False)
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return getattr(torch, dtype) if dtype in DTYPES and dtype != "auto" else torch.float32


def save_model_folder(model: torch.nn.Module, weights: dict[str, torch.Tensor], target: Model, folder: Path) -> None:
    """Write an ordinary model folder: weights in the target's precision, its tokenizer files byte for byte."""
    dtype = find_saved_dtype(target)
    if isinstance(model, PreTrainedModel):
        product = load_model(target, dtype=str(dtype).removeprefix("torch."), device="cpu")
        product.load_state_dict(weights)
    else:
        with hide_library_output():
            model.save_pretrained(folder / ".adapters", state_dict=weights)
        product = adapters.merge_adapters(target, folder / ".adapters").to(dtype)
        shutil.rmtree(folder / ".adapters")
    with hide_library_output():
        product.save_pretrained(folder)
    companions.copy_companions(target.folder, folder)
    atomic_files.share_modes(folder)


def choose_dev_steps(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which the split is scored and a checkpoint written: evenly spaced, the last among them."""
    return {round(steps * (n + 1) / evaluations) for n in range(evaluations)} - {0}


def _list_rows(history: list[dict], names: Sequence[str]) -> list[dict]:
    return [{n: row[n] for n in names if n in row} for row in history if "loss" in row]
