"""Frames of the channel between client and trusted worker: below the seal, sealed at play time, and spoilt on the way.

A *part* of an entry is one letter and bytes. P, a message, and Q, a padded plaintext: both are sealed properly when the
entry is played; R, a frame as it is; X, a status; E, an edit, which somebody on the way makes to the sealed frames.
"""

import struct
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, TypeVar
from unittest import mock

from google.protobuf.message import DecodeError, Message

from tests.fuzz.mutate import Mutator
from wire.errors import InvalidArgumentError
from wire.sealing import LENGTH_BYTES
from wire.v1 import trusted_worker_pb2 as pb

PLAIN, PADDED, RAW, STATUS, EDIT = b"P", b"Q", b"R", b"X", b"E"
SEALED = (PLAIN, PADDED)
HEADER = struct.Struct("<BBBH")  # of an edit: what, where, where else, a number. Bytes follow
FIELDS = ("body", "enc", "session", "nonce")
FLIP, CUT, STRETCH, REPLACE, REPEAT, SWAP, DROP, FOREIGN, FLIP_RAW, CUT_RAW = range(10)

M = TypeVar("M", bound=Message)


class Plain:
    """The channel without its seal: the body of a frame is the message, and the frame names the session."""

    def wrap(self, message: Message, session: bytes = b"") -> pb.Sealed:
        """The frame."""
        return pb.Sealed(body=message.SerializeToString(), session=session)

    def open(self, sealed: pb.Sealed, kind: type[M]) -> M:
        """The message. Raises InvalidArgumentError, as WorkerCall.open does."""
        try:
            return kind.FromString(sealed.body)
        except DecodeError:
            raise InvalidArgumentError("malformed message") from None


class _Bytes:
    """What ClientCall.wrap and WorkerCall.wrap take for a message."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


def seal(call: Any, part: bytes) -> bytes:
    """The next frame of a ClientCall or WorkerCall, with what a part says. Raises InvalidArgumentError: too large."""
    message: Any = _Bytes(part[1:])
    if part[:1] == PLAIN:
        return bytes(call.wrap(message).SerializeToString())
    with mock.patch("wire.sealing._pad", lambda message, _: message.SerializeToString()):
        return bytes(call.wrap(message).SerializeToString())


def message_of(part: bytes) -> bytes:
    """What the receiver finds in a sealed part: the message's bytes, whether they parse or not."""
    if part[:1] == PLAIN:
        return part[1:]
    length = int.from_bytes(part[1 : 1 + LENGTH_BYTES], "big")
    return part[1 + LENGTH_BYTES :][:length]


def padded(mutator: Mutator, message: Message) -> bytes:
    """A part whose padding is spoilt."""
    raw = message.SerializeToString()
    lengths = (len(raw), len(raw) + 1, len(raw) + 64, 0, (1 << 32) - 1, mutator.random.getrandbits(16))
    whole = mutator.random.choice(lengths).to_bytes(LENGTH_BYTES, "big") + raw + bytes(mutator.random.randrange(64))
    return PADDED + (mutator.raw(whole) if mutator.random.random() < 0.5 else whole)


def draw_edit(random: Random, frames: int, fields: Sequence[str]) -> bytes:
    """An edit of one of so many frames; of the fields that their reader looks at, as a rule."""
    what = random.choice((FLIP, FLIP, CUT, STRETCH, REPLACE, REPLACE, REPEAT, SWAP, DROP, FOREIGN, FLIP_RAW, CUT_RAW))
    name = FIELDS.index(random.choice((*fields, *fields, *FIELDS)))
    data = random.randbytes(random.choice((0, 1, 16, 31, 32, 33, 500)))
    if what == FLIP_RAW:
        data = bytes([1 << random.randrange(8)])
    at = random.choice((0, 1, 15, 16, 17, 31, 40, random.getrandbits(16)))
    where = random.randrange(frames), random.randrange(frames + 1)
    return EDIT + HEADER.pack(what, *where, at) + bytes([name]) + data


def edit(frames: Iterable[bytes], edits: Iterable[bytes], foreign: bytes) -> list[bytes]:
    """The frames as they arrive. `foreign`: a frame of another call."""
    arrived = list(frames)
    for one in edits:
        if len(one) < 1 + HEADER.size or not arrived:
            continue
        what, place, other, at = HEADER.unpack_from(one, 1)
        name, data = FIELDS[one[1 + HEADER.size] % len(FIELDS)], one[2 + HEADER.size :]
        place, other = place % len(arrived), other % (len(arrived) + 1)
        if what == REPEAT:
            arrived.insert(other, arrived[place])
        elif what == SWAP and other < len(arrived):
            arrived[place], arrived[other] = arrived[other], arrived[place]
        elif what == DROP:
            del arrived[place]
        elif what == FOREIGN:
            arrived[place] = foreign
        else:
            arrived[place] = _spoil(arrived[place], what, name, at, data)
    return arrived


def _spoil(frame: bytes, what: int, name: str, at: int, data: bytes) -> bytes:
    """One frame, changed."""
    if what == FLIP_RAW:
        return _flip(frame, at, data)
    if what == CUT_RAW:
        return frame[: at % (len(frame) + 1)]
    sealed = _parse(frame)
    if sealed is None:
        return frame
    field = getattr(sealed, name)
    made = {FLIP: _flip(field, at, data), CUT: field[: at % (len(field) + 1)], STRETCH: field + data, REPLACE: data}
    setattr(sealed, name, made.get(what, field))
    return sealed.SerializeToString()


def changed(sent: Sequence[bytes], arrived: Sequence[bytes], fields: Sequence[str]) -> int | None:
    """Which frame is the first that is not what was sent in its place. None: all of them are, as far as they go."""
    for place, frame in enumerate(arrived):
        if place >= len(sent) or not _same(sent[place], frame, fields):
            return place
    return None


def parses(kind: type[Message], data: bytes) -> bool:
    """Whether it is a message of that kind."""
    try:
        kind.FromString(data)
    except DecodeError:
        return False
    return True


def _same(one: bytes, other: bytes, fields: Sequence[str]) -> bool:
    left, right = _parse(one), _parse(other)
    if left is None or right is None:
        return one == other
    return all(getattr(left, name) == getattr(right, name) for name in fields)


def _parse(frame: bytes) -> pb.Sealed | None:
    return pb.Sealed.FromString(frame) if parses(pb.Sealed, frame) else None


def _flip(data: bytes, at: int, by: bytes) -> bytes:
    mask = (by[0] if by else 0) or 1
    spoilt = bytearray(data)
    if spoilt:
        spoilt[at % len(spoilt)] ^= mask
    return bytes(spoilt)
