"""Budgets, banks, and what all of it takes."""

import pytest

from client.shapes import SHAPES, shape
from evaluation.flags import ROWS
from evaluation.measure import Load
from evaluation.sizing import LEAST_BYTES, available_bytes, sizes
from wire.costs import Case, cost
from wire.errors import ContextError

LOAD = Load(context=32, tokens=64, batch=1)
PLENTY = 1 << 40


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_budget_holds_the_least_there_must_be(name: str, row: tuple[str, str]) -> None:
    config = shape(name)
    least = sum(cost(row[0], Case(config, row[1], LOAD.capacity)).memory.values())
    for available in (PLENTY, 1 << 30):
        assert sizes(config, *row, LOAD, available).memory_budget >= max(least, LEAST_BYTES)


def test_weights_stay_in_memory_where_there_is_enough() -> None:
    config = shape("llama3.2-1b")
    weights = 1_200_000_000
    assert sizes(config, "tee-only", "int8", LOAD, PLENTY).memory_budget > 2 * weights
    assert sizes(config, "tee-only", "int8", LOAD, 2 << 30).memory_budget < weights
    assert sizes(config, "split", "int8", LOAD, PLENTY).memory_budget < weights


def test_more_sessions_need_more_memory_and_more_pads() -> None:
    one, eight = (sizes(shape("gpt2"), "secure-infer", "int8", Load(512, 64, batch), PLENTY) for batch in (1, 8))
    assert eight.memory_budget > one.memory_budget
    assert eight.pad_bank > 7 * one.pad_bank


@pytest.mark.parametrize("context", range(1, 200))
def test_a_bank_has_pads_for_the_decode_phase_whatever_the_prompt(context: int) -> None:
    load, config = Load(context, 64, 1), shape("gpt2")
    found = cost("secure-infer", Case(config, "int8", load.capacity)).pads
    assert found is not None
    capacity = sizes(config, "secure-infer", "int8", load, PLENTY).pad_bank // found.sealed_bytes
    half = capacity // 2
    stock = capacity - min(context, half)  # after the prompt, from a full bank
    stock = capacity if capacity - stock >= half else stock  # refilled
    assert stock >= load.decoded
    assert stock - 2 >= half  # two rows of the first step


def test_a_row_takes_the_model_on_both_sides_as_far_as_they_have_it() -> None:
    config = shape("qwen2.5-0.5b")
    inside, outside = (sizes(config, scheme, "float32", LOAD, PLENTY) for scheme in ("tee-only", "plain"))
    assert inside.resident > 4 * 490_000_000
    assert outside.resident > 4 * 490_000_000
    assert outside.memory_budget == LEAST_BYTES


def test_a_context_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ContextError):
        sizes(shape("gpt2"), "plain", "int8", Load(1000, 64, 1), PLENTY)


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 1 << 20
