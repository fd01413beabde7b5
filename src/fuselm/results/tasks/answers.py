"""Keep what a model answered: a row for each question and metric, and the numbers that lm-eval makes of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuselm.system import atomic_files, manifest

ROWS, NUMBERS = "answers.parquet", "results.json"
LONGEST = 2000  # characters of an answer that are kept
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("question", pa.int32()),  # its place in the task
        ("document", pa.string()),  # the text that it is about, or the hash of the question
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("value", pa.float64()),  # null where a metric is not a number of each question
        ("target", pa.string()),
        ("answer", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAnswers:
    """Hold a model's answers to one task: values by metric and filter, one for each question, in the same order."""

    questions: Sequence[int]
    documents: Sequence[str]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)


Answers = Mapping[str, TaskAnswers]  # by task


def name_metric(metric: str, filtered: str) -> str:
    """Return a metric's name, with lm-eval's filter of the answers if there is one."""
    return metric if filtered == "none" else f"{metric} ({filtered})"


def collect_rows(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one task from the samples that lm-eval logs."""
    rows = []
    for sample in sorted(samples, key=lambda s: (s["filter"], s["doc_id"])):
        document = sample["doc"].get("document") if isinstance(sample["doc"], Mapping) else None
        shared = {
            "task": task,
            "question": sample["doc_id"],
            "document": str(document or sample["doc_hash"]),
            "filter": sample["filter"],
            "target": str(sample["target"])[:LONGEST],
            "answer": json.dumps(sample["filtered_resps"], ensure_ascii=False, default=str)[:LONGEST],
        }
        for metric in sample["metrics"]:
            rows.append({**shared, "metric": metric, "value": _read_number(sample[metric])})
    return rows


def _read_number(value: Any) -> float | None:
    is_number = isinstance(value, bool | int | float) or (hasattr(value, "item") and getattr(value, "ndim", 0) == 0)
    return float(value) if is_number and math.isfinite(float(value)) else None


def write_answers(folder: Path, rows: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any]) -> None:
    """Write the rows as Parquet and the numbers as JSON."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), folder / ROWS)
    atomic_files.write_text(folder / NUMBERS, json.dumps(numbers, indent=1, ensure_ascii=False))


def read_answers(folder: Path) -> tuple[dict[str, TaskAnswers], dict[str, Any]]:
    """Return the answers by task, and the numbers by task, from a folder. Raises `ValueError` if it is damaged."""
    try:
        table = pq.read_table(folder / ROWS, columns=["task", "question", "document", "metric", "filter", "value"])
    except (OSError, pa.ArrowException):
        raise ValueError(f"{folder / ROWS}: missing or damaged; delete {folder} and run again") from None
    found: dict[str, dict[str, dict[int, tuple[str, float | None]]]] = {}
    for row in table.to_pylist():
        metric = name_metric(row["metric"], row["filter"])
        found.setdefault(row["task"], {}).setdefault(metric, {})[row["question"]] = (row["document"], row["value"])
    answers = {}
    for task, metrics in found.items():
        questions = sorted(next(iter(metrics.values())))
        documents = [next(iter(metrics.values()))[q][0] for q in questions]
        values = {m: [cells[q][1] for q in questions] for m, cells in metrics.items() if set(cells) == set(questions)}
        whole = {m: [v for v in of if v is not None] for m, of in values.items()}
        answers[task] = TaskAnswers(
            questions=questions,
            documents=documents,
            values={m: of for m, of in whole.items() if len(of) == len(questions)},
        )
    return answers, manifest.read_json(folder / NUMBERS)
