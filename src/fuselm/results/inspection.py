"""Show a document of a run token by token: what each source and the fusion expect, and who raised the probability."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fuselm.documents.document_list import read_documents
from fuselm.fusion.attribution import compute_shifts
from fuselm.models.chat.messages import Dialogue
from fuselm.models.segmentation import compute_bits_per_byte
from fuselm.models.token_text import show_token
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Store, Trace
from fuselm.system import manifest
from fuselm.system.foreign_text import escape_controls
from fuselm.system.terminal import COLUMNS_OFF_TERMINAL, make_plain_text

UNFUSED_TARGET = "the target"
MOST_SHOWN = 120  # characters of a message
LEAST_SHIFT = 0.0005  # of a probability; a smaller one would be shown as 0.000
MOST_CHARACTERS, FEWEST_CHARACTERS = 24, 5  # of a token that is shown; longer ones are cut
TOKEN_COLUMN, NUMBER = 16, 5  # columns of a narrow terminal for a token and its mover; of a probability with a space
VocabularyLoader = Callable[[str | None], Vocabulary]  # takes a source's name, or None for the target


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fusion:
    """Hold the fused trace of a document, and how far each source moved the token that came from the target's own."""

    fused: Trace
    names: list[str]
    shifts: Float[ndarray, "tokens sources"]
    target: str | None  # what the target is called; None if its own probabilities are not known

    def find_mover(self, i: int) -> tuple[str, float] | None:
        """Return the source that moved a token most in the direction that fusion moved it, and how far.

        Return None where no source says anything, or where nothing moves by `LEAST_SHIFT`.
        """
        shifts = self.shifts[i]
        mover = int(shifts.argmax() if shifts.sum() >= 0 else shifts.argmin())
        if not self.fused.weights[i].any() or abs(shifts[mover]) < LEAST_SHIFT:
            return None
        return self.names[mover], float(shifts[mover])

    def describe(self, i: int) -> str:
        """Return the text of a token's cell."""
        if not self.fused.weights[i].any():
            return "no source"
        if (found := self.find_mover(i)) is None:
            return "none" if self.target is None else "unchanged"
        name, shift = found
        return f"{name} {shift:.3f}" if self.target is None else f"{name} {shift:+.3f}"

    def explain(self) -> str:
        """Say what the cells mean."""
        if self.target is None:
            return (
                "Raised by: the source that adds most to the fused probability of the token that came, and how much: "
                "its weight x its probability."
            )
        return (
            f"Raised by: the source that moves the probability of the token that came furthest from that of "
            f"{self.target}, and how far: weight x (its probability - the target's). Minus: lowered."
        )

    def summarize(self) -> str:
        """Say how many tokens fusion raised and lowered, and which sources did."""
        movers = [mover for i in range(len(self.shifts)) if (mover := self.find_mover(i))]
        raised = Counter(name for name, shift in movers if shift > 0)
        if self.target is None:
            return f"Tokens by the source that adds most to them: {_list_counts(raised)}."
        lowered = Counter(name for name, shift in movers if shift < 0)
        return (
            f"Against {self.target}: {raised.total()} of {len(self.shifts)} tokens raised ({_list_counts(raised)}), "
            f"{lowered.total()} lowered ({_list_counts(lowered)})."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """Hold how tokens are drawn: which of them, with how many candidates, on lines of how many columns."""

    top: int
    tokens: slice
    width: int

    def draw_table(self, traces: Mapping[str, Trace], vocabulary: Vocabulary, fusion: _Fusion | None) -> Table:
        """Draw what models expect of each token, and who raised the fused probability."""
        ids = next(iter(traces.values())).tokens.tolist()
        chosen = range(*self.tokens.indices(len(ids)))

        def draw(characters: int, is_narrow: bool) -> Table:
            first = ["token"] if is_narrow or fusion is None else ["token", "raised by"]
            table = Table(*first, *traces, show_edge=False, pad_edge=False)
            for i in chosen:
                cells = [self._describe_expected(t, i, vocabulary, characters, is_narrow) for t in traces.values()]
                token = _cut_token(vocabulary, ids[i], TOKEN_COLUMN - 2 if is_narrow else MOST_CHARACTERS)
                mover = [] if fusion is None else [fusion.describe(i)]
                begun = [Text("\n".join([token, *mover]))] if is_narrow else [Text(token), *map(Text, mover)]
                table.add_row(*begun, *cells)
            return table

        wide = draw(MOST_CHARACTERS, is_narrow=False)
        if Console(width=COLUMNS_OFF_TERMINAL, markup=False).measure(wide).maximum <= self.width:
            return wide
        room = (self.width - TOKEN_COLUMN) // len(traces) - 3
        return draw(min(max(room - NUMBER, FEWEST_CHARACTERS), MOST_CHARACTERS), is_narrow=True)

    def _describe_expected(
        self, trace: Trace, i: int, vocabulary: Vocabulary, characters: int, is_narrow: bool
    ) -> Text:
        if not trace.distributions.informed[i]:
            return Text("unknown" if is_narrow else "nothing known", style="dim")
        ids, logprobs = trace.distributions.row(i)
        best = np.argsort(-logprobs, kind="stable")[: self.top]
        gold = math.exp(trace.distributions.gold[i])
        likely = [f"{_cut_token(vocabulary, int(ids[k]), characters)} {math.exp(logprobs[k]):.2f}" for k in best]
        between, after = ("\n", "\n") if is_narrow else (" ", "  ")
        return Text.assemble((f"{gold:.3f}", "bold"), after, (between.join(likely), "dim"), no_wrap=is_narrow)


def _cut_token(vocabulary: Vocabulary, token: int, characters: int) -> str:
    """Return a token's text, cut to so many characters."""
    text = show_token(vocabulary.token_bytes[token])
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _list_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def show_document(
    stages: Mapping[str, Path],
    number: int,
    *,
    top: int,
    load_vocabulary: VocabularyLoader,
    target: tuple[str | None, Path] | None = None,
    tokens: slice = slice(None),
    width: int = COLUMNS_OFF_TERMINAL,
) -> Iterator[RenderableType]:
    """Yield lines and a table for training document `number` of a run, whose `stages` are `run_folders.find_stages`.

    `target` is a store of the target's own distributions, if there is one, with its name as a source or None. A run
    that is not finished is shown as far as it has come: what each source expects, aligned or as it was captured. Only
    the chosen `tokens` are drawn, each model's candidates below one another where lines of `width` columns demand it.

    Raises:
        ValueError: If there is no such document, or if the run's stores do not belong together.
    """
    documents = read_documents(stages["corpus"], "train")
    if not 0 <= number < len(documents):
        raise ValueError(f"document {number}: the run has training documents 0 to {len(documents) - 1}")
    chosen = documents[number]
    names = _list_sources(stages, "align")
    if "fuse" in stages:
        names = _read_fused_sources(stages)
    aligned = {name: _read_trace(stages[f"align {name}"], chosen.id) for name in names}
    size = f", {len(next(iter(aligned.values())).tokens)} tokens" if aligned else ""
    yield make_plain_text(f"Document {number} of {len(documents)}: {chosen.id}, {chosen.domain}{size}")
    if isinstance(chosen.text, Dialogue):
        yield from _draw_dialogue(chosen.text)
    if copies := _list_sources(stages, "fuse"):
        yield make_plain_text(f"Fused pairwise: a copy of the target learns from each of {', '.join(copies)}.")
    elif "fuse" not in stages:
        yield make_plain_text(
            f"Not fused yet: `fuselm fuse` or `fuselm run` does that. Aligned: {', '.join(names) or 'none'}."
        )
    yield make_plain_text(
        f"Under each model: probability of the token that came, then the {top} most expected.", style="dim"
    )
    drawing = _Drawing(top=top, tokens=tokens, width=width)
    if aligned:
        called, own = _read_target(target, aligned, chosen.id)
        fusion = None
        if "fuse" in stages:
            fusion = _attribute(_read_trace(stages["fuse"], chosen.id), aligned, called, own)
        beside = {"target, not fused": own} if own is not None and called == UNFUSED_TARGET else {}
        yield from _draw_aligned(aligned | beside, fusion, load_vocabulary, drawing)
    for name in _list_sources(stages, "capture"):
        if name not in aligned:
            yield from _draw_captured(name, _read_trace(stages[f"capture {name}"], chosen.id), load_vocabulary, drawing)


def _draw_dialogue(dialogue: Dialogue) -> Iterator[RenderableType]:
    """Yield a line for each message; those that are learned are numbered as turns."""
    turn = 0
    for message in dialogue.messages:
        turn += message.is_response
        name = f"{message.role}, turn {turn}" if message.is_response else message.role
        shown = " ".join(message.content.split())
        shown = shown if len(shown) <= MOST_SHOWN else shown[: MOST_SHOWN - 1] + "…"
        yield make_plain_text(f"  {name}: {escape_controls(shown)}", style="dim")


def _read_target(
    target: tuple[str | None, Path] | None, aligned: Mapping[str, Trace], document: str
) -> tuple[str | None, Trace | None]:
    """Return what the target is called, and its trace of a document; None if its store does not have the document."""
    if target is None:
        return None, None
    name, folder = target
    if name in aligned:
        return f"{name}, the target", aligned[name]
    store, first = Store(folder), next(iter(aligned.values()))
    if document not in store:
        return None, None
    trace = store.read(document)
    return (UNFUSED_TARGET, trace) if np.array_equal(trace.tokens, first.tokens) else (None, None)


def _attribute(fused: Trace, aligned: Mapping[str, Trace], called: str | None, own: Trace | None) -> _Fusion:
    """Attribute the fused probabilities to the sources. Raises `ValueError` unless all traces have the same tokens."""
    _check_tokens([*aligned.values(), fused])
    gold = np.stack([trace.distributions.gold for trace in aligned.values()], axis=1)
    shifts = compute_shifts(fused.weights, gold, None if own is None else own.distributions.gold)
    return _Fusion(fused=fused, names=list(aligned), shifts=shifts, target=called)


def _list_sources(stages: Mapping[str, Path], stage: str) -> list[str]:
    return sorted(key.removeprefix(f"{stage} ") for key in stages if key.startswith(f"{stage} "))


def _read_fused_sources(stages: Mapping[str, Path]) -> list[str]:
    """Return the sources that were fused. Raises `ValueError` where they are not those that were aligned."""
    names = manifest.read(stages["fuse"])["counts"].get("sources")
    if not isinstance(names, list) or sorted(map(str, names)) != _list_sources(stages, "align"):
        raise ValueError(
            f"{stages['fuse']}: fused of other sources than were aligned; delete it and run the same command again"
        )
    return names


def _check_tokens(traces: Iterable[Trace]) -> None:
    """Raise `ValueError` unless all traces have the same tokens."""
    first, *others = traces
    for other in others:
        if not np.array_equal(first.tokens, other.tokens):
            raise ValueError(f"document {first.document}: stores of the run have other tokens of it; run it again")


def _check_ids(traces: Iterable[Trace], vocabulary: Vocabulary) -> None:
    """Raise `ValueError` if a trace has an id that the vocabulary does not have."""
    for trace in traces:
        largest = max(int(numbers.max(initial=-1)) for numbers in (trace.tokens, trace.distributions.ids))
        if largest >= len(vocabulary.token_bytes):
            raise ValueError(
                f"document {trace.document}: token {largest} is none of the model's; run `fuselm store verify`"
            )


def _read_trace(store: Path, document: str) -> Trace:
    opened = Store(store)
    if document not in opened:
        raise ValueError(f"{store}: does not have document {document}; take another")
    return opened.read(document)


def _draw_aligned(
    traces: Mapping[str, Trace], fusion: _Fusion | None, load_vocabulary: VocabularyLoader, drawing: _Drawing
) -> Iterator[RenderableType]:
    """Yield what models expect of the target's tokens and, if they are fused, who raised the fused probability."""
    vocabulary = load_vocabulary(None)
    fused = [] if fusion is None else [fusion.fused]
    _check_tokens([*traces.values(), *fused])
    _check_ids([*traces.values(), *fused], vocabulary)
    shown = {**traces, "fused": fusion.fused} if fusion else dict(traces)
    if fusion is not None:
        yield make_plain_text(fusion.explain(), style="dim")
    yield drawing.draw_table(shown, vocabulary, fusion)
    if fusion is not None:
        yield make_plain_text(fusion.summarize())
    bits = ", ".join(f"{name} {compute_bits_per_byte(trace.nats, trace.size):.3f}" for name, trace in traces.items())
    if fusion is not None:
        nats = -float(fusion.fused.distributions.gold.sum(dtype=float))
        mixed = compute_bits_per_byte(nats, fusion.fused.size)
        bits += f", fused {mixed:.3f}"
    yield make_plain_text(f"Bits per byte of this document: {bits}")


def _draw_captured(
    name: str, trace: Trace, load_vocabulary: VocabularyLoader, drawing: _Drawing
) -> Iterator[RenderableType]:
    """Yield what a source expects of its own tokens."""
    vocabulary = load_vocabulary(name)
    _check_ids([trace], vocabulary)
    yield make_plain_text(f"{name}, captured and not aligned yet: {len(trace.tokens)} tokens of its own", style="bold")
    yield drawing.draw_table({name: trace}, vocabulary, None)
    yield make_plain_text(f"Bits per byte of this document: {name} {compute_bits_per_byte(trace.nats, trace.size):.3f}")
