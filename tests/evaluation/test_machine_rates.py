"""The process that measures the machine, and the sum that it reads memory with."""

import os
import time
from collections.abc import Iterable

import numpy as np
import pytest

from evaluation import machine_rates
from wire.errors import UnavailableError


def test_rates_are_those_of_a_machine() -> None:
    pytest.importorskip("torch")
    stages: list[str] = []
    rates = machine_rates.measured(lambda stage, _: stages.append(stage))
    assert rates.threads == os.cpu_count()
    assert 1e8 < rates.bytes_per_second < 1e13
    assert set(rates.macs_per_second) == {"float32", "bfloat16"}
    assert min(rates.macs_per_second.values()) > 1e7
    assert set(stages) == {"measuring the machine"}


def test_a_machine_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: "no number")
    with pytest.raises(UnavailableError, match="no number"):
        machine_rates.measured(lambda *_: None)


def test_the_sum_reads_everything_that_parts_divide() -> None:
    def every(parts: int) -> Iterable[int]:
        return range(parts)

    total = machine_rates._sum_in(every)
    assert total(np.arange(1000), 8) == sum(range(1000))


def test_the_fastest_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 6.0, 7.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    ends = iter([0.0, 0.1, 0.2, 9.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(ends))
    assert machine_rates._least(lambda: None) == 1.0
