"""document_list.py: documents that are read from their parts when they are asked for."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuselm.documents.document import SPLITS, Document
from fuselm.documents.document_list import DocumentList, identify_documents, open_folder, read_documents
from fuselm.documents.document_texts import TextsById
from fuselm.documents.document_writing import INDEX, ONE_PART, DocumentWriter, name_part
from fuselm.models.chat.messages import Dialogue, Message


def make_documents(count: int, name: str = "") -> list[Document]:
    dialogue = Dialogue(messages=(Message(role="user", content="ask"), Message(role="assistant", content="sé")))
    return [
        Document(
            id=f"{name}{n:06d}.{n % 2}",
            origin=f"{n:06d}",
            domain=f"d{n % 3}é",
            split=SPLITS[n * n % 7 % 3],
            text=dialogue if n % 5 == 4 else f"Text \u2028 {n}, é\r\n" * (n % 4 + 1),
        )
        for n in range(count)
    ]


def write(folder: Path, documents: list[Document], part_bytes: int = 1 << 20) -> Path:
    folder.mkdir(parents=True)
    writer = DocumentWriter(folder, ["one", "two"], part_bytes=part_bytes)
    for n, document in enumerate(documents):
        writer.add(document, [n, 2 * n])
    writer.finish()
    return folder


@pytest.fixture(scope="module", params=["one part", "many parts", "no index"])
def folder(request, tmp_path_factory) -> Path:
    made = write(tmp_path_factory.mktemp("x") / "corpus", DOCUMENTS, 999 if request.param == "many parts" else 1 << 20)
    if request.param == "no index":  # as earlier versions wrote it
        (made / INDEX).unlink()
    return made


DOCUMENTS = make_documents(601)


def test_a_list_is_a_sequence_of_its_documents(folder):
    found = read_documents(folder)
    assert len(found) == 601 and found == DOCUMENTS and [*DOCUMENTS] == found
    assert list(found) == DOCUMENTS and [*reversed(found)] == DOCUMENTS[::-1]
    assert found[0] == DOCUMENTS[0] and found[-1] == DOCUMENTS[-1] and found[300] == DOCUMENTS[300]
    assert found != DOCUMENTS[:-1] and found[1:] != DOCUMENTS[:-1]
    assert DOCUMENTS[7] in found and not read_documents(folder)[:0]
    for wrong in (601, -602):
        with pytest.raises(IndexError):
            found[wrong]


@given(
    cuts=st.lists(
        st.tuples(st.none() | st.integers(-7, 20), st.none() | st.integers(-7, 20), st.sampled_from([1, 2, -1, 3]))
    ),
    numbers=st.lists(st.integers(0, 600), max_size=13),
    by_mask=st.booleans(),
)
def test_slices_and_choices_are_those_of_a_list(shared, cuts, numbers, by_mask):
    found, expected = shared, DOCUMENTS
    if by_mask:
        mask = np.zeros(601, bool)
        mask[numbers] = True
        found, expected = found.take(mask), [DOCUMENTS[n] for n in sorted(set(numbers))]
    elif numbers:
        found, expected = found.take(np.array(numbers)), [DOCUMENTS[n] for n in numbers]
    for cut in cuts:
        found, expected = found[slice(*cut)], expected[slice(*cut)]
    assert list(found) == expected
    assert found.ids.to_pylist() == [d.id for d in expected]
    assert found.sizes.tolist() == [len(d.text.encode()) for d in expected]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> DocumentList:
    return read_documents(write(tmp_path_factory.mktemp("shared") / "corpus", DOCUMENTS, 1999))


def test_numbers_of_documents_are_known_without_their_text(folder):
    found = read_documents(folder)
    assert found.ids.to_pylist() == [d.id for d in DOCUMENTS]
    assert [found.domain_names[c] for c in found.domain_codes] == [d.domain for d in DOCUMENTS]
    assert [SPLITS[n] for n in found.splits] == [d.split for d in DOCUMENTS]
    assert found.is_dialogue.tolist() == [isinstance(d.text, Dialogue) for d in DOCUMENTS]
    counted = found.token_counts("two")
    if (folder / INDEX).exists():
        assert counted is not None and counted.tolist() == [2 * n for n in range(601)]
        assert found.select("dev").token_counts("one").tolist() == [
            n for n, d in enumerate(DOCUMENTS) if d.split == "dev"
        ]
        assert found.token_counts("three") is None
        assert open_folder(folder).table.nbytes / 601 < 64
    else:
        assert counted is None


def test_documents_are_selected_by_split_and_domain(folder):
    for split in SPLITS:
        assert read_documents(folder, split) == [d for d in DOCUMENTS if d.split == split]
    found = read_documents(folder).select("train", domain="d1é")
    assert found == [d for d in DOCUMENTS if d.split == "train" and d.domain == "d1é"] != []
    assert not read_documents(folder).select(domain="none")


def test_lists_of_several_folders_add_up(folder, tmp_path):
    more, last = make_documents(31, "more"), make_documents(7, "last")
    others = [read_documents(write(tmp_path / name, of)) for name, of in (("more", more), ("last", last))]
    found = read_documents(folder) + others[0] + others[1]
    everything = DOCUMENTS + more + last
    assert found == everything and found[620] == everything[620]
    assert found.token_counts("one") is None or found.token_counts("one")[-1] == 6
    assert found[::-1] == everything[::-1]
    part = read_documents(folder, "train") + others[0][::2]
    expected = [d for d in DOCUMENTS if d.split == "train"] + more[::2]
    assert part == expected and part.ids.to_pylist() == [d.id for d in expected]
    assert [part.domain_names[c] for c in part.domain_codes] == [d.domain for d in expected]
    assert others[0][:0] + others[1] == last and others[1] + others[0][:0] == last


def test_a_list_is_handed_to_another_process_without_its_documents(folder):
    part = read_documents(folder)[5:400].select("train")
    packed = pickle.dumps(part)
    assert pickle.loads(packed) == part and len(packed) < 4 * len(part) + 1000


def test_parts_joined_are_the_one_file_that_identifies_them(tmp_path):
    one, many = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "many", DOCUMENTS, 5000)
    parts = sorted(path for path in many.iterdir() if path.name != INDEX)
    assert [path.name for path in parts] == [name_part(n) for n in range(len(parts))] and len(parts) > 3
    assert all(path.stat().st_size <= 5000 for path in parts)
    joined = b"".join(path.read_bytes() for path in parts)
    assert joined == (one / ONE_PART).read_bytes()
    sha256 = hashlib.sha256(joined).hexdigest()
    assert identify_documents(one, {ONE_PART: sha256}) == sha256
    assert identify_documents(many, {INDEX: "other"}) == sha256 == open_folder(one).sha256
    assert identify_documents(many, {}) is None


def test_an_empty_folder_of_documents_is_an_empty_list(tmp_path):
    found = read_documents(write(tmp_path / "none", []))
    assert len(found) == 0 and list(found) == [] and found.sizes.tolist() == [] and found.ids.to_pylist() == []


@pytest.mark.parametrize("name", [ONE_PART, INDEX])
@pytest.mark.parametrize("harm", ["cut", "missing", "other"])
def test_damage_is_named(tmp_path, name, harm):
    made = write(tmp_path / "corpus", DOCUMENTS[:9])
    path = made / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
        if name == INDEX:
            assert read_documents(made) == DOCUMENTS[:9]
            return
    else:
        path.write_bytes(data[:-20] if harm == "cut" else b"x" * len(data))
    with pytest.raises(ValueError) as caught:
        list(DocumentList([open_folder(made)]))
    what = "missing" if harm == "missing" else "damaged"
    assert str(caught.value) == f"{path}: {what}; delete {made} and run again"


def test_texts_are_found_by_the_ids_of_their_documents(folder):
    texts, expected = TextsById(read_documents(folder)), {d.id: d.text for d in DOCUMENTS}
    assert list(texts) == list(expected) and len(texts) == 601 and dict(texts) == expected
    assert "000000" not in texts and 7 not in texts
    with pytest.raises(KeyError):
        texts["z"]


@given(st.text())
def test_a_line_is_what_json_writes(text):
    document = Document(id="a", origin='"', domain=text, split="train", text=text)
    line = json.dumps(document.as_row(), ensure_ascii=False) + "\n"
    assert document.as_line() == line.encode("utf-8", "backslashreplace")
