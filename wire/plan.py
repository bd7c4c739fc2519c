"""How a memory budget is divided, from the sizes of a model alone: what stays in the arena, and what is parked.

The trusted worker allocates what `plan` says, and `cleave budget` prints it: one rule, so the two cannot differ. It is
for the schemes whose decoder runs inside: tee-only, split, secure-infer.

First what is set aside for LoRA adapters. Then what cannot be parked: gains and biases, scales, the state of
verification, and the weights of linears that are kept in the trusted worker. Then, when they fit, all linears (half of
the rest at most) and the embedding table (a quarter). Of what remains, a part each for the scratch of a step and for
making pads; and all the rest is pages of KV caches. A budget that holds one row of a step, one pad in the making and
one page for every layer of one session is enough: everything else is speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from wire.errors import ExhaustedError
from wire.layout import ALIGNMENT, WORD, Demand, Layout, blocks
from wire.linears import Linear, all_specs
from wire.parameters import Kind, parameters
from wire.scratch import CHECK_LIMBS, SUM_BLOCK, SUM_LIMBS, refill_bytes, step_bytes

MAX_ROWS, FEW_ROWS = 64, 8  # of one step
HEAD_ROWS = 16  # sequences of one step whose logits are wanted
REFILL_ROWS = 256  # pads made at once

Parts = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """A budget, divided."""

    layout: Layout
    rows: int  # of one step
    head_rows: int  # of these, whose logits are computed together
    scratch: int  # bytes
    refill_rows: int  # 0: no pads are made
    refill: int
    slots: int  # pages of KV caches
    parts: Parts  # bytes by owner


def plan(demand: Demand, budget: int) -> Plan:
    """The first division that holds a session. Raises ExhaustedError when none does."""
    for layout, least in _layouts(demand):
        fixed = _fixed(demand, layout)
        for rows in _halves(MAX_ROWS if budget >= least else 0):
            for made in _halves(min(REFILL_ROWS, max(demand.stock, 1))) if demand.masks else (0,):
                found = _divided(demand, layout, fixed, rows, made, budget)
                if found is not None:
                    return found
    how = f"{demand.scheme} with --projections trusted" if demand.kept else demand.scheme
    raise ExhaustedError(
        f"a memory budget of {budget} bytes does not hold this model under {how}: "
        f"--memory-budget {smallest(demand)} would do"
    )


def smallest(demand: Demand) -> int:
    """Bytes of the smallest budget that `plan` accepts."""
    return min(max(least, _least(demand, layout)) for layout, least in _layouts(demand))


def _least(demand: Demand, layout: Layout) -> int:
    """Bytes of one row of a step, one pad in the making, one session."""
    step, pad = blocks([step_bytes(demand, layout, 1, 1)]), _refill(demand, layout, 1)
    return sum(_fixed(demand, layout).values()) + step + pad + blocks([demand.config.layers * demand.page])


def _layouts(demand: Demand) -> Iterator[tuple[Layout, int]]:
    """From the fastest to the smallest, each with the least budget that it is for."""
    config, inside = demand.config, demand.inside
    untied = all_specs(config, (Linear.LM_HEAD,) if config.tied else ())  # not the embedding table
    linears = demand.width * sum(spec.k * spec.n for spec in untied)
    table = demand.width * config.vocabulary * config.hidden
    for keep_table, keep_linears in ((True, True), (True, False), (False, False)):
        place = ("resident" if keep_linears else "parked") if inside else ("scales" if demand.int8 else "absent")
        embed = "client" if demand.client_embeds else "resident" if keep_table else "scan" if inside else "read"
        head = config.tied and place != "absent"
        if embed == "resident" or (head and inside and keep_table):
            where = "resident"
        elif embed == "scan" or (head and inside):
            where = "parked"
        else:
            where = "scales" if head else "absent"
        least = max(4 * table if where == "resident" else 0, 2 * linears if place == "resident" else 0)
        yield Layout(embed, where, place, demand.kept), least + _set_aside(demand)


def _divided(demand: Demand, layout: Layout, fixed: Parts, rows: int, made: int, budget: int) -> Plan | None:
    """This division, if a session fits, and if nothing is larger than its share unless it is small enough.

    A step of a few rows is: where weights are parked, each step reads all of them.
    """
    left = budget - sum(fixed.values())
    head, alone = min(rows, HEAD_ROWS), step_bytes(demand, layout, rows, 1)
    while head > 1 and step_bytes(demand, layout, rows, head) > alone:
        head //= 2  # logits are computed in groups, so that the vocabulary does not decide how large a step is
    scratch, refill = blocks([step_bytes(demand, layout, rows, head)]), _refill(demand, layout, made)
    slots = (left - scratch - refill) // ALIGNMENT * ALIGNMENT // demand.page
    share = left * 3 // 8
    if slots < demand.config.layers or (scratch > share and rows > FEW_ROWS) or (refill > share and made > 1):
        return None
    parts = fixed | {"scratch": scratch, "refill": refill, "kv cache": blocks([slots * demand.page])}
    return Plan(layout, rows, head, scratch, made, refill, slots, parts)


def _set_aside(demand: Demand) -> int:
    return blocks([demand.adapters]) if demand.adapters else 0


def _halves(most: int) -> Iterator[int]:
    while most:
        yield most
        most //= 2


def _refill(demand: Demand, layout: Layout, made: int) -> int:
    return blocks([refill_bytes(demand, layout, made)]) if demand.masks else 0


def _fixed(demand: Demand, layout: Layout) -> Parts:
    config, kept, padded = demand.config, parameters(demand.config), demand.padded(layout)
    places = layout.places(config)
    resident = {
        name: demand.width * kept[name].rows * kept[name].width for name in places if places[name] == "resident"
    }
    checks = [2 * CHECK_LIMBS * spec.k for spec in padded]
    checks += [SUM_LIMBS * min(SUM_BLOCK, max(spec.n for spec in padded))] if padded else []
    return {
        "adapters": _set_aside(demand),
        "embedding": blocks(size for name, size in resident.items() if name.kind is Kind.EMBEDDING),
        "positions": blocks(WORD * one.rows * one.width for one in kept.values() if one.name.kind is Kind.POSITIONS),
        "norms and biases": blocks(WORD * one.rows for one in kept.values() if one.width == 1),
        "scales": blocks(WORD * kept[name].rows for name in places) if demand.int8 else 0,
        "weights": blocks(size for name, size in resident.items() if name.kind is not Kind.EMBEDDING),
        "verification": blocks(checks),
    }
