"""Copy the beginning of each file of texts, so that a plan need not read all of them."""

from collections.abc import Sequence
from pathlib import Path

from fuselm.documents import text_streams
from fuselm.documents.text_files import COMPRESSED, JSON, PARQUET, TABLES, find_kind

LEAST_BYTES = 1 << 16  # of a file
BLOCK = 1 << 16


def copy_samples(files: Sequence[Path], folder: Path, *, size: int) -> tuple[list[Path], float]:
    """Copy about `size` bytes of the files, the same share of each, into a folder.

    Return the copies and how many times as large the files are, which is 1 if all was copied. A list in JSON and files
    of kinds that are read whole are copied whole.
    """
    sizes = [file.stat().st_size for file in files]
    share = min(size / max(sum(sizes), 1), 1.0)
    copies, taken = [], 0.0
    for number, (file, whole) in enumerate(zip(files, sizes, strict=True)):
        into = folder / f"{number:05d}" / file.parent.name
        into.mkdir(parents=True)
        path, part = _copy_sample(file, into, min(max(round(share * whole), LEAST_BYTES), whole), whole)
        copies.append(path)
        taken += part * whole
    return copies, max(sum(sizes) / max(taken, 1.0), 1.0)


def _copy_sample(file: Path, folder: Path, wanted: int, whole: int) -> tuple[Path, float]:
    """Copy about the first `wanted` of all bytes on disk of a file, and return the copy and the share that it has."""
    kind = find_kind(file)
    if wanted < whole and kind in PARQUET:
        return _copy_rows(file, folder / file.name, wanted / whole)
    if wanted < whole and (kind in TABLES or kind in JSON) and not _is_list(file):
        name = file.stem if file.suffix.lower() in COMPRESSED else file.name
        return folder / name, _copy_lines(file, folder / name, wanted) / whole
    with file.open("rb") as source, open(folder / file.name, "wb") as copy:
        while block := source.read(BLOCK):
            copy.write(block)
    return folder / file.name, 1.0


def _is_list(file: Path) -> bool:
    """Tell whether a file is a list in JSON, or an object that fills it."""
    with text_streams.open_bytes(file) as opened:
        begin = opened.read(BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    return begin.startswith(b"[") or (
        find_kind(file) == ".json" and not begin.partition(b"\n")[0].rstrip().endswith(b"}")
    )


def _copy_lines(file: Path, out: Path, wanted: int) -> int:
    """Copy whole lines until `wanted` bytes on disk are read, and return how many were."""
    with text_streams.open_counted(file) as (opened, count_read), open(out, "wb") as copy:
        while count_read() < wanted and (block := opened.read(BLOCK)):
            copy.write(block + opened.readline())
        return count_read()


def _copy_rows(file: Path, out: Path, share: float) -> tuple[Path, float]:
    """Copy the first rows of a Parquet file."""
    import pyarrow.parquet as pq

    from fuselm.system.remote_paths import is_remote

    with pq.ParquetFile(file.open("rb") if is_remote(file) else file) as opened:
        rows, wanted, copied = opened.metadata.num_rows, max(round(share * opened.metadata.num_rows), 1), 0
        with pq.ParquetWriter(out, opened.schema_arrow) as writer:
            for batch in opened.iter_batches(batch_size=min(wanted, 1024)):
                writer.write_batch(batch)
                if (copied := copied + len(batch)) >= wanted:
                    break
    return out, copied / max(rows, 1)
