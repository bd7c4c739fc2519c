"""Where qkv and o are multiplied: what is measured, what is sent meanwhile, and what is decided from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulators.workers import RecordingWorker
from trusted_worker import arithmetic, placement
from trusted_worker.placement import PASSES, Placement, decide, measure
from trusted_worker.secure_memory import SecureMemory
from wire import logs
from wire.checkpoint import Checkpoint
from wire.errors import UnavailableError
from wire.layout import Demand
from wire.linears import PROJECTIONS, LinearSpec, all_specs
from wire.model_config import ModelConfig
from wire.plan import smallest

Folder = Callable[[str], Path]
BUDGET = 8 << 20


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passing(self, work: Callable[..., Any], seconds: Callable[[int], float]) -> Callable[..., Any]:
        """The same work, whose n-th call takes so long."""
        calls = iter(range(10_000))

        def timed(*given: Any) -> Any:
            self.now += seconds(next(calls))
            return work(*given)

        return timed


class Bench:
    """One model, an arena, a worker that keeps what it gets, and a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, budget: int = BUDGET) -> None:
        self.config, self.memory, self.clock = ModelConfig.from_hf(folder), SecureMemory(budget), Clock()
        self.worker: Any = RecordingWorker(Checkpoint(folder), self.config)
        self.specs = [spec for spec in all_specs(self.config) if spec.linear in PROJECTIONS]
        self.connected: list[bool] = []
        monkeypatch.setattr(self.worker, "connect", lambda patient=False: self.connected.append(patient))
        monkeypatch.setattr("time.perf_counter", self.clock)
        self._patch = monkeypatch

    def take(self, outside: Callable[[int], float], inside: Callable[[int], float]) -> None:
        """How long the n-th exchange and the n-th product take."""
        self._patch.setattr(self.worker, "call", self.clock.passing(self.worker.call, outside))
        self._patch.setattr(placement, "exact_product", self.clock.passing(arithmetic.exact_product, inside))

    def decide(self, asked: str, scheme: str = "secure-infer") -> Placement:
        return decide(asked, Demand(self.config, scheme, "int8"), self.memory, self.worker)


@pytest.fixture(params=["llama", "gpt2"])
def bench(request: pytest.FixtureRequest, model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(model_folder(request.param), monkeypatch)


@pytest.mark.parametrize(("outside", "inside", "where"), [(3.0, 2.0, "trusted"), (2.0, 3.0, "gpu"), (2.0, 2.0, "gpu")])
def test_auto_takes_what_is_faster_and_says_so(
    bench: Bench, outside: float, inside: float, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bench.take(lambda _: outside, lambda _: inside)
    found = bench.decide("auto")
    assert (found.where, found.outside, found.inside) == (where, 2 * outside, 2 * inside)  # qkv and o
    assert found.kept == (PROJECTIONS if where == "trusted" else ())
    assert bench.connected == [True]  # it waits for a worker that is not there yet
    (record,) = [record for record in caplog.records if record.name == "trusted_worker.placement"]
    assert record.msg in logs.ALLOWED
    assert record.getMessage() == (
        f"projections: {where}; a layer takes {2e6 * outside:.0f} us outside, {2e6 * inside:.0f} us inside"
    )


@pytest.mark.parametrize("asked", ["trusted", "gpu"])
def test_what_was_asked_for_is_not_measured(bench: Bench, asked: str) -> None:
    assert bench.decide(asked) == Placement(asked)
    assert (bench.connected, bench.worker.seen) == ([], [])


@pytest.mark.parametrize("scheme", ["split", "tee-only"])
@pytest.mark.parametrize("asked", ["gpu", "auto"])
def test_other_schemes_have_no_choice(bench: Bench, scheme: str, asked: str) -> None:
    assert bench.decide(asked, scheme) == Placement()
    assert (bench.connected, bench.worker.seen) == ([], [])


@pytest.mark.parametrize("quiet", range(PASSES))
def test_one_quiet_pass_and_most_layers_are_enough(bench: Bench, quiet: int) -> None:
    """What else the machine does makes times longer, never shorter."""
    size = len(bench.specs)
    assert size > 2 * len(PROJECTIONS)

    def times(usual: float) -> Callable[[int], float]:
        return lambda n: usual if n // size == quiet and n % size >= len(PROJECTIONS) else 100.0

    bench.take(times(1.0), times(3.0))
    assert measure(bench.specs, bench.memory, bench.worker) == (2.0, 6.0)


def test_only_fresh_uniform_words_in_the_shapes_of_the_projections_are_sent(bench: Bench) -> None:
    measure(bench.specs, bench.memory, bench.worker)
    assert [(layer, linear) for layer, linear, _ in bench.worker.seen] == PASSES * [
        (spec.layer, spec.linear) for spec in bench.specs
    ]
    assert [z.shape for _, _, z in bench.worker.seen] == PASSES * [(1, spec.k) for spec in bench.specs]
    words = np.concatenate([z.reshape(-1) for _, _, z in bench.worker.seen]).view(np.uint32)
    pieces = words[: len(words) // 4 * 4].reshape(-1, 4)
    assert len(np.unique(pieces, axis=0)) == len(pieces)
    bits = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / len(words) ** 0.5


def test_the_arena_is_empty_again(bench: Bench) -> None:
    bench.decide("auto")
    assert bench.memory.used == 0
    assert bench.memory.peak > sum(spec.k * spec.n for spec in bench.specs)
    assert not bench.memory._bytes.any()


@pytest.mark.parametrize("failing", [0, 3])
def test_a_worker_that_goes_away_ends_the_start(bench: Bench, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def call(*_: Any) -> None:
        if next(calls) == failing:
            raise UnavailableError("gone")

    monkeypatch.setattr(bench.worker, "call", call)
    with pytest.raises(UnavailableError):
        bench.decide("auto")
    assert bench.memory.used == 0


def least(config: ModelConfig, kept: bool) -> int:
    return smallest(Demand(config, "secure-infer", "int8", kept=PROJECTIONS if kept else ()))


@pytest.mark.parametrize("less", [0, 64])
def test_auto_measures_only_where_the_weights_leave_half_of_the_budget(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, less: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = model_folder("llama")
    config = ModelConfig.from_hf(folder)
    specs: list[LinearSpec] = [spec for spec in all_specs(config) if spec.linear in PROJECTIONS]
    enough = max(least(config, kept=True), 2 * sum(spec.k * spec.n for spec in specs))
    bench = Bench(folder, monkeypatch, enough - less)
    bench.take(lambda _: 3.0, lambda _: 2.0)
    assert bench.decide("auto").where == ("gpu" if less else "trusted")
    assert bool(bench.worker.seen) == (not less)
    assert all(record.msg in logs.ALLOWED for record in caplog.records if record.name == "trusted_worker.placement")
    assert any("holds too little" in record.message for record in caplog.records) == bool(less)
