"""What is computed in a small budget is what is computed in a large one, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import MODELS, Rig, build, forward, one_run
from tests.faults.fleet import DEMO
from tests.pressure.quick_worker import QuickWorker
from trusted_worker.arithmetic import F32
from wire.kv_pages import KvType
from wire.layout import Demand
from wire.model_config import ModelConfig
from wire.plan import smallest
from wire.profiles import PROFILES

KV = [kind.name.lower() for kind in KvType]
INSIDE = ("tee-only", "split", "secure-infer")
PROMPT = [int(token) for token in np.random.default_rng(3).integers(1, 299, 70)]  # a full page, and a few more
TALKS = [[5 + (37 + 8 * step) * n % 2000 for n in range(260)] for step in range(3)]
PADS, AMPLE = 8, 64 << 20
CELLS = [
    pytest.param(name, kv, marks=[] if (index + turn) % len(KV) == 0 else [pytest.mark.soak])
    for index, name in enumerate(MODELS)
    for turn, kv in enumerate(KV)
]


def rig_of(folder: Path, scheme: str, kv: str, budget: int) -> Rig:
    return build(folder, scheme, budget=budget, bank_rows=PADS, worker=QuickWorker, flags=("--kv-dtype", kv))


def side_by_side(rig: Rig, talks: list[list[int]]) -> list[F32]:
    """Logits at the end of every step of conversations that take turns, then of two decoded tokens of each."""
    caches, found = [rig.scheme.open(len(talk) + 2) for talk in talks], []
    longest = max(map(len, talks))
    steps = [(start, start + rig.rows) for start in range(0, longest, rig.rows)]
    for start, end in steps:
        for cache, talk in zip(caches, talks, strict=True):
            found.append(forward(rig.scheme, one_run(cache, talk[start:end], start))[-1])
    for token in (11, 12):
        found += [forward(rig.scheme, one_run(cache, [token], cache.length))[-1] for cache in caches]
    for cache in caches:
        cache.free()
    return found


def test_the_demo_model_in_optee() -> None:
    """Three conversations, whose pages do not fit together."""
    budget = PROFILES["optee"].bytes
    expected = side_by_side(rig_of(DEMO, "tee-only", "float32", AMPLE), TALKS)
    for scheme in INSIDE:
        rig = rig_of(DEMO, scheme, "float32", budget)
        assert all(map(np.array_equal, side_by_side(rig, TALKS), expected)), scheme
        assert rig.memory.peak <= budget
        counters = rig.scheme.counters()
        assert counters["kv_pages_used"] == 0
        assert counters["kv_pages_capacity"] > 90 or counters["pages_restored"] > 0  # what three times 260 tokens take


@pytest.mark.parametrize(("name", "kv"), CELLS)
def test_every_family_in_the_smallest_budget(model_folder: Callable[[str], Path], name: str, kv: str) -> None:
    """One row, one pad and one page of each layer: everything else is parked."""
    folder = model_folder(name)
    config = ModelConfig.from_hf(folder)
    expected = rig_of(folder, "tee-only", kv, AMPLE).logits(PROMPT, [len(PROMPT)])
    for scheme in INSIDE:
        demand = Demand(config, scheme, "int8", KvType[kv.upper()], PADS)
        rig = rig_of(folder, scheme, kv, smallest(demand))
        assert np.array_equal(rig.logits(PROMPT, [len(PROMPT)]), expected), scheme
        counters = rig.scheme.counters()
        assert counters["kv_pages_capacity"] == config.layers
        assert counters["pages_restored"] > 0 or config.window  # a page that no token sees any more is forgotten
