"""Budgets, banks, and what all of it takes."""

from pathlib import Path

import pytest

from client.costs import Case, cost
from client.shapes import SHAPES, shape
from evaluation.flags import INSIDE, ROWS
from evaluation.measure import Load
from evaluation.sizing import (
    LEAST_BYTES,
    available_bytes,
    curve_budgets,
    division,
    least,
    library_bytes,
    pad_bank,
    sizes,
)
from wire.errors import ContextError
from wire.layout import Demand
from wire.linears import all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.plan import Plan

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
LOAD = Load(context=32, tokens=64, batch=1)
PLENTY = 1 << 40


def divided(scheme: str, precision: str, load: Load, available: int) -> Plan:
    """How the budget of a row of the 1B shape is divided."""
    config, size = shape("llama3.2-1b"), sizes(shape("llama3.2-1b"), scheme, precision, [load], available)
    found = division(Demand(config, scheme, precision, stock=138), size.memory_budget)
    assert found is not None
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_budget_holds_the_least_there_must_be(name: str, row: tuple[str, str]) -> None:
    config = shape(name)
    needed = sum(cost(row[0], Case(config, row[1], LOAD.capacity)).memory.values())
    for available in (PLENTY, 1 << 30):
        assert sizes(config, *row, [LOAD], available).memory_budget >= max(needed, LEAST_BYTES)


def test_weights_stay_in_memory_where_there_is_enough() -> None:
    for scheme, precision in (row for row in ROWS if row[0] in INSIDE):
        best = divided(scheme, precision, LOAD, PLENTY)
        assert best.layout.embed == "resident"
        assert best.layout.linears != "parked"
        assert (best.rows, best.refill_rows) == (64, 138 if scheme == "secure-infer" else 0)


@pytest.mark.parametrize("scheme", ["tee-only", "secure-infer"])
def test_weights_come_from_disk_where_there_is_not_and_steps_stay_whole(scheme: str) -> None:
    assert divided(scheme, "int8", LOAD, 2 << 30).layout.linears == "parked"
    assert divided(scheme, "int8", LOAD, 2 << 30).rows == 64


@pytest.mark.parametrize("available", [PLENTY, 2 << 30])
def test_all_sessions_lie_inside_together(available: int) -> None:
    assert divided("tee-only", "int8", Load(1000, 64, 7), available).slots >= 7 * 16 * 17


def test_the_least_budget_is_the_answer_where_nothing_fits() -> None:
    config = shape("llama3.2-1b")
    assert sizes(config, "tee-only", "int8", [LOAD], 1 << 20).memory_budget == LEAST_BYTES


def test_a_curve_goes_on_until_everything_is_resident() -> None:
    rows = [("tee-only", "int8"), ("secure-infer", "int8")]
    profiles = [14 << 20, 16 << 20, 24 << 20, 64 << 20, 93 << 20]
    assert curve_budgets(ModelConfig.from_hf(DEMO), rows, LOAD, PLENTY) == profiles
    doubles = [1 << power for power in range(27, 32)]  # half of 2 GiB holds the linears of this one
    assert curve_budgets(shape("llama3.2-1b"), rows, LOAD, PLENTY) == [*profiles, *doubles]
    assert curve_budgets(shape("llama3.2-1b"), rows, LOAD, 600 << 20) == [*profiles, *doubles[:3]]


def test_the_least_budget_is_the_one_that_costs_says() -> None:
    config = shape("qwen2.5-0.5b")
    small = least(config, "secure-infer", "int8", LOAD)
    assert division(Demand(config, "secure-infer", "int8"), small) is not None
    assert division(Demand(config, "secure-infer", "int8"), small - (1 << 16)) is None


def test_a_bank_has_room_for_masked_lookups() -> None:
    config, specs = shape("qwen2.5-0.5b"), [*all_specs(shape("qwen2.5-0.5b")), lookup_spec(shape("qwen2.5-0.5b"))]
    words = 138 * 4 * sum(spec.n for spec in specs)
    assert words < pad_bank(config, "secure-infer", "int8", [LOAD]) < 1.01 * words


def test_more_sessions_need_more_memory_and_more_pads() -> None:
    one, eight = (sizes(shape("gpt2"), "secure-infer", "int8", [Load(512, 64, batch)], PLENTY) for batch in (1, 8))
    assert eight.memory_budget > one.memory_budget
    assert eight.pad_bank > 7 * one.pad_bank


@pytest.mark.parametrize("context", range(1, 200))
def test_a_bank_has_pads_for_the_decode_phase_whatever_the_prompt(context: int) -> None:
    load, config = Load(context, 64, 1), shape("gpt2")
    found = cost("secure-infer", Case(config, "int8", load.capacity)).pads
    assert found is not None
    capacity = sizes(config, "secure-infer", "int8", [load], PLENTY).pad_bank // found.sealed_bytes
    half = capacity // 2
    stock = capacity - min(context, half)  # after the prompt, from a full bank
    stock = capacity if capacity - stock >= half else stock  # refilled
    assert stock >= load.decoded
    assert stock - 2 >= half  # two rows of the first step


@pytest.mark.parametrize("context", [20, 128, 1000])
def test_a_bank_for_prompts_has_pads_for_all_of_their_rows_and_for_decoding(context: int) -> None:
    loads, config = [Load(context, 64, 1), Load(7, 64, 2)], shape("llama3.2-1b")
    found = cost("secure-infer", Case(config, "int8", 1)).pads
    assert found is not None
    capacity = pad_bank(config, "secure-infer", "int8", loads, prompts=True) // found.sealed_bytes
    full = capacity - min(256, capacity) // 2  # the least that a bank at rest holds
    assert all(full >= load.batch * load.context + load.decoded for load in loads)


def test_several_loads_get_what_each_of_them_needs() -> None:
    config, loads = shape("llama3.2-1b"), [Load(4096, 64, 1), Load(64, 64, 8)]
    together = sizes(config, "secure-infer", "int8", loads, PLENTY)
    for load in loads:
        alone = sizes(config, "secure-infer", "int8", [load], PLENTY)
        assert together.memory_budget >= alone.memory_budget
        assert together.pad_bank >= alone.pad_bank


def test_a_row_of_the_library_takes_its_model() -> None:
    assert library_bytes(shape("qwen2.5-0.5b"), "float32") > 4 * 490_000_000


def test_a_row_takes_the_model_on_both_sides_as_far_as_they_have_it() -> None:
    config = shape("qwen2.5-0.5b")
    inside, outside = (sizes(config, scheme, "float32", [LOAD], PLENTY) for scheme in ("tee-only", "plain"))
    assert inside.resident > 4 * 490_000_000
    assert outside.resident > 4 * 490_000_000
    assert outside.memory_budget == LEAST_BYTES


def test_a_context_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ContextError):
        sizes(shape("gpt2"), "plain", "int8", [Load(1000, 64, 1)], PLENTY)


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 1 << 20
