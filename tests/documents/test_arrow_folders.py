"""Test arrow_folders.py: folders that the real `datasets` library saved are read as rows, and nothing beside them."""

import json

import datasets
import pytest

from fuselm.documents.text_files import find_files, name_domains
from fuselm.documents.texts import TextRow, read_texts

ROWS = {"text": [f"text {n}" for n in range(7)], "n": list(range(7))}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(*names) -> list[TextRow]:
    """Read all rows as a run does."""
    files = find_files(names)
    domains = name_domains(files, lambda file: ())
    return [row for file, domain in zip(files, domains, strict=True) for row in read_texts(file, domain)]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_dataset_is_read_in_order(tmp_path, shards):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "poems", num_shards=shards)
    assert len(find_files([tmp_path / "poems"])) == shards
    assert read(tmp_path / "poems") == [TextRow(domain="poems", text=text) for text in ROWS["text"]]


def test_chosen_and_shuffled_rows_are_those_that_were_saved(tmp_path):
    dataset = datasets.Dataset.from_dict(ROWS).shuffle(seed=1).select([4, 2])
    dataset.save_to_disk(tmp_path / "few")
    assert [row.text for row in read(tmp_path / "few")] == dataset["text"][:]


def test_caches_beside_the_rows_are_not_read(tmp_path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "poems")
    found = datasets.load_from_disk(str(tmp_path / "poems")).map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "poems").glob("cache-*.arrow")) and found[0]["text"] == "TEXT 0"
    assert [row.text for row in read(tmp_path / "poems")] == ROWS["text"]


def test_a_dataset_of_splits_has_the_name_of_its_folder(tmp_path):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "poems")
    assert read(tmp_path / "poems") == [TextRow(domain="poems", text="test"), TextRow(domain="poems", text="train")]
    assert read(tmp_path / "poems" / "train") == [TextRow(domain="poems", text="train")]


def test_other_files_beside_a_saved_dataset_are_read_too(tmp_path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "all" / "poems")
    (tmp_path / "all" / "state.json").write_text('{"text": "no state"}', encoding="utf-8")
    (tmp_path / "all" / "lost.arrow").write_bytes(b"not of a saved dataset")
    rows = read(tmp_path / "all")
    assert [row.domain for row in rows] == ["poems"] * 7 + ["state"]


def test_a_domain_column_of_classes_is_a_number(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "domain": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"text": ["x"], "domain": [1]}, features=features).save_to_disk(tmp_path / "d")
    assert read(tmp_path / "d") == [TextRow(domain="1", text="x")]


def test_damage_is_one_line(tmp_path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "poems")
    (file,) = find_files([tmp_path / "poems"])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged, or no Arrow") as caught:
        read(tmp_path / "poems")
    assert "\n" not in str(caught.value)
    state = tmp_path / "poems" / "state.json"
    state.write_text(json.dumps({"_data_files": 1}), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        find_files([tmp_path / "poems"])
    assert str(caught.value) == f"{state}: damaged; save the dataset again with `save_to_disk`"
