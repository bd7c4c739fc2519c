"""What a scheme is: how one batch of rows becomes logits, who computes which product, and what protects it."""

from typing import Protocol

from trusted_worker.arithmetic import F32, I32, Bound
from trusted_worker.kv_cache import Cache, KVCache
from trusted_worker.model import Batch, Decoder
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire import codec
from wire.linears import LinearSpec
from wire.v1 import gpu_worker_pb2 as pb


class Worker(Protocol):
    """The GPU worker as schemes see it. See offload.GpuWorker."""

    @property
    def stream(self) -> int:
        """Which stream is open: another number means that what the old one held is gone."""
        ...

    def call(self, operation: pb.Operation, array: codec.Array | None, shape: tuple[int, ...] | None) -> codec.Array:
        """One exchange; the answer has `shape`, and is hostile until verified."""
        ...

    def close(self) -> None:
        """End the stream: whatever is still in flight on it is never read."""
        ...


class Scheme(Protocol):
    """One way to run the model. Used from the compute thread only."""

    def open(self, tokens: int) -> Cache:
        """Reserve a sequence's cache. Raises ExhaustedError before anything starts."""
        ...

    def forward(self, batch: Batch) -> F32:
        """Logits float32[len(logit_rows), vocabulary] for the batch, whose rows with pads-to-be come first.

        Raises VerificationError when anything that the GPU worker returned fails its check.
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
    """What split, tee-only and secure-infer share: the decoder runs here, and only `product` differs."""

    def __init__(self, weights: Weights, memory: SecureMemory, scratch: Scratch) -> None:
        self._weights, self._memory, self._scratch = weights, memory, scratch
        self._decoder = Decoder(weights, scratch)

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """One linear for some rows of the batch. See model.Product."""
        raise NotImplementedError

    def open(self, tokens: int) -> KVCache:
        """A cache in the arena."""
        return KVCache(self._memory, self._weights.config, tokens)

    def forward(self, batch: Batch) -> F32:
        """See Scheme."""
        return self._decoder.forward(batch, self.product)

    def idle(self) -> bool:
        """Nothing to prepare."""
        return False

    def distrust(self) -> None:
        """There is no secret that the worker could have learnt something about."""

    def bounds(self) -> dict[LinearSpec, Bound]:
        """What step 1 needs to know of each linear. One pass over the weights."""
        return {spec: Bound(spec.k, self._weights.row_square(spec)) for spec in self._weights.specs}


def ring_matmul(spec: LinearSpec) -> pb.Operation:
    """z . W_q^T modulo 2^32 for one linear."""
    return pb.Operation(ring_matmul=pb.RingMatmul(layer=spec.layer, linear=spec.linear.number))


def matmul(spec: LinearSpec) -> pb.Operation:
    """x . W^T for one linear, without bias."""
    return pb.Operation(matmul=pb.Matmul(layer=spec.layer, linear=spec.linear.number))
