"""Calls of a live trusted worker: sealed for its key as it is now, then changed, repeated or dropped on the way.

What must be, whatever was sealed: a frame that arrives in its place is what was sent, or the call is refused. A first
frame that was changed, or that came before, is UNAUTHENTICATED and hurts no session; a later one ends the call with
DATA_LOSS, and its session. What the worker answers opens in its place.
"""

import contextlib
import queue
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from tests.fuzz.harness import Bug
from tests.fuzz.sealed_frames import EDIT, RAW, SEALED, changed, edit, message_of, parses, seal
from tests.sealed import Opened, RawClient
from wire.errors import CleaveError
from wire.sealing import ClientCall
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

REPLAYED, VALID = 1, 2  # flags of an entry: its first frame comes again; its messages have nothing wrong
LOOKED_AT = ("body", "enc", "session")  # what the worker reads of a frame; of a later one, that the others are empty
OF_A_SESSION, UNARY = ("Decode", "Close"), ("Open", "Close")
ENDS = ("UNAUTHENTICATED", "DATA_LOSS", "OUT_OF_RANGE")  # after these another session is better
MESSAGES: dict[str, tuple[type[Message], type[Message]]] = {
    "Decode": (pb.DecodeRequest, pb.DecodeResponse),
    "Open": (pb.OpenRequest, pb.OpenResponse),
    "Close": (pb.CloseRequest, pb.CloseResponse),
    "Upload": (pb.UploadRequest, pb.UploadResponse),
}
SESSION_SECONDS = 1.0  # a session lives on without a stream
SECONDS = 20
Send = Callable[[str, list[bytes]], tuple[str, list[bytes]]]  # method and frames to status and answers


class SealedCaller:
    """`send` makes a call of frames as bytes. `request` opens a session."""

    def __init__(self, channel: grpc.Channel, send: Send, request: pb.OpenRequest) -> None:
        self._stub: Any = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(channel)
        self._send, self._request = send, request
        self._client = RawClient(self._stub)
        self._session: Opened | None = None
        self._last = b""  # a first frame that was accepted once

    def open(self) -> Opened:
        """A new session, when there is room for one. Raises Bug when there is none for long."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return self._client.open(self._request)
            except grpc.RpcError as error:
                code = error.code()
            if code is grpc.StatusCode.UNAUTHENTICATED and self._renewed():
                continue
            if code is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > deadline:
                raise Bug(f"sockets: a session is refused with {code.name}")
            time.sleep(SESSION_SECONDS / 4)

    def play(self, method: str, flags: int, parts: list[bytes]) -> str:
        """The status that comes of it. Raises Bug."""
        while True:
            code = self._play(method, flags, parts)
            if code != "UNAUTHENTICATED" or not self._renewed():
                return code

    def tokens(self, session: Opened, request: pb.DecodeRequest, count: int) -> list[bytes]:
        """What the first answers of a turn say."""
        seal = self._client.call(session)
        requests: queue.SimpleQueue[pb.Sealed | None] = queue.SimpleQueue()  # left open: its end is the turn's
        requests.put(seal.wrap(request))
        answers = self._stub.Decode(iter(requests.get, None), timeout=SECONDS)
        said = [seal.open(next(answers), pb.DecodeResponse).SerializeToString() for _ in range(count)]
        requests.put(None)
        answers.cancel()
        return said

    def close(self, session: Opened) -> None:
        """End a session, if the worker still has the key that knows it."""
        with contextlib.suppress(grpc.RpcError):
            self._client.close(session)

    def _play(self, method: str, flags: int, parts: list[bytes]) -> str:
        edits = [part for part in parts if part[:1] == EDIT]
        said = [part for part in parts if part[:1] != EDIT] or [RAW]
        strict = bool(edits) or bool(flags & REPLAYED)
        began, session = time.monotonic(), self._some(strict) if method in OF_A_SESSION else None
        call = self._client.call(session, method) if session else ClientCall(self._client.key, method)
        sent = [seal(call, part) if part[:1] in SEALED else part[1:] for part in said]
        arrived = edit(sent, edits, self._last)
        if method in UNARY:
            arrived = (arrived or [b""])[:1]
        code, answers = self._send(method, arrived)
        self._take(call, method, answers)
        at = changed(sent, arrived, LOOKED_AT)
        late = time.monotonic() - began > SESSION_SECONDS / 2
        if code == "UNAUTHENTICATED" and (late or self._stale()):  # nothing can be said then
            self._session = None
            return code
        if at is not None and all(part[:1] in SEALED for part in said):
            self._judge(method, code, at, len(said), arrived[at], bool(flags & VALID))
        if at is None and arrived:
            self._last = arrived[0]
            if flags & REPLAYED:
                self._replay(method, said[0], arrived[0])
        if session and strict:
            self._look_at(session, code, lives=method == "Decode" and (at == 0 or code == "OK"))
        elif session and (code in ENDS or method == "Close"):
            self._session = None
        return code

    def _judge(self, method: str, code: str, at: int, sent: int, frame: bytes, valid: bool) -> None:
        """Frame `at` is not what was sent in its place."""
        if method == "Upload" and at >= sent:  # the upload was complete by then: nobody reads on
            return
        right = {"INVALID_ARGUMENT"} if not parses(pb.Sealed, frame) else {"DATA_LOSS"}
        if at == 0:
            right = {"INVALID_ARGUMENT", "UNAUTHENTICATED"}
        if code == "OK" or ((valid or at == 0) and code not in right):
            raise Bug(f"sockets: {method} ends with {code} though a frame was changed on the way")

    def _replay(self, method: str, part: bytes, frame: bytes) -> None:
        """The same first frame once more. One that has no message in it was not taken, and is not known."""
        if part[:1] in SEALED and parses(MESSAGES[method][0], message_of(part)):
            code, _ = self._send(method, [frame])
            if code != "UNAUTHENTICATED":
                raise Bug(f"sockets: a repeated {method} ends with {code}")

    def _look_at(self, session: Opened, code: str, lives: bool) -> None:
        """Whether a session of our own is still there, as it must be, or is not, as it must not."""
        began = time.monotonic()
        first = self._client.call(session).wrap(pb.DecodeRequest()).SerializeToString()
        found, _ = self._send("Decode", [first])
        wrong = code == "DATA_LOSS" if found == "OK" else lives or found != "UNAUTHENTICATED"
        if wrong and time.monotonic() - began < SESSION_SECONDS / 2 and not self._stale():
            raise Bug(f"sockets: after {code} a session answers {found}")
        if found == "OK":
            self.close(session)

    def _take(self, call: ClientCall, method: str, answers: list[bytes]) -> None:
        """What was answered: it opens, in order. A session that was opened is closed again."""
        for answer in answers:
            try:
                message = call.open(pb.Sealed.FromString(answer), MESSAGES[method][1])
            except CleaveError as error:
                raise Bug(f"sockets: an answer of {method} does not open: {error}") from None
            if isinstance(message, pb.OpenResponse):
                self.close(Opened(message.session, call.secret, message))

    def _some(self, fresh: bool) -> Opened:
        if fresh:
            return self.open()
        if self._session is None:
            self._session = self.open()
        return self._session

    def _stale(self) -> bool:
        """Whether the worker has another key than the one that calls were sealed for."""
        return bytes(self._stub.Attest(pb.AttestRequest(), timeout=SECONDS).hpke_key) != self._client.key

    def _renewed(self) -> bool:
        """The same, and from now on calls are sealed for the new one."""
        if not self._stale():
            return False
        self._client, self._session = RawClient(self._stub), None
        return True
