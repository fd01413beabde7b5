"""Compare what is learned of conversations with TRL's supervised fine-tuning on the assistant's messages."""

import warnings
from pathlib import Path

import chat_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.models.chat.dialogue_reading import add_chat_template
from fuselm.models.chat.messages import Dialogue, Message
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.training.batches import Batches, Collator
from fuselm.training.objective import fusion_loss
from fuselm.training.trainable import compute_loss_in_forward

CONVERSATIONS = 50
# TRL learns what a template marks as generated: here the content and the token that ends the turn.
SAID = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
TEMPLATES = {
    "lines": chat_models.LINES.replace(
        "{{ m.content }}{{ eos_token }}",
        "{% if m.role == 'assistant' %}" + SAID + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}",
    ),
    "brackets": chat_models.BRACKETS.replace("{{ m.content }}{{ eos_token }}", SAID),
    "headers": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]: {% if m.role == 'assistant' %}"
    + SAID
    + "{% else %}{{ m.content }}{% endif %}\n\n{% endfor %}",
}


@pytest.fixture(scope="module")
def rows(quickstart) -> list[dict]:
    texts = [row | {"text": row["text"][:200]} for row in quickstart]
    rows = chat_models.make_rows(texts, domains=5)[:CONVERSATIONS]
    return [{"messages": [m for m in row["messages"] if m["role"] != "system"]} for row in rows]


@pytest.fixture(
    scope="module", params=[("byte_level", "lines"), ("byte_level", "headers"), ("sentence_piece", "brackets")]
)
def folder(request, tmp_path_factory) -> Path:
    kind, template = request.param
    out = tmp_path_factory.mktemp("models") / template
    return chat_models.add_template(request.getfixturevalue(kind), out, TEMPLATES[template])


def compute_trl_losses(folder: Path, rows: list[dict], out: Path) -> tuple[float, float]:
    """Return the mean loss of all conversations by TRL's preparation, collator and trainer, and in float64.

    The trainer rounds logits to float32. The loss in float64 is of the labels and inputs that TRL makes.
    """
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        options = {"assistant_only_loss": True, "max_length": None, "use_cpu": True, "report_to": [], "bf16": False}
        options |= {"gradient_checkpointing": False, "disable_tqdm": True}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
            args=SFTConfig(output_dir=str(out), **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))])
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model, dict(batch)))
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.dtype == torch.float64
    exact = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return loss, float(exact)


def compute_own_loss(folder: Path, rows: list[dict], **options) -> float:
    """Return the mean loss of all conversations as `clm` is trained, in float64."""
    located = locate_model(str(folder))
    vocabulary = add_chat_template(located, load_vocabulary(located))
    documents = [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain="a", split="train", text=dialogue)
        for n, dialogue in enumerate(make_dialogues(rows))
    ]
    dataset = Batches(documents, vocabulary, None, **{"passes": 1, "seed": 0, "processes": 1, **options})
    collate = Collator(located.context_token, packed=dataset.packed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    compute_loss_in_forward(model, forward.find_output_layer(model))
    total, count = 0.0, 0
    for n in range(len(dataset)):
        batch = collate([dataset[n]])
        labels = batch.pop("labels")
        mask = labels != -100

        def loss_fn(hidden, layer, learned=labels[mask]):
            return {"loss": fusion_loss(hidden, layer, learned, None, 1.0).total}

        batch.pop("shift_labels")
        with torch.no_grad():
            total += float(model(**batch, token_mask=mask, loss_fn=loss_fn)["loss"])
        count += int(mask.sum())
    return total / count


def make_dialogues(rows: list[dict]) -> list[Dialogue]:
    return [Dialogue(messages=tuple(Message(**message) for message in row["messages"])) for row in rows]


def test_the_loss_on_responses_is_that_of_trl(folder, rows, tmp_path):
    assert len(rows) == CONVERSATIONS
    rounded, exact = compute_trl_losses(folder, rows, tmp_path)
    own = compute_own_loss(folder, rows, batch_documents=7, pack_tokens=None)
    assert own == pytest.approx(exact, abs=1e-6)
    assert own == pytest.approx(rounded, rel=1e-6)


def test_packing_changes_no_loss(folder, rows):
    padded = compute_own_loss(folder, rows, batch_documents=7, pack_tokens=None)
    assert compute_own_loss(folder, rows, batch_documents=None, pack_tokens=401) == pytest.approx(padded, abs=1e-6)


def test_on_all_tokens_the_template_and_the_users_are_learned_too(folder, rows):
    located = locate_model(str(folder))
    vocabulary = add_chat_template(located, load_vocabulary(located))
    counts = {}
    for learn_context in (False, True):
        documents = [
            Document(id="a", origin="a", domain="a", split="train", text=dialogue)
            for dialogue in make_dialogues(rows[:3])
        ]
        options = {"passes": 1, "batch_documents": 3, "pack_tokens": None, "seed": 0, "processes": 1}
        dataset = Batches(documents, vocabulary, None, learn_context=learn_context, **options)
        labels = Collator(located.context_token, packed=False)([dataset[0]])["labels"]
        counts[learn_context] = int((labels != -100).sum())
    read = [vocabulary.segment(dialogue) for dialogue in make_dialogues(rows[:3])]
    assert counts == {False: sum(len(s.ids) for s in read), True: sum(len(s.read_ids) for s in read)}
