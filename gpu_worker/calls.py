"""Frames of one stream -> checked calls. Bounds come first: nothing is allocated for a call that is not allowed.

(1) ids strictly increase, frames of one call follow each other;
(2) the operation is known and this worker serves it;
(3) a model is loaded, and layer, linear, parameter, steps and rows exist in it;
(4) dtype and shape of the tensor are what the operation takes, and its answer fits a tensor;
(5) only then the codec allocates and copies.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from gpu_worker.expected import expected_tensor
from wire.codec import Array, Assembler
from wire.errors import DeniedError, InvalidArgumentError, PreconditionError
from wire.v1 import gpu_worker_pb2 as pb

if TYPE_CHECKING:
    from gpu_worker.model import Model


RING = ("ring_matmul", "ring_lookup")


@dataclass(frozen=True)
class Call:
    """One operation with its tensor, and the model that it was checked against."""

    id: int
    operation: pb.Operation
    model: "Model"
    tensor: Array | None

    def int32(self) -> npt.NDArray[np.int32]:
        """The tensor of an operation that takes int32."""
        return cast(npt.NDArray[np.int32], self.tensor)

    def float32(self) -> npt.NDArray[np.float32]:
        """The tensor of an operation that takes float32."""
        return cast(npt.NDArray[np.float32], self.tensor)


class _Open(NamedTuple):
    """A call of which bytes are missing."""

    operation: pb.Operation
    model: "Model"
    assembler: Assembler | None


class CallReader:
    """Puts the calls of one stream together."""

    def __init__(self, ring_only: bool) -> None:
        self._ring_only = ring_only
        self._last_id = -1
        self._open: _Open | None = None

    def add(self, frame: pb.ExecuteRequest, model: "Model | None") -> Call | None:
        """The call that this frame completes, if it does. Raises a CleaveError, after which the stream is over."""
        self.place(frame, len(frame.data), model)[:] = frame.data
        return self.complete()

    def place(self, frame: pb.ExecuteRequest, size: int, model: "Model | None") -> memoryview:
        """Where the `size` bytes of data of this frame belong. Raises a CleaveError, after which the stream is over."""
        if self._open is None:
            self._begin(frame, size, model)
        elif frame.id != self._last_id or frame.HasField("operation") or frame.HasField("header"):
            raise InvalidArgumentError("the frames of a call must follow each other")
        assembler = cast(_Open, self._open).assembler
        return memoryview(bytearray()) if assembler is None else assembler.place(size)

    def complete(self) -> Call | None:
        """The call, once the last place is filled."""
        opened = cast(_Open, self._open)
        if opened.assembler is not None and not opened.assembler.done:
            return None
        self._open = None
        tensor = None if opened.assembler is None else opened.assembler.array()
        return Call(self._last_id, opened.operation, opened.model, tensor)

    def finish(self) -> None:
        """The peer sends no more. Raises InvalidArgumentError when a call is incomplete."""
        if self._open is not None:
            raise InvalidArgumentError("the stream ended within a call")

    def _begin(self, frame: pb.ExecuteRequest, size: int, model: "Model | None") -> None:
        if frame.id <= self._last_id:
            raise InvalidArgumentError("call ids must increase")
        self._last_id = frame.id
        self._check_served(frame.operation)
        if model is None:
            raise PreconditionError("no model is loaded: call Load first")
        expected = expected_tensor(frame.operation, model.config)
        if expected is None:
            if frame.HasField("header") or size:
                raise InvalidArgumentError("this operation takes no tensor")
            self._open = _Open(frame.operation, model, None)
            return
        expected.check(frame.header)
        self._open = _Open(frame.operation, model, Assembler(frame.header))

    def _check_served(self, operation: pb.Operation) -> None:
        kind = operation.WhichOneof("kind")
        if kind is None:
            raise InvalidArgumentError("unknown operation")
        if self._ring_only and kind not in RING:
            raise DeniedError("this worker serves ring products only")
