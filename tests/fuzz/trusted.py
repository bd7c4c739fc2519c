"""The trusted worker without a socket: Sealed -> NoSeal.open -> Service and Session, then steps of the engine.

Entries: W, which world; A, an AttestRequest; O, D and C, the Sealed of Open, Decode and Close; T, a few steps.
"""

import itertools
import logging
import math
import struct
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from google.protobuf.message import DecodeError

from client.embedding import EmbeddingTable
from tests.fuzz.harness import KNOWN, Bug
from tests.fuzz.mutate import Mutator
from tests.fuzz.tiny import CONTEXT, VOCABULARY
from tests.simulators.in_process import InProcessWorker
from trusted_worker import attestation
from trusted_worker.config import parse
from trusted_worker.offload import Traffic
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.service import Service
from wire.errors import CleaveError
from wire.model_config import ModelConfig
from wire.sealing import NoSeal
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb

WORLDS = (
    ("llama", "tee-only", "float32", "256KiB", ()),
    ("mistral", "tee-only", "int8", "192KiB", ("--max-context", "50")),
    ("llama", "secure-infer", "int8", "4MiB", ("--prefill", "worker", "--pad-bank", "64KiB")),
    ("qwen3", "kv-shield", "float32", "64KiB", ("--seal-idle", "--rotate-every", "4", "--kv-dtype", "int8")),
    ("gpt2", "plain", "float32", "64KiB", ()),
    ("llama", "tee-only", "int8", "80KiB", ("--embed", "client", "--kv-dtype", "int8")),
    ("qwen3", "secure-infer", "int8", "136KiB", ("--embed", "client", "--prefill", "worker", "--pad-bank", "8KiB")),
    ("llama", "secure-infer", "int8", "96KiB", ("--kv-dtype", "float16", "--prefill", "worker", "--pad-bank", "8KiB")),
)
PRECISIONS = {"float32": gpu.PRECISION_FLOAT32, "int8": gpu.PRECISION_INT8}
PROMPT = [3, 1, 4, 1, 5]


class _Local(InProcessWorker):
    """The real GPU worker in this process, with what a Service asks of an offload.GpuWorker beyond `call`."""

    def __init__(self, folder: Path, config: ModelConfig, precision: gpu.Precision.ValueType) -> None:
        super().__init__(folder, config, precision)
        self.traffic = Traffic()
        self.greet: Any = None

    def connect(self, **_: Any) -> None:
        """There is nobody to wait for."""
        if self.greet is not None:
            self.greet()


class _World:
    """A service whose compute thread is this one."""

    def __init__(self, folders: dict[str, Path], index: int) -> None:
        self.model, self.scheme, self.precision, budget, more = WORLDS[index]
        flags = ["--model", str(folders[self.model]), "--scheme", self.scheme, "--precision", self.precision]
        flags += ["--memory-budget", budget, "--gpu-worker", "unix:/nowhere", *more]
        self.service = _service(flags)
        if self.scheme != "tee-only":
            self.service.worker = _Local(folders[self.model], self.service.config, PRECISIONS[self.precision])
        self.runner = self.service._load()
        self.service.engine.scheme = self.runner
        self.rest()
        stats = self.service.stats()
        self.used, self.spilled = stats.memory_used, stats.spill_bytes
        embeds = stats.embedding == "client"
        self.table = EmbeddingTable(folders[self.model], self.precision) if embeds else None
        self.said: list[int] | None = None

    def request(self) -> pb.OpenRequest:
        return pb.OpenRequest(model=self.model, scheme=self.scheme, precision=PRECISIONS[self.precision])

    def rows(self, ids: list[int]) -> bytes:
        """The embeddings of tokens, where the client sends them."""
        return self.table.rows(ids) if self.table else b""

    def steps(self, most: int) -> None:
        """What the compute thread does when it has time."""
        while most and self.service.engine._step(self.runner):
            most -= 1
        if most:
            self.idle()
        if isinstance(self.service.worker, _Local):
            self.service.worker.seen.clear()

    def idle(self) -> bool:
        """One piece of idle work. Nobody waits for it, so no error of it is right."""
        try:
            return bool(self.runner.idle())
        except CleaveError as error:
            found = f"trusted: idle work of {self.scheme} failed: {error}"
            if found not in KNOWN:
                raise Bug(found) from error
            return True

    def rest(self) -> None:
        """All idle work there is."""
        while self.idle():
            pass

    def settle(self) -> None:
        """Everything is closed: is everything given back?"""
        for name in list(self.service._sessions):
            self.service.close(name)
        self.rest()
        stats = self.service.stats()
        if (stats.sessions, stats.memory_used, stats.pads_reused) != (0, self.used, 0):
            raise Bug(f"trusted: {self.scheme} keeps {stats.sessions} sessions, {stats.memory_used - self.used} bytes")
        if (stats.kv_pages_used, stats.spill_bytes) != (0, self.spilled):
            raise Bug(f"trusted: {self.scheme} keeps {stats.kv_pages_used} pages")


def _service(flags: list[str]) -> Any:
    return Service(parse(flags), ProcessLimit())


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
        self._worlds = [_World(folders, index) for index in range(len(WORLDS))]
        self._seal = NoSeal()
        self._world: _World | None = None

    def begin(self) -> None:
        """See Target."""
        self._world, self._names = None, itertools.count(1)
        self._granted: dict[bytes, int] = {}
        self._events: list[tuple[bytes, Any]] = []
        self._emitters: dict[bytes, Any] = {}
        self._recent: list[bytes] = []
        self._logged.clear()

    def next(self, random: Random) -> tuple[bytes, int]:
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
        message: Any
        if way < 0.35:
            kind, message = b"O", self._open_request(random)
        elif way < 0.92:
            kind, message = b"D", self._decode_request(random)
        else:
            kind, message = b"C", pb.CloseRequest(session=self._some(random))
        if random.random() < 0.1:
            return kind + self._seal.wrap(message).SerializeToString(), 0
        if random.random() < 0.1:
            made = mutator.message(self._seal.wrap(message))
        else:
            made = pb.Sealed(body=mutator.message(message)).SerializeToString()
        self._recent = [*self._recent[-10:], made]
        return kind + made, 1

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
            session = world.service.session(world.service.open(world.request()).session)
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

    def _feed(self, world: _World, kind: bytes, body: bytes) -> str:
        """What the server does with a message."""
        service = world.service
        if kind == b"T":
            world.steps(6)
            return "steps"
        if kind == b"A":
            return f"answered: {attestation.attest(pb.AttestRequest.FromString(body).nonce).provider}"
        sealed = pb.Sealed.FromString(body)
        if kind == b"O":
            answer = service.open(self._seal.open(sealed, pb.OpenRequest))
            if not 1 <= answer.max_context <= CONTEXT or len(answer.session) != 16:
                raise Bug("trusted: a session of another form")
            self._granted[answer.session] = 0
            return "opened"
        if kind == b"C":
            service.close(self._seal.open(sealed, pb.CloseRequest).session)
            return "closed"
        frame = self._seal.open(sealed, pb.DecodeRequest)
        session = service.session(frame.session)
        if frame.session not in self._emitters:
            name = frame.session
            self._emitters[name] = lambda event: self._events.append((name, event))
            session.attach(self._emitters[name])
        session.feed(list(frame.token_ids), frame.credit, frame.end_turn, frame.embeddings)
        self._granted[frame.session] += frame.credit
        world.steps(3)
        return "fed"

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
        return request

    def _decode_request(self, random: Random) -> pb.DecodeRequest:
        ids = [random.randrange(VOCABULARY) for _ in range(random.choice((0, 1, 1, 2, 12)))]
        credit = random.choice((0, 1, 1, 3, 300))
        name = self._some(random)
        return pb.DecodeRequest(
            session=name,
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
