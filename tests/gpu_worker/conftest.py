"""Every model folder there is, a worker in this thread, and one served in-process on a Unix socket."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numba
import pytest
import torch

from gpu_worker.compute import Compute
from gpu_worker.server import Servicer, make_server
from gpu_worker.stream_plane import StreamPlane
from gpu_worker.traffic import Traffic
from gpu_worker.worker import Worker
from tests.model_folders import ASIDE, MODELS
from wire.channel import client_options
from wire.v1 import gpu_worker_pb2_grpc

Serve = Callable[..., AbstractAsyncContextManager[Any]]


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests of this folder may be coroutines."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), 60))
    return True


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For the tests that calculate in the main thread."""
    one_thread_here()


def one_thread_here() -> None:
    """Tiny products gain nothing from a second core and lose much to its waking up. Counts are kept per thread."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folders(model_folder: Callable[[str], Path]) -> dict[str, Path]:
    """Folders by name, of every family: with and without biases, tied and untied, of each type."""
    return {name: model_folder(name) for name in (*MODELS, *ASIDE)}


@pytest.fixture
def worker(model_folders: dict[str, Path]) -> Worker:
    """A worker in this thread, with nothing loaded."""
    return Worker(model_folders, "cpu", ring_only=False)


@pytest.fixture
def serve(model_folders: dict[str, Path], tmp_path: Path) -> Serve:
    """`async with serve(ring_only=False) as stub`: a worker in this process. `stub.raw_execute` sends bare bytes;
    `stub.traffic`, `stub.compute` and `stub.plane` are the worker's, `stub.connect()` is another connection, and
    `stub.socket` the path of its stream socket.
    """

    @asynccontextmanager
    async def start(ring_only: bool = False, request_seconds: float = 60.0) -> AsyncIterator[Any]:
        def make_worker() -> Worker:
            one_thread_here()
            return Worker(model_folders, "cpu", ring_only)

        compute, traffic = Compute(make_worker), Traffic()
        plane = StreamPlane(f"unix:{tmp_path}/stream", compute, ring_only, traffic, request_seconds)
        server = make_server(Servicer(compute, list(model_folders), ring_only, traffic, request_seconds, plane))
        address = f"unix:{tmp_path}/worker"
        server.add_insecure_port(address)
        await server.start()

        @asynccontextmanager
        async def connect() -> AsyncIterator[Any]:
            options = [*client_options(), ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                yield gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)

        async with grpc.aio.insecure_channel(address, options=client_options()) as channel:
            stub: Any = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
            stub.traffic, stub.compute, stub.connect = traffic, compute, connect
            stub.plane, stub.socket = plane, f"{tmp_path}/stream"
            stub.raw_execute = channel.stream_stream("/wire.v1.GpuWorkerService/Execute")
            yield stub
        await server.stop(0)
        await plane.stop()
        compute.stop()

    return start
