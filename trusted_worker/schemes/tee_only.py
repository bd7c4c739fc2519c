"""tee-only: the whole model in the trusted worker. The baseline that needs no GPU worker and leaks nothing to one.

What the GPU worker sees: nothing; no exchange is made. What breaks it: only what breaks the TEE.
float32: y = x.W^T (+ bias). int8: the integers of secure-infer's steps 1 and 6 around the exact product, so that the
results of the two are the same, bit for bit.
"""

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32, Bound
from trusted_worker.kv_cache import KVCache
from trusted_worker.model import Batch, Decoder
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.linears import LinearSpec


class TeeOnly:
    """Every product computed inside, from resident or streamed weights."""

    def __init__(self, weights: Weights, memory: SecureMemory, scratch: Scratch, int8: bool) -> None:
        weights.load_linears()
        self._weights, self._memory, self._scratch = weights, memory, scratch
        self._decoder = Decoder(weights, scratch)
        self._product = self._int8 if int8 else self._float32
        self._bounds = {s: Bound(s.k, weights.row_square(s)) for s in weights.specs} if int8 else {}
        self._inside = 0

    def open(self, tokens: int) -> KVCache:
        """A cache in the arena."""
        return KVCache(self._memory, self._weights.config, tokens)

    def forward(self, batch: Batch) -> F32:
        """See base.Scheme."""
        return self._decoder.forward(batch, self._product)

    def idle(self) -> bool:
        """Nothing to prepare."""
        return False

    def distrust(self) -> None:
        """Nobody to distrust."""

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return {"products_inside": self._inside}

    def _float32(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        y: F32 = self._scratch.empty((len(x), spec.n), np.float32)
        for first, tile in self._weights.tiles(spec):
            np.matmul(x, tile.T, out=y[:, first : first + len(tile)])
        bias = self._weights.bias[spec]
        if bias is not None:
            y += bias
        self._inside += len(rows)
        return y

    def _int8(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        x_q, x_scale = arithmetic.quantize(x, self._bounds[spec], self._scratch)
        y_q: I32 = self._scratch.empty((len(x), spec.n), np.int32)
        arithmetic.exact_product(x_q.astype(np.float64), self._weights.tiles(spec), y_q)
        self._inside += len(rows)
        return arithmetic.dequantize(y_q, x_scale, self._weights.scale[spec], self._weights.bias[spec], self._scratch)
