"""Texts that files alone give too few documents a domain are put together and cut, and nothing is lost."""

import json

import pytest

from fuselm.documents import corpus
from fuselm.documents.regrouping import ENOUGH, LONGEST, MERGED, regroup_texts, write_rows
from fuselm.documents.texts import TextRow, read_texts


def paragraphs(count: int, start: int = 0) -> str:
    return "\n\n".join(f"Paragraph {n} says something about the number {n * n}." for n in range(start, start + count))


def check(rows: list[TextRow]) -> None:
    corpus.check_domains(corpus.count_domains(rows), [], dev=0.125, heldout=0.25)


def test_enough_files_of_a_folder_are_used_as_they_are(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(paragraphs(2, n))
    assert regroup_texts([tmp_path]) is None


@pytest.mark.parametrize("lengths", [(400,), (100, 7), (60, 1)])
def test_few_long_files_are_cut_into_pieces_that_join_to_the_texts(tmp_path, lengths):
    texts = [paragraphs(length) for length in lengths]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.md").write_text(text)
    rows = regroup_texts([tmp_path])
    assert "".join(row.text for row in rows) == "".join(texts)
    assert {row.domain for row in rows} == {MERGED} and len(rows) >= ENOUGH
    assert all(len(row.text.encode()) <= LONGEST for row in rows)
    check(rows)


def test_small_domains_become_one_and_large_ones_stay(tmp_path):
    rows = [{"domain": "large", "text": paragraphs(1, n)} for n in range(5)]
    rows += [{"domain": name, "text": paragraphs(1, n)} for n, name in enumerate(("a", "a", "b"), 5)]
    rows += [{"domain": "a", "text": paragraphs(1, 9), "split": "train"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = regroup_texts([tmp_path / "rows.jsonl"])
    assert [row.domain for row in found] == ["large"] * 5 + ["a"] + [MERGED] * 3
    assert sorted(row.text for row in found) == sorted(row["text"] for row in rows)
    assert [row.split for row in found if row.split] == ["train"]


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("A word.")
    with pytest.raises(ValueError, match=r"texts: 7 bytes are too little to train on and to hold some out; add text"):
        regroup_texts([tmp_path / "note.txt"])


def test_written_rows_are_read_back(tmp_path):
    rows = [TextRow(domain="a", text="é\n\u2028"), TextRow(domain="b", text="x", split="dev")]
    (tmp_path / "rows.jsonl").write_text(write_rows(rows), encoding="utf-8")
    assert list(read_texts(tmp_path / "rows.jsonl")) == rows
