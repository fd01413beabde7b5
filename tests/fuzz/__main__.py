"""Feed a reader seeded nonsense: `python -m tests.fuzz TARGET --seed 0 --count 1000`; without a target, say which.

Each case must come out as a correct result or be refused as a command would: `ValueError`, or `OSError` of the system.
Another exception, a crash, a case that takes more than ten seconds, and a result that is silently another are failures,
named with the seed that repeats them. Compiled code runs with bounds checks.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from fuzz import harness


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=[], help=f"of {', '.join(harness.TARGETS)}; or `all`")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has one of its own")
    parser.add_argument("--count", type=int, default=100, help="cases of each target")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = list(harness.TARGETS) if options.targets == ["all"] else options.targets
    if unknown := [name for name in chosen if name not in harness.TARGETS]:
        parser.error(f"no target {unknown[0]}; there are {', '.join(harness.TARGETS)}")
    if options.worker:
        harness.work(chosen[0], options.seed, options.count)
        return
    if not chosen:
        print("\n".join(harness.TARGETS))
    tallies = [harness.run(name, options.seed, options.count, environment=os.environ) for name in chosen]
    for tally in tallies:
        print(json.dumps(tally.summary()))
    sys.exit(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    main()
