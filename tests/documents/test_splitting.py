"""splitting.py and near_repeating.py: splits by hashes, and training texts that nearly are held out."""

import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from fuselm.documents.corpus import prepare_corpus
from fuselm.documents.document import SPLITS
from fuselm.documents.document_list import read_documents
from fuselm.system.progress import Progress


def prepare(folder: Path, rows: list[dict], **options) -> tuple[dict, dict[str, str]]:
    """Return the counts, and the split of each text."""
    folder.mkdir()
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {"max_bytes": 10_000, "dev": 0.2, "heldout": 0.3, "share": 1.0, "seed": 0}
    progress = Progress(Console(quiet=True), "corpus")
    counts = prepare_corpus([file], folder, domains=["a"], readers=(), progress=progress, **shares | options)
    return counts, {document.text: document.split for document in read_documents(folder)}


def test_more_text_moves_no_document_where_hashes_decide(tmp_path):
    rows = [{"text": f"Text {n}", "domain": "en"} for n in range(400)]
    more = [{"text": f"More {n}", "domain": d} for n in range(50) for d in ("en", "de")]
    _, before = prepare(tmp_path / "few", rows, split="hash")
    _, after = prepare(tmp_path / "more", [*more, *rows], split="hash")
    assert {text: after[text] for text in before} == before
    shares = [sum(split == s for split in before.values()) / 400 for s in SPLITS]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.08)
    _, other = prepare(tmp_path / "other", rows, split="hash", seed=1)
    assert other != before
    with pytest.raises(ValueError, match=r"corpus\.split: by hashes, domain 'en' has no document in"):
        prepare(tmp_path / "tiny", rows[:4], split="hash")


def test_training_text_that_nearly_is_held_out_is_counted_or_dropped(tmp_path):
    drawn = random.Random(0)
    words = [f"w{n}" for n in range(500)]
    rows = [{"text": " ".join(drawn.choices(words, k=150)), "split": SPLITS[n % 3]} for n in range(60)]
    near = [{"text": "x" + row["text"].partition(" ")[2], "split": "train"} for row in rows[2::3]]
    found = {
        choice: prepare(tmp_path / choice, rows + near, near_repeats=choice)[0]
        for choice in ("ignore", "count", "drop")
    }
    assert "near_repeats" not in found["ignore"]
    assert found["count"]["near_repeats"] == found["drop"]["near_repeats"] == 20
    assert found["count"]["documents"] == found["ignore"]["documents"] == {"a/dev": 20, "a/heldout": 20, "a/train": 40}
    assert found["drop"]["documents"]["a/train"] == 20
