"""A hostile trusted worker on the stream socket of a real GPU worker: tickets, frames and how they are cut.

Entries: W, which model is loaded; C, a connection: its ticket, its end, whether each part is read before the next one
comes, and the parts of what it says. All of it may be honest: then it is said once more, in one part, and the answers
must be the same. A bystander has a stream too, and a call answered during each connection.
"""

import select
import socket
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np

from tests.fuzz.calls import Calls, frames
from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.mutate import Mutator
from tests.fuzz.stream_frames import PREFIX, Frame, cut, disorder, frame_of, spoil
from tests.fuzz.stream_server import SECONDS, StreamServer
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

WORLDS = (("llama", pb.PRECISION_INT8), ("qwen3", pb.PRECISION_FLOAT32))
GOOD, WRONG, SHORT, AGAIN = range(4)  # tickets
SHUT, VANISH, EXPIRE, DEAF = range(4)  # ends
STEPWISE, HONEST = 1, 2  # flags
INNER = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
CODES = {code.value[0]: code for code in grpc.StatusCode}


class Peer:
    """A connection that says anything, and listens meanwhile unless it is deaf."""

    def __init__(self, server: StreamServer) -> None:
        self._server = server
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(server.path)
        self.socket.setblocking(False)
        self.heard, self._over = bytearray(), False

    def say(self, data: bytes, deaf: bool = False) -> bool:
        """Whether all of it was taken."""
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                if deaf:
                    return False
                self._wait(select.POLLIN | select.POLLOUT)
            except OSError:
                return False
        return True

    def hear(self, size: int) -> bytes:
        """So many bytes more, or what there is to the end. Raises Bug for a hang."""
        while len(self.heard) < size and not self._over:
            self._wait(select.POLLIN)
        found = bytes(self.heard[:size])
        del self.heard[:size]
        return found

    def frame(self) -> tuple[pb.ExecuteResponse, bytes]:
        """One whole frame. Raises Bug where there is none."""
        prefix = self.hear(8)
        if len(prefix) < 8:
            raise Bug("conversation: an honest stream was ended")
        length, size = PREFIX.unpack(prefix)
        return pb.ExecuteResponse.FromString(self.hear(length)), self.hear(size)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self.socket, events)
        ready = poll.poll(SECONDS * 1000)
        if not ready:
            raise Bug("conversation: hang")
        if ready[0][1] & ~select.POLLOUT:
            try:
                part = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                part = b""
            self.heard += part
            self._over = not part


class ConversationTarget:
    """One worker; its streams end with the entry, but for the bystander's, which ends with the episode."""

    name = "conversation"

    def __init__(self, folders: dict[str, Path]) -> None:
        self._server = StreamServer(folders)
        self._configs = [ModelConfig.from_hf(folders[name]) for name, _ in WORLDS]
        self._references: dict[int, bytes] = {}
        self._bystander: Peer | None = None
        self._used = bytes(32)

    def begin(self) -> None:
        """See Target."""
        self._fresh(0)
        self._chosen = False
        self._recent: list[bytes] = []

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        if not self._chosen:
            return b"W" + bytes([random.randrange(len(WORLDS))]), 0
        mutator = Mutator(random, self._recent)
        whole, malformed = self._draw(random), 0
        if random.random() > 0.1:
            for _ in range(random.choice((1, 1, 2, 3))):
                if random.random() < 0.2 and whole:
                    disorder(random, whole)
                elif whole:
                    spoil(random, mutator, random.choice(whole))
                malformed += 1
        data = b"".join(frame.to_bytes() for frame in whole)
        self._recent = [*self._recent[-10:], data[:4096]]
        ticket = GOOD if not malformed or random.random() < 0.95 else random.choice((WRONG, SHORT, AGAIN))
        end = random.choice((SHUT, SHUT, VANISH, EXPIRE, DEAF)) if malformed else SHUT
        flags = random.choice((0, STEPWISE)) | (0 if malformed else HONEST)
        return b"C" + bytes([ticket, end, flags]) + pack(cut(random, data)), malformed

    def play(self, entry: bytes) -> str:
        """See Target."""
        if entry[:1] == b"W":
            self._fresh(entry[1] % len(WORLDS))
            self._chosen = True
            return "world"
        (ticket, end, flags), parts = entry[1:4], unpack(entry[4:])
        heard = self._converse(parts, ticket % 4, end % 4, bool(flags & STEPWISE))
        if flags & HONEST and _answers(heard) != _answers(self._converse([b"".join(parts)], GOOD, SHUT, False)):
            raise Bug("conversation: other answers for the same bytes in other parts")
        self._server.check(streams=1)
        return _outcome(heard, whole=end % 4 in (SHUT, EXPIRE))

    def end(self) -> None:
        """See Target."""
        if self._bystander is not None:
            self._bystander.socket.close()
            self._bystander = None
        self._server.check(streams=0)

    def check(self) -> None:
        """See Target."""
        for world in range(len(WORLDS)):
            self._fresh(world)
            self._ask()
        self.end()

    def close(self) -> None:
        """See Target."""
        self.end()
        self._server.close()

    def _fresh(self, world: int) -> None:
        """Another model, and another bystander: without one, as after a bug, there is none to close."""
        if self._bystander is not None:
            self._bystander.socket.close()
        self._world = world
        self._server.load(*WORLDS[world])
        self._bystander, self._id = Peer(self._server), 0
        self._bystander.say(self._server.issue())
        self._bystander.frame()

    def _ask(self) -> None:
        """The bystander's call is answered as ever."""
        self._id += 1
        config = self._configs[self._world]
        x: Any = np.arange(2 * config.hidden).reshape(2, -1)
        operation, array = pb.Operation(matmul=pb.Matmul(layer=1, linear=pb.LINEAR_QKV)), x.astype(np.float32)
        if WORLDS[self._world][1] == pb.PRECISION_INT8:
            operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=1, linear=pb.LINEAR_QKV))
            array = x.astype(np.int32)
        assert self._bystander is not None
        for message in frames(self._id, operation, array, 1):
            self._bystander.say(frame_of(message).to_bytes())
        response, data = self._bystander.frame()
        if (response.id, response.refused) != (self._id, 0):
            raise Bug("conversation: the bystander was refused")
        if self._references.setdefault(self._world, data) != data:
            raise Bug("conversation: the bystander has another answer")

    def _converse(self, parts: list[bytes], ticket: int, end: int, stepwise: bool) -> bytes:
        """All that the worker said, to the end of the stream; nothing if nobody listened."""
        peer = Peer(self._server)
        try:
            peer.say(self._ticket(ticket))
            if ticket == GOOD:
                peer.frame()
            for part in parts:
                taken = peer.say(part, end == DEAF)
                if stepwise or not taken:
                    self._server.settle()
            self._ask()
            if end == VANISH:
                return b""
            self._server.settle()
            if end == SHUT or not self._server.expire():
                peer.socket.shutdown(socket.SHUT_WR)
            return peer.hear(1 << 30)
        finally:
            peer.socket.close()

    def _ticket(self, way: int) -> bytes:
        good = self._server.issue() if way == GOOD else self._used
        if way == GOOD:
            self._used = good
        return good[:-1] if way == SHORT else bytes(32) if way == WRONG else good

    def _draw(self, random: Random) -> list[Frame]:
        """The frames of some calls that are valid one after the other."""
        calls = Calls(random, self._configs[self._world], WORLDS[self._world][1] == pb.PRECISION_FLOAT32, False)
        made = []
        for number in range(1, random.choice((1, 2, 4, 8)) + 1):
            operation, array = calls.draw()
            calls.follow(operation)
            made += frames(number, operation, array, random.choice((0, 0, 1, 3)))
        return [frame_of(message) for message in made]


def _answers(heard: bytes) -> list[bytes]:
    """What was said, without how long it took."""
    found = []
    for response, data in _frames(heard)[0]:
        response.compute_us = 0
        found += [response.SerializeToString(), data]
    return found


def _outcome(heard: bytes, whole: bool) -> str:
    """The status that the stream ended with. Raises Bug for one that must not be, and for what is no answer."""
    responses, rest = _frames(heard)
    if rest and whole:
        raise Bug("conversation: half a frame")
    last = 0
    for response, data in responses[:-1] if responses and responses[-1][0].ended else responses:
        if response.ended or response.data or response.id < last or (response.refused and data):
            raise Bug("conversation: this is no answer")
        last = response.id
    said = {CODES[number] for response, _ in responses for number in (response.ended, response.refused) if number}
    if said.intersection(INNER):
        raise Bug("conversation: INTERNAL")
    ended = responses[-1][0].ended if responses else 0
    return CODES[ended].name if ended else "answered" if responses else "nothing"


def _frames(heard: bytes) -> tuple[list[tuple[pb.ExecuteResponse, bytes]], bytes]:
    """Whole frames, and what is left."""
    found, at = [], 0
    while at + 8 <= len(heard):
        length, size = PREFIX.unpack_from(heard, at)
        if at + 8 + length + size > len(heard):
            break
        body, data = heard[at + 8 : at + 8 + length], heard[at + 8 + length : at + 8 + length + size]
        found.append((pb.ExecuteResponse.FromString(body), data))
        at += 8 + length + size
    return found, heard[at:]
