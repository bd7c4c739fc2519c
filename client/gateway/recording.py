"""The end of a recording that a GPU worker writes (`cleave-gpu-worker --record`), read while it goes on.

What is seen: what the GPU worker saw, no more. The files are somebody else's: every number in them is checked before it
is used, reads are bounded, and whatever is half written, damaged or gone meanwhile counts as not there.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from wire.v1 import gpu_worker_pb2 as pb

SEGMENTS = 2  # the newest ones: a segment that has just begun holds little
TAIL_BYTES = 1 << 20  # of an index
TENSOR_BYTES = 4 << 20
_SIZES = {"int8": 1, "float16": 2, "int32": 4, "float32": 4}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Place:
    """A tensor in a segment: [rows] or [rows, width], `at` bytes from its start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    at: int

    @property
    def size(self) -> int:
        """In bytes."""
        size = _SIZES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size

    def read(self, most: int) -> bytes:
        """At most its first `most` bytes; fewer where the segment does not hold them."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.at)
                return file.read(min(most, self.size))
        except OSError:
            return b""


@dataclass(frozen=True)
class Sent:
    """A call: what was asked, the tensor that went up, how many bytes came back."""

    operation: pb.Operation
    up: Place
    bytes_down: int


def last(folder: Path, count: int) -> list[Sent]:
    """The last calls that took a tensor, at most `count`, the newest last."""
    found: list[Sent] = []
    for line, data in _lines(folder):
        sent = _sent(line, data)
        if sent and len(found) < count:
            found.append(sent)
        if len(found) == count:
            break
    return found[::-1]


def last_rows(folder: Path, operation: pb.Operation, count: int) -> Array | None:
    """The last rows that were sent for one operation, [at most count, width]; None when there are none."""
    key, found, rows = _spelled(operation), list[Array](), 0
    for line, data in _lines(folder):
        sent = _sent(line, data) if key in line else None
        if sent is None or len(sent.up.shape) != 2 or not 0 < sent.up.size <= TENSOR_BYTES:
            continue
        content = sent.up.read(TENSOR_BYTES)
        alike = not found or (found[0].dtype, found[0].shape[1]) == (np.dtype(sent.up.dtype), sent.up.shape[1])
        if len(content) < sent.up.size or not alike:
            continue
        found.append(np.frombuffer(content, sent.up.dtype).reshape(sent.up.shape))
        rows += len(found[-1])
        if rows >= count:
            break
    return np.concatenate(found[::-1])[-count:] if found else None


def _lines(folder: Path) -> Iterator[tuple[bytes, Path]]:
    """Whole lines of the index, the newest first, each with the file of its tensors."""
    try:
        segments = sorted(folder.glob("[0-9]*.jsonl"))[-SEGMENTS:]
    except OSError:
        return
    for index in reversed(segments):
        data = index.with_suffix(".bin")
        for line in reversed(_tail(index)):
            yield line, data


def _tail(index: Path) -> list[bytes]:
    try:
        with index.open("rb") as file:
            start = max(file.seek(0, 2) - TAIL_BYTES, 0)
            file.seek(start)
            lines = file.read(TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    return lines[bool(start) : -1]  # the first may lack its beginning, the last its end


def _spelled(operation: pb.Operation) -> bytes:
    return b'"' + base64.b64encode(operation.SerializeToString(deterministic=True)) + b'"'


def _sent(line: bytes, data: Path) -> Sent | None:
    """None for what is no call, was refused, took no tensor, or makes no sense."""
    try:
        fields = json.loads(line)
        if fields["kind"] != "call" or "refused" in fields:
            return None
        operation = pb.Operation.FromString(base64.b64decode(fields["operation"], validate=True))
        down = fields.get("down")
        return Sent(operation, _place(fields["up"], data), _place(down, data).size if down else 0)
    except (ValueError, KeyError, TypeError, RecursionError, DecodeError):
        return None


def _place(value: dict[str, Any], data: Path) -> Place:
    numbers = [*value["shape"], value["at"]]
    if value["dtype"] not in _SIZES or not all(type(one) is int and 0 <= one < 1 << 40 for one in numbers):
        raise ValueError
    return Place(data, value["dtype"], tuple(value["shape"]), value["at"])
