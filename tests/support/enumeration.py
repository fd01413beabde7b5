"""Compute exact distributions of small vocabularies by listing every text of a few letters.

A chain of letters gives every text a probability. A tokenizer turns texts into tokens, so the probability of its next
token, given those before it, is a sum over texts: no approximation, whatever the segmentation. Rows that alignment
makes of the exact rows of one tokenizer are averaged in the same way over all texts that share their past, and compared
with the exact conditionals of the other.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import drawn
import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds

from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace

LETTERS = "abc"
ORDER = 2  # letters that the next one depends on
AHEAD = 5  # letters that decide how a tokenizer splits what lies before them
RECALLED = 3  # tokens before a place that decide which token comes, beside the letters of the chain
Row = dict[int, float]


def vocabulary(merges: list[tuple[str, str]]) -> Vocabulary:
    """Make a BPE tokenizer of the letters that merges these pairs, the first ones first."""
    tokens = ["<s>", *LETTERS, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(kinds.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return Vocabulary(tokenizer, tokenizer.get_vocab_size())


@dataclass(frozen=True, slots=True)
class Chain:
    """Hold a letter's probabilities, given the `ORDER` letters before it."""

    letters: dict[str, np.ndarray]

    def probability(self, text: str, after: str = "") -> float:
        """Return the probability that `text` comes next after the letters `after`."""
        whole, result = after + text, 1.0
        for i in range(len(after), len(whole)):
            result *= self.letters[whole[max(i - ORDER, 0) : i]][LETTERS.index(whole[i])]
        return result

    def write(self, length: int, random: np.random.Generator) -> str:
        """Draw a text."""
        text = ""
        for _ in range(length):
            text += random.choice(list(LETTERS), p=self.letters[text[-ORDER:]])
        return text


def random_chain(seed: int) -> Chain:
    random = np.random.default_rng(seed)
    pasts = ["".join(past) for n in range(ORDER + 1) for past in itertools.product(LETTERS, repeat=n)]
    return Chain({past: random.dirichlet(np.full(len(LETTERS), 0.7)) for past in pasts})


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Hold every text of a length, as one tokenizer splits it, with the exact next-token distributions."""

    probabilities: dict[str, float]
    segmentations: dict[str, Segmentation]
    rows: dict[tuple[int, ...], Row]  # by the tokens before

    def trace(self, text: str) -> Trace:
        """Return a text's tokens with their whole rows."""
        ids = self.segmentations[text].ids.tolist()
        return trace_of(self.segmentations[text], [self.rows[tuple(ids[:i])] for i in range(len(ids))])


def list_texts(chain: Chain, length: int) -> dict[str, float]:
    texts = map("".join, itertools.product(LETTERS, repeat=length))
    return {text: chain.probability(text) for text in texts}


def tokenize(vocabulary: Vocabulary, probabilities: dict[str, float]) -> Tokenized:
    segmentations = {text: vocabulary.segment(text) for text in probabilities}
    sums: dict[tuple[int, ...], Row] = defaultdict(lambda: defaultdict(float))
    for text, probability in probabilities.items():
        ids = segmentations[text].ids.tolist()
        for i, token in enumerate(ids):
            sums[tuple(ids[:i])][token] += probability
    rows = {past: normalise(row) for past, row in sums.items()}
    return Tokenized(probabilities, segmentations, rows)


def normalise(row: Row) -> Row:
    total = sum(row.values())
    return {token: mass / total for token, mass in row.items()} if total else {}


def trace_of(segmentation: Segmentation, rows: list[Row], document: str = "d") -> Trace:
    rows = [dict(sorted(row.items(), key=lambda item: -item[1])) for row in rows]
    rows = [{token: p for token, p in row.items() if p > 0} for row in rows]
    gold = [np.log(row[token]) for row, token in zip(rows, segmentation.ids.tolist(), strict=True)]
    return drawn.trace(segmentation, drawn.distributions_of(rows, [0.0] * len(rows), gold), document=document)


def write_documents(chain: Chain, source: Vocabulary, *, count: int, length: int) -> Iterator[tuple[str, Trace]]:
    """Draw texts, with the source's exact rows: a text is as long as the tokens at its end need not matter."""
    random = np.random.default_rng(0)
    futures = list(map("".join, itertools.product(LETTERS, repeat=AHEAD)))

    @functools.cache
    def row(recalled: tuple[int, ...], letters: str) -> Row:
        """Sum over what may come: texts whose split begins with the tokens before, by their next token."""
        before = b"".join(source.token_bytes[i] for i in recalled).decode()
        result: Row = defaultdict(float)
        for future in futures:
            ids = tuple(source.segment(before + future).ids.tolist())
            if ids[: len(recalled)] == recalled and len(ids) > len(recalled):
                result[ids[len(recalled)]] += chain.probability(future, letters)
        return normalise(result)

    for n in range(count):
        text = chain.write(length + AHEAD, random)
        whole = source.segment(text)
        kept = int((whole.ends <= length).sum())
        size = int(whole.ends[kept - 1])
        segmentation = Segmentation(
            ids=whole.ids[:kept], starts=whole.starts[:kept], spelled=whole.spelled[:kept], size=size
        )
        ids = segmentation.ids.tolist()
        rows = [
            row(tuple(ids[max(i - RECALLED, 0) : i]), text[max(begin - ORDER, 0) : begin])
            for i, begin in enumerate(segmentation.starts.tolist())
        ]
        yield text[:size], trace_of(segmentation, rows, document=f"document {n}")


@dataclass(frozen=True, slots=True)
class Branch:
    """Hold the target's next token after one past, if the source has these tokens up to the next byte."""

    mass: float  # probability, given the past
    spelling: tuple[int, ...]  # the target's tokens for what these tokens spell beyond the past
    exact: Row  # the target's next token


def list_branches(
    source: Tokenized, target: Vocabulary, of: Tokenized, before: int
) -> dict[tuple[int, ...], list[Branch]]:
    """List the branches of every past of the target that ends before byte `before`. `of` is the target's texts."""
    sums: dict[tuple, Row] = defaultdict(lambda: defaultdict(float))
    strings: dict[tuple, str] = {}
    for text, probability in of.probabilities.items():
        own, segmentation = source.segmentations[text], of.segmentations[text]
        ids = segmentation.ids.tolist()
        for i, begin in enumerate(segmentation.starts.tolist()):
            if begin < before:
                row = int(np.searchsorted(own.starts, begin, side="right")) - 1
                key = tuple(ids[:i]), tuple(own.ids[: row + 1].tolist())
                sums[key][ids[i]] += probability
                strings[key] = text[begin : int(own.ends[row])]
    masses: dict[tuple[int, ...], float] = defaultdict(float)
    for (past, _), row in sums.items():
        masses[past] += sum(row.values())
    result: dict[tuple[int, ...], list[Branch]] = defaultdict(list)
    for key, row in sums.items():
        if mass := sum(row.values()):
            spelling = tuple(target.segment(strings[key]).ids.tolist())
            result[key[0]].append(Branch(mass / masses[key[0]], spelling, normalise(row)))
    return result


def bound(source: Tokenized, target: Vocabulary, of: Tokenized, before: int, *, remembered: int = 0) -> "Distance":
    """Return the distance of rows that know the branch which the text took, and of others only a table.

    The table is the best there is: by the last token that a branch spells, and the `remembered` tokens before it, the
    exact mean of what the next token then is. It stands for all that a source's rows do not say about branches which
    the text did not take.
    """
    branches = list_branches(source, target, of, before)
    weights = _past_weights(of, before)
    table: dict[tuple, Row] = defaultdict(lambda: defaultdict(float))
    for past, row in branches.items():
        for branch in row:
            if len(branch.spelling) == 1:
                for token, p in branch.exact.items():
                    table[_key(past, branch, remembered)][token] += weights[past] * branch.mass * p
    expected: dict[tuple[int, ...], Row] = {}
    for past, row in branches.items():
        expected[past] = defaultdict(float)
        for branch in row:
            first = {branch.spelling[0]: 1.0}
            guess = normalise(table[_key(past, branch, remembered)]) if len(branch.spelling) == 1 else first
            for share, known in ((branch.mass, branch.exact), (1 - branch.mass, guess)):
                for token, p in known.items():
                    expected[past][token] += branch.mass * share * p
    return distance(expected, weights, of)


def _past_weights(of: Tokenized, before: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every past that a token which begins before byte `before` has."""
    result: dict[tuple[int, ...], float] = defaultdict(float)
    for text, probability in of.probabilities.items():
        segmentation = of.segmentations[text]
        for i in range(int((segmentation.starts < before).sum())):
            result[tuple(segmentation.ids[:i].tolist())] += probability
    return result


def _key(past: tuple[int, ...], branch: Branch, remembered: int) -> tuple:
    return past[len(past) - remembered :] if remembered else (), branch.spelling[-1]


@dataclass(frozen=True, slots=True)
class Distance:
    """Hold how far rows are from the exact conditionals of the next token, as means over tokens."""

    variation: float  # total variation of the expected row; what reaches no id counts as wrong
    divergence: float  # nats: KL of what a target learns of the known ids from the exact conditional


def measure(
    source: Tokenized, target: Tokenized, align: Callable[[Trace, str], Distributions], before: int
) -> Distance:
    """Average the aligned rows over all texts with the same past, for tokens that begin before byte `before`."""
    expected: dict[tuple[int, ...], Row] = defaultdict(lambda: defaultdict(float))
    masses = _past_weights(target, before)
    for text, probability in target.probabilities.items():
        aligned = align(source.trace(text), text)
        segmentation = target.segmentations[text]
        ids = segmentation.ids.tolist()
        for i in range(int((segmentation.starts < before).sum())):
            past = tuple(ids[:i])
            for token, p in drawn.row_of(*aligned.row(i)).items():
                expected[past][token] += probability * p
    rows = {
        past: {token: p / masses[past] for token, p in row.items()} for past, row in expected.items() if masses[past]
    }
    return distance(rows, masses, target)


def distance(rows: dict[tuple[int, ...], Row], masses: dict[tuple[int, ...], float], target: Tokenized) -> Distance:
    """Compare rows with the exact conditionals, by the past; `masses` are the probabilities of pasts."""
    total, variation, divergence = sum(masses.values()), 0.0, 0.0
    for past, row in rows.items():
        mass, exact = masses[past], target.rows[past]
        missing = max(1.0 - sum(row.values()), 0.0)
        variation += mass * (sum(abs(row.get(t, 0.0) - exact.get(t, 0.0)) for t in {*row, *exact}) + missing) / 2
        known = normalise(row)
        divergence += mass * sum(p * np.log(p / max(known.get(t, 0.0), 1e-6)) for t, p in exact.items() if p > 0)
    return Distance(variation / total, divergence / total)
