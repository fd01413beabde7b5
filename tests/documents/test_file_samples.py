"""Test file_samples.py: the beginnings of files, and how much larger the files are."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuselm.documents import file_samples
from fuselm.documents.texts import read_texts

TEXTS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(50_000)]  # which no compression makes small
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(LINES.encode())
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    else:
        path.write_text(LINES)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.csv"])
def test_a_sample_is_the_beginning_and_its_factor_tells_how_much_there_is(tmp_path, name, monkeypatch):
    monkeypatch.setattr(file_samples, "BLOCK", 1 << 12)
    monkeypatch.setattr(file_samples, "LEAST_BYTES", 1 << 10)
    file = write(tmp_path / name)
    (copy,), factor = file_samples.copy_samples([file], tmp_path / "copies", size=file.stat().st_size // 5)
    found = [row.text for row in read_texts(copy)]
    assert found == TEXTS[: len(found)] and 0.1 * len(TEXTS) < len(found) < 0.5 * len(TEXTS)
    assert len(found) * factor == pytest.approx(len(TEXTS), rel=0.3)
    assert next(read_texts(copy)).domain == "a"


def test_small_files_and_lists_are_copied_whole(tmp_path):
    files = [write(tmp_path / "list.json"), tmp_path / "plain.txt"]
    files[1].write_text("One text.")
    copies, factor = file_samples.copy_samples(files, tmp_path / "copies", size=1)
    assert factor == 1 and [copy.read_bytes() for copy in copies] == [file.read_bytes() for file in files]
