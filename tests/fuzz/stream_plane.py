"""A hostile GPU worker on the other end of a real stream socket: what GpuWorker.call and StreamPlane make of it.

Entry: X, how it ends, the parts of its welcome, and for each call of one stream its number (as in offload.py) and the
parts of what is said once it was read. What is accepted must be what plain reading finds.
"""

import os
import socket
import tempfile
import threading
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.mutate import Mutator
from tests.fuzz.offload import ALLOWED, TEMPLATES, answer
from tests.fuzz.stream_frames import PREFIX, Frame, cut, disorder, frame_of, spoil
from tests.trusted_worker.fake_gpu_worker import read
from trusted_worker.offload import GpuWorker
from trusted_worker.stream_plane import StreamPlane
from wire.codec import header_of
from wire.errors import CleaveError, UnavailableError
from wire.v1 import gpu_worker_pb2 as pb

SECONDS = 20.0
TICKET = b"t" * 32
LEAVE, SILENT, VANISH = range(3)  # ends: no more is said, nothing happens at all, and gone without a word
HONEST = 4  # a flag beside the end: every call must be answered
PATIENCE = 0.02  # seconds for the next call, which does not come where the answer before it was half of one
Script = tuple[int, list[bytes], list[tuple[int, list[bytes]]]]


class _Alone(GpuWorker):
    """Has the one stream that it is given."""

    def __init__(self, path: str) -> None:
        super().__init__("unix:/nowhere", "llama", pb.PRECISION_INT8)
        self._plane = StreamPlane(f"unix:{path}", TICKET, SECONDS)

    def connect(self, patient: bool = False) -> None:
        raise UnavailableError("there is one stream only")

    @property
    def closed(self) -> bool:
        return self._plane is None

    def be_late(self) -> None:
        """As if the time of the call in flight were over."""
        self._seconds = 0.0
        while self._started is not None and self._plane is not None:
            self.expire()


class StreamPlaneTarget:
    """A listener, and a thread that plays the worker by the script of the entry."""

    name = "stream_plane"

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = f"{self._folder.name}/stream"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._scripts: SimpleQueue[Script | None] = SimpleQueue()
        self._through: SimpleQueue[BaseException | None] = SimpleQueue()
        self._worker: _Alone | None = None
        threading.Thread(target=self._play_scripts, daemon=True).start()
        self.begin()

    def begin(self) -> None:
        """See Target."""
        self._files, self._recent = _open_files(), list[bytes]()

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        mutator, calls = Mutator(random, self._recent), random.choice((1, 1, 2, 3))
        texts = [[frame_of(pb.ExecuteResponse())]]
        numbers = [random.randrange(len(TEMPLATES)) for _ in range(calls)]
        for place, number in enumerate(numbers):
            _, _, shape, dtype = TEMPLATES[number]
            texts.append([frame_of(one) for one in answer(place + 1, shape, dtype, random.choice((0, 0, 1, 3)))])
        spoilt = 0 if random.random() < 0.05 else random.choice((1, 1, 1, 2))
        for _ in range(spoilt):
            self._spoil(random, mutator, texts[random.choice((0, *range(1, calls + 1), calls))])
        said = [b"".join(frame.to_bytes() for frame in text) for text in texts]
        self._recent = [*self._recent[-10:], said[-1][:4096]]
        parts = [pack(cut(random, text)) for text in said]
        made = [bytes([number]) + text for number, text in zip(numbers, parts[1:], strict=True)]
        end = random.choice((LEAVE, LEAVE, SILENT, VANISH)) if spoilt else LEAVE | HONEST
        return b"X" + bytes([end]) + pack([parts[0], *made]), spoilt

    def play(self, entry: bytes) -> str:
        """See Target."""
        welcome, *rest = unpack(entry[2:]) or [b""]
        calls = [(one[0] % len(TEMPLATES), unpack(one[1:])) for one in rest if one]
        self._scripts.put((entry[1], unpack(welcome), calls))
        try:
            outcome = self._calls(b"".join(unpack(welcome)), calls)
            if entry[1] & HONEST and outcome != f"answered {len(calls)}":
                raise Bug("stream_plane: an honest worker was not believed")
            return outcome
        finally:
            if self._worker is not None:
                self._worker.close()
            self._worker = None
            if (problem := self._through.get(timeout=SECONDS)) is not None:
                raise Bug(f"stream_plane: {problem!r} in the hostile worker")

    def end(self) -> None:
        """See Target."""
        if _open_files() > self._files:
            raise Bug("stream_plane: a stream has ended and its socket is still open")

    def check(self) -> None:
        """See Target: honest answers, each in parts, all of them on one stream."""
        rest = []
        for number, (_, _, shape, dtype) in enumerate(TEMPLATES):
            frames = [frame_of(one).to_bytes() for one in answer(number + 1, shape, dtype, 2)]
            rest.append(bytes([number]) + pack(part for data in frames for part in (data[:5], data[5:])))
        welcome = frame_of(pb.ExecuteResponse()).to_bytes()
        self.play(b"X" + bytes([LEAVE | HONEST]) + pack([pack([welcome]), *rest]))

    def close(self) -> None:
        """See Target."""
        self._scripts.put(None)
        self._listener.close()
        self._folder.cleanup()

    def _spoil(self, random: Random, mutator: Mutator, text: list[Frame]) -> None:
        if text and random.random() < 0.15:
            disorder(random, text)
        elif text:
            spoil(random, mutator, random.choice(text))

    def _calls(self, said: bytes, calls: list[tuple[int, list[bytes]]]) -> str:
        """What came of the calls of one stream. A refused one is not the last one."""
        try:
            self._worker = _Alone(self._path)
        except CleaveError as error:
            _allow(error)
            raise
        answered, refusal, at = 0, None, (_frame_at(said, 0) or (0, b"", 0))[2]
        for number, parts in calls:
            operation, array, shape, dtype = TEMPLATES[number]
            into: Any = None if shape is None else np.zeros(shape, dtype)
            said += b"".join(parts)
            try:
                self._worker.call(operation, array, into)
            except CleaveError as error:
                _allow(error)
                if self._worker.closed:
                    raise
                refusal, at = error, (_frame_at(said, at) or (0, b"", at))[2]
            else:
                answered, at = answered + 1, _accepted(said, at, into)
        if refusal is not None:
            raise refusal
        return f"answered {answered}"

    def _play_scripts(self) -> None:
        while (script := self._scripts.get()) is not None:
            peer, _ = self._listener.accept()
            try:
                with peer:
                    peer.settimeout(SECONDS)
                    self._play_script(peer, *script)
                self._through.put(None)
            except (BrokenPipeError, ConnectionResetError, EOFError):  # it was seen through
                self._through.put(None)
            except BaseException as error:
                self._through.put(error)

    def _play_script(self, peer: socket.socket, end: int, welcome: list[bytes], calls: Any) -> None:
        read(peer, len(TICKET))
        for part in welcome:
            peer.sendall(part)
        if _frame_at(b"".join(welcome), 0) is None:
            return
        for place, (_, parts) in enumerate(calls):
            peer.settimeout(SECONDS if end & HONEST or not place else PATIENCE)
            try:
                _hear_call(peer)
            except TimeoutError:
                break
            peer.settimeout(SECONDS)
            for part in parts:
                peer.sendall(part)
        self._leave(peer, end % HONEST)

    def _leave(self, peer: socket.socket, end: int) -> None:
        """Also where the trusted worker still waits for the rest of an answer."""
        peer.settimeout(SECONDS)
        if end == VANISH:
            return
        if end == LEAVE:
            peer.shutdown(socket.SHUT_WR)
        elif (worker := self._worker) is not None:
            worker.be_late()
        while peer.recv(1 << 16):
            pass


def _allow(error: CleaveError) -> None:
    if not isinstance(error, ALLOWED):
        raise Bug(f"stream_plane: {type(error).__name__} {error}") from error


def _accepted(said: bytes, at: int, into: Any) -> int:
    """Where the answer that begins at `at` ends. Raises Bug where what was accepted is not what it says."""
    data, wanted, first = b"", 0 if into is None else into.nbytes, True
    while first or len(data) < wanted:
        found = _frame_at(said, at)
        if found is None:
            raise Bug("stream_plane: half an answer was accepted")
        response, part, at = found[0], found[1], found[2]
        if first and into is not None:
            header = (response.header.dtype, tuple(response.header.shape))
            if header != (header_of(into).dtype, into.shape):
                raise Bug("stream_plane: an answer of another form was accepted")
        if (response.refused and first) or response.ended:
            raise Bug("stream_plane: a refusal was accepted")
        data, first = data + part, False
    if into is not None and data != into.tobytes():
        raise Bug("stream_plane: an answer of other bytes was accepted")
    return at


def _frame_at(said: bytes, at: int) -> tuple[pb.ExecuteResponse, bytes, int] | None:
    """The frame that begins there, its data, and where it ends; None for what is not all there, or no message."""
    if at + 8 > len(said):
        return None
    length, size = PREFIX.unpack_from(said, at)
    body, end = said[at + 8 : at + 8 + length], at + 8 + length + size
    if end > len(said):
        return None
    try:
        return pb.ExecuteResponse.FromString(body), said[at + 8 + length : end], end
    except Exception:
        return None


def _hear_call(peer: socket.socket) -> None:
    """All of a request: those of the templates are one frame."""
    length, size = PREFIX.unpack(read(peer, 8))
    read(peer, length + size)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
