"""What a scheme is: how one batch of rows becomes logits, who computes which product, and what protects it."""

from typing import Protocol

from trusted_worker.arithmetic import F32
from trusted_worker.kv_cache import Cache
from trusted_worker.model import Batch
from wire import codec
from wire.linears import LinearSpec
from wire.v1 import gpu_worker_pb2 as pb


class Worker(Protocol):
    """The GPU worker as schemes see it. See offload.GpuWorker.call."""

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


def ring_matmul(spec: LinearSpec) -> pb.Operation:
    """z . W_q^T modulo 2^32 for one linear."""
    return pb.Operation(ring_matmul=pb.RingMatmul(layer=spec.layer, linear=spec.linear.number))


def matmul(spec: LinearSpec) -> pb.Operation:
    """x . W^T for one linear, without bias."""
    return pb.Operation(matmul=pb.Matmul(layer=spec.layer, linear=spec.linear.number))
