"""What the GPU worker saw: a recording (`cleave-gpu-worker --record DIR`) as objects. Nothing else of it is known."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from wire.errors import PreconditionError
from wire.v1 import gpu_worker_pb2 as pb

Array = npt.NDArray[Any]
DTYPES = ("int8", "int32", "float16", "float32")


@dataclass(frozen=True)
class Exchange:
    """One call: what was asked, the tensor that went up to the GPU worker, the tensor that came back."""

    operation: pb.Operation
    up: Array
    down: Array
    us: int = 0  # when, since the worker started
    stream: int = 0
    refused: bool = False  # the worker has what went up all the same


@dataclass(frozen=True)
class Held:
    """A tensor of a pass: residual, qk (q beside k, before norm and RoPE), v, attention; [rows, ...]."""

    name: str
    layer: int
    tensor: Array


@dataclass(frozen=True)
class Cache:
    """Keys and values of a sequence, [layers, kv_heads, tokens, head_dim]; `event` is drop (just before) or wipe."""

    event: str
    keys: Array
    values: Array


Event = Exchange | Held | Cache
T = TypeVar("T", Exchange, Held, Cache)


@dataclass(frozen=True)
class Transcript:
    """Everything, in its order."""

    events: tuple[Event, ...]

    @classmethod
    def read(cls, folder: Path) -> "Transcript":
        """Raises PreconditionError for a folder that holds no recording, or a damaged one."""
        segments = sorted(folder.glob("[0-9]*.jsonl"))
        if not segments:
            raise PreconditionError(f"{folder} holds no recording: a GPU worker writes one with --record")
        try:
            return cls(tuple(event for index in segments for event in _segment(index)))
        except (OSError, ValueError, TypeError, KeyError, DecodeError) as error:
            raise PreconditionError(f"the recording in {folder} is damaged: record again") from error

    @property
    def exchanges(self) -> list[Exchange]:
        """The calls that were answered with a tensor or with nothing."""
        return [exchange for exchange in self.of(Exchange) if not exchange.refused]

    def of(self, kind: type[T]) -> list[T]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


def _segment(index: Path) -> Iterator[Event]:
    data = index.with_suffix(".bin")
    content = np.memmap(data, np.uint8, "r") if data.stat().st_size else np.zeros(0, np.uint8)
    for line in index.read_text("ascii").splitlines():
        fields = json.loads(line)
        event = _event(fields, content)
        if event is not None:
            yield event


def _event(fields: dict[str, Any], content: Array) -> Event | None:
    """None for what is no event: starts, loads."""
    match fields["kind"]:
        case "call":
            operation = pb.Operation.FromString(base64.b64decode(fields["operation"]))
            up, down = (_tensor(fields[way], content) if way in fields else _NOTHING for way in ("up", "down"))
            return Exchange(operation, up, down, fields["us"], fields["stream"], "refused" in fields)
        case "held":
            return Held(fields["name"], fields["layer"], _tensor(fields["tensor"], content))
        case "cache":
            return Cache(fields["event"], _tensor(fields["keys"], content), _tensor(fields["values"], content))
        case _:
            return None


_NOTHING: Array = np.zeros((0, 0), np.int32)


def _tensor(place: dict[str, Any], content: Array) -> Array:
    """Raises ValueError or TypeError for a dtype that no worker sends and for bytes that are not there."""
    if place["dtype"] not in DTYPES:
        raise ValueError(place["dtype"])
    dtype, shape = np.dtype(place["dtype"]), tuple(place["shape"])
    return np.ndarray(shape, dtype, content, place["at"])  # mapped, not read
