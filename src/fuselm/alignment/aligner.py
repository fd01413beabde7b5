"""Bring a source's distributions into the target's vocabulary, by one of several methods.

`span`, which is ours, follows the bytes of the text. The papers' methods pair tokens by their strings. A method takes
one trace and the target's segmentation of the same text, and returns the target's rows. A row without entries carries
no information from the source. docs/paper.md and docs/alignment.md explain the methods.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.alignment import branches, maps, mined, span, spelling, turns
from fuselm.alignment.fidelity import Fidelity
from fuselm.alignment.followers import Followers
from fuselm.alignment.stretches import clear_rows
from fuselm.documents.corpus import Document
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model
from fuselm.models.segmentation import BITS_PER_UNSPELLED_BYTE, Segmentation, count_unspelled, find_spelled
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.stores import part_writing
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, Trace
from fuselm.system import machine, part_work
from fuselm.system.progress import Progress

BLOCK_DOCUMENTS = 64  # documents that threads align at a time
SLOWLY_LEARNED = ("cooccurrence", "statistics")  # methods that learn from all of an aligner's texts


class Aligner:
    """Align traces of one source to one target's tokens, document by document.

    Each model is given by its vocabulary, or named as for `locate_model`. `method` is `span`, `branches`, `mined`,
    `exact`, `cooccurrence` or `statistics` (choices.py says what each does), and `top_k` the largest number of entries
    of an aligned row. `cooccurrence` and `statistics` learn their maps from `texts`, which should resemble the texts
    that are aligned; without any, they map as `mined` does. `branches` learns from the source's `traces` what follows
    each of its tokens, or from `texts` if there are no traces. Maps are built once and kept.

    >>> run = fuselm.load_run("mine.yaml", quiet=True)
    >>> document, text = next(iter(run.texts().items()))
    >>> aligner = fuselm.Aligner("models/other", "models/target")
    >>> aligned = aligner.align(run.capture()["other"].read(document), text)
    >>> len(aligned.tokens) == len(aligner.target.segment(text).ids)
    True
    """

    def __init__(
        self,
        source: Vocabulary | Model | Path | str,
        target: Vocabulary | Model | Path | str,
        *,
        method: str = "span",
        top_k: int = 64,
        texts: Sequence[str | Dialogue] = (),
        traces: Store | Iterable[Trace] = (),
    ):
        if method not in METHODS:
            raise ValueError(f"method {method!r}: unknown; needs one of {', '.join(METHODS)}")
        if top_k < 1:
            raise ValueError(f"top_k {top_k}: must be 1 or more, so that a row keeps an entry")
        self.source = source if isinstance(source, Vocabulary) else load_vocabulary(source)
        self.target = target if isinstance(target, Vocabulary) else load_vocabulary(target)
        self.texts = texts
        self._traces = traces
        self.top_k = top_k
        self.method = method
        self._method = METHODS[method]
        self._maps: dict[str, Int[ndarray, "source_vocabulary"]] = {}
        self._same_vocabulary = self.source.token_bytes == self.target.token_bytes

    def align(self, trace: Trace, text: str | Dialogue, segmentation: Segmentation | None = None) -> Trace:
        """Return the trace in the target's tokens; if both models have the same tokens, return the trace itself.

        A conversation is aligned response by response, each model having read it in its own template. `segmentation` is
        the target's of this text, if it is known.

        Tokens that do not spell their bytes carry no information, and each such byte of the source adds to `nats`.

        Raises:
            ValueError: If the trace was not captured from this text.
        """
        data = text.encode()
        if trace.size != len(data):
            raise ValueError(
                f"document {trace.document}: captured from {trace.size} bytes of text, which now has {len(data)}; "
                "capture again"
            )
        span.require_trace(trace, self.source.size, len(data))
        self._require_spelled(trace, text, data)
        target = self.target.segment(text) if segmentation is None else segmentation
        spelled = self.source.find_spelled(trace.tokens, trace.starts, text)
        unspelled = count_unspelled(trace.starts, spelled, trace.size)
        nats = trace.nats + BITS_PER_UNSPELLED_BYTE * math.log(2) * unspelled
        if self._same_vocabulary and np.array_equal(trace.tokens, target.ids):
            if spelled.all() and not unspelled:
                return trace
            return replace(trace, nats=nats, distributions=clear_rows(trace.distributions, ~spelled))
        return replace(
            trace,
            nats=nats,
            tokens=target.ids,
            starts=target.starts,
            distributions=turns.align_by_turn(
                lambda turn: self._method(self, turn.trace, turn.target, turn.data),
                turns.pair_turns(self.source, self.target, trace, target, data),
                len(target.ids),
            ),
            weights=np.zeros((len(target.ids), 0), np.float32),
        )

    def _require_spelled(self, trace: Trace, text: str | Dialogue, data: bytes) -> None:
        """Raise `ValueError` unless a trace's tokens spell its text or equal what the tokenizer makes of it."""
        if self.source.is_spelled_by(trace.tokens, trace.starts, data):
            return
        own = self.source.segment(text)
        if not (np.array_equal(own.ids, trace.tokens) and np.array_equal(own.starts, trace.starts)):
            raise ValueError(
                f"document {trace.document}: its tokens neither spell its text nor are the source tokenizer's; capture "
                "again"
            )

    def count_unspelled(self, trace: Trace, text: str | Dialogue) -> int:
        """Count the bytes of a text that the source's tokens do not spell."""
        spelled = self.source.find_spelled(trace.tokens, trace.starts, text)
        return count_unspelled(trace.starts, spelled, trace.size)

    @functools.cached_property
    def spelling(self) -> spelling.Spelling:
        """Return the source's tokens in the target's, which are spelled at the first use."""
        return spelling.spell_vocabulary(self.source, self.target)

    @functools.cached_property
    def branches(self) -> branches.BranchAligner:
        """Return what makes rows by `branches`; it learns from traces or texts at the first use."""
        return branches.BranchAligner(self.source, self.target, Followers(self.source, self.texts, self._traces))

    def learn_map(self) -> Int[ndarray, "source_vocabulary"]:
        """Return the map that `cooccurrence` or `statistics` learn from all texts, at the first use."""
        build = {"cooccurrence": maps.build_cooccurrence_map, "statistics": maps.build_statistics_map}[self.method]
        return self.map_once(self.method, lambda: build(self.source, self.target, self.texts))

    def adopt_map(self, ids: Sequence[int]) -> None:
        """Take what another process learned as this one's learned map."""
        self._maps[self.method] = np.array(ids, np.int64)

    def map_once(self, name: str, build: Callable[[], Int[ndarray, "ids"]]) -> Int[ndarray, "source_vocabulary"]:
        """Return a map of source ids to target ids, which is built at the first use."""
        if name not in self._maps:
            self._maps[name] = _map_ends(self.source, self.target, build())
        return self._maps[name]


def align_store(
    aligner: Aligner, captured: Store, documents: Sequence[Document], out: Path, *, progress: Progress
) -> dict | None:
    """Write the aligned traces of `documents` to parts in `out`; return the counts and the fidelity of each domain.

    Several processes may do this together; it returns None in those that did not finish.
    """
    if aligner.method in SLOWLY_LEARNED:
        aligner.adopt_map(part_work.prepare_once(out, lambda: aligner.learn_map().tolist()))

    def align_window(window: Sequence[Document]) -> tuple[Iterator[Trace], Callable[[], dict]]:
        sums: dict[str, Fidelity] = {}
        traces = align_documents(aligner, captured, window, sums, progress=progress)
        return traces, lambda: {domain: asdict(of) for domain, of in sums.items()}

    made = part_writing.write_windows(out, documents, align_window, progress=progress)
    if made is None:
        return None
    counts, measured = made
    fidelity = {domain: sums.summarize() for domain, sums in sorted(sum_by_domain(measured).items())}
    return {**counts, "fidelity": fidelity, "vocabulary_size": aligner.target.size}


def align_documents(
    aligner: Aligner, captured: Store, documents: Sequence[Document], sums: dict[str, Fidelity], *, progress: Progress
) -> Iterator[Trace]:
    """Yield the aligned traces of those documents that are captured, and measure them in `sums`, by domain."""
    by_id = {d.id: d for d in documents}
    traces, left = captured.read_in_order(by_id), len(by_id)
    with ThreadPoolExecutor(machine.count_worker_threads()) as threads:
        while block := list(itertools.islice(traces, BLOCK_DOCUMENTS)):
            if not sums:  # this builds the maps before several threads ask for them
                aligner.align(block[0], by_id[block[0].document].text)
            results = threads.map(aligner.align, block, [by_id[trace.document].text for trace in block])
            for trace, result in zip(block, results, strict=True):
                document = by_id[trace.document]
                unspelled = aligner.count_unspelled(trace, document.text)
                sums.setdefault(document.domain, Fidelity()).add(trace, result, unspelled)
                yield result
            progress.advance(len(block))
            left -= len(block)
    progress.advance(left)  # those that the source could not read


def sum_by_domain(measured: Iterable[Mapping[str, Mapping[str, int | float]]]) -> dict[str, Fidelity]:
    """Add up the fidelity of each domain over all parts, in order."""
    total: dict[str, Fidelity] = {}
    for part in measured:
        for domain, sums in part.items():
            total.setdefault(domain, Fidelity()).add_sums(Fidelity(**sums))
    return total


def align_span(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Distributions:
    """Align by `span`, which follows the bytes of the text and gives every target position a row."""
    return span.follow_text(aligner.source, aligner.target, aligner.spelling, trace, target, data, aligner.top_k)[0]


def align_branches(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Distributions:
    """Align as `align_span` does, but give the tokens that did not come what all branches say, whichever was taken."""
    exact = align_span(aligner, trace, target, data)
    return aligner.branches.align(trace, target, data, exact, aligner.top_k)


def align_exact(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Distributions:
    """Align positions where both have a token of the same bytes, and map entries to tokens of the same bytes."""
    source_tokens = zip(trace.starts, _list_token_bytes(aligner.source, trace.tokens), strict=True)
    source_row = {(int(a), t): j for j, (a, t) in enumerate(source_tokens)}
    pairs = [
        (i, source_row[int(b), t])
        for i, (b, t) in enumerate(zip(target.starts, _list_token_bytes(aligner.target, target.ids), strict=True))
        if t is not None and (int(b), t) in source_row
    ]
    equal = aligner.map_once("exact", lambda: _map_equal_tokens(aligner.source, aligner.target))
    return _map_pairs(aligner, trace, target, data, np.array(pairs, np.int64).reshape(-1, 2), equal)


def align_mined(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Distributions:
    """Align by MinED: use one-to-one pairs of positions whose source gold token maps to the target's."""
    nearest = aligner.map_once("mined", lambda: maps.build_nearest_map(aligner.source, aligner.target))
    return _align_by_pairs(aligner, trace, target, data, nearest)


def align_cooccurrence(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Distributions:
    """Align as `align_mined` does, but break ties of edit distance by the neighbors of tokens in its texts."""
    return _align_by_pairs(aligner, trace, target, data, aligner.learn_map())


def align_statistics(aligner: Aligner, trace: Trace, target: Segmentation, data: bytes) -> Distributions:
    """Align as `align_mined` does, but with the map that pairs of positions in its texts suggest (FuseChat)."""
    return _align_by_pairs(aligner, trace, target, data, aligner.learn_map())


METHODS: dict[str, Callable[[Aligner, Trace, Segmentation, bytes], Distributions]] = {
    "span": align_span,
    "branches": align_branches,
    "mined": align_mined,
    "exact": align_exact,
    "cooccurrence": align_cooccurrence,
    "statistics": align_statistics,
}


def _align_by_pairs(
    aligner: Aligner, trace: Trace, target: Segmentation, data: bytes, ids: Int[ndarray, "v"]
) -> Distributions:
    """Align one-to-one pairs of positions whose gold tokens map to each other by the map `ids`."""
    path = mined.pair_positions(
        mined.strip_word_marks(aligner.source, trace.tokens), mined.strip_word_marks(aligner.target, target.ids)
    )
    sources, targets = path[:, 0], path[:, 1]
    are_one_to_one = (np.bincount(sources, minlength=1)[sources] == 1) & (
        np.bincount(targets, minlength=1)[targets] == 1
    )
    are_mapped = ids[trace.tokens[sources]] == target.ids[targets]
    return _map_pairs(aligner, trace, target, data, path[are_one_to_one & are_mapped][:, ::-1], ids)


def _map_pairs(
    aligner: Aligner,
    trace: Trace,
    target: Segmentation,
    data: bytes,
    pairs: Int[ndarray, "pairs 2"],
    ids: Int[ndarray, "v"],
) -> Distributions:
    """Give each pair's target row the source row's entries by the map `ids`, and its gold token for the source's.

    A pair is skipped if one of its tokens does not spell its bytes.
    """
    spelled = find_spelled(aligner.source.spell(trace.tokens.tolist()), trace.starts, data)
    pairs = pairs[target.spelled[pairs[:, 0]] & spelled[pairs[:, 1]]]
    d = add_gold_entries(trace).distributions
    entries, owner = _find_entries(d, pairs[:, 1])
    is_gold = d.ids[entries] == trace.tokens[pairs[owner, 1]]
    mapped = np.where(is_gold, target.ids[pairs[owner, 0]], ids[d.ids[entries]])
    found = mapped != UNMAPPED
    informed = np.zeros(len(target.ids), bool)
    informed[pairs[:, 0]] = True
    return Distributions.from_masses(
        pairs[owner[found], 0],
        mapped[found],
        np.exp(d.logprobs[entries[found]].astype(np.float64)),
        target.ids,
        informed,
        aligner.top_k,
    )


def _find_entries(d: Distributions, rows: Int[ndarray, "rows"]) -> tuple[Int[ndarray, "e"], Int[ndarray, "e"]]:
    """Return the indices of all entries of the given rows, and for each entry the row that it belongs to."""
    counts = d.counts[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return d.offsets[rows][owner] + within, owner


def add_gold_entries(trace: Trace) -> Trace:
    """Return the trace with its gold tokens among the entries; the mass of one that was not there leaves the tail."""
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


def _map_equal_tokens(source: Vocabulary, target: Vocabulary) -> Int[ndarray, "source_vocabulary"]:
    """Map each source id to the target id of the same bytes."""
    return np.array([target.id_by_bytes.get(s, UNMAPPED) if s else UNMAPPED for s in source.token_bytes], np.int64)


def _map_ends(
    source: Vocabulary, target: Vocabulary, ids: Int[ndarray, "source_vocabulary"]
) -> Int[ndarray, "source_vocabulary"]:
    """Return the map with the ends of a turn mapped to the target's, and nothing else to that."""
    end = target.id_by_bytes.get(END_OF_TURN)
    if source.read_dialogue is None or target.read_dialogue is None or end is None:
        return ids
    is_source_end = np.array([spelled == END_OF_TURN for spelled in source.token_bytes])
    is_target_end = np.array([spelled == END_OF_TURN for spelled in target.token_bytes])
    ends_wrongly = (ids != UNMAPPED) & is_target_end[ids]
    return np.where(is_source_end, end, np.where(ends_wrongly, UNMAPPED, ids))


def _list_token_bytes(vocabulary: Vocabulary, ids: Int[ndarray, "tokens"]) -> list[bytes | None]:
    return [vocabulary.token_bytes[i] for i in ids]
