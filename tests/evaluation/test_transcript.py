"""The recorder, between two ends that speak the real protocol over real sockets."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from evaluation.transcript import Recorder
from wire import channel, codec
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

PATIENCE = 20.0
SMALL = np.arange(12, dtype=np.int32).reshape(3, 4)
LARGE = np.arange(600_000, dtype=np.int32).reshape(2, -1)  # three frames


class Negator(gpu_worker_pb2_grpc.GpuWorkerServiceServicer):
    """Answers every tensor with its negative."""

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse(device="negator")

    def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        return pb.LoadResponse()

    def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachResponse:
        return pb.AttachResponse(ticket=bytes(32))

    def Execute(self, requests: Iterator[pb.ExecuteRequest], context: Any) -> Iterator[pb.ExecuteResponse]:
        assembler = None
        for request in requests:
            assembler = assembler or codec.Assembler(request.header)
            assembler.add(request.data)
            if assembler.done:
                answer, assembler = -assembler.array(), None
                for index, data in enumerate(codec.split(answer)):
                    frame = pb.ExecuteResponse(id=request.id, data=data)
                    if index == 0:
                        frame.header.CopyFrom(codec.header_of(answer))
                    yield frame


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    near, far = f"unix:{tmp_path}/near", f"unix:{tmp_path}/far"
    server = grpc.server(ThreadPoolExecutor(4), options=channel.server_options())
    gpu_worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(Negator(), server)
    server.add_insecure_port(far)
    with Recorder(near, far) as running:
        server.start()
        yield running
        server.stop(0).wait()


@pytest.fixture
def stub(recorder: Recorder, tmp_path: Path) -> Iterator[gpu_worker_pb2_grpc.GpuWorkerServiceStub]:
    with grpc.insecure_channel(f"unix:{tmp_path}/near", options=channel.client_options()) as near:
        yield gpu_worker_pb2_grpc.GpuWorkerServiceStub(near)


def frames(number: int, layer: int, array: codec.Array) -> Iterator[pb.ExecuteRequest]:
    for index, data in enumerate(codec.split(array)):
        frame = pb.ExecuteRequest(id=number, data=data)
        if index == 0:
            frame.header.CopyFrom(codec.header_of(array))
            frame.operation.ring_matmul.layer = layer
        yield frame


def test_what_passes_is_recorded_and_unchanged(
    recorder: Recorder, stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub
) -> None:
    sent = [*frames(1, 7, SMALL), *frames(2, 8, LARGE), *frames(3, 9, SMALL + 1)]
    received = list(stub.Execute(iter(sent), timeout=PATIENCE))
    assert [frame.id for frame in received] == [1, 2, 2, 2, 3]
    assert [exchange.operation.ring_matmul.layer for exchange in recorder.exchanges] == [7, 8, 9]
    for exchange, array in zip(recorder.exchanges, (SMALL, LARGE, SMALL + 1), strict=True):
        assert np.array_equal(exchange.up, array)
        assert np.array_equal(exchange.down, -array)


def test_two_streams_are_both_recorded(recorder: Recorder, stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub) -> None:
    for layer in (1, 2):
        assert len(list(stub.Execute(frames(1, layer, SMALL), timeout=PATIENCE))) == 1
    assert [exchange.operation.ring_matmul.layer for exchange in recorder.exchanges] == [1, 2]


def test_the_other_calls_pass(recorder: Recorder, stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub) -> None:
    assert stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).device == "negator"
    assert stub.Load(pb.LoadRequest(model="known"), timeout=PATIENCE) == pb.LoadResponse()
    assert recorder.exchanges == []


def test_a_stream_socket_is_refused(stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub) -> None:
    """What passes there would not be recorded."""
    with pytest.raises(grpc.RpcError):
        stub.Attach(pb.AttachRequest(), timeout=10)
