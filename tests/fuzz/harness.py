"""Run the cases of a target in a process that may die, and count how they end.

A target is a module of `targets/` with `prepare(folder)`, which makes what all cases need, and `case(made, random,
folder)`, which does one: it returns if the outcome is right, and raises what the reader raised. It asserts that nothing
is silently another. A new target is a new module.
"""

import contextlib
import faulthandler
import importlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SECONDS = 10  # of one case, at most
MEMORY = 12 << 30  # of addresses, most of which are libraries and nothing
LONGEST = 4000  # characters of a message
HERE = Path(__file__).parent
COMPILED = HERE.parents[1] / ".pytest_cache" / "numba-with-bounds"  # apart from what has no bounds checks
TARGETS = sorted(path.stem for path in (HERE / "targets").glob("*.py") if path.stem != "__init__")


@dataclass
class Tally:
    """Count how the cases of a target ended. `failures` lists those that must not happen, with their seeds."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict:
        return {
            "target": self.target,
            "cases": self.outcomes.total(),
            **dict(sorted(self.outcomes.items())),
            "seconds": round(self.seconds, 1),
            "failures": self.failures[:20],
        }


def run(target: str, seed: int, count: int, *, environment: Mapping[str, str]) -> Tally:
    """Run `count` cases, seeded from `seed` on; after one that kills the process, run the rest in another."""
    tally, done, began = Tally(target), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        own = {"NUMBA_CACHE_DIR": str(COMPILED), "FUSELM_CACHE": cache}
        settings = {**environment, **own, "NUMBA_BOUNDSCHECK": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        while done < count:
            first = seed + done
            command = [sys.executable, "-m", "tests.fuzz", target, "--worker"]
            command += ["--seed", str(first), "--count", str(count - done)]
            ended = subprocess.run(
                command, cwd=HERE.parents[1], env=settings, capture_output=True, text=True, errors="replace"
            )
            lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
            for number, outcome, problem in lines:
                tally.outcomes[outcome] += 1
                if problem:
                    tally.failures.append(f"--seed {number}: {problem}")
            done += len(lines)
            if done < count:
                how = "took too long" if "Timeout (0:00" in ended.stderr else f"ended with {ended.returncode}"
                last = ended.stderr.strip().splitlines()[-1:] or [""]
                tally.outcomes["crash"] += 1
                tally.failures.append(f"--seed {seed + done}: {how} ({last[0][:200]})")
                done += 1
                if not lines and how.endswith("ended with 1"):  # it does not even begin
                    break
    tally.seconds = time.monotonic() - began
    return tally


def work(target: str, seed: int, count: int) -> None:
    """Run the cases in this process, and print a line of JSON for each."""
    module = importlib.import_module(f"fuzz.targets.{target}")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        made = module.prepare(Path(folder) / "made")
        for number in range(seed, seed + count):
            scratch = Path(folder) / "case"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcome, problem = _outcome(module, made, number, scratch)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps([number, outcome, problem]), flush=True)


def _outcome(module, made, number: int, scratch: Path) -> tuple[str, str | None]:
    try:
        module.case(made, np.random.default_rng(number), scratch)
        return "correct", None
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            return "failure", f"OSError without errno: {error}"[:300]
        if len(message := str(error)) > LONGEST:
            return "failure", f"a message of {len(message)} characters: {message[:100]}"
        if not message.strip():
            return "failure", f"{type(error).__name__} without a message"
        return "refused", None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failure", f"{type(error).__name__}: {error} at {Path(where.filename).name}:{where.lineno}"[:300]
