"""Calls on a stream socket, used by the compute thread itself: no other thread stands between it and the kernel.

What is seen: what the GPU worker would see over gRPC. What is learnt: the same. What breaks it: nothing that does not
break gRPC between the workers; whoever answers here is as untrusted as there.

The address comes from our operator, never from the worker, which could name any socket of this machine. Of the worker
comes a ticket; it goes nowhere but there.
"""

import contextlib
import select
import socket
import time

import grpc
from google.protobuf.message import DecodeError

from wire import stream_socket
from wire.errors import InvalidArgumentError, UnavailableError, VerificationError
from wire.v1 import gpu_worker_pb2 as pb

_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class StreamPlane:
    """A stream. Raises UnavailableError when there is none to be had within `seconds`."""

    def __init__(self, address: str, ticket: bytes, seconds: float) -> None:
        if len(ticket) != stream_socket.TICKET_BYTES:
            raise VerificationError
        self._prefix = memoryview(bytearray(stream_socket.PREFIX_BYTES))
        try:
            self._socket = stream_socket.connect(address, seconds)
        except OSError as error:
            raise UnavailableError(f"the GPU worker's stream socket {address}: {error.strerror or error}") from None
        self._inbox = stream_socket.Inbox(self._socket)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._until: float | None = time.monotonic() + seconds
        try:
            self._socket.sendall(ticket)
            if self.receive()[1]:
                raise VerificationError
        except (OSError, UnavailableError, VerificationError):
            self.close()
            raise UnavailableError("the GPU worker refused the stream") from None
        self._until = None
        self._socket.settimeout(None)

    @property
    def ended(self) -> bool:
        """See Plane."""
        if not self._inbox.empty or not self._poll.poll(0):
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def send(self, frame: pb.ExecuteRequest, data: memoryview) -> int:
        """See Plane."""
        head = stream_socket.pack(frame, len(data))
        parts = [memoryview(head), data]
        try:
            while parts:
                parts = stream_socket.unsent(parts, self._socket.sendmsg(parts))
        except OSError:
            raise UnavailableError("the GPU worker closed the stream") from None
        return len(head) + len(data)

    def receive(self) -> tuple[pb.ExecuteResponse, int, int]:
        """See Plane."""
        self.take(self._prefix)
        try:
            length, size = stream_socket.lengths(self._prefix)
            message = bytearray(length)
            self.take(memoryview(message))
            frame = pb.ExecuteResponse.FromString(bytes(message))
        except (InvalidArgumentError, DecodeError):
            raise VerificationError from None
        if frame.ended:
            raise UnavailableError(f"the GPU worker is not available ({_NAMES.get(frame.ended, 'UNKNOWN')})")
        if frame.data:
            raise VerificationError
        return frame, size, len(self._prefix) + length + size

    def take(self, place: memoryview) -> None:
        """See Plane."""
        while place:
            try:
                if self._until is not None:  # of the welcome, however slowly it comes
                    self._socket.settimeout(max(self._until - time.monotonic(), 0))
                count = self._inbox.receive(place)
            except OSError:
                count = 0
            if not count:
                raise UnavailableError("the GPU worker closed the stream")
            place = place[count:]

    def cancel(self) -> None:
        """See Plane. Wakes whoever reads or writes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See Plane."""
        self._socket.close()
