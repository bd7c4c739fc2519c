"""From repetitions to the rows of the table. Pure functions over numbers."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from evaluation.measure import Sample


@dataclass(frozen=True)
class Row:
    """One scheme at one precision. Medians over the repetitions, spreads from the least to the most.

    Times in seconds unless the name says otherwise, sizes in bytes. Per token means per decoded token, of any session.
    """

    scheme: str
    precision: str
    ms_per_token: float  # from a session's token to its next one
    ms_per_token_spread: list[float]
    tokens_per_second: float  # of all sessions together
    of_plain: float | None  # the same relative to plain at equal precision
    time_to_first_token: float
    exchanges_per_token: float
    bytes_per_token: float
    cpu_seconds_per_token: dict[str, float]  # by role
    shares: dict[str, float] | None  # of the trusted worker's steps; None where they were not timed
    pad_seconds_per_token: float | None  # CPU time of the trusted worker, in idle time
    products_inside: int  # in all decode phases together
    memory_peak: int  # of the trusted worker's budget, since its start
    resident: dict[str, int] = field(default_factory=dict)  # by role


def row(scheme: str, precision: str, samples: Sequence[Sample], resident: dict[str, int]) -> Row:
    """The figures of one row, without `of_plain`."""
    gaps = [1000 * statistics.median(sample.gaps) for sample in samples]
    return Row(
        scheme,
        precision,
        statistics.median(gaps),
        spread(gaps),
        statistics.median(sum(1 / gap for gap in sample.gaps) for sample in samples),
        None,
        statistics.median(sample.first for sample in samples),
        _per_token(samples, lambda sample: sample.after.exchanges - sample.before.exchanges),
        _per_token(samples, _transferred),
        {role: _per_token(samples, partial(_cpu, role)) for role in samples[0].cpu},
        shares(samples),
        _median_of_some([sample.pad for sample in samples]),
        sum(sample.after.products_inside - sample.before.products_inside for sample in samples),
        samples[-1].after.memory_peak,
        resident,
    )


def spread(values: Sequence[float]) -> list[float]:
    """The least and the most."""
    return [min(values), max(values)]


def shares(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Who spent the time of the steps: the GPU worker's arithmetic, the exchange around it, the trusted worker."""
    step = _sum(samples, "step_seconds")
    exchange, worker = _sum(samples, "exchange_seconds"), _sum(samples, "worker_seconds")
    if step <= 0:
        return None
    return {"worker": worker / step, "exchange": (exchange - worker) / step, "trusted": (step - exchange) / step}


def relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed relative to plain at the same precision, where that was measured."""
    plain = {one.precision: one.tokens_per_second for one in rows if one.scheme == "plain"}
    return [
        replace(one, of_plain=one.tokens_per_second / plain[one.precision]) if one.precision in plain else one
        for one in rows
    ]


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [asdict(one) for one in rows]


def _cpu(role: str, sample: Sample) -> float:
    return sample.cpu[role]


def _transferred(sample: Sample) -> int:
    before, after = sample.before, sample.after
    return after.wire_bytes_up + after.wire_bytes_down - before.wire_bytes_up - before.wire_bytes_down


def _per_token(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """Over all repetitions."""
    return sum(figure(sample) for sample in samples) / sum(sample.tokens for sample in samples)


def _sum(samples: Sequence[Sample], counter: str) -> float:
    return sum(float(getattr(one.after, counter) - getattr(one.before, counter)) for one in samples)


def _median_of_some(values: Sequence[float | None]) -> float | None:
    some = [value for value in values if value is not None]
    return statistics.median(some) if some else None
