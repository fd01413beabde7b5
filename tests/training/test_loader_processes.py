"""Test loader_processes.py: what goes wrong in a process that reads ahead is said in one line, as it is here."""

import pytest
from torch.utils.data import DataLoader, Dataset

from fuselm.training.loader_processes import BatchesAhead, name_worker_errors, prepare_process


class Damaged(Dataset):
    """Raise an error for the second item."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        prepare_process()
        if index == 1:
            raise ValueError("stores/a: damaged; delete it")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line_whichever_process_meets_it(workers):
    batches = iter(DataLoader(Damaged(), num_workers=workers, multiprocessing_context="fork" if workers else None))
    next(batches)
    with pytest.raises(ValueError, match=r"^stores/a: damaged; delete it$"), name_worker_errors():
        next(batches)


def test_batches_that_are_taken_in_a_thread_come_in_order_and_end_once():
    ahead = BatchesAhead(iter(range(7)))
    assert list(ahead) == list(range(7)) and list(ahead) == []


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for():
    def fail():
        yield 1
        raise ValueError("stores/a: damaged; delete it")

    ahead = BatchesAhead(fail())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match=r"^stores/a: damaged; delete it$"):
        next(ahead)
    ahead.stop()
    assert list(ahead) == []
