"""Measure the speed of training: tokens a second, the time that steps wait for data, and memory."""

import time
from collections.abc import Iterator

import torch

from fuselm.system import machine


class SpeedCounts:
    """Count the seconds and tokens of this process's share of a step, and how long it waited for its batches."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._waited, self._tokens = 0.0, 0

    def begin(self) -> None:
        """Note that a step begins, unless one that is not logged yet did."""
        if self._began is None:
            self._began = time.perf_counter()

    def time_waits(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches, and count their tokens and the time that each took to come."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            self._tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["labels"].numel()
            yield batch

    def end(self) -> tuple[float, float, float]:
        """Return the seconds since the step began, those of waiting, and the tokens; begin to count again."""
        seconds = time.perf_counter() - (time.perf_counter() if self._began is None else self._began)
        counts = seconds, self._waited, float(self._tokens)
        self._began, self._waited, self._tokens = None, 0.0, 0
        return counts

    @staticmethod
    def describe(seconds: float, waited: float, tokens: float, *, processes: int) -> dict[str, float]:
        """Return what is logged, from the means over all processes; `data_wait` is a share of the time."""
        return {
            "seconds": seconds,
            "tokens_per_second": processes * tokens / max(seconds, 1e-9),
            "data_wait": waited / max(seconds, 1e-9),
            "memory_bytes": measure_memory(),
        }


def measure_memory() -> int:
    """Return the most bytes that this process has held: on its GPU, or else in the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return machine.measure_peak_memory()
