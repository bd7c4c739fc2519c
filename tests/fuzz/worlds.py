"""Services of the trusted worker whose compute thread is this one, each under another scheme and another budget."""

import hashlib
from pathlib import Path
from typing import Any

from client.embedding import EmbeddingTable
from tests.fuzz.harness import KNOWN, Bug
from tests.fuzz.uploads import adapter
from tests.simulators.in_process import InProcessWorker
from trusted_worker.attestation import Attestor
from trusted_worker.config import parse
from trusted_worker.offload import Traffic
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.service import Service
from wire.errors import CleaveError, ExhaustedError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb

ADAPTERS = 48 << 10  # bytes
_ADAPTERS = ("--adapter-memory", str(ADAPTERS))
WORLDS = (
    ("llama", "tee-only", "float32", "256KiB", ()),
    ("mistral", "tee-only", "int8", "192KiB", ("--max-context", "50")),
    ("llama", "secure-infer", "int8", "4MiB", ("--prefill", "worker", "--pad-bank", "64KiB", *_ADAPTERS)),
    ("qwen3", "kv-shield", "float32", "64KiB", ("--seal-idle", "--rotate-every", "4", "--kv-dtype", "int8")),
    ("gpt2", "plain", "float32", "64KiB", ()),
    ("llama", "tee-only", "int8", "80KiB", ("--embed", "client", "--kv-dtype", "int8")),
    ("qwen3", "secure-infer", "int8", "160KiB", ("--embed", "client", "--prefill", "worker", "--pad-bank", "8KiB")),
    ("llama", "secure-infer", "int8", "112KiB", ("--kv-dtype", "float16", "--prefill", "worker", "--pad-bank", "8KiB")),
    ("llama", "tee-only", "float32", "320KiB", _ADAPTERS),
)
PRECISIONS = {"float32": gpu.PRECISION_FLOAT32, "int8": gpu.PRECISION_INT8}
KEY = hashlib.sha256(b"a public key").digest()


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


class World:
    """A service, and what it held at the start."""

    def __init__(self, folders: dict[str, Path], index: int) -> None:
        self.model, self.scheme, self.precision, budget, more = WORLDS[index]
        flags = ["--model", str(folders[self.model]), "--scheme", self.scheme, "--precision", self.precision]
        flags += ["--memory-budget", budget, "--gpu-worker", "unix:/nowhere", *more]
        self.service = _service(flags)
        self.adapters = more[-2:] == _ADAPTERS
        if self.scheme != "tee-only":
            self.service.worker = _Local(folders[self.model], self.service.config, PRECISIONS[self.precision])
        self.runner = self.service._load()
        self.service.engine.scheme = self.runner
        self.attestor = Attestor(parse(flags), lambda: KEY, self.service.claims)
        self.rest()
        stats = self.service.stats()
        self.used, self.spilled = stats.memory_used, stats.spill_bytes
        embeds = stats.embedding == "client"
        self.table = EmbeddingTable(folders[self.model], self.precision) if embeds else None
        self.said: list[int] | None = None

    def request(self) -> pb.OpenRequest:
        """What opens a session."""
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
        self._forget_adapters()
        self.rest()
        stats = self.service.stats()
        if (stats.sessions, stats.memory_used, stats.pads_reused) != (0, self.used, 0):
            raise Bug(f"trusted: {self.scheme} keeps {stats.sessions} sessions, {stats.memory_used - self.used} bytes")
        if (stats.kv_pages_used, stats.spill_bytes, stats.adapter_bytes) != (0, self.spilled, 0):
            raise Bug(f"trusted: {self.scheme} keeps {stats.kv_pages_used} pages, {stats.adapter_bytes} of adapters")

    def _forget_adapters(self) -> None:
        """They stay until their place is needed: so an upload comes that needs all there is."""
        for size in range(ADAPTERS, 8, -8) if self.adapters and self.service.stats().adapters else ():
            try:
                self.service.begin_upload(adapter(1)[0], size).abandon()
                return
            except ExhaustedError:
                continue


def _service(flags: list[str]) -> Any:
    return Service(parse(flags), ProcessLimit())
