"""How much memory a row takes: the budget of its trusted worker, its bank of pads, and both of its processes.

A budget is the smallest in which the scheme is at its best: its weights and its embedding table stay in memory, steps
and refills are as large as they get, and all sessions have their KV caches inside. Where that is too much for this
machine, weights are read from disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.costs import Case, cost
from evaluation.flags import INSIDE
from evaluation.measure import Load
from wire.errors import ExhaustedError
from wire.kv_pages import PAGE_TOKENS
from wire.layout import WORD, Demand
from wire.model_config import ModelConfig
from wire.parameters import parameters
from wire.plan import MAX_ROWS, REFILL_ROWS, Plan, plan, smallest
from wire.profiles import PROFILES

LEAST_BYTES = 64 << 20
GPU_WORKER_BYTES, TRUSTED_WORKER_BYTES = 450 << 20, 120 << 20  # resident before there is a model
SPARE = 1.7  # for steps of more than one row, where the decoder is outside
FIRSTS = 4  # rows of a session that may count as prompts although its prompt is over
LIBRARY_WIDTHS = {"float32": 6, "bfloat16": 4, "int8": 5}  # bytes of a weight, those on their way included
FILL = 0.8  # share of the available memory that may be taken
FINENESS = 8  # budgets that are tried between one size and its double

Row = tuple[str, str]  # scheme, precision


@dataclass(frozen=True)
class Sizes:
    """Bytes: what the trusted worker is told, and what both processes take in all."""

    memory_budget: int
    pad_bank: int
    resident: int


def sizes(
    config: ModelConfig, scheme: str, precision: str, loads: Sequence[Load], available: int, prompts: bool = False
) -> Sizes:
    """The best budget that takes no more than half of `available` bytes, and pads for a whole decode phase.

    `prompts`: and for all prompts. Loads come one at a time. Raises ContextError for a context that the model lacks.
    """
    capacity, batch = (max(getattr(load, name) for load in loads) for name in ("capacity", "batch"))
    found = cost(scheme, Case(config, precision, capacity))
    if scheme in INSIDE:
        demand = Demand(config, scheme, precision, stock=_stock(loads, prompts))
        pages = max(load.batch * config.layers * -(-load.capacity // PAGE_TOKENS) for load in loads)
        budget = _inside(demand, pages, available // 2)
    else:
        sessions = (batch - 1) * found.memory.get("permutations", 0)
        budget = max(LEAST_BYTES, int(SPARE * (sum(found.memory.values()) + sessions)))
    width = 1 if precision == "int8" else WORD
    model = width * sum(one.rows * one.width for one in parameters(config).values())
    outside = 0 if scheme == "tee-only" else GPU_WORKER_BYTES + model
    bank = pad_bank(config, scheme, precision, loads, prompts)
    return Sizes(budget, bank, TRUSTED_WORKER_BYTES + budget + outside)


def library_bytes(config: ModelConfig, precision: str) -> int:
    """Resident bytes of a process of `transformers` with this model, while it loads."""
    words = sum(one.rows * one.width for one in parameters(config).values())
    return GPU_WORKER_BYTES + LIBRARY_WIDTHS[precision] * words


def pad_bank(config: ModelConfig, scheme: str, precision: str, loads: Sequence[Load], prompts: bool = False) -> int:
    """Bytes of a bank with the pads of a whole decode phase, and of all `prompts`, masked lookups included."""
    found = cost(scheme, Case(config, precision, 1))
    sealed = sum(part.sealed_bytes for part in (found.pads, found.lookup) if part)
    return _stock(loads, prompts) * sealed or LEAST_BYTES


def least(config: ModelConfig, scheme: str, precision: str, load: Load) -> int:
    """Bytes of the smallest budget that the scheme runs in. Raises ContextError for a context that the model lacks."""
    return sum(cost(scheme, Case(config, precision, load.capacity)).memory.values())


def curve_budgets(config: ModelConfig, rows: Sequence[Row], load: Load, most: int) -> list[int]:
    """The profiles' sizes, and doubles until all rows keep all of their weights, or until `most` bytes."""
    demands = [Demand(config, *row, stock=_stock([load])) for row in rows]
    found = sorted({profile.bytes for profile in PROFILES.values() if profile.bytes})
    following = 1 << found[-1].bit_length()
    while following <= most and not all(_keeps_all(division(demand, found[-1])) for demand in demands):
        found.append(following)
        following *= 2
    return found


def division(demand: Demand, budget: int) -> Plan | None:
    """How the trusted worker would divide a budget; None when it would refuse it."""
    try:
        return plan(demand, budget)
    except ExhaustedError:
        return None


def _inside(demand: Demand, pages: int, most: int) -> int:
    """The first budget with so many pages and all weights inside; else with whole steps; else one that runs."""
    whole, least = 0, max(LEAST_BYTES, smallest(demand))
    for size in _growing(least, most):
        found = division(demand, size)
        if found is not None and found.slots >= pages and _whole_steps(demand, found):
            whole = whole or size
            if _keeps_all(found):
                return size
    return whole or least


def _growing(size: int, most: int) -> Iterator[int]:
    while size <= most:
        yield size
        size = int(size * 2 ** (1 / FINENESS)) >> 20 << 20


def _keeps_all(found: Plan | None) -> bool:
    return found is not None and found.layout.embed == "resident" and found.layout.linears != "parked"


def _whole_steps(demand: Demand, found: Plan) -> bool:
    refill = min(REFILL_ROWS, demand.stock) if demand.masks else 0
    return (found.rows, found.refill_rows) == (MAX_ROWS, refill)


def _stock(loads: Sequence[Load], prompts: bool = False) -> int:
    """Pads for a whole decode phase, whatever the prompts took before; `prompts`: and for every row of theirs.

    A bank is refilled when half of it is gone, or half of a refill if that is less. If prompts are not given pads as
    long as there are any, they get those of its upper half only. The first step of a session's decode phase has two
    rows, which count as prompts; others may be a step ahead by then.
    """
    if prompts:
        needed = max(load.batch * load.context + load.decoded + FIRSTS * load.batch for load in loads)
        return min(2 * needed, needed + REFILL_ROWS // 2)
    firsts = FIRSTS * max(load.batch for load in loads)
    half = max(load.decoded for load in loads) + firsts
    while any(half - firsts < load.batch * load.context < half for load in loads):
        half += firsts  # these prompts would leave a little more than half
    return 2 * half


def available_bytes() -> int:
    """Memory that new processes may take without any other being pushed out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
