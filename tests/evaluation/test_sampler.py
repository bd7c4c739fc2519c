"""Samples of resident memory: of whom, and when they begin to count."""

import os
import subprocess
import time

import pytest

from deploy.local.cluster import TRUSTED_WORKER
from evaluation import sampler
from evaluation.sampler import CLIENT, Sampler

PATIENCE = 20.0


def wait_for(sampling: Sampler, role: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not sampling.samples(role):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everybody_is_sampled_and_a_process_that_ends_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 0.01)
    with subprocess.Popen(["sleep", "1000"]) as process:
        start = time.monotonic()
        with Sampler(lambda: {"worker": process.pid}) as sampling:
            wait_for(sampling, "worker")
            process.kill()
            process.wait()
            while (found := sampling.growth(start, time.monotonic())[CLIENT]) is None:
                assert time.monotonic() < start + PATIENCE
                time.sleep(0.05)
    assert 1 << 20 < found.late <= found.most < 1 << 40


def test_a_new_process_counts_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(sampler, "SETTLE_SECONDS", 3600.0)
    first, second = os.getpid(), os.getppid()
    now = {"worker": first}
    with Sampler(lambda: now) as sampling:
        wait_for(sampling, "worker")
        now["worker"] = second
        time.sleep(0.1)
        counted = len(sampling.samples("worker"))
        time.sleep(0.1)
        assert len(sampling.samples("worker")) == counted


def test_a_trusted_worker_is_judged_beside_its_secure_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(sampler, "SETTLE_SECONDS", 0.0)
    start = time.monotonic()
    monkeypatch.setattr(sampler, "resident_bytes", lambda _: int(1e9 * (time.monotonic() - start)))
    monkeypatch.setattr(sampler, "arena_bytes", lambda _: int(1e9 * (time.monotonic() - start)))
    with Sampler(lambda: {TRUSTED_WORKER: os.getpid()}) as sampling:
        while (found := sampling.growth(start, time.monotonic()).get(TRUSTED_WORKER)) is None:
            assert time.monotonic() < start + PATIENCE
            time.sleep(0.05)
        assert set(sampling.growth(start, time.monotonic())) == {CLIENT, TRUSTED_WORKER}
    assert found.share == 0
    assert found.arena == pytest.approx(found.late - found.early, abs=1e7)
    assert found.flat


def test_a_trusted_worker_that_may_not_be_looked_at_is_judged_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise PermissionError

    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(sampler, "arena_bytes", refuse)
    start = time.monotonic()
    with Sampler(lambda: {TRUSTED_WORKER: os.getpid()}) as sampling:
        while (found := sampling.growth(start, time.monotonic()).get(TRUSTED_WORKER)) is None:
            assert time.monotonic() < start + PATIENCE
            time.sleep(0.05)
    assert (found.share, found.arena) == (0, 0)
