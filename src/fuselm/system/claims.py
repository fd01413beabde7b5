"""Claim pieces of work that several processes share, so that one does each, and take over what a dead one claimed.

A claim is a small hidden file that is created exclusively, with the number of its owner's `worker` file. The owner
rewrites that file every `SECONDS_PER_BEAT`, and removes it when it ends. On the same machine a worker is dead as soon
as its process is; elsewhere, when its file has not changed for `SECONDS_OF_SILENCE` while somebody looked. Who takes
over a claim creates the next one of the same name exclusively, so only one does, and nothing depends on clocks, locks
or the right to delete. A worker that was thought dead and comes back does no harm: it makes the same bytes.
"""

import contextlib
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from fuselm.system.atomic_files import create_exclusively
from fuselm.system.temporaries import identify_machine, read_start_of_process

SECONDS_PER_BEAT = 5.0
SECONDS_OF_SILENCE = 60.0  # after which a worker of another machine is dead
SECONDS_BETWEEN_LOOKS = 0.05  # at first; a wait that takes longer looks less often
MOST_SECONDS_BETWEEN_LOOKS = 1.0
CLAIM, WORKER = ".claim-", ".worker-"


class Claims:
    """Hold the claims of this process in one folder; use `open_claims`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._worker = uuid.uuid4().hex[:16]
        self._taken: set[str] = set()
        self._seen: dict[str, tuple[bytes | None, float]] = {}  # other workers' files, and when they were first seen so
        self._ended = threading.Event()
        self._beat = 0
        self._write_beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def take(self, name: str) -> bool:
        """Claim a piece of work, if nobody alive has, and tell whether it is this process's now."""
        if name in self._taken:
            return True
        for generation in itertools.count():
            path = self._folder / f"{CLAIM}{name}.{generation}"
            if create_exclusively(path, self._worker.encode()) or (owner := _read_owner(path)) == self._worker:
                self._taken.add(name)
                return True
            if not path.with_suffix(f".{generation + 1}").exists() and self._is_alive(owner or path.name):
                return False
        raise AssertionError

    def wait_for(self, name: str, is_done: Callable[[], bool]) -> bool:
        """Wait until a piece of work is done by others, or claim it. Tell whether it is this process's now."""
        pause = SECONDS_BETWEEN_LOOKS
        while not is_done():
            if self.take(name):
                if not is_done():  # its owner may have done it and ended between the two
                    return True
                break
            time.sleep(pause)
            pause = min(pause * 1.5, MOST_SECONDS_BETWEEN_LOOKS)
        return False

    def close(self) -> None:
        """End this worker; others may take what it claimed and did not do."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            (self._folder / f"{WORKER}{self._worker}").unlink(missing_ok=True)

    def _is_alive(self, worker: str) -> bool:
        """Tell whether another worker, or who is writing a claim of that name, may be at work."""
        try:
            found = (self._folder / f"{WORKER}{worker}").read_bytes()
        except OSError:
            found = b"" if worker.startswith(CLAIM) else None  # a claim that is being written names nobody yet
        if found is None:
            return False
        now = time.monotonic()
        known, since = self._seen.get(worker, (None, now))
        if known != found:
            self._seen[worker] = found, (since := now)
        try:
            of = json.loads(found)
            if of["machine"] == identify_machine():
                return read_start_of_process(of["process"]) == of["started"]
        except (ValueError, LookupError, TypeError):  # it is being written
            pass
        return now - since < SECONDS_OF_SILENCE

    def _write_beat(self) -> None:
        self._beat += 1
        process = os.getpid()
        row = {"machine": identify_machine(), "process": process, "started": read_start_of_process(process)}
        path = self._folder / f"{WORKER}{self._worker}"
        if self._beat == 1 or path.exists():  # else the work is finished, and the folder may have another name
            path.write_text(json.dumps(row | {"beat": self._beat}), encoding="ascii")

    def _keep_beating(self) -> None:
        while not self._ended.wait(SECONDS_PER_BEAT):
            with contextlib.suppress(OSError):
                self._write_beat()


_open: dict[Path, tuple[Claims, int]] = {}  # of this process, with how many hold them


@contextlib.contextmanager
def open_claims(folder: Path) -> Iterator[Claims]:
    """Hold claims in a folder within the `with` block. Within another one on the same folder, they are the same."""
    claims, held = _open.get(folder) or (Claims(folder), 0)
    _open[folder] = claims, held + 1
    try:
        yield claims
    finally:
        if _open[folder][1] == 1:
            del _open[folder]
            claims.close()
        else:
            _open[folder] = claims, _open[folder][1] - 1


def _read_owner(claim: Path) -> str:
    try:
        return claim.read_text(encoding="ascii", errors="replace")
    except OSError:  # the work is finished, and its claims are swept
        return ""
