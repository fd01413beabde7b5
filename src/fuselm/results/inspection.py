"""Show a document of a run token by token: what each source and the fusion expect, and which source won."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fuselm.documents import corpus
from fuselm.models.token_text import show_token
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Store, Trace
from fuselm.system import manifest
from fuselm.system.terminal import make_plain_text

VocabularyLoader = Callable[[str | None], Vocabulary]  # takes a source's name, or None for the target


def show_document(
    stages: Mapping[str, Path], number: int, *, top: int, load_vocabulary: VocabularyLoader
) -> Iterator[RenderableType]:
    """Yield lines and a table for training document `number` of a run, whose `stages` are `run_folders.find_stages`.

    A run that is not finished is shown as far as it has come: what each source expects, aligned or as it was captured.
    Raises `ValueError` if there is no such document.
    """
    documents = corpus.read_documents(stages["corpus"], "train")
    if not 0 <= number < len(documents):
        raise ValueError(f"--doc {number}: the run has training documents 0 to {len(documents) - 1}")
    chosen = documents[number]
    names = _names(stages, "align")
    if "fuse" in stages:
        names = _fused_names(stages)
    aligned = {name: _read(stages[f"align {name}"], chosen.id) for name in names}
    size = f", {len(next(iter(aligned.values())).tokens)} tokens" if aligned else ""
    yield make_plain_text(f"Document {number} of {len(documents)}: {chosen.id}, {chosen.domain}{size}")
    if "fuse" not in stages:
        yield make_plain_text(
            f"Not fused yet: `fuselm fuse` or `fuselm run` does that. Aligned: {', '.join(names) or 'none'}."
        )
    yield make_plain_text(
        f"Under each model: probability of the token that came, then the {top} most expected.", style="dim"
    )
    if aligned:
        fused = _read(stages["fuse"], chosen.id) if "fuse" in stages else None
        yield from _aligned(aligned, fused, load_vocabulary, top)
    for name in _names(stages, "capture"):
        if name not in aligned:
            yield from _captured(name, _read(stages[f"capture {name}"], chosen.id), load_vocabulary, top)


def _names(stages: Mapping[str, Path], stage: str) -> list[str]:
    return sorted(key.removeprefix(f"{stage} ") for key in stages if key.startswith(f"{stage} "))


def _fused_names(stages: Mapping[str, Path]) -> list[str]:
    """Return the sources that were fused. Raises `ValueError` where they are not those that were aligned."""
    names = manifest.read(stages["fuse"])["counts"].get("sources")
    if not isinstance(names, list) or sorted(map(str, names)) != _names(stages, "align"):
        raise ValueError(
            f"{stages['fuse']}: fused of other sources than were aligned; delete it and run the same command again"
        )
    return names


def _check(traces: Iterable[Trace], vocabulary: Vocabulary, document: str) -> None:
    """Raise `ValueError` unless all have the same tokens, and only what the vocabulary has."""
    tokens = None
    for trace in traces:
        largest = max(int(numbers.max(initial=-1)) for numbers in (trace.tokens, trace.distributions.ids))
        if largest >= len(vocabulary.token_bytes):
            raise ValueError(f"document {document}: token {largest} is none of the model's; run `fuselm store verify`")
        if tokens is not None and not np.array_equal(tokens, trace.tokens):
            raise ValueError(f"document {document}: stores of the run have other tokens of it; run it again")
        tokens = trace.tokens


def _read(store: Path, document: str) -> Trace:
    opened = Store(store)
    if document not in opened:
        raise ValueError(f"{store}: does not have document {document}; take another --doc")
    return opened.read(document)


def _aligned(
    aligned: Mapping[str, Trace], fused: Trace | None, load_vocabulary: VocabularyLoader, top: int
) -> Iterator[RenderableType]:
    """Yield what sources expect of the target's tokens, and what their fusion does and which source won, if there."""
    vocabulary = load_vocabulary(None)
    _check([*aligned.values(), *([] if fused is None else [fused])], vocabulary, next(iter(aligned.values())).document)
    names = list(aligned)
    won = ["won"] if fused is not None else []
    table = Table("token", *won, *names, *(["fused"] if won else []), show_edge=False, pad_edge=False)
    for i, token in enumerate(next(iter(aligned.values())).tokens.tolist()):
        cells = [_expected(trace, i, vocabulary, top) for trace in aligned.values()]
        if fused is not None:
            cells = [_winner(fused, i, names), *cells, _expected(fused, i, vocabulary, top)]
        table.add_row(show_token(vocabulary.token_bytes[token]), *cells)
    yield table
    bits = ", ".join(f"{name} {trace.nats / max(trace.size, 1) / math.log(2):.3f}" for name, trace in aligned.items())
    if fused is not None:
        mixed = -float(fused.distributions.gold.sum(dtype=float)) / max(fused.size, 1) / math.log(2)
        bits += f", fused {mixed:.3f}"
    yield make_plain_text(f"Bits per byte of this document: {bits}")


def _captured(name: str, trace: Trace, load_vocabulary: VocabularyLoader, top: int) -> Iterator[RenderableType]:
    """Yield what a source expects of its own tokens."""
    vocabulary = load_vocabulary(name)
    _check([trace], vocabulary, trace.document)
    yield make_plain_text(f"{name}, captured and not aligned yet: {len(trace.tokens)} tokens of its own", style="bold")
    table = Table("token", name, show_edge=False, pad_edge=False)
    for i, token in enumerate(trace.tokens.tolist()):
        table.add_row(show_token(vocabulary.token_bytes[token]), _expected(trace, i, vocabulary, top))
    yield table
    yield make_plain_text(f"Bits per byte of this document: {name} {trace.nats / max(trace.size, 1) / math.log(2):.3f}")


def _winner(fused: Trace, i: int, names: list[str]) -> str:
    weights = fused.weights[i]
    if not weights.any():
        return "none"
    leaders = np.flatnonzero(weights == weights.max())
    return " ".join(f"{names[s]}" + ("" if weights[s] == 1 else f" {weights[s]:.2f}") for s in leaders)


def _expected(trace: Trace, i: int, vocabulary: Vocabulary, top: int) -> Text:
    if not trace.distributions.informed[i]:
        return Text("nothing known", style="dim")
    ids, logprobs = trace.distributions.row(i)
    best = np.argsort(-logprobs, kind="stable")[:top]
    gold = math.exp(trace.distributions.gold[i])
    likely = " ".join(f"{show_token(vocabulary.token_bytes[ids[k]])} {math.exp(logprobs[k]):.2f}" for k in best)
    return Text.assemble((f"{gold:.3f}", "bold"), "  ", (likely, "dim"))
