"""Both real workers and the two links between three parties, with everything that a fault test asks of them."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from client.attestation.policy import Policy
from client.session import Request, connect
from client.turn import Pacing
from deploy.local.child import Child
from tests.faults.link import Link
from tests.faults.puppet import PATIENCE, ROOT, Puppet
from wire import channel
from wire.v1 import gpu_worker_pb2, gpu_worker_pb2_grpc, trusted_worker_pb2_grpc
from wire.v1 import trusted_worker_pb2 as pb

DEMO = ROOT / "models" / "demo"
DEADLINES = {"step": 1.0, "connect": 1.0, "session": 1.0, "request": 3.0}  # flags of the trusted worker, seconds
CLIENT_SECONDS = 4.0  # `--timeout` of clients
CONTEXT = 320
GPU, TRUSTED, CLIENT = "GPU worker", "trusted worker", "client"


def until(done: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for a condition; a generous limit."""
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.02)


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """Of a process now. Where the kernel hides a process's files, the size of its table counts."""
        try:
            files = len(os.listdir(f"/proc/{pid}/fd"))
        except PermissionError:
            status = Path(f"/proc/{pid}/status").read_text()
            files = int(next(line.split()[1] for line in status.splitlines() if line.startswith("FDSize")))
        return cls(files, len(os.listdir(f"/proc/{pid}/task")))

    def within(self, other: "Footprint") -> bool:
        """Whether the other holds at least as much."""
        return self.files <= other.files and self.threads <= other.threads


@dataclass
class Fleet:
    """A context manager. `front` is the link of clients, `back` the one between the workers."""

    folder: Path
    scheme: str = "secure-infer"
    more: tuple[str, ...] = ("--pad-bank", "4MiB", "--prefill", "worker")
    deadlines: dict[str, float] = field(default_factory=lambda: dict(DEADLINES))

    def __enter__(self) -> Self:
        self._log = (self.folder / "log").open("a")
        self._puppets: list[Puppet] = []
        self._gpu_socket, self.socket = f"unix:{self.folder}/gpu", f"unix:{self.folder}/trusted"
        with ExitStack() as stack:
            stack.callback(self._log.close)
            self.front, self.back = Link(self.socket), Link(self._gpu_socket)
            stack.callback(self.front.close)
            stack.callback(self.back.close)
            self.children: dict[str, Child] = {}
            stack.callback(self._stop)
            self.start(GPU)
            self.start(TRUSTED)
            self._channel = stack.enter_context(grpc.insecure_channel(self.socket))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def request(self) -> Request:
        """What clients open."""
        return Request(DEMO.name, self.scheme, self.precision, max_context=CONTEXT)

    @property
    def precision(self) -> str:
        """That of the scheme."""
        return "float32" if self.scheme == "kv-shield" else "int8"

    def start(self, role: str) -> None:
        """A worker, ready to serve. In the main thread only."""
        argv = ["--model", str(DEMO)]
        if role == GPU:
            ops = "all" if self.scheme == "kv-shield" else "ring"
            argv = ["-m", "gpu_worker", "--listen", self._gpu_socket, "--ops", ops, *argv]
        else:
            argv = ["-m", "trusted_worker", "--listen", self.socket, "--gpu-worker", self.back.target, *argv]
            argv += ["--scheme", self.scheme, *self.more]
            for name, seconds in self.deadlines.items():
                argv += [f"--{name}-seconds", str(seconds)]
        child = self.children[role] = Child(role, argv, ROOT, self._log, lambda: None)
        child.await_line("listening on", PATIENCE, "starting", lambda *_: None)
        if role == GPU:
            self._await_gpu_worker()
        else:
            child.await_line("serving", PATIENCE, "loading", lambda *_: None)

    def _await_gpu_worker(self) -> None:
        """Until it has imported what it needs and holds the model."""
        precision = gpu_worker_pb2.Precision.Value(f"PRECISION_{self.precision.upper()}")
        with grpc.insecure_channel(self._gpu_socket, options=channel.client_options()) as line:
            stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(line)
            stub.Describe(gpu_worker_pb2.DescribeRequest(), timeout=PATIENCE, wait_for_ready=True)
            stub.Load(gpu_worker_pb2.LoadRequest(model=DEMO.name, precision=precision), timeout=PATIENCE)

    def pid(self, role: str) -> int:
        """Of a worker."""
        return self.children[role].pid

    def signal(self, role: str, number: int) -> None:
        """To a worker. One that is killed is gone when this returns."""
        os.kill(self.pid(role), number)
        if number == signal.SIGKILL:
            self.children[role].reap()

    def heal(self) -> None:
        """Whatever was done is undone: links carry, stopped processes go on, dead ones have successors."""
        for link in (self.front, self.back):
            link.release()
            link.restore()
        for role in (GPU, TRUSTED):
            if self.children[role].running:
                self.signal(role, signal.SIGCONT)
            else:
                self.start(role)

    def stats(self) -> pb.StatsResponse:
        """Counters of the trusted worker, not by way of a link."""
        stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self._channel)
        return stub.Stats(pb.StatsRequest(), timeout=PATIENCE, wait_for_ready=True)

    def ask(self, ids: list[int], count: int, aside: bool = False) -> list[int]:
        """A fresh session's answer to one prompt; `aside`: not by way of the front link."""
        with connect(self.socket if aside else self.front.target, Policy()) as worker:
            session = worker.open(self.request)
            try:
                return [one.token_id for one in session.turn(ids, Pacing(8, count, CLIENT_SECONDS))]
            finally:
                session.close()

    def puppet(self) -> Puppet:
        """A client process with an open session."""
        puppet = Puppet(self.front.target, self.folder, self._log)
        self._puppets.append(puppet)
        fields = {name: value for name, value in vars(self.request).items() if not isinstance(value, bytes)}
        assert puppet.do("open", **fields) == {}
        return puppet

    def dismiss(self) -> None:
        """End all client processes."""
        while self._puppets:
            self._puppets.pop().end()

    def processes(self) -> list[int]:
        """All processes that carry this fleet's folder in their command line, whoever is their parent."""
        found = []
        for one in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended meanwhile
                found += [int(one.parent.name)] if str(self.folder).encode() in one.read_bytes() else []
        return found

    def _stop(self) -> None:
        self.dismiss()
        for child in reversed(self.children.values()):
            if child.running:
                os.kill(child.pid, signal.SIGCONT)
            child.kill()
            child.reap()
