"""A simulated TEE, a GPU worker, a trusted worker that can be killed and started again; gateways as processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import httpx2

from client.flags import DEMO_MODEL
from deploy.local import simulated_policy
from deploy.local.child import Child
from tests.faults.fleet import until
from tests.faults.puppet import PATIENCE, ROOT
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

LONG = "What is an onion router?"  # has a long answer


class Stand:
    """A context manager. `target` is where the trusted worker listens, `policy` the file under which it is accepted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.policy = folder, folder / "policy.toml"
        self.target, self.gpu = f"unix:{folder}/trusted", f"unix:{folder}/gpu"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            tsm = self.folder / "tsm"
            tsm.mkdir(0o700)
            tee = self._child(stack, "TEE", "-m", "deploy.local.simulated_tee", "--folder", str(tsm))
            ops = ("--ops", "ring", "--model", str(DEMO_MODEL))
            self._child(stack, "GPU", "-m", "gpu_worker", "--listen", self.gpu, *ops)
            self.start()
            stack.callback(self.stop)
            root, measurement = tee.await_line("ready", PATIENCE, "keys", lambda *_: None).split()
            simulated_policy.write(self.policy, simulated_policy.text(root, measurement, "secure-infer", []))
            self._channel = stack.enter_context(grpc.insecure_channel(self.target))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """The trusted worker, serving. In the main thread only."""
        words = ["-m", "trusted_worker", "--listen", self.target, "--gpu-worker", self.gpu, "--model", str(DEMO_MODEL)]
        words += ["--scheme", "secure-infer", "--pad-bank", "16MiB", "--session-seconds", "1", "--drain-seconds", "1"]
        words += ["--evidence", "tsm", "--tsm-dir", str(self.folder / "tsm")]
        self.trusted = Child("trusted worker", words, ROOT, None, lambda: None)
        self.trusted.await_line("serving", PATIENCE, "loading", lambda *_: None)

    def stop(self) -> None:
        """The trusted worker is gone at once."""
        self.trusted.kill()
        self.trusted.reap()

    def stats(self) -> pb.StatsResponse:
        """Its counters."""
        stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self._channel)
        return stub.Stats(pb.StatsRequest(), timeout=PATIENCE, wait_for_ready=True)

    def idle(self) -> None:
        """Wait until nobody has a session."""
        until(lambda: not self.stats().sessions)

    def _child(self, stack: ExitStack, name: str, *words: str) -> Child:
        child = Child(name, words, ROOT, None, lambda: None)
        stack.callback(child.reap)
        stack.callback(child.kill)
        return child


class Running:
    """A gateway that listens. `url` has no path."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self._log = process, log
        self.greeting: list[str] = []
        for line in process.stdout or ():
            self.greeting.append(line)
            if line.startswith("python"):
                break
        assert self.greeting, self.log()
        self.base = self.greeting[0].split()[2].rstrip(";")
        self.url = self.base.removesuffix("/v1")
        self.http = httpx2.Client(base_url=self.url, timeout=PATIENCE)

    def log(self) -> str:
        """What it said on stderr."""
        return self._log.read_text()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self.http.get(path).json()

    def ready(self) -> bool:
        """What /ready says."""
        return self.http.get("/ready").status_code == 200

    def chat(self, **fields: Any) -> httpx2.Response:
        """A raw call; asks something unless there are messages."""
        return self.http.post("/v1/chat/completions", json={"model": "demo", "messages": asked(LONG)} | fields)

    def end(self, number: int = signal.SIGINT) -> int:
        """Stop it; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def asked(*texts: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant, in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


@contextmanager
def gateway(folder: Path, *words: str) -> Iterator[Running]:
    """`cleave gateway` on a port of its own."""
    log = folder / f"gateway-{os.urandom(4).hex()}.log"
    command = [sys.executable, "-m", "client", "gateway", "--listen", "127.0.0.1:0", *words]
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield Running(process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
