"""The GPU worker without a socket: bytes -> protobuf -> CallReader -> Worker.execute, as its server does it.

Entries: W, which world; F, a frame of Execute; L, a LoadRequest; E, the peer ends its stream.
"""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from gpu_worker.allowance import Allowance
from gpu_worker.calls import Call, CallReader
from gpu_worker.expected import expected_tensor
from gpu_worker.stream import Stream
from gpu_worker.worker import Worker
from tests.fuzz.calls import Calls, frames
from tests.fuzz.harness import Bug
from tests.fuzz.mutate import Mutator
from wire.codec import byte_length, header_of, split
from wire.errors import CleaveError, InvalidArgumentError
from wire.kv_pages import KvType
from wire.v1 import gpu_worker_pb2 as pb

WORLDS = (
    ("qwen3", pb.PRECISION_FLOAT32, False),
    ("llama", pb.PRECISION_INT8, False),
    ("gpt2", pb.PRECISION_FLOAT32, False),
    ("mistral", pb.PRECISION_FLOAT32, False),
    ("sealed", pb.PRECISION_FLOAT32, False),
    ("llama", pb.PRECISION_INT8, True),
)
LAST = (1 << 64) - 1
IDS = np.array([3, 1, 4, 1, 5], np.int32)


class GpuTarget:
    """One worker for each world, and one stream of calls at a time; `kept` is a second stream that must not change."""

    name = "gpu"

    def __init__(self, folders: dict[str, Path]) -> None:
        self._workers = [Worker(folders, "cpu", ring_only) for _, _, ring_only in WORLDS]
        self._references: dict[int, bytes] = {}
        self._world = 0
        self._stream: Stream | None = None
        for world in range(len(WORLDS)):
            self._load(world)

    def begin(self) -> None:
        """See Target."""
        self._world, self._last, self._chosen = 0, -1, False
        self._calls: Calls | None = None
        self._queue: list[tuple[bytes, int]] = []
        self._open()

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        if not self._chosen or self._calls is None:
            return b"W" + bytes([random.randrange(len(WORLDS))]), 0
        self._calls.random = random
        if not self._queue:
            self._queue = self._draw(random, Mutator(random, [entry[1:] for entry, _ in self._queue]))
        return self._queue.pop(0)

    def play(self, entry: bytes) -> str:
        """See Target. An error of the reader ends the stream, one of the call does not."""
        kind, body = entry[:1], entry[1:]
        if kind == b"W":
            self._world, self._chosen = body[0] % len(WORLDS), True
            self._load(self._world)
            self._open()
            return "world"
        try:
            if kind == b"L":
                request = pb.LoadRequest.FromString(body)
                self._worker.load(request.model, request.precision)
                return "loaded"
            if kind == b"E":
                try:
                    self._reader.finish()
                finally:
                    self._open()
                return "ended"
            frame = pb.ExecuteRequest.FromString(body)
        except DecodeError:
            self._open()
            return "DecodeError"
        try:
            call = self._reader.add(frame, self._worker.model)
        except CleaveError:
            self._open()
            raise
        finally:
            self._last = max(self._last, frame.id)
        return "half a call" if call is None else self._execute(call)

    def end(self) -> None:
        """See Target."""
        self._open()
        if any(one.used for one in vars(self._worker).values() if isinstance(one, Allowance)):
            raise Bug("gpu: a stream has ended and its memory is still taken")

    def check(self) -> None:
        """See Target: every worker, after a Load, as at the start."""
        for world, worker in enumerate(self._workers):
            self._load(world)
            answer = self._valid(worker, world)
            if self._references.setdefault(world, answer) != answer:
                raise Bug(f"gpu: a valid call has another answer in world {world}")

    def close(self) -> None:
        """See Target."""
        self._drop()

    @property
    def _worker(self) -> Worker:
        return self._workers[self._world]

    def _load(self, world: int) -> None:
        name, precision, _ = WORLDS[world]
        self._workers[world].load(name, precision)

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _open(self) -> None:
        self._drop()
        ring_only, model = WORLDS[self._world][2], self._worker.model
        self._reader, self._stream, self._last = CallReader(ring_only), self._worker.open_stream(), -1
        self._queue = []
        if model is not None:
            float32 = model.precision == pb.PRECISION_FLOAT32
            self._calls = Calls(Random(0), model.config, float32, ring_only)

    def _execute(self, call: Call) -> str:
        assert self._stream is not None
        before = self._content()
        try:
            answer = self._worker.execute(call, self._stream)
        except CleaveError:
            if self._content() != before:
                raise Bug(f"gpu: a refused {call.operation.WhichOneof('kind')} changed a cache") from None
            raise
        if answer is not None:
            if answer.dtype not in (np.float32, np.int32):
                raise Bug("gpu: an answer of another form")
            if sum(map(len, split(answer))) != byte_length(header_of(answer)):
                raise Bug("gpu: an answer that is not its header's")
        if self._calls is not None and self._worker.model is call.model:
            self._calls.follow(call.operation)
        return "answered"

    def _content(self) -> list[Any]:
        """What counts in every cache of the stream: its tokens."""
        stream: Any = self._stream
        found = []
        for number, one in stream._caches._sequences.items():
            halves = [half.read(0, 0, one.length).numpy().tobytes() for half in (one._keys, one._values)]
            found.append((number, one.length, *halves))
        return found

    def _draw(self, random: Random, mutator: Mutator) -> list[tuple[bytes, int]]:
        """The entries of a call: valid, or mutated in one of several ways."""
        assert self._calls is not None
        way = random.random()
        if way < 0.01:
            name, precision, _ = WORLDS[self._world]
            return [(b"L" + mutator.message(pb.LoadRequest(model=name, precision=precision)), 1)]
        if way < 0.02:
            return [(b"E", 0)]
        operation, array = self._calls.draw()
        number = min(self._last + 1, LAST)
        whole = frames(number, operation, array, random.choice((0, 0, 0, 1, 3)))
        if way < 0.15:
            return [(b"F" + frame.SerializeToString(), 0) for frame in whole]
        if way < 0.4 and (repaired := self._fitting(random, mutator, operation, number)) is not None:
            return [(b"F" + repaired, 1)]
        made = [b"F" + frame.SerializeToString() for frame in whole]
        place = random.randrange(len(made))
        if len(made) > 1 and random.random() < 0.3:
            random.shuffle(made)
            made.append(made[place])
        made[place] = b"F" + mutator.message(whole[place])
        return [(frame, int(at >= place)) for at, frame in enumerate(made)]

    def _fitting(self, random: Random, mutator: Mutator, operation: pb.Operation, number: int) -> bytes | None:
        """A mutated operation with the tensor that it takes, so that it gets past the reader. None: it takes none."""
        assert self._calls is not None
        if self._worker.model is None:
            return None
        for _ in range(random.choice((1, 1, 2))):
            mutator.spoil(operation)
        try:
            expected = expected_tensor(operation, self._worker.model.config)
        except InvalidArgumentError:
            expected = None
        frame = pb.ExecuteRequest(id=number, operation=operation)
        if expected is not None and (expected.shape[0] or 1) <= 300:
            rows = expected.shape[0] or random.choice((1, 2, min(expected.most_rows, 8)))
            array = self._calls.tensor(expected.dtype, (rows, *[extent or 1 for extent in expected.shape[1:]]))
            frame.header.CopyFrom(header_of(array))
            frame.data = mutator.words(array.tobytes()) if random.random() < 0.3 else array.tobytes()
        return frame.SerializeToString()

    def _valid(self, worker: Worker, world: int) -> bytes:
        """The bytes that a stream of valid calls is answered with."""
        assert worker.model is not None
        reader, stream, config = CallReader(WORLDS[world][2]), worker.open_stream(), worker.model.config
        reserve = pb.Cache(sequence=1, reserve=pb.Reserve(tokens=9, type=KvType.FLOAT32.number))
        forward = pb.Forward(sequences=[pb.SequenceRows(sequence=1, rows=len(IDS))], logit_rows=[0, 4])
        ring = pb.RingMatmul(layer=1, linear=pb.LINEAR_QKV)
        x: Any = np.arange(2 * config.hidden).reshape(2, -1)
        z = np.arange(config.vocabulary, dtype=np.int32)[None] << 20
        calls: list[Any] = [(pb.Operation(ring_matmul=ring), x.astype(np.int32))]
        calls.append((pb.Operation(ring_lookup=pb.RingLookup()), z))
        if not WORLDS[world][2]:
            calls = [(pb.Operation(cache=reserve), None), (pb.Operation(forward=forward), IDS)]
        if WORLDS[world][0] == "sealed":
            table = (np.arange(config.vocabulary * config.hidden) % 7).reshape(-1, config.hidden).astype(np.float32)
            calls = [(pb.Operation(provision=pb.Provision(kind=pb.PARAMETER_KIND_EMBEDDING)), table)]
            calls.append((pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_LM_HEAD)), x.astype(np.float32)))
        answers = []
        try:
            for number, (operation, array) in enumerate(calls):
                for frame in frames(number, operation, array, 1):
                    call = reader.add(frame, worker.model)
                assert call is not None
                answer = worker.execute(call, stream)
                answers.append(b"" if answer is None else answer.tobytes())
        finally:
            stream.close()
        return b"|".join(answers)
