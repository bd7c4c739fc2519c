"""The trusted worker's side of the GPU worker: offload.GpuWorker.call over a stream of hostile answers, no socket.

Entry: X, the number of the call that is made, and the frames that come back as the bytes that gRPC would parse.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.mutate import Mutator
from trusted_worker.grpc_plane import GrpcPlane
from trusted_worker.offload import GpuWorker
from wire.codec import Array, header_of
from wire.errors import (
    CleaveError,
    ContextError,
    DeadlineError,
    ExhaustedError,
    UnavailableError,
    VerificationError,
)
from wire.v1 import gpu_worker_pb2 as pb

ALLOWED = (VerificationError, UnavailableError, ExhaustedError, ContextError, DeadlineError)
X = np.arange(32, dtype=np.int32).reshape(2, 16)
F = X.astype(np.float32)
STEPS = [pb.Step(finish_block=pb.FinishBlock()), pb.Step(head=pb.Head(logit_rows=[0]))]
TEMPLATES: tuple[tuple[pb.Operation, Array | None, tuple[int, ...] | None, type], ...] = (
    (pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_QKV)), X, (2, 32), np.int32),
    (pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD)), X, (2, 5000), np.int32),
    (pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_O)), F, (2, 16), np.float32),
    (pb.Operation(forward=pb.Forward(logit_rows=[0])), X[0], (1, 31), np.float32),
    (pb.Operation(forward=pb.Forward()), X[0], (0, 31), np.float32),
    (pb.Operation(chain=pb.Chain(steps=STEPS)), F, (1, 31), np.float32),
    (pb.Operation(cache=pb.Cache(sequence=1, read=pb.ReadPage())), None, (512,), np.int32),
    (pb.Operation(cache=pb.Cache(sequence=1, reserve=pb.Reserve(tokens=4))), None, None, np.int32),
    (pb.Operation(provision=pb.Provision(kind=pb.PARAMETER_KIND_EMBEDDING)), F, None, np.float32),
    (pb.Operation(ring_lookup=pb.RingLookup()), X, (2, 16), np.int32),
)


class _Ended(grpc.RpcError):
    """What gRPC raises: the stream broke, or a message was none."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return "a text that the untrusted worker chose"


class _Answers:
    """A response iterator of gRPC, over bytes."""

    def __init__(self, frames: list[bytes]) -> None:
        self._frames = iter(frames)

    def __iter__(self) -> Iterator[pb.ExecuteResponse]:
        return self

    def __next__(self) -> pb.ExecuteResponse:
        try:
            data = next(self._frames)
            if data == b"!":
                raise _Ended
            return pb.ExecuteResponse.FromString(data)
        except DecodeError:
            raise _Ended from None

    def cancel(self) -> None:
        """The call is given up."""

    def is_active(self) -> bool:
        """The stream is open when a call begins."""
        return True


class OffloadTarget:
    """A GpuWorker with a stream that the fuzzer answers."""

    name = "offload"

    def __init__(self, folders: dict[str, Path]) -> None:
        self.begin()

    def begin(self) -> None:
        """See Target."""
        self._worker: Any = GpuWorker("unix:/nowhere", "llama", pb.PRECISION_INT8)
        self._id = 0
        self._recent: list[bytes] = []

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        number = random.randrange(len(TEMPLATES))
        _, _, shape, dtype = TEMPLATES[number]
        mutator = Mutator(random, self._recent)
        whole = answer(self._id + 1, shape, dtype, random.choice((0, 0, 1, 3)))
        frames = [frame.SerializeToString() for frame in whole]
        places = sorted({random.randrange(len(frames)) for _ in range(random.choice((1, 1, 2)))})
        for place in places:
            frames[place] = mutator.message(whole[place])
        way = random.random()
        if way < 0.05:
            frames.insert(random.randrange(len(frames) + 1), b"!")
        elif way < 0.1:
            frames.insert(random.randrange(len(frames) + 1), random.choice(frames))
        elif way < 0.15:
            random.shuffle(frames)
        elif way < 0.2:
            frames.pop()
        self._recent = [*self._recent[-10:], frames[0] if frames else b""]
        return b"X" + bytes([number]) + pack(frames), len(places)

    def play(self, entry: bytes) -> str:
        """See Target."""
        operation, array, shape, dtype = TEMPLATES[entry[1] % len(TEMPLATES)]
        frames = unpack(entry[2:])
        into: Any = None if shape is None else np.zeros(shape, dtype)
        answers = _Answers(frames)
        self._worker._plane = GrpcPlane(SimpleNamespace(Execute=lambda requests: answers))  # type: ignore[arg-type]
        self._worker._id = self._id
        self._id += 1
        try:
            self._worker.call(operation, array, into)
        except CleaveError as error:
            if not isinstance(error, ALLOWED) or "chose" in str(error):
                raise Bug(f"offload: {type(error).__name__} {error}") from error
            raise
        if into is not None:
            header = pb.ExecuteResponse.FromString(frames[0]).header
            if (header.dtype, tuple(header.shape)) != (header_of(into).dtype, into.shape):
                raise Bug("offload: an answer of another form was accepted")
            if into.tobytes() != _data(frames)[: into.nbytes]:
                raise Bug("offload: an answer of other bytes was accepted")
        return "answered"

    def end(self) -> None:
        """See Target."""

    def check(self) -> None:
        """See Target."""
        for number, (_, _, shape, dtype) in enumerate(TEMPLATES):
            frames = answer(self._id + 1, shape, dtype, 2)
            self.play(b"X" + bytes([number]) + pack(frame.SerializeToString() for frame in frames))

    def close(self) -> None:
        """See Target."""


def answer(number: int, shape: tuple[int, ...] | None, dtype: type, cuts: int) -> list[pb.ExecuteResponse]:
    """An honest answer in 1 + `cuts` frames."""
    if shape is None:
        return [pb.ExecuteResponse(id=number)]
    array: Any = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    data = array.tobytes()
    size = max(-(-len(data) // (1 + cuts)), 1)
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    head = pb.ExecuteResponse(id=number, header=header_of(array), data=parts[0])
    return [head, *[pb.ExecuteResponse(id=number, data=part) for part in parts[1:]]]


def _data(frames: list[bytes]) -> bytes:
    """The data of those frames that are messages."""
    found = b""
    for frame in frames:
        try:
            found += pb.ExecuteResponse.FromString(frame).data
        except DecodeError:
            break
    return found
