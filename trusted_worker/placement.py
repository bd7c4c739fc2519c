"""Where secure-infer multiplies the projections of attention (qkv and o): here, or on the GPU worker under pads.

Here they cost arithmetic, there two exchanges a layer. Which is less depends on the link, on what leaving the TEE costs
and on both machines. So `auto` measures it, once, before the budget is divided, on one row: exchanges of the right
sizes, beside products of the right sizes here. Masks and checks of what goes out are not counted, nor is the making of
its pads in idle time.

What the GPU worker sees meanwhile: words from the operating system's CSPRNG, as uniform as masked ones, and as many of
each layer. Nothing is hidden in them, so they are no pads, and its answers are thrown away unread. What it learns: that
a worker is starting, and later, from the calls that come or do not, what was decided. What it can do: answer slowly or
quickly, and so move the decision. Both ways are the same protection; it is speed and memory that it moves.
"""

import logging
import secrets
import time
from dataclasses import dataclass, replace

import numpy as np

from trusted_worker.arithmetic import F64, I8, I32, exact_product
from trusted_worker.offload import GpuWorker
from trusted_worker.schemes.base import Worker, ring_matmul
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.layout import Demand
from wire.linears import PROJECTIONS, Linear, LinearSpec, all_specs
from wire.plan import smallest
from wire.scratch import SLACK, exact_bytes

PASSES = 4  # over all layers; the first one warms up, and others meet a machine that is busy starting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """What was decided, and from what."""

    where: str = ""  # trusted or gpu; empty: the scheme has no choice
    outside: float = 0.0  # seconds of the projections of one row and one layer; 0: not measured
    inside: float = 0.0

    @property
    def kept(self) -> tuple[Linear, ...]:
        """The linears that never go out."""
        return PROJECTIONS if self.where == "trusted" else ()


def decide(asked: str, demand: Demand, memory: SecureMemory, worker: GpuWorker) -> Placement:
    """`asked`: trusted, gpu or auto. `demand` keeps nothing; `memory` is empty, and is empty again afterwards.

    auto is trusted where that is faster, and where the weights take half of the budget at most. Raises what an exchange
    raises.
    """
    if asked != "auto" or not demand.masks:
        return Placement(asked if demand.masks else "")
    specs = [spec for spec in all_specs(demand.config) if spec.linear in PROJECTIONS]
    least = max(smallest(replace(demand, kept=PROJECTIONS)), 2 * sum(spec.k * spec.n for spec in specs))
    if memory.budget < least:
        log.info("projections: gpu; the budget holds too little beside their weights")
        return Placement("gpu")
    worker.connect(patient=True)
    outside, inside = measure(specs, memory, worker)
    found = Placement("trusted" if inside < outside else "gpu", outside, inside)
    log.info("projections: %s; a layer takes %d us outside, %d us inside", found.where, 1e6 * outside, 1e6 * inside)
    return found


def measure(specs: list[LinearSpec], memory: SecureMemory, worker: Worker) -> tuple[float, float]:
    """Seconds of one row and one layer by way of the worker, and here: of each layer the best pass, of all the median.

    `specs`: the projections of all layers. `memory` holds weights in the meantime. Raises what an exchange raises.
    """
    scratch = Scratch(memory, max(exact_bytes(1, spec.n, spec.k) for spec in specs) + SLACK)
    blocks = {spec: memory.allocate("placement", (spec.n, spec.k), np.int8) for spec in specs}
    for block in blocks.values():
        block.array[...] = 1  # one weight is as good as another, once its page is there
    spent: F64 = np.zeros((PASSES, 2, len(specs) // len(PROJECTIONS)))
    try:
        for one in spent:
            for spec in specs:
                one[:, spec.layer] += _seconds(spec, blocks[spec].array, scratch, worker)
    finally:
        for block in blocks.values():
            block.free()
        scratch.free()
    outside, inside = np.median(spent.min(axis=0), axis=1)
    return float(outside), float(inside)


def _seconds(spec: LinearSpec, weights: I8, scratch: Scratch, worker: Worker) -> tuple[float, float]:
    """Of one row of one linear: an exchange, and the product here."""
    z: I32 = np.frombuffer(secrets.token_bytes(4 * spec.k), "<i4")[None]
    y: I32 = np.empty((1, spec.n), np.int32)
    start = time.perf_counter()
    worker.call(ring_matmul(spec), z, y)
    between = time.perf_counter()
    exact_product(z.astype(np.float64), [(0, weights)], y, scratch)
    return between - start, time.perf_counter() - between
