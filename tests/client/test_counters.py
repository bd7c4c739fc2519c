"""Quantiles of exchanges, from counts as Stats has them; what /stats says of them."""

import pytest

from client.counters import Counters, transport_quantile
from client.report import table
from wire.metrics import TRANSPORTS, Histogram
from wire.v1 import trusted_worker_pb2 as pb


def counted(*seconds: float) -> list[int]:
    histogram = Histogram(TRANSPORTS)
    for value in seconds:
        histogram.observe(value)
    return histogram.counts


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 0.99])
def test_a_quantile_lies_in_the_bucket_of_the_exchange_that_it_is(share: float) -> None:
    times = [(10 + number) / 1e6 for number in range(0, 900, 7)]
    exact, found = sorted(times)[int(share * len(times))], transport_quantile(counted(*times), share)
    bound = next(bound for bound in TRANSPORTS if bound >= exact)
    assert found == pytest.approx(exact, abs=bound - max((one for one in TRANSPORTS if one < bound), default=0))


def test_exchanges_of_a_bucket_count_as_evenly_spread() -> None:
    found = [transport_quantile(counted(*[110e-6] * 4), share) for share in (0.25, 0.5, 1.0)]
    assert found == pytest.approx([105e-6, 110e-6, 120e-6])


def test_no_bucket_is_longer_than_the_last_one_with_a_bound() -> None:
    assert transport_quantile(counted(1e-4, 9.0, 9.0), 0.5) == TRANSPORTS[-1]


def test_without_exchanges_or_with_buckets_of_somebody_else_there_is_none() -> None:
    assert transport_quantile(counted(), 0.5) is None
    assert transport_quantile([3, 4], 0.5) is None
    assert transport_quantile([], 0.5) is None


def test_stats_show_half_and_nearly_all() -> None:
    counts = counted(*[75e-6] * 99, 175e-6)
    line = next(one for one in table(_counters(counts)).splitlines() if "half" in one)
    assert line.split("  ")[-1].strip() == "75 / 80 us, computing left out"
    assert "us, computing" not in table(_counters([]))


def _counters(counts: list[int]) -> Counters:
    return Counters.of(pb.StatsResponse(transport_counts=counts))
