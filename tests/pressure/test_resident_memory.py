"""The whole process: beside the arena it does not grow, however its clients come, press and go."""

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from evaluation.processes import arena_bytes
from tests.pressure.conftest import Answer
from tests.pressure.processes import Trusted, trusted_worker

CLIENTS, COUNT = 4, 8
BOUND = 8 << 20
TALKS = [[5 + (37 + 8 * client) * n % 2000 for n in range(280)] for client in range(CLIENTS)]  # 120 pages of 66


def beside(trusted: Trusted) -> int:
    """Resident bytes that are not the arena's; all, where those cannot be told."""
    arena = 0
    with suppress(PermissionError):
        arena = arena_bytes(trusted.child.pid)
    return trusted.stats().rss - arena


@pytest.mark.parametrize(("warming", "seconds"), [(5.0, 9.0), pytest.param(30.0, 300.0, marks=pytest.mark.soak)])
def test_the_process_does_not_grow(tmp_path: Path, gpu: str, answer: Answer, warming: float, seconds: float) -> None:
    """Medians of the first and the last third after the warm-up."""
    expected = [answer(talk, COUNT) for talk in TALKS]
    with trusted_worker(tmp_path, "secure-infer", "--tee-profile", "optee", "--pad-bank", "4MiB", gpu=gpu) as trusted:
        before, stopping, sizes = trusted.stats(), threading.Event(), list[int]()

        def keep_asking(client: int) -> int:
            answers = 0
            while not stopping.is_set():
                assert trusted.say(TALKS[client], COUNT) == expected[client]
                answers += 1
            return answers

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(keep_asking, client) for client in range(CLIENTS)]
            stopping.wait(warming)
            end = time.monotonic() + seconds
            while time.monotonic() < end and not any(client.done() for client in clients):
                sizes.append(beside(trusted))
                stopping.wait(0.2)
            stopping.set()
            assert all(client.result() for client in clients)
        third = len(sizes) // 3
        growth = statistics.median(sizes[-third:]) - statistics.median(sizes[:third])
        assert growth <= BOUND
        assert trusted.stats().pages_restored > before.pages_restored
        trusted.settled(before)
