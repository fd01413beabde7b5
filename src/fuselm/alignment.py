"""A source's distributions, brought into the target's vocabulary. DESIGN.md section 4, docs/paper.md.

`span` (ours) goes by the bytes of the text; `mined` (the paper's) and `exact` pair token strings. A method takes one
trace and the target's segmentation of the same text, and gives masses for target rows; a row that gets none carries no
information of the source.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm import mined
from fuselm.distributions import Distributions
from fuselm.store import Trace
from fuselm.vocabulary import UNMAPPED, Segmentation, Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Masses:
    """Probability masses on their way to target rows; those that meet on one id of one row will be added."""

    rows: Int[ndarray, "masses"]
    ids: Int[ndarray, "masses"]
    values: Float[ndarray, "masses"]
    informed: Bool[ndarray, "tokens"]


class Aligner:
    """From one source's vocabulary to one target's; keeps the maps it has built from document to document.

    `top_k` bounds the entries of an aligned row.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary, *, method: str = "span", top_k: int = 64):
        self.source = source
        self.target = target
        self.top_k = top_k
        self._method = METHODS[method]
        self._maps: dict[str, Int[ndarray, "source_vocabulary"]] = {}
        self._same_vocabulary = source.token_bytes == target.token_bytes

    def align(self, trace: Trace, text: str) -> Trace:
        """The trace in the target's tokens; the same trace where both have the same tokens.

        Raises `ValueError` if the trace was not made of this text.
        """
        data = text.encode()
        if trace.size != len(data):
            raise ValueError(
                f"document {trace.document}: captured from {trace.size} bytes of text, which now has {len(data)}; "
                "capture again"
            )
        target = self.target.segment(text)
        if self._same_vocabulary and np.array_equal(trace.tokens, target.ids):
            return trace
        masses = self._method(self, _with_gold_entries(trace), target, data)
        return replace(
            trace,
            tokens=target.ids,
            starts=target.starts,
            distributions=Distributions.from_masses(
                masses.rows, masses.ids, masses.values, target.ids, masses.informed, self.top_k
            ),
            weights=np.zeros((len(target.ids), 0), np.float32),
        )

    def map_once(self, name: str, build: Callable[[], Int[ndarray, "ids"]]) -> Int[ndarray, "source_vocabulary"]:
        """A map of source ids to target ids, built at its first use."""
        if name not in self._maps:
            self._maps[name] = build()
        return self._maps[name]


def span(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Masses:
    """Follow the source's gold path until the target's token is covered; what leaves the path on the way goes to the
    token that the target would spell it with.

    Target token i begins at byte b, inside source token j. Each entry x of row j, put in place of token j, is a string
    from the beginning of the target token that j begins in; the target's tokens for that string say where x belongs:
    it is consistent with the text so far if they begin with the target tokens before i, and then the next one of them
    gets its mass (none: x ends at b, and what the source would say next is unknown: tail). The gold entry, if it ends
    before target token i does, hands its mass on to row j+1; else its mass is token i's. So a row sums to 1
    with its tail, and by the chain rule the gold masses of a text multiply to the source's own probability of it, but
    for what other paths to the same tokens add, and the tail's share in rows that are conditioned.
    """
    source, d = aligner.source, trace.distributions
    gold_p = np.exp(d.gold.astype(np.float64)).tolist()
    tokens = trace.tokens.tolist()
    starts, ends = trace.starts.tolist(), [*trace.starts[1:].tolist(), trace.size]
    target_starts, target_ids = target.starts.tolist(), target.ids.tolist()
    stream = b" " + data  # byte p of the text is stream[p + 1]: a tokenizer may put a space at -1

    walk = _Walk(source=source, target=aligner.target, distributions=d, tokens=tokens)
    informed = np.zeros(len(target.ids), bool)
    begun = 0  # the target token that source token j begins in
    j = 0
    for i, (b, e) in enumerate(zip(target_starts, target.ends.tolist(), strict=True)):
        if b == e:
            continue  # a token without text of its own: the source says nothing of it
        while j < len(starts) and not (ends[j] > b or starts[j] == b):
            j += 1
        if j == len(starts):
            break
        informed[i] = True
        mass, row, prefix = 1.0, j, stream[b + 1 : starts[j] + 1]
        faithful = source.token_bytes[tokens[j]] == stream[starts[j] + 1 : ends[j] + 1]
        after_dummy = i > 0 and target_starts[0] < starts[0] == b  # the target has spelled a space of its own, no text
        if starts[j] < b or (after_dummy and faithful):
            while begun + 1 < i and target_starts[begun + 1] <= starts[j]:
                begun += 1
            before = stream[target_starts[begun] + 1 : starts[j] + 1]
            typed = stream[starts[j] + 1 : b + 1]
            hidden = stream[starts[j] + 1 : target_starts[begun] + 1]  # a space put before the text by the source alone
            mass = walk.conditioned(i, j, before, typed, hidden, target_ids[begun:i]) if faithful else 1.0
            row, prefix = j + 1, stream[b + 1 : ends[j] + 1]
        while row < len(starts) and (row == j or ends[row - 1] < e):
            walk.step(i, row, prefix, mass)
            mass *= gold_p[row]
            prefix = stream[b + 1 : ends[row] + 1]
            row += 1
        walk.put(i, target_ids[i], mass)
    return walk.masses(informed, _first_tokens(aligner))


@dataclass(slots=True, kw_only=True)
class _Walk:
    """Where `span` leaves masses on its way. Entries of whole rows wait for one look-up of all of them."""

    source: Vocabulary
    target: Vocabulary
    distributions: Distributions
    tokens: list[int]
    whole: list[tuple[int, int, float]] = field(default_factory=list)  # target row, source row, mass
    rows: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def put(self, i: int, token: int, mass: float) -> None:
        self.rows.append(i)
        self.ids.append(token)
        self.values.append(mass)

    def step(self, i: int, row: int, prefix: bytes, mass: float) -> None:
        """All entries of a source row but the gold one, after `prefix`, with their share of `mass`."""
        if not prefix:
            self.whole.append((i, row, mass))
            return
        entries = [(s, p) for token, s, p in self._entries(row) if token != self.tokens[row]]
        for ids, (_, p) in zip(self.target.encode_bytes([prefix + s for s, _ in entries]), entries, strict=True):
            self.put(i, ids[0], mass * p)

    def conditioned(self, i: int, row: int, before: bytes, typed: bytes, hidden: bytes, past: list[int]) -> float:
        """The entries of a row that agree with what has come of its token; returns the gold one's probability.

        `before` is the text between the beginning of `past` and that of the source token; the target tokens `past`
        cover it and `typed`, of which `hidden` lies before them all. The part of the tail that agrees is estimated as
        if it were spread evenly over ids that are not kept.
        """
        entries = self._entries(row)
        encoded = self.target.encode_bytes([before + s.removeprefix(hidden) for _, s, _ in entries])
        agreeing, gold, continuing = [], 0.0, 0
        for (token, s, p), ids in zip(entries, encoded, strict=True):
            continuing += len(s) > len(typed) and s.startswith(typed)
            if token == self.tokens[row]:
                gold = p
            elif s.startswith(hidden) and list(ids[: len(past)]) == past:
                agreeing.append((ids[len(past)] if len(ids) > len(past) else UNMAPPED, p))
        longer = sum(token != UNMAPPED for token, _ in agreeing) + 1
        unkept = self.source.count_with_bytes() - len(entries)
        share = (self.source.count_continuing(typed) - continuing) / unkept * longer / continuing if unkept else 0.0
        total = gold + sum(p for _, p in agreeing) + float(self.distributions.tail[row]) * share
        if total == 0.0:  # all too small for a float
            return 0.0
        for token, p in agreeing:
            self.put(i, token, p / total)
        return gold / total

    def _entries(self, row: int) -> list[tuple[int, bytes, float]]:
        """Ids, bytes and probabilities of a row's entries that stand for text."""
        ids, logprobs = self.distributions.row(row)
        probabilities = np.exp(logprobs.astype(np.float64)).tolist()
        spelled = self.source.token_bytes
        return [(t, s, p) for t, p in zip(ids.tolist(), probabilities, strict=True) if (s := spelled[t]) is not None]

    def masses(self, informed: Bool[ndarray, "tokens"], first: Int[ndarray, "source_vocabulary"]) -> Masses:
        """All of them, entries of whole rows by the map `first`."""
        d = self.distributions
        target_rows, source_rows = (np.array([w[k] for w in self.whole], np.int64) for k in (0, 1))
        entries, owner = _entries_of(d, source_rows)
        not_gold = d.ids[entries] != np.array(self.tokens, np.int64)[source_rows[owner]]
        entries, owner = entries[not_gold], owner[not_gold]
        shares = np.array([w[2] for w in self.whole])[owner] * np.exp(d.logprobs[entries].astype(np.float64))
        rows = np.concatenate([target_rows[owner], np.array(self.rows, np.int64)])
        ids = np.concatenate([first[d.ids[entries]], np.array(self.ids, np.int64)])
        values = np.concatenate([shares, np.array(self.values, np.float64)])
        mapped = ids != UNMAPPED
        return Masses(rows=rows[mapped], ids=ids[mapped], values=values[mapped], informed=informed)


def exact(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Masses:
    """Use a target position only where source and target have the same token, by its bytes; map entries likewise."""
    source_tokens = zip(trace.starts, _spelled(aligner.source, trace.tokens), strict=True)
    source_row = {(int(a), t): j for j, (a, t) in enumerate(source_tokens)}
    pairs = [
        (i, source_row[int(b), t])
        for i, (b, t) in enumerate(zip(target.starts, _spelled(aligner.target, target.ids), strict=True))
        if t is not None and (int(b), t) in source_row
    ]
    equal = aligner.map_once("exact", lambda: _equal_tokens(aligner.source, aligner.target))
    return _mapped(trace, target, np.array(pairs, np.int64).reshape(-1, 2), equal)


def paper(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Masses:
    """MinED: one-to-one pairs of positions, where the source's gold token maps to the target's."""
    source_mark, target_mark = aligner.source.word_mark, aligner.target.word_mark
    path = mined.pair_positions(
        _unmarked(aligner.source, trace.tokens, source_mark), _unmarked(aligner.target, target.ids, target_mark)
    )
    sources, targets = path[:, 0], path[:, 1]
    once = (np.bincount(sources, minlength=1)[sources] == 1) & (np.bincount(targets, minlength=1)[targets] == 1)
    nearest = aligner.map_once("mined", lambda: np.full(aligner.source.size, UNMAPPED - 1, np.int64))
    needed = np.unique(trace.distributions.ids)
    unknown = needed[nearest[needed] == UNMAPPED - 1]
    if len(unknown):
        strings = [aligner.source.token_strings[t] or "" for t in unknown]
        if source_mark:
            strings = [string.replace(source_mark, target_mark) for string in strings]
        found = mined.nearest_tokens(strings, aligner.target.token_strings)
        is_text = np.array([b is not None for b in aligner.target.token_bytes])
        nearest[unknown] = np.where(is_text[found], found, UNMAPPED)
    meets = nearest[trace.tokens[sources]] == target.ids[targets]
    return _mapped(trace, target, path[once & meets][:, ::-1], nearest)


METHODS: dict[str, Callable[[Aligner, Trace, Segmentation, bytes], Masses]] = {
    "span": span,
    "mined": paper,
    "exact": exact,
}


def _mapped(trace: Trace, target: Segmentation, pairs: Int[ndarray, "pairs 2"], ids: Int[ndarray, "v"]) -> Masses:
    """Each paired target row gets its source row's entries, by a map of ids."""
    d = trace.distributions
    entries, owner = _entries_of(d, pairs[:, 1])
    is_gold = d.ids[entries] == trace.tokens[pairs[owner, 1]]
    mapped = np.where(is_gold, target.ids[pairs[owner, 0]], ids[d.ids[entries]])
    found = mapped != UNMAPPED
    informed = np.zeros(len(target.ids), bool)
    informed[pairs[:, 0]] = True
    return Masses(
        rows=pairs[owner[found], 0],
        ids=mapped[found],
        values=np.exp(d.logprobs[entries[found]].astype(np.float64)),
        informed=informed,
    )


def _entries_of(d: Distributions, rows: Int[ndarray, "rows"]) -> tuple[Int[ndarray, "e"], Int[ndarray, "e"]]:
    """Indices of all entries of the given rows, and for each, which of the given rows it belongs to."""
    counts = d.counts[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return d.offsets[rows][owner] + within, owner


def _with_gold_entries(trace: Trace) -> Trace:
    """The same trace, its gold tokens among the entries; where one was not, its mass comes out of the tail."""
    d = trace.distributions
    has_gold = np.zeros(len(d), bool)
    has_gold[d.rows[d.ids == trace.tokens[d.rows]]] = True
    missing = np.flatnonzero(~has_gold)
    at = d.offsets[missing + 1]
    tail = d.tail.astype(np.float64)
    tail[missing] = np.maximum(tail[missing] - np.exp(d.gold[missing]), 0.0)
    return replace(
        trace,
        distributions=Distributions(
            offsets=d.offsets + np.append(0, np.cumsum(~has_gold)),
            ids=np.insert(d.ids, at, trace.tokens[missing]),
            logprobs=np.insert(d.logprobs, at, d.gold[missing]),
            gold=d.gold,
            tail=tail.astype(np.float32),
        ),
    )


def _first_tokens(aligner: Aligner) -> Int[ndarray, "source_vocabulary"]:
    """The token that the target would begin each source token with."""

    def build() -> Int[ndarray, "source_vocabulary"]:
        spelled = aligner.source.token_bytes
        known = [i for i, string in enumerate(spelled) if string is not None]
        ids = np.full(len(spelled), UNMAPPED, np.int64)
        ids[known] = [t[0] for t in aligner.target.encode_bytes([spelled[i] or b"" for i in known])]
        return ids

    return aligner.map_once("span", build)


def _equal_tokens(source: Vocabulary, target: Vocabulary) -> Int[ndarray, "source_vocabulary"]:
    return np.array([target.id_of.get(s, UNMAPPED) if s else UNMAPPED for s in source.token_bytes], np.int64)


def _spelled(vocabulary: Vocabulary, ids: Int[ndarray, "tokens"]) -> list[bytes | None]:
    return [vocabulary.token_bytes[i] for i in ids]


def _unmarked(vocabulary: Vocabulary, ids: Int[ndarray, "tokens"], mark: str) -> list[str]:
    strings = [vocabulary.token_strings[i] or "" for i in ids]
    return [s.replace(mark, "") for s in strings] if mark else strings
