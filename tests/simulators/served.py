"""The real GPU worker in a thread of this process, reached over either data plane."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_worker.compute import Compute
from gpu_worker.server import Servicer, make_server
from gpu_worker.stream_plane import StreamPlane
from gpu_worker.traffic import Traffic
from gpu_worker.worker import Worker
from trusted_worker.offload import GpuWorker
from wire.model_config import ModelConfig
from wire.settings import stream_beside
from wire.v1 import gpu_worker_pb2 as pb

Cheat = Callable[[Any], Any]


class Served:
    """Serves until it is closed. `cheat` changes every answer; `plane` of `client` is "grpc" or "stream"."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.target, self.traffic = f"unix:{folder}/gpu", Traffic()
        self.cheat: Cheat | None = None
        self._name, self._model = ModelConfig.from_hf(model).name, model
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        self._ready.wait(60)

    def client(self, plane: str, precision: pb.Precision.ValueType = pb.PRECISION_INT8) -> GpuWorker:
        stream = stream_beside(self.target) if plane == "stream" else None
        return GpuWorker(self.target, self._name, precision, stream=stream)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        self._over, compute = asyncio.Event(), Compute(self._make)
        plane = StreamPlane(f"{self.target}.stream", compute, False, self.traffic, 30.0)
        server = make_server(Servicer(compute, [self._name], False, self.traffic, plane=plane))
        server.add_insecure_port(self.target)
        await server.start()
        self._ready.set()
        await self._over.wait()
        await server.stop(0)
        await plane.stop()
        compute.stop()

    def _make(self) -> Worker:
        torch.set_num_threads(1)
        worker = Worker({self._name: self._model}, "cpu", ring_only=False)
        honest = worker.execute

        def execute(*call: Any) -> Any:
            result = honest(*call)
            return self.cheat(result) if self.cheat and result is not None else result

        worker.execute = execute  # type: ignore[assignment,method-assign]
        return worker


@contextmanager
def served(model: Path, folder: Path) -> Iterator[Served]:
    """A worker for one `with` block."""
    one = Served(model, folder)
    try:
        yield one
    finally:
        one.close()
