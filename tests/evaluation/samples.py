"""Samples with figures that are easy to add up."""

from dataclasses import replace
from typing import Any

from client.counters import Counters
from evaluation.measure import Sample
from wire.v1 import trusted_worker_pb2 as pb

ZERO = Counters.of(pb.StatsResponse())


def sample(gaps: list[float], tokens: int = 10, first: float = 0.5, **after: Any) -> Sample:
    """One repetition; the counters were all zero before it."""
    cpu = {"client": 0.1, "trusted_worker": 0.2, "gpu_worker": 0.4}
    return Sample(first, gaps, tokens, ZERO, replace(ZERO, **after), cpu, None, (ZERO, ZERO))
