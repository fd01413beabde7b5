"""Remote folders are read and written as local ones are, and one process at a time creates a file."""

import concurrent.futures
import pickle
from pathlib import Path

import pytest
from object_store import (  # noqa: F401
    KEY,
    SECRET,
    az_address,
    az_bucket,
    gs_address,
    gs_bucket,
    memory_folder,
    s3_address,
    s3_bucket,
)

from fuselm.system import atomic_files, local_copies, remote_paths, temporaries
from fuselm.system.remote_paths import RemotePath, open_path


@pytest.fixture(params=["memory_folder", "s3_bucket", "gs_bucket", "az_bucket", "tmp_path"])
def folder(request):
    return request.getfixturevalue(request.param) / "run"


def test_names_are_joined_and_taken_apart_as_pathlib_does():
    path = open_path("s3://bucket/run/")
    assert isinstance(path, Path)
    assert str(path / "capture" / "a-1.partial") == "s3://bucket/run/capture/a-1.partial"
    assert str(path.parent) == "s3://bucket"
    assert str((path / "a" / "b").relative_to(path)) == "a/b"
    assert (path / "a").is_relative_to(path) and path.is_absolute() and path.resolve() == path
    assert str(path / "/data/x") == "/data/x" and type(path / "/data/x") is type(Path("/data"))
    assert str(path / "memory://other/x") == "memory://other/x"
    assert pickle.loads(pickle.dumps(path)) == path and str(pickle.loads(pickle.dumps(path))) == str(path)


def test_a_path_of_this_machine_stays_one():
    assert type(open_path("~/runs")) is type(open_path("file:///runs")) is type(Path())
    assert open_path("file:///runs/a") == Path("/runs/a") and open_path("~/runs") == Path("~/runs").expanduser()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere://b/x", "nowhere://b/x: no file system is known as nowhere://; write a path, or s3://, gs://"),
        ("s3://me:secret@bucket/x", "s3://…@…: holds a password"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match="^" + message):
        open_path(text)


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        ValueError, match=r"^gs://b/x: needs a package that is not installed; pip install 'fuselm\[gs\]'$"
    ):
        open_path("gs://b/x")


def test_the_system_never_opens_a_local_file_of_a_remote_name(memory_folder):
    with pytest.raises(TypeError, match="is remote"):
        (Path("/") / "x").rename(memory_folder / "x")


def test_files_are_written_listed_and_removed(folder):
    assert not folder.is_dir() and not folder.exists() and list(folder.glob("*")) == []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sub").mkdir(exist_ok=True)
    atomic_files.write_text(folder / "sub" / "a.json", "ä")
    (folder / "b.bin").write_bytes(b"seven")
    (folder / ".hidden").write_text("h")
    assert folder.is_dir() and (folder / "sub").is_dir() and not (folder / "sub").is_file()
    assert sorted(path.name for path in folder.iterdir()) == [".hidden", "b.bin", "sub"]
    assert [str(path.relative_to(folder)) for path in folder.glob("*/*.json")] == ["sub/a.json"]
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {".hidden", "b.bin", "sub/a.json"}
    assert [path.name for path in folder.glob("sub")] == ["sub"] and list(folder.glob("absent")) == []
    assert (folder / "sub" / "a.json").read_text(encoding="utf-8") == "ä"
    with (folder / "b.bin").open("rb") as file:
        assert file.read(2) == b"se" and file.seek(3) == 3 and file.read() == b"en"
    before = (folder / "b.bin").stat()
    assert before.st_size == 5 and before.st_mtime > 1e9
    (folder / "b.bin").write_bytes(b"eleven")
    assert (folder / "b.bin").stat().st_size == 6
    (folder / "b.bin").unlink()
    (folder / "b.bin").unlink(missing_ok=True)
    assert not (folder / "b.bin").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "b.bin").read_bytes()


def test_a_sealed_file_is_whole_until_it_changes(folder):
    folder.mkdir(parents=True)
    atomic_files.write_file(folder / "a", lambda temporary: temporary.write_bytes(b"seven"), seal=True)
    assert atomic_files.is_whole(folder / "a")
    (folder / "a").write_bytes(b"eight")
    assert not atomic_files.is_whole(folder / "a")


def test_one_of_many_creates_a_file(folder):
    folder.mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: atomic_files.create_exclusively(folder / "c", str(n).encode()), range(24)))
    assert sum(made) == 1
    assert (folder / "c").read_bytes() == str(made.index(True)).encode()
    assert [path.name for path in folder.iterdir()] == ["c"]


def test_a_service_that_ignores_the_condition_is_refused(s3_bucket, monkeypatch):
    monkeypatch.setattr(atomic_files, "_exclusive_places", set())
    monkeypatch.setattr(RemotePath, "create", lambda path, data: bool(path.write_bytes(data)))
    with pytest.raises(OSError, match="ignores If-None-Match"):
        atomic_files.create_exclusively(s3_bucket / "c", b"1")


def test_errors_name_the_path_and_show_no_credentials(s3_bucket, monkeypatch):
    absent = open_path("s3://no-such-bucket-here/x")
    with pytest.raises(
        ValueError, match=r"^s3://no-such-bucket-here/x: there is no such bucket or container; create it"
    ):
        absent.write_bytes(b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(RemotePath, "filesystem", property(_open_without_retries))
    with pytest.raises(remote_paths.RemoteError, match=f"^{s3_bucket}/x: cannot be reached") as caught:
        (s3_bucket / "x").read_bytes()
    assert KEY not in str(caught.value) and SECRET not in str(caught.value)


def _open_without_retries(path):
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, config_kwargs={"retries": {"max_attempts": 0}})
    filesystem.retries = 1
    return filesystem


def test_a_copy_of_a_folder_keeps_what_another_process_is_copying(memory_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path))
    (memory_folder / "a").write_bytes(b"one")
    copy = local_copies.fetch_folder(memory_folder)
    begun, old = temporaries.name_temporary(copy / "b"), copy / "c"
    begun.write_bytes(b"tw")
    old.write_bytes(b"three")
    assert local_copies.fetch_folder(memory_folder) == copy
    assert begun.exists() and not old.exists() and (copy / "a").read_bytes() == b"one"
