"""Frames of the stream socket in pieces that can be spoilt one by one, for both directions."""

import struct
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf.message import Message

from tests.fuzz.mutate import Mutator
from wire.codec import FRAME_BYTES
from wire.stream_socket import MAX_ENVELOPE_BYTES

PREFIX = struct.Struct("<II")
TOP = (1 << 32) - 1
MOST_PARTS = 600  # a longer text is not cut byte by byte


@dataclass
class Frame:
    """What a prefix says, and what follows it."""

    message: Message
    length: int
    size: int
    body: bytes
    data: bytes

    def to_bytes(self) -> bytes:
        """As it travels."""
        return PREFIX.pack(self.length & TOP, self.size & TOP) + self.body + self.data


def frame_of(message: Any) -> Frame:
    """An honest frame of a message that holds its data."""
    bare, data = type(message)(), bytes(message.data)
    bare.CopyFrom(message)
    bare.ClearField("data")
    body = bare.SerializeToString()
    return Frame(bare, len(body), len(data), body, data)


def spoil(random: Random, mutator: Mutator, frame: Frame) -> None:
    """Change a frame: its message, what it says about itself, or its data."""
    match random.randrange(8):
        case 0 | 1 | 2:
            frame.body = mutator.message(frame.message)
            frame.length = len(frame.body)
        case 3:
            frame.length = _near(random, frame.length, MAX_ENVELOPE_BYTES)
        case 4:
            frame.size = _near(random, frame.size, FRAME_BYTES)
        case 5:
            frame.length, frame.size = frame.size, frame.length
        case 6:
            frame.data = mutator.raw(frame.data)
            frame.size = len(frame.data)
        case _:
            whole = mutator.raw(frame.to_bytes())
            frame.length, frame.size = PREFIX.unpack(whole[:8].ljust(8, b"\x00"))
            frame.body, frame.data = whole[8:], b""


def disorder(random: Random, frames: list[Frame]) -> None:
    """One frame is elsewhere, twice or nowhere."""
    place = random.randrange(len(frames))
    match random.randrange(4):
        case 0:
            frames.insert(random.randrange(len(frames) + 1), frames[place])
        case 1:
            frames.pop(place)
        case 2:
            frames.insert(random.randrange(len(frames)), frames.pop(place))
        case _:
            random.shuffle(frames)


def cut(random: Random, data: bytes) -> list[bytes]:
    """The same bytes in parts: a few, or one for each byte."""
    if len(data) < MOST_PARTS and random.random() < 0.02:
        return [data[at : at + 1] for at in range(len(data))]
    places = sorted(random.randrange(len(data) + 1) for _ in range(random.choice((0, 0, 1, 2, 5))))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def _near(random: Random, number: int, limit: int) -> int:
    around = (0, 1, max(number - 1, 0), number + 1, number + 8, 2 * number)
    return random.choice((*around, limit - 1, limit, limit + 1, TOP, random.getrandbits(32)))
