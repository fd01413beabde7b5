"""Train a model on a store of fused distributions with plain `transformers.Trainer`, without a run of fuselm's.

    python examples/trainer.py MODEL STORE TEXTS.jsonl OUT

STORE is a folder of a run's `fuse` stage and TEXTS.jsonl the `documents.jsonl` of its `corpus` stage.
"""

import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments

import fuselm
from fuselm.documents.document_list import read_documents
from fuselm.models.forward import find_output_layer
from fuselm.training.batches import Batches, Collator
from fuselm.training.trainable import compute_loss_in_forward

LAMBDA = 0.3  # weight of the causal-LM loss


class DistillingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = fuselm.FusedRows(**{name: inputs[f"fused_{name}"] for name in ("ids", "logprobs", "tail")})
        mask = inputs["labels"] != -100
        gold = inputs["labels"][mask]

        def loss_fn(hidden, layer):
            return {"loss": fuselm.fusion_loss(hidden, layer, gold, rows, LAMBDA, count=len(gold)).total}

        return model(inputs["input_ids"], mask, loss_fn, attention_mask=inputs["attention_mask"])["loss"]


def main(spec: str, store: str, texts: str, out: str) -> None:
    located = fuselm.locate_model(spec)
    model = fuselm.load_model(located, dtype="float32")
    compute_loss_in_forward(model, find_output_layer(model))
    fused = fuselm.Store(Path(store))
    documents = [d for d in read_documents(Path(texts).parent, "train") if d.id in fused]
    options = {"passes": 2, "batch_documents": 2, "pack_tokens": None, "seed": 0, "processes": 1}
    batches = Batches(documents, fuselm.load_vocabulary(located), fused, **options)
    arguments = TrainingArguments(
        out, per_device_train_batch_size=1, num_train_epochs=1, remove_unused_columns=False, report_to="none", seed=0
    )
    collator = Collator(located.context_token, packed=False)
    DistillingTrainer(model, arguments, train_dataset=batches, data_collator=collator).train()
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
