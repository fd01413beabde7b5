"""Let a source write text after training documents of a domain: more to train on, where text is short.

Text is drawn from the source's own distribution (Kim and Rush 2016, sequence-level distillation), once it has read some
of the domain's documents. Improbable tokens are excluded, because a small model's odd word is followed by odder ones
(Nguyen et al. 2024, arXiv 2407.01082, min-p). All sources then read the text, and it is fused as any other text. Its
`origin` is that of the document right before it.
"""

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from fuselm.documents import corpus, passages
from fuselm.documents.corpus import Document
from fuselm.documents.cutting import Reader
from fuselm.documents.document_writing import DocumentWriter
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.capture import LoadedSource
from fuselm.system import atomic_files
from fuselm.system.errors import name_model_errors
from fuselm.system.progress import Progress

BATCH = 64  # texts that are written together
Prompt = tuple[Document, list[int]]


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
    progress: Progress,
) -> dict:
    """Write about `size` bytes for each byte of `documents` to `out/documents.jsonl`; return counts.

    `size` is one number for all domains, or one by domain. A prompt is the last `prompt_tokens` tokens of a domain's
    documents in random order, one behind another. A text is up to `tokens` tokens that come next, in pieces where a
    reader can't take all of it. Writing resumes after the batches that are there; each batch has a seed of its own.
    Raises `ValueError` where there is nothing to write.
    """
    drawn = random.Random(f"{seed} {name}")
    batches = list(_make_prompt_batches(source.vocabulary, documents, size, prompt_tokens, tokens, drawn))
    if not batches:
        raise ValueError(
            f"write {name}: write.ratio asks for less than a text of {tokens} tokens in each domain; raise it"
        )
    paths = [out / f"batch-{n:05d}.json" for n in range(len(batches))]
    progress.start(
        sum(map(len, batches)),
        unit="texts",
        done=sum(len(b) for b, p in zip(batches, paths, strict=True) if p.exists()),
    )
    source.model.generation_config = make_generation_config(source, tokens=tokens, min_p=min_p)
    for n, (batch, path) in enumerate(zip(batches, paths, strict=True)):
        if not path.exists():
            texts = _generate(
                source, [ids for _, ids in batch], seed=random.Random(f"{seed} {name} {n}").getrandbits(63)
            )
            atomic_files.write_text(path, json.dumps(texts, ensure_ascii=False))
            progress.advance(len(batch))
    written = []
    for batch, path in zip(batches, paths, strict=True):
        for (prompt, _), text in zip(batch, json.loads(path.read_text(encoding="utf-8")), strict=True):
            if text.strip():
                document = Document(
                    id=f"{name}-{len(written):06d}",
                    origin=prompt.origin,
                    domain=prompt.domain,
                    split="train",
                    text=text,
                )
                written.append(document)
    pieces = list(corpus.cut_to_fit(written, readers))
    written = write_readable(pieces, out, readers)
    for path in paths:
        path.unlink()
    return {
        "documents": len(written),
        "bytes": {
            domain: sum(len(d.text.encode()) for d in written if d.domain == domain)
            for domain in sorted({d.domain for d in documents})
        },
    }


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


def _make_prompt_batches(
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    size: float | Mapping[str, float],
    length: int,
    tokens: int,
    rng: random.Random,
) -> Iterator[list[Prompt]]:
    """Yield prompts for as many texts in each domain as its size needs; those of a batch are equally long."""
    between = passages.tokenize_separator(vocabulary).tolist()
    for domain in sorted({d.domain for d in documents}):
        members = [(d, vocabulary.segment(d.text).ids.tolist() + between) for d in documents if d.domain == domain]
        read = sum(len(ids) for _, ids in members)
        of_domain = size.get(domain, 0.0) if isinstance(size, Mapping) else size
        prompts = [_make_prompt(members, min(length, read), rng) for _ in range(round(of_domain * read / tokens))]
        yield from (prompts[n : n + BATCH] for n in range(0, len(prompts), BATCH))


def _make_prompt(members: Sequence[tuple[Document, list[int]]], length: int, rng: random.Random) -> Prompt:
    order = rng.sample(members, len(members))
    ids: list[int] = []
    for _, of_document in order:
        if len(ids) >= length:
            break
        ids = of_document + ids
    return order[0][0], ids[len(ids) - length :]


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
    drawn |= {"max_length": None, "max_new_tokens": tokens, "do_sample": True, "eos_token_id": sorted(ends) or None}
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
