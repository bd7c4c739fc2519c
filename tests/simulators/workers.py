"""GPU workers in memory: an honest one, one that records, and one that cheats. They implement schemes.base.Worker."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gpu_worker.expected import LOOKUP_ROWS
from wire import codec, parameters
from wire.checkpoint import Checkpoint
from wire.linears import Linear, LinearSpec, lookup_spec, spec
from wire.model_config import ModelConfig
from wire.quantize import quantize_rows
from wire.v1 import gpu_worker_pb2 as pb

Words = npt.NDArray[np.int32]
Meanwhile = Callable[[], None] | None


def read_weight(checkpoint: Checkpoint, config: ModelConfig, of: LinearSpec) -> npt.NDArray[np.float32]:
    """All weight rows as float32[n, k]."""
    return parameters.read(checkpoint, parameters.parameters(config)[parameters.weight_name(config, of)])


class HonestWorker:
    """Ring and ordinary products in int64 and float32 numpy: slow, and right by inspection."""

    stream = 1

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._weights: dict[tuple[int, int, bool], npt.NDArray[np.float32] | npt.NDArray[np.int64]] = {}
        self._table: npt.NDArray[np.int64] | None = None
        self.calls = 0

    def call(
        self,
        operation: pb.Operation,
        array: codec.Array | None,
        into: codec.Array | None,
        meanwhile: Meanwhile = None,
    ) -> None:
        """See schemes.base.Worker."""
        self.calls += 1
        assert array is not None
        answer = self.answer(operation, array)
        do(meanwhile)
        fill(into, answer)

    def answer(self, operation: pb.Operation, array: codec.Array) -> codec.Array:
        """What it says."""
        lookup = operation.HasField("ring_lookup")
        assert 1 <= len(array) <= (LOOKUP_ROWS if lookup else codec.MAX_ROWS)  # what the real one refuses
        if lookup:
            return (array.astype(np.int64) @ self.table()).astype(np.int32)
        if operation.HasField("ring_matmul"):
            ring = operation.ring_matmul
            return (array.astype(np.int64) @ self.weight(ring.layer, ring.linear, int8=True).T).astype(np.int32)
        plain = operation.matmul
        return (array @ self.weight(plain.layer, plain.linear, int8=False).T).astype(np.float32)

    def connect(self, patient: bool = False) -> None:
        """It is always there."""

    def close(self) -> None:
        """There is no stream."""

    def weight(self, layer: int, linear: int, int8: bool) -> npt.NDArray[np.float32] | npt.NDArray[np.int64]:
        """W (float32) or W_q (int64) of one linear."""
        key = (layer, linear, int8)
        if key not in self._weights:
            weight = read_weight(self._checkpoint, self._config, spec(self._config, layer, Linear(linear)))
            self._weights[key] = quantize_rows(weight)[0].astype(np.int64) if int8 else weight
        return self._weights[key]

    def table(self) -> npt.NDArray[np.int64]:
        """E_q of the embedding."""
        if self._table is None:
            embedding = parameters.parameters(self._config)[parameters.Name(parameters.Kind.EMBEDDING)]
            self._table = quantize_rows(parameters.read(self._checkpoint, embedding))[0].astype(np.int64)
        return self._table


class RecordingWorker(HonestWorker):
    """Honest, and keeps every request: what a curious GPU worker sees. A lookup has the numbers of `lookup_spec`."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        super().__init__(checkpoint, config)
        self.seen: list[tuple[int, int, npt.NDArray[np.int32]]] = []

    def answer(self, operation: pb.Operation, array: codec.Array) -> codec.Array:
        """See HonestWorker."""
        lookup = operation.HasField("ring_lookup")
        of = lookup_spec(self._config) if lookup else operation.ring_matmul
        self.seen.append((of.layer, int(of.linear), array.astype(np.int32, copy=True)))
        return super().answer(operation, array)


class CheatingWorker(HonestWorker):
    """Honest until `cheat` is set: then every answer passes through it, `(answer, previous answer) -> answer`."""

    cheat: Callable[[Words, Words], Words] | None = None

    _previous: Words | None = None

    def answer(self, operation: pb.Operation, array: codec.Array) -> codec.Array:
        """See HonestWorker."""
        honest = super().answer(operation, array)
        words = honest.astype(np.int32)
        previous, self._previous = self._previous, words.copy()
        return self.cheat(words, np.zeros_like(words) if previous is None else previous) if self.cheat else honest


def do(meanwhile: Meanwhile) -> None:
    """Once what was asked is on its way."""
    if meanwhile:
        meanwhile()


def fill(into: codec.Array | None, answer: codec.Array | None) -> None:
    """What offload does with an answer: it must be of the form that was asked for, or there must be none."""
    if into is None or answer is None:
        assert into is None
        assert answer is None
        return
    assert into.flags.c_contiguous
    assert (answer.shape, answer.dtype) == (into.shape, into.dtype)
    into[...] = answer
