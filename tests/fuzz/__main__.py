"""The offline run: python -m tests.fuzz --frames N --seed S [--target NAME] [--out FOLDER] [--jobs N]."""

import argparse
import multiprocessing
import sys
from pathlib import Path

from tests.fuzz import targets


def main() -> None:
    """Exit with 1 on a bug; its reproducer lies in the corpus then."""
    options = _parse()
    names = list(targets.CLASSES) if options.target == "all" else [options.target]
    work = []
    for name in names:
        frames = round(options.frames * targets.SHARES[name]) if options.target == "all" else options.frames
        parts = 1 if name == "sockets" else options.jobs
        work += [(name, -(-frames // parts), f"{options.seed}.{part}", options) for part in range(parts)]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        bugs = [found for part in pool.map(targets.one, work, chunksize=1) for found in part]
    print(f"{len(bugs)} bugs")
    sys.exit(1 if bugs else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--frames", type=int, default=100_000, help="malformed frames, of all targets together")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--target", choices=("all", *targets.CLASSES), default="all")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where reproducers go")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--go-on", action="store_true", help="do not stop at the first bug")
    parser.add_argument("--seeds", action="store_true", help="keep a short input for each outcome too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
