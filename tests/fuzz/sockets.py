"""Both services as real processes on real ports: bytes through gRPC, and bytes that are no HTTP/2 at all.

Entries: G, the number of a method of the GPU worker and the messages of one call as bytes; T, the number of a method of
the trusted worker, flags (sealed_caller.py), and the parts of one call (sealed_frames.py); H, a service and what a bare
TCP connection says to it before it leaves; I, one that says nothing and stays.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from tests.fuzz.calls import Calls, frames
from tests.fuzz.harness import Bug, pack, unpack
from tests.fuzz.mutate import Mutator
from tests.fuzz.sealed_caller import LOOKED_AT, REPLAYED, SESSION_SECONDS, VALID, SealedCaller
from tests.fuzz.sealed_frames import PLAIN, RAW, SEALED, draw_edit, padded, parses
from tests.fuzz.uploads import spoilt, valid
from wire.channel import MAX_MESSAGE_BYTES
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
GROWTH = 256 << 20  # bytes that a service may grow by, whatever it was sent
SECONDS = 20
SILENT = 40  # connections that say nothing, at most
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
ROW = np.arange(16, dtype=np.int32)[None]
GPU: tuple[tuple[str, type[Message], bool], ...] = (
    ("Execute", gpu.ExecuteRequest, True),
    ("Load", gpu.LoadRequest, False),
    ("Describe", gpu.DescribeRequest, False),
)
UPLOAD = ("Upload", pb.Sealed, True)
TRUSTED: tuple[tuple[str, type[Message], bool], ...] = (
    ("Decode", pb.Sealed, True),
    ("Open", pb.Sealed, False),
    ("Close", pb.Sealed, False),
    ("Attest", pb.AttestRequest, False),
    ("Stats", pb.StatsRequest, False),
    UPLOAD,
)

KINDS: dict[bytes, tuple[str, tuple[tuple[str, type[Message], bool], ...]]] = {
    b"G": ("wire.v1.GpuWorkerService", GPU),
    b"T": ("wire.v1.TrustedWorkerService", TRUSTED),
}


class SocketsTarget:
    """The processes are started when this is made, and waited for at the first check."""

    name = "sockets"

    def __init__(self, folders: dict[str, Path]) -> None:
        model = ["--listen", "127.0.0.1:0", "--model", str(folders["llama"]), "--parent", str(os.getpid())]
        trusted = ["--scheme", "tee-only", "--precision", "int8", "--memory-budget", "640KiB", "--threads", "1"]
        trusted += ["--adapter-memory", "128KiB", "--session-seconds", str(SESSION_SECONDS)]
        self._processes = [
            _start("gpu_worker", "--threads", "1", "--device", "cpu", *model),
            _start("trusted_worker", *trusted, *model),
        ]
        self._config = ModelConfig.from_hf(folders["llama"])
        self._ports: list[int] = []
        self._silent: list[socket.socket] = []
        self._answers: list[bytes] = []
        self._baseline: list[int] = []

    def begin(self) -> None:
        """See Target."""
        self._recent: list[bytes] = []

    def next(self, random: Random) -> tuple[bytes, int]:
        """See Target."""
        mutator, way = Mutator(random, self._recent), random.random()
        if way < 0.04:
            noise = random.choice((random.randbytes(random.choice((1, 9, 500))), b"GET / HTTP/1.1\r\n\r\n", PREFACE))
            return b"H" + bytes([random.randrange(2)]) + mutator.raw(noise), 1
        if way < 0.05:
            return b"I" + bytes([random.randrange(2)]), 1
        made = self._gpu(random, mutator) if way < 0.5 else self._trusted(random, mutator)
        self._recent = [*self._recent[-10:], made[2:1000]]
        return made, 1

    def play(self, entry: bytes) -> str:
        """See Target."""
        kind, number, body = entry[:1], entry[1], entry[2:]
        if kind in (b"H", b"I"):
            return self._bare(number % 2, body, stay=kind == b"I")
        method, parser, streams = KINDS[kind][1][number % len(KINDS[kind][1])]
        parts = unpack(body[1:] if kind == b"T" else body)
        if kind == b"T" and any(part[:1] in SEALED for part in parts):
            return self._caller.play(method, body[0], parts)
        if kind == b"T":
            parts = [part[1:] for part in parts]
        if not streams:
            parts = (parts or [b""])[:1]
        code = self._call(kind, method, parts)[0]
        broken = not all(parses(parser, part) for part in parts)
        return f"{code}, no message" if broken else code

    def end(self) -> None:
        """See Target."""
        for process in self._processes:
            if process.poll() is not None:
                raise Bug("sockets: a service has ended")

    def check(self) -> None:
        """See Target: both services answer as they did, and have not grown."""
        if not self._ports:
            self._connect()
        answers = [self._ask_gpu(), self._ask_trusted()]
        sizes = [_peak(process.pid) for process in self._processes]
        if not self._answers:
            self._answers, self._baseline = answers, sizes
        if answers != self._answers:
            raise Bug("sockets: a valid call has another answer")
        self.growth = [now - then for now, then in zip(sizes, self._baseline, strict=True)]
        if max(self.growth) > GROWTH:
            raise Bug(f"sockets: the services grew by {self.growth} bytes")

    def close(self) -> None:
        """See Target."""
        for one in self._silent:
            one.close()
        if self._ports:
            for channel in self._channels.values():
                channel.close()
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdout.close()

    def _connect(self) -> None:
        for process in self._processes:
            self._ports.append(int(process.stdout.readline().rpartition(":")[2]))
        self._processes[1].stdout.readline()  # serving
        options = [("grpc.max_send_message_length", -1)]
        made = [grpc.insecure_channel(f"127.0.0.1:{port}", options=options) for port in self._ports]
        self._channels: dict[bytes, Any] = dict(zip(KINDS, made, strict=True))
        self._caller = SealedCaller(made[1], lambda method, frames: self._call(b"T", method, frames), _request())

    def _gpu(self, random: Random, mutator: Mutator) -> bytes:
        """A call of the GPU worker: some valid frames, then mutated ones."""
        number = random.choice((0, 0, 0, 0, 1, 2))
        if number == 1:
            load = gpu.LoadRequest(model="llama", precision=random.choice((gpu.PRECISION_FLOAT32, gpu.PRECISION_INT8)))
            return b"G\x01" + pack([mutator.message(load)])
        if number == 2:
            return b"G\x02" + pack([mutator.raw(b"")])
        calls, parts = Calls(random, self._config, float32=False, ring_only=False), list[bytes]()
        for place in range(random.choice((1, 1, 2, 3))):
            operation, array = calls.draw()
            whole = frames(place, operation, array, random.choice((0, 1)))
            calls.follow(operation)
            parts += [frame.SerializeToString() for frame in whole]
        parts[-1] = mutator.message(whole[-1])
        if random.random() < 0.02:
            parts *= 100
        if random.random() < 0.003:
            whole[-1].data = bytes(random.choice((1 << 20, MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES + 100)))
            parts[-1] = whole[-1].SerializeToString()
        return b"G\x00" + pack(parts)

    def _trusted(self, random: Random, mutator: Mutator) -> bytes:
        """A call of the trusted worker, with a message that is wrong, or with a frame that is."""
        number = random.choice((0, 0, 0, *range(len(TRUSTED))))
        method, parser, _ = TRUSTED[number]
        if parser is not pb.Sealed:
            asked: Message = pb.AttestRequest(nonce=bytes(32)) if method == "Attest" else pb.StatsRequest()
            return b"T" + bytes([number, 0]) + pack([RAW + mutator.message(asked)])
        good, flags, way = self._messages(random, method), 0, random.random()
        parts = [PLAIN + one.SerializeToString() for one in good]
        if way < 0.3:
            flags = VALID
            parts += [draw_edit(random, len(parts), LOOKED_AT) for _ in range(random.choice((1, 1, 2)))]
        elif way < 0.4:
            flags = VALID | REPLAYED
        elif way < 0.6:
            frame = pb.Sealed(body=random.randbytes(480), enc=random.randbytes(32), session=random.randbytes(16))
            parts[random.randrange(len(parts))] = RAW + mutator.message(frame)
        elif way < 0.603:
            parts = [RAW + pb.Sealed(body=bytes(random.choice((1 << 20, MAX_MESSAGE_BYTES)))).SerializeToString()]
        elif method == "Upload":
            parts = [PLAIN + one for one in spoilt(random, mutator)]
        elif way < 0.65:
            parts[-1] = padded(mutator, good[-1])
        else:
            parts[-1] = PLAIN + mutator.message(good[-1])
        return b"T" + bytes([number, flags]) + pack(parts)

    def _messages(self, random: Random, method: str) -> list[Message]:
        """A valid call."""
        if method == "Open":
            return [_request()]
        if method == "Close":
            return [pb.CloseRequest()]
        if method == "Upload":
            return [pb.UploadRequest.FromString(one) for one in valid(random)]
        ask = pb.DecodeRequest(token_ids=[1, 2], credit=2)
        return [ask] * random.choice((1, 1, 2, 3))

    def _call(self, kind: bytes, method: str, parts: list[bytes]) -> tuple[str, list[bytes]]:
        """The status that the call ends with, and what came before it. Raises Bug when it says too much, or nothing."""
        service, methods = KINDS[kind]
        channel, path = self._channels[kind], f"/{service}/{method}"
        streams, answers = {name: way for name, _, way in methods}[method], list[bytes]()
        try:
            if method == UPLOAD[0]:
                answers.append(channel.stream_unary(path)(iter(parts), timeout=SECONDS))
            elif streams:
                for answer in channel.stream_stream(path)(iter(parts), timeout=SECONDS):
                    answers.append(answer)
            else:
                answers.append(channel.unary_unary(path)(parts[0], timeout=SECONDS))
        except grpc.RpcError as error:
            status: Any = error
            code = status.code()
            if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                raise Bug(f"sockets: {path} ends with {code.name}: {status.details()}") from None
            if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                raise Bug(f"sockets: {method} ends with {code.name}") from None
            return str(code.name), answers
        return "OK", answers

    def _bare(self, number: int, said: bytes, stay: bool) -> str:
        """A connection without gRPC."""
        connection = socket.create_connection(("127.0.0.1", self._ports[number]), timeout=SECONDS)
        if stay:
            self._silent.append(connection)
            if len(self._silent) > SILENT:
                self._silent.pop(0).close()
            return "silent"
        connection.sendall(said)
        connection.close()
        return "noise"

    def _ask_gpu(self) -> bytes:
        channel = self._channels[b"G"]
        load = gpu.LoadRequest(model="llama", precision=gpu.PRECISION_INT8).SerializeToString()
        channel.unary_unary("/wire.v1.GpuWorkerService/Load")(load, timeout=120, wait_for_ready=True)
        ring = gpu.Operation(ring_matmul=gpu.RingMatmul(layer=1, linear=gpu.LINEAR_QKV))
        parts = [frame.SerializeToString() for frame in frames(1, ring, ROW, 1)]
        answers = channel.stream_stream("/wire.v1.GpuWorkerService/Execute")(iter(parts), timeout=SECONDS)
        return b"".join(gpu.ExecuteResponse.FromString(answer).data for answer in answers)

    def _ask_trusted(self) -> bytes:
        """Greedy tokens, once sessions of hostile clients have expired."""
        channel, deadline = self._channels[b"T"], time.monotonic() + SECONDS
        while pb.StatsResponse.FromString(
            channel.unary_unary("/wire.v1.TrustedWorkerService/Stats")(b"", timeout=SECONDS)
        ).sessions:
            if time.monotonic() > deadline:
                raise Bug("sockets: sessions of clients that left stay")
            time.sleep(0.1)
        session = self._caller.open()
        said = self._caller.tokens(session, pb.DecodeRequest(token_ids=[3, 1, 4], credit=4), 4)
        self._caller.close(session)
        return b"".join(said)


def _request() -> pb.OpenRequest:
    return pb.OpenRequest(model="llama", scheme="tee-only", precision=gpu.PRECISION_INT8, max_context=20)


def _start(module: str, *flags: str) -> Any:
    command = [sys.executable, "-m", module, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _peak(pid: int) -> int:
    """The most resident bytes that a process ever had."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
