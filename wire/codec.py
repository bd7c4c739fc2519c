"""Tensors and calls on the wire: raw little-endian bytes behind a checked header, cut into frames.

A call is one header and its bytes. The first frame carries the header and up to FRAME_BYTES of data, every
further frame only data; the header says how much must come. `split` and `Assembler` are twins.

Bounds come before bytes: dtype from a closed enum, shape product against MAX_TENSOR_BYTES, and only then memory.
The assembler copies what comes, once, into memory of ours: a peer cannot rewrite it afterwards.
"""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from wire.errors import InvalidArgumentError
from wire.v1 import tensor_pb2

FRAME_BYTES = 1 << 20  # data in one frame
MAX_TENSOR_BYTES = 1 << 28  # one tensor, all its frames
MAX_RANK = 4
MAX_ROWS = 256  # rows of one call

Array = npt.NDArray[np.float32] | npt.NDArray[np.int32]

_DTYPES: dict[int, np.dtype[Any]] = {
    tensor_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DTYPE_INT32: np.dtype("<i4"),
}
_CODES = {np.dtype("<f4"): tensor_pb2.DTYPE_FLOAT32, np.dtype("<i4"): tensor_pb2.DTYPE_INT32}


def header_of(array: Array) -> tensor_pb2.TensorHeader:
    """The header of a C-contiguous float32 or int32 array. Raises InvalidArgumentError for any other dtype."""
    if array.dtype not in _CODES:
        raise InvalidArgumentError(f"dtype {array.dtype} cannot travel: float32 and int32 can")
    return tensor_pb2.TensorHeader(dtype=_CODES[array.dtype], shape=array.shape)


def byte_length(header: tensor_pb2.TensorHeader) -> int:
    """Bytes that the header announces. Raises InvalidArgumentError when dtype, rank or size are out of bounds."""
    shape = header.shape
    if header.dtype not in _DTYPES:
        raise InvalidArgumentError("unknown tensor dtype")
    if not 1 <= len(shape) <= MAX_RANK:
        raise InvalidArgumentError(f"tensor rank must be 1 to {MAX_RANK}")
    size = bounded = _DTYPES[header.dtype].itemsize
    for extent in shape:
        size, bounded = size * extent, bounded * max(extent, 1)
    if bounded > MAX_TENSOR_BYTES:
        raise InvalidArgumentError(f"tensor is over the limit of {MAX_TENSOR_BYTES} bytes")
    return size


def pieces(array: Array) -> Iterator[memoryview]:
    """The data of an array, frame by frame, in its own memory; at least one frame, which may be empty."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, max(len(data), 1), FRAME_BYTES):
        yield data[start : start + FRAME_BYTES]


def split(array: Array) -> Iterator[bytes]:
    """The same, as copies."""
    return (piece.tobytes() for piece in pieces(array))


class Assembler:
    """Puts the frames of one call together again, in `into` or in memory of its own. `done` when all bytes are there.

    Raises InvalidArgumentError for a header out of bounds, and for another dtype or shape than that of `into`.
    """

    def __init__(self, header: tensor_pb2.TensorHeader, into: Array | None = None) -> None:
        if header.dtype not in _DTYPES:
            raise InvalidArgumentError("unknown tensor dtype")
        self._dtype, self._shape = _DTYPES[header.dtype], tuple(header.shape)
        if into is None:
            self._array = np.empty(byte_length(header), np.uint8)
        elif (into.dtype, into.shape) != (self._dtype, self._shape):
            raise InvalidArgumentError("this tensor was not asked for")
        else:
            self._array = np.frombuffer(into, np.uint8)  # shares its memory; ValueError where that is not contiguous
        self._data = self._array.data
        self._filled = 0
        self._begun = False

    @property
    def done(self) -> bool:
        """Whether every announced byte has arrived."""
        return self._filled == len(self._data)

    def add(self, data: bytes) -> None:
        """Copy one frame's data in. Raises InvalidArgumentError for an empty, too long or superfluous frame."""
        self.place(len(data))[:] = data

    def place(self, size: int) -> memoryview:
        """Where one frame's data belong, which counts as filled; the caller fills it at once. Raises as `add` does."""
        start, end = self._filled, self._filled + size
        superfluous = self._begun and self.done
        missing = size == 0 and len(self._data) > 0
        if superfluous or missing or size > FRAME_BYTES or end > len(self._data):
            raise InvalidArgumentError("frame does not match the announced tensor")
        self._filled, self._begun = end, True
        return self._data[start:end]

    def array(self) -> Array:
        """The assembled tensor: writable, C-contiguous, and no memory of the peer's."""
        if not self.done:
            raise InvalidArgumentError("tensor is incomplete")
        return cast(Array, self._array.view(self._dtype).reshape(self._shape))
