"""A trusted worker without its sockets: the real service and its compute thread in this process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from tests.faults.fleet import until
from tests.simulators.workers import HonestWorker
from trusted_worker.config import parse
from trusted_worker.offload import Traffic
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.service import Service
from trusted_worker.session import Event
from wire.checkpoint import Checkpoint
from wire.errors import CleaveError
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb

SECONDS = 60.0
T = TypeVar("T")


class _Local(HonestWorker):
    """With what a Service asks of an offload.GpuWorker beyond `call`."""

    traffic = Traffic()


def _service(words: list[str]) -> Any:
    return Service(parse(words), ProcessLimit())


class Inside:
    """A service that serves one model."""

    def __init__(self, folder: Path, scheme: str, *flags: str) -> None:
        words = ["--model", str(folder), "--scheme", scheme, "--gpu-worker", "unix:/nowhere", *flags]
        self.service = _service(words)
        self.service.worker = _Local(Checkpoint(folder), self.service.config)
        self.request = pb.OpenRequest(model=folder.name, scheme=scheme, precision=gpu.PRECISION_INT8)

    def do(self, work: Callable[[], T]) -> T:
        """In the compute thread. Raises what it raises."""
        done: T = self.service.engine.submit(work).result(SECONDS)
        return done

    def open(self) -> "Client":
        """A session and its client. Raises CleaveError."""
        return Client(self, self.do(lambda: self.service.open(self.request, b"")).session)

    def say(self, ids: list[int], count: int) -> list[int]:
        """A fresh session's answer. Raises CleaveError."""
        client = self.open()
        try:
            return client.say(ids, count)
        finally:
            client.close()

    def await_pads(self) -> None:
        """Until the bank is half full, where there is one."""
        capacity = self.stats().pads_capacity
        until(lambda: 2 * self.stats().pads_in_stock >= capacity)

    def stats(self) -> pb.StatsResponse:
        """Counters, between two steps."""
        found: pb.StatsResponse = self.do(self.service.stats)
        return found


class Client:
    """One session."""

    def __init__(self, inside: Inside, name: bytes) -> None:
        self._inside, self._name = inside, name
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._session = inside.service.session(name)
        inside.do(lambda: self._session.attach(self._events.put))

    def say(self, ids: list[int], count: int) -> list[int]:
        """A turn's first `count` tokens, or fewer at its end. Raises CleaveError."""
        self.begin(ids, count)
        return self.hear(count)

    def begin(self, ids: list[int], credit: int) -> None:
        """Send a prompt."""
        self._inside.do(lambda: self.feed(ids, credit))

    def feed(self, ids: list[int], credit: int) -> None:
        """The same, in the compute thread."""
        self._session.feed(ids, credit, False)

    def damage(self) -> None:
        """Change a bit of every page that is parked."""
        file = self._session.cache._pages._file.fileno()
        for offset in range(0, os.fstat(file).st_size, 1024):
            os.pwrite(file, bytes([os.pread(file, 1, offset)[0] ^ 1]), offset)

    def grant(self, credit: int) -> None:
        """Ask for more of the same turn."""
        self.begin([], credit)

    def hear(self, count: int) -> list[int]:
        """The next `count` tokens, or those until the turn ends. Raises CleaveError."""
        said: list[int] = []
        while len(said) < count:
            event = self._events.get(timeout=SECONDS)
            if isinstance(event, CleaveError):
                raise event
            if event.HasField("final"):
                break
            said.append(event.token.token_id)
        return said

    def close(self) -> None:
        """Leave."""
        self._inside.do(lambda: self._inside.service.close(self._name))


@contextmanager
def inside(folder: Path, scheme: str, *flags: str) -> Iterator[Inside]:
    """It serves until the end."""
    one = Inside(folder, scheme, *flags)
    one.service.engine.start()
    try:
        one.service.engine.loaded.result(SECONDS)
        yield one
    finally:
        one.service.engine.stop()
        one.service.engine.join(SECONDS)
