"""Calls as one long-lived RPC, Execute. gRPC reads and writes in threads of its own."""

import queue
from typing import Any

import grpc

from wire.errors import UnavailableError
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc


class GrpcPlane:
    """A stream. Errors of gRPC become UnavailableError, without the worker's text."""

    def __init__(self, stub: gpu_worker_pb2_grpc.GpuWorkerServiceStub) -> None:
        self._requests: queue.SimpleQueue[pb.ExecuteRequest | None] = queue.SimpleQueue()
        self._responses: Any = stub.Execute(iter(self._requests.get, None))
        self._data = b""

    @property
    def ended(self) -> bool:
        """See Plane."""
        return not self._responses.is_active()

    def send(self, frame: pb.ExecuteRequest, data: memoryview) -> int:
        """See Plane."""
        total = _total(frame.ByteSize(), len(data))
        frame.data = bytes(data)
        self._requests.put(frame)
        return total

    def receive(self) -> tuple[pb.ExecuteResponse, int, int]:
        """See Plane."""
        try:
            frame: pb.ExecuteResponse = next(self._responses)
        except StopIteration:
            raise UnavailableError("the GPU worker closed the stream") from None
        except grpc.RpcError as error:
            raise unavailable(error) from None
        self._data = frame.data
        frame.ClearField("data")
        return frame, len(self._data), _total(frame.ByteSize(), len(self._data))

    def take(self, place: memoryview) -> None:
        """See Plane."""
        place[:], self._data = self._data, b""

    def cancel(self) -> None:
        """See Plane."""
        self._responses.cancel()

    def close(self) -> None:
        """See Plane. The channel's end ends the rest."""
        self._requests.put(None)


def _total(rest: int, data: int) -> int:
    """Bytes of a message by those of its other fields: ByteSize would serialise its data to count them."""
    return rest + (1 + -(-data.bit_length() // 7) + data if data else 0)


def unavailable(error: Any) -> UnavailableError:
    """The worker's status in our own words: it is untrusted, so its text goes nowhere."""
    code: grpc.StatusCode = error.code()
    return UnavailableError(f"the GPU worker is not available ({code.name})")
