"""The stream socket: frames of Execute over a Unix or vsock stream, without gRPC between them.

A frame is a prefix of 8 bytes (length of the message, then of its data: u32, little-endian), the message
(ExecuteRequest or ExecuteResponse, its field `data` empty) and the data as they are, so that a receiver has the kernel
write them where they belong. Lengths are checked before anything is allocated.
"""

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

from google.protobuf.message import Message

from wire.channel import MAX_MESSAGE_BYTES
from wire.codec import FRAME_BYTES
from wire.errors import InvalidArgumentError, PreconditionError

PREFIX_BYTES = 8
MAX_ENVELOPE_BYTES = MAX_MESSAGE_BYTES - FRAME_BYTES  # of a message without its data, as over gRPC
TICKET_BYTES = 32

_PREFIX = struct.Struct("<II")
_BUFFER_BYTES = 1 << 20  # asked of the kernel
_AHEAD_BYTES = 4096


def connect(target: str, seconds: float) -> socket.socket:
    """A connection, whose operations take at most `seconds` until that is changed. Raises OSError."""
    one, place = _make(target)
    try:
        one.settimeout(seconds)
        widen(one)
        one.connect(place)
    except OSError:
        one.close()
        raise
    return one


def listen(target: str) -> socket.socket:
    """A listening socket that does not block. Raises PreconditionError.

    A socket that an earlier worker left behind is replaced, as gRPC does.
    """
    try:
        one, place = _make(target)
        if isinstance(place, str) and os.path.lexists(place) and stat.S_ISSOCK(os.lstat(place).st_mode):
            Path(place).unlink()
        one.bind(place)
        one.listen()
    except OSError as error:
        raise PreconditionError(f"cannot listen on {target}: {error.strerror or error}") from error
    one.setblocking(False)
    return one


def remove(target: str) -> None:
    """The listener is gone; so is its name."""
    if target.startswith("unix:"):
        with contextlib.suppress(OSError):
            Path(target.removeprefix("unix:")).unlink()


def pack(message: Message, size: int = 0) -> bytes:
    """Prefix and message of a frame with so many bytes of data."""
    body = message.SerializeToString()
    return _PREFIX.pack(len(body), size) + body


def lengths(prefix: memoryview) -> tuple[int, int]:
    """Bytes of the message and of its data. Raises InvalidArgumentError where a frame is longer than it may be."""
    message, data = _PREFIX.unpack(prefix)
    if message > MAX_ENVELOPE_BYTES or data > FRAME_BYTES:
        raise InvalidArgumentError(f"a frame holds at most {FRAME_BYTES} bytes of data")
    return message, data


class Inbox:
    """What comes on a socket. Small parts are read ahead, which saves turns; large ones go where they belong."""

    def __init__(self, one: socket.socket) -> None:
        self._socket = one
        self._memory = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead = self._memory[:0]

    @property
    def empty(self) -> bool:
        """Whether nothing was read ahead."""
        return not self._ahead

    def receive(self, place: memoryview) -> int:
        """Bytes that `place` now begins with, 0 at the end of the stream. Raises OSError, as recv_into does."""
        if not self._ahead:
            if len(place) >= _AHEAD_BYTES:
                return self._socket.recv_into(place, 0, socket.MSG_WAITALL)
            self._ahead = self._memory[: self._socket.recv_into(self._memory)]
        part, self._ahead = self._ahead[: len(place)], self._ahead[len(place) :]
        place[: len(part)] = part
        return len(part)


def unsent(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left to send of these parts."""
    while parts and sent >= len(parts[0]):
        sent -= len(parts[0])
        parts = parts[1:]
    return [parts[0][sent:], *parts[1:]] if sent else parts


def widen(one: socket.socket) -> None:
    """Have the kernel hold more on the way: an answer of many rows should not take many turns."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)


def _make(target: str) -> tuple[socket.socket, str | tuple[int, int]]:
    kind, _, rest = target.partition(":")
    if kind == "unix":
        return socket.socket(socket.AF_UNIX), rest
    cid, port = rest.split(":")
    return socket.socket(socket.AF_VSOCK), (int(cid), int(port))
