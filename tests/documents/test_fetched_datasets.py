"""Test fetched_datasets.py with the real `datasets` library, on datasets in folders and on a hub that is not there."""

import json
import sys

import datasets
import pytest

from fuselm.documents.fetched_datasets import DatasetRequest, fetch_dataset

ROWS = {"body": [f"text {n}" for n in range(5)], "label": [0, 1, 0, 1, 0]}
FEATURES = datasets.Features({"body": datasets.Value("string"), "label": datasets.ClassLabel(names=["prose", "verse"])})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def read(path, **options) -> list[dict]:
    """Return the rows of the file that is fetched."""
    fetched = fetch_dataset(DatasetRequest(path=str(path), **options))
    assert fetched.name == f"{str(path).rpartition('/')[2]}.jsonl"
    return [json.loads(line) for line in fetched.read_text(encoding="utf-8").splitlines()]


def explain(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of files as a repository on the hub has them."""
    folder = tmp_path / "poems"
    for name, texts in {"train": ["one", "two", "three"], "test": ["four"]}.items():
        rows = [{"text": text, "lang": "english"} for text in texts]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_a_folder_of_files_is_loaded_by_split(folder):
    assert read(folder) == [{"text": text} for text in ("one", "two", "three")]
    assert read(folder, split="test", domain="lang") == [{"text": "four", "domain": "english"}]
    assert read(folder, split="train[1:]") == [{"text": "two"}, {"text": "three"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_limit_takes_the_first_rows(folder, streaming):
    assert read(folder, limit=2, streaming=streaming) == [{"text": "one"}, {"text": "two"}]
    assert len(read(folder, limit=97, streaming=streaming)) == 3


def test_a_saved_dataset_gives_columns_and_names_of_classes(tmp_path):
    datasets.Dataset.from_dict(ROWS, features=FEATURES).save_to_disk(tmp_path / "saved")
    rows = read(tmp_path / "saved", text="body", domain="label", limit=2)
    assert rows == [{"text": "text 0", "domain": "prose"}, {"text": "text 1", "domain": "verse"}]
    assert "row 1: no column 'text' (found body, label); set corpus.dataset.text" in explain(tmp_path / "saved")
    for option in ({"split": "train"}, {"streaming": True}, {"name": "a"}, {"revision": "main"}):
        message = explain(tmp_path / "saved", text="body", **option)
        assert message.startswith(f"corpus.dataset.{next(iter(option))}: does nothing, because {tmp_path}/saved is")


def test_a_split_of_saved_ones_is_chosen(tmp_path):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [{"text": "train"}]
    assert read(tmp_path / "saved", split="test") == [{"text": "test"}]
    message = explain(tmp_path / "saved", split="dev")
    assert "cannot load split 'dev'" in message and message.endswith("; its splits are train, test")


def test_it_is_fetched_once_until_its_files_change(folder, monkeypatch):
    before = read(folder)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("fetched again"))
        assert read(folder) == before
    file = folder / "data" / "train.jsonl"
    file.write_text('{"text": "new", "lang": "english"}\n', encoding="utf-8")
    assert read(folder) == [{"text": "new"}]


def test_a_missing_text_is_empty_and_another_type_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [{"text": "a"}, {"text": ""}]
    datasets.Dataset.from_dict({"text": [["a"]], "domain": [[1]]}).save_to_disk(tmp_path / "lists")
    assert "row 1: 'text' is a list, and needs to be a string" in explain(tmp_path / "lists")


def test_a_dataset_that_cannot_be_loaded_is_one_line(folder, monkeypatch):
    message = explain(folder, split="dev")
    assert "cannot load split 'dev'" in message and message.endswith("; its splits are train, test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = explain("nobody/no-such-dataset")
    assert message.startswith("corpus.dataset: nobody/no-such-dataset: `datasets` cannot load split 'train' (")


def test_without_the_library_its_install_line_is_shown(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert explain(folder) == ("corpus.dataset: the datasets library is not installed; pip install 'fuselm[datasets]'")
