"""public_names.py: published files name models and texts, and hold no paths."""

import pytest

from fuselm.system.public_names import name_options_publicly, name_publicly


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("owner/model-1.5b", "owner/model-1.5b"),
        ("gpt2", "gpt2"),
        ("/home/secret/models/a", "a"),
        ("/home/secret/models/a/", "a"),
        ("~/models/a.gguf", "a.gguf"),
        ("../secret/a", "a"),
        ("./a", "a"),
        (r"C:\Users\secret\a", "a"),
        ("secret/models/a", "a"),
        ("s3://secret-bucket/models/a", "a"),
        ("http://secret.internal:8000/v1", "a server"),
    ],
)
def test_a_model_is_named_by_its_hub_id_or_the_last_part_of_its_path(spec, name):
    assert name_publicly(spec) == name


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "secret/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert name_publicly("secret/model") == "model" and name_publicly("secret/other") == "secret/other"
    assert name_publicly(".") == tmp_path.name


def test_published_options_hold_no_paths_and_no_addresses():
    options = {
        "target": {"model": "owner/a", "revision": "feature/x"},
        "sources": {"b": {"server": "http://secret:8000/v1", "model": "/secret/b", "tokenizer": "owner/b"}},
        "corpus": {"files": ["texts/a.jsonl", "/secret/b.jsonl"], "dev": 0.1},
        "sources.c.store": "runs/c",
        "sources.c": "owner/c",
        "train.lora_modules": ["q_proj"],
    }
    assert name_options_publicly(options) == {
        "target": {"model": "owner/a", "revision": "feature/x"},
        "sources": {"b": {"server": "a server", "model": "b", "tokenizer": "owner/b"}},
        "corpus": {"files": ["a.jsonl", "b.jsonl"], "dev": 0.1},
        "sources.c.store": "c",
        "sources.c": "owner/c",
        "train.lora_modules": ["q_proj"],
    }
