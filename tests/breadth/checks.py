"""Compare what fuselm makes of a model with what transformers itself makes of it, one document at a time.

The reference is the plain model: one document in a batch of its own, no padding, full logits, `labels`. fuselm reads
all documents in padded batches, through `forward.find_output_layer`, and trains by `objective.fusion_loss`.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import architectures
import numpy as np
import torch
import transformers
from rich.console import Console
from training_settings import make_settings
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fuselm.documents.corpus import Document
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import scoring
from fuselm.sources import capture
from fuselm.stores.retention import Policy
from fuselm.system.progress import Progress
from fuselm.training import target_training
from fuselm.training.batches import Collator
from fuselm.training.objective import fusion_loss

NOT_BUILT, REFUSED = "not built", "refused"
SOURCE_NATS = 1e-3  # of any token, in float32
MOVED = 1e-4  # logits
NARROW_NATS = 0.05  # the mean over tokens, in bfloat16
LOSS = 1e-5  # relative
GRADIENT = 1e-3  # norm of the difference over the norm, of any parameter whose gradient is not nearly zero
PRODUCT_BITS = 1e-4  # per byte
SETTINGS = make_settings(
    lambda_clm=1.0,
    learning_rate=1e-3,
    passes=1,
    batch_documents=3,
    evaluations_per_pass=1,
    warmup=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    precision="float32",
    trackers=(),
    seed=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold what became of an architecture. A cell is a measured difference, or a word that says why there is none."""

    name: str
    source: str = ""
    target: str = ""
    product: str = ""
    note: str = ""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Hold a measured difference, what is wrong with it, and what is odd about the model itself."""

    text: str
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


def documents_of(rows: Sequence[dict[str, str]]) -> list[Document]:
    """Cut texts of unlike length from the corpus; one is a single character."""
    lengths = (131, 1, 67, 97, 29, 53)
    texts = [row["text"][:length] for row, length in zip(rows, lengths, strict=False)]
    return [Document(id=str(n), origin=str(n), domain="d", split="train", text=text) for n, text in enumerate(texts)]


def examine(name: str, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], folder: Path) -> Outcome:
    """Build an architecture in `folder` and compare it as source, target and product."""
    if name in architectures.NOT_BUILT:
        return Outcome(name=name, source=NOT_BUILT, note=architectures.NOT_BUILT[name])
    with quiet():
        architectures.save(name, tokenizer, folder / "model")
    return examine_folder(name, documents, folder)


def examine_folder(name: str, documents: Sequence[Document], folder: Path) -> Outcome:
    """Compare the model in `folder/model`; a refusal is right only if the reference cannot use the model either."""
    with quiet():
        why_not = why_not_causal(folder / "model", documents)
        try:
            located = locate_model(str(folder / "model"))
            vocabulary = Vocabulary(load_tokenizer(located), located.output_size)
            source = capture.load_source(located, vocabulary, dtype="float32")
        except Exception as error:
            faults = [] if why_not else ["refused, although it predicts tokens one after the other"]
            if not isinstance(error, ValueError) or "\n" in str(error):
                faults.append(f"not one line for users: {type(error).__name__}")
            return Outcome(name=name, source=REFUSED, note=one_line(error, folder), faults=tuple(faults))
        if why_not:
            return Outcome(name=name, source="taken", note=why_not, faults=(f"taken, although {why_not}",))
        return compare(name, located, source, documents, folder)


def compare(
    name: str, located: Model, source: capture.LoadedSource, documents: Sequence[Document], folder: Path
) -> Outcome:
    """Measure all differences of a model that fuselm takes."""
    cells: dict[str, Cell] = {}
    why_not = why_not_trainable(located, source.vocabulary, documents)
    for column, measure in (("source", measure_source), ("target", measure_target), ("product", measure_product)):
        try:
            cells[column] = measure(located, source.vocabulary, documents, folder)
        except Exception as error:  # a fault of fuselm, or of a model in its hands
            cells[column] = Cell(text="error", faults=[one_line(error, folder)])
            if why_not and column != "source":
                said = isinstance(error, ValueError) and "\n" not in str(error)
                fault = [] if said or column == "target" else [f"not one line for users: {one_line(error)}"]
                cells[column] = Cell(text=REFUSED, faults=fault, notes=[why_not] if column == "target" else [])
    notes = [] if source.layer.weight is not None else ["logits are made whole"]
    return Outcome(
        name=name,
        **{column: cell.text for column, cell in cells.items()},
        note="; ".join(notes + [note for cell in cells.values() for note in cell.notes]),
        faults=tuple(f"{column}: {fault}" for column, cell in cells.items() for fault in cell.faults),
    )


def why_not_causal(folder: Path, documents: Sequence[Document]) -> str:
    """Say why the plain model can't predict tokens one after the other; empty if it can.

    Independent of fuselm: neither another last token nor more tokens must move any earlier row.
    """
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([[0, *tokenizer.encode(documents[0].text).ids]])
    changed = ids.clone()
    changed[0, -1] = 1 + ids[0, -1] % 7
    try:
        model = plain(folder, torch.float32)
        with torch.inference_mode():
            whole, other, prefix = (
                model(input_ids=i, use_cache=False).logits[0].float() for i in (ids, changed, ids[:, :-5])
            )
    except Exception as error:
        return f"transformers can't read tokens with it: {one_line(error)}"
    if len(whole) != ids.shape[1]:
        return f"it gives {len(whole)} rows for {ids.shape[1]} tokens"
    for what, rows in (("another last token moves", other[:-1]), ("more tokens move", prefix)):
        moved = float((rows - whole[: len(rows)]).abs().max())
        if moved > MOVED:
            return f"{what} earlier logits by {moved:.2g}"
    return ""


def why_not_trainable(located: Model, vocabulary: Vocabulary, documents: Sequence[Document]) -> str:
    """Say why the plain model can't be trained on a text of any length; empty if it can."""
    ids = vocabulary.segment(documents[0].text).ids
    try:
        inputs = torch.tensor([[located.context_token, *ids[:-1].tolist()]])
        plain(located.folder, torch.float32).train()(input_ids=inputs, use_cache=False).logits.sum().backward()
    except Exception as error:
        return f"transformers can't train it on a text of any length ({one_line(error)})"
    return ""


def measure_source(located: Model, vocabulary: Vocabulary, documents: Sequence[Document], folder: Path) -> Cell:
    """Compare gold log-probabilities of padded batches with those of the plain model, in float32 and bfloat16."""
    tokens = [vocabulary.segment(d.text).ids for d in documents]
    theirs = plain_logprobs(plain(located.folder, torch.float32), located, tokens)
    source = capture.load_source(located, vocabulary, dtype="float32")
    apart = np.abs(captured_logprobs(source, documents) - theirs)
    faults, notes = [], []
    if not apart.max() <= SOURCE_NATS:
        faults.append(f"float32 differs by {apart.max():.3g} nats")
    scores = scoring.score_documents(
        source.model, source.layer, vocabulary, located.context_token, documents, batch_tokens=256
    )
    nats = sum(s.bits for s in scores) * np.log(2)
    if abs(nats + theirs.sum()) > SOURCE_NATS * len(theirs):
        faults.append(f"evaluate says {nats:.4f} nats, the plain model {-theirs.sum():.4f}")
    try:
        theirs = plain_logprobs(plain(located.folder, torch.bfloat16), located, tokens)
    except Exception as error:
        notes.append(f"transformers can't run it in bfloat16 ({one_line(error)})")
    else:
        narrow = captured_logprobs(capture.load_source(located, vocabulary, dtype="bfloat16"), documents)
        if not np.abs(narrow - theirs).mean() <= NARROW_NATS:
            faults.append(f"bfloat16 differs by {np.abs(narrow - theirs).mean():.3g} nats on average")
    return Cell(text=f"{apart.max():.0e}", faults=faults, notes=notes)


def captured_logprobs(source: capture.LoadedSource, documents: Sequence[Document]) -> np.ndarray:
    """Return the gold log-probabilities of all documents, read in one padded batch."""
    segmentations = [source.vocabulary.segment(d.text) for d in documents]
    policy = Policy(policy="top_k", top_k=5)
    traces = capture.trace_batch(source, documents, segmentations, policy=policy)
    return np.concatenate([t.distributions.gold for t in traces]).astype(np.float64)


def plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def plain_logprobs(model: PreTrainedModel, located: Model, tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Return the gold log-probabilities of documents, each read alone, from full logits."""
    result = []
    for ids in tokens:
        inputs = torch.tensor([[located.context_token, *ids[:-1].tolist()]])
        with torch.inference_mode():
            logprobs = model(input_ids=inputs, use_cache=False).logits[0].float().log_softmax(-1)
        result.append(logprobs.gather(1, torch.from_numpy(ids).long()[:, None])[:, 0].double().numpy())
    return np.concatenate(result)


def measure_target(located: Model, vocabulary: Vocabulary, documents: Sequence[Document], folder: Path) -> Cell:
    """Compare loss and gradients of lambda 1 with those of `labels`."""
    tokens = [vocabulary.segment(d.text).ids for d in documents]
    count = float(sum(map(len, tokens)))
    model = target_training.load_target(located, SETTINGS, silent()).eval()
    batch = Collator(located.context_token, packed=False)([[{"tokens": ids} for ids in tokens]])
    labels = batch.pop("labels")
    del batch["shift_labels"]
    token_mask = labels != -100

    def loss_fn(hidden, layer):
        return {"loss": fusion_loss(hidden, layer, labels[token_mask], None, 1.0, count=count).total}

    ours = model(**batch, token_mask=token_mask, loss_fn=loss_fn)["loss"]
    ours.backward()
    reference = plain(located.folder, torch.float32)
    texts = [torch.tensor([[located.context_token, *ids.tolist()]]) for ids in tokens]
    label, note = convention(reference, texts[0])
    theirs = 0.0
    for text in texts:
        loss = label(reference, text) * (text.shape[1] - 1) / count
        loss.backward()
        theirs += float(loss)
    faults = []
    loss_apart = abs(float(ours) - theirs) / theirs
    if not loss_apart <= LOSS:
        faults.append(f"loss {float(ours):.6f}, by labels {theirs:.6f}")
    apart = gradients_apart(model, reference)
    worst = max(apart, key=apart.__getitem__)
    if not apart[worst] <= GRADIENT:
        wrong = sum(not value <= GRADIENT for value in apart.values())
        faults.append(f"gradients of {wrong} of {len(apart)} weights differ, most {worst} by {apart[worst]:.2g}")
    return Cell(text=f"{loss_apart:.0e} {apart[worst]:.0e}", faults=faults, notes=[note] if note else [])


def shifted(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text, labels=text, use_cache=False).loss


def unshifted(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text[:, :-1], labels=text[:, 1:].contiguous(), use_cache=False).loss


def without_labels(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        model(input_ids=text[:, :-1], use_cache=False).logits[0].float(), text[0, 1:]
    )


def convention(model: PreTrainedModel, text: torch.Tensor) -> tuple[Callable[..., torch.Tensor], str]:
    """Find how a class reads `labels` by its loss, which has to be the cross-entropy of its own logits."""
    with torch.no_grad():
        expected = float(without_labels(model, text))
        for loss, note in ((shifted, ""), (unshifted, "its `labels` are not shifted by transformers")):
            try:
                if abs(float(loss(model, text)) - expected) < 1e-4 * expected:
                    return loss, note
            except Exception:  # a class whose labels need an image, too
                continue
    return without_labels, "its `labels` give another loss than its logits; compared with cross-entropy"


def gradients_apart(ours: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, float]:
    """Return the norm of each parameter's difference over its own norm, or over a small share of the largest norm."""
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    zero = torch.zeros(1)
    largest = max(float(g.norm()) for g in expected.values() if g is not None)
    return {
        name: float(((zero if found[name] is None else found[name]) - (zero if g is None else g)).norm())
        / max(float((zero if g is None else g).norm()), 1e-3 * largest)
        for name, g in expected.items()
    }


def measure_product(located: Model, vocabulary: Vocabulary, documents: Sequence[Document], folder: Path) -> Cell:
    """Train two steps; compare what the product scores, loaded again, with what was scored in training."""
    out = folder / "run"
    out.mkdir()
    counts = target_training.train_target(
        located, vocabulary, documents, documents, out, fused=None, settings=SETTINGS, progress=silent()
    )
    product = locate_model(str(out / "model"))
    source = capture.load_source(product, vocabulary, dtype="float32")
    scores = scoring.score_documents(source.model, source.layer, vocabulary, product.context_token, documents)
    bits = scoring.compute_bits_per_byte(scores)["average"]
    apart = abs(bits - counts["dev_bits_per_byte"])
    faults = []
    if not apart <= PRODUCT_BITS:
        faults.append(f"{bits:.4f} bits per byte, {counts['dev_bits_per_byte']:.4f} in training")
    if counts["steps"] != 2:
        faults.append(f"{counts['steps']} steps")
    return Cell(text=f"{apart:.0e}", faults=faults)


def silent() -> Progress:
    return Progress(Console(file=io.StringIO()), "")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own warnings about odd configurations out of the way."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)


def one_line(error: Exception, folder: Path | None = None) -> str:
    """Return the message on one line, without the folder of this test; the kind of error where it is not ours."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    message = " ".join(f"{kind}{error}".split())
    return textwrap.shorten(message.replace(f"{folder}/", "") if folder else message, 160, placeholder=" …")
