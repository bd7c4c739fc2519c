"""The GPU worker's stream socket in this process: its door in a thread of asyncio, its calls in the compute thread.

Nothing here waits for time to pass: `settle` returns when the compute thread has read what was there, and `expire`
moves the deadlines of half calls into the past.
"""

import asyncio
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_worker.compute import Compute
from gpu_worker.stream_plane import StreamPlane
from gpu_worker.traffic import Traffic
from gpu_worker.worker import Worker
from tests.fuzz.harness import Bug
from wire.v1 import gpu_worker_pb2 as pb

SECONDS = 10.0  # nothing here takes so long
LOAD_SECONDS = 100.0  # kernels are compiled
REQUEST_SECONDS = 600.0
SMALL_BUFFER = 4096  # the kernel holds little, so that answers are sent in parts


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


class StreamServer:
    """A worker with its stream socket at `path`."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = f"{self._folder.name}/stream"
        self._small = mock.patch("wire.stream_socket._BUFFER_BYTES", SMALL_BUFFER)
        self._small.start()
        self.traffic = Traffic()
        self._compute = Compute(lambda: Worker(folders, "cpu", ring_only=False))
        self._ear, self._loop = _Ear(), asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: self._ear.heard.append(str(context.get("exception"))))
        logging.getLogger("gpu_worker").addHandler(self._ear)
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._plane: StreamPlane = self._in_loop(self._open)
        self.worker: Worker = self._in_loop(self._compute.worker)

    def issue(self) -> bytes:
        """A ticket."""

        async def issue() -> bytes:
            return self._plane.issue()

        ticket: bytes = self._in_loop(issue)
        return ticket

    def load(self, name: str, precision: "pb.Precision.ValueType") -> None:
        """In the compute thread."""
        self._compute.submit(self.worker.load, name, precision).result(LOAD_SECONDS)

    def settle(self) -> None:
        """What was sent has been read: a round of the selector for what was ready, and another for what came of it."""
        for _ in range(2):
            self._compute.submit(lambda: None).result(SECONDS)

    def expire(self) -> bool:
        """The time of all half calls is over. Whether there was one."""

        def late() -> bool:
            waiting = [one for one in self._compute._talkers if one.deadline is not None]
            for one in waiting:
                one.deadline = time.monotonic() - 1
            return bool(waiting)

        return self._compute.submit(late).result(SECONDS)

    def check(self, streams: int) -> None:
        """Nothing went wrong, and so many streams are left. Raises Bug."""
        if self._ear.heard:
            heard, self._ear.heard = self._ear.heard, []
            raise Bug(f"conversation: {heard[0]}")
        until = time.monotonic() + SECONDS
        while (self.traffic.streams, self.traffic.busy) != (streams, 0):
            if time.monotonic() > until:
                raise Bug("conversation: a stream has ended and is still counted")
            time.sleep(0.0002)
        if not streams and self.worker.cache_bytes[0]:
            raise Bug("conversation: a stream has ended and its memory is still taken")

    def close(self) -> None:
        """Stop."""
        self._in_loop(self._plane.stop)
        self._compute.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        logging.getLogger("gpu_worker").removeHandler(self._ear)
        self._small.stop()
        self._folder.cleanup()

    async def _open(self) -> StreamPlane:
        return StreamPlane(f"unix:{self.path}", self._compute, False, self.traffic, REQUEST_SECONDS)

    def _in_loop(self, function: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(SECONDS)
