"""A context that exceeds the budget many times gives what it gives in memory, bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import build, forward, one_run
from tests.pressure.quick_worker import QuickWorker
from trusted_worker.arithmetic import F32
from wire.profiles import PROFILES

AMPLE = 160 << 20
TEXT = [int(token) for token in np.random.default_rng(5).integers(1, 2047, 10_000)]
LAST = 6  # tokens that come one by one


def read(folder: Path, scheme: str, budget: int, tokens: int) -> tuple[list[F32], int, int]:
    """Logits after each of the last tokens of a text; pages that the budget holds, and those opened again."""
    rig = build(folder, scheme, budget=budget, bank_rows=1, worker=QuickWorker)
    cache, found = rig.scheme.open(tokens), list[F32]()
    while cache.length < tokens:
        rows = min(rig.rows, tokens - LAST - cache.length) if cache.length < tokens - LAST else 1
        run = one_run(cache, TEXT[cache.length : cache.length + rows], cache.length)
        found = [*found[1 - LAST :], forward(rig.scheme, run)[-1]]
    cache.free()
    counters = rig.scheme.counters()
    assert rig.memory.peak <= budget
    assert counters["kv_pages_used"] == 0
    return found, counters["kv_pages_capacity"], counters.get("pages_restored", 0)


def test_1500_tokens_where_a_third_fits(long: Path) -> None:
    tokens = 1500
    expected, _, restored = read(long, "tee-only", AMPLE, tokens)
    assert not restored
    found, slots, restored = read(long, "split", 5 << 20, tokens)
    assert slots * 3 < 6 * tokens // 64
    assert restored > slots
    assert all(map(np.array_equal, found, expected))


@pytest.fixture(scope="module")
def ample(long: Path) -> list[F32]:
    """The whole text in memory. All schemes say the same."""
    expected, _, restored = read(long, "tee-only", AMPLE, len(TEXT))
    assert not restored
    return expected


@pytest.mark.soak
@pytest.mark.parametrize("scheme", ["tee-only", "split", "secure-infer"])
def test_10000_tokens_in_optee(long: Path, ample: list[F32], scheme: str) -> None:
    found, slots, restored = read(long, scheme, PROFILES["optee"].bytes, len(TEXT))
    assert restored > slots
    assert all(map(np.array_equal, found, ample))
