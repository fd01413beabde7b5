"""corpus.py: reading, the split by domain, and cutting into pieces that fit."""

import itertools
import json
from pathlib import Path

import lossy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuselm.documents import corpus
from fuselm.documents.corpus import (
    RESERVED_DOMAINS,
    cut_to_fit,
    prepare_corpus,
)
from fuselm.documents.cutting import Reader
from fuselm.documents.document import SPLITS, Document
from fuselm.documents.document_list import read_documents
from fuselm.documents.document_writing import ONE_PART
from fuselm.documents.texts import TextRow, read_texts
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.progress import Progress


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(**counts: int) -> list[dict]:
    return [{"domain": d, "text": f"{d} document {i}"} for d, count in counts.items() for i in range(count)]


def prepared(*files: Path, out: Path, readers=(), max_bytes=10_000, dev=0.2, heldout=0.3, share=1.0, seed=0) -> dict:
    out.mkdir(exist_ok=True)
    return prepare_corpus(
        files,
        out,
        domains=[file.stem for file in files],
        readers=readers,
        max_bytes=max_bytes,
        dev=dev,
        heldout=heldout,
        share=share,
        seed=seed,
        progress=Progress(Console(quiet=True), "corpus"),
    )


def message(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def readers(byte_level, sentence_piece, word_piece) -> list[Reader]:
    result = []
    for folder in (byte_level, sentence_piece, word_piece):
        model = locate_model(str(folder))
        vocabulary = Vocabulary(load_tokenizer(model), model.output_size)
        result.append(Reader(name=folder.name, vocabulary=vocabulary, max_tokens=model.context_length))
    return result


def test_text_that_a_reader_has_no_tokens_for_is_left_out(tmp_path, readers):
    """Leave out control characters, which the lower-casing WordPiece drops: no model reads an empty document."""
    rows = [*rows_of(en=9, de=9), {"domain": "de", "text": "\x01\x02", "split": "train"}]
    counts = prepared(write(tmp_path / "a.jsonl", rows), out=tmp_path / "out", readers=readers)
    documents = read_documents(tmp_path / "out")
    assert [d.text for d in documents] == [row["text"] for row in rows[:-1]]
    assert counts["empty"] == 1 and counts["cut"] == 0 and sum(counts["documents"].values()) == 18
    for reader in readers:
        for split in SPLITS:
            tokens = reader.vocabulary.count_tokens([d.text for d in documents if d.split == split])
            assert counts["tokens"][reader.name][split] == sum(tokens)
    rows = rows_of(en=9)
    rows += [{"domain": "x", "text": "\x01" if s == "dev" else s, "split": s} for s in SPLITS]
    assert message(prepared, write(tmp_path / "b.jsonl", rows), out=tmp_path / "none", readers=readers) == (
        "corpus: all of domain 'x' in dev is text that a model's tokenizer has no tokens for; drop it"
    )


# ---- the split


def test_each_domain_is_split_by_the_shares(tmp_path):
    file = write(tmp_path / "a.jsonl", rows_of(en=20, de=10, fr=3))
    counts = prepared(file, out=tmp_path / "out")
    assert counts["documents"] == {
        "de/dev": 2, "de/heldout": 3, "de/train": 5,
        "en/dev": 4, "en/heldout": 6, "en/train": 10,
        "fr/dev": 1, "fr/heldout": 1, "fr/train": 1,
    }  # fmt: skip
    assert counts["empty"] == counts["cut"] == 0


def test_the_splits_are_disjoint_and_together_everything(tmp_path):
    rows = rows_of(en=17, de=5)
    prepared(write(tmp_path / "a.jsonl", rows), out=tmp_path / "out")
    splits = [{d.id for d in read_documents(tmp_path / "out", split)} for split in SPLITS]
    everything = read_documents(tmp_path / "out")
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(everything) == 22
    assert [(d.domain, d.text) for d in everything] == [(r["domain"], r["text"]) for r in rows]
    assert all(d.id == d.origin for d in everything)
    assert {(d.domain, d.split) for d in everything} == {(d, s) for d in ("en", "de") for s in SPLITS}


def test_held_out_text_is_neither_trained_on_nor_chosen_by(tmp_path):
    """Put texts into a file twice, as plain rows or as rows that name their split."""
    rows = rows_of(en=20)
    again = rows[:10] + [row | {"split": "train", "text": f" {row['text']}\n"} for row in rows[5:15]]
    counts = prepared(write(tmp_path / "a.jsonl", rows + again), out=tmp_path / "out")
    texts = {split: [d.text.strip() for d in read_documents(tmp_path / "out", split)] for split in SPLITS}
    for one, other in (("train", "dev"), ("train", "heldout"), ("dev", "heldout")):
        assert not set(texts[one]) & set(texts[other])
    assert {t for of in texts.values() for t in of} == {row["text"].strip() for row in rows}
    assert counts["repeated"] == 40 - sum(map(len, texts.values())) > 0
    same = [row | {"split": split} for split in SPLITS for row in rows_of(en=1)]
    assert message(prepared, write(tmp_path / "b.jsonl", same), out=tmp_path / "none") == (
        "corpus: all texts of domain 'en' in dev are held out too; drop the repeated ones"
    )


def test_the_seed_decides_the_split(tmp_path):
    file = write(tmp_path / "a.jsonl", rows_of(en=40))
    for out, seed in (("one", 0), ("same", 0), ("other", 1)):
        prepared(file, out=tmp_path / out, seed=seed)
    one, same, other = ((tmp_path / out / ONE_PART).read_bytes() for out in ("one", "same", "other"))
    assert one == same != other


def test_a_larger_share_has_all_of_a_smaller_in_order_with_some_of_each_domain(tmp_path):
    file = write(tmp_path / "a.jsonl", rows_of(en=26, de=8))
    found = []
    for share in (0.01, 0.25, 0.5, 1.0):
        counts = prepared(file, out=tmp_path / f"{share}", share=share)
        found.append(read_documents(tmp_path / f"{share}"))
        assert counts["documents"]["de/train"] == max(1, round(share * 4)) and counts["cut"] == 0
    assert [sum(d.split == "train" for d in documents) for documents in found] == [2, 4, 8, 17]
    for small, large in itertools.pairwise(found):
        assert small == [d for d in large if d in small]
        assert [d for d in small if d.split != "train"] == [d for d in large if d.split != "train"]
        assert {d.domain for d in small if d.split == "train"} == {"en", "de"}
    prepared(file, out=tmp_path / "other", share=0.25, seed=1)
    assert read_documents(tmp_path / "other", "train") != [d for d in found[1] if d.split == "train"]


def test_pieces_of_a_document_stay_together_in_a_share(tmp_path, readers):
    file = write(tmp_path / "a.jsonl", rows_of(en=17))
    whole, half = (
        (prepared(file, out=tmp_path / f"{share}", readers=readers, max_bytes=16, share=share), tmp_path / f"{share}")[
            1
        ]
        for share in (1.0, 0.5)
    )
    kept = {d.origin for d in read_documents(half, "train")}
    assert 0 < len(kept) < len({d.origin for d in read_documents(whole, "train")})
    assert read_documents(half, "train") == [d for d in read_documents(whole, "train") if d.origin in kept]


def test_a_domains_split_does_not_depend_on_other_domains(tmp_path):
    prepared(write(tmp_path / "a.jsonl", rows_of(en=20)), out=tmp_path / "alone")
    prepared(write(tmp_path / "b.jsonl", rows_of(en=20, de=5)), out=tmp_path / "both")
    both = [d for d in read_documents(tmp_path / "both") if d.domain == "en"]
    assert read_documents(tmp_path / "alone") == both


def saying(split: str, rows: list[dict]) -> list[dict]:
    return [row | {"split": split, "text": f"{split}: {row['text']}"} for row in rows]


@given(
    drawn=st.integers(3, 23),
    said=st.dictionaries(st.sampled_from(SPLITS), st.integers(1, 7)),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 3),
)
def test_drawn_splits_depend_only_on_rows_without_one(drawn, said, order, seed):
    quiet = [TextRow(domain="en", text=f"quiet {i}") for i in range(drawn)]
    loud = [TextRow(domain="en", text=f"{s} {i}", split=s) for s, count in said.items() for i in range(count)]
    places = sorted(order.sample(range(drawn + len(loud)), drawn))
    rest = iter(loud)
    rows = [quiet[places.index(i)] if i in places else next(rest) for i in range(drawn + len(loud))]

    def splits(of: list[TextRow]) -> dict[str, str]:
        return {d.text: d.split for d in corpus.draw_splits(of, dev=0.2, heldout=0.3, seed=seed)}

    assert splits(rows) == splits(quiet) | {row.text: row.split for row in loud}


def test_a_second_file_of_train_rows_only_adds_training_text(tmp_path):
    first = write(tmp_path / "a.jsonl", rows_of(en=20, de=11))
    second = write(tmp_path / "b.jsonl", saying("train", rows_of(en=5, de=70)))
    alone = prepared(first, out=tmp_path / "alone")
    both = prepared(first, second, out=tmp_path / "both")
    prepared(second, first, out=tmp_path / "swapped")
    for split in ("dev", "heldout"):
        assert read_documents(tmp_path / "both", split) == read_documents(tmp_path / "alone", split)
        assert [d.text for d in read_documents(tmp_path / "swapped", split)] == [
            d.text for d in read_documents(tmp_path / "alone", split)
        ]
    before = read_documents(tmp_path / "alone", "train")
    assert read_documents(tmp_path / "both", "train")[: len(before)] == before
    added = {"de/train": 70, "en/train": 5}
    assert both["documents"] == {k: n + added.get(k, 0) for k, n in alone["documents"].items()}


def test_the_larger_corpus_leaves_the_quickstarts_split_as_it_is(tmp_path):
    quickstart = Path(__file__).parents[2] / "examples" / "corpus" / "quickstart.jsonl"
    domains = [json.loads(line)["domain"] for line in quickstart.read_text(encoding="utf-8").splitlines()]
    larger = write(tmp_path / "larger.jsonl", saying("train", rows_of(**dict.fromkeys(domains, 7))))
    for seed in range(3):
        options = {"dev": 0.1, "heldout": 0.65, "seed": seed}
        prepared(quickstart, out=tmp_path / f"{seed}", **options)
        prepared(quickstart, larger, out=tmp_path / f"larger-{seed}", **options)
        for split in ("dev", "heldout"):
            found = read_documents(tmp_path / f"larger-{seed}", split)
            assert found == read_documents(tmp_path / f"{seed}", split) != []


def test_a_domain_in_which_every_row_names_its_split_is_not_drawn(tmp_path):
    rows = [row for split, n in zip(SPLITS, (1, 3, 2), strict=True) for row in saying(split, rows_of(en=n))]
    counts = prepared(write(tmp_path / "a.jsonl", rows + rows_of(de=3)), out=tmp_path / "out")
    assert counts["documents"] == {
        "de/dev": 1, "de/heldout": 1, "de/train": 1,
        "en/dev": 3, "en/heldout": 2, "en/train": 1,
    }  # fmt: skip
    found = [d for d in read_documents(tmp_path / "out") if d.domain == "en"]
    assert all(d.text.startswith(d.split) for d in found)


@pytest.mark.parametrize(
    ("said", "missing"), [("train", "dev and heldout"), ("dev", "train and heldout"), ("heldout", "train and dev")]
)
def test_a_domain_that_names_its_splits_needs_each_of_them(tmp_path, said, missing):
    file = write(tmp_path / "a.jsonl", rows_of(en=9) + saying(said, rows_of(de=9)))
    assert message(prepared, file, out=tmp_path / "out") == (
        f"corpus: domain 'de' has no document in {missing}, and each of its rows names its 'split'; "
        "add some to each split, or 3 or more that name none"
    )


def test_rows_without_a_split_are_enough_to_draw_from_or_none(tmp_path):
    rows = [row for split in SPLITS for row in saying(split, rows_of(en=9))]
    file = write(tmp_path / "a.jsonl", rows + rows_of(en=2))
    assert message(prepared, file, out=tmp_path / "out") == (
        "corpus: domain 'en' has 2 documents that name no split, too few to hold some out; "
        "it needs 3 or more, and dev and heldout shares that leave some to train on"
    )


def test_bytes_and_tokens_are_counted_by_split(tmp_path, readers):
    counts = prepared(write(tmp_path / "a.jsonl", rows_of(en=7)), out=tmp_path / "out", readers=readers)
    for split in SPLITS:
        texts = [d.text for d in read_documents(tmp_path / "out", split)]
        assert counts["bytes"][split] == sum(len(text.encode()) for text in texts)
        for reader in readers:
            assert counts["tokens"][reader.name][split] == sum(reader.vocabulary.count_tokens(texts))


def test_bytes_that_a_reader_does_not_spell_are_counted_by_domain(tmp_path, training_texts):
    families = ("byte-level", "metaspace", "WordPiece, lower case", "unigram, squeezed")
    readers = [
        Reader(name=family, vocabulary=lossy.vocabulary(family, training_texts), max_tokens=97) for family in families
    ]
    rows = rows_of(en=5) + [{"domain": "zh", "text": f"{n} 知识融合, Words" + " " * n} for n in range(5)]
    counts = prepared(write(tmp_path / "a.jsonl", rows), out=tmp_path / "out", readers=readers, max_bytes=23)
    documents = read_documents(tmp_path / "out")
    assert "byte-level" not in counts["unspelled"] and len(counts["unspelled"]) == 3
    for reader in readers[1:]:
        found = counts["unspelled"][reader.name]
        lacking = {d.id: reader.vocabulary.segment(d.text).unspelled_bytes for d in documents}
        sizes = {d.id: len(d.text.encode()) for d in documents}
        assert found["share"] == sum(lacking.values()) / sum(sizes.values()) > 0
        for domain in ("en", "zh"):
            ids = [d.id for d in documents if d.domain == domain]
            share = sum(lacking[i] for i in ids) / sum(sizes[i] for i in ids)
            assert found["domains"].get(domain, 0) == share
    spelled = prepared(write(tmp_path / "b.jsonl", rows), out=tmp_path / "spelled", readers=readers[:1])
    assert "unspelled" not in spelled


def test_empty_documents_are_skipped_and_counted(tmp_path):
    empty = [{"domain": "en", "text": text} for text in ("", " \n\t", "\u2003")]
    counts = prepared(write(tmp_path / "a.jsonl", rows_of(en=3) + empty), out=tmp_path / "out")
    assert counts["empty"] == 3
    assert len(read_documents(tmp_path / "out")) == 3


@pytest.mark.parametrize(("count", "dev", "heldout"), [(1, 0.2, 0.2), (2, 0.0, 0.0), (10, 0.5, 0.5)])
def test_a_domain_too_small_to_hold_out_from_is_named(tmp_path, count, dev, heldout):
    file = write(tmp_path / "a.jsonl", rows_of(en=20, de=count) if dev < 0.5 else rows_of(de=count))
    assert message(prepared, file, out=tmp_path / "out", dev=dev, heldout=heldout) == (
        f"corpus: domain 'de' has {count} documents, too few to hold some out; "
        "it needs 3 or more, and dev and heldout shares that leave some to train on"
    )
    assert not (tmp_path / "out" / ONE_PART).exists()


@pytest.mark.parametrize("name", RESERVED_DOMAINS)
def test_a_domain_with_a_reserved_name_is_refused(tmp_path, name):
    file = write(tmp_path / "a.jsonl", rows_of(en=3, **{name: 3}))
    expected = f"corpus: a domain is named '{name}', which results use for themselves; rename it"
    assert message(prepared, file, out=tmp_path / "out") == expected


def test_a_corpus_without_text_is_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": " "}])
    expected = f"corpus: no text in {file}; each line needs a 'text' that is not empty"
    assert message(prepared, file, out=tmp_path / "out") == expected


def test_documents_of_each_domain_are_counted_without_the_empty(tmp_path):
    rows = [*rows_of(en=3, de=2), {"domain": "en", "text": ""}, {"domain": "en", "text": "x", "split": "dev"}]
    file = write(tmp_path / "a.jsonl", rows)
    assert corpus.count_domains(read_texts(file)) == {"en": {"drawn": 3, "dev": 1}, "de": {"drawn": 2}}


# ---- cutting


def document(text: str) -> Document:
    return Document(id="000007", origin="000007", domain="en", split="dev", text=text)


def pieces(text: str, max_bytes: int, readers=()) -> list[str]:
    return [piece.text for piece in cut_to_fit([document(text)], readers, max_bytes)]


@given(st.text("ab é.\n日", max_size=43), st.integers(3, 17))
def test_pieces_fit_and_joined_are_the_document(text, max_bytes):
    found = pieces(text, max_bytes)
    assert "".join(found) == text
    assert all(0 < len(piece.encode()) <= max_bytes for piece in found) or text == ""


@pytest.mark.parametrize("max_tokens", [7, 11, 101])
def test_pieces_fit_every_reader(max_tokens, readers, texts):
    short = [Reader(name=r.name, vocabulary=r.vocabulary, max_tokens=max_tokens + n) for n, r in enumerate(readers)]
    for row in texts[::4]:
        found = pieces(row["text"], 211, short)
        assert "".join(found) == row["text"]
        for reader in short:
            assert max(reader.vocabulary.count_tokens(found)) < reader.max_tokens  # one for the context token


def test_a_document_that_fits_is_left_alone():
    assert list(cut_to_fit([document("a b"), document("")], [], 3)) == [document("a b"), document("")]


def test_pieces_carry_their_documents_name():
    found = list(cut_to_fit([document("aa bb cc")], [], 3))
    assert [(d.id, d.text) for d in found] == [("000007.0", "aa "), ("000007.1", "bb "), ("000007.2", "cc")]
    assert {(d.origin, d.domain, d.split) for d in found} == {("000007", "en", "dev")}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two three\n\na. b\nfive six seven", "one two three\n\n"),
        ("one two three\na. b five six seven", "one two three\n"),
        ("one two three. four five six seven", "one two three. "),
        ("one two “three.” four five six seven", "one two “three.” "),
        ("one two three four five six seven", "one two three four "),
        ("onetwothreefourfivesixseven", "onetwothreefourfives"),
        ("a\n\nonetwothreefourfivesixseven", "a\n\nonetwothreefourfi"),  # the border is in the first half
    ],
)
def test_a_cut_is_at_a_paragraph_before_a_line_before_a_sentence_before_a_word(text, first):
    limit = 20 + len(first.encode()) - len(first)
    assert pieces(text, limit)[0] == first


def test_a_character_that_does_not_fit_is_named():
    expected = "corpus: max_bytes or a model's context is too small for the one character '日'"
    assert message(pieces, "a日b", 2) == expected


def test_cut_documents_stay_in_one_split(tmp_path):
    rows = [{"domain": "en", "text": f"{n} " + "word " * 20} for n in range(5)]
    counts = prepared(write(tmp_path / "a.jsonl", rows), out=tmp_path / "out", max_bytes=40)
    found = read_documents(tmp_path / "out")
    assert counts["cut"] == len(found) - 5 > 0
    assert all(len({d.split for d in found if d.origin == origin}) == 1 for origin in {d.origin for d in found})
