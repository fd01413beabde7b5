import pytest

from fuselm.system.file_lock import hold_lock


def test_a_missing_file_in_the_locked_block_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), hold_lock(tmp_path / "lock"):
        (tmp_path / "other").read_text()


def test_the_lock_can_be_held_again_after_its_file_was_removed(tmp_path):
    lock = tmp_path / "lock"
    with hold_lock(lock):
        lock.unlink()
    with hold_lock(lock):
        assert lock.exists()
    assert not lock.exists()
