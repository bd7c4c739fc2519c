"""Faults, on a process that only sleeps and on relays that only write down."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from deploy.local.cluster import GPU_WORKER, Cluster
from evaluation.faults import SILENCE, Faults
from evaluation.relay import Relay, Relays

KINDS = {"client vanished", "client cut off", "GPU worker killed", "GPU worker paused", "GPU worker cut off"}


class Sleeper:
    """A cluster whose GPU worker sleeps."""

    def __init__(self) -> None:
        self.restarts = 0
        self.process = subprocess.Popen(["sleep", "1000"])

    @property
    def pids(self) -> dict[str, int]:
        return {GPU_WORKER: self.process.pid}

    def restart_gpu_worker(self) -> None:
        self.restarts += 1
        assert self.process.wait(20) == -signal.SIGKILL
        self.process = subprocess.Popen(["sleep", "1000"])

    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


class Drops:
    """Relays that remember what was dropped."""

    def __init__(self) -> None:
        self.dropped: list[tuple[str, float]] = []

    def drop(self, relay: Relay, silence: float) -> None:
        self.dropped.append((relay.target, silence))


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleeper]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    cluster = Sleeper()
    yield cluster
    cluster.process.kill()
    cluster.process.wait()


def faults(cluster: Any, drops: Any, offload: bool = True, seed: int = 1) -> Faults:
    doors = [Relay(f"unix:{n}", "unix:trusted") for n in range(3)]
    between = Relay("unix:offload", "unix:gpu") if offload else None
    return Faults(cast(Cluster, cluster), cast(Relays, drops), doors, between, random.Random(seed))


def test_everything_breaks_once_before_anything_breaks_twice(sleeper: Sleeper) -> None:
    drops = Drops()
    striking = faults(sleeper, drops)
    assert {striking.strike().kind for _ in KINDS} == KINDS
    for _ in range(60):
        striking.strike()
    kinds = [fault.kind for fault in striking.done]
    assert sleeper.restarts == kinds.count("GPU worker killed") >= 2
    assert sleeper.state() != "T"
    assert drops.dropped.count(("unix:offload", 0.0)) == kinds.count("GPU worker cut off")
    assert sum(silence == SILENCE for _, silence in drops.dropped) == kinds.count("client vanished")
    for fault in striking.done:
        assert (fault.client is not None) == fault.kind.startswith("client")
        assert fault.start <= fault.end


def test_a_pause_ends_even_when_it_is_interrupted(sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", interrupted)
        patched.setattr(os, "kill", lambda _, number: sent.append(number))
        for seed in range(100):  # one of them begins with a pause
            with suppress(KeyboardInterrupt):
                faults(sleeper, Drops(), seed=seed).strike()
    assert signal.SIGSTOP in sent
    for place, number in enumerate(sent):
        if number == signal.SIGSTOP:
            assert sent[place + 1] == signal.SIGCONT


def test_without_a_gpu_worker_only_clients_suffer(sleeper: Sleeper) -> None:
    striking = faults(sleeper, Drops(), offload=False)
    assert {striking.strike().kind for _ in range(20)} == {"client vanished", "client cut off"}
