"""disk_errors.py: whichever library writes, an error of the disk becomes an `OSError` with a number and a path."""

import contextlib
import errno
import os
import resource
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fuselm.system import atomic_files
from fuselm.system.disk_errors import find_code, name_disk_errors

SIZE = 1 << 16


def copy(path):
    source = path.with_name("source")
    shutil.copyfile(source, path)


def copy_tree(path):
    (path.parent / "tree").mkdir()
    (path.parent / "tree/source").symlink_to(path.parent / "source")
    shutil.copytree(path.parent / "tree", path)


WRITERS = {
    "safetensors of torch": lambda path: safetensors.torch.save_file({"a": torch.zeros(SIZE)}, path),
    "safetensors of numpy": lambda path: safetensors.numpy.save_file({"a": np.zeros(SIZE)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(SIZE)}, path),
    "torch, of old": lambda path: torch.save({"a": torch.zeros(SIZE)}, path, _use_new_zipfile_serialization=False),
    "numpy": lambda path: np.save(path, np.random.default_rng(0).random(SIZE)),
    "pyarrow": lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).random(SIZE)}), path),
    "text": lambda path: atomic_files.write_text(path, "a" * SIZE),
    "a copy": copy,
    "copies": copy_tree,
}


@contextlib.contextmanager
def limited(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_reports_a_file_that_exceeds_the_size_limit(tmp_path, writer):
    (tmp_path / "source").write_bytes(bytes(SIZE))
    with pytest.raises(OSError) as caught, limited(SIZE // 2), name_disk_errors(tmp_path):
        WRITERS[writer](tmp_path / "file")
    assert caught.value.errno == errno.EFBIG and str(caught.value.filename).startswith(str(tmp_path))


@pytest.mark.parametrize("writer", ["safetensors of torch", "torch", "numpy", "pyarrow"])
def test_every_writer_reports_a_folder_that_is_gone(tmp_path, writer):
    with pytest.raises(OSError) as caught, name_disk_errors(tmp_path):
        WRITERS[writer](tmp_path / "gone" / "file")
    assert caught.value.errno == errno.ENOENT and str(caught.value.filename).startswith(str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_is_reported_with_its_folder_if_no_file_is_named(tmp_path):
    with pytest.raises(OSError) as caught, name_disk_errors(tmp_path), open("/dev/full", "w") as file:
        file.write("a")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_each_disk_error_is_recognised_in_the_words_of_each_library(tmp_path, number):
    said = os.strerror(number)
    for error in (
        OSError(number, said),
        RuntimeError(f"Error while serializing: I/O error: {said} (os error {number})"),
        RuntimeError(f"[Errno {number}] Error writing bytes to file. Detail: [errno {number}] {said}"),
        shutil.Error([("a", "b", f"[Errno {number}] {said}: 'b'")]),
        RuntimeError(f"cannot write: {said}"),
    ):
        assert find_code(error, tmp_path) == number


@pytest.mark.parametrize(
    "error",
    [
        ValueError("No space left on device"),
        RuntimeError("shape mismatch"),
        OSError("Unable to load weights"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        KeyError("file"),
    ],
)
def test_errors_that_are_not_the_disks_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as caught, name_disk_errors(tmp_path):
        raise error
    assert caught.value is error
