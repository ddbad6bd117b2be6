"""The fuzzer by itself: one case in detail, or many and their table. `harness.py` shows the commands."""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from fuzz.harness import BAD, Worker, missing, run_case, table
from fuzz.kinds import KINDS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="?")
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.seed is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
            print(run_case(options.kind, options.seed, Path(root), verbose=True))
        return
    worker, outcomes = Worker(), []
    for name in [options.kind] if options.kind else KINDS:
        for seed in range(options.first, options.first + (0 if missing(KINDS[name].needs) else options.cases)):
            outcomes.append(worker.case(name, seed))
            if outcomes[-1].word in BAD:
                print(outcomes[-1], flush=True)
    worker.close()
    print(table(outcomes))
    if options.table:
        options.table.write_text(table(outcomes))


if __name__ == "__main__":
    main()
