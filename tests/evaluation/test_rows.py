"""From repetitions to rows: medians, spreads, shares, and what is said per token."""

import json
from dataclasses import replace

import pytest

from evaluation.rows import Row, as_dicts, relative, row, shares, spread
from evaluation.tables import bench_table
from tests.evaluation.samples import sample


def rows() -> list[Row]:
    plain = row("plain", "int8", [sample([0.010]), sample([0.012]), sample([0.030])], {"client": 1})
    masked = row("secure-infer", "int8", [sample([0.024]), sample([0.022]), sample([0.048])], {"client": 1})
    return relative([plain, masked, replace(masked, precision="float32")])


def test_medians_and_spreads_over_the_repetitions() -> None:
    plain = rows()[0]
    assert plain.ms_per_token == pytest.approx(12)
    assert plain.ms_per_token_spread == pytest.approx([10, 30])
    assert plain.tokens_per_second == pytest.approx(1 / 0.012)
    assert spread([3.0, 1.0, 2.0]) == [1.0, 3.0]


def test_sessions_of_a_batch_add_up_but_each_has_its_own_pace() -> None:
    found = row("plain", "int8", [sample([0.010, 0.020, 0.040])], {})
    assert found.ms_per_token == pytest.approx(20)
    assert found.tokens_per_second == pytest.approx(100 + 50 + 25)


def test_figures_per_token_are_over_all_repetitions() -> None:
    samples = [
        sample([0.01], tokens=10, exchanges=250, wire_bytes_up=600, wire_bytes_down=400, products_inside=1),
        sample([0.01], tokens=30, exchanges=750, wire_bytes_up=2000, wire_bytes_down=1000, products_inside=2),
    ]
    found = row("split", "int8", samples, {})
    assert found.exchanges_per_token == pytest.approx(25)
    assert found.bytes_per_token == pytest.approx(100)
    assert found.cpu_seconds_per_token == pytest.approx({"client": 0.005, "trusted_worker": 0.01, "gpu_worker": 0.02})
    assert found.products_inside == 3


def test_plain_is_the_measure_at_equal_precision_only() -> None:
    plain, masked, other = rows()
    assert plain.of_plain == 1.0
    assert masked.of_plain == pytest.approx(0.5)
    assert other.of_plain is None


def test_shares_add_up_to_the_steps() -> None:
    one = sample([0.01], step_seconds=2.0, exchange_seconds=1.5, worker_seconds=0.5)
    assert shares([one, one]) == pytest.approx({"worker": 0.25, "exchange": 0.5, "trusted": 0.25})
    assert shares([sample([0.01])]) is None


def test_the_pad_s_cost_is_the_median_of_those_that_were_made() -> None:
    samples = [replace(sample([0.01]), pad=pad) for pad in (None, 0.003, 0.001, 0.002)]
    assert row("secure-infer", "int8", samples, {}).pad_seconds_per_token == 0.002
    assert row("plain", "int8", samples[:1], {}).pad_seconds_per_token is None


KEYS = (
    "scheme precision ms_per_token ms_per_token_spread of_plain tokens_per_second time_to_first_token "
    "exchanges_per_token bytes_per_token cpu_seconds_per_token shares pad_seconds_per_token products_inside memory_peak"
)


def test_json_has_the_keys_that_others_read() -> None:
    found = json.loads(json.dumps(as_dicts(rows())))
    for one in found:
        assert set(KEYS.split()) <= set(one)


def test_the_table_has_a_line_for_every_row() -> None:
    what = {"model": "demo", "context": 3, "tokens": 10, "batch": 1, "repeat": 3, "interleaved": "x", "machine": "m"}
    what |= {"tee_profile": "", "switch_us": 0, "data_plane": "grpc"}
    lines = bench_table(what | {"rows": as_dicts(rows())}).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    assert "| secure-infer | int8 | 24.00 | 22.00 to 48.00 |" in table[3]
