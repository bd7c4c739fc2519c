"""Frames of one stream -> checked calls. Bounds come first: nothing is allocated for a call that is not allowed.

(1) ids strictly increase, frames of one call follow each other;
(2) the operation is known and this worker serves it;
(3) a model is loaded, and layer, linear, sequences and rows exist in it;
(4) dtype and shape of the tensor are exactly what the operation takes, and its answer fits a tensor;
(5) only then the codec allocates and copies.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from wire.codec import MAX_ROWS, MAX_TENSOR_BYTES, Array, Assembler
from wire.errors import DeniedError, InvalidArgumentError, PreconditionError
from wire.linears import Linear, LinearSpec, spec
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

if TYPE_CHECKING:
    from gpu_worker.model import Model


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


@dataclass(frozen=True)
class Expected:
    """The tensor that an operation takes: `rows` None stands for any number, `columns` None for rank 1."""

    dtype: int
    rows: int | None
    columns: int | None
    answer_columns: int  # of the answer, which has as many rows; 0 where the answer was checked already

    def check(self, header: tensor_pb2.TensorHeader) -> None:
        """Raises InvalidArgumentError for any other tensor."""
        shape = tuple(header.shape)
        if header.dtype != self.dtype or len(shape) != (1 if self.columns is None else 2):
            raise InvalidArgumentError("the operation takes a tensor of another dtype or rank")
        if not 1 <= shape[0] <= MAX_ROWS:
            raise InvalidArgumentError(f"a call has 1 to {MAX_ROWS} rows")
        if self.rows not in (None, shape[0]) or (self.columns is not None and shape[1] != self.columns):
            raise InvalidArgumentError("the operation takes a tensor of another shape")
        _check_answer(shape[0], self.answer_columns)


class CallReader:
    """Puts the calls of one stream together."""

    def __init__(self, ring_only: bool) -> None:
        self._ring_only = ring_only
        self._last_id = -1
        self._open: tuple[pb.Operation, Model, Assembler] | None = None

    def add(self, frame: pb.ExecuteRequest, model: "Model | None") -> Call | None:
        """The call that this frame completes, if it does. Raises a CleaveError, after which the stream is over."""
        if self._open is None:
            call = self._begin(frame, model)
            if call is not None:
                return call
        elif frame.id != self._last_id or frame.HasField("operation") or frame.HasField("header"):
            raise InvalidArgumentError("the frames of a call must follow each other")
        return self._append(frame)

    def finish(self) -> None:
        """The peer sends no more. Raises InvalidArgumentError when a call is incomplete."""
        if self._open is not None:
            raise InvalidArgumentError("the stream ended within a call")

    def _begin(self, frame: pb.ExecuteRequest, model: "Model | None") -> Call | None:
        if frame.id <= self._last_id:
            raise InvalidArgumentError("call ids must increase")
        self._last_id = frame.id
        self._check_served(frame.operation)
        if model is None:
            raise PreconditionError("no model is loaded: call Load first")
        expected = expected_tensor(frame.operation, model.config)
        if expected is None:
            if frame.HasField("header") or frame.data:
                raise InvalidArgumentError("this operation takes no tensor")
            return Call(frame.id, frame.operation, model, None)
        expected.check(frame.header)
        self._open = (frame.operation, model, Assembler(frame.header))
        return None

    def _check_served(self, operation: pb.Operation) -> None:
        kind = operation.WhichOneof("kind")
        if kind is None:
            raise InvalidArgumentError("unknown operation")
        if self._ring_only and kind != "ring_matmul":
            raise DeniedError("this worker serves ring products only")

    def _append(self, frame: pb.ExecuteRequest) -> Call | None:
        operation, model, assembler = cast("tuple[pb.Operation, Model, Assembler]", self._open)
        assembler.add(frame.data)
        if not assembler.done:
            return None
        self._open = None
        return Call(frame.id, operation, model, assembler.array())


def expected_tensor(operation: pb.Operation, config: ModelConfig) -> Expected | None:
    """What tensor an operation takes; None when it takes none.

    Raises InvalidArgumentError for fields that are out of range.
    """
    match operation.WhichOneof("kind"):
        case "ring_matmul":
            of = _linear(config, operation.ring_matmul.layer, operation.ring_matmul.linear)
            return Expected(tensor_pb2.DTYPE_INT32, None, of.k, of.n)
        case "matmul":
            of = _linear(config, operation.matmul.layer, operation.matmul.linear)
            return Expected(tensor_pb2.DTYPE_FLOAT32, None, of.k, of.n)
        case "forward":
            return Expected(tensor_pb2.DTYPE_INT32, _forward_rows(operation.forward, config), None, 0)
        case _:
            return None


def _linear(config: ModelConfig, layer: int, number: int) -> LinearSpec:
    try:
        linear = Linear(number)
    except ValueError:
        raise InvalidArgumentError("unknown linear") from None
    if layer >= (1 if linear is Linear.LM_HEAD else config.layers):
        raise InvalidArgumentError("layer out of range")
    return spec(config, layer, linear)


def _forward_rows(op: pb.Forward, config: ModelConfig) -> int:
    rows = sum(s.rows for s in op.sequences)
    if len({s.sequence for s in op.sequences}) != len(op.sequences) or not all(s.rows for s in op.sequences):
        raise InvalidArgumentError("each sequence must be named once, with at least one row")
    if len(op.logit_rows) > rows or not all(row < rows for row in op.logit_rows):
        raise InvalidArgumentError("logit row out of range")
    _check_answer(len(op.logit_rows), config.vocabulary)
    return rows


def _check_answer(rows: int, columns: int) -> None:
    if 4 * rows * columns > MAX_TENSOR_BYTES:
        raise InvalidArgumentError("the answer would be larger than a tensor may be: ask for fewer rows")
