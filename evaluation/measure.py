"""One row of the bench: a cluster under one scheme, and repetitions on it.

A repetition is `batch` answers at the same time. Every session first takes its prompt and gives one token; when all
of them have, they decode `tokens` more together. Only this second phase counts, but for the time to the first token.
It is a turn of its own, and a turn begins with a token from the client: its first step has two rows. An
end-of-sequence token ends no answer: another turn goes on.
"""

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Self

from client.attestation.policy import Policy
from client.counters import Counters
from client.session import Request, Session, connect
from client.turn import Pacing
from deploy.local.child import Progress
from deploy.local.cluster import GPU_WORKER, TRUSTED_WORKER, Cluster, Settings
from evaluation import bare
from evaluation.processes import cpu_seconds, resident_bytes
from evaluation.refill import Glimpse, Refill, Watch
from wire.errors import CleaveError, ContextError, DeadlineError, ExhaustedError
from wire.kv_pages import PAGE_TOKENS
from wire.model_config import ModelConfig

FURTHER_TURNS = 16  # that an answer has room for
PAD_SECONDS = 3600.0  # longest wait for a full bank
POLL_SECONDS = 0.1
STEP_SECONDS = 600.0
WARM_TOKENS = 64
CLIENT = "client"
ROLES = {CLIENT: "client", TRUSTED_WORKER: "trusted_worker", GPU_WORKER: "gpu_worker"}  # as they are reported


@dataclass(frozen=True)
class Load:
    """What every row is asked."""

    context: int
    tokens: int
    batch: int

    @property
    def capacity(self) -> int:
        """Tokens that a session must hold."""
        return self.context + 1 + self.tokens + 1 + FURTHER_TURNS

    @property
    def decoded(self) -> int:
        """Rows of one decode phase."""
        return self.batch * (self.tokens + 1)


@dataclass(frozen=True)
class Sample:
    """One repetition. Times in seconds; all but `first`, `pad`, `prompts` are of the decode phase of all answers."""

    first: float  # to the first token: the slowest session's
    gaps: list[float]  # per session, the mean time between two tokens
    tokens: int
    before: Counters
    after: Counters
    cpu: dict[str, float]
    pad: Refill | None  # of the pads that were made last; None where none was
    prompts: tuple[Counters, Counters]  # before the prompts, and when all first tokens had come
    bare: list[float] = field(default_factory=list)  # bare exchanges with the GPU worker, after everything else


class Rig:
    """A running cluster. A context manager; to be entered in the main thread."""

    def __init__(self, settings: Settings, loads: Sequence[Load], progress: Progress) -> None:
        self.settings, self._loads, self._progress = settings, loads, progress
        self._config = ModelConfig.from_hf(settings.model)
        self._request = Request(self._config.name, settings.scheme, settings.precision)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._cluster = stack.enter_context(Cluster(self.settings, self._progress))
            self._worker = stack.enter_context(connect(self._cluster.target, Policy()))
            self._threads = stack.enter_context(ThreadPoolExecutor(max(load.batch for load in self._loads)))
            self._pad = self._fill_bank()
            for load in warm_up(self._loads):
                self.repeat(load)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def repeat(self, load: Load) -> Sample:
        """One repetition; afterwards the cluster is at rest, with its bank as full as it gets.

        `load`: of a batch that is no larger than those of the loads that the rig was made for.
        """
        self._progress(f"measuring {self.settings.scheme} {self.settings.precision}", 0)
        try:
            return self._measure(load)
        except CleaveError:
            self._cluster.check()  # a worker that died explains itself better
            raise

    def admitted(self) -> int:
        """The longest context that a session can be opened with: see `longest`."""
        return longest(self._config.max_context, self._opens)

    def resident(self) -> dict[str, int]:
        """Resident bytes by role, now."""
        return {ROLES[role]: resident_bytes(pid) for role, pid in self._pids().items()}

    def _opens(self, context: int) -> bool:
        try:
            self._worker.open(replace(self._request, max_context=context)).close()
        except (ContextError, ExhaustedError):
            return False
        return True

    def _measure(self, load: Load) -> Sample:
        request = replace(self._request, max_context=min(load.capacity, self._config.max_context))
        prompts, asked = prompts_of(load, self._config.vocabulary), self._worker.counters()
        sessions = [self._worker.open(request) for _ in prompts]
        try:
            started = time.monotonic()
            firsts = list(self._threads.map(_decode, sessions, prompts, itertools.repeat(1)))
            begun = self._worker.counters()
            early = self._fill_bank()
            before, cpu = self._worker.counters(), self._cpu()
            times = list(self._threads.map(_decode, sessions, itertools.repeat([0]), itertools.repeat(load.tokens)))
            after, used = self._worker.counters(), self._cpu()
            rests = Glimpse(time.monotonic(), after.pads_in_stock, used[ROLES[TRUSTED_WORKER]])  # a small bank is quick
        finally:
            for session in sessions:
                session.close()
        self._pad = self._fill_bank(rests) or early or self._pad
        return Sample(
            max(first[0] for first in firsts) - started,
            [(one[-1] - one[0]) / (len(one) - 1) for one in times],
            sum(map(len, times)),
            before,
            after,
            {role: used[role] - cpu[role] for role in used},
            self._pad,
            (asked, begun),
            self._bare(),
        )

    def _fill_bank(self, first: Glimpse | None = None) -> Refill | None:
        """Wait until no more pads are made. What one of those made since `first` took, if there are any."""
        capacity = self._worker.counters().pads_capacity
        if not capacity:
            return None
        first = first or self._glimpse()
        watch = Watch(first, capacity)
        while not watch.resting:
            waited = time.monotonic() - first.now
            self._progress("making one-time pads", waited)
            if waited > PAD_SECONDS:
                raise DeadlineError(f"the bank of pads was not full after {PAD_SECONDS:g} s: try a smaller --pad-bank")
            time.sleep(POLL_SECONDS)
            watch.see(self._glimpse())
        return watch.refill

    def _glimpse(self) -> Glimpse:
        stock, cpu = self._worker.counters().pads_in_stock, cpu_seconds(self._cluster.pids[TRUSTED_WORKER])
        return Glimpse(time.monotonic(), stock, cpu)

    def _bare(self) -> list[float]:
        """Of a cluster that is at rest."""
        if not self.settings.offloads:
            return []
        plane = "stream" if "stream" in self.settings.more else "grpc"
        return bare.measure(self._cluster.gpu_worker, plane, self._config, self.settings.precision)

    def _cpu(self) -> dict[str, float]:
        return {ROLES[role]: cpu_seconds(pid) for role, pid in self._pids().items()}

    def _pids(self) -> dict[str, int]:
        return {CLIENT: os.getpid(), **self._cluster.pids}


def prompts_of(load: Load, vocabulary: int) -> list[list[int]]:
    """Token ids, the same for every row."""
    pick = random.Random(0)  # noqa: S311
    return [[pick.randrange(vocabulary) for _ in range(load.context)] for _ in range(load.batch)]


def warm_up(loads: Sequence[Load]) -> list[Load]:
    """A short load of each batch: kernels are compiled and memory is touched for the first time."""
    context, tokens = (min(getattr(load, name) for load in loads) for name in ("context", "tokens"))
    batches = sorted({load.batch for load in loads})
    return [Load(min(context, WARM_TOKENS), min(tokens, WARM_TOKENS), batch) for batch in batches]


def longest(most: int, opens: Callable[[int], bool]) -> int:
    """The most tokens that `opens` accepts: `most`, or else whole pages of a KV cache; 0 when there are none."""
    if opens(most):
        return most
    low, high = 0, (most - 1) // PAGE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if opens(middle * PAGE_TOKENS) else (low, middle - 1)
    return low * PAGE_TOKENS


def _decode(session: Session, ids: list[int], count: int) -> list[float]:
    """When each of `count` tokens came."""
    times: list[float] = []
    while len(times) < count:
        turn = session.turn(ids, Pacing(max_new_tokens=count - len(times), step_seconds=STEP_SECONDS))
        times += [time.monotonic() for _ in turn]
        if turn.finish_reason == "context":
            break
        ids = ids[:1]
    return times
