"""Run TRL's GOLD trainer on fuselm's training documents, in the same order and for as many steps. For peers.py.

GOLD (`trl.experimental.gold`) runs the teacher in every step and pairs its tokens with the student's by bytes. Here it
trains off-policy (`lmbda=0`): the documents are the completions, each after the prompt of one token that fuselm
predicts position 0 from. Everything that is no loss is fuselm's: optimizer, schedule, precision, and which checkpoint
is kept. GOLD adds an end-of-text token to each document, and weighs documents alike, not tokens.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it is known to be experimental

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.utils import is_byte_level_tokenizer

from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import scoring
from fuselm.training import target_training


def train(
    loss: dict,
    target: Model,
    teacher: Model,
    vocabulary: Vocabulary,
    teacher_vocabulary: Vocabulary,
    reading: Sequence[Document],
    dev: Sequence[Document],
    out: Path,
    *,
    settings: target_training.TrainingSettings,
    on_step: Callable[[], None],
) -> dict:
    """Write the checkpoint that is best on the development split to `out/model`; return what was counted.

    `loss` is what GOLD is told of its loss; `reading`, the documents of all passes in training order.
    """
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(target.folder)
    # Its alignment by bytes raises NotImplementedError for others, such as Gemma's; what remains is pairs by position.
    extended = is_byte_level_tokenizer(load_tokenizer(teacher))
    prompt = tokenizer.convert_ids_to_tokens(target.context_token)
    steps = -(-len(reading) // settings.batch_documents)
    dev_steps = target_training.choose_dev_steps(steps, settings.passes * settings.evaluations_per_pass)
    scored: list[dict] = []

    class Steps(TrainerCallback):
        """Count steps, and keep the best checkpoint, as fuselm's own training does."""

        def on_step_end(self, args, state, control, model, **kwargs):
            on_step()
            if state.global_step not in dev_steps:
                return
            value = dev_bits_per_byte(model, target, vocabulary, dev)
            if value < min((s["bits_per_byte"] for s in scored), default=float("inf")):
                target_training.save_model_folder(model, model.state_dict(), target, out / "model")
            scored.append({"step": state.global_step, "bits_per_byte": value})

    trainer = GOLDTrainer(
        model=load_model(target, dtype="float32", device="cpu"),
        teacher_model=load_model(teacher, device="cpu"),
        args=_arguments(out, teacher, settings, steps, loss | {"use_extended_uld": extended}),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": d.text} for d in reading]),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)  # its own shuffles
    kept = _kept(trainer, {d.id: d for d in reading}.values(), vocabulary, teacher_vocabulary, extended)
    trainer.train()
    best = min(scored, key=lambda s: s["bits_per_byte"])
    return {"steps": steps, "best_step": best["step"], "dev_bits_per_byte": best["bits_per_byte"], **kept}


def dev_bits_per_byte(model, target: Model, vocabulary: Vocabulary, dev: Sequence[Document]) -> float:
    """Score the development split as fuselm's training does, under the precision of the training."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        scores = scoring.score_documents(model, forward.find_output_layer(model), vocabulary, target.context_token, dev)
    model.train()
    return scoring.compute_bits_per_byte(scores)["average"]


def _arguments(
    out: Path, teacher: Model, settings: target_training.TrainingSettings, steps: int, loss: dict
) -> GOLDConfig:
    same = target_training._build_arguments(out, settings, steps)
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm")
    return GOLDConfig(
        **{name: getattr(same, name) for name in (*names, "bf16", "use_cpu", "seed")},
        output_dir=str(out / "checkpoints"),
        num_train_epochs=1,  # the dataset holds all passes
        per_device_train_batch_size=settings.batch_documents,
        max_length=None,
        gradient_checkpointing=settings.gradient_checkpointing,
        teacher_tokenizer_name_or_path=str(teacher.folder),
        use_uld_loss=True,
        lmbda=0.0,
        **loss,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=False,
    )


def _kept(
    trainer: GOLDTrainer, documents: Sequence[Document], target: Vocabulary, teacher: Vocabulary, extended: bool
) -> dict:
    """Return the share of the text that its pairs of tokens use, by the bytes at which tokens end."""
    rows = {row["original_completion_text"]: row for row in trainer.train_dataset}
    tokens = informed = alone = same = 0
    for document in documents:
        ours, theirs = (_spans(vocabulary, document.text) for vocabulary in (target, teacher))
        shared = {end for _, end in ours} & {end for _, end in theirs}
        tokens += len(ours)
        if extended:  # tokens between two bytes where both tokenizers end one are a group, and give one distribution
            informed += len(shared)
            alone += sum(a in shared | {0} and b in shared for a, b in ours)
        else:  # the n-th token with the n-th, whatever they spell
            informed += min(len(ours), len(theirs))
            alone += sum(mine == other for mine, other in zip(ours, theirs, strict=False))
        row = rows[document.text]
        ids = row["input_ids"][row["completion_mask"].index(1) : -1]  # without the end-of-text token
        same += ids == target.segment(document.text).ids.tolist()
    strings = [set(t.get_vocab()) for t in (trainer.processing_class, trainer.teacher_tokenizer)]
    return {
        "use_extended_uld": extended,
        "documents_in_our_tokens": same / len(documents),
        "informed": informed / tokens,
        "alone": alone / tokens,  # share of the target's tokens that are paired as they are
        "shared_vocabulary": len(set.intersection(*strings)),
    }


def _spans(vocabulary: Vocabulary, text: str) -> list[tuple[int, int]]:
    starts = vocabulary.segment(text).starts.tolist()
    return list(zip(starts, [*starts[1:], len(text.encode())], strict=True))
