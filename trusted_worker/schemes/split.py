"""split: secure-infer's split without masks and without verification. The baseline that shows what these cost.

What the GPU worker sees: every activation that enters a linear, in the clear (float32), or its integers (int8).
What it learns: the conversation (`attacks` on hidden states decode it), and it can change any result unnoticed.
int8 sends the bare x_q of secure-infer's step 1 through the same ring product, so the two must agree bit for bit.
"""

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32
from trusted_worker.schemes.base import InsideDecoder, Worker, matmul, ring_matmul
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.linears import LinearSpec


class Split(InsideDecoder):
    """Linears on the GPU worker in the clear, everything else here."""

    def __init__(self, weights: Weights, memory: SecureMemory, scratch: Scratch, worker: Worker, int8: bool) -> None:
        super().__init__(weights, memory, scratch)
        self._worker = worker
        if int8:
            weights.load_linears()
        self._bounds = self.bounds() if int8 else {}

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """See model.Product."""
        return self._int8(spec, x) if self._bounds else self._float32(spec, x)

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return {}

    def _float32(self, spec: LinearSpec, x: F32) -> F32:
        y: F32 = self._worker.call(matmul(spec), x, (len(x), spec.n))  # type: ignore[assignment]  # dtype is checked
        bias = self._weights.bias[spec]
        return y if bias is None else np.add(y, bias, out=y)

    def _int8(self, spec: LinearSpec, x: F32) -> F32:
        x_q, x_scale = arithmetic.quantize(x, self._bounds[spec], self._scratch)
        y_q: I32 = self._worker.call(ring_matmul(spec), x_q, (len(x), spec.n))  # type: ignore[assignment]
        return arithmetic.dequantize(y_q, x_scale, self._weights.scale[spec], self._weights.bias[spec], self._scratch)
