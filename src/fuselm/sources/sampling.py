"""Draw texts from a source's own distribution: text for which its rows are right by definition.

Each text continues the first tokens of a document, drawn at temperature 1 from all ids that stand for text. Its tokens
are those that were drawn, so nothing is tokenized a second time.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from fuselm.documents.corpus import Document
from fuselm.models.segmentation import Segmentation
from fuselm.sources.capture import LoadedSource
from fuselm.system.errors import name_model_errors
from fuselm.system.progress import Progress

PROMPT = 24  # tokens of a document that a text continues
LENGTH = 96  # tokens drawn
BATCH = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledText:
    """Hold a document that ends with drawn tokens, which start at byte `begin`."""

    document: Document
    segmentation: Segmentation
    begin: int


def can_sample(source: LoadedSource) -> bool:
    return source.model.can_generate() and source.context_length > PROMPT + LENGTH


def sample_texts(
    source: LoadedSource, documents: Sequence[Document], *, tokens: int, seed: int, progress: Progress
) -> list[SampledText]:
    """Draw about `tokens` tokens after the beginnings of documents in random order, taking domains in turn.

    A text ends before bytes that are not characters. Documents shorter than a prompt are not used; if all of them are
    shorter, texts begin with the source's context token.
    """
    prompts = _cycle_prompts(source, documents, random.Random(seed))
    count = -(-tokens // LENGTH)
    progress.start(count * LENGTH, unit="tokens drawn")
    texts: list[SampledText] = []
    source.model.generation_config = _make_generation_config(source)
    with torch.random.fork_rng([source.model.device] if source.model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begin in range(0, count, BATCH):
            batch = list(itertools.islice(prompts, min(BATCH, count - begin)))
            for (document, ids, lead), drawn in zip(
                batch, _generate(source, [ids for _, ids, _ in batch], progress), strict=True
            ):
                named = replace(document, id=f"sampled-{len(texts):06d}", origin=document.id)
                text = _cut_to_whole_characters(source, named, ids, drawn, lead)
                texts += [] if text is None else [text]
    return texts


def _cycle_prompts(
    source: LoadedSource, documents: Sequence[Document], rng: random.Random
) -> Iterator[tuple[Document, list[int], int]]:
    """Yield documents without end, with their first tokens, and how many bytes these spell before the text."""
    by_domain: dict[str, list[tuple[Document, list[int], int]]] = {}
    for document in rng.sample(list(documents), len(documents)):
        segmentation = source.vocabulary.segment(document.text)
        if len(segmentation.ids) > PROMPT:
            prompt = (document, segmentation.ids[:PROMPT].tolist(), int(segmentation.starts[0] < 0))
            by_domain.setdefault(document.domain, []).append(prompt)
    if not by_domain:
        by_domain = {document.domain: [(document, [], 0)] for document in documents}
    for n in itertools.count():
        for domain in sorted(by_domain):
            yield by_domain[domain][n % len(by_domain[domain])]


def _make_generation_config(source: LoadedSource) -> GenerationConfig:
    silent = [i for i, spelled in enumerate(source.vocabulary.token_bytes) if not spelled]
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LENGTH,
        pad_token_id=source.context_token,
        suppress_tokens=silent or None,
    )


class _DrawCounter(StoppingCriteria):
    """Count the tokens that are drawn while a batch is generated; it never stops a text."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self._progress.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(source: LoadedSource, prompts: Sequence[list[int]], progress: Progress) -> list[list[int]]:
    inputs = torch.tensor([[source.context_token, *ids] for ids in prompts], device=source.model.device)
    counting = StoppingCriteriaList([_DrawCounter(progress)])
    with name_model_errors(source.model.name_or_path, "drawing texts"), torch.inference_mode():
        outputs = source.model.generate(inputs, attention_mask=torch.ones_like(inputs), stopping_criteria=counting)
    return outputs[:, inputs.shape[1] :].tolist()


def _cut_to_whole_characters(
    source: LoadedSource, document: Document, prompt: Sequence[int], drawn: Sequence[int], lead: int
) -> SampledText | None:
    """Return the prompt and what was drawn after it, up to the last token that ends with a whole character.

    Return None if nothing is left.
    """
    ids = [*prompt, *drawn]
    strings = [source.vocabulary.token_bytes[i] or b"" for i in ids]
    edges = np.append(0, np.cumsum([len(s) for s in strings]))
    try:
        whole = len(b"".join(strings).decode().encode())
    except UnicodeDecodeError as error:
        whole = error.start
    count = int(np.searchsorted(edges, whole, side="right")) - 1
    if count <= len(prompt):
        return None
    text = b"".join(strings[:count])[lead:].decode("utf-8", "ignore")
    if len(text.encode()) != edges[count] - lead:  # the last token ends within a character
        return _cut_to_whole_characters(source, document, prompt, drawn[: count - len(prompt) - 1], lead)
    segmentation = Segmentation(
        ids=np.array(ids[:count], np.int32),
        starts=(edges[:count] - lead).astype(np.int32),
        spelled=np.ones(count, bool),
        size=len(text.encode()),
    )
    return SampledText(
        document=replace(document, text=text), segmentation=segmentation, begin=int(edges[len(prompt)]) - lead
    )
