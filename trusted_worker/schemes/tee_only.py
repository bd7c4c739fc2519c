"""tee-only: the whole model in the trusted worker. The baseline that needs no GPU worker and leaks nothing to one.

What the GPU worker sees: nothing; no exchange is made. What breaks it: only what breaks the TEE.
float32: y = x.W^T (+ bias). int8: the integers of secure-infer's steps 1 and 6 around the exact product, so that the
results of the two are the same, bit for bit.
"""

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32
from trusted_worker.schemes.base import InsideDecoder
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.linears import LinearSpec


class TeeOnly(InsideDecoder):
    """Every product computed inside, from resident or streamed weights."""

    def __init__(self, weights: Weights, memory: SecureMemory, scratch: Scratch, int8: bool) -> None:
        super().__init__(weights, memory, scratch)
        weights.load_linears()
        self._bounds = self.bounds() if int8 else {}
        self._inside = 0

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """See model.Product."""
        self._inside += len(rows)
        return self._int8(spec, x) if self._bounds else self._float32(spec, x)

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return {"products_inside": self._inside}

    def _float32(self, spec: LinearSpec, x: F32) -> F32:
        y: F32 = self._scratch.empty((len(x), spec.n), np.float32)
        for first, tile in self._weights.tiles(spec):
            np.matmul(x, tile.T, out=y[:, first : first + len(tile)])
        bias = self._weights.bias[spec]
        if bias is not None:
            y += bias
        return y

    def _int8(self, spec: LinearSpec, x: F32) -> F32:
        x_q, x_scale = arithmetic.quantize(x, self._bounds[spec], self._scratch)
        y_q: I32 = self._scratch.empty((len(x), spec.n), np.int32)
        arithmetic.exact_product(x_q.astype(np.float64), self._weights.tiles(spec), y_q)
        return arithmetic.dequantize(y_q, x_scale, self._weights.scale[spec], self._weights.bias[spec], self._scratch)
