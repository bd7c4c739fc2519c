"""What a scheme is: how one batch of rows becomes logits, who computes which product, and what protects it."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, F64, I32, exact_product
from trusted_worker.cache import Cache
from trusted_worker.kv_cache import KVCache, PagePool
from trusted_worker.model import Accept, Batch, Decoder, Run
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire import codec
from wire.errors import InvalidArgumentError
from wire.linears import LinearSpec
from wire.v1 import gpu_worker_pb2 as pb


class Worker(Protocol):
    """The GPU worker as schemes see it. See offload.GpuWorker."""

    @property
    def stream(self) -> int:
        """Which stream is open: another number means that what the old one held is gone."""
        ...

    def call(
        self,
        operation: pb.Operation,
        array: codec.Array | None,
        into: codec.Array | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """One exchange. The answer fills `into`, C-contiguous; None for an operation that answers without a tensor.

        What is done `meanwhile` is done while the worker computes.

        It has the dtype and shape of `into`, and is hostile until verified. After an error `into` holds junk.
        """
        ...

    def close(self) -> None:
        """End the stream: whatever is still in flight on it is never read."""
        ...


class Scheme(Protocol):
    """One way to run the model. Used from the compute thread only."""

    def open(self, tokens: int) -> Cache:
        """Reserve a sequence's cache. Raises ExhaustedError before anything starts."""
        ...

    def forward(self, batch: Batch, accept: Accept) -> None:
        """One pass over the batch, whose rows with pads-to-be come first.

        Once the caches have grown, `accept` gets the logits of each row that wants them, in order. Raises
        VerificationError when anything that the GPU worker returned fails its check.
        """
        ...

    def idle(self) -> bool:
        """One bounded piece of idle work. False when there is none."""
        ...

    def distrust(self) -> None:
        """After a VerificationError: renew what the worker may have learnt something about."""
        ...

    def counters(self) -> dict[str, int]:
        """Fields of StatsResponse that only this scheme knows."""
        ...


class InsideDecoder:
    """What split, tee-only and secure-infer share: the decoder runs here, and only who multiplies differs.

    Steps have the numbers of secure_infer.py.
    """

    def __init__(self, weights: Weights, pages: PagePool, scratch: Scratch, head_rows: int) -> None:
        self._weights, self._pages, self._scratch = weights, pages, scratch
        self._decoder = Decoder(weights, scratch, head_rows)
        self._adapted: list[Run] = []  # of the batch, those with an adapter

    def embed(self, batch: Batch, out: F32) -> None:
        """Embeddings of the batch's tokens. See model.Embed."""
        if batch.embeddings:
            for row, embedding in enumerate(batch.embeddings):
                out[row] = np.frombuffer(embedding, "<f4")
        else:
            self._weights.embed(batch.ids, out, self._scratch)

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """One linear for some rows of the batch. See model.Product."""
        scratch, weights, bias = self._scratch, self._weights, self._weights.bias[spec]
        y: F32 = scratch.empty((len(x), spec.n), np.float32)
        with scratch.frame():
            if weights.int8:
                x_q, x_scale = arithmetic.quantize(x, weights.bound(spec), scratch)  # (1)
                y_q: I32 = scratch.empty(y.shape, np.int32)
                self.integers(spec, x_q, y_q, rows)
                arithmetic.dequantize(y_q, x_scale, weights.scale(spec), bias, y)  # (6)
            else:
                self.floats(spec, x, y)
                if bias is not None:
                    y += bias
        if self._adapted:
            self._adapt(spec, x, y, rows)
        return y

    def _adapt(self, spec: LinearSpec, x: F32, y: F32, rows: I32) -> None:
        """Step 6, its last addend: what the adapters of the batch's sequences add to their rows."""
        with np.errstate(over="ignore", invalid="ignore"):
            for run in self._adapted:
                low = run.adapter.linears.get(spec) if run.adapter else None
                own = slice(*np.searchsorted(rows, (run.start, run.stop)))
                if low and not low.add(x[own], y[own], self._scratch):
                    run.cache.failed = True  # this sequence ends, and the others try again
                    raise InvalidArgumentError("the adapter's results are out of bounds; the session is closed")

    def integers(self, spec: LinearSpec, x_q: I32, y_q: I32, rows: I32) -> None:
        """x_q . W_q^T modulo 2^32: int32[m, k] of these rows of the batch into y_q int32[m, n]."""
        raise NotImplementedError

    def floats(self, spec: LinearSpec, x: F32, y: F32) -> None:
        """x . W^T: float32[m, k] into y float32[m, n]."""
        raise NotImplementedError

    def exact(self, spec: LinearSpec, x_q: I32, y_q: I32) -> None:
        """x_q . W_q^T modulo 2^32, computed here: int32[m, k] into y_q int32[m, n]."""
        with self._scratch.frame():
            x: F64 = self._scratch.empty(x_q.shape, np.float64)
            np.copyto(x, x_q)
            with self._weights.tiles(spec, self._scratch) as tiles:
                exact_product(x, tiles, y_q, self._scratch)

    def open(self, tokens: int) -> KVCache:
        """A cache in the arena, and outside, sealed, when the arena is full."""
        return self._pages.open(tokens)

    def forward(self, batch: Batch, accept: Accept) -> None:
        """See Scheme."""
        self._adapted = [run for run in batch.runs if run.adapter]
        self._decoder.forward(batch, self.embed, self.product, accept)

    def idle(self) -> bool:
        """Nothing to prepare."""
        return False

    def distrust(self) -> None:
        """There is no secret that the worker could have learnt something about."""

    def counters(self) -> dict[str, int]:
        """See Scheme."""
        weights, pages = self._weights, self._pages
        return {
            "tiles_read": weights.tiles_read,
            "table_scans": weights.table_scans,
            "kv_pages_capacity": pages.slots,
            "kv_pages_used": pages.used,
            "spill_bytes": pages.spilled + weights.parked_bytes,
            **pages.counts,
        }


def ring_matmul(spec: LinearSpec) -> pb.Operation:
    """z . W_q^T modulo 2^32 for one linear."""
    return pb.Operation(ring_matmul=pb.RingMatmul(layer=spec.layer, linear=spec.linear.number))


def matmul(spec: LinearSpec) -> pb.Operation:
    """x . W^T for one linear, without bias."""
    return pb.Operation(matmul=pb.Matmul(layer=spec.layer, linear=spec.linear.number))
