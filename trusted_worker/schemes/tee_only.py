"""tee-only: the whole model in the trusted worker. The baseline that needs no GPU worker and leaks nothing to one.

What the GPU worker sees: nothing; no exchange is made. What breaks it: only what breaks the TEE. Weights that do not
fit the budget are read tile by tile at every step (weights.py), always all of them, always in the same order.
float32: y = x.W^T (+ bias). int8: the integers of secure-infer's steps 1 and 6 around the exact product, so that the
results of the two are the same, bit for bit.
"""

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32
from trusted_worker.kv_cache import PagePool
from trusted_worker.schemes.base import InsideDecoder
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.linears import LinearSpec


class TeeOnly(InsideDecoder):
    """Every product computed inside, from resident or parked weights."""

    def __init__(self, weights: Weights, pages: PagePool, scratch: Scratch, head_rows: int, int8: bool) -> None:
        super().__init__(weights, pages, scratch, head_rows)
        self._multiply = self._int8 if int8 else self._float32
        self._inside = 0

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """See model.Product."""
        self._inside += len(rows)
        y: F32 = self._scratch.empty((len(x), spec.n), np.float32)
        with self._scratch.frame():
            self._multiply(spec, x, y)
        return y

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return super().counters() | {"products_inside": self._inside}

    def _float32(self, spec: LinearSpec, x: F32, y: F32) -> None:
        with self._weights.tiles(spec, self._scratch) as tiles:
            for first, tile in tiles:
                with self._scratch.frame():
                    part: F32 = self._scratch.empty((len(x), len(tile)), np.float32)
                    y[:, first : first + len(tile)] = np.matmul(x, tile.T, out=part)
        bias = self._weights.bias[spec]
        if bias is not None:
            y += bias

    def _int8(self, spec: LinearSpec, x: F32, y: F32) -> None:
        x_q, x_scale = arithmetic.quantize(x, self._weights.bound(spec), self._scratch)
        y_q: I32 = self._scratch.empty(y.shape, np.int32)
        self.exact(spec, x_q, y_q)
        arithmetic.dequantize(y_q, x_scale, self._weights.scale(spec), self._weights.bias[spec], y)
