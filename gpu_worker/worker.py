"""What the compute thread owns: the loaded model, and the one place where an operation becomes arithmetic.

Importing this file imports torch and numba. A loaded model never changes: a call is carried out on the model that
it was checked against, even if another one was loaded in between. Parameters that all streams provision together
take as much memory as one model does.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.allowance import Allowance
from gpu_worker.cache import MAX_CACHE_BYTES
from gpu_worker.calls import Call
from gpu_worker.kernels import layers
from gpu_worker.model import Model
from gpu_worker.recording import Recording
from gpu_worker.ring import Ring
from gpu_worker.stream import Stream
from wire.errors import DeniedError, InvalidArgumentError, PreconditionError
from wire.linears import Linear, spec
from wire.v1 import gpu_worker_pb2 as pb

log = logging.getLogger(__name__)

BRIEF = 1 << 24  # multiplications of a product on the CPU that takes less than a millisecond

Result = npt.NDArray[np.float32] | npt.NDArray[np.int32] | None


class Worker:
    """Loads models and carries out calls. Everything but reading is for the thread that is at work (compute.py)."""

    def __init__(
        self, folders: Mapping[str, Path], device: str, ring_only: bool, recording: Recording | None = None
    ) -> None:
        """`device` is "auto", "cpu" or "cuda". Raises PreconditionError for "cuda" where there is none."""
        if device == "cuda" and not torch.cuda.is_available():
            raise PreconditionError("no CUDA device is available to this process: use --device cpu")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model: Model | None = None
        self._folders = folders
        self._ring_only = ring_only
        self._recording = recording
        self._cache_allowance = Allowance("a KV cache", MAX_CACHE_BYTES)
        self._overlay_allowance = Allowance("a provisioned parameter", 0)
        self._threads = numba.get_num_threads()  # of the thread that makes it; numba counts them for each

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes that are reserved for KV caches, and how many may be."""
        return self._cache_allowance.used, self._cache_allowance.limit

    def load(self, name: str, precision: int) -> None:
        """Raises PreconditionError for an unknown name and for a sealed folder as int8, CheckpointError for a folder
        that cannot be read, DeniedError for float32 where only ring products are served.

        What is loaded already stays; anything else is let go before the new weights are read.
        """
        if precision not in (pb.PRECISION_FLOAT32, pb.PRECISION_INT8):
            raise InvalidArgumentError("precision must be float32 or int8")
        if name not in self._folders:
            raise PreconditionError(f"this worker has no such model; it has {', '.join(self._folders)}")
        if self._ring_only and precision != pb.PRECISION_INT8:
            raise DeniedError("this worker serves ring products only: load the model as int8")
        if self.model is not None and (self.model.config.name, self.model.precision) == (name, precision):
            return
        if self._recording is not None:
            self._recording.write("load", model=name, precision=precision)
        self.model = None
        start = time.monotonic()
        if self.device == "cpu":
            layers.warm_up(precision == pb.PRECISION_INT8, self._ring_only)
        self.model = Model(self._folders[name], precision, self.device, self._ring_only)
        self._overlay_allowance.limit = self.model.parameter_bytes
        where = self.device
        if self.model.ring is not None:
            self.model.ring.warm_up()
            where = f"{self.device}, {self.model.ring.kernel},"
        log.info("loaded %s on %s in %.1f s", name, where, time.monotonic() - start)

    def open_stream(self) -> Stream:
        """The state of a new stream."""
        recording = None if self._recording is None else self._recording.stream()
        return Stream(self.device, self._cache_allowance, self._overlay_allowance, recording)

    def is_brief(self, call: Call) -> bool:
        """Whether handing the call to another thread might take as long as carrying it out."""
        if self.device != "cpu" or call.operation.WhichOneof("kind") != "ring_matmul":
            return False
        ring = call.operation.ring_matmul
        one = spec(call.model.config, ring.layer, Linear(ring.linear))
        return len(call.int32()) * one.n * one.k < BRIEF

    @torch.inference_mode()
    def execute(self, call: Call, stream: Stream) -> Result:
        """Carry out a call that `calls` has checked. Raises what the operation raises; no sequence has grown then."""
        numba.set_num_threads(self._threads)
        operation = call.operation
        match operation.WhichOneof("kind"):
            case "ring_matmul":
                ring = operation.ring_matmul
                return _ring(call).product(ring.layer, Linear(ring.linear), call.int32())
            case "ring_lookup":
                return _ring(call).lookup(call.int32())
            case "matmul":
                answer: torch.Tensor | None = stream.matmul(call, operation.matmul)
            case "forward":
                answer = stream.forward(call, operation.forward)
            case "chain":
                answer = stream.chain(call, operation.chain)
            case "provision":
                stream.provision(call, operation.provision)
                answer = None
            case _:
                answer = stream.cache(call, operation.cache)
        return None if answer is None else answer.cpu().numpy()


def _ring(call: Call) -> Ring:
    if call.model.ring is None:
        raise PreconditionError("the model is loaded as float32: ring products need int8")
    return call.model.ring
