"""Bare exchanges with a GPU worker: one row of the smallest linear, asked again as soon as it is answered.

That is what a data plane costs at least. Within a token there is time between two exchanges, in which threads fall
asleep and caches fill with other things, and the trusted worker checks what comes. Here rows are zeros and answers go
nowhere, on a connection of its own to a GPU worker that has its model loaded.
"""

import queue
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import grpc
import numpy as np

from wire import channel, codec, stream_socket
from wire.errors import UnavailableError
from wire.linears import LinearSpec, all_specs
from wire.model_config import ModelConfig
from wire.settings import stream_beside
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

WARM, COUNT = 20, 200  # exchanges
SECONDS = 10.0  # until one of them is answered

Ask = Callable[[pb.ExecuteRequest, bytes], pb.ExecuteResponse]


def measure(target: str, plane: str, config: ModelConfig, precision: str, count: int = COUNT) -> list[float]:
    """Seconds of each exchange, without what the GPU worker says that it computed.

    `target`: unix:PATH of the GPU worker; `plane`: grpc or stream. Raises UnavailableError when it does not answer.
    """
    one = min(all_specs(config), key=lambda spec: spec.n * spec.k)
    operation, row = _call(one, precision == "int8")
    try:
        with grpc.insecure_channel(target, channel.client_options()) as way:
            stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(way)
            with _over_stream(stub, target) if plane == "stream" else _over_grpc(stub) as ask:
                return [_seconds(ask, number, operation, row) for number in range(WARM + count)][WARM:]
    except (OSError, StopIteration, grpc.RpcError):
        raise UnavailableError("the GPU worker did not answer bare exchanges") from None


def _call(one: LinearSpec, ring: bool) -> tuple[pb.Operation, codec.Array]:
    if ring:
        operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=one.layer, linear=one.linear.number))
        return operation, np.zeros((1, one.k), np.int32)
    operation = pb.Operation(matmul=pb.Matmul(layer=one.layer, linear=one.linear.number))
    return operation, np.zeros((1, one.k), np.float32)


def _seconds(ask: Ask, number: int, operation: pb.Operation, row: codec.Array) -> float:
    begun = time.perf_counter()
    answer = ask(pb.ExecuteRequest(id=number, operation=operation, header=codec.header_of(row)), row.tobytes())
    elapsed = time.perf_counter() - begun
    if answer.id != number or answer.refused or answer.ended:
        raise UnavailableError("the GPU worker refused a bare exchange")
    return max(elapsed - answer.compute_us / 1e6, 0.0)


@contextmanager
def _over_grpc(stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub) -> Iterator[Ask]:
    requests: queue.SimpleQueue[pb.ExecuteRequest | None] = queue.SimpleQueue()
    answers = stub.Execute(iter(requests.get, None), timeout=SECONDS)

    def ask(frame: pb.ExecuteRequest, data: bytes) -> pb.ExecuteResponse:
        frame.data = data
        requests.put(frame)
        return next(answers)

    yield ask
    requests.put(None)


@contextmanager
def _over_stream(stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub, target: str) -> Iterator[Ask]:
    ticket = stub.Attach(pb.AttachRequest(), timeout=SECONDS).ticket
    with closing(stream_socket.connect(stream_beside(target) or target, SECONDS)) as one:
        one.sendall(ticket)
        _receive(one)  # it is welcome

        def ask(frame: pb.ExecuteRequest, data: bytes) -> pb.ExecuteResponse:
            one.sendall(stream_socket.pack(frame, len(data)) + data)
            return _receive(one)

        yield ask


def _receive(one: socket.socket) -> pb.ExecuteResponse:
    """The next frame, its data read and forgotten."""
    length, size = stream_socket.lengths(memoryview(_exactly(one, stream_socket.PREFIX_BYTES)))
    return pb.ExecuteResponse.FromString(_exactly(one, length + size)[:length])


def _exactly(one: socket.socket, size: int) -> bytes:
    """So many bytes. Raises OSError when there will be fewer."""
    data = one.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) < size:
        raise ConnectionResetError
    return data
