"""Resident memory of this process and of the workers, sampled in a thread."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from deploy.local.cluster import TRUSTED_WORKER
from evaluation.judge import Growth, beside, growth
from evaluation.processes import arena_bytes, resident_bytes

SAMPLE_SECONDS = 1.0
SETTLE_SECONDS = 20.0  # a new process is still loading
CLIENT = "client"
ARENA = "secure memory"  # of the trusted worker, which is told apart where this process may look


class Sampler:
    """A context manager; `pids` are the workers' processes by role, now."""

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        self._pids = pids
        self._born: dict[int, float] = {}
        self._series: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def growth(self, start: float, end: float) -> dict[str, Growth | None]:
        """By role. Processes that were started between are left out while they settle."""
        found = {role: growth(self.samples(role), start, end) for role in list(self._series)}
        arena, trusted = found.pop(ARENA, None), found.get(TRUSTED_WORKER)
        return found | ({TRUSTED_WORKER: beside(trusted, arena)} if trusted else {})

    def samples(self, role: str) -> list[tuple[float, int]]:
        """(time, resident bytes) so far."""
        return list(self._series.get(role, []))

    def _run(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            for role, pid in {CLIENT: os.getpid(), **self._pids()}.items():
                born = self._born.setdefault(pid, now if self._series[role] else now - SETTLE_SECONDS)
                if now - born >= SETTLE_SECONDS:
                    with suppress(OSError):  # it is gone, and another one comes
                        self._series[role].append((now, resident_bytes(pid)))
                        if role == TRUSTED_WORKER:
                            self._series[ARENA].append((now, arena_bytes(pid)))
