"""How many iterations of a run fit into a time, by the rate that its first stretch showed.

    python benchmarks/fit.py RUN --first 400 --took 60 --seconds 300 --checks 40 --most 80000

RUN is the folder of a run of --mode train or distill with --check_iter at half of --max_iter, which was --first and
took --took seconds, the start included. The files of its two checks tell the rate of the second half and what a
check costs. Prints the --max_iter with which it goes on.
"""

import argparse
import sys
from pathlib import Path


def iterations_that_fit(run: Path, first: int, took: float, seconds: float, checks: int, most: int) -> int:
    """From `first` to `most`. Raises OSError when the files of the checks are not there."""
    half = run / f"check_point_{first // 2:07d}.pth"
    whole = run / f"check_point_{first:07d}.pth"
    shown = [run / "samples" / f"iteration_{first:07d}.png", run / "student.pth"]  # what a check writes first
    begun = next(path for path in shown if path.exists()).stat().st_mtime
    per_iteration = (begun - half.stat().st_mtime) / (first - first // 2)
    per_check = whole.stat().st_mtime - begun
    start = max(0.0, took - first * per_iteration - 2 * per_check)
    left = seconds - start - checks * per_check
    return max(first, min(most, first + int(left / max(per_iteration, 1e-6))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    for name, kind, meaning in (
        ("first", int, "iterations of the first stretch"), ("took", float, "seconds that it took"),
        ("seconds", float, "seconds that are left for the run"), ("checks", int, "checks that will be made in them"),
        ("most", int, "iterations that are enough"),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True, help=meaning)
    try:
        print(iterations_that_fit(**vars(parser.parse_args())))
    except (OSError, StopIteration) as error:
        print(f"error: the first stretch of a run left no checks to go by ({error})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
