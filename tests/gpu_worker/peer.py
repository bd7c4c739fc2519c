"""A peer of the worker without a network between them: every call goes through the same checks as over gRPC."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu_worker.calls import CallReader
from gpu_worker.model import Model
from gpu_worker.worker import Worker
from tests.gpu_worker.calling import frames
from wire.codec import Array
from wire.kv_pages import KvType
from wire.parameters import Name
from wire.v1 import gpu_worker_pb2 as pb

F32 = npt.NDArray[np.float32]
Rows = dict[int, list[int]]  # token ids by sequence


def spans(rows: Rows) -> list[pb.SequenceRows]:
    return [pb.SequenceRows(sequence=sequence, rows=len(ids)) for sequence, ids in rows.items()]


def flat(rows: Rows) -> npt.NDArray[np.int32]:
    return np.array([i for ids in rows.values() for i in ids], np.int32)


def embed(rows: Rows) -> pb.Step:
    return pb.Step(embed=pb.Embed(sequences=spans(rows)))


def project(layer: int) -> pb.Step:
    return pb.Step(project_qkv=pb.ProjectQkv(layer=layer))


def attend(layer: int) -> pb.Step:
    return pb.Step(attend=pb.Attend(layer=layer))


def finish(layer: int) -> pb.Step:
    return pb.Step(finish_block=pb.FinishBlock(layer=layer))


def head(rows: Sequence[int]) -> pb.Step:
    return pb.Step(head=pb.Head(logit_rows=rows))


class Peer:
    """One stream to a worker with a loaded model. A refused call raises here what would end the stream there."""

    def __init__(self, worker: Worker, model: str | None = None, precision: int = pb.PRECISION_FLOAT32) -> None:
        if model is not None:
            worker.load(model, precision)
        self.worker = worker
        self.stream = worker.open_stream()
        self._reader = CallReader(ring_only=False)
        self._id = 0

    @property
    def model(self) -> Model:
        assert self.worker.model is not None
        return self.worker.model

    def call(self, operation: pb.Operation, array: Array | None = None) -> Any:
        """The answer to one call."""
        self._id += 1
        for frame in frames(self._id, operation, array):
            call = self._reader.add(frame, self.worker.model)
        assert call is not None
        return self.worker.execute(call, self.stream)

    def chain(self, steps: Sequence[pb.Step], array: Array) -> F32:
        answer: F32 = self.call(pb.Operation(chain=pb.Chain(steps=steps)), array)
        return answer

    def forward(self, rows: Rows, logit_rows: Sequence[int] | None = None) -> F32:
        """Logits of all rows, unless others are asked for."""
        wanted = range(len(flat(rows))) if logit_rows is None else logit_rows
        operation = pb.Operation(forward=pb.Forward(sequences=spans(rows), logit_rows=wanted))
        answer: F32 = self.call(operation, flat(rows))
        return answer

    def cache(self, sequence: int, array: Array | None = None, **action: Any) -> Any:
        return self.call(pb.Operation(cache=pb.Cache(sequence=sequence, **action)), array)

    def reserve(self, *sequences: int, tokens: int = 100, kind: KvType = KvType.FLOAT32) -> None:
        for sequence in sequences:
            self.cache(sequence, reserve=pb.Reserve(tokens=tokens, type=kind.number))

    def provision(self, name: Name, rows: F32, first_row: int = 0) -> None:
        """float32[rows, width] of a parameter."""
        op = pb.Provision(layer=name.layer, bias=name.bias, first_row=first_row)
        op.kind = name.kind.value
        if name.linear is not None:
            op.linear = name.linear.number
        self.call(pb.Operation(provision=op), rows)
