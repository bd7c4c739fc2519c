"""One stream of calls on a socket: the compute thread reads them, carries them out and answers, without blocking.

What it holds for a peer is bounded as over gRPC: one call, of which nothing is allocated before its checks (calls.py),
and one answer. Between calls it may be idle; within one there is a deadline.
"""

import contextlib
import logging
import socket
import time
import traceback
from collections.abc import Callable, Generator
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from gpu_worker.calls import Call, CallReader
from gpu_worker.compute import Outcome, carry_out
from gpu_worker.traffic import Traffic
from wire.codec import header_of, pieces
from wire.errors import CleaveError, DeadlineError, InvalidArgumentError
from wire.messages import MALFORMED
from wire.stream_socket import PREFIX_BYTES, Inbox, lengths, pack, unsent
from wire.v1 import gpu_worker_pb2 as pb

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

Steps = Generator[int, None, None]  # yields the event to wait for


class Conversation:
    """A Talker. Closes the socket; `on_end` is called, in the compute thread, when nothing of the stream is left."""

    def __init__(
        self,
        peer: socket.socket,
        worker: "Worker",
        ring_only: bool,
        traffic: Traffic,
        request_seconds: float,
        on_end: Callable[[], None],
    ) -> None:
        self.deadline: float | None = None
        self._peer, self._worker, self._traffic, self._counts = peer, worker, traffic, traffic.sockets
        self._request_seconds, self._on_end = request_seconds, on_end
        self._inbox = Inbox(peer)
        self._reader, self._stream = CallReader(ring_only), worker.open_stream()
        self._answering = False
        self._steps = self._talk()
        next(self._steps)

    def fileno(self) -> int:
        """See Talker."""
        return self._peer.fileno()

    def go_on(self) -> int:
        """See Talker."""
        try:
            return next(self._steps, 0)
        except _Left:
            return 0
        except Exception as error:
            self._tell(error)
            return 0

    def give_up(self) -> None:
        """See Talker. Within an answer a status would be taken for data."""
        if self._answering:
            self._counts.refused += 1
        else:
            self._tell(DeadlineError("the peer stopped within a call"))

    def close(self) -> None:
        """See Talker."""
        self._steps.close()
        self._stream.close()
        self._peer.close()
        self._on_end()

    def _talk(self) -> Steps:
        prefix = memoryview(bytearray(PREFIX_BYTES))
        while True:
            yield EVENT_READ if self._inbox.empty else EVENT_WRITE  # at once, but after others
            begun = self._receive(prefix)
            if begun == 0:
                return
            with self._counts:
                self._hurry()
                call = yield from self._read(prefix, begun or 0)
                outcome = carry_out(self._worker, call, self._stream, self._traffic.compute)
                self._hurry()
                self._answering = True
                yield from self._answer(call.id, outcome)
                self._answering, self.deadline = False, None

    def _hurry(self) -> None:
        self.deadline = time.monotonic() + self._request_seconds

    def _read(self, prefix: memoryview, begun: int) -> Generator[int, None, Call]:
        """The call of which so many bytes are there."""
        call = None
        while call is None:
            yield from self._fill(prefix[begun:])
            length, size = lengths(prefix)
            message = bytearray(length)
            yield from self._fill(memoryview(message))
            yield from self._fill(self._reader.place(_parsed(message), size, self._worker.model))
            self._counts.received += size
            call, begun = self._reader.complete(), 0
        return call

    def _fill(self, place: memoryview) -> Steps:
        while place:
            count = self._receive(place)
            if count is None:
                yield EVENT_READ
            elif count == 0:
                raise InvalidArgumentError("the stream ended within a call")
            else:
                place = place[count:]

    def _receive(self, place: memoryview) -> int | None:
        """How many bytes came; 0 at the end, None when there are none yet."""
        try:
            return self._inbox.receive(place)
        except BlockingIOError:
            return None
        except OSError:
            raise _Left from None

    def _answer(self, number: int, outcome: Outcome) -> Steps:
        """Send what became of a call, frame by frame; only the first frame carries more than data."""
        first = pb.ExecuteResponse(id=number, compute_us=outcome.microseconds)
        if outcome.refused is not None:
            self._counts.refused += 1
            first.refused = outcome.refused.code.value[0]
            log.warning("a call was refused: %s", type(outcome.refused).__name__)
        if outcome.result is None:
            yield from self._send([memoryview(pack(first))])
            return
        first.header.CopyFrom(header_of(outcome.result))
        for position, data in enumerate(pieces(outcome.result)):
            response = pb.ExecuteResponse(id=number) if position else first
            yield from self._send([memoryview(pack(response, len(data))), data])
            self._counts.sent += len(data)

    def _send(self, parts: list[memoryview]) -> Steps:
        while parts:
            try:
                sent = self._peer.sendmsg(parts)
            except BlockingIOError:
                yield EVENT_WRITE
            except OSError:
                raise _Left from None
            else:
                parts = unsent(parts, sent)

    def _tell(self, error: Exception) -> None:
        """The stream ends with the error's status, if the peer takes it. As server.py tells it over gRPC."""
        self._counts.refused += 1
        code = error.code if isinstance(error, CleaveError) else grpc.StatusCode.INTERNAL
        if not isinstance(error, CleaveError):
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("internal error: %s at %s", type(error).__name__, where)
        with contextlib.suppress(OSError):
            self._peer.send(pack(pb.ExecuteResponse(ended=code.value[0])))


class _Left(Exception):  # noqa: N818  (nobody's mistake)
    """The peer is gone: there is nobody to tell."""


def _parsed(message: bytearray) -> pb.ExecuteRequest:
    try:
        frame = pb.ExecuteRequest.FromString(bytes(message))
    except DecodeError:
        raise InvalidArgumentError(MALFORMED) from None
    if frame.data:
        raise InvalidArgumentError("data travel behind the message")
    return frame
