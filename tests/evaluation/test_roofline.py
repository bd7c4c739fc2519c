"""Rooflines of the 0.5B shape, counted by hand."""

from dataclasses import replace

import pytest

from client.shapes import shape
from evaluation.measure import Load
from evaluation.refill import Refill
from evaluation.roofline import Rates, as_dict, cache_bytes, prompt_macs, refill_macs_per_second, roofline, weight_bytes
from evaluation.rounds import Key, Taken
from evaluation.rows import Row, row
from tests.evaluation.samples import sample

CONFIG = shape("qwen2.5-0.5b")  # 24 layers, hidden 896, 14 and 2 heads of 64, ffn 4864, vocabulary 151936
BLOCKS = 24 * (896 * 1152 + 896 * 896 + 896 * 9728 + 4864 * 896)
HEAD = 896 * 151936
RATES = Rates(2, 20e9, {"float32": 50e9, "bfloat16": 100e9})


def made(scheme: str, precision: str, batch: int = 1, resident: bool = True) -> Row:
    load = Load(100, 20, batch)
    one = sample([0.05] * batch, first=2.0, weights_resident=resident)
    return row(Key(scheme, precision, "grpc"), load, Taken([one]))


def test_weights_are_those_of_all_linears_in_their_precision() -> None:
    outputs = 24 * (1152 + 896 + 9728 + 896) + 151936
    assert weight_bytes(CONFIG, "int8") == BLOCKS + HEAD + 4 * outputs
    assert weight_bytes(CONFIG, "bfloat16") * 2 == weight_bytes(CONFIG, "float32") == 4 * (BLOCKS + HEAD)


def test_a_cache_has_keys_and_values_of_every_layer_but_not_beyond_the_window() -> None:
    assert cache_bytes(CONFIG, "plain", "int8", 10) == 10 * 2 * 24 * 128 * 4
    assert cache_bytes(CONFIG, "transformers", "int8", 10) == 10 * 2 * 24 * 128 * 2
    assert cache_bytes(replace(CONFIG, window=4), "plain", "int8", 10) == 4 * 2 * 24 * 128 * 4


def test_one_row_is_bound_by_reading() -> None:
    found = roofline(CONFIG, made("plain", "int8"), 20, RATES)
    assert found is not None
    assert found.cache_bytes == 110 * 2 * 24 * 128 * 4
    assert found.decode_seconds == found.reading_seconds == (found.weight_bytes + found.cache_bytes) / 20e9
    assert found.decode_ratio == pytest.approx(0.05 / found.decode_seconds)


def test_many_rows_are_bound_by_multiplying_and_share_the_weights() -> None:
    one, many = (roofline(CONFIG, made("plain", "int8", batch), 20, RATES) for batch in (1, 8))
    assert one is not None
    assert many is not None
    assert (many.weight_bytes, many.cache_bytes) == (one.weight_bytes, 8 * one.cache_bytes)
    assert many.decode_seconds == many.multiplying_seconds == pytest.approx(8 * (BLOCKS + HEAD) / 50e9)


def test_a_prompt_is_bound_by_its_products() -> None:
    macs = 100 * BLOCKS + HEAD + 24 * 896 * 100 * 101
    assert prompt_macs(CONFIG, 100) == macs
    found = roofline(CONFIG, made("transformers", "bfloat16", 2), 20, RATES)
    assert found is not None
    assert found.prompt_seconds == pytest.approx(2 * macs / 100e9)
    assert found.prompt_ratio == pytest.approx(2.0 / found.prompt_seconds)


def test_rows_that_exchange_or_read_from_disk_have_none() -> None:
    assert roofline(CONFIG, made("secure-infer", "int8"), 20, RATES) is None
    assert roofline(CONFIG, made("tee-only", "int8", resident=False), 20, RATES) is None
    assert roofline(CONFIG, made("tee-only", "int8"), 20, RATES) is not None


def test_a_refill_s_rate_counts_the_lookup_where_there_is_one() -> None:
    load, key, pads = Load(100, 20, 1), Key("secure-infer", "int8", "grpc"), [Refill(0.01, 0.02)]
    usual = row(key, load, Taken([sample([0.05])]), pads)
    assert refill_macs_per_second(CONFIG, usual) == pytest.approx((BLOCKS + HEAD) / 0.02)
    looked_up = row(key, load, Taken([sample([0.05], embedding="lookup")]), pads)
    found = refill_macs_per_second(CONFIG, looked_up)
    assert found == pytest.approx((BLOCKS + 2 * HEAD) / 0.02)
    assert refill_macs_per_second(CONFIG, made("plain", "int8")) is None


def test_the_best_of_several_measurements_counts() -> None:
    other = Rates(2, 10e9, {"float32": 60e9, "bfloat16": 90e9})
    assert Rates.best([RATES, other]) == Rates(2, 20e9, {"float32": 60e9, "bfloat16": 100e9})


def test_without_rates_there_is_no_roofline() -> None:
    assert as_dict(CONFIG, made("plain", "int8"), 20, None) == {"roofline": None, "refill_macs_per_second": None}
    found = as_dict(CONFIG, made("plain", "int8"), 20, RATES)["roofline"]
    assert found["weight_bytes"] == weight_bytes(CONFIG, "int8")
