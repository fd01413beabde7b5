"""Describe a store to people: counts, the bytes of each column, and rows shown as text."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model, locate_tokenizer
from fuselm.models.segmentation import compute_bits_per_byte
from fuselm.models.token_text import show_token
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.sharing import list_users
from fuselm.stores.store import Store, Trace
from fuselm.system.terminal import make_plain_text


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a store's manifest and statistics of its rows.

    Reads the index and a few small columns of each part, but no entries.
    """
    found = Store(folder)
    made, index = found.manifest, found.index
    tokens = max(pc.sum(index["tokens"]).as_py() or 0, 1)
    size = pc.sum(index["bytes"]).as_py() or 0
    tail = nats = 0.0
    informed = 0
    for rows in found.read_columns(["tail", "counts", "nats"]):
        counts = pc.list_flatten(rows["counts"]).to_numpy()
        tail += float(pc.list_flatten(rows["tail"]).to_numpy()[counts > 0].sum(dtype=float))
        informed += int((counts > 0).sum())
        nats += pc.sum(rows["nats"]).as_py() or 0.0
    on_disk = found.count_bytes_by_column()
    files = sum((folder / name).stat().st_size for name in made["files"] if (folder / name).is_file())
    return {
        "folder": str(folder),
        "format": made["format"],
        "stage": made["stage"],
        "key": made["key"],
        "about": made["about"],
        "inputs": made["inputs"],
        "parameters": made["parameters"],
        "documents": len(found),
        "skipped": made["counts"].get("skipped", []),
        "tokens": pc.sum(index["tokens"]).as_py() or 0,
        "text_bytes": size,
        "disk_bytes": files,
        "bytes_per_token": {name: count / tokens for name, count in on_disk.items()} | {"all": files / tokens},
        "entries_per_token": made["counts"]["entries"] / tokens,
        "mean_tail": tail / max(informed, 1),
        "tokens_without_entries": tokens - informed if len(found) else 0,
        "bits_per_byte": compute_bits_per_byte(nats, size) if size and math.isfinite(nats) else None,
    }


def make_facts_table(facts: dict[str, Any]) -> Table:
    """Lay out the facts that `read_facts` returns as a table for a terminal."""
    result = Table.grid(padding=(0, 2))
    shown = {
        "model": facts["about"].get("model") or "not said",
        "stage": f"{facts['stage']} {facts['key']}, format {facts['format']}",
        "inputs": ", ".join(f"{name} {fingerprint[:16]}" for name, fingerprint in facts["inputs"].items()),
        "parameters": ", ".join(f"{name} {value}" for name, value in facts["parameters"].items()),
        "documents": f"{facts['documents']:,}, {len(facts['skipped']):,} skipped",
        "tokens": f"{facts['tokens']:,}, of which {facts['tokens_without_entries']:,} have no entries",
        "text": f"{facts['text_bytes']:,} bytes",
        "on disk": f"{facts['disk_bytes']:,} bytes",
        "entries": f"{facts['entries_per_token']:.2f} a token",
        "tail": f"{facts['mean_tail']:.4f} in the mean",
        "bits per byte": "not known" if facts["bits_per_byte"] is None else f"{facts['bits_per_byte']:.4f}",
        "bytes a token": ", ".join(f"{name} {value:.2f}" for name, value in facts["bytes_per_token"].items()),
    }
    for name, value in shown.items():
        result.add_row(name, value)
    return result


def find_tokenizer(folder: Path, made: Mapping[str, Any], spec: str | None) -> Model | None:
    """Find the tokenizer that a store's ids belong to.

    `spec` names it. Without `spec`, it is the tokenizer of the model that the store was captured from or aligned to, if
    that model is on this machine; otherwise None is returned.

    Raises `ValueError` if `spec` is a different tokenizer from the one the store was made with.
    """
    wanted = made["inputs"].get("tokenizer")
    if spec is None:
        for name in [*_find_models_in_runs(folder), made["about"].get("model")]:
            if isinstance(name, str) and _is_on_this_machine(name):
                with contextlib.suppress(ValueError):  # a folder of that name, which has nothing to do with it
                    model = locate_tokenizer(name)
                    if wanted in (None, model.tokenizer_fingerprint):
                        return model
        return None
    model = locate_tokenizer(spec)
    if wanted in (None, model.tokenizer_fingerprint):
        return model
    raise ValueError(
        f"{folder}: written with tokenizer {wanted}, {spec} has {model.tokenizer_fingerprint}; "
        "point to the tokenizer it was made with"
    )


def _is_on_this_machine(name: str) -> bool:
    """Tell whether a model's name is a file or folder on this machine; the name is untrusted text."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, a home that is nobody's, half a character
        return False


def _find_models_in_runs(folder: Path) -> Iterator[str]:
    """Yield the model or tokenizer that runs name for a store, because stores themselves hold no paths.

    These are the run around the store, or the runs that share it.
    """
    stage, place = folder.resolve().parent, folder.resolve().parents[1]
    for run_folder in (place, *list_users(place)):
        try:
            run = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
            model = run["sources"][folder.name.rpartition("-")[0]] if stage.name == "capture" else run["target"]
            yield model.get("tokenizer") or model["model"]
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
            continue


def show_documents(
    folder: Path, *, documents: int, rows: int, top: int, tokenizer: str | None
) -> Iterator[RenderableType]:
    """Yield the first rows of the first documents, without the entries that were sampled from tails.

    Tokens are shown as text if the tokenizer is found, else as ids.
    """
    found = Store(folder, draws=False)
    model = find_tokenizer(folder, found.manifest, tokenizer)
    vocabulary = None if model is None else load_vocabulary(model)
    if model is not None and vocabulary is not None and "chat" in found.manifest["inputs"]:
        vocabulary = _spell_ends(model, vocabulary)
    if vocabulary is None:
        yield make_plain_text("Token ids, for its tokenizer is not here; --tokenizer names it.", style="dim")
    for document in found.documents[:documents]:
        trace = found.read(document)
        bits = compute_bits_per_byte(trace.nats, trace.size)
        yield make_plain_text(
            f"Document {document}: {len(trace.tokens)} tokens, {trace.size} bytes, {bits:.3f} bits per byte"
        )
        shown = Table("byte", "token", "gold", "tail", "entries", f"the {top} most probable", show_edge=False)
        for i in range(min(rows, len(trace.tokens))):
            shown.add_row(*_make_cells(trace, i, vocabulary, top))
        yield shown


def _spell_ends(model: Model, vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary that knows which tokens end a conversation's turn, if the model's files say so."""
    from fuselm.models.chat.chat_vocabulary import load_chat_vocabulary

    try:
        return load_chat_vocabulary(model, vocabulary, template="plain").vocabulary
    except ValueError:
        return vocabulary


def _make_cells(trace: Trace, i: int, vocabulary: Vocabulary | None, top: int) -> list[Text]:
    def text(token: int) -> str:
        if vocabulary is None or token >= vocabulary.size:
            return str(token)
        return show_token(vocabulary.token_bytes[token])

    d = trace.distributions
    ids, logprobs = d.row(i)
    likely = " ".join(f"{text(token)} {p:.3f}" for token, p in zip(ids[:top].tolist(), np.exp(logprobs), strict=False))
    gold = f"{math.exp(d.gold[i]):.4f}" if len(ids) else "–"
    cells = [str(trace.starts[i]), text(int(trace.tokens[i])), gold, f"{d.tail[i]:.4f}", str(len(ids)), likely]
    return [make_plain_text(cell) for cell in cells]
