"""One document of a run, token by token: what each source and the fusion expect, and which source won."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fuselm import corpus, manifest
from fuselm.foreign_text import escape_controls
from fuselm.models import load_tokenizer, locate
from fuselm.store import Store, Trace
from fuselm.terminal import plain
from fuselm.vocabulary import Vocabulary


def document(folder: Path, number: int, *, top: int) -> Iterator[RenderableType]:
    """Lines and a table for training document `number` of the finished run in `folder`.

    Raises `ValueError` if the run isn't finished or has no such document.
    """
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder}: no finished run there; start it with `fuselm run`, or name another folder")
    stages = {
        stage: folder / path
        for stage, path in manifest.read_json(folder / "run.json", drop=folder / "run.json")["folders"].items()
    }
    target = locate(str(folder / "model"))  # it has the target's tokenizer
    vocabulary = Vocabulary(load_tokenizer(target), target.output_size)
    documents = corpus.read_documents(stages["corpus"], "train")
    if not 0 <= number < len(documents):
        raise ValueError(f"--doc {number}: the run has training documents 0 to {len(documents) - 1}")
    chosen = documents[number]
    fused = Store(stages["fuse"]).read(chosen.id)
    names = manifest.read(stages["fuse"])["counts"]["sources"]
    aligned = [Store(stages[f"align {name}"]).read(chosen.id) for name in names]

    yield plain(f"Document {number} of {len(documents)}: {chosen.id}, {chosen.domain}, {len(fused.tokens)} tokens")
    yield plain(f"Under each model: probability of the token that came, then the {top} most expected.", style="dim")
    table = Table("token", "won", *names, "fused", show_edge=False, pad_edge=False)
    for i, token in enumerate(fused.tokens.tolist()):
        cells = [_expected(trace, i, vocabulary, top) for trace in [*aligned, fused]]
        table.add_row(shown(vocabulary.token_bytes[token]), _winner(fused, i, names), *cells)
    yield table
    bits = ", ".join(
        f"{name} {trace.nats / max(trace.size, 1) / math.log(2):.3f}"
        for name, trace in zip(names, aligned, strict=True)
    )
    mixed = -float(fused.distributions.gold.sum(dtype=float)) / max(fused.size, 1) / math.log(2)
    yield plain(f"Bits per byte of this document: {bits}, fused {mixed:.3f}")


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
    likely = " ".join(f"{shown(vocabulary.token_bytes[ids[k]])} {math.exp(logprobs[k]):.2f}" for k in best)
    return Text.assemble((f"{gold:.3f}", "bold"), "  ", (likely, "dim"))


def shown(token: bytes | None) -> str:
    """A token's text, its white space visible and bytes that are no text as escapes."""
    if token is None:
        return "(special)"
    text = escape_controls(token.decode("utf-8", "backslashreplace")).replace(" ", "·")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)  # other white space
