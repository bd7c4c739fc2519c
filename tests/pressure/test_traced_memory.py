"""Outside the arena a scheme takes small temporaries only: what Python and numpy allocate is traced, and bounded."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.shapes import SHAPES
from evaluation.shapes import make
from tests.conftest import Rig, build
from tests.pressure.quick_worker import QuickWorker
from tests.simulators.workers import Meanwhile, do
from trusted_worker.model import Batch, Run
from wire import codec
from wire.checkpoint import Checkpoint
from wire.kv_pages import KvType
from wire.layout import Demand
from wire.model_config import ModelConfig
from wire.plan import plan, smallest
from wire.v1 import gpu_worker_pb2 as pb

ALLOWANCE = 1 << 20
ROWS, SEQUENCES, PADS = 64, 16, 4
NARROW = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
SIZES: dict[str, dict[str, int]] = {"narrow": NARROW, "0.5B": {}}


class Tracer(QuickWorker):
    """A GPU worker whose own allocations do not count. `peak` is the most that anybody else had, in bytes."""

    peak = base = 0

    def call(
        self,
        operation: pb.Operation,
        array: codec.Array | None,
        into: codec.Array | None,
        meanwhile: Meanwhile = None,
    ) -> None:
        """See schemes.base.Worker."""
        self.note()
        super().call(operation, array, into)
        tracemalloc.reset_peak()
        do(meanwhile)

    def note(self) -> None:
        """Look at what was traced since the last call."""
        self.peak = max(self.peak, tracemalloc.get_traced_memory()[1] - self.base)

    def trace(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; its allocations count from zero."""
        tracemalloc.reset_peak()
        self.base, self.peak = tracemalloc.get_traced_memory()[0], 0
        result = work()
        self.note()
        return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(size)`: one layer of the 0.5B shape, or a narrow one with as large a vocabulary and feed-forward."""
    root = tmp_path_factory.mktemp("wide")

    def get(size: str) -> Path:
        raw = SHAPES["qwen2.5-0.5b"] | {"num_hidden_layers": 1} | SIZES[size]
        if not (root / size).exists():
            make(root / size, raw, ModelConfig.from_dict(size, raw, {}), lambda *_: None)
        return root / size

    return get


def budget_for(folder: Path, scheme: str, resident: bool) -> int:
    """Where everything is parked, and yet whole steps can be made; or where everything has room."""
    config = ModelConfig.from_hf(folder)
    demand = Demand(config, scheme, "int8", KvType.FLOAT32, PADS)
    budget = smallest(demand) if not resident else 4 * config.vocabulary * config.hidden + (64 << 20)
    while (found := plan(demand, budget)).slots < SEQUENCES or found.rows < SEQUENCES:
        budget += 1 << 20
    assert (found.layout.linears == "resident") is resident
    assert (found.layout.embed == "resident") is resident
    return budget


def step(rig: Rig, caches: list[Any], rows: int) -> None:
    """One forward pass, `rows` tokens of each sequence; only the last one's logits are looked at."""
    runs, ids = [], list[int]()
    for cache in caches:
        assert cache.wake(rows) == rows
        runs.append(Run(cache, len(ids), len(ids) + rows, cache.length))
        ids += [100 + 7 * n for n in range(rows)]
    batch = Batch(np.array(ids, np.int32), tuple(runs), np.array([run.stop - 1 for run in runs], np.int32))
    rig.scheme.forward(batch, lambda *_: None)


CELLS = [
    pytest.param(scheme, resident, size, marks=[pytest.mark.soak] if size == "0.5B" else [])
    for size in SIZES
    for scheme in ("tee-only", "secure-infer")
    for resident in (False, True)
]


@pytest.mark.parametrize(("scheme", "resident", "size"), CELLS)
def test_temporaries_are_small(made: Callable[[str], Path], scheme: str, resident: bool, size: str) -> None:
    folder = made(size)
    config = ModelConfig.from_hf(folder)
    worker, budget = Tracer(Checkpoint(folder), config), budget_for(folder, scheme, resident)
    for name in [None, *((0, number) for number in range(1, 6))] if scheme == "secure-infer" else []:
        worker.matrix(name)
    tracemalloc.start(1)
    try:
        rig = worker.trace(lambda: build(folder, scheme, worker=lambda *_: worker, budget=budget, bank_rows=PADS))
        peaks = {"loading": worker.peak}
        caches = [rig.scheme.open(256) for _ in range(SEQUENCES)]
        worker.trace(lambda: step(rig, caches[:1], min(ROWS, rig.rows)))
        peaks["prefill"] = worker.peak
        worker.trace(rig.fill)
        peaks["refill"] = worker.peak
        worker.trace(lambda: step(rig, caches, 1))
        peaks["decode"] = worker.peak
    finally:
        tracemalloc.stop()
    print(scheme, "resident" if resident else "parked", size, budget >> 20, rig.rows, peaks)
    assert max(peaks.values()) <= ALLOWANCE, peaks
