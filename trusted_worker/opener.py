"""One thread that brings in what is parked outside the budget, while the compute thread works on what came before.

It reads, decrypts and hashes, all of which leave the interpreter to others, and it computes nothing: a second thread
of numpy would take turns with the first.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Ready(Generic[T]):
    """In the place of a job: its result is there already, and costs no trip to the thread."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self) -> T:
        """The value."""
        return self._value


class Opener:
    """The thread starts with the first job and ends with the process."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "opener")

    def ahead(self, jobs: Iterable[Callable[[], T] | Ready[T]]) -> Generator[T, None, None]:
        """Results in order. While the caller works on one, the next job runs, and no other: two buffers are enough.

        A job's error is raised in the place of its result, and ends the series. Use it inside `contextlib.closing`:
        when it is left early, it waits for the job that runs, which may still write into the caller's memory.
        """
        under_way: Future[T] | Ready[T] | None = None
        try:
            for job in jobs:
                results = [under_way.result()] if under_way else []
                under_way = job if isinstance(job, Ready) else self._thread.submit(job)
                yield from results
            if under_way:
                yield under_way.result()
        finally:
            if isinstance(under_way, Future):
                wait([under_way])
