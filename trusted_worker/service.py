"""Opens sessions on the scheme that the settings name, and counts. Compute thread only, but for `stats`, `claims`."""

import hmac
import logging
import secrets

from trusted_worker import metrics
from trusted_worker.adapters import Incoming
from trusted_worker.assembly import Assembled, assemble
from trusted_worker.attestation import claims
from trusted_worker.cache import Cache
from trusted_worker.config import Settings
from trusted_worker.engine import Engine
from trusted_worker.metrics import Latencies
from trusted_worker.offload import GpuWorker
from trusted_worker.perturbation import KEY_BYTES
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.sampling import Sampler
from trusted_worker.schemes.base import InsideDecoder, Scheme
from trusted_worker.secure_memory import BudgetExceeded, SecureMemory
from trusted_worker.session import EMBEDDING_FRAME_BYTES, MAX_FRAME_TOKENS, Session
from wire.errors import ContextError, ExhaustedError, PreconditionError, UnauthenticatedError, UnavailableError
from wire.metrics import resident_bytes
from wire.model_config import ModelConfig
from wire.plan import MAX_ROWS
from wire.tls import from_flags
from wire.v1 import gpu_worker_pb2
from wire.v1 import trusted_worker_pb2 as pb

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 2048  # tokens of a session whose client names no number; less when they do not fit
SMALL_CONTEXT = 256
SESSION_BYTES = 16
_PRECISIONS = {"float32": gpu_worker_pb2.PRECISION_FLOAT32, "int8": gpu_worker_pb2.PRECISION_INT8}


class Service:
    """One model under one scheme. `engine` runs it; sessions are known by unguessable names."""

    def __init__(self, settings: Settings, limit: ProcessLimit) -> None:
        self._settings, self._limit = settings, limit
        self.config = ModelConfig.from_hf(settings.model)
        self._precision = _PRECISIONS[settings.precision]
        self._client_embeds = settings.embed == "client"
        self._memory = SecureMemory(settings.memory_budget)
        log.info("secure memory: %d bytes, %s", settings.memory_budget, self._memory.protections)
        self.worker = GpuWorker(
            settings.gpu_worker,
            self.config.name,
            self._precision,
            settings.step_seconds,
            settings.connect_seconds,
            from_flags(settings.tls_certificate, settings.tls_key, settings.tls_authority),
            settings.switch_us,
            settings.stream,
        )
        self.draining = False
        self._noise_key = secrets.token_bytes(KEY_BYTES)
        self._latencies = Latencies()
        self._assembled: Assembled | None = None
        self._claims = b""  # made with it, from the source files as they are then
        self._sessions: dict[bytes, Session] = {}
        self.engine = Engine(self._load, MAX_ROWS)

    def open(self, request: pb.OpenRequest, secret: bytes) -> pb.OpenResponse:
        """Admit a session or refuse it before anything starts. `secret`: what its other calls are sealed with."""
        self._check(request)
        if self.draining:
            raise UnavailableError("the trusted worker is draining: it takes no new sessions")
        assembled = self._loaded()
        most = min(self.config.max_context, self._settings.max_context or self.config.max_context)
        if request.max_context > most:
            raise ContextError(f"a context of {request.max_context} tokens was asked; the most is {most}")
        noise = hmac.digest(self._noise_key, request.adapter, "sha256")  # see perturbation.py
        sampler = Sampler(request.sampling, noise, self._settings.least_perturbation)
        scheme, embeds = assembled.scheme, self._client_embeds
        adapter = assembled.adapters.find(request.adapter) if request.adapter else None
        cache = scheme.open(request.max_context) if request.max_context else _open(scheme, most)
        session = Session(self.config, cache, sampler, assembled.scratch, self._latencies, secret, embeds, adapter)
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
            max_frame_tokens=min(
                MAX_FRAME_TOKENS, EMBEDDING_FRAME_BYTES // (4 * self.config.hidden) if embeds else MAX_FRAME_TOKENS
            ),
            client_embeds=embeds,
            hidden=self.config.hidden,
            adapter=request.adapter,
            perturbation=sampler.perturbation,
        )

    def begin_upload(self, config: bytes, size: int) -> Incoming:
        """An adapter on its way. Raises what Adapters.begin raises; while the model is loading PreconditionError."""
        return self._loaded().adapters.begin(config, size)

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

    def claims(self) -> bytes:
        """What evidence is to bind beside the key. Any thread. Raises PreconditionError while the model is loading."""
        self._loaded()
        return self._claims

    def stats(self) -> pb.StatsResponse:
        """Counters since the start."""
        traffic, settings, assembled = self.worker.traffic, self._settings, self._assembled
        protections = self._memory.protections
        return pb.StatsResponse(
            scheme=self._settings.scheme,
            precision=self._precision,
            exchanges=traffic.exchanges,
            wire_bytes_up=traffic.bytes_up,
            wire_bytes_down=traffic.bytes_down,
            memory_budget=self._memory.budget,
            memory_used=self._memory.used,
            memory_peak=self._memory.peak,
            memory_locked=protections["locked"],
            memory_wiped_on_fork=protections["wiped on fork"],
            memory_not_dumped=protections["not dumped"],
            tee_profile=settings.tee_profile,
            process_limit=self._limit.kind,
            process_limit_bytes=self._limit.bytes,
            switch_us=settings.switch_us,
            embedding=assembled.embedding if assembled else "",
            weights_resident=assembled.weights_resident if assembled else False,
            projections=assembled.placement.where if assembled else "",
            projections_outside_seconds=assembled.placement.outside if assembled else 0.0,
            projections_inside_seconds=assembled.placement.inside if assembled else 0.0,
            tiles_unchecked=settings.insecure_unchecked_tiles,
            rss=resident_bytes(),
            sessions=self.engine.sessions,
            tokens=self.engine.steps_rows,
            step_seconds=self.engine.step_seconds,
            exchange_seconds=traffic.seconds,
            worker_seconds=traffic.worker_seconds,
            transport_seconds=traffic.transport.sum,
            transport_counts=traffic.transport.counts,
            **(assembled.scheme.counters() | assembled.adapters.counters() if assembled else {}),
        )

    def metrics(self) -> str:
        """The same for Prometheus, and latencies."""
        return metrics.text(
            self.stats(), self._latencies, self.worker.traffic.transport, self.engine.running, self.engine.queued
        )

    def _check(self, request: pb.OpenRequest) -> None:
        settings = self._settings
        if request.model != self.config.name:
            raise PreconditionError(f"this worker serves the model {self.config.name}")
        if request.scheme != settings.scheme or request.precision != self._precision:
            raise PreconditionError(f"this worker serves {settings.scheme} at {settings.precision}")

    def _loaded(self) -> Assembled:
        if self._assembled is None:
            raise PreconditionError("model is loading; try again in a moment")
        return self._assembled

    def _load(self) -> Scheme:
        try:
            assembled = assemble(self._settings, self.config, self._memory, self.worker)
        except BudgetExceeded as error:
            raise ExhaustedError(f"{error}; start the trusted worker with a larger --memory-budget") from error
        log.info("model digest: %s", assembled.model_digest.hex())
        self.engine.limit_rows(assembled.rows)
        if self._settings.scheme != "tee-only":
            self.worker.connect(patient=True)
        self._claims = claims(self._settings, assembled.model_digest)
        self._assembled = assembled  # other threads see claims with it
        return assembled.scheme


def _open(scheme: Scheme, most: int) -> Cache:
    """A cache of a size that the client left to us. Raises ExhaustedError when not even a small one fits."""
    if isinstance(scheme, InsideDecoder):  # pages are taken as they fill
        return scheme.open(most)
    tokens = min(most, DEFAULT_CONTEXT)
    while True:
        try:
            return scheme.open(tokens)
        except ExhaustedError:
            if tokens <= SMALL_CONTEXT:
                raise
            tokens //= 2
