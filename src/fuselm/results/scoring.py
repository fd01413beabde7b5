"""Bits per byte of held-out text, with bootstrap intervals over documents. DESIGN.md sections 3 and 7.

A model's score of a domain is its bits over the bytes of all its documents; the average is the plain mean of domains.
Every byte that its tokenizer does not spell adds 8 bits to those of its tokens. docs/tokenizers.md
Intervals resample documents within each domain; a difference of two models resamples the same documents for both.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.documents.corpus import Document
from fuselm.models.segmentation import BITS_PER_UNSPELLED_BYTE, COMPARABLE

RESAMPLES = 10_000
LEVEL = 0.95
# A percentile interval lies between the smallest and the largest document. So of n documents it misses the middle of
# what they are drawn from with a probability of at least 2^(1-n), that all are above it or all below: 1 for one
# document, a half for two, 6.25 % for five, and only from six on less than the 5 % that it is to have.
FEWEST_DOCUMENTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A model's bits on one document; `unspelled` of its bytes are not spelled by the model's tokenizer."""

    document: str
    domain: str
    bits: float
    bytes: int
    unspelled: int = 0

    def as_row(self) -> dict[str, str | int | float]:
        """Return it as JSON; without `unspelled` where that is 0."""
        return {name: value for name, value in asdict(self).items() if name != "unspelled" or value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value and its 95% bootstrap interval; None where a domain has fewer than `FEWEST_DOCUMENTS`."""

    value: float
    low: float | None
    high: float | None


def score(
    model,
    layer,
    vocabulary,
    context_token: int,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Score]:
    """The bits a model gives to each document, its pieces added up. `advance` hears of tokens done.

    Needs a `transformers` causal LM and its `forward.OutputLayer`. Raises `ValueError` where the model gives NaN.
    """
    import torch

    from fuselm.models import forward

    def gold_logprobs(inputs, mask, gold):
        hidden = forward.hidden_states(model, layer, inputs, mask)[mask.bool()]
        return forward.gold_logprobs(hidden, layer, gold)

    with torch.inference_mode():
        bits = document_bits(
            gold_logprobs,
            model.device,
            vocabulary,
            context_token,
            documents,
            batch_tokens=batch_tokens,
            advance=advance,
        )
    return totals(bits, documents, count_unspelled(vocabulary, documents))


def document_bits(
    gold_logprobs: Callable,
    device,
    vocabulary,
    context_token: int,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda tokens: None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """The bits of each document by its id. `gold_logprobs` gives those of inputs, mask and gold ids, row by row.

    With a share (n, m) only every m-th batch's from the n-th; all m shares call `gold_logprobs` equally often.
    """
    import torch

    from fuselm.models import forward

    segmentations = [vocabulary.segment(d.text) for d in documents]
    bits: dict[str, float] = {}
    batches = forward.batches([len(s.ids) for s in segmentations], batch_tokens)
    for number in range(share[0], -(-len(batches) // share[1]) * share[1], share[1]):
        batch = batches[min(number, len(batches) - 1)]  # the last again, and its bits too, for those without one
        inputs, mask = forward.pad([segmentations[i].ids for i in batch], context_token, device)
        gold = torch.as_tensor(np.concatenate([segmentations[i].ids for i in batch]), device=device).long()
        logprobs = gold_logprobs(inputs, mask, gold).double()
        for i, own in zip(batch, logprobs.split([len(segmentations[i].ids) for i in batch]), strict=True):
            nats = -float(own.sum())
            if math.isnan(nats):
                raise ValueError(f"document {documents[i].id} ({documents[i].domain}): the model gives NaN")
            bits[documents[i].id] = nats / math.log(2)
        advance(sum(len(segmentations[i].ids) for i in batch))
    return bits


def count_unspelled(vocabulary, documents: Sequence[Document]) -> dict[str, int]:
    """Count the bytes of each document that no token spells, by its id; those without any are left out."""
    counts = {d.id: vocabulary.segment(d.text).unspelled_bytes for d in documents}
    return {document: count for document, count in counts.items() if count}


def totals(bits: Mapping[str, float], documents: Sequence[Document], unspelled: Mapping[str, int]) -> list[Score]:
    """Documents as they were before they were cut: the bits and bytes of their pieces added up.

    `bits` are those of tokens; `unspelled` bytes, by document, add 8 each.
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


def unspelled_shares(scores: Sequence[Score]) -> dict[str, float]:
    """Return the share of bytes that the tokenizer does not spell, of those domains where it is not 0, and the mean of
    all domains under `average`. Empty if every byte is spelled.
    """
    domains = {d: [s for s in scores if s.domain == d] for d in sorted({s.domain for s in scores})}
    shares = {d: sum(s.unspelled for s in ss) / max(sum(s.bytes for s in ss), 1) for d, ss in domains.items()}
    lacking = {d: share for d, share in shares.items() if share}
    return lacking | {"average": sum(shares.values()) / len(shares)} if lacking else {}


def is_comparable(unspelled: Mapping[str, float], domain: str) -> bool:
    """Tell whether bits per byte of a domain may be set beside other models'; an average, if all domains' may."""
    shares = unspelled.values() if domain == "average" else [unspelled.get(domain, 0.0)]
    return all(share <= COMPARABLE for share in shares)


def bits_per_byte(scores: Sequence[Score]) -> dict[str, float]:
    """Of each domain, and their mean under `average`."""
    domains = {d: [s for s in scores if s.domain == d] for d in sorted({s.domain for s in scores})}
    values = {d: sum(s.bits for s in ss) / sum(s.bytes for s in ss) for d, ss in domains.items()}
    return values | {"average": sum(values.values()) / len(values)}


class Bootstrap:
    """Resamples of the documents, the same for every model and difference that is asked for."""

    def __init__(self, documents: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0):
        self.order = sorted({(s.domain, s.document) for s in documents})
        self.domains = sorted({domain for domain, _ in self.order})
        self._resamples = resamples
        self._seed = seed

    def intervals(self, *scores: Sequence[Score]) -> dict[str, Interval]:
        """Of one model's bits per byte by domain and `average`; given two models, of the first minus the second."""
        return self.between(*map(self.resampled, scores))

    def between(self, first: "Resampled", *others: "Resampled") -> dict[str, Interval]:
        """The same of what `resampled` gave."""
        value, samples = first
        for other in others:
            value, samples = value - other.value, samples - other.samples
        low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        names = [*self.domains, "average"]
        counts = Counter(domain for domain, _ in self.order)
        few = {d for d in self.domains if counts[d] < FEWEST_DOCUMENTS}
        unknown = few | ({"average"} if few else set())
        return {
            n: Interval(value=v, low=None if n in unknown else lo, high=None if n in unknown else hi)
            for n, v, lo, hi in zip(names, value.tolist(), low.tolist(), high.tolist(), strict=True)
        }

    def resampled(self, scores: Sequence[Score]) -> "Resampled":
        """One model's bits per byte of each domain and the average."""
        of = {(s.domain, s.document): s for s in scores}
        values, samples = [], []
        for n, domain in enumerate(self.domains):
            members = [of[key] for key in self.order if key[0] == domain]
            bits = np.array([s.bits for s in members])
            sizes = np.array([s.bytes for s in members], np.float64)
            values.append(bits.sum() / sizes.sum())
            drawn = np.random.default_rng([self._seed, n]).multinomial(
                len(members), np.full(len(members), 1 / len(members)), size=self._resamples
            )
            samples.append(drawn @ bits / (drawn @ sizes))
        columns, table = np.array(values), np.stack(samples, axis=1)
        return Resampled(np.append(columns, columns.mean()), np.column_stack([table, table.mean(axis=1)]))


class Resampled(NamedTuple):
    """Of the documents, and of each resample of them."""

    value: Float[ndarray, "columns"]
    samples: Float[ndarray, "resamples columns"]


def pooled(seeds: Sequence[Sequence[Score]]) -> list[Score]:
    """Scores of several seeds as one: of each document the sums over those seeds that held it out. A resample then
    draws a document with all that was made of it, as texts that several seeds hold out are no more than one text.
    """
    sums: dict[tuple[str, str], tuple[float, int, int]] = {}
    for score in itertools.chain.from_iterable(seeds):
        bits, size, lacking = sums.get((score.domain, score.document), (0.0, 0, 0))
        sums[score.domain, score.document] = (bits + score.bits, size + score.bytes, lacking + score.unspelled)
    return [
        Score(document=d, domain=of, bits=bits, bytes=size, unspelled=lacking)
        for (of, d), (bits, size, lacking) in sums.items()
    ]


def summarize(scores: Mapping[str, Sequence[Score]], pairs: Sequence[tuple[str, str]]) -> dict:
    """The machine-readable result: every model's intervals, and those of the differences named in `pairs`."""
    bootstrap = Bootstrap(next(iter(scores.values())))

    def row(intervals: Mapping[str, Interval], key: str) -> dict:
        cells = {n: {key: i.value, "low": i.low, "high": i.high} for n, i in intervals.items()}
        return {"domains": {n: c for n, c in cells.items() if n != "average"}, "average": cells["average"]}

    def with_unspelled(row: dict, shares: Mapping[str, float]) -> dict:
        for domain, share in shares.items():
            (row["average"] if domain == "average" else row["domains"][domain])["unspelled"] = share
        return row

    return {
        "models": {
            name: with_unspelled(row(bootstrap.intervals(s), "bits_per_byte"), unspelled_shares(s))
            for name, s in scores.items()
        },
        "differences": {f"{a}-{b}": row(bootstrap.intervals(scores[a], scores[b]), "value") for a, b in pairs},
    }
