"""The client against a hostile trusted worker: attest, open, stats and whole turns over a channel made of bytes.

Entries: A and S, an AttestResponse and a StatsResponse; D, the Sealed of an OpenResponse and of each DecodeResponse.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from client import session as client
from client.attestation.policy import Policy, verify
from client.turn import Pacing
from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.mutate import Mutator
from wire.sealing import NoSeal
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb

TARGET = "127.0.0.1:1"
PROMPT, ANSWER = [1, 2, 3], [4, 5, 6, 7]
STATUS = b"\xff\xfe!"  # a frame that begins so is a status, not a message


class _Status(grpc.RpcError):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._code = list(grpc.StatusCode)[number % len(grpc.StatusCode)]

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "details"


def _parse(kind: Any, data: bytes) -> Any:
    """What gRPC makes of a frame."""
    if data.startswith(STATUS):
        raise _Status(data[-1])
    try:
        return kind.FromString(data)
    except DecodeError:
        raise _Status(13) from None


class _Call:
    """A response stream."""

    def __init__(self, kind: Any, frames: list[bytes]) -> None:
        self._kind, self._frames = kind, frames

    def __iter__(self) -> Iterator[Any]:
        for frame in self._frames:
            yield _parse(self._kind, frame)

    def cancel(self) -> bool:
        """The client has had enough."""
        return True


class _Channel:
    """A grpc.Channel whose peer says what it is told to, by the method's name."""

    def __init__(self) -> None:
        self.answers: dict[str, list[bytes]] = {}

    def unary_unary(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        """A method of one request and one response."""
        name = path.rpartition("/")[2]
        kind = {"Attest": pb.AttestResponse, "Stats": pb.StatsResponse}.get(name, pb.Sealed)
        return lambda *_, **__: _parse(kind, self.answers.get(name, [b""])[0])

    def stream_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        """A method of streams."""
        return lambda *_, **__: _Call(pb.Sealed, self.answers.get(path.rpartition("/")[2], []))

    def close(self) -> None:
        """It has nothing to close."""


class ClientTarget:
    """Fresh for every entry."""

    name = "client"

    def __init__(self, folders: dict[str, Path]) -> None:
        self._seal = NoSeal()
        self._request = client.Request("llama", "tee-only", "int8", model_folder=folders["llama"])

    def begin(self) -> None:
        """See Target."""

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        mutator, way = Mutator(random), random.random()
        if way < 0.15:
            return b"A" + mutator.message(pb.AttestResponse(provider="none", evidence=b"")), 1
        if way < 0.25:
            return b"S" + mutator.message(pb.StatsResponse(scheme="tee-only", pads_in_stock=5)), 1
        whole: list[Any] = honest(client_embeds=random.random() < 0.3)
        frames = [self._wrap(message) for message in whole]
        place = random.choice((0, *range(len(frames))))
        if random.random() < 0.15:
            frames[place] = mutator.message(self._seal.wrap(whole[place]))
        else:
            frames[place] = pb.Sealed(body=mutator.message(whole[place])).SerializeToString()
        way = random.random()
        if way < 0.1:
            frames.insert(random.randrange(len(frames) + 1), STATUS + bytes([random.randrange(17)]))
        elif way < 0.2:
            frames.insert(random.randrange(1, len(frames) + 1), random.choice(frames))
        elif way < 0.25:
            frames.pop()
        return b"D" + pack(frames), 1

    def play(self, entry: bytes) -> str:
        """See Target."""
        channel: Any = _Channel()
        kind, body = entry[:1], entry[1:]
        if kind == b"A":
            channel.answers["Attest"] = [body]
            return f"attested: {client._attest(channel, TARGET, Policy(), 1.0).provider}"
        trusted = client.TrustedWorker(channel, verify(TARGET, "none", Policy()))
        if kind == b"S":
            channel.answers["Stats"] = [body]
            trusted.counters()
            return "counted"
        frames = unpack(body)
        channel.answers = {"Open": frames[:1] or [b""], "Decode": frames[1:], "Close": [b""]}
        return self._turn(trusted)

    def end(self) -> None:
        """See Target."""

    def check(self) -> None:
        """See Target."""
        for client_embeds in (False, True):
            if self.play(b"D" + pack(map(self._wrap, honest(client_embeds)))) != "answered: eos":
                raise Bug("client: an honest turn has another end")

    def close(self) -> None:
        """See Target."""

    def _turn(self, trusted: client.TrustedWorker) -> str:
        session = trusted.open(self._request)
        try:
            turn = session.turn(PROMPT, Pacing(credit=3, max_new_tokens=6, step_seconds=5.0))
            tokens = [token.token_id for token in turn]
            if len(tokens) > 6 or session.context != PROMPT + tokens or not session.ready:
                raise Bug("client: it lost count of the context")
            return f"answered: {turn.finish_reason}"
        finally:
            session.close()

    def _wrap(self, message: Any) -> bytes:
        return self._seal.wrap(message).SerializeToString()


def honest(client_embeds: bool = False) -> list[Any]:
    """An OpenResponse, tokens and a FINAL."""
    opened = pb.OpenResponse(
        session=bytes(16),
        model="llama",
        scheme="tee-only",
        precision=gpu.PRECISION_INT8,
        max_context=64,
        vocabulary=31,
        max_frame_tokens=4096,
        client_embeds=client_embeds,
        hidden=16,
    )
    tokens = [pb.Token(token_id=one, logprob=-0.5, top=[pb.Logprob(token_id=one, logprob=-0.5)]) for one in ANSWER]
    final = pb.Final(reason=pb.FINISH_REASON_EOS, context_tokens=len(PROMPT) + len(ANSWER))
    return [opened, *[pb.DecodeResponse(token=one) for one in tokens], pb.DecodeResponse(final=final)]
