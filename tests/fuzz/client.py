"""The client against a hostile trusted worker that holds its key: attest, open, stats and whole turns.

Entries: A and S, an AttestResponse, of which the client then opens a session and has a turn, and a StatsResponse; D,
what is said to a turn: parts (sealed_frames.py), first those of the answer to Open, then those of Decode; U, the parts
of the answer to Upload.
"""

import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from google.protobuf.message import Message

from client import session as client
from client.attestation.policy import Policy
from client.turn import Pacing
from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.hostile_worker import KEY, LOOKED_AT, HostileWorker
from tests.fuzz.mutate import Mutator
from tests.fuzz.sealed_frames import PLAIN, RAW, STATUS, draw_edit, padded
from tests.fuzz.uploads import adapter
from wire.sealing import ClientCall, Receiver
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb

TARGET = "127.0.0.1:1"
PROMPT, ANSWER = [1, 2, 3], [4, 5, 6, 7]
ADAPTER = b"an adapter, here"
SECONDS = 5.0
ODD_KEYS = (  # of X25519: no point, points of small order, one that is not reduced
    b"",
    bytes(31),
    bytes(32),
    (1).to_bytes(32, "little"),
    (325606250916557431795983626356110631294008115727848805560023387167927233504).to_bytes(32, "little"),
    ((1 << 255) - 20).to_bytes(32, "little"),
    ((1 << 255) - 19).to_bytes(32, "little"),
    ((1 << 255) - 18).to_bytes(32, "little"),
    b"\xff" * 32,
    b"\x09" + bytes(31),
)


class ClientTarget:
    """Fresh for every entry, but for the worker's key."""

    name = "client"

    def __init__(self, folders: dict[str, Path]) -> None:
        self._request = client.Request("llama", "tee-only", "int8", model_folder=folders["llama"])
        self._adapter: dict[str, Any] = {"adapter_folder": folders["llama"].parent / "adapter"}
        self._adapter["adapter_folder"].mkdir(exist_ok=True)
        for name, data in zip(("adapter_config.json", "adapter_model.safetensors"), adapter(2), strict=True):
            (self._adapter["adapter_folder"] / name).write_bytes(data)

    def begin(self) -> None:
        """See Target."""
        self._receiver = Receiver()

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        mutator, way = Mutator(random), random.random()
        if way < 0.12:
            return b"A" + _evidence(random, mutator), 1
        if way < 0.2:
            return b"S" + mutator.message(pb.StatsResponse(scheme="tee-only", pads_in_stock=5)), 1
        if way < 0.25:
            return b"U" + pack(_uploaded(random, mutator)), 1
        opened, *rest = honest(client_embeds=random.random() < 0.3)
        parts, place = [[_part(opened)], list(map(_part, rest))], random.choice((0, 0, 1, 1, 1, 1, 1))
        if way < 0.4:
            parts[place] += [draw_edit(random, len(parts[place]), LOOKED_AT) for _ in range(random.choice((1, 1, 2)))]
            return b"D" + pack(map(pack, parts)), 1
        which = random.randrange(len(parts[place]))
        parts[place][which] = _spoilt(random, mutator, rest[which] if place else opened)
        way = random.random()
        if way < 0.1:
            parts[random.randrange(2)].insert(0, STATUS + bytes([random.randrange(17)]))
        elif way < 0.2:
            parts[1].insert(random.randrange(len(parts[1]) + 1), random.choice(parts[1]))
        elif way < 0.25:
            parts[1].pop()
        return b"D" + pack(map(pack, parts)), 1

    def play(self, entry: bytes) -> str:
        """See Target."""
        worker, kind, body = HostileWorker(self._receiver), entry[:1], entry[1:]
        opened, *rest = honest()
        opened.adapter = ADAPTER if kind == b"U" else b""
        worker.opened, worker.decoded = [_part(opened)], list(map(_part, rest))
        if kind == b"U":
            worker.uploaded = unpack(body)
        if kind == b"A":
            worker.attested = body
        if kind == b"D":
            worker.opened, worker.decoded = (*map(unpack, unpack(body)), [], [])[:2]
        if kind == b"S":
            worker.stats = body
        return self._watched(worker, kind)

    def end(self) -> None:
        """See Target."""

    def check(self) -> None:
        """See Target."""
        self.begin()
        for client_embeds in (False, True):
            opened, *rest = honest(client_embeds)
            if self.play(b"D" + pack([pack([_part(opened)]), pack(map(_part, rest))])) != "answered: eos":
                raise Bug("client: an honest turn has another end")

    def close(self) -> None:
        """See Target."""

    def _watched(self, worker: HostileWorker, kind: bytes) -> str:
        """What comes of a client of this worker. Raises Bug when it takes a message that it must not take."""
        fallen: list[Any] = []
        original = ClientCall.open

        def open_(call: ClientCall, sealed: pb.Sealed, of: type[Message]) -> Message:
            message = original(call, sealed, of)
            worker.taken(call._context.enc, message)
            return message

        try:
            with (
                mock.patch("client.session.grpc.insecure_channel", return_value=worker),
                mock.patch.object(ClientCall, "open", open_),
                mock.patch("threading.excepthook", fallen.append),
            ):
                return self._connect(kind)
        finally:
            if fallen:
                raise fallen[0].exc_value
            if worker.wrong:
                raise Bug(worker.wrong)

    def _connect(self, kind: bytes) -> str:
        with client.TrustedWorker(TARGET, Policy(), SECONDS) as trusted:
            if kind == b"S":
                trusted.counters()
                return "counted"
            return self._turn(trusted, replace(self._request, **self._adapter) if kind == b"U" else self._request)

    def _turn(self, trusted: client.TrustedWorker, request: client.Request) -> str:
        session = trusted.open(request)
        try:
            turn = session.turn(PROMPT, Pacing(credit=3, max_new_tokens=6, step_seconds=SECONDS))
            tokens = [token.token_id for token in turn]
            if len(tokens) > 6 or session.context != PROMPT + tokens or not session.ready:
                raise Bug("client: it lost count of the context")
            return f"answered: {turn.finish_reason}"
        finally:
            session.close()
            if any(thread.name == "decode-reader" for thread in threading.enumerate()):
                raise Bug("client: the thread of a closed session goes on")


def honest(client_embeds: bool = False) -> list[Any]:
    """An OpenResponse, tokens and a FINAL."""
    opened = pb.OpenResponse(
        session=b"a session's name",
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


def _evidence(random: Random, mutator: Mutator) -> bytes:
    """An AttestResponse of provider none; half the time all is well but for the key."""
    answer = pb.AttestResponse(provider="none", nonce=random.randbytes(32), hpke_key=KEY, claims=b"{}")
    if random.random() < 0.5:
        answer.hpke_key = random.choice((*ODD_KEYS, random.randbytes(32)))
        return answer.SerializeToString()
    return mutator.message(answer)


def _uploaded(random: Random, mutator: Mutator) -> list[bytes]:
    """Parts of an answer to Upload."""
    answer = pb.UploadResponse(adapter=ADAPTER, size=4096)
    if random.random() < 0.4:
        return [_part(answer), draw_edit(random, 1, LOOKED_AT)]
    return [_spoilt(random, mutator, answer)]


def _part(message: Message) -> bytes:
    return PLAIN + message.SerializeToString()


def _spoilt(random: Random, mutator: Mutator, message: Message) -> bytes:
    """A part with something wrong: the message, its padding, or all of the frame."""
    way = random.random()
    if way < 0.8:
        return PLAIN + mutator.message(message)
    if way < 0.9:
        return padded(mutator, message)
    frame = pb.Sealed(body=random.randbytes(480), nonce=random.choice((b"", random.randbytes(32))))
    return RAW + mutator.message(frame)
