"""Texts that are read from object stores, the Hub and an HTTP server on loopback equal those on a disk."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, Repository, hub  # noqa: F401
from object_store import az_address, az_bucket, gs_address, gs_bucket, s3_address, s3_bucket  # noqa: F401

from fuselm.documents import file_samples
from fuselm.documents.text_files import find_files, strip_endings
from fuselm.documents.texts import TextRow, read_texts

TEXTS = [f"Text {n}, with an é." for n in range(1009)]
NAMES = ("a.jsonl", "b.jsonl.zst", "c.parquet", "d.csv", "e.txt")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write the texts in several kinds of files."""
    made = tmp_path / "texts"
    made.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (made / "a.jsonl").write_text(lines, encoding="utf-8")
    with pa.CompressedOutputStream(str(made / "b.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    pq.write_table(pa.table({"text": TEXTS}), made / "c.parquet")
    (made / "d.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS), encoding="utf-8")
    (made / "e.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return made


@pytest.fixture
def web_address(folder) -> Iterator[str]:
    """Serve the folder of texts, and yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def read(names: list[str]) -> list[TextRow]:
    return [row for file in find_files(names) for row in read_texts(file)]


@pytest.mark.parametrize("bucket", ["s3_bucket", "gs_bucket", "az_bucket"])
def test_texts_on_an_object_store_are_those_of_a_disk(folder, bucket, request):
    bucket = request.getfixturevalue(bucket)
    for name in NAMES:
        (bucket / "texts" / name).send(folder / name)
    expected = read([str(folder)])
    assert len(expected) == 4 * 1009 + 1
    assert read([f"{bucket}/texts"]) == expected
    assert read([f"{bucket}/texts/{name}" for name in NAMES]) == expected
    assert read([f"{bucket}/texts/*.jsonl.zst"]) == read([str(folder / "b.jsonl.zst")])


def test_a_sample_of_texts_on_an_object_store_is_copied(folder, s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(file_samples, "LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(file_samples, "BLOCK", 1 << 10)
    for name in ("a.jsonl", "c.parquet"):
        (s3_bucket / "texts" / name).send(folder / name)
    copies, factor = file_samples.copy_samples(find_files([f"{s3_bucket}/texts"]), tmp_path / "copies", size=9_000)
    assert factor > 1.5 and [strip_endings(copy) for copy in copies] == ["a", "c"]
    for copy in copies:
        rows = [row.text for row in read_texts(copy)]
        assert rows == TEXTS[: len(rows)] and 0 < len(rows) < 1009


def test_texts_behind_a_web_address_are_those_of_a_disk(folder, web_address, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert read([f"{web_address}/{name}" for name in NAMES]) == read([str(folder)])
    with pytest.raises(ValueError, match=f"{web_address}/absent.jsonl: "):
        read([f"{web_address}/absent.jsonl"])


def test_texts_on_the_hub_are_those_of_a_disk(folder, hub, tmp_path):
    files = {f"data/{name}": (folder / name).read_bytes() for name in NAMES}
    hub.repositories["datasets", "me/texts"] = Repository(private=True, files=files, commits=1)
    script = """if True:
        import json, sys
        from fuselm.documents.text_files import find_files
        from fuselm.documents.texts import read_texts
        rows = [[row for file in find_files([name]) for row in read_texts(file)] for name in sys.argv[1:]]
        print(json.dumps([[row.text for row in of_name] for of_name in rows]))
    """
    names = [f"hf://datasets/me/texts/data{below}" for below in ("", "/*.jsonl.zst", "/c.parquet")]
    environment = {n: value for n, value in os.environ.items() if not n.startswith("HF_") and "_proxy" not in n.lower()}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    found = subprocess.run(
        [sys.executable, "-c", script, *names],
        env=environment | {"HF_HUB_DISABLE_XET": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(found.stdout) == [[row.text for row in read([str(folder)])], TEXTS, TEXTS]
