"""From repetitions to rows: medians, spreads, shares, and what is said per token."""

from dataclasses import replace

import pytest

from evaluation.measure import Load, Sample
from evaluation.refill import Refill
from evaluation.rounds import Found, Key, Taken
from evaluation.rows import Row, row, rows, shares, spread
from tests.evaluation.samples import ZERO, sample
from wire.metrics import TRANSPORTS

LOAD = Load(32, 10, 1)


def made(scheme: str, *samples: Sample, plane: str = "grpc") -> Row:
    return row(Key(scheme, "int8", plane), LOAD, Taken(list(samples), {"client": 1}))


def padded(gaps: list[float], *pads: Refill) -> Row:
    return row(Key("secure-infer", "int8", "grpc"), LOAD, Taken([sample(gaps)]), pads)


def taken(scheme: str, gaps: list[float], plane: str = "grpc", load: Load = LOAD) -> Found:
    return {(Key(scheme, "int8", plane), load): Taken([sample([gap], first=10 * gap) for gap in gaps])}


def test_medians_and_spreads_over_the_repetitions() -> None:
    plain = made("plain", sample([0.010]), sample([0.012]), sample([0.030]))
    assert plain.ms_per_token == pytest.approx(12)
    assert plain.ms_per_token_spread == pytest.approx([10, 30])
    assert plain.tokens_per_second == pytest.approx(1 / 0.012)
    assert spread([3.0, 1.0, 2.0]) == [1.0, 3.0]


def test_sessions_of_a_batch_add_up_but_each_has_its_own_pace() -> None:
    found = made("plain", sample([0.010, 0.020, 0.040]))
    assert found.ms_per_token == pytest.approx(20)
    assert found.tokens_per_second == pytest.approx(100 + 50 + 25)


def test_figures_per_token_are_over_all_repetitions() -> None:
    samples = [
        sample([0.01], tokens=10, exchanges=250, wire_bytes_up=600, wire_bytes_down=400, products_inside=1),
        sample([0.01], tokens=30, exchanges=750, wire_bytes_up=2000, wire_bytes_down=1000, products_inside=2),
    ]
    found = made("split", *samples)
    assert found.exchanges_per_token == pytest.approx(25)
    assert found.bytes_per_token == pytest.approx(100)
    assert found.cpu_seconds_per_token == pytest.approx({"client": 0.005, "trusted_worker": 0.01, "gpu_worker": 0.02})
    assert found.products_inside == 3


def test_plain_is_the_measure_at_equal_precision_only() -> None:
    masked = taken("secure-infer", [0.024, 0.022, 0.048])
    other = {(Key("split", "float32", "grpc"), LOAD): masked[next(iter(masked))]}
    found = rows(taken("plain", [0.010, 0.012, 0.030]) | masked | other)
    assert (found[0].of_plain, found[0].first_token_of_plain) == (1.0, 1.0)
    assert found[1].of_plain == pytest.approx(0.5)
    assert found[1].first_token_of_plain == pytest.approx(2)
    assert found[2].of_plain is found[2].first_token_of_plain is None


def test_plain_is_the_measure_over_the_same_plane_and_under_the_same_load() -> None:
    plain = taken("plain", [0.02]) | taken("plain", [0.01], "stream")
    others = taken("secure-infer", [0.04]) | taken("tee-only", [0.01], "-")
    found = rows(plain | others | taken("secure-infer", [0.04], load=Load(900, 10, 1)))
    assert [one.of_plain for one in found] == [1, 1, pytest.approx(0.5), pytest.approx(1), None]


def test_sustained_is_one_token_and_one_pad_after_the_other() -> None:
    found = padded([0.02, 0.02], *(Refill(0.004, wall) for wall in (0.01, 0.02, 0.015)))
    assert found.tokens_per_second == pytest.approx(100)
    assert found.tokens_per_second_sustained == pytest.approx(1 / (0.01 + 0.015))
    used, sustained = found.cpu_seconds_per_token, found.cpu_seconds_per_token_sustained
    assert sustained == pytest.approx(used | {"trusted_worker": used["trusted_worker"] + 0.004})
    assert made("plain", sample([0.02])).tokens_per_second_sustained == pytest.approx(50)


def counts(**by_microseconds: int) -> tuple[int, ...]:
    """A histogram with so many exchanges in the buckets up to these bounds: us_100=3."""
    bounds = [f"us_{round(1e6 * bound)}" for bound in TRANSPORTS]
    return tuple(by_microseconds.get(bound, 0) for bound in [*bounds, "beyond"])


def test_an_exchange_is_what_neither_worker_computed_in() -> None:
    found = made("split", sample([0.01], exchanges=100, transport_seconds=0.2))
    assert found.exchange_us == pytest.approx(2000)
    none = made("tee-only", sample([0.01]))
    assert none.exchange_us is none.exchange_p50_us is none.exchange_p99_us is None


def test_bare_exchanges_are_those_of_all_repetitions() -> None:
    found = made("split", replace(sample([0.01]), bare=[4e-4, 1e-4]), replace(sample([0.01]), bare=[2e-4]))
    assert found.bare_exchange_p50_us == pytest.approx(200)
    assert made("tee-only", sample([0.01])).bare_exchange_p50_us is None


def test_quantiles_of_exchanges_are_over_all_repetitions_and_since_their_beginning() -> None:
    early, late = counts(us_100=7, us_5000=1000), counts(us_100=17, us_5000=1000)
    one = replace(sample([0.01], transport_counts=late), before=replace(ZERO, transport_counts=early))
    found = made("split", one, sample([0.01], transport_counts=counts(us_100=50, us_200=38, us_10000=2)))
    assert found.exchange_p50_us == pytest.approx(90 + 10 * 50 / 60)
    assert found.exchange_p99_us == pytest.approx(5000 + 5000 / 2)


def test_products_of_prompts_are_counted_apart() -> None:
    one = replace(sample([0.01], products_inside=3), prompts=(ZERO, replace(ZERO, products_inside=40)))
    found = made("secure-infer", one, one)
    assert (found.products_inside, found.prompt_products_inside) == (6, 80)


def test_shares_add_up_to_the_steps() -> None:
    one = sample([0.01], step_seconds=2.0, transport_seconds=1.0, worker_seconds=0.5)
    assert shares([one, one]) == pytest.approx({"worker": 0.25, "exchange": 0.5, "trusted": 0.25})
    assert shares([sample([0.01])]) is None


def test_the_pad_s_cost_is_the_median_of_those_that_were_made() -> None:
    found = padded([0.01], Refill(0.003, 0.03), Refill(0.001, 0.01), Refill(0.002, 0.05))
    assert (found.pad_seconds_per_token, found.pad_wall_seconds_per_token) == (0.002, 0.03)
    assert made("plain", sample([0.01])).pad_seconds_per_token is None


def test_a_row_has_the_pads_of_all_loads_and_of_no_other_row() -> None:
    key, none = Key("secure-infer", "int8", "grpc"), sample([0.01])
    pads = [replace(none, pad=Refill(0.1, wall)) for wall in (0.01, 0.03)]
    found = rows({(key, LOAD): Taken([none, pads[0]]), (key, Load(900, 10, 1)): Taken([pads[1], none])})
    found += rows({(Key("secure-infer", "int8", "stream"), LOAD): Taken([none])})
    assert [one.pad_wall_seconds_per_token for one in found] == [pytest.approx(0.02), pytest.approx(0.02), None]
