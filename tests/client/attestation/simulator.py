"""The simulated TEE as a process, driven as the trusted worker drives it; and a server that hands out evidence."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc

from client.attestation.policy import Offer
from client.attestation.snp_case import SnpEvidence
from deploy.local import simulated_policy
from deploy.local.child import Child
from tests.client.attestation.policies import GOOD_CLAIMS
from wire import binding
from wire.channel import server_options
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 60.0
NONCE, KEY, CLAIMS = b"n" * 32, b"k" * 32, binding.canonical(GOOD_CLAIMS)
FILES = ("provider", "generation", "inblob", "auxblob", "outblob")


class Simulator:
    """One start of the process, over a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(0o700)
        self._folder, self._names = folder, itertools.count()
        argv = ["-m", "deploy.local.simulated_tee", "--folder", str(folder)]
        self.child = Child("simulated TEE", argv, ROOT, None, lambda: None)
        said = self.child.await_line("ready", PATIENCE, "waiting for the keys", lambda stage, seconds: None)
        self.root, self.measurement = said.split()

    def stop(self) -> None:
        self.child.kill()
        self.child.reap()

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """As trusted_worker/tsm.py asks for it."""
        request = self._folder / f"request-{next(self._names)}"
        request.mkdir()
        await_file(request / "provider")
        assert (request / "provider").read_text() == "simulated\n"
        assert (request / "generation").read_text() == "0\n"
        with (request / "inblob").open("r+b") as file:
            file.write(report_data)
        await_file(request / "outblob")
        assert (request / "generation").read_text() == "1\n"
        report, table = (request / "outblob").read_bytes(), (request / "auxblob").read_bytes()
        for name in FILES:
            (request / name).unlink()
        request.rmdir()
        return SnpEvidence(report, certificates(table))

    def offer(
        self, nonce: bytes = NONCE, key: bytes = KEY, claims: bytes = CLAIMS, provider: str = "simulated"
    ) -> Offer:
        made = self.evidence(binding.report_data(provider, nonce, key, claims))
        return Offer(nonce, made.report, key, claims, made.certificates)

    def policy(self, root: str = "", measurement: str = "") -> str:
        """The file that a cluster writes, for this start."""
        return simulated_policy.text(root or self.root, measurement or self.measurement, "secure-infer", [])


def await_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.002)


def certificates(table: bytes) -> tuple[bytes, ...]:
    """Those of a certificate table, in its order."""
    found = []
    for start in range(0, len(table), 24):
        entry = table[start : start + 24]
        if not any(entry):
            break
        offset, size = (int.from_bytes(entry[at : at + 4], "little") for at in (16, 20))
        found.append(table[offset : offset + size])
    return tuple(found)


class Attester(trusted_worker_pb2_grpc.TrustedWorkerServiceServicer):
    """Answers Attest as it is told; every other call is refused, and counted."""

    def __init__(self, answer: Callable[[bytes], tuple[str, Offer]]) -> None:
        self._answer = answer
        self.nonces: list[bytes] = []
        self.other_calls = 0

    def Attest(self, request: pb.AttestRequest, context: grpc.ServicerContext) -> pb.AttestResponse:
        self.nonces.append(request.nonce)
        provider, offer = self._answer(request.nonce)
        return pb.AttestResponse(
            provider=provider,
            evidence=offer.evidence,
            nonce=offer.nonce,
            hpke_key=offer.hpke_key,
            claims=offer.claims,
            certificates=offer.certificates,
            collateral=offer.collateral,
        )

    def _refuse(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        self.other_calls += 1
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "only Attest")
        raise AssertionError

    Open = Close = Stats = _refuse
    Decode = Upload = _refuse  # type: ignore[assignment]


@contextlib.contextmanager
def serving(answer: Callable[[bytes], tuple[str, Offer]]) -> Iterator[tuple[str, Attester]]:
    """A target, and what records the nonces that came there."""
    attester = Attester(answer)
    server = grpc.server(futures.ThreadPoolExecutor(2), options=server_options())
    trusted_worker_pb2_grpc.add_TrustedWorkerServiceServicer_to_server(attester, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", attester
    finally:
        server.stop(grace=None).wait(5)
