"""What the compute thread owns: the loaded model, and the one place where an operation becomes arithmetic.

Importing this file imports torch and numba. A loaded model never changes: a call is carried out on the model that
it was checked against, even if another one was loaded in between.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.cache import CacheBudget, CacheStore
from gpu_worker.calls import Call
from gpu_worker.decoder import Decoder
from gpu_worker.kernels import cpu
from gpu_worker.model import Model
from wire.errors import DeniedError, InvalidArgumentError, PreconditionError
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

log = logging.getLogger(__name__)

Result = npt.NDArray[np.float32] | npt.NDArray[np.int32] | None


class Worker:
    """Loads models and carries out calls. Everything but reading `model` and `device` is for the compute thread."""

    def __init__(self, folders: Mapping[str, Path], device: str, ring_only: bool) -> None:
        """`device` is "auto", "cpu" or "cuda". Raises PreconditionError for "cuda" where there is none."""
        if device == "cuda" and not torch.cuda.is_available():
            raise PreconditionError("no CUDA device is available to this process: use --device cpu")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model: Model | None = None
        self._folders = folders
        self._ring_only = ring_only
        self._cache_budget = CacheBudget()

    def load(self, name: str, precision: int) -> None:
        """Raises PreconditionError for an unknown name, CheckpointError for a folder that cannot be read,
        DeniedError for float32 where only ring products are served.

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
        self.model = None
        start = time.monotonic()
        if self.device == "cpu":
            cpu.warm_up()
        self.model = Model(self._folders[name], precision, self.device, self._ring_only)
        log.info("loaded %s on %s in %.1f s", name, self.device, time.monotonic() - start)

    def open_caches(self) -> CacheStore:
        """An empty store for a new stream."""
        return CacheStore(self._cache_budget)

    @torch.inference_mode()
    def execute(self, call: Call, caches: CacheStore) -> Result:
        """Carry out a call that `calls` has checked. Raises what the operation raises; nothing has changed then."""
        operation = call.operation
        match operation.WhichOneof("kind"):
            case "ring_matmul":
                return self._ring_matmul(call, operation.ring_matmul)
            case "matmul":
                return self._matmul(call, operation.matmul)
            case "forward":
                return self._forward(call, operation.forward, caches)
            case _:
                self._cache(call, operation.cache, caches)
                return None

    def _ring_matmul(self, call: Call, op: pb.RingMatmul) -> Result:
        if call.model.ring is None:
            raise PreconditionError("the model is loaded as float32: ring products need int8")
        return call.model.ring.product(op.layer, Linear(op.linear), call.int32())

    def _matmul(self, call: Call, op: pb.Matmul) -> Result:
        x = torch.from_numpy(call.float32()).to(self.device)
        return _decoder(call).matmul(op.layer, Linear(op.linear), x).cpu().numpy()

    def _forward(self, call: Call, op: pb.Forward, caches: CacheStore) -> Result:
        spans = caches.find([(s.sequence, s.rows) for s in op.sequences], call.model.config)
        ids = call.int32()
        if ids.min() < 0 or ids.max() >= call.model.config.vocabulary:
            raise InvalidArgumentError("token id out of range")
        on_device = torch.from_numpy(ids).to(self.device, torch.int64)
        return _decoder(call).forward(spans, on_device, list(op.logit_rows)).cpu().numpy()

    def _cache(self, call: Call, op: pb.Cache, caches: CacheStore) -> None:
        if op.reserve_tokens:
            caches.reserve(op.sequence, call.model.config, op.reserve_tokens, self.device)
        else:
            caches.drop(op.sequence)


def _decoder(call: Call) -> Decoder:
    if call.model.decoder is None:
        raise PreconditionError("the model is loaded for ring products only")
    return call.model.decoder
