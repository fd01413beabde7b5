"""Draw texts from a source's own distribution: text for which its rows are right by definition.

Each text continues the first tokens of a document, drawn at temperature 1 from all ids that stand for text. Its tokens
are those that were drawn, so nothing is tokenized a second time. In a conversation, it continues the first tokens of
the last response, until the source ends its turn.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from fuselm.documents.corpus import Document
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.segmentation import Reading, Segmentation
from fuselm.sources.answer_choice import split_last_response
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """Hold the tokens that a text continues: those of it, and what the source reads before them, at least one token.

    The text's tokens begin at the bytes `starts`, and end at byte `begin`.
    """

    document: Document
    before: list[int]
    ids: list[int]
    starts: list[int]
    begin: int


def can_sample(source: LoadedSource) -> bool:
    return source.model.can_generate() and source.context_length > PROMPT + LENGTH


def sample_texts(
    source: LoadedSource,
    documents: Sequence[Document],
    *,
    tokens: int,
    seed: int,
    progress: Progress,
    batch: int = BATCH,
) -> list[SampledText]:
    """Draw about `tokens` tokens after the beginnings of documents in random order, taking domains in turn.

    `batch` texts are drawn at a time. A text ends before bytes that are not characters. Documents shorter than a
    prompt are not used; if all of them are shorter, texts begin with the source's context token. Conversations and
    texts get tokens by their numbers.
    """
    count = -(-tokens // LENGTH)
    progress.start(count * LENGTH, unit="tokens drawn")
    talks = [document for document in documents if isinstance(document.text, Dialogue)]
    plain = [document for document in documents if not isinstance(document.text, Dialogue)]
    of_talks = round(count * len(talks) / max(len(documents), 1))
    texts: list[SampledText] = []
    with torch.random.fork_rng([source.model.device] if source.model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for chosen, wanted in ((plain, count - of_talks), (talks, of_talks)):
            prompts = _cycle_prompts(source, chosen, random.Random(seed))
            source.model.generation_config = _make_generation_config(source, is_talk=chosen is talks)
            for begin in range(0, wanted, batch):
                if not (begun := list(itertools.islice(prompts, min(batch, wanted - begin)))):
                    break
                drawn = _generate(source, [[*prompt.before, *prompt.ids] for prompt in begun], progress)
                for prompt, ids in zip(begun, drawn, strict=True):
                    named = replace(prompt.document, id=f"sampled-{len(texts):06d}", origin=prompt.document.id)
                    cut = _cut_response if chosen is talks else _cut_to_whole_characters
                    text = cut(source, replace(prompt, document=named), ids)
                    texts += [] if text is None else [text]
    return texts


def _cycle_prompts(source: LoadedSource, documents: Sequence[Document], rng: random.Random) -> Iterator[_Prompt]:
    """Yield the beginnings of documents without end."""
    by_domain: dict[str, list[_Prompt]] = {}
    for document in rng.sample(list(documents), len(documents)):
        prompt = (_begin_response if isinstance(document.text, Dialogue) else _begin_text)(source, document)
        if prompt is not None:
            by_domain.setdefault(document.domain, []).append(prompt)
    if not by_domain:
        plain = [document for document in documents if not isinstance(document.text, Dialogue)]
        empty = {"before": [source.context_token], "ids": [], "starts": [], "begin": 0}
        by_domain = {document.domain: [_Prompt(document=document, **empty)] for document in plain}
    for n in itertools.count() if by_domain else ():
        for domain in sorted(by_domain):
            yield by_domain[domain][n % len(by_domain[domain])]


def _begin_text(source: LoadedSource, document: Document) -> _Prompt | None:
    segmentation = source.vocabulary.segment(document.text)
    if len(segmentation.ids) <= PROMPT:
        return None
    return _Prompt(
        document=document,
        before=[source.context_token],
        ids=segmentation.ids[:PROMPT].tolist(),
        starts=segmentation.starts[:PROMPT].tolist(),
        begin=int(segmentation.starts[PROMPT]),
    )


def _begin_response(source: LoadedSource, document: Document) -> _Prompt | None:
    """Return the beginning of a conversation's last response, at most half of it; what is before it is context.

    Return None if its first token is no text, or nothing fits behind it.
    """
    assert isinstance(document.text, Dialogue)
    before, last = split_last_response(document.text)
    asked = replace(document.text, messages=(*before, last))
    segmentation = source.vocabulary.segment(asked)
    count = min(PROMPT, max((len(segmentation.ids) - 1) // 2, 1))
    if count >= len(segmentation.ids) or not segmentation.spelled[:count].all():
        return None
    reading = segmentation.reading
    assert reading is not None
    first = int(np.argmax(reading.kept))
    if first + count + 1 + LENGTH > source.context_length:
        return None
    return _Prompt(
        document=replace(document, text=asked),
        before=[reading.first, *reading.ids[:first].tolist()],
        ids=segmentation.ids[:count].tolist(),
        starts=segmentation.starts[:count].tolist(),
        begin=int(segmentation.starts[count]),
    )


def _make_generation_config(source: LoadedSource, *, is_talk: bool = False) -> GenerationConfig:
    """Return the settings of drawing text; only a conversation has tokens that end a turn."""
    spelled_ids = list(enumerate(source.vocabulary.token_bytes))
    ends = [i for i, spelled in spelled_ids if spelled == END_OF_TURN and source.vocabulary.read_dialogue is not None]
    silent = [i for i, spelled in spelled_ids if not spelled] + ([] if is_talk else ends)
    return GenerationConfig(
        eos_token_id=ends if is_talk else None,
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
    longest, device = max(map(len, prompts)), source.model.device
    inputs = torch.tensor([[source.context_token] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    counting = StoppingCriteriaList([_DrawCounter(progress)])
    with name_model_errors(source.model.name_or_path, "drawing texts"), torch.inference_mode():
        outputs = source.model.generate(inputs, attention_mask=mask, stopping_criteria=counting)
    return outputs[:, longest:].tolist()


def _cut_response(source: LoadedSource, prompt: _Prompt, drawn: Sequence[int]) -> SampledText | None:
    """Return a conversation whose last response is what was drawn, up to the end of the turn if the source drew one.

    A response that does not end, or that a template may trim because it ends with white space, is cut and unfinished.
    Return None if nothing of it is left.
    """
    strings = [source.vocabulary.token_bytes[i] or b"" for i in drawn]
    count = strings.index(END_OF_TURN) if END_OF_TURN in strings else len(strings)
    data = prompt.document.text.encode()[: prompt.begin] + b"".join(strings[:count])
    is_ended = count < len(strings) and _is_whole(data)
    while not is_ended and count and not _is_whole(data):
        count -= 1
        data = data[: len(data) - len(strings[count])]
    if not count and not is_ended:
        return None
    assert isinstance(prompt.document.text, Dialogue)
    said = replace(prompt.document.text.messages[-1], content=data.decode(), is_unfinished=not is_ended)
    text = replace(prompt.document.text, messages=(*prompt.document.text.messages[:-1], said))
    edges = prompt.begin + np.cumsum([0, *(len(s) for s in strings[: count + is_ended])])
    ids = np.array([*prompt.ids, *drawn[: count + is_ended]], np.int32)
    kept = np.append(np.zeros(len(prompt.before) - 1, bool), np.ones(len(ids), bool))
    segmentation = Segmentation(
        ids=ids,
        starts=np.append(prompt.starts, edges[:-1]).astype(np.int32),
        spelled=np.ones(len(ids), bool),
        size=int(edges[-1]),
        reading=Reading(first=prompt.before[0], ids=np.append(prompt.before[1:], ids).astype(np.int32), kept=kept),
    )
    return SampledText(document=replace(prompt.document, text=text), segmentation=segmentation, begin=prompt.begin)


def _is_whole(data: bytes) -> bool:
    """Tell whether bytes are characters, of which the last is no white space."""
    try:
        return data.decode().rstrip() == data.decode()
    except UnicodeDecodeError:
        return False


def _cut_to_whole_characters(source: LoadedSource, prompt: _Prompt, drawn: Sequence[int]) -> SampledText | None:
    """Return the prompt and what was drawn after it, up to the last token that ends with a whole character.

    Return None if nothing is left.
    """
    ids, lead = [*prompt.ids, *drawn], int(min(prompt.starts, default=0) < 0)
    strings = [source.vocabulary.token_bytes[i] or b"" for i in ids]
    edges = np.append(0, np.cumsum([len(s) for s in strings]))
    try:
        whole = len(b"".join(strings).decode().encode())
    except UnicodeDecodeError as error:
        whole = error.start
    count = int(np.searchsorted(edges, whole, side="right")) - 1
    if count <= len(prompt.ids):
        return None
    text = b"".join(strings[:count])[lead:].decode("utf-8", "ignore")
    if len(text.encode()) != edges[count] - lead:  # the last token ends within a character
        return _cut_to_whole_characters(source, prompt, drawn[: count - len(prompt.ids) - 1])
    segmentation = Segmentation(
        ids=np.array(ids[:count], np.int32),
        starts=(edges[:count] - lead).astype(np.int32),
        spelled=np.ones(count, bool),
        size=len(text.encode()),
    )
    return SampledText(
        document=replace(prompt.document, text=text),
        segmentation=segmentation,
        begin=int(edges[len(prompt.ids)]) - lead,
    )
