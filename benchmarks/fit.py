"""How many iterations of a run fit into a time, by the rate that a first stretch of it showed.

    python benchmarks/fit.py RUN --done 400 --every 200 --took 60 --seconds 300 --checks 40 --most 80000

RUN is the folder of a run of --mode train that was last started for two checks, --every iterations apart,
ended after --done iterations in all, and took --took seconds, the start included. The files of the checks tell the rate
between them and what a check costs. --seconds are left for the run, with --checks checks in them, and --most iterations
are enough. Prints the --max_iter with which the run goes on.
"""

import argparse
import sys
from pathlib import Path


def iterations_that_fit(run: Path, done: int, every: int, took: float, seconds: float, checks: int, most: int) -> int:
    """From `done` to `most`. Raises FileNotFoundError when the files of both checks are not there."""
    before, last = (run / f"check_point_{iteration:07d}.pth" for iteration in (done - every, done))
    begun = (run / "samples" / f"iteration_{done:07d}.png").stat().st_mtime  # what a check writes first
    per_iteration = (begun - before.stat().st_mtime) / every
    per_check = last.stat().st_mtime - begun
    start = max(0.0, took - 2 * (every * per_iteration + per_check))
    left = seconds - start - checks * per_check
    return max(done, min(most, done + int(left / max(per_iteration, 1e-6))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    for name, kind in {"done": int, "every": int, "took": float, "seconds": float, "checks": int, "most": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    try:
        print(iterations_that_fit(**vars(parser.parse_args())))
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not there: a check of the run is missing", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
