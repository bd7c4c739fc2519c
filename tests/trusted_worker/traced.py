"""What a function takes of ordinary memory: numpy reports its arrays to tracemalloc, but for those in an arena."""

import tracemalloc
from collections.abc import Callable


def peak(work: Callable[[], object]) -> int:
    """Bytes at the highest point while `work` runs, arrays, buffers of numpy's iterators and Python objects."""
    work()  # what is kept from a first run is not its own
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
