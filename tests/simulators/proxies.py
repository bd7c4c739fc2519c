"""A GPU worker between the trusted worker and a real one: it records every request, and may change every answer.

Speaks the real protocol over a real socket; runs on threads of the test's process.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from wire import channel
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

Tamper = Callable[[pb.ExecuteResponse], list[pb.ExecuteResponse]]


class Proxy(gpu_worker_pb2_grpc.GpuWorkerServiceServicer):
    """Forwards to `target`; `requests` holds what the GPU worker received, `tamper` may change what it answers."""

    def __init__(self, target: str, listen: str) -> None:
        self.requests: list[pb.ExecuteRequest] = []
        self.tamper: Tamper | None = None
        self._channel = grpc.insecure_channel(target, options=channel.client_options())
        self._stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(self._channel)
        self._server = grpc.server(ThreadPoolExecutor(8), options=channel.server_options())
        gpu_worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(listen)
        self._server.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.stop(0)
        self._channel.close()

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """Forwarded."""
        return self._stub.Describe(request)

    def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        """Forwarded."""
        return self._stub.Load(request)

    def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachResponse:
        """Forwarded; calls on the socket do not pass here."""
        return self._stub.Attach(request)

    def Execute(self, requests: Iterator[pb.ExecuteRequest], context: Any) -> Iterator[pb.ExecuteResponse]:
        """Forwarded, recorded, and tampered with."""
        for response in self._stub.Execute(self._record(requests)):
            yield from self.tamper(response) if self.tamper else [response]

    def _record(self, requests: Iterator[pb.ExecuteRequest]) -> Iterator[pb.ExecuteRequest]:
        with suppress(grpc.RpcError):  # the trusted worker closed the stream
            for request in requests:
                self.requests.append(request)
                yield request
