"""Seeded, structure-aware mutation of protobuf messages: fields first, bytes second.

Everything is drawn from one `random.Random`, so a seed gives the same inputs again.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

UINT32 = (0, 1, 2, 3, 4, 30, 31, 63, 64, 65, 192, 193, 255, 256, 257, 4096, 4097, 1 << 20, (1 << 31) - 1, 1 << 31)
UINT32_TOP = ((1 << 32) - 2, (1 << 32) - 1)
UINT64_TOP = (1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
ENUM = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 77, -1, (1 << 31) - 1, -(1 << 31))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 100.0, 100.1, 1e-45, 1e-38, 3.4e38, float("inf"), float("-inf"), float("nan"))
STRINGS = ("", "llama", "none", "\0", "x" * 300, "../../etc/passwd", "é\u2028", "llama\n", "tee-only")
WORDS = tuple(
    struct.pack("<i", number) for number in (0, 1, -1, 2, 30, 31, 32, (1 << 31) - 1, -(1 << 31), 0x7FC00000, 0x7F800000)
)
VARINTS = (b"\x80" * 9 + b"\x01", b"\x80" * 11 + b"\x01", b"\xff" * 10, b"\xff\xff\xff\xff\x0f", b"\x80\x80\x00")
TAGS = tuple(bytes([number << 3 | kind]) for number in (1, 2, 3, 4, 5, 15) for kind in range(8))


class Mutator:
    """Mutates what it is given. `pool`: byte strings to splice with; those that it mutates join it."""

    def __init__(self, random: Random, pool: Sequence[bytes] = ()) -> None:
        self.random = random
        self.pool = list(pool)[-50:]

    def message(self, message: Message) -> bytes:
        """The bytes of a mutated copy: usually some fields, sometimes the bytes, sometimes both."""
        random, changed = self.random, type(message)()
        changed.CopyFrom(message)
        way = random.random()
        if not message.DESCRIPTOR.fields:
            return self.raw(b"")
        if way < 0.8:
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                self.spoil(changed)
        data = changed.SerializeToString()
        return self.raw(data) if way > 0.7 else data

    def spoil(self, message: Message) -> None:
        """Change one field somewhere in the message, set or not, in place."""
        parent, field = self.random.choice(list(_places(message)))
        if field.label == Field.LABEL_REPEATED:
            self._list(getattr(parent, field.name), field)
        elif self.random.random() < 0.1:
            parent.ClearField(field.name)
        elif field.type == Field.TYPE_MESSAGE:
            getattr(parent, field.name).SetInParent()
        else:
            setattr(parent, field.name, self._value(field, getattr(parent, field.name)))

    def raw(self, data: bytes) -> bytes:
        """Byte-level damage, once or a few times."""
        for _ in range(self.random.choice((1, 1, 2, 4))):
            data = self.random.choice(_DAMAGES)(self, data)
        self.pool = [*self.pool[-49:], data[:4096]]
        return data

    def words(self, data: bytes) -> bytes:
        """Tensor data with strange numbers in it; the length stays as it is."""
        changed = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            at = 4 * self.random.randrange(max(len(data) // 4, 1))
            changed[at : at + 4] = self.random.choice(WORDS)[: len(changed) - at]
        return bytes(changed)

    def _value(self, field: Field, current: Any) -> Any:  # noqa: PLR0911
        random = self.random
        match field.type:
            case Field.TYPE_BOOL:
                return not current
            case Field.TYPE_ENUM:
                return random.choice(ENUM)
            case Field.TYPE_FLOAT | Field.TYPE_DOUBLE:
                return random.choice((*FLOATS, random.uniform(-2, 200)))
            case Field.TYPE_STRING:
                return random.choice((*STRINGS, current + "x", current[:-1]))
            case Field.TYPE_BYTES:
                return random.choice((self.words, self._cut, self._stretch, self._noise))(current)
            case Field.TYPE_UINT64:
                return random.choice(
                    (*UINT32, *UINT32_TOP, *UINT64_TOP, max(current - 1, 0), min(current + 1, 1 << 63))
                )
            case _:
                near = (max(current - 1, 0), min(current + 1, UINT32_TOP[1]), random.getrandbits(32))
                return random.choice((*UINT32, *UINT32_TOP, *near))

    def _list(self, values: Any, field: Field) -> None:
        """One change to a repeated field."""
        random, whole = self.random, field.type == Field.TYPE_MESSAGE
        way = random.randrange(7)
        if way == 0 or not len(values):
            empty: Any = {Field.TYPE_STRING: "", Field.TYPE_BYTES: b""}.get(field.type, 0)
            count = random.choice((1, 1, 1, 2, 4, 10, 257)) if random.random() < 0.99 else 5000
            for _ in range(count):
                values.add() if whole else values.append(self._value(field, empty))
        elif way == 1:
            del values[random.randrange(len(values))]
        elif way == 2:
            values.extend([values[random.randrange(len(values))]])
        elif way == 3:
            kept = [*values]
            random.shuffle(kept)
            kept = [_copy(one) for one in kept] if whole else kept
            del values[:]
            values.extend(kept)
        elif way == 4:
            del values[:]
        elif whole:
            self.spoil(values[random.randrange(len(values))])
        else:
            place = random.randrange(len(values))
            values[place] = self._value(field, values[place])

    def _cut(self, data: bytes) -> bytes:
        return data[: self.random.randrange(len(data) + 1)]

    def _stretch(self, data: bytes) -> bytes:
        return data + self.random.randbytes(self.random.choice((1, 2, 4, 8, 64, 1000)))

    def _noise(self, data: bytes) -> bytes:
        return self.random.randbytes(len(data) if len(data) < 4096 else 64)

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.random.randint(1, 3) if data else 0):
            changed[self.random.randrange(min(len(data), 64))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def _insert(self, data: bytes) -> bytes:
        at = self.random.randrange(len(data) + 1)
        tag, varint = self.random.choice(TAGS), self.random.choice(VARINTS)
        extra = self.random.choice((varint, tag, tag + varint, tag + b"\x00", self.random.randbytes(3), b"\x0b" * 200))
        return data[:at] + extra + data[at:]

    def _splice(self, data: bytes) -> bytes:
        other = self.random.choice(self.pool) if self.pool else data
        return self._cut(data) + other[self.random.randrange(len(other) + 1) :]

    def _merge(self, data: bytes) -> bytes:
        return data + (self.random.choice(self.pool) if self.pool else data)


_DAMAGES: tuple[Callable[[Mutator, bytes], bytes], ...] = (
    Mutator._cut,
    Mutator._flip,
    Mutator._flip,
    Mutator._insert,
    Mutator._insert,
    Mutator._splice,
    Mutator._merge,
    Mutator._stretch,
    Mutator._noise,
)


def _places(message: Message) -> Iterator[tuple[Message, Field]]:
    """Every field of the message and of the messages that are set in it."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.type == Field.TYPE_MESSAGE:
            if field.label == Field.LABEL_REPEATED:
                for one in getattr(message, field.name)[:4]:
                    yield from _places(one)
            elif message.HasField(field.name):
                yield from _places(getattr(message, field.name))


def _copy(message: Message) -> Message:
    kept = type(message)()
    kept.CopyFrom(message)
    return kept
