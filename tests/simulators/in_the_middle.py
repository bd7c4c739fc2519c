"""Somebody on the network between client and trusted worker: sees, keeps and changes whatever passes.

Frames of a call pass one by one; a hook gets the method, the number of the frame in its direction, and the frame, and
says what goes on: none, it, or others. `passed` is every message as bytes, of both directions.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from wire.channel import client_options, server_options
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

Hook = Callable[[str, int, pb.Sealed], list[pb.Sealed]]
SECONDS = 60


def _honest(method: str, number: int, frame: pb.Sealed) -> list[pb.Sealed]:
    return [frame]


class InTheMiddle(trusted_worker_pb2_grpc.TrustedWorkerServiceServicer):
    """`up` and `down` change frames to and from the worker, `attest` its answer to Attest."""

    def __init__(self, target: str) -> None:
        self.up: Hook = _honest
        self.down: Hook = _honest
        self.attest: Callable[[pb.AttestResponse], pb.AttestResponse] = lambda answer: answer
        self.sent: list[tuple[str, pb.Sealed]] = []  # by clients
        self.passed: list[bytes] = []
        self.nonces: list[bytes] = []
        self._channel = grpc.insecure_channel(target, options=client_options())
        self.stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self._channel)
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=server_options())
        trusted_worker_pb2_grpc.add_TrustedWorkerServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait(5)
        self._channel.close()

    def Attest(self, request: pb.AttestRequest, context: grpc.ServicerContext) -> pb.AttestResponse:
        self.nonces.append(request.nonce)
        return self.attest(_relayed(lambda: self.stub.Attest(request, timeout=SECONDS), context))

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> Any:
        return _relayed(lambda: self.stub.Stats(request, timeout=SECONDS), context)

    def Open(self, request: pb.Sealed, context: grpc.ServicerContext) -> pb.Sealed:
        return self._unary("Open", self.stub.Open, request, context)

    def Close(self, request: pb.Sealed, context: grpc.ServicerContext) -> pb.Sealed:
        return self._unary("Close", self.stub.Close, request, context)

    def Upload(self, request_iterator: Iterator[pb.Sealed], context: grpc.ServicerContext) -> pb.Sealed:
        def forward() -> Any:
            return self.stub.Upload(self._frames("Upload", request_iterator), timeout=SECONDS)

        return next(self._answers("Upload", iter([_relayed(forward, context)])))

    def Decode(self, request_iterator: Iterator[pb.Sealed], context: grpc.ServicerContext) -> Iterator[pb.Sealed]:
        call = self.stub.Decode(self._frames("Decode", request_iterator), timeout=SECONDS)

        def leave() -> None:
            call.cancel()

        context.add_callback(leave)
        try:
            yield from self._answers("Decode", call)
        except grpc.RpcError as error:
            _pass_on(error, context)

    def _unary(self, name: str, method: Any, request: pb.Sealed, context: grpc.ServicerContext) -> pb.Sealed:
        frame = next(self._frames(name, iter([request])))
        return next(self._answers(name, iter([_relayed(lambda: method(frame, timeout=SECONDS), context)])))

    def _frames(self, name: str, frames: Iterator[pb.Sealed]) -> Iterator[pb.Sealed]:
        try:
            for number, frame in enumerate(frames):
                self.sent.append((name, frame))
                self.passed.append(frame.SerializeToString())
                yield from self.up(name, number, frame)
        except grpc.RpcError:
            return

    def _answers(self, name: str, frames: Iterator[pb.Sealed]) -> Iterator[pb.Sealed]:
        for number, frame in enumerate(frames):
            self.passed.append(frame.SerializeToString())
            yield from self.down(name, number, frame)


@contextmanager
def in_the_middle(target: str) -> Iterator[InTheMiddle]:
    """One that stops at the end."""
    one = InTheMiddle(target)
    try:
        yield one
    finally:
        one.stop()


def _relayed(call: Callable[[], Any], context: grpc.ServicerContext) -> Any:
    try:
        return call()
    except grpc.RpcError as error:
        _pass_on(error, context)


def _pass_on(error: Any, context: grpc.ServicerContext) -> None:
    context.abort(error.code(), error.details())
