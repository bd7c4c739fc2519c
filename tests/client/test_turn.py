"""How a Decode call ends."""

import threading
from collections.abc import Iterator

import grpc

from client.turn import DecodeStream
from wire.sealing import ClientCall, Receiver
from wire.v1 import trusted_worker_pb2 as pb

PATIENCE = 0.2  # for something that must not happen


class Cancelled(grpc.RpcError):
    """As gRPC says it."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        return ""


class QuickServer:
    """A call whose server ends it as soon as nothing more can come; a cancel takes a while to get there."""

    def __init__(self, requests: Iterator[pb.Sealed]) -> None:
        self._requests, self._over, self._cancelled = requests, threading.Event(), False
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        for _ in self._requests:
            pass
        self._over.set()

    def __iter__(self) -> Iterator[pb.Sealed]:
        self._over.wait()
        if self._cancelled:
            raise Cancelled
        return iter(())

    def cancel(self) -> None:
        self._cancelled = not self._over.wait(PATIENCE)
        self._over.set()


def test_a_call_that_this_side_closes_is_not_lost() -> None:
    """A loss has the peer verified again, and says so to everybody."""
    losses: list[bool] = []
    stream = DecodeStream(QuickServer, ClientCall(Receiver().public_key, "Decode"), lambda: losses.append(True))
    stream.close()
    assert losses == []
