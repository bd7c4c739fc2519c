"""A raw client of a trusted worker: real sealed frames, status codes as they come, and nothing else."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from wire.sealing import ClientCall
from wire.v1 import trusted_worker_pb2 as pb

SECONDS = 60


@dataclass(frozen=True)
class Opened:
    """A session."""

    name: bytes
    secret: bytes
    response: pb.OpenResponse


class RawClient:
    """Calls over a stub, sealed for the key that the worker offers; nobody verifies it."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub
        self.key: bytes = stub.Attest(pb.AttestRequest(), timeout=SECONDS).hpke_key

    def open(self, request: pb.OpenRequest) -> Opened:
        """Raises grpc.RpcError."""
        call = ClientCall(self.key, "Open")
        response = call.open(self.stub.Open(call.wrap(request), timeout=SECONDS), pb.OpenResponse)
        return Opened(response.session, call.secret, response)

    def call(self, opened: Opened, method: str = "Decode") -> ClientCall:
        return ClientCall(self.key, method, opened.name, opened.secret)

    def stream(self, opened: Opened, requests: Iterable[pb.DecodeRequest]) -> "Stream":
        """A Decode call that sends these, when gRPC asks for them."""
        return Stream(self.call(opened), self.stub.Decode, requests)

    def close(self, opened: Opened) -> None:
        self.stub.Close(self.call(opened, "Close").wrap(pb.CloseRequest()), timeout=SECONDS)


class Stream:
    """A Decode call. Iterating gives messages, and raises grpc.RpcError or SealError. `call` is gRPC's."""

    def __init__(self, seal: ClientCall, decode: Callable[..., Any], requests: Iterable[pb.DecodeRequest]) -> None:
        self._seal = seal
        self.call = decode((seal.wrap(request) for request in requests), timeout=SECONDS)

    def __iter__(self) -> Iterator[pb.DecodeResponse]:
        return self

    def __next__(self) -> pb.DecodeResponse:
        return self._seal.open(next(self.call), pb.DecodeResponse)


def status(stream: Iterable[Any]) -> Any:
    """The error that a stream ends with."""
    try:
        list(stream)
    except grpc.RpcError as error:
        return error
    raise AssertionError("the stream ended well")
