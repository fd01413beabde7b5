"""Let a source write text after training documents of a domain: more to train on, where text is short.

Text is drawn from the source's own distribution (Kim and Rush 2016, sequence-level distillation), once it has read some
of the domain's documents. Improbable tokens are excluded, because a small model's odd word is followed by odder ones
(Nguyen et al. 2024, arXiv 2407.01082, min-p). All sources then read the text, and it is fused as any other text. Its
`origin` is that of the document right before it.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fuselm.documents import corpus
from fuselm.documents.corpus import Document
from fuselm.documents.cutting import Reader
from fuselm.documents.document_writing import DocumentWriter
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.capture import LoadedSource
from fuselm.sources.prompts import PromptBatches, PromptOptions
from fuselm.system import atomic_files, part_work
from fuselm.system.errors import name_model_errors
from fuselm.system.part_work import Complete, Fragment
from fuselm.system.progress import Progress


def write_texts(
    source: LoadedSource,
    documents: Sequence[Document],
    out: Path,
    *,
    readers: Sequence[Reader],
    name: str,
    size: float | Mapping[str, float],
    prompt_tokens: int,
    tokens: int,
    min_p: float | None,
    seed: int,
    reader: str | None = None,
    progress: Progress,
) -> dict | None:
    """Write about `size` bytes for each byte of `documents` to `out`, as a folder of documents; return counts.

    `size` is one number for all domains, or one by domain. A prompt is the last `prompt_tokens` tokens of a domain's
    documents in random order, one behind another. A text is up to `tokens` tokens that come next, in pieces where a
    reader can't take all of it. `reader` names the source's among the corpus's readers, which counted tokens.

    Writing resumes after the batches that are there; each batch has a seed of its own. Several processes may share
    them; it returns None in those that did not finish. Raises `ValueError` where there is nothing to write.
    """
    asked = PromptOptions(size=size, length=prompt_tokens, tokens=tokens, seed=f"{seed} {name}")
    batches = PromptBatches(source.vocabulary, documents, asked, reader=reader)
    if not len(batches):
        raise ValueError(
            f"write {name}: write.ratio asks for less than a text of {tokens} tokens in each domain; raise it"
        )
    source.model.generation_config = make_generation_config(source, tokens=tokens, min_p=min_p)

    def write_batch(number: int) -> Complete:
        path, batch = _locate_batch(out, number), batches[number]
        seed_of_batch = random.Random(f"{seed} {name} {number}").getrandbits(63)
        is_there = path.exists()  # of a process that was killed just then
        texts = [] if is_there else _generate(source, [ids for _, ids in batch], seed=seed_of_batch)
        progress.advance(len(batch))

        def complete() -> Fragment:
            if not is_there:
                rows = [[prompt.origin, prompt.domain, text] for (prompt, _), text in zip(batch, texts, strict=True)]
                atomic_files.write_text(path, json.dumps(rows, ensure_ascii=False))
            return {"documents": len(batch)}

        return complete

    def finish(fragments: list[Fragment]) -> dict[str, Any]:
        sizes = Counter(dict.fromkeys(sorted(batches.domains), 0))
        writer, written = DocumentWriter(out, [reader.name for reader in readers]), 0
        for piece in corpus.cut_and_count(_read_batches(out, len(fragments), name), readers):
            if piece.is_read:
                writer.add(piece.document, piece.tokens)
                written += 1
                sizes[piece.document.domain] += len(piece.document.text.encode())
        writer.finish()
        return {"documents": written, "bytes": dict(sizes)}

    return part_work.make_parts(out, batches.sizes, write_batch, finish, progress=progress, unit="texts")


def _locate_batch(out: Path, number: int) -> Path:
    return out / f".batch-{number:05d}.json"


def _read_batches(out: Path, count: int, name: str) -> Iterator[Document]:
    """Yield the texts of all batches in order, except empty ones, as training documents."""
    numbers = itertools.count()
    for batch in range(count):
        for origin, domain, text in json.loads(_locate_batch(out, batch).read_text(encoding="utf-8")):
            if text.strip():
                number = f"{name}-{next(numbers):06d}"
                yield Document(id=number, origin=origin, domain=domain, split="train", text=text)


def write_readable(pieces: Sequence[Document], out: Path, readers: Sequence[Reader]) -> list[Document]:
    """Write those documents to a folder that have tokens for all readers, and return them."""
    counts = corpus.count_tokens(pieces, readers)
    written = []
    writer = DocumentWriter(out, [reader.name for reader in readers])
    for piece, given, of_all in zip(pieces, counts.T.tolist(), counts.all(axis=0), strict=True):
        if of_all:
            writer.add(piece, given)
            written.append(piece)
    writer.finish()
    return written


def make_generation_config(source: LoadedSource, *, tokens: int, min_p: float | None) -> GenerationConfig:
    """Return the settings to draw from the model's own distribution until it ends the text.

    Of the ids that are not text, only those that end the text may be drawn; and no id may be that has less than `min_p`
    of the most probable one's probability. If `min_p` is None, the model's own settings say how to draw.
    """
    known = source.model.generation_config.eos_token_id
    ends = {known} if isinstance(known, int) else set(known or ())
    silent = [i for i, spelled in enumerate(source.vocabulary.token_bytes) if spelled is None and i not in ends]
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": min_p}
    drawn = source.model.generation_config.to_diff_dict() if min_p is None else whole
    drawn |= {"max_length": None, "max_new_tokens": tokens, "do_sample": True, "num_beams": 1}
    drawn["eos_token_id"] = sorted(ends) or None
    return GenerationConfig(**{**drawn, "pad_token_id": source.context_token, "suppress_tokens": silent or None})


def _generate(source: LoadedSource, prompts: Sequence[list[int]], *, seed: int) -> list[str]:
    device = source.model.device
    inputs = torch.tensor([[source.context_token, *ids] for ids in prompts], device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with name_model_errors(source.model.name_or_path, "writing texts"):
            outputs = source.model.generate(inputs, attention_mask=torch.ones_like(inputs))
    return [_spell(source.vocabulary, row) for row in outputs[:, inputs.shape[1] :].cpu().numpy()]


def _spell(vocabulary: Vocabulary, ids: np.ndarray) -> str:
    """Spell ids up to the first that is not text, without a character that is cut off."""
    spelled = itertools.takewhile(lambda b: b is not None, (vocabulary.token_bytes[i] for i in ids.tolist()))
    return b"".join(spelled).decode("utf-8", "ignore")
