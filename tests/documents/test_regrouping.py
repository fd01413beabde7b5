"""Texts that files alone give too few documents a domain are put together and cut, and nothing is lost."""

import json
import re

import pytest

from fuselm.documents import corpus
from fuselm.documents.regrouping import ENOUGH, LONGEST, MERGED, PIECES, regroup_texts, write_rows
from fuselm.documents.texts import TextRow, read_texts


def paragraphs(count: int, start: int = 0) -> str:
    return "\n\n".join(f"Paragraph {n} says something about the number {n * n}." for n in range(start, start + count))


def check(rows: list[TextRow]) -> None:
    corpus.check_domains(corpus.count_domains(rows), [], dev=0.125, heldout=0.25)


def test_enough_files_of_a_folder_are_used_as_they_are(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(paragraphs(2, n))
    assert regroup_texts([tmp_path]) is None


@pytest.mark.parametrize("lengths", [(400,), (100, 107), (260, 1)])
def test_few_long_files_are_cut_into_pieces_that_join_to_the_texts(tmp_path, lengths):
    texts = [paragraphs(length) for length in lengths]
    (tmp_path / "legal").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "legal" / f"{n}.md").write_text(text)
    found = regroup_texts([tmp_path])
    assert "".join(row.text for row in found.rows) == "".join(texts)
    assert {row.domain for row in found.rows} == {"legal" if len(lengths) > 1 else "0"}
    assert len(found.rows) >= PIECES and found.names == []
    assert all(len(row.text.encode()) <= LONGEST for row in found.rows)
    check(found.rows)


@pytest.mark.parametrize(("count", "is_cut"), [(3, True), (ENOUGH - 1, True), (ENOUGH, False)])
def test_a_domain_that_cannot_hold_out_enough_documents_is_cut_if_it_is_long(tmp_path, count, is_cut):
    for n in range(count):
        (tmp_path / f"{n}.txt").write_text(paragraphs(300, n))
    found = regroup_texts([tmp_path])
    assert (found is not None) == is_cut
    assert found is None or (len(found.rows) >= PIECES and found.domains == [tmp_path.name])


def test_only_regrouped_texts_are_copied_and_the_other_files_are_named(tmp_path):
    for folder, count in (("man", 12), ("mixed", 12), ("legal", 2)):
        (tmp_path / folder).mkdir()
        for n in range(count):
            (tmp_path / folder / f"{n}.txt").write_text(f"{folder}\n{paragraphs(100, n)}")
    (tmp_path / "mixed" / "README.txt").write_text("About these texts.")
    (tmp_path / "man" / "copy.txt").write_bytes((tmp_path / "man" / "3.txt").read_bytes())
    found = regroup_texts([tmp_path])
    pattern, *mixed = found.names
    assert pattern == f"{tmp_path}/man/*.txt"
    assert sorted(mixed) == sorted(str(tmp_path / "mixed" / f"{n}.txt") for n in range(12))
    assert {row.domain for row in found.rows} == {"legal"} == set(found.domains)
    everything = "".join(f"legal\n{paragraphs(100, n)}" for n in range(2))
    assert "".join(row.text for row in found.rows) == everything


def test_small_domains_become_one_and_large_ones_stay(tmp_path):
    rows = [{"domain": "large", "text": paragraphs(1, n)} for n in range(5)]
    rows += [{"domain": name, "text": paragraphs(1, n)} for n, name in enumerate(("a", "a", "b"), 5)]
    rows += [{"domain": "a", "text": paragraphs(1, 9), "split": "train"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = regroup_texts([tmp_path / "rows.jsonl"]).rows
    assert [row.domain for row in found] == ["large"] * 5 + ["a"] + [MERGED] * 3
    assert sorted(row.text for row in found) == sorted(row["text"] for row in rows)
    assert [row.split for row in found if row.split] == ["train"]


def test_fields_with_other_names_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": paragraphs(400), "kind": "b"}) + "\n")
    found = regroup_texts([tmp_path / "rows.jsonl"], {"text": "body", "domain": "kind"})
    assert len(found.rows) >= PIECES and found.domains == ["b"]
    assert regroup_texts([tmp_path / "rows.jsonl"], {"text": "body"}).domains == ["rows"]


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("A word.")
    expected = (
        f"{tmp_path}/note.txt: 7 bytes of text are too little to train on and to hold some out; needed are 3 "
        "documents, better 12, or some 6 kB of text"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        regroup_texts([tmp_path / "note.txt"])


def test_written_rows_are_read_back(tmp_path):
    rows = [TextRow(domain="a", text="é\n\u2028"), TextRow(domain="b", text="x", split="dev")]
    (tmp_path / "rows.jsonl").write_text(write_rows(rows), encoding="utf-8")
    assert list(read_texts(tmp_path / "rows.jsonl")) == rows
