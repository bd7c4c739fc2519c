"""A trusted worker that a client has accepted and that means harm: it holds its key, and says what it is told to.

It takes a grpc.Channel's place. Answers are parts (sealed_frames.py): they are sealed for the call that the client
makes, and then spoilt on the way. It knows which messages may be taken for its own, and notes when another one was.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from tests.fuzz.sealed_frames import EDIT, SEALED, STATUS, changed, edit, message_of, seal
from wire.errors import CleaveError
from wire.sealing import Receiver
from wire.v1 import trusted_worker_pb2 as pb

KEY = b"the key that this worker holds.."  # stands for it in entries
LOOKED_AT = ("body", "nonce")  # what a client reads of a frame
STRANGER = pb.Sealed(body=bytes(400), nonce=bytes(32)).SerializeToString()  # of one who does not hold the key
CODES = list(grpc.StatusCode)
_ENDS = b"\xff\xfe!"  # a frame that begins so is a status: it is no message


class _Status(grpc.RpcError):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._code = CODES[number % len(CODES)]

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "details"


class _Call:
    """A response stream; `answers` is asked in the thread that reads it."""

    def __init__(self, answers: Iterator[Any]) -> None:
        self._answers = answers

    def __iter__(self) -> Iterator[Any]:
        return self._answers

    def cancel(self) -> bool:
        """The client has had enough."""
        return True


class HostileWorker:
    """The channel, and who is at its other end."""

    def __init__(self, receiver: Receiver) -> None:
        self.attested = honest_evidence()
        self.stats = b""
        self.opened: list[bytes] = []  # parts of the answer to Open, and of those of Decode
        self.decoded: list[bytes] = []
        self.uploaded: list[bytes] = []
        self.wrong = ""  # what must not be, and was
        self._receiver = receiver
        self._secret, self._last = b"", STRANGER
        self._may: dict[bytes, list[bytes]] = {}  # messages that a call may take, by its enc

    def unary_unary(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        """A method of one request and one response."""
        answer = {"Attest": self._attest, "Stats": self._stats, "Open": self._open, "Close": self._close}
        return answer[path.rpartition("/")[2]]

    def stream_stream(self, *_: Any, **__: Any) -> Callable[..., Any]:
        """Decode."""
        return lambda requests, **_: _Call(self._decode(requests))

    def stream_unary(self, *_: Any, **__: Any) -> Callable[..., Any]:
        """Upload."""
        return self._upload

    def close(self) -> None:
        """It has nothing to close."""

    def taken(self, enc: bytes, message: Message) -> None:
        """A client's call took this for ours: is it the one whose turn it is?"""
        due = self._may.get(enc, [])
        right = [type(message).FromString(one).SerializeToString() for one in due[:1]]
        if right != [message.SerializeToString()]:
            self.wrong = "client: a message that nobody sent in this place was taken"
        self._may[enc] = due[1:]

    def _attest(self, *_: Any, **__: Any) -> Any:
        answer = _parse(pb.AttestResponse, self.attested)
        if answer.hpke_key == KEY:
            answer.hpke_key = self._receiver.public_key
        return answer

    def _stats(self, *_: Any, **__: Any) -> Any:
        return _parse(pb.StatsResponse, self.stats)

    def _close(self, *_: Any, **__: Any) -> Any:
        return pb.Sealed()

    def _open(self, sealed: pb.Sealed, **_: Any) -> Any:
        frames = self._answer(sealed, "Open", pb.OpenRequest, self.opened)
        return _parse(pb.Sealed, frames[0] if frames else b"")

    def _upload(self, requests: Iterator[pb.Sealed], **_: Any) -> Any:
        frames = self._answer(next(requests), "Upload", pb.UploadRequest, self.uploaded)
        list(requests)  # nobody looks at what else the client seals
        return _parse(pb.Sealed, frames[0] if frames else b"")

    def _decode(self, requests: Iterator[pb.Sealed]) -> Iterator[Any]:
        first = next(requests, None)
        if first is not None:
            for frame in self._answer(first, "Decode", pb.DecodeRequest, self.decoded):
                yield _parse(pb.Sealed, frame)

    def _answer(self, sealed: pb.Sealed, method: str, kind: type[Message], parts: list[bytes]) -> list[bytes]:
        """The frames that arrive at the client."""
        secret_of = (lambda _: self._secret) if sealed.session else None
        try:
            call, _ = self._receiver.accept(sealed, method, kind, secret_of)
        except CleaveError:  # the client sealed it for another key
            return [STRANGER]
        if method == "Open":
            self._secret = call.secret
        said = [part for part in parts if part[:1] != EDIT]
        sent = [seal(call, part) if part[:1] in SEALED else _bare(part) for part in said]
        arrived = edit(sent, [part for part in parts if part[:1] == EDIT], self._last)
        self._last = sent[0] if sent else STRANGER
        end = changed(sent, arrived, LOOKED_AT)
        ours = zip(said, arrived[:end], strict=False)
        self._may[sealed.enc] = [message_of(part) for part, _ in ours if part[:1] in SEALED]
        return arrived


def honest_evidence() -> bytes:
    """An AttestResponse of provider none."""
    return pb.AttestResponse(provider="none", nonce=bytes(32), hpke_key=KEY, claims=b"{}").SerializeToString()


def _bare(part: bytes) -> bytes:
    return (_ENDS if part[:1] == STATUS else b"") + part[1:]


def _parse(kind: Any, data: bytes) -> Any:
    """What gRPC makes of a frame."""
    if data.startswith(_ENDS):
        raise _Status(data[-1])
    try:
        return kind.FromString(data)
    except DecodeError:
        raise _Status(CODES.index(grpc.StatusCode.INTERNAL)) from None
