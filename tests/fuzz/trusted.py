"""The trusted worker without a socket and below the seal: Service and Session, then steps of the engine.

Entries: W, which world; A, an AttestRequest; O, D and C, the frame of Open, Decode and Close, as Plain has it
(sealed_frames.py); U, the frames of an upload; T, a few steps.
"""

import asyncio
import itertools
import logging
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from google.protobuf.message import DecodeError

from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.mutate import Mutator
from tests.fuzz.sealed_frames import Plain
from tests.fuzz.tiny import CONTEXT, VOCABULARY
from tests.fuzz.uploads import spoilt, valid
from tests.fuzz.worlds import ADAPTERS, KEY, WORLDS, World
from wire.errors import CleaveError, SealError
from wire.v1 import trusted_worker_pb2 as pb

PROMPT = [3, 1, 4, 1, 5]
SECRET = bytes(range(32))


class TrustedTarget:
    """All worlds, one at a time."""

    name = "trusted"

    def __init__(self, folders: dict[str, Path]) -> None:
        self._names = itertools.count(1)
        self._patch = mock.patch("trusted_worker.service.secrets.token_bytes", self._token_bytes)
        self._logged: list[str] = []
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self._logged.append(record.getMessage())  # type: ignore[method-assign]
        self._log = logging.getLogger("trusted_worker")
        self._log.addHandler(self._handler)
        self._log.propagate = False
        self._worlds = [World(folders, index) for index in range(len(WORLDS))]
        self._seal, self._loop = Plain(), asyncio.new_event_loop()
        self._world: World | None = None

    def begin(self) -> None:
        """See Target."""
        self._world, self._names = None, itertools.count(1)
        self._granted: dict[bytes, int] = {}
        self._adapters: list[bytes] = []
        self._events: list[tuple[bytes, Any]] = []
        self._emitters: dict[bytes, Any] = {}
        self._recent: list[bytes] = []
        self._logged.clear()

    def next(self, random: Random) -> tuple[bytes, int]:  # noqa: PLR0911
        """See Target."""
        if self._world is None:
            return b"W" + bytes([random.randrange(len(WORLDS))]), 0
        if self._granted == {} and random.random() < 0.5:
            return b"O" + self._seal.wrap(self._world.request()).SerializeToString(), 0
        mutator, way = Mutator(random, self._recent), random.random()
        if way < 0.05:
            return b"T", 0
        if way < 0.1:
            return b"A" + mutator.message(pb.AttestRequest(nonce=random.randbytes(32))), 1
        if way < 0.12 and self._world.adapters:
            return b"U" + pack(self._frames(valid(random))), 0
        if way < 0.2 and self._world.adapters:
            return b"U" + pack(self._upload(random, mutator)), 1
        return self._call(random, mutator, way)

    def play(self, entry: bytes) -> str:
        """See Target."""
        kind, body = entry[:1], entry[1:]
        if kind == b"W":
            self._world = self._worlds[body[0] % len(WORLDS)]
            return "world"
        assert self._world is not None
        with self._patch:
            try:
                return self._feed(self._world, kind, body)
            except DecodeError:
                return "DecodeError"
            finally:
                self._look()

    def end(self) -> None:
        """See Target."""
        if self._world is not None:
            self._world.settle()
            self._look()

    def check(self) -> None:
        """See Target: greedy tokens of every world."""
        for world in self._worlds:
            events: list[Any] = []
            session = world.service.session(world.service.open(world.request(), SECRET).session)
            session.attach(events.append)
            session.feed(PROMPT, 6, False, world.rows(PROMPT))
            said = list[int]()
            for _ in range(6):
                world.steps(20)
                said += [event.token.token_id for event in events[len(said) :] if not isinstance(event, CleaveError)]
                session.feed([], 0, False, world.rows(said[-1:]))
            world.said = world.said or said
            if not said or said != world.said:
                raise Bug(f"trusted: {world.scheme} said {said}, and {world.said} at the start")
            world.settle()

    def close(self) -> None:
        """See Target."""
        self._log.removeHandler(self._handler)
        self._loop.close()

    def _feed(self, world: World, kind: bytes, body: bytes) -> str:
        """What the server does with a message."""
        service = world.service
        if kind == b"T":
            world.steps(6)
            return "steps"
        if kind == b"A":
            return self._attest(world, pb.AttestRequest.FromString(body))
        if kind == b"U":
            return self._take_upload(world, unpack(body))
        sealed = pb.Sealed.FromString(body)
        if kind == b"O":
            return self._open(world, self._seal.open(sealed, pb.OpenRequest))
        name = sealed.session
        session = service.session(name)  # whose secret opens the frame
        if kind == b"C":
            self._seal.open(sealed, pb.CloseRequest)
            service.close(name)
            return "closed"
        frame = self._seal.open(sealed, pb.DecodeRequest)
        if name not in self._emitters:
            self._emitters[name] = lambda event: self._events.append((name, event))
            session.attach(self._emitters[name])
        session.feed(frame.token_ids, frame.credit, frame.end_turn, frame.embeddings)
        self._granted[name] += frame.credit
        world.steps(3)
        return "fed"

    def _attest(self, world: World, request: pb.AttestRequest) -> str:
        answer = self._loop.run_until_complete(world.attestor.attest(request))
        if answer.hpke_key != KEY or len(answer.nonce) != 32 or request.nonce not in (b"", answer.nonce):
            raise Bug("trusted: evidence of another form")
        return f"answered: {answer.provider}"

    def _open(self, world: World, request: pb.OpenRequest) -> str:
        answer = world.service.open(request, SECRET)
        if not 1 <= answer.max_context <= CONTEXT or len(answer.session) != 16:
            raise Bug("trusted: a session of another form")
        if world.adapters and answer.adapter != request.adapter:
            raise Bug("trusted: another adapter than was asked for")
        if world.adapters and answer.perturbation < request.sampling.perturbation:
            raise Bug("trusted: less perturbation than was asked for")
        self._granted[answer.session] = 0
        return "opened"

    def _take_upload(self, world: World, frames: list[bytes]) -> str:
        """What the server does with an upload."""
        if not world.adapters:
            return "no uploads"
        due = iter(frames)
        first = self._piece(due)
        incoming = world.service.begin_upload(first.config, first.weights_size)
        try:
            incoming.write(first.weights)
            while not incoming.complete:
                incoming.write(self._piece(due).weights)
            made = incoming.finish()
        except BaseException:
            incoming.abandon()
            raise
        if len(made.name) != 16 or not 0 < made.size <= ADAPTERS:
            raise Bug("trusted: an adapter of another form")
        self._adapters.append(made.name)
        return "uploaded"

    def _piece(self, frames: Iterator[bytes]) -> pb.UploadRequest:
        """The next message. After the last frame comes one that does not open."""
        frame = next(frames, None)
        if frame is None:
            raise SealError
        return self._seal.open(pb.Sealed.FromString(frame), pb.UploadRequest)

    def _look(self) -> None:
        """What reached the clients: tokens that exist and were granted, FINALs, and errors of the tree."""
        for name, event in self._events:
            if isinstance(event, CleaveError):
                if type(event) is CleaveError or "internal error" in str(event):
                    raise Bug(f"trusted: {event}: {self._logged[-1:]}")
            elif event.HasField("token"):
                self._granted[name] -= 1
                if event.token.token_id >= VOCABULARY or self._granted[name] < 0:
                    raise Bug("trusted: a token that does not exist, or was not granted")
        self._events.clear()
        if any("internal" in line or "renewed" in line for line in self._logged):
            raise Bug(f"trusted: logged {self._logged}")
        self._logged.clear()

    def _some(self, random: Random) -> bytes:
        return random.choice(list(self._granted) or [bytes(16)])

    def _open_request(self, random: Random) -> pb.OpenRequest:
        assert self._world is not None
        request = self._world.request()
        request.max_context = random.choice((0, 1, 2, 10, CONTEXT))
        sampling = request.sampling
        sampling.temperature, sampling.top_p = random.choice((0, 0, 1, 1e-45, 100)), random.choice((0, 0.5, 1, 1e-45))
        sampling.top_k, sampling.repetition_penalty = random.choice((0, 1, 99)), random.choice((0, 1, 1.5, 1e-45, 100))
        sampling.seeded, sampling.logprobs = True, random.choice((0, 3, 100))
        sampling.perturbation = random.choice((0, 0, 0, 1e-45, 0.5, 100))
        if self._world.adapters:
            request.adapter = random.choice((b"", *self._adapters, random.randbytes(16)))
        return request

    def _call(self, random: Random, mutator: Mutator, way: float) -> tuple[bytes, int]:
        kind, message, session = self._message(random, way)
        if random.random() < 0.1:
            return kind + self._seal.wrap(message, session).SerializeToString(), 0
        if random.random() < 0.1:
            made = mutator.message(self._seal.wrap(message, session))
        else:
            made = pb.Sealed(body=mutator.message(message), session=session).SerializeToString()
        self._recent = [*self._recent[-10:], made]
        return kind + made, 1

    def _message(self, random: Random, way: float) -> tuple[bytes, Any, bytes]:
        """The letter of an entry, its message, and the session that it is for."""
        if way < 0.35:
            return b"O", self._open_request(random), b""
        name = self._some(random)
        if way < 0.92:
            return b"D", self._decode_request(random, name), name
        return b"C", pb.CloseRequest(), name

    def _upload(self, random: Random, mutator: Mutator) -> list[bytes]:
        """Frames; now and then one that is none."""
        frames = self._frames(spoilt(random, mutator))
        if frames and random.random() < 0.05:
            frames[-1] = mutator.message(pb.Sealed.FromString(frames[-1]))
        return frames

    def _frames(self, messages: list[bytes]) -> list[bytes]:
        return [pb.Sealed(body=message).SerializeToString() for message in messages]

    def _decode_request(self, random: Random, name: bytes) -> pb.DecodeRequest:
        ids = [random.randrange(VOCABULARY) for _ in range(random.choice((0, 1, 1, 2, 12)))]
        credit = random.choice((0, 1, 1, 3, 300))
        return pb.DecodeRequest(
            token_ids=ids,
            credit=credit,
            end_turn=random.random() < 0.2,
            embeddings=self._embeddings(random, name, len(ids)),
        )

    def _embeddings(self, random: Random, name: bytes, tokens: int) -> bytes:
        """As many rows as are due, most of the time; and most of the time of numbers that may be."""
        assert self._world is not None
        service, way = self._world.service, random.random()
        session = service._sessions.get(name)
        if session is None or (self._world.table is None and way < 0.97):
            return b""
        due = len(session._pending) + tokens - len(session._embeddings)
        if way < 0.1:
            due = max(due + random.choice((-2, -1, 1, 100)), 0)
        values = [random.uniform(-1, 1) for _ in range(due * service.config.hidden)]
        if values and 0.1 < way < 0.2:
            values[random.randrange(len(values))] = random.choice((math.nan, math.inf, -math.inf, 1e6, -65505.0))
        return struct.pack(f"<{len(values)}f", *values)

    def _token_bytes(self, size: int) -> bytes:
        return next(self._names).to_bytes(size, "little")
