"""`cleave-bench --soak`: many clients for a long time, while things break. Nothing may be wrong, leak or get stuck.

Clients ask over connections that pass through relays; every so often one thing is broken on purpose (faults.py). An
answer is compared, token for token, with what the same scheme answered before to one client alone. secure-infer, split
and tee-only in int8 are exact: company must not change a single token. kv-shield and plain round in float32 on the GPU
worker: it could in a near tie, but on the demo model it was not seen to. What counts as wrong is in judge.py.
"""

import random
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from client.attestation.policy import Policy
from client.flags import default_precision
from client.session import Request, TrustedWorker, connect
from deploy.local.child import Progress
from deploy.local.cluster import Cluster, Settings
from evaluation.clients import Client, Conversation, answered, conversations
from evaluation.faults import STEP_SECONDS, Faults
from evaluation.judge import Findings, Growth
from evaluation.relay import Relay, Relays
from evaluation.sampler import Sampler
from wire.model_config import ModelConfig

CONVERSATIONS = 16
CONTEXT = 320  # tokens of a session
SESSION_SECONDS = 10  # how long a session outlives its client
FAULT_SECONDS = (4.0, 20.0)  # between two faults
LAST_SECONDS = 180.0  # for an answer to every client after the last fault, and for sessions to expire
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """One soak."""

    model: Path
    scheme: str
    seconds: float
    clients: int
    seed: int
    memory_budget: str | None = "64MiB"  # None: what the profile in `more` says
    pad_bank: str = "64MiB"
    more: tuple[str, ...] = ()  # further words of the trusted worker's command line

    @property
    def precision(self) -> str:
        """What the scheme usually computes in."""
        return default_precision(self.scheme)


class Soak:
    """One soak of one scheme. `run` once, in the main thread."""

    def __init__(self, plan: Plan, progress: Progress, log: TextIO | None = None) -> None:
        self._plan, self._progress, self._log = plan, progress, log
        self._pick = random.Random(plan.seed)  # noqa: S311  (nothing secret)
        self._stopping = threading.Event()
        self._clients: list[Client] = []
        self._config = ModelConfig.from_hf(plan.model)
        self._request = Request(self._config.name, plan.scheme, plan.precision, max_context=CONTEXT)

    def run(self) -> Findings:
        """What came out. Raises UnavailableError when a worker ends by itself."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cleave-soak-"))  # mode 0700
            relays = stack.enter_context(Relays())
            settings = self._settings(folder)
            offload = relays.add(f"unix:{folder}/offload", f"unix:{folder}/gpu") if settings.offloads else None
            cluster = stack.enter_context(Cluster(settings, self._progress, self._log))
            worker = stack.enter_context(connect(cluster.target, Policy()))
            stack.callback(self._stopping.set)
            found = Findings(memory_before=worker.counters().memory_used)
            known = self._references(worker)
            sampler = stack.enter_context(Sampler(lambda: cluster.pids))
            doors = [relays.add(f"unix:{folder}/client-{n}", cluster.target) for n in range(self._plan.clients)]
            faults = Faults(cluster, relays, doors, offload, self._pick)
            self._start(doors, known)
            found.growth = self._break_things(cluster, faults, sampler)
            found.silent_clients = self._wind_down(cluster)
            self._collect(found, faults, worker)
            return found

    def _settings(self, folder: str) -> Settings:
        plan = self._plan
        more = (*plan.more, "--step-seconds", f"{STEP_SECONDS:g}", "--session-seconds", str(SESSION_SECONDS))
        settings = Settings(
            plan.model,
            plan.scheme,
            plan.precision,
            plan.memory_budget,
            plan.pad_bank,
            gpu_listen=f"unix:{folder}/gpu",
            more=more,
        )
        if not settings.offloads:
            return settings
        return replace(settings, more=(*more, "--gpu-worker", f"unix:{folder}/offload"))

    def _references(self, worker: TrustedWorker) -> list[Conversation]:
        """The conversations, answered for one client alone."""
        known = []
        for conversation in conversations(self._config.vocabulary, CONVERSATIONS, self._pick):
            self._progress("answering alone", 0)
            known.append(answered(worker, self._request, conversation))
        return known

    def _start(self, doors: list[Relay], known: list[Conversation]) -> None:
        for number, door in enumerate(doors):
            seed = self._pick.randrange(1 << 32)
            self._clients.append(Client(number, door.target, self._request, known, self._stopping, seed))
            self._clients[-1].start()

    def _break_things(self, cluster: Cluster, faults: Faults, sampler: Sampler) -> dict[str, Growth | None]:
        """Until the time is over. The memory of all processes meanwhile."""
        start = time.monotonic()
        end = start + self._plan.seconds
        while (now := time.monotonic()) < end:
            minute = f"minute {(now - start) // 60 + 1:.0f} of {self._plan.seconds / 60:g}"
            self._progress(f"{self._plan.scheme}, {minute}: {len(faults.done)} faults", now - start)
            time.sleep(min(end - now, self._pick.uniform(*FAULT_SECONDS)))
            cluster.check()
            if time.monotonic() < end:
                faults.strike()
        return sampler.growth(start, end)

    def _wind_down(self, cluster: Cluster) -> list[int]:
        """Let everybody have one more answer, and stop. Clients that got none."""
        before = {client: client.completed for client in self._clients}
        self._await("the last answers", lambda: all(client.completed > count for client, count in before.items()))
        cluster.check()
        silent = [client.number for client, count in before.items() if client.completed == count]
        self._stopping.set()
        self._await("clients to leave", lambda: not any(client.is_alive() for client in self._clients))
        return silent

    def _collect(self, found: Findings, faults: Faults, worker: TrustedWorker) -> None:
        """What the clients saw and the trusted worker counted."""

        def quiet() -> bool:
            counters = worker.counters()
            return counters.sessions == 0 and counters.memory_used == found.memory_before

        self._await("sessions to expire", quiet)
        counters = worker.counters()
        found.faults = faults.done
        for client in self._clients:
            found.completed += client.completed
            found.left += client.left
            found.wrong += client.wrong
            found.failures += client.failures
        for name in ("pads_reused", "products_failed", "products_verified", "products_inside", "sessions"):
            setattr(found, name, getattr(counters, name))
        found.memory_after = counters.memory_used

    def _await(self, what: str, done: Callable[[], bool]) -> None:
        """Until it is done, or LAST_SECONDS are over."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < LAST_SECONDS and not done():
            self._progress(f"waiting for {what}", waited)
            time.sleep(POLL_SECONDS)
