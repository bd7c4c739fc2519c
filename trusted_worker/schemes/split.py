"""split: secure-infer's split without masks and without verification. The baseline that shows what these cost.

What the GPU worker sees: every activation that enters a linear, in the clear (float32), or its integers (int8).
What it learns: the conversation (`attacks` on hidden states decode it), and it can change any result unnoticed.
int8 sends the bare x_q of secure-infer's step 1 through the same ring product, so the two must agree bit for bit.
"""

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32
from trusted_worker.kv_cache import PagePool
from trusted_worker.schemes.base import InsideDecoder, Worker, matmul, ring_matmul
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.linears import LinearSpec


class Split(InsideDecoder):
    """Linears on the GPU worker in the clear, everything else here."""

    def __init__(
        self, weights: Weights, pages: PagePool, scratch: Scratch, head_rows: int, worker: Worker, int8: bool
    ) -> None:
        super().__init__(weights, pages, scratch, head_rows)
        self._worker = worker
        self._multiply = self._int8 if int8 else self._float32

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """See model.Product."""
        y: F32 = self._scratch.empty((len(x), spec.n), np.float32)
        with self._scratch.frame():
            self._multiply(spec, x, y)
        return y

    def _float32(self, spec: LinearSpec, x: F32, y: F32) -> None:
        self._worker.call(matmul(spec), x, y)
        bias = self._weights.bias[spec]
        if bias is not None:
            y += bias

    def _int8(self, spec: LinearSpec, x: F32, y: F32) -> None:
        x_q, x_scale = arithmetic.quantize(x, self._weights.bound(spec), self._scratch)
        y_q: I32 = self._scratch.empty(y.shape, np.int32)
        self._worker.call(ring_matmul(spec), x_q, y_q)
        arithmetic.dequantize(y_q, x_scale, self._weights.scale(spec), self._weights.bias[spec], y)
