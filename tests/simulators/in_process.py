"""The real GPU worker behind schemes.base.Worker, without a socket: frames in, frames out, all of it kept."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.calls import CallReader
from gpu_worker.worker import Worker
from tests.simulators.workers import Meanwhile, do, fill
from wire import codec
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb


@dataclass(frozen=True)
class Exchange:
    """One call as the wire saw it."""

    operation: pb.Operation
    request: codec.Array | None
    answer: codec.Array | None


class InProcessWorker:
    """One stream of a GPU worker in this process. What it holds is in `held`, what crossed in `seen`."""

    def __init__(self, folder: Path, config: ModelConfig, precision: pb.Precision.ValueType) -> None:
        torch.set_num_threads(1)  # tiny products: a second thread only waits
        self.worker = Worker({config.name: folder}, "cpu", ring_only=False)
        self.worker.load(config.name, precision)
        self.stream, self.calls = 0, 0
        self.seen: list[Exchange] = []
        self._begin()

    def call(
        self,
        operation: pb.Operation,
        array: codec.Array | None,
        into: codec.Array | None,
        meanwhile: Meanwhile = None,
    ) -> None:
        """See schemes.base.Worker."""
        self.calls += 1
        sent: codec.Array | None = None if array is None else array.copy()
        for index, data in enumerate(codec.split(sent) if sent is not None else [b""]):
            frame = pb.ExecuteRequest(id=self.calls, data=data)
            if index == 0:
                frame.operation.CopyFrom(operation)
                if sent is not None:
                    frame.header.CopyFrom(codec.header_of(sent))
            call = self._reader.add(frame, self.worker.model)
        assert call is not None
        answer = self.worker.execute(call, self.held)
        do(meanwhile)
        fill(into, answer)
        self.seen.append(Exchange(call.operation, sent, answer))

    def close(self) -> None:
        """The stream ends; the next call begins another."""
        self.stream += 1
        self.held.close()
        self._begin()

    def _begin(self) -> None:
        self._reader = CallReader(ring_only=False)
        self.held = self.worker.open_stream()
