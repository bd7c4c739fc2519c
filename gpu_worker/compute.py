"""The one thread that calculates, and what became of a call in it."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from wire.errors import CleaveError

if TYPE_CHECKING:
    from gpu_worker.calls import Call
    from gpu_worker.stream import Stream
    from gpu_worker.worker import Result, Worker

P = ParamSpec("P")
T = TypeVar("T")


class Compute:
    """Makes the worker in its thread, when it is first asked for: heavy imports do not delay listening."""

    def __init__(self, make_worker: "Callable[[], Worker]") -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._make_worker = make_worker
        self._worker: Future[Worker] | None = None

    @property
    def made(self) -> "Worker | None":
        """The worker, if it exists."""
        done = self._worker is not None and self._worker.done() and self._worker.exception() is None
        return self._worker.result() if self._worker is not None and done else None

    async def worker(self) -> "Worker":
        """The worker, once it exists. Raises what making it raised."""
        if self._worker is None:
            self._worker = self.submit(self._make_worker)
        return await asyncio.shield(asyncio.wrap_future(self._worker))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, from the compute thread."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Queue the function without waiting for it."""
        return self._thread.submit(function, *args, **kwargs)

    def stop(self) -> None:
        """Take no more work. What runs already is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Outcome:
    """A call's result, or why it was refused, and how long that took."""

    result: "Result"
    refused: CleaveError | None
    seconds: float

    @property
    def microseconds(self) -> int:
        """For the wire: a uint32."""
        return min(round(self.seconds * 1e6), (1 << 32) - 1)


def carry_out(worker: "Worker", call: "Call", stream: "Stream") -> Outcome:
    """What became of the call. What a well-formed call cannot have ends that call, not its stream."""
    start, result, refused = time.perf_counter(), None, None
    try:
        result = worker.execute(call, stream)
    except CleaveError as error:
        refused = error
    return Outcome(result, refused, time.perf_counter() - start)
