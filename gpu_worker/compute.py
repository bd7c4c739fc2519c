"""The one thread that calculates: it waits for work that others submit and for calls on stream sockets.

Work that takes less time than two threads need to wake each other may be done in the thread that has it, `at_once`,
while the compute thread is idle. Never do two threads work at the same time.
"""

import asyncio
import os
import selectors
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from wire.errors import CleaveError
from wire.metrics import Histogram

if TYPE_CHECKING:
    from gpu_worker.calls import Call
    from gpu_worker.stream import Stream
    from gpu_worker.worker import Result, Worker

ATTENTIVE_SECONDS = 0.001  # after an answer the next call is near, and a thread that sleeps takes 30 us to wake

P = ParamSpec("P")
T = TypeVar("T")


class Talker(Protocol):
    """A socket and what is said on it. For the compute thread."""

    deadline: float | None  # by time.monotonic; None: it may be idle

    def fileno(self) -> int: ...  # noqa: D102

    def go_on(self) -> int:
        """Do what can be done without waiting, one call at most. Events of selectors to wait for; 0: it is over."""

    def give_up(self) -> None:
        """The deadline is over."""

    def close(self) -> None:
        """Nobody waits for it any more."""


class Compute:
    """Makes the worker in its thread, when it is first asked for: heavy imports do not delay listening."""

    def __init__(self, make_worker: "Callable[[], Worker]") -> None:
        self._make_worker = make_worker
        self._worker: Future[Worker] | None = None
        self._thread: threading.Thread | None = None
        self._stopped = self._ended = False
        self._at_work = threading.Lock()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # counts the commands
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._talkers: list[Talker] = []
        self._attentive = 0.0

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
        """Queue the function without waiting for it. A future that is cancelled when there is no turn for it."""
        future: Future[T] = Future()

        def command() -> None:
            if self._stopped:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        if self._stopped:
            future.cancel()
        else:
            self._queue(command)
        return future

    def at_once(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The function's result, from this thread; None, and nothing was done, when another one is at work."""
        if self._stopped or not self._at_work.acquire(blocking=False):
            return None
        try:
            return function(*args, **kwargs)
        finally:
            self._at_work.release()

    def attend(self, talker: Talker) -> None:
        """Answer this socket too, from now on. In the compute thread."""
        self._talkers.append(talker)
        self._selector.register(talker, selectors.EVENT_READ, talker)

    def stop(self) -> None:
        """Take no more work. What runs already is not waited for."""
        if not self._stopped:
            self._stopped = True
            self._queue(self._end)

    def _queue(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        os.eventfd_write(self._wake, 1)
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="compute", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        """One command, and one call of each socket, at a time: nobody waits for all that somebody else wants."""
        while not self._ended:
            ready = [key for key, _ in self._events()]
            with self._at_work:
                self._drop_late([key.data for key in ready])
                for key in ready:
                    self._do(key)
        with self._at_work:
            for talker in list(self._talkers):
                self._drop(talker)
        self._selector.close()
        os.close(self._wake)

    def _do(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            os.eventfd_read(self._wake)
            self._commands.get()()
        else:
            self._go_on(key)

    def _events(self) -> list[tuple[selectors.SelectorKey, int]]:
        """What there is to do. Other threads that want this core get it meanwhile."""
        while time.monotonic() < self._attentive:
            if events := self._selector.select(0):
                return events
            os.sched_yield()
        return self._selector.select(self._patience())

    def _end(self) -> None:
        self._ended = True

    def _go_on(self, key: selectors.SelectorKey) -> None:
        wanted = key.data.go_on()
        self._attentive = time.monotonic() + ATTENTIVE_SECONDS
        if not wanted:
            self._drop(key.data)
        elif wanted != key.events:
            self._selector.modify(key.data, wanted, key.data)

    def _patience(self) -> float | None:
        """Seconds until the next deadline."""
        deadlines = [talker.deadline for talker in self._talkers if talker.deadline is not None]
        return max(min(deadlines) - time.monotonic(), 0) if deadlines else None

    def _drop_late(self, ready: list[Talker | None]) -> None:
        """Whoever has something to say is not late: perhaps it was this thread that had no time."""
        now = time.monotonic()
        for talker in [one for one in self._talkers if one.deadline is not None and one.deadline < now]:
            if talker not in ready:
                talker.give_up()
                self._drop(talker)

    def _drop(self, talker: Talker) -> None:
        self._talkers.remove(talker)
        self._selector.unregister(talker)
        talker.close()


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


def carry_out(worker: "Worker", call: "Call", stream: "Stream", timing: Histogram) -> Outcome:
    """What became of the call. What a well-formed call cannot have ends that call, not its stream."""
    start, result, refused = time.perf_counter(), None, None
    try:
        result = worker.execute(call, stream)
    except CleaveError as error:
        refused = error
    seconds = time.perf_counter() - start
    timing.observe(seconds)
    if stream.recording is not None:
        stream.recording.call(call, result, refused)
    return Outcome(result, refused, seconds)
