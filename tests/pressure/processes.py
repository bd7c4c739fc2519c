"""Trusted workers as processes, each with its own flags, and the one GPU worker that they share."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.attestation.policy import Policy
from client.session import Request, connect
from client.turn import Pacing
from deploy.local.child import Child
from tests.faults.fleet import DEMO, until
from tests.faults.puppet import PATIENCE, ROOT
from trusted_worker.serving import NAME
from wire.errors import CleaveError
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

Said = list[int] | CleaveError


@contextmanager
def gpu_worker(folder: Path) -> Iterator[str]:
    """A GPU worker of the demo model, and where it listens. It need not be ready: trusted workers wait for it."""
    address = f"unix:{folder}/gpu"
    words = ["-m", "gpu_worker", "--listen", address, "--ops", "ring", "--model", str(DEMO)]
    child = Child("GPU worker", words, ROOT, None, lambda: None)
    try:
        yield address
    finally:
        child.kill()
        child.reap()


@dataclass
class Trusted:
    """A trusted worker that serves."""

    child: Child
    address: str
    scheme: str
    model: Path
    channel: grpc.Channel

    @property
    def request(self) -> Request:
        """What clients open."""
        return Request(self.model.name, self.scheme, "int8", model_folder=self.model)

    @property
    def stub(self) -> trusted_worker_pb2_grpc.TrustedWorkerServiceStub:
        """For raw calls."""
        return trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self.channel)

    def stats(self) -> pb.StatsResponse:
        """Its counters."""
        return self.stub.Stats(pb.StatsRequest(), timeout=PATIENCE)

    def serving(self) -> bool:
        """What health says; and the process is alive."""
        request = health_pb2.HealthCheckRequest(service=NAME)
        said = health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=PATIENCE).status
        return self.child.running and said == health_pb2.HealthCheckResponse.SERVING

    def say(self, ids: list[int], count: int) -> list[int]:
        """A client of its own: a session, `count` tokens after a prompt. Raises CleaveError."""
        with connect(self.address, Policy()) as worker:
            session = worker.open(self.request)
            try:
                return [token.token_id for token in session.turn(ids, Pacing(4, count, PATIENCE))]
            finally:
                session.close()

    def all_say(self, prompts: list[list[int]], count: int) -> list[Said]:
        """One client for each prompt, at once: what it was told, or why not."""

        def ask(ids: list[int]) -> Said:
            try:
                return self.say(ids, count)
            except CleaveError as error:
                return error

        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(ask, prompts))

    def settled(self, before: pb.StatsResponse) -> None:
        """Everybody has left: the arena and the folder are as they were."""
        until(lambda: not self.stats().sessions)
        after = self.stats()
        assert (after.memory_used, after.kv_pages_used, after.pads_reused) == (before.memory_used, 0, 0)
        assert after.spill_bytes == before.spill_bytes
        assert after.memory_peak <= after.memory_budget


@contextmanager
def trusted_worker(folder: Path, scheme: str, *flags: str, gpu: str = "", model: Path = DEMO) -> Iterator[Trusted]:
    """It serves, and has no session. `folder` takes its socket."""
    address = f"unix:{folder}/{scheme}"
    words = ["-m", "trusted_worker", "--listen", address, "--gpu-worker", gpu, "--model", str(model)]
    words += ["--scheme", scheme, "--connect-seconds", str(PATIENCE), "--threads", "1", *flags]
    child = Child("trusted worker", words, ROOT, None, lambda: None)
    try:
        child.await_line("serving", PATIENCE, "loading", lambda *_: None)
        with grpc.insecure_channel(address) as channel:
            yield Trusted(child, address, scheme, model, channel)
    finally:
        child.kill()
        child.reap()
