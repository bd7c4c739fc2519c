"""GPU workers in memory: an honest one, one that records, and one that cheats. They implement schemes.base.Worker."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from wire import codec, parameters
from wire.checkpoint import Checkpoint
from wire.linears import Linear, LinearSpec, spec
from wire.model_config import ModelConfig
from wire.quantize import quantize_rows
from wire.v1 import gpu_worker_pb2 as pb

Words = npt.NDArray[np.int32]


def read_weight(checkpoint: Checkpoint, config: ModelConfig, of: LinearSpec) -> npt.NDArray[np.float32]:
    """All weight rows as float32[n, k]."""
    return parameters.read(checkpoint, parameters.parameters(config)[parameters.weight_name(config, of)])


class HonestWorker:
    """Ring and ordinary products in int64 and float32 numpy: slow, and right by inspection."""

    stream = 1

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._weights: dict[tuple[int, int, bool], npt.NDArray[np.float32] | npt.NDArray[np.int64]] = {}
        self.calls = 0

    def call(self, operation: pb.Operation, array: codec.Array | None, shape: tuple[int, ...] | None) -> codec.Array:
        """See schemes.base.Worker."""
        self.calls += 1
        assert array is not None
        assert 1 <= len(array) <= codec.MAX_ROWS  # what the real one refuses
        if operation.HasField("ring_matmul"):
            ring = operation.ring_matmul
            weight = self.weight(ring.layer, ring.linear, int8=True)
            exact = array.astype(np.int64) @ weight.T
            return exact.astype(np.int32)
        plain = operation.matmul
        return (array @ self.weight(plain.layer, plain.linear, int8=False).T).astype(np.float32)

    def close(self) -> None:
        """There is no stream."""

    def weight(self, layer: int, linear: int, int8: bool) -> npt.NDArray[np.float32] | npt.NDArray[np.int64]:
        """W (float32) or W_q (int64) of one linear."""
        key = (layer, linear, int8)
        if key not in self._weights:
            weight = read_weight(self._checkpoint, self._config, spec(self._config, layer, Linear(linear)))
            self._weights[key] = quantize_rows(weight)[0].astype(np.int64) if int8 else weight
        return self._weights[key]


class RecordingWorker(HonestWorker):
    """Honest, and keeps every request: what a curious GPU worker sees."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        super().__init__(checkpoint, config)
        self.seen: list[tuple[int, int, npt.NDArray[np.int32]]] = []

    def call(self, operation: pb.Operation, array: codec.Array | None, shape: tuple[int, ...] | None) -> codec.Array:
        """See schemes.base.Worker."""
        assert array is not None
        ring = operation.ring_matmul
        self.seen.append((ring.layer, ring.linear, array.astype(np.int32, copy=True)))
        return super().call(operation, array, shape)


class CheatingWorker(HonestWorker):
    """Honest until `cheat` is set: then every answer passes through it, `(answer, previous answer) -> answer`."""

    cheat: Callable[[Words, Words], Words] | None = None

    def call(self, operation: pb.Operation, array: codec.Array | None, shape: tuple[int, ...] | None) -> codec.Array:
        """See schemes.base.Worker."""
        answer = super().call(operation, array, shape).astype(np.int32)
        previous = getattr(self, "_previous", np.zeros_like(answer))
        self._previous = answer.copy()
        return self.cheat(answer, previous) if self.cheat else answer
