"""Score models on held-out text, in bits per byte.

A model's score of a domain is the bits of all its documents over their bytes; the average is the plain mean over
domains. Every byte that the model's tokenizer cannot spell adds 8 bits to those of its tokens (docs/tokenizers.md).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from fuselm.documents.document import Document
from fuselm.models.segmentation import BITS_PER_UNSPELLED_BYTE, COMPARABLE, Segmentation

Segmenter = Callable[[Document], Segmentation]
WINDOW_BYTES = 1 << 22  # of text are in memory, tokenized, and grouped into batches by length


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Hold a model's bits on one document, of which its tokenizer cannot spell `unspelled` bytes."""

    document: str
    domain: str
    bits: float
    bytes: int
    unspelled: int = 0

    def as_row(self) -> dict[str, str | int | float]:
        """Return the score as a JSON object, which has `unspelled` only where it is not 0."""
        return {name: value for name, value in asdict(self).items() if name != "unspelled" or value}


def score_documents(
    model,
    layer,
    vocabulary,
    context_token: int,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda tokens: None,
    segment: Segmenter | None = None,
) -> list[Score]:
    """Score a model on documents; the pieces of one document are added up.

    `model` is a `transformers` causal LM and `layer` its `forward.OutputLayer`. `advance` is called with the number of
    tokens that are done. `segment` says what is read of a document, if that is more than its own tokens. Raises
    `ValueError` where the model gives NaN.
    """
    import torch

    from fuselm.models import forward

    def gold_logprobs(inputs, mask, kept, gold):
        hidden = forward.compute_hidden_states(model, layer, inputs, mask)[kept]
        return forward.compute_gold_logprobs(hidden, layer, gold)

    with torch.inference_mode():
        bits = compute_document_bits(
            gold_logprobs,
            model.device,
            vocabulary,
            context_token,
            documents,
            batch_tokens=batch_tokens,
            advance=advance,
            segment=segment,
        )
    return sum_pieces(bits, documents, count_unspelled(vocabulary, documents))


def compute_document_bits(
    gold_logprobs: Callable,
    device,
    vocabulary,
    context_token: int,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda tokens: None,
    share: tuple[int, int] = (0, 1),
    segment: Segmenter | None = None,
) -> dict[str, float]:
    """Compute the bits of the tokens of each document, by its id.

    `gold_logprobs` takes the inputs, the attention mask, flags for the tokens of documents, and their ids, and returns
    the natural log-probability of each of these ids. With `share` (n, m) only every m-th batch is computed, from the
    n-th on; all m shares call `gold_logprobs` equally often, as processes that compute together must. Raises
    `ValueError` where the model gives NaN.
    """
    import torch

    from fuselm.models import forward

    bits: dict[str, float] = {}
    for window in _cut_into_windows(documents):
        segmentations = [vocabulary.segment(d.text) if segment is None else segment(d) for d in window]
        batches = forward.group_into_batches([len(s.read_ids) for s in segmentations], batch_tokens)
        for number in range(share[0], -(-len(batches) // share[1]) * share[1], share[1]):
            batch = batches[min(number, len(batches) - 1)]  # a share that is short of one computes the last one again
            inputs, mask, kept = forward.pad_readings([segmentations[i] for i in batch], context_token, device)
            gold = torch.as_tensor(np.concatenate([segmentations[i].ids for i in batch]), device=device).long()
            logprobs = gold_logprobs(inputs, mask, kept, gold).double()
            for i, own in zip(batch, logprobs.split([len(segmentations[i].ids) for i in batch]), strict=True):
                nats = -float(own.sum())
                if math.isnan(nats):
                    raise ValueError(f"document {window[i].id} ({window[i].domain}): the model gives NaN")
                bits[window[i].id] = nats / math.log(2)
            advance(sum(len(segmentations[i].read_ids) for i in batch))
    return bits


def _cut_into_windows(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield neighbouring documents whose texts are in memory together."""
    window: list[Document] = []
    size = 0
    for document in documents:
        window.append(document)
        size += len(document.text.encode())
        if size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def count_unspelled(vocabulary, documents: Sequence[Document]) -> dict[str, int]:
    """Count the bytes that no token spells in each document, by its id; leave out documents without any."""
    counts = {d.id: vocabulary.segment(d.text).unspelled_bytes for d in documents}
    return {document: count for document, count in counts.items() if count}


def sum_pieces(bits: Mapping[str, float], documents: Sequence[Document], unspelled: Mapping[str, int]) -> list[Score]:
    """Score documents as they were before they were cut, by adding up the bits and bytes of their pieces.

    `bits` are those of the tokens of each piece; each of its `unspelled` bytes adds 8.
    """
    whole: dict[str, float] = {}
    sizes: dict[str, int] = {}
    lacking: dict[str, int] = {}
    domains: dict[str, str] = {}
    for d in documents:
        missing = unspelled.get(d.id, 0)
        whole[d.origin] = whole.get(d.origin, 0.0) + bits[d.id] + BITS_PER_UNSPELLED_BYTE * missing
        sizes[d.origin] = sizes.get(d.origin, 0) + len(d.text.encode())
        lacking[d.origin] = lacking.get(d.origin, 0) + missing
        domains[d.origin] = d.domain
    return [
        Score(document=o, domain=domains[o], bits=whole[o], bytes=n, unspelled=lacking[o]) for o, n in sizes.items()
    ]


def join_scores(pieces: Sequence[Score]) -> list[Score]:
    """Add up the scores of pieces of the same document."""
    whole: dict[str, Score] = {}
    for piece in pieces:
        if (known := whole.get(piece.document)) is not None:
            piece = replace(
                known,
                bits=known.bits + piece.bits,
                bytes=known.bytes + piece.bytes,
                unspelled=known.unspelled + piece.unspelled,
            )
        whole[piece.document] = piece
    return list(whole.values())


def compute_bits_per_byte(scores: Sequence[Score]) -> dict[str, float]:
    """Return the bits per byte of each domain, and their mean under `average`."""
    domains = {d: [s for s in scores if s.domain == d] for d in sorted({s.domain for s in scores})}
    values = {d: sum(s.bits for s in ss) / sum(s.bytes for s in ss) for d, ss in domains.items()}
    return values | {"average": sum(values.values()) / len(values)}


def compute_unspelled_shares(scores: Sequence[Score]) -> dict[str, float]:
    """Return the share of bytes that the tokenizer cannot spell, for the domains where it is not 0.

    The mean over all domains is under `average`. The result is empty if every byte is spelled.
    """
    domains = {d: [s for s in scores if s.domain == d] for d in sorted({s.domain for s in scores})}
    shares = {d: sum(s.unspelled for s in ss) / max(sum(s.bytes for s in ss), 1) for d, ss in domains.items()}
    lacking = {d: share for d, share in shares.items() if share}
    return lacking | {"average": sum(shares.values()) / len(shares)} if lacking else {}


def is_comparable(unspelled: Mapping[str, float], domain: str) -> bool:
    """Tell whether bits per byte of a domain may be compared with other models'.

    An average may be compared if those of all domains may.
    """
    shares = unspelled.values() if domain == "average" else [unspelled.get(domain, 0.0)]
    return all(share <= COMPARABLE for share in shares)
