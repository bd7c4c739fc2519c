"""How much memory a row takes: the budget of its trusted worker, its bank of pads, and both of its processes."""

from dataclasses import dataclass
from pathlib import Path

from evaluation.measure import Load
from wire.costs import Case, cost
from wire.model_config import ModelConfig
from wire.parameters import parameters

LEAST_BYTES = 64 << 20
GPU_WORKER_BYTES, TRUSTED_WORKER_BYTES = 450 << 20, 120 << 20  # resident before there is a model
SPARE = 1.7  # scratch for steps and for pads grows with a budget: up to three eighths of it
FILL = 0.8  # share of the available memory that may be taken
_KEEPS_WEIGHTS = ("secure-infer", "tee-only")


@dataclass(frozen=True)
class Sizes:
    """Bytes: what the trusted worker is told, and what both processes take in all."""

    memory_budget: int
    pad_bank: int
    resident: int


def sizes(config: ModelConfig, scheme: str, precision: str, load: Load, available: int) -> Sizes:
    """A budget that keeps the weights in memory where `available` allows, and pads for a whole decode phase.

    Raises ContextError for a context that the model lacks.
    """
    case = Case(config, precision, load.capacity, stock=_stock(load))
    found = cost(scheme, case)
    session = found.memory.get("kv cache", found.memory.get("permutations", 0))
    needed = sum(found.memory.values()) - found.memory.get("weights", 0) + (load.batch - 1) * session
    weights = case.width * sum(spec.k * spec.n for spec in case.specs) if scheme in _KEEPS_WEIGHTS else 0
    budget = max(LEAST_BYTES, int(SPARE * (needed + weights)), 2 * weights)
    if budget > available // 2:
        budget = max(LEAST_BYTES, int(SPARE * needed))
    bank = case.stock * found.pads.sealed_bytes if found.pads else LEAST_BYTES
    model = sum(one.rows * one.width for one in parameters(config).values()) * case.width
    outside = 0 if scheme == "tee-only" else GPU_WORKER_BYTES + model
    return Sizes(budget, bank, TRUSTED_WORKER_BYTES + budget + outside)


def _stock(load: Load) -> int:
    """Pads for a whole decode phase, whatever the prompts took before.

    A bank is refilled when half of it is gone, and prompts are given pads of its upper half only. The first step of a
    session's decode phase has two rows, which count as prompts; others may be a step ahead by then.
    """
    firsts = 4 * load.batch
    half = load.decoded + firsts
    if half - firsts < load.batch * load.context < half:  # these prompts would leave a little more than half
        half += firsts
    return 2 * half


def available_bytes() -> int:
    """Memory that new processes may take without any other being pushed out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
