"""How a budget is divided: every division adds up, the smallest is the smallest, and more is never worse for long."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.shapes import SHAPES, shape
from wire.errors import ExhaustedError
from wire.kv_pages import KvType
from wire.layout import Demand
from wire.linears import PROJECTIONS, Linear, all_specs
from wire.plan import HEAD_ROWS, MAX_ROWS, REFILL_ROWS, plan, smallest
from wire.profiles import MIB, PROFILES
from wire.scratch import refill_bytes, step_bytes
from wire.sheets import row_bytes

CASES = settings(deadline=None, max_examples=40, derandomize=True)
SCHEMES = [
    ("tee-only", "int8"),
    ("tee-only", "float32"),
    ("split", "int8"),
    ("split", "float32"),
    ("secure-infer", "int8"),
]
demands = st.builds(
    lambda name, scheme, kv, stock, client, adapters, kept: Demand(
        shape(name), scheme[0], scheme[1], kv, stock, client, adapters, kept if scheme[0] == "secure-infer" else ()
    ),
    st.sampled_from(["gpt2", "qwen2.5-0.5b", "tinyllama-1.1b", "llama2-7b"]),
    st.sampled_from(SCHEMES),
    st.sampled_from(KvType),
    st.sampled_from([0, 1, 5, 1000]),
    st.booleans(),
    st.sampled_from([0, 1, 1000, 1 << 26]),
    st.sampled_from([(), PROJECTIONS]),
)


@given(demands, st.floats(1, 200))
@CASES
def test_a_division_adds_up_and_holds_a_session(demand: Demand, times: float) -> None:
    budget = int(smallest(demand) * times)
    found = plan(demand, budget)
    assert sum(found.parts.values()) <= budget
    assert budget - sum(found.parts.values()) <= demand.page  # nothing is left that could be a page
    assert demand.config.layers <= found.slots
    assert demand.adapters <= found.parts["adapters"] < demand.adapters + 64
    assert 1 <= found.head_rows <= min(found.rows, HEAD_ROWS)
    assert found.rows <= MAX_ROWS
    assert (found.refill_rows == 0) == (demand.scheme != "secure-infer")
    assert found.refill_rows <= min(REFILL_ROWS, max(demand.stock, 1))
    assert found.scratch >= step_bytes(demand, found.layout, found.rows, found.head_rows)
    assert found.refill >= refill_bytes(demand, found.layout, found.refill_rows)


@given(demands)
@CASES
def test_less_than_the_smallest_budget_is_refused_with_what_would_do(demand: Demand) -> None:
    least = smallest(demand)
    plan(demand, least)
    for less in (64, least // 2, least - 1):
        with pytest.raises(ExhaustedError, match=f"--memory-budget {least} would do"):
            plan(demand, least - less)


@given(demands)
@CASES
def test_what_is_resident_is_all_that_a_step_multiplies_with(demand: Demand) -> None:
    """A budget of twice the model keeps everything; the smallest of a real model keeps no matrix."""
    weights = demand.width * sum(spec.k * spec.n for spec in all_specs(demand.config))
    large = plan(demand, 8 * weights + smallest(demand))
    inside = demand.scheme != "split"
    assert large.layout.embed == ("client" if demand.client_embeds else "resident")
    assert large.layout.linears == ("resident" if inside else "scales" if demand.int8 else "absent")
    small = plan(demand, smallest(demand))
    kept = sum(spec.k * spec.n for spec in all_specs(demand.config) if spec.linear in demand.kept)
    assert (small.parts["weights"], small.parts["embedding"]) == (kept, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_planned(name: str) -> None:
    for scheme, precision in SCHEMES:
        demand = Demand(shape(name), scheme, precision)
        assert plan(demand, smallest(demand)).slots >= demand.config.layers


def test_what_is_set_aside_for_adapters_is_on_top_and_leaves_all_other_parts_as_they_were() -> None:
    for scheme, precision in SCHEMES:
        without = Demand(shape("qwen2.5-0.5b"), scheme, precision)
        beside, most = replace(without, adapters=1 << 26), 9000  # of one row of the widest linear and three ranks
        assert 1 << 26 <= smallest(beside) - smallest(without) <= (1 << 26) + 4 * most
        for budget in (64 << 20, 600 << 20, 4 << 30):
            one, other = plan(without, budget), plan(beside, budget + (1 << 26))
            assert (one.layout, one.rows, one.refill_rows) == (other.layout, other.rows, other.refill_rows)
            assert other.parts["adapters"] == 1 << 26
            assert one.parts["weights"] == other.parts["weights"]


def test_the_models_that_are_promised_fit_the_profiles_that_are_promised() -> None:
    """A model of half a billion parameters in a phone's TEE: 64 MiB, and 14 MiB, with lookups; int8 pages hold more."""
    demand = Demand(shape("qwen2.5-0.5b"), "secure-infer", "int8")
    for profile in ("optee", "trustzone"):
        found = plan(demand, PROFILES[profile].bytes)
        assert (found.layout.embed, found.layout.linears) == ("scan", "parked")
        assert demand.looks_up(found.layout)
        assert plan(replace(demand, kv=KvType.INT8), PROFILES[profile].bytes).slots > 3 * found.slots
    assert plan(replace(demand, scheme="tee-only"), PROFILES["optee"].bytes).rows >= 8


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5-0.5b", "llama2-7b", "chatglm3-6b"])
def test_kept_projections_cost_their_weights_and_save_their_checks(name: str) -> None:
    gone = Demand(shape(name), "secure-infer", "int8")
    kept = replace(gone, kept=PROJECTIONS)
    specs = [spec for spec in all_specs(gone.config) if spec.linear in PROJECTIONS]
    weights, checks = sum(spec.k * spec.n for spec in specs), 6 * sum(spec.k for spec in specs)
    before, after = plan(gone, smallest(gone)), plan(kept, smallest(kept))
    assert after.parts["weights"] - before.parts["weights"] == weights
    assert before.parts["verification"] - after.parts["verification"] == checks  # whole blocks, at these widths
    assert weights - 2 * checks < smallest(kept) - smallest(gone) <= weights
    assert {spec.linear for spec in kept.padded(after.layout)} == set(Linear) - set(PROJECTIONS)
    large = 8 * sum(spec.k * spec.n for spec in all_specs(gone.config))
    assert plan(kept, large).parts["weights"] == plan(gone, large).parts["weights"]


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama2-7b"])
def test_the_table_of_docs_memory_is_true(name: str) -> None:
    gone = Demand(shape(name), "secure-infer", "int8")
    weights = sum(spec.k * spec.n for spec in all_specs(gone.config) if spec.linear in PROJECTIONS)
    sizes = [smallest(gone), smallest(replace(gone, kept=PROJECTIONS))]
    pads = [row_bytes(all_specs(gone.config, kept)) for kept in ((), PROJECTIONS)]
    shown = [f"{weights / MIB:,.0f}"]
    shown += [f"{size / MIB:,.1f}" if size < 1000 * MIB else f"{size / MIB:,.0f}" for size in sizes]
    shown += [f"{size / MIB:.2f}" for size in pads]
    text = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"| {' | '.join([name, *shown])} |" in text


def test_a_budget_that_is_too_small_for_what_is_kept_is_refused_with_what_would_do() -> None:
    demand = Demand(shape("qwen2.5-0.5b"), "secure-infer", "int8", kept=PROJECTIONS)
    text = f"secure-infer with --projections trusted: --memory-budget {smallest(demand)} would do"
    with pytest.raises(ExhaustedError, match=text):
        plan(demand, PROFILES["optee"].bytes)
