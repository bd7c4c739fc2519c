"""Builds the scheme that the settings name, opens sessions on it, and counts. Compute thread only, but for `stats`."""

import logging
import secrets
from collections.abc import Callable
from typing import cast

from trusted_worker import metrics
from trusted_worker.config import Settings
from trusted_worker.engine import Engine
from trusted_worker.kv_cache import Cache
from trusted_worker.metrics import Latencies
from trusted_worker.model import scratch_bytes
from trusted_worker.offload import GpuWorker
from trusted_worker.pads import Bank, PadSource
from trusted_worker.sampling import Sampler
from trusted_worker.schemes import kv_shield
from trusted_worker.schemes.base import Scheme
from trusted_worker.schemes.kv_shield import KvShield
from trusted_worker.schemes.plain import Plain
from trusted_worker.schemes.secure_infer import Prefill, SecureInfer
from trusted_worker.schemes.split import Split
from trusted_worker.schemes.tee_only import TeeOnly
from trusted_worker.sealed_model import is_sealed, open_sealed, read_key
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.session import MAX_FRAME_TOKENS, Session
from trusted_worker.weights import Weights
from wire.checkpoint import Checkpoint
from wire.errors import (
    CheckpointError,
    ContextError,
    ExhaustedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)
from wire.kv_pages import KvType
from wire.metrics import resident_bytes
from wire.model_config import ModelConfig
from wire.tls import from_flags
from wire.v1 import gpu_worker_pb2
from wire.v1 import trusted_worker_pb2 as pb

log = logging.getLogger(__name__)

MAX_ROWS = 64  # rows of one step, when the budget allows
DEFAULT_CONTEXT = 2048  # tokens of a session whose client names no number; less when they do not fit
SMALL_CONTEXT = 256
SESSION_BYTES = 16
_PRECISIONS = {"float32": gpu_worker_pb2.PRECISION_FLOAT32, "int8": gpu_worker_pb2.PRECISION_INT8}


class Service:
    """One model under one scheme. `engine` runs it; sessions are known by unguessable names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.config = ModelConfig.from_hf(settings.model)
        self._precision = _PRECISIONS[settings.precision]
        self._memory = SecureMemory(settings.memory_budget)
        log.info("secure memory: %d bytes, %s", settings.memory_budget, self._memory.protections)
        self.worker = GpuWorker(
            settings.gpu_worker,
            self.config.name,
            self._precision,
            settings.step_seconds,
            settings.connect_seconds,
            from_flags(settings.tls_certificate, settings.tls_key, settings.tls_authority),
        )
        self.draining = False
        self._latencies = Latencies()
        self._scheme: Scheme | None = None
        self._sessions: dict[bytes, Session] = {}
        self.engine = Engine(self._load, MAX_ROWS)

    def open(self, request: pb.OpenRequest) -> pb.OpenResponse:
        """Admit a session or refuse it before anything starts."""
        self._check(request)
        if self.draining:
            raise UnavailableError("the trusted worker is draining: it takes no new sessions")
        if self._scheme is None:
            raise PreconditionError("model is loading; try again in a moment")
        most = min(self.config.max_context, self._settings.max_context or self.config.max_context)
        if request.max_context > most:
            raise ContextError(f"a context of {request.max_context} tokens was asked; the most is {most}")
        sampler = Sampler(request.sampling)
        cache = self._scheme.open(request.max_context) if request.max_context else _open(self._scheme, most)
        session = Session(self.config, cache, sampler, self._latencies)
        self.engine.add(session)
        name = secrets.token_bytes(SESSION_BYTES)
        self._sessions = {key: one for key, one in self._sessions.items() if not one.dead} | {name: session}
        return pb.OpenResponse(
            session=name,
            model=self.config.name,
            scheme=self._settings.scheme,
            precision=self._precision,
            max_context=cache.capacity,
            vocabulary=self.config.vocabulary,
            max_frame_tokens=MAX_FRAME_TOKENS,
        )

    def session(self, name: bytes) -> Session:
        """A living session by its name. Raises UnauthenticatedError: unknown, closed and expired look the same."""
        session = self._sessions.get(name)
        if session is None or session.dead:
            raise UnauthenticatedError("no such session")
        return session

    def close(self, name: bytes) -> None:
        """End a session; one that is gone already is fine."""
        session = self._sessions.pop(name, None)
        if session is not None:
            session.fail(UnavailableError("the session was closed"))
            self.engine.remove(session)

    def expire(self, name: bytes) -> None:
        """End a session that no client holds any more."""
        session = self._sessions.get(name)
        if session is not None and not session.attached:
            self.close(name)

    def stats(self) -> pb.StatsResponse:
        """Counters since the start."""
        traffic = self.worker.traffic
        return pb.StatsResponse(
            scheme=self._settings.scheme,
            precision=self._precision,
            exchanges=traffic.exchanges,
            wire_bytes_up=traffic.bytes_up,
            wire_bytes_down=traffic.bytes_down,
            memory_budget=self._memory.budget,
            memory_used=self._memory.used,
            memory_peak=self._memory.peak,
            memory_locked=self._memory.protections["locked"],
            rss=resident_bytes(),
            sessions=self.engine.sessions,
            tokens=self.engine.steps_rows,
            step_seconds=self.engine.step_seconds,
            exchange_seconds=traffic.seconds,
            worker_seconds=traffic.worker_seconds,
            **(self._scheme.counters() if self._scheme is not None else {}),
        )

    def metrics(self) -> str:
        """The same for Prometheus, and latencies."""
        return metrics.text(self.stats(), self._latencies, self.engine.running, self.engine.queued)

    def _check(self, request: pb.OpenRequest) -> None:
        settings = self._settings
        if request.model != self.config.name:
            raise PreconditionError(f"this worker serves the model {self.config.name}")
        if request.scheme != settings.scheme or request.precision != self._precision:
            raise PreconditionError(f"this worker serves {settings.scheme} at {settings.precision}")

    def _load(self) -> Scheme:
        try:
            scheme = self._build()
        except ExhaustedError as error:
            raise ExhaustedError(f"{error}; start the trusted worker with a larger --memory-budget") from error
        if self._settings.scheme != "tee-only":
            self.worker.connect(patient=True)
        self._scheme = scheme
        return scheme

    def _build(self) -> Scheme:
        settings, memory = self._settings, self._memory
        if settings.scheme == "kv-shield":
            return self._kv_shield()
        if settings.scheme != "tee-only":
            self._refuse_sealed()
        if settings.scheme == "plain":
            return Plain(self.config, self.worker, KvType[settings.kv_dtype.upper()])
        checkpoint = self._checkpoint()
        int8 = settings.precision == "int8"
        weights = Weights(checkpoint, self.config, memory, int8)
        scratch = self._scratch(lambda rows: scratch_bytes(weights, rows))
        if settings.scheme == "tee-only":
            return TeeOnly(weights, memory, scratch, int8)
        if settings.scheme == "split":
            return Split(weights, memory, scratch, self.worker, int8)
        boot_key = secrets.token_bytes(32)
        source = PadSource(boot_key, checkpoint.digest())
        bank = Bank(boot_key, weights.specs, settings.pad_bank, settings.spill_dir)
        return SecureInfer(weights, memory, scratch, self.worker, source, bank, cast(Prefill, settings.prefill))

    def _kv_shield(self) -> KvShield:
        settings, kv_type = self._settings, KvType[self._settings.kv_dtype.upper()]
        log.warning(
            "kv-shield does not protect the conversation from the GPU worker, which sees every activation: it hides "
            "the KV cache from somebody who reads nothing but the cache and does not know the model"
        )
        options = kv_shield.Options(
            rope_on_worker=settings.rope == "worker",
            kv_type=kv_type,
            rotate_every=settings.rotate_every,
            seal_idle=settings.seal_idle,
            provision_all=settings.model_key_file is not None,
        )
        scratch = self._scratch(lambda rows: kv_shield.scratch_bytes(self.config, kv_type, rows))
        pages = PageStore(secrets.token_bytes(32), settings.spill_dir)
        checkpoint = self._checkpoint()
        scheme = KvShield(checkpoint, self.config, self._memory, scratch, self.worker, pages, options)
        self.worker.greet = scheme.provision
        return scheme

    def _checkpoint(self) -> Checkpoint:
        """The model's weights, opened here if they are sealed. Raises CheckpointError, PreconditionError."""
        settings = self._settings
        if settings.model_key_file is not None:
            if not is_sealed(settings.model):
                raise CheckpointError(f"{settings.model} is not sealed: leave --model-key-file out")
            return open_sealed(settings.model, read_key(settings.model_key_file), self.config)
        if is_sealed(settings.model):
            raise CheckpointError(f"{settings.model} is sealed: say where its key is with --model-key-file FILE")
        return Checkpoint(settings.model)

    def _refuse_sealed(self) -> None:
        if is_sealed(self._settings.model):
            raise PreconditionError(
                f"{self._settings.model} is sealed, and {self._settings.scheme} needs a GPU worker that reads it from "
                "its own disk: use --scheme kv-shield or tee-only"
            )

    def _scratch(self, needed: Callable[[int], int]) -> Scratch:
        """Scratch for as many rows as a quarter of the budget holds. Raises ExhaustedError when not even one fits."""
        rows, memory = MAX_ROWS, self._memory
        while rows > 1 and needed(rows) > max(memory.budget // 4, needed(1)):  # nothing is saved below
            rows //= 2
        if needed(rows) > memory.largest_free():
            raise ExhaustedError(f"a memory budget of {memory.budget} bytes does not hold one row of this model")
        self.engine.limit_rows(rows)
        return Scratch(memory, needed(rows))


def _open(scheme: Scheme, most: int) -> Cache:
    """A cache of a size that the client left to us. Raises ExhaustedError when not even a small one fits."""
    tokens = min(most, DEFAULT_CONTEXT)
    while True:
        try:
            return scheme.open(tokens)
        except ExhaustedError:
            if tokens <= SMALL_CONTEXT:
                raise
            tokens //= 2
