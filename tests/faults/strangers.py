"""Clients that do not mean well: raw bytes and raw calls, from this process, on connections of their own."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from tests.faults.cells import SHORT
from tests.faults.fleet import CONTEXT, Fleet
from tests.sealed import Opened, RawClient, Stream
from trusted_worker.engine import MAX_SESSIONS
from wire import channel
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
HALF = b"\0\1\0\1\4\0\0\0\1" + b"x" * 9  # a frame of 256 bytes, and its first nine
LOCAL = [*channel.client_options(), ("grpc.use_local_subchannel_pool", 1)]


class Stranger:
    """Raw calls."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._channel = grpc.insecure_channel(fleet.socket, options=LOCAL)
        self.stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self._channel)

    def open(self, context: int = CONTEXT) -> Opened:
        """A session. Raises grpc.RpcError."""
        request = self._fleet.request.message()
        request.max_context = context
        return RawClient(self.stub).open(request)

    def decode(self, opened: Opened, *frames: pb.DecodeRequest) -> Stream:
        """A stream that stays open after these."""
        requests: SimpleQueue[pb.DecodeRequest | None] = SimpleQueue()
        for frame in frames:
            requests.put(frame)
        return RawClient(self.stub).stream(opened, iter(requests.get, None))

    def vanish(self) -> None:
        """Without a word."""
        self._channel.close()


@contextmanager
def stranger(fleet: Fleet) -> Iterator[Stranger]:
    """One that vanishes at the end."""
    one = Stranger(fleet)
    try:
        yield one
    finally:
        one.vanish()


@contextmanager
def _raw(fleet: Fleet, count: int, words: bytes) -> Iterator[None]:
    """Connections that send some bytes, and then nothing."""
    with ExitStack() as stack:
        for _ in range(count):
            line = stack.enter_context(socket.socket(socket.AF_UNIX))
            line.connect(fleet.socket.removeprefix("unix:"))
            with suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(words)
        yield


@contextmanager
def _silent_streams(fleet: Fleet) -> Iterator[None]:
    """They are told to begin, within --request-seconds."""
    with stranger(fleet) as one:
        streams = [one.stub.Decode(iter(SimpleQueue[pb.Sealed]().get, None)) for _ in range(100)]
        yield
        for stream in streams:
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert caught.value.details() == "a frame is due, and none came"


@contextmanager
def _many_opens(fleet: Fleet) -> Iterator[None]:
    """More than there are sessions: refused, until the unused ones are wiped."""
    with stranger(fleet) as one:
        refused = 0
        for _ in range(MAX_SESSIONS + 20):
            try:
                one.open(16)
            except grpc.RpcError as error:
                status: Any = error
                assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert status.details() == f"all {MAX_SESSIONS} sessions are taken; try again later"
                refused += 1
        assert refused
        yield


@contextmanager
def _tiny_frames(fleet: Fleet) -> Iterator[None]:
    """One stream, frames without end."""
    with stranger(fleet) as one:
        enough = threading.Event()

        def frames() -> Iterator[pb.DecodeRequest]:
            while not enough.is_set():
                yield pb.DecodeRequest(credit=1)

        stream = RawClient(one.stub).stream(one.open(), frames())
        try:
            yield
        finally:
            enough.set()
            stream.call.cancel()


@contextmanager
def _credit_and_gone(fleet: Fleet) -> Iterator[None]:
    """Twelve that ask for much and leave."""
    strangers = [Stranger(fleet) for _ in range(12)]
    for one in strangers:
        next(one.decode(one.open(), pb.DecodeRequest(token_ids=SHORT, credit=CONTEXT)))
    for one in strangers:
        one.vanish()
    yield


ATTACKS: dict[str, Callable[[Fleet], AbstractContextManager[None]]] = {
    "connects and says nothing": lambda fleet: _raw(fleet, 300, b""),
    "half a message": lambda fleet: _raw(fleet, 100, PREFACE + HALF),
    "garbage": lambda fleet: _raw(fleet, 100, bytes(range(256)) * 64),
    "half a preface, then garbage": lambda fleet: _raw(fleet, 100, PREFACE + bytes(range(255, 0, -1)) * 64),
    "streams that never begin": _silent_streams,
    "more sessions than there are": _many_opens,
    "tiny frames without end": _tiny_frames,
    "vanishes with credit outstanding": _credit_and_gone,
}
