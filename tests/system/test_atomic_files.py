"""A file is written whole or not at all, and a sealed file that changed is noticed."""

import hashlib

import pytest

from fuselm.system import atomic_files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    atomic_files.write_text(path, "äé\n")
    assert path.read_bytes() == "äé\n".encode()

    def half(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        atomic_files.write_file(path, half)
    assert path.read_bytes() == "äé\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_error_of_the_disk_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "absent" / "a"
    with pytest.raises(FileNotFoundError) as caught:
        atomic_files.write_text(path, "text")
    assert caught.value.filename == str(path)


def test_a_sealed_file_is_whole_until_it_changes(tmp_path):
    path = tmp_path / "a"
    atomic_files.write_file(path, lambda temporary: temporary.write_bytes(b"seven"), seal=True)
    assert atomic_files.hash_file(path) == hashlib.sha256(b"seven").hexdigest()
    assert atomic_files.is_whole(path)
    path.write_bytes(b"eight")
    assert not atomic_files.is_whole(path)


def test_a_file_without_a_seal_does_not_count_as_whole(tmp_path):
    path = tmp_path / "a"
    atomic_files.write_text(path, "text")
    assert not atomic_files.is_whole(path)


def test_files_get_the_readers_of_their_folder(tmp_path):
    """Whoever may read the folder may read what is in it; who may write stays, and links are left alone."""
    outside = tmp_path / "outside"
    outside.touch(0o600)
    for mode, expected in ((0o755, 0o644), (0o700, 0o600)):
        folder = tmp_path / f"{mode:o}"
        (folder / "below").mkdir(parents=True)
        folder.chmod(mode)
        for file in (folder / "model.safetensors", folder / "below" / "config.json"):
            file.touch(0o600)
        (folder / "link").symlink_to(outside)
        atomic_files.share_modes(folder)
        assert {file.stat().st_mode & 0o777 for file in folder.rglob("*.*")} == {expected}
    assert outside.stat().st_mode & 0o777 == 0o600
