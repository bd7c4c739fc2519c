"""An honest GPU worker in memory that is quick for models of a real size: exact products by float64 BLAS."""

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.simulators.workers import HonestWorker, read_weight
from wire import codec, parameters
from wire.linears import Linear, spec
from wire.quantize import quantize_rows
from wire.v1 import gpu_worker_pb2 as pb

DEPTH = 1 << 14  # 2^31 * 127 * 2^14 < 2^53
PIECE = 1 << 13  # columns that are float64 at a time
I8 = npt.NDArray[np.int8]


class QuickWorker(HonestWorker):
    """Ring operations only, on int8 matrices [inputs, outputs]."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._matrices: dict[tuple[int, int], I8] = {}

    def answer(self, operation: pb.Operation, array: codec.Array) -> codec.Array:
        """See HonestWorker."""
        lookup, ring = operation.HasField("ring_lookup"), operation.ring_matmul
        return _product(array, self.matrix(None if lookup else (ring.layer, int(ring.linear))))

    def matrix(self, name: tuple[int, int] | None) -> I8:
        """W_q^T of a linear by layer and number, or E_q."""
        key = name or (-1, 0)
        if key not in self._matrices:
            if name:
                of = spec(self._config, name[0], Linear(name[1]))
                self._matrices[key] = quantize_rows(read_weight(self._checkpoint, self._config, of))[0].T
            else:
                table = parameters.parameters(self._config)[parameters.Name(parameters.Kind.EMBEDDING)]
                self._matrices[key] = quantize_rows(parameters.read(self._checkpoint, table))[0]
        return self._matrices[key]


def _product(z: codec.Array, matrix: I8) -> npt.NDArray[np.int32]:
    """z . matrix modulo 2^32; partial sums are exact."""
    total = np.zeros((len(z), matrix.shape[1]), np.int64)
    for start in range(0, matrix.shape[0], DEPTH):
        words = z[:, start : start + DEPTH].astype(np.float64)
        for first in range(0, matrix.shape[1], PIECE):
            piece = matrix[start : start + DEPTH, first : first + PIECE]
            total[:, first : first + PIECE] += (words @ piece.astype(np.float64)).astype(np.int64)
    return total.astype(np.int32)
