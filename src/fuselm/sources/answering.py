"""Let a source answer the questions of training conversations several times, and keep the best answer of each.

The source reads a conversation up to its last response, in its own chat template, and draws what comes next. The best
answer becomes a conversation to train on, in which all before it is context; the best and the worst are kept as pairs,
with which preferences can be trained (FuseChat-3.0: Yang et al. 2025, arXiv 2503.04222).
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuselm.documents.corpus import Document
from fuselm.documents.cutting import Reader
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.sources.answer_choice import Answers, Choose, split_last_response
from fuselm.sources.capture import LoadedSource
from fuselm.sources.drawing import draw_continuations
from fuselm.sources.writing import make_generation_config, write_readable
from fuselm.system import atomic_files
from fuselm.system.errors import name_model_errors
from fuselm.system.progress import Progress

SEQUENCES = 64  # answers that are drawn together
PAIRS_FILE = "pairs.jsonl"


def write_answers(
    source: LoadedSource,
    documents: Sequence[Document],
    out: Path,
    *,
    readers: Sequence[Reader],
    name: str,
    answers: int,
    tokens: int,
    min_p: float | None,
    seed: int,
    choose: Choose,
    progress: Progress,
) -> dict:
    """Write conversations with the best of several answers to each of `documents`, and the pairs; return counts.

    Answers that are empty, or have not ended after `tokens` tokens, are left out, as are those that a reader cannot
    take. `choose` gives the others numbers. Answering resumes after the batches that are there; each batch has a seed
    of its own. Raises `ValueError` if no answer can be used.
    """
    conversations = [document for document in documents if isinstance(document.text, Dialogue)]
    prompts = [encode_prompt(source, document.text) for document in conversations]
    batches = _make_batches(prompts, answers)
    paths = [out / f"answers-{n:05d}.json" for n in range(len(batches))]
    done = sum(len(b) for b, p in zip(batches, paths, strict=True) if p.exists())
    progress.start(len(prompts), unit="conversations", done=done)
    source.model.generation_config = make_generation_config(source, tokens=tokens, min_p=min_p)
    source.model.generation_config.eos_token_id = list(find_ends(source))
    for n, (batch, path) in enumerate(zip(batches, paths, strict=True)):
        if not path.exists():
            own_seed = random.Random(f"{seed} {name} answers {n}").getrandbits(63)
            found = _answer(source, [prompts[k] for k in batch], answers, seed=own_seed)
            atomic_files.write_text(path, json.dumps(found, ensure_ascii=False))
            progress.advance(len(batch))
    said: dict[int, list[str]] = {}
    for batch, path in zip(batches, paths, strict=True):
        said |= dict(zip(batch, json.loads(path.read_text(encoding="utf-8")), strict=True))
    asked = [
        Answers(reference=document.text, domain=document.domain, answers=said[n])
        for n, document in enumerate(conversations)
    ]
    readable = [_keep_readable(of, readers) for of in asked]
    if not any(of.answers for of in readable):
        raise ValueError(
            f"write {name}: none of its answers to {len(prompts)} conversations can be used, because each is empty or "
            f"has not ended after {tokens} tokens; raise write.tokens, or leave the source out of write.answers"
        )
    numbers = choose(readable)
    written, pairs = _rank(conversations, readable, numbers, name)
    rows = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    atomic_files.write_text(out / PAIRS_FILE, "".join(rows))
    written = write_readable(written, out, readers)
    for path in paths:
        path.unlink()
    sizes: Counter[str] = Counter()
    for document in written:
        sizes[document.domain] += len(document.text.encode())
    return {"documents": len(written), "bytes": dict(sizes), "asked": len(prompts), "pairs": len(pairs)}


def encode_prompt(source: LoadedSource, dialogue: Dialogue) -> list[int]:
    """Return the tokens that a model reads before the first one of the last response."""
    before, last = split_last_response(dialogue)
    reading = source.vocabulary.segment(Dialogue(messages=(*before, last), tools=dialogue.tools)).reading
    assert reading is not None
    return [reading.first, *reading.ids[: int(np.argmax(reading.kept))].tolist()]


def find_ends(source: LoadedSource) -> list[int]:
    """Return the tokens that end a turn of the source."""
    return [i for i, spelled in enumerate(source.vocabulary.token_bytes) if spelled == END_OF_TURN]


def _make_batches(prompts: Sequence[list[int]], answers: int) -> list[list[int]]:
    """Return the numbers of prompts that are answered together, of similar length."""
    size = max(SEQUENCES // answers, 1)
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), n))
    return [order[n : n + size] for n in range(0, len(order), size)]


def _answer(source: LoadedSource, prompts: Sequence[list[int]], answers: int, *, seed: int) -> list[list[str]]:
    """Return the answers to each prompt that were ended and say something."""
    device = source.model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with name_model_errors(source.model.name_or_path, "answering conversations"):
            drawn = draw_continuations(source.model, prompts, each=answers, padding=source.context_token)
    rows = drawn.cpu().numpy().reshape(len(prompts), answers, -1)
    return [[text for row in of if (text := _spell_answer(source, row)) is not None] for of in rows]


def _spell_answer(source: LoadedSource, ids: np.ndarray) -> str | None:
    """Return what stands before the end of a turn, without white space around; None if it has none or is no text."""
    spelled: list[bytes] = []
    for token in ids.tolist():
        string = source.vocabulary.token_bytes[token]
        if string == END_OF_TURN:
            try:
                return b"".join(spelled).decode().strip() or None
            except UnicodeDecodeError:
                return None
        if string is None:
            return None
        spelled.append(string)
    return None


def _keep_readable(asked: Answers, readers: Sequence[Reader]) -> Answers:
    """Return those of the answers that all readers take whole, behind what is asked."""

    def is_read(answer: str) -> bool:
        try:
            return all(r.vocabulary.count_tokens([asked.put_in(answer)])[0] < r.max_tokens for r in readers)
        except ValueError:
            return False

    taken = {answer: is_read(answer) for answer in dict.fromkeys(asked.answers)}
    answers = [answer for answer in asked.answers if taken[answer]]
    return Answers(reference=asked.reference, domain=asked.domain, answers=answers)


def _rank(
    documents: Sequence[Document], asked: Sequence[Answers], numbers: Sequence[Sequence[float]], name: str
) -> tuple[list[Document], list[dict[str, Any]]]:
    """Return the conversations with the best answers, and pairs of best and worst where their numbers differ."""
    written, pairs = [], []
    for document, of, given in zip(documents, asked, numbers, strict=True):
        if not of.answers:
            continue
        best, worst = of.answers[int(np.argmax(given))], of.answers[int(np.argmin(given))]
        written.append(
            Document(
                id=f"{name}-answer-{document.id}",
                origin=document.origin,
                domain=document.domain,
                split="train",
                text=of.put_in(best),
            )
        )
        if max(given) > min(given):
            rows = [message.as_row() for message in of.put_in(best).messages[:-1]]
            said = {kind: [{"role": "assistant", "content": a}] for kind, a in (("chosen", best), ("rejected", worst))}
            pairs.append({"prompt": [_drop_weight(row) for row in rows], **said, "domain": document.domain})
    return written, pairs


def _drop_weight(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "weight"}
