"""Evidence for clients, and what it says of this worker. Off the token path: the kernel's part runs in its own thread.

What a peer sees: provider, evidence, key, claims, certificates, collateral: all public. What it learns: which machine
and software this is. What breaks it: the hardware's key, or who runs other code under the same measurement.

One answer to one request:
 1. The nonce has 32 bytes, or is empty: then evidence over a nonce of our own will do, made at most once an hour.
 2. A nonce that came before, a client's second try, gets the same evidence for a minute; not after key or claims
    changed.
 3. Everything else is made afresh, one at a time, so many times a minute at most.
 4. report data binds provider, nonce, key and claims (wire/binding.py).

An ordinary process has no evidence, and says so: provider "none", nothing to verify.
"""

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trusted_worker.config import Settings
from trusted_worker.endorsements import Endorsements
from trusted_worker.tsm import Report, Tsm
from wire.binding import NONCE_BYTES, canonical, lp, report_data
from wire.errors import DeadlineError, ExhaustedError, InvalidArgumentError, PreconditionError, UnavailableError
from wire.v1 import trusted_worker_pb2 as pb

VERSION = "0.1.0"
DEADLINE_SECONDS = 60.0
OWN_SECONDS = 3600.0  # evidence over a nonce of ours is good for so long
AGAIN_SECONDS = 60.0  # a client may ask again with its nonce
KEPT = 16  # such answers at once
# Settings that a client may care for; not addresses, paths, deadlines, nor what only changes the speed
CONFIG = (
    "adapter_memory", "embed", "kv_dtype", "least_perturbation", "memory_budget", "precision", "prefill", "projections",
    "rope", "rotate_every", "scheme", "seal_idle", "tee_profile",
)  # fmt: skip

log = logging.getLogger(__name__)


class Attestor:
    """Answers requests for evidence, in the asyncio thread. `hpke_key` and `claims` are asked anew each time."""

    def __init__(
        self,
        settings: Settings,
        hpke_key: Callable[[], bytes],
        claims: Callable[[], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises CleaveError, with what to do, when the settings ask for evidence that cannot be made here."""
        self._hpke_key, self._claims, self._clock = hpke_key, claims, clock
        self._tsm = Tsm(settings.tsm_dir) if settings.evidence == "tsm" else None
        self._provider = self._tsm.provider() if self._tsm else "none"
        self._endorsements = Endorsements(settings.certificates, settings.collateral)
        self._limit = _Limit(settings.evidence_per_minute, clock)
        self._one, self._thread = asyncio.Lock(), ThreadPoolExecutor(1, "evidence")
        self._made: dict[bytes, _Made] = {}
        if self._provider == "simulated":
            log.warning("evidence is simulated: it proves nothing, and whoever runs this machine reads prompts")

    async def attest(self, request: pb.AttestRequest) -> pb.AttestResponse:
        """An answer. Raises InvalidArgumentError, ExhaustedError, and what `claims` and Tsm.report raise."""
        if len(request.nonce) not in (0, NONCE_BYTES):  # 1
            raise InvalidArgumentError(f"the nonce must be {NONCE_BYTES} bytes, or empty")
        key, claims = self._hpke_key(), self._claims()
        if self._tsm is None:
            nonce = request.nonce or secrets.token_bytes(NONCE_BYTES)
            return pb.AttestResponse(provider="none", nonce=nonce, hpke_key=key, claims=claims)
        made = self._kept(request.nonce, key, claims) or await self._fresh(self._tsm, request.nonce, key, claims)
        return pb.AttestResponse(
            provider=self._provider,
            evidence=made.report.evidence,
            nonce=made.nonce,
            hpke_key=key,
            claims=claims,
            certificates=self._endorsements.certificates(made.report.aux),
            collateral=self._endorsements.collateral(),
        )

    def _kept(self, asked: bytes, key: bytes, claims: bytes) -> "_Made | None":
        """(2)"""
        made = self._made.get(asked)
        good = made is not None and made.until > self._clock() and (made.key, made.claims) == (key, claims)
        return made if good else None

    async def _fresh(self, tsm: Tsm, asked: bytes, key: bytes, claims: bytes) -> "_Made":
        """(3) Equal requests that wait for each other get the same."""
        self._limit.take()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS), self._one:
                return self._kept(asked, key, claims) or await self._make(tsm, asked, key, claims)
        except TimeoutError:
            raise DeadlineError("evidence was not made in time; try again") from None

    async def _make(self, tsm: Tsm, asked: bytes, key: bytes, claims: bytes) -> "_Made":
        """While the thread is stuck in a request that nobody waits for any more, no other is begun."""
        nonce = asked or secrets.token_bytes(NONCE_BYTES)
        data = report_data(self._provider, nonce, key, claims)  # 4
        report = await asyncio.get_running_loop().run_in_executor(self._thread, tsm.report, data)
        if report.provider != self._provider:
            raise UnavailableError("the provider of evidence changed; start the trusted worker again")
        made = _Made(self._clock() + (AGAIN_SECONDS if asked else OWN_SECONDS), nonce, key, claims, report)
        self._keep(asked, made)
        return made

    def _keep(self, asked: bytes, made: "_Made") -> None:
        """The newest few, and the one over a nonce of ours, which nobody can crowd out."""
        self._made.pop(asked, None)
        self._made[asked] = made
        for old in [nonce for nonce in self._made if nonce][:-KEPT]:
            del self._made[old]


class _Made(NamedTuple):
    """Evidence, and what it binds."""

    until: float
    nonce: bytes
    key: bytes
    claims: bytes
    report: Report


class _Limit:
    """A token bucket: so many at once, and as many again within a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        """Raises PreconditionError for a rate of zero."""
        if per_minute < 1:
            raise PreconditionError("--evidence-per-minute must be at least 1")
        self._most, self._clock = float(per_minute), clock
        self._left, self._since = self._most, clock()

    def take(self) -> None:
        """One. Raises ExhaustedError that says when there will be another."""
        now, rate = self._clock(), self._most / 60
        self._left = min(self._most, self._left + (now - self._since) * rate)
        self._since = now
        if self._left < 1:
            wait = math.ceil((1 - self._left) / rate)
            raise ExhaustedError(f"evidence was asked for too often; try again in {wait} s")
        self._left -= 1


def claims(settings: Settings, model_digest: bytes) -> bytes:
    """What this worker says of itself, as wire/binding.py lists it, in canonical form."""
    config = {name: getattr(settings, name) for name in CONFIG}
    switches = sorted(name for name, value in vars(settings).items() if name.startswith("insecure_") and value)
    return canonical(
        {
            "build": build(),
            "config_digest": hashlib.sha256(canonical(config)).hexdigest(),
            "insecure": [f"--{name.replace('_', '-')}" for name in switches],
            "model_digest": model_digest.hex(),
            "schemes": [settings.scheme],
        }
    )


@cache
def build() -> str:
    """Name, version, and SHA-256 over lp(path) || lp(content) of our own source files, in the order of their paths.

    A worker's word about itself: what makes it worth something is that the machine's image was measured.
    """
    root, total = Path(__file__).parents[1], hashlib.sha256()
    files = {
        path.relative_to(root).as_posix(): path
        for name in ("trusted_worker", "wire")
        for path in (root / name).rglob("*.py")
    }
    for name in sorted(files):
        total.update(lp(name.encode()) + lp(files[name].read_bytes()))
    return f"cleave {VERSION} {total.hexdigest()}"
