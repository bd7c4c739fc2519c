"""split: secure-infer's split without masks and without verification. The baseline that shows what these cost.

What the GPU worker sees: every activation that enters a linear, in the clear (float32), or its integers (int8).
What it learns: the conversation (`attacks` on hidden states decode it), and it can change any result unnoticed.
int8 sends the bare x_q of secure-infer's step 1 through the same ring product, so the two must agree bit for bit.
"""

from trusted_worker.arithmetic import F32, I32
from trusted_worker.kv_cache import PagePool
from trusted_worker.schemes.base import InsideDecoder, Worker, matmul, ring_matmul
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.linears import LinearSpec


class Split(InsideDecoder):
    """Linears on the GPU worker in the clear, everything else here."""

    def __init__(self, weights: Weights, pages: PagePool, scratch: Scratch, head_rows: int, worker: Worker) -> None:
        super().__init__(weights, pages, scratch, head_rows)
        self._worker = worker

    def integers(self, spec: LinearSpec, x_q: I32, y_q: I32, rows: I32) -> None:
        """See base.InsideDecoder."""
        self._worker.call(ring_matmul(spec), x_q, y_q)

    def floats(self, spec: LinearSpec, x: F32, y: F32) -> None:
        """See base.InsideDecoder."""
        self._worker.call(matmul(spec), x, y)
