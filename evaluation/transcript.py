"""What the GPU worker sees: every exchange, recorded on its way between the two workers.

The recorder stands where the GPU worker is expected, speaks its protocol and passes everything on as it is. It keeps
what a curious GPU worker could keep, and knows nothing else.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import grpc

from wire import channel, codec
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc


@dataclass(frozen=True)
class Exchange:
    """One call: what was asked, the tensor that went up to the GPU worker, the tensor that came back."""

    operation: pb.Operation
    up: codec.Array
    down: codec.Array


class Recorder(gpu_worker_pb2_grpc.GpuWorkerServiceServicer):
    """Listens at `listen` while its `with` block lasts, and forwards to `target`. `exchanges` holds what passed."""

    def __init__(self, listen: str, target: str) -> None:
        self.exchanges: list[Exchange] = []
        self._channel = grpc.insecure_channel(target, options=channel.client_options())
        self._stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(self._channel)
        self._server = grpc.server(ThreadPoolExecutor(4), options=channel.server_options())
        gpu_worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(listen)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()
        self._channel.close()

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:  # noqa: N802
        """Forwarded. The GPU worker may still be starting."""
        return self._stub.Describe(request, wait_for_ready=True)

    def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:  # noqa: N802
        """Forwarded."""
        return self._stub.Load(request)

    def Attach(self, request: pb.AttachRequest, context: Any) -> Any:  # noqa: N802
        """Refused: what passes on a stream socket would not be recorded."""
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "there is no stream socket here")

    def Execute(  # noqa: N802
        self, requests: Iterator[pb.ExecuteRequest], context: Any
    ) -> Iterator[pb.ExecuteResponse]:
        """Forwarded and recorded. Answers come in the order of the calls."""
        asked: deque[tuple[pb.Operation, codec.Array]] = deque()
        answers = _Tensors()
        for response in self._stub.Execute(_noting(requests, asked)):
            down = answers.add(response)
            if down is not None:
                operation, up = asked.popleft()
                self.exchanges.append(Exchange(operation, up, down))
            yield response


class _Tensors:
    """Puts the tensors of one direction together."""

    def __init__(self) -> None:
        self._assembler: codec.Assembler | None = None

    def add(self, frame: pb.ExecuteRequest | pb.ExecuteResponse) -> codec.Array | None:
        """The next frame; the tensor when this was its last one."""
        self._assembler = self._assembler or codec.Assembler(frame.header)
        self._assembler.add(frame.data)
        if not self._assembler.done:
            return None
        array, self._assembler = self._assembler.array(), None
        return array


def _noting(
    requests: Iterator[pb.ExecuteRequest], asked: deque[tuple[pb.Operation, codec.Array]]
) -> Iterator[pb.ExecuteRequest]:
    """Pass requests on; every complete call joins `asked` before its last frame leaves."""
    tensors, operation = _Tensors(), pb.Operation()
    with suppress(grpc.RpcError):  # the trusted worker ended the stream
        for request in requests:
            if request.HasField("operation"):
                operation = request.operation
            up = tensors.add(request)
            if up is not None:
                asked.append((operation, up))
            yield request
