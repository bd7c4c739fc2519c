"""How fast this machine reads memory and multiplies matrices: the rates of the rooflines.

Measured by a process of its own, with as many threads as the GPU worker has. Reading: the sum of an array much larger
than any cache, by torch and by numba, whichever is faster. Multiplying: torch's own product of matrices of the sizes
of small models. The best of many short rounds counts: what a machine could do, not what it did while others worked.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from deploy.local.child import Child, Progress
from deploy.local.cluster import ROOT
from evaluation.roofline import Rates
from wire.lifetime import die_with_parent

ARRAY_BYTES = 512 << 20
SECONDS = 0.5  # for each way to do it
ROWS, INPUTS, OUTPUTS = 512, 896, 4864
LIMIT_SECONDS = 300.0


def measured(progress: Progress) -> Rates:
    """The rates, now. Takes some seconds, and half a gigabyte of memory. Raises UnavailableError without torch."""
    argv = ["-m", "evaluation.machine_rates", "--threads", str(os.cpu_count() or 1)]
    child = Child("measurement of the machine", argv, ROOT, None, lambda: None)
    try:
        found = json.loads(child.await_line("rates", LIMIT_SECONDS, "measuring the machine", progress))
    finally:
        child.kill()
        child.reap()
    return Rates(**found)


def main() -> None:
    """Print the rates in one line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        import torch
    except ImportError:
        print("rooflines need torch: pip install 'cleave[gpu]'", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(options.threads)
    read = max(ARRAY_BYTES / _least(reader) for reader in _readers(torch))
    macs = {kind: ROWS * INPUTS * OUTPUTS / _least(_product(torch, kind)) for kind in ("float32", "bfloat16")}
    rates = {"threads": options.threads, "bytes_per_second": read, "macs_per_second": macs}
    print(f"rates {json.dumps(rates)}", flush=True)


def _readers(torch: Any) -> Iterator[Callable[[], object]]:
    values = torch.ones(ARRAY_BYTES // 8, dtype=torch.int64)
    yield values.sum
    try:
        import numba
    except ImportError:
        return
    array, total = values.numpy(), numba.njit(parallel=True)(_sum_in(numba.prange))
    yield lambda: total(array, 8 * torch.get_num_threads())


def _sum_in(prange: Any) -> Callable[[Any, int], Any]:
    def total(values: Any, parts: int) -> Any:
        whole, length = 0, len(values) // parts
        for part in prange(parts):
            piece = values[part * length : (part + 1) * length]
            some = 0
            for i in range(len(piece)):
                some += piece[i]
            whole += some
        return whole

    return total


def _product(torch: Any, kind: str) -> Callable[[], object]:
    x, weight = (torch.ones(rows, INPUTS, dtype=getattr(torch, kind)) for rows in (ROWS, OUTPUTS))
    return lambda: torch.nn.functional.linear(x, weight)


def _least(work: Callable[[], object]) -> float:
    """Seconds of the fastest of many rounds. The first one, which may compile, is one of them."""
    least, end = float("inf"), time.monotonic() + SECONDS
    while time.monotonic() < end:
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least


if __name__ == "__main__":
    main()
