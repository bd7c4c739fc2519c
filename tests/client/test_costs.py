"""What a scheme costs: published figures, a model small enough to count by hand, and what real workers count."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.attestation.policy import Policy
from client.costs import SCHEMES, Case, Cost, cost
from client.counters import Counters
from client.session import Request, TrustedWorker, connect
from client.shapes import SHAPES, shape
from client.turn import Pacing
from deploy.local.cluster import Cluster, Settings
from trusted_worker.config import parse
from trusted_worker.offload import GpuWorker
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.service import Service
from wire import sheets
from wire.errors import ContextError, ExhaustedError, InvalidArgumentError
from wire.kv_pages import KvType, token_bytes
from wire.layout import ALIGNMENT, Demand
from wire.linears import PROJECTIONS, Linear, all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.parameters import parameters
from wire.plan import plan
from wire.v1 import trusted_worker_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
COMBINATIONS = [(scheme, precision) for scheme, (precisions, _) in SCHEMES.items() for precision in precisions]
TRUSTED = ("--projections", "trusted")
RUNS = [
    *((*combination, ()) for combination in COMBINATIONS),
    ("kv-shield", "float32", ("--rope", "worker")),
    ("secure-infer", "int8", TRUSTED),
]
PUBLISHED = {  # parameters
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-8b": 8_190_735_360,
    "chatglm3-6b": 6_243_584_000,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
}
TINY: dict[str, Any] = {  # k and n of the linears: 8 16, 8 8, 8 32, 16 8 in two layers, then 8 32
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


def tiny(scheme: str, precision: str | None = None, context: int = 10, **more: Any) -> Cost:
    case = Case(ModelConfig.from_dict("tiny", TINY, {}), precision or SCHEMES[scheme][0][0], context, **more)
    return cost(scheme, case)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_have_as_many_parameters_as_was_published(name: str) -> None:
    assert sum(one.rows * one.width for one in parameters(shape(name)).values()) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "kib"), [("llama2-7b", 1024), ("chatglm3-6b", 56), ("qwen2-7b", 112)])
def test_the_published_sizes_of_kv_caches(name: str, kib: int) -> None:
    assert token_bytes(shape(name), KvType.FLOAT32) == kib << 10
    assert token_bytes(shape(name), KvType.FLOAT16) == kib << 9
    assert kib << 8 < token_bytes(shape(name), KvType.INT8) < kib << 9


def test_a_tiny_model_counted_by_hand() -> None:
    """88 inputs and 160 outputs of linears, 1408 weights; attention over 10 tokens: 2 layers x 8 x 10 x 2."""
    for scheme in ("split", "secure-infer"):
        found = tiny(scheme)
        assert (found.exchanges, found.bytes_up, found.bytes_down) == (9, 4 * 88, 4 * 160)
        assert (found.prompt_up, found.prompt_down) == (4 * 80, 4 * 128)
        assert found.macs_worker == {"linears": 1408}
    assert tiny("split").macs_trusted == {"attention": 320}
    assert tiny("secure-infer").macs_trusted == {"attention": 320, "verification": 4 * 160 + 3 * 88}
    made = tiny("secure-infer").pads
    assert made is not None
    assert (made.words, made.macs, made.sealed_bytes) == (88, 1408, 4 * 160 + 3 * 16)
    plain, inside = tiny("plain"), tiny("tee-only")
    assert (plain.exchanges, plain.bytes_up, plain.bytes_down, plain.prompt_down) == (1, 4, 4 * 32, 0)
    assert (inside.exchanges, inside.bytes_up, inside.bytes_down) == (0, 0, 0)
    assert plain.macs_worker == inside.macs_trusted == {"linears": 1408, "attention": 320}
    assert plain.macs_trusted == inside.macs_worker == {}


def test_a_tiny_model_with_its_projections_inside_counted_by_hand() -> None:
    """Of the 88 inputs 32 are those of qkv and o, of the 160 outputs 48, of the 1408 weights 384."""
    found = tiny("secure-infer", kept=PROJECTIONS)
    assert (found.exchanges, found.bytes_up, found.bytes_down) == (5, 4 * 56, 4 * 112)
    assert (found.prompt_up, found.prompt_down) == (4 * 48, 4 * 80)
    assert found.macs_worker == {"linears": 1024}
    assert found.macs_trusted == {"linears": 384, "attention": 320, "verification": 4 * 112 + 3 * 56}
    assert found.pads is not None
    assert (found.pads.words, found.pads.macs, found.pads.sealed_bytes) == (56, 1024, 4 * 112 + 3 * 16)
    assert found.lookup == tiny("secure-infer").lookup
    assert found.memory["weights"] == 384
    assert found.memory["verification"] == tiny("secure-infer").memory["verification"] - 4 * 64
    for scheme in ("split", "tee-only"):
        assert tiny(scheme, kept=PROJECTIONS) == tiny(scheme)


def test_a_tiny_kv_shield_counted_by_hand() -> None:
    """q is 8 wide and q beside k 12: both cross with RoPE, only the attention vector without."""
    crossing = tiny("kv-shield")
    assert (crossing.exchanges, crossing.bytes_up, crossing.bytes_down) == (5, 4 + 4 * 2 * 20, 4 * 2 * 20 + 4 * 32)
    assert (crossing.prompt_up, crossing.prompt_down) == (4 + 4 * 2 * 20, 4 * 2 * 20)
    assert crossing.start_up == 4 * 2 * 16 * 8
    v_only = tiny("kv-shield", rope_on_worker=True)
    assert (v_only.exchanges, v_only.bytes_up, v_only.bytes_down) == (3, 4 + 4 * 2 * 8, 4 * 2 * 8 + 4 * 32)
    gpt2 = Case(shape("gpt2"), "float32", 1024)
    assert cost("kv-shield", gpt2).exchanges == 13
    assert cost("kv-shield", gpt2).bytes_up == 4 + 4 * 12 * 768


def test_a_tiny_memory_counted_by_hand() -> None:
    """Blocks of 64 bytes. 5 norms of 32; one page for each layer, k and v of 64 tokens, 4 floats."""
    memory = tiny("split", "float32").memory
    assert {part: count for part, count in memory.items() if count and part not in ("scratch", "unused")} == {
        "norms and biases": 5 * 64,
        "kv cache": 2 * 2 * 64 * 4 * 4,
    }
    assert 0 <= memory["unused"] < 2 * 64 * 4 * 4
    found = tiny("secure-infer", stock=3).memory
    checked = 4 * 32 + 9 * 64 + 2 * 64  # DOWN's c takes 96 bytes, two blocks of 64
    assert found["verification"] == checked + 2 * 3 * 32  # and c' of the table
    assert found["scales"] == 2 * (64 + 64 + 128 + 64) + 128 + 128
    assert found["weights"] == found["embedding"] == 0  # parked


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.sampled_from(list(SHAPES)), st.sampled_from(COMBINATIONS), st.integers(1, 1023), st.integers(1, 500))
def test_more_context_costs_no_less_work_and_no_more_memory(
    name: str, combination: tuple[str, str], context: int, stock: int
) -> None:
    scheme, precision = combination
    small, large = (cost(scheme, Case(shape(name), precision, context + more, stock + more)) for more in (0, 1))
    assert (small.exchanges, small.bytes_up, small.bytes_down) == (large.exchanges, large.bytes_up, large.bytes_down)
    assert sum(small.memory.values()) == sum(large.memory.values())  # pages are parked, pads are made one by one
    for before, after in ((small.macs_trusted, large.macs_trusted), (small.macs_worker, large.macs_worker)):
        assert all(before[part] <= after[part] for part in before)
    work = sum(small.macs_trusted.values()) + sum(small.macs_worker.values())
    assert work >= sum(spec.k * spec.n for spec in all_specs(shape(name)))


def test_a_window_bounds_attention() -> None:
    at, beyond = (cost("plain", Case(shape("mistral-7b"), "int8", tokens)) for tokens in (4096, 8192))
    assert at.macs_worker == beyond.macs_worker


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ContextError, match="1 to 64"):
        tiny("plain", context=65)
    with pytest.raises(ContextError):
        tiny("plain", context=0)
    with pytest.raises(InvalidArgumentError, match="at int8, not at float32"):
        tiny("secure-infer", "float32")


@pytest.mark.parametrize("name", ["llama2-7b", "gpt2"])
def test_pads_are_those_of_the_trusted_worker(name: str) -> None:
    found = cost("secure-infer", Case(shape(name), "int8", 1)).pads
    assert found is not None
    assert found.sealed_bytes == sheets.row_bytes(all_specs(shape(name)))
    lookup = cost("secure-infer", Case(shape(name), "int8", 1)).lookup
    assert lookup is not None
    assert lookup.sealed_bytes == sheets.row_bytes([lookup_spec(shape(name))])


def serve(folder: Path, case: Case, scheme: str, budget: int) -> pb.StatsResponse:
    """Counters after one session of the case's context was opened; raises what loading or opening raises."""
    bank = case.stock * sheets.row_bytes(all_specs(case.config))
    flags = ["--model", str(folder), "--scheme", scheme, "--precision", case.precision, "--threads", "1"]
    flags += TRUSTED if case.kept else ()
    service = Service(parse([*flags, "--memory-budget", str(budget), "--pad-bank", str(bank)]), ProcessLimit())
    service.engine.start()
    try:
        service.engine.loaded.result(timeout=60)
        request = pb.OpenRequest(model=folder.name, scheme=scheme, max_context=case.context)
        request.precision = service.stats().precision
        service.engine.submit(lambda: service.open(request, b"")).result(timeout=60)
        return service.stats()
    finally:
        service.engine.stop()
        service.engine.join(timeout=60)


@pytest.mark.parametrize("name", ["llama", "llama-bf16-tied-sharded", "qwen3", "gpt2", "chatglm3"])
@pytest.mark.parametrize(
    ("scheme", "precision", "kept"),
    [*((*combination, ()) for combination in COMBINATIONS), ("secure-infer", "int8", PROJECTIONS)],
)
def test_the_smallest_budget_is_enough_and_less_is_not(
    model_folder: Callable[[str], Path],
    name: str,
    scheme: str,
    precision: str,
    kept: tuple[Linear, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Block by block: a session opens in just this arena and fills it; one block less holds none."""
    monkeypatch.setattr(GpuWorker, "connect", lambda self, patient=False: None)
    monkeypatch.setattr(GpuWorker, "call", lambda self, operation, array, into: None)
    folder = model_folder(name)
    case = Case(ModelConfig.from_hf(folder), precision, 200, 24, kept=kept)
    found = cost(scheme, case)
    budget = sum(found.memory.values())
    counters = serve(folder, case, scheme, budget)
    assert counters.memory_used == counters.memory_peak == budget - found.memory.get("unused", 0)
    with pytest.raises(ExhaustedError):
        serve(folder, case, scheme, budget - ALIGNMENT)


@pytest.mark.parametrize(("scheme", "precision", "more"), RUNS)
def test_a_real_run_counts_the_same(scheme: str, precision: str, more: tuple[str, ...]) -> None:
    """Two processes; 4 prompt rows and 6 answers. Envelopes are at most 64 bytes a frame."""
    kept = PROJECTIONS if more == TRUSTED else ()
    found = cost(scheme, Case(ModelConfig.from_hf(DEMO), precision, 1024, 24, "worker" in more, kept=kept))
    start, before, after = run(scheme, precision, "48MiB", found, more)
    exchanges = after.exchanges - before.exchanges
    assert exchanges == 6 * found.exchanges
    up = 6 * found.bytes_up + 3 * found.prompt_up
    down = 6 * found.bytes_down + 3 * found.prompt_down
    assert up <= after.wire_bytes_up - before.wire_bytes_up <= up + 64 * exchanges
    assert down <= after.wire_bytes_down - before.wire_bytes_down <= down + 64 * exchanges
    assert found.start_up <= start.wire_bytes_up <= found.start_up + 64 * start.exchanges
    assert after.pads_issued - before.pads_issued == (9 if found.pads else 0)
    assert after.memory_peak <= 48 << 20
    assert after.projections == ("" if scheme != "secure-infer" else "trusted" if kept else "gpu")


def test_a_real_run_in_the_smallest_budget_looks_its_embeddings_up() -> None:
    """Few rows a pass, and a lookup in each; the passes of a prompt but the last one have no head."""
    config = ModelConfig.from_hf(DEMO)
    found = cost("secure-infer", Case(config, "int8", 1024, 24))
    assert found.lookup is not None
    budget = sum(found.memory.values())
    _, before, after = run("secure-infer", "int8", str(budget), found, ())
    exchanges = after.exchanges - before.exchanges
    passes = -(-4 // plan(Demand(config, "secure-infer", "int8", stock=24), budget).rows)
    assert exchanges == (passes - 1) * found.exchanges + 6 * (found.exchanges + 1)
    up = 6 * found.bytes_up + 3 * found.prompt_up + 9 * found.lookup.bytes_up
    down = 6 * found.bytes_down + 3 * found.prompt_down + 9 * found.lookup.bytes_down
    assert up <= after.wire_bytes_up - before.wire_bytes_up <= up + 64 * exchanges
    assert down <= after.wire_bytes_down - before.wire_bytes_down <= down + 64 * exchanges
    assert (after.embedding, after.weights_resident) == ("lookup", False)
    assert budget - found.memory["unused"] == after.memory_used == after.memory_peak


def run(
    scheme: str, precision: str, budget: str, found: Cost, more: tuple[str, ...]
) -> tuple[Counters, Counters, Counters]:
    """Counters with a full bank, with a session open, and after its answer."""
    bank = 24 * (found.pads.sealed_bytes + found.lookup.sealed_bytes) if found.pads and found.lookup else 0
    setup = Settings(DEMO, scheme, precision, budget, str(bank), "cpu", more=more)
    with (
        Cluster(setup, lambda stage, seconds: None, sys.stderr) as cluster,
        connect(cluster.target, Policy()) as worker,
    ):
        start = wait_for_pads(worker)
        session = worker.open(Request(DEMO.name, scheme, precision, max_context=1024))
        before = worker.counters()
        assert len(list(session.turn([5, 6, 7, 8], Pacing(credit=6, max_new_tokens=6)))) == 6
        after = worker.counters()
        session.close()
    return start, before, after


def wait_for_pads(worker: TrustedWorker) -> Counters:
    """Counters once 4 prompt rows get pads as well: prompts take them from the upper half of the bank."""
    deadline = time.monotonic() + 60
    while (counters := worker.counters()).pads_capacity and counters.pads_in_stock < counters.pads_capacity // 2 + 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return counters
