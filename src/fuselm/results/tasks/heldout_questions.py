"""Make questions with known answers from held-out documents of one domain; they depend on nothing else.

`ask_last_words` asks for the last word of a sentence or line, given all the document before it, as LAMBADA does.
`ask_continuations` asks which of four texts comes next: the document's own, or one of three that come after the same
word in other documents, so that grammar alone does not tell.
"""

import functools
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fuselm.documents.corpus import Document
from fuselm.system import atomic_files

LAST_WORDS, CONTINUATIONS = 400, 150  # questions of a domain at most; those of the second are read four times
FEWEST = 2  # questions of a domain; lm-eval's standard errors need two
BEFORE = 120  # characters of the document before the answer, at least
TOLD = 100  # of them that `continuation` tells; with three times as many a small model is right nine times of ten
LENGTH = 40  # bytes of a continuation, at most

_LAST_WORD = re.compile(r"(?<=\S) ([^\W\d_]{4,})(?=[.!?…]|\W*(?:\n|\Z))")
_PLACE = re.compile(r"(\S+) (?=\w)")


def write_settings(documents: Sequence[Document]) -> dict[str, list[dict[str, Any]]]:
    """Return lm-eval's settings of a task for each kind and domain with questions, by kind.

    Raises:
        ValueError: If the documents are too few or too short to ask about.
    """
    kinds = {"last_words": (ask_last_words, _LAST_WORDS), "continuations": (ask_continuations, _CONTINUATIONS)}
    settings: dict[str, list[dict[str, Any]]] = {}
    for kind, (ask, shared) in kinds.items():
        settings[kind] = []
        for domain in sorted({d.domain for d in documents}):
            rows = ask([d for d in documents if d.domain == domain])
            if len(rows) >= FEWEST:
                name = re.sub(r"\W+", "_", f"{kind}_{domain}")
                settings[kind].append({"task": name, **shared, "custom_dataset": functools.partial(_load, rows=rows)})
        if not settings[kind]:
            raise ValueError(
                f"evaluate.tasks: {kind}: the held-out documents are too few or too short to ask about; hold out more"
            )
    return settings


def write_task_files(settings: Mapping[str, Any], folder: Path) -> None:
    """Write the questions and a task file into a folder, so that lm-eval's own command can ask any model the same."""
    name, rows = settings["task"], settings["custom_dataset"].keywords["rows"]
    file = folder / f"{name}.jsonl"
    atomic_files.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    plain = {key: value for key, value in settings.items() if key not in ("custom_dataset", "process_results")}
    text = yaml.safe_dump(plain | {"dataset_kwargs": {"file": file.name}}, sort_keys=False, allow_unicode=True)
    text += f"custom_dataset: !function {__name__}.load_questions\n"
    if "process_results" in settings:
        text += f"process_results: !function {__name__}.{settings['process_results'].__name__}\n"
    atomic_files.write_text(folder / f"{name}.yaml", text)


def load_questions(file: str, config_source: str, **_: Any) -> dict[str, Any]:
    """Return the questions of a file that is beside its task file, as lm-eval takes them."""
    lines = (Path(config_source).parent / file).read_text(encoding="utf-8").splitlines()
    return _load([json.loads(line) for line in lines])


def score_word(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return whether each token of a word is the most probable one, and the word's bits."""
    ((logprob, is_greedy),) = results
    return {"acc": float(is_greedy), "bits": -logprob / math.log(2)}


def score_choice(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return whether the right choice is the most probable one, and its bits among the choices.

    The bits tell models apart where few answers change: they are the surprise at the right choice for somebody who
    knows that it is one of these, and guesses by what the model says. Where a question has its `choices`, `acc_norm`
    compares them by character; else the right one is the first.
    """
    logprobs, gold = np.array([logprob for logprob, _ in results]), doc.get("gold", 0)
    bits = float(np.logaddexp.reduce(logprobs) - logprobs[gold]) / math.log(2)
    scores = {"acc": float(logprobs.argmax() == gold), "bits": bits}
    if "choices" in doc:
        lengths = np.array([len(choice) for choice in doc["choices"]])
        scores["acc_norm"] = float((logprobs / lengths).argmax() == gold)
    return scores


def _load(rows: Sequence[Mapping[str, Any]], **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list([dict(row) for row in rows])}


def _name_mean(metric: str, *, higher_is_better: bool) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": higher_is_better}


_LAST_WORDS: dict[str, Any] = {
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + word}}",
    "process_results": score_word,
    "metric_list": [_name_mean("acc", higher_is_better=True), _name_mean("bits", higher_is_better=False)],
    "metadata": {"version": 1.0},
}
_CONTINUATIONS: dict[str, Any] = {
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "process_results": score_choice,
    "metric_list": [
        _name_mean("acc", higher_is_better=True),
        _name_mean("acc_norm", higher_is_better=True),
        _name_mean("bits", higher_is_better=False),
    ],
    "metadata": {"version": 1.0},
}


def ask_last_words(documents: Sequence[Document]) -> list[dict]:
    """Return items with the `document`, the `context`, and the `word` that comes after it and a space."""

    def ask(document: Document) -> list[dict]:
        found = _LAST_WORD.finditer(document.text, BEFORE)
        return [{"document": document.origin, "context": document.text[: m.start()], "word": m[1]} for m in found]

    return _choose(map(ask, documents), LAST_WORDS)


def ask_continuations(documents: Sequence[Document]) -> list[dict]:
    """Return items with the `document`, the `context`, four `choices` after a space, and the index `gold`."""
    places = {d.id: [m for m in _PLACE.finditer(d.text, BEFORE) if _has(d.text, m.end())] for d in documents}
    after: dict[str, list[tuple[str, str]]] = {}
    for d in documents:
        for m in places[d.id]:
            after.setdefault(m[1], []).append((d.origin, _next(d.text, m.end())))

    def ask(document: Document) -> list[dict]:
        items = []
        for m in places[document.id]:
            own = _next(document.text, m.end())
            chance = random.Random(f"{m.end()} {document.text}")
            others = {o: text for o, text in chance.sample(after[m[1]], len(after[m[1]])) if o != document.origin}
            wrong = [text for text in dict.fromkeys(others.values()) if text != own][:3]
            if len(wrong) == 3:
                choices = chance.sample([own, *wrong], 4)
                told = _told(document.text[: m.end() - 1])
                items.append(
                    {"document": document.origin, "context": told, "choices": choices, "gold": choices.index(own)}
                )
        return items

    return _choose(map(ask, documents), CONTINUATIONS)


def _has(text: str, at: int) -> bool:
    """Tell whether a whole continuation comes there."""
    return len(text[at:].encode()) > LENGTH


def _next(text: str, at: int) -> str:
    """Return the whole words that fit into a continuation, or the first word if it does not fit."""
    fitting = text[at:].encode()[: LENGTH + 1].decode(errors="ignore")
    whole = re.match(r"(?s).*\S(?=\s)", fitting)
    return whole[0] if whole else re.match(r"\S+", text[at:])[0]


def _told(before: str) -> str:
    """Return the last whole words before a continuation, which a model is given."""
    return re.sub(r"\A\S*\s+", "", before[-TOLD - 1 :])


def _choose(of_documents: Iterable[list[dict]], count: int) -> list[dict]:
    """Choose so many of all items, from each document in turn, in the order of the documents."""
    shuffled = [random.Random(items[0]["context"]).sample(items, len(items)) for items in of_documents if items]
    in_turn = [item for turn in itertools.zip_longest(*shuffled) for item in turn if item is not None]
    chosen = {id(item) for item in in_turn[:count]}
    return [item for items in shuffled for item in items if id(item) in chosen]
