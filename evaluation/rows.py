"""From repetitions to the rows of the table. Pure functions over numbers."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from client.counters import transport_quantile
from deploy.local.cluster import TRUSTED_WORKER
from evaluation.measure import ROLES, Load, Sample
from evaluation.refill import Refill
from evaluation.rounds import Found, Key, Taken

TRUSTED = ROLES[TRUSTED_WORKER]


@dataclass(frozen=True)
class Row:
    """One scheme at one precision over one plane, under one load. Medians over the repetitions.

    Spreads are from the least to the most. Times in seconds unless the name says otherwise, sizes in bytes. Per token
    means per decoded token, of any session. Speeds are online: pads are in stock. Sustained speeds have the making of
    one pad per token in them, on the same cores and one after the other.
    """

    scheme: str
    precision: str
    plane: str  # grpc, stream, or "-"
    context: int  # tokens of the prompt
    batch: int  # sessions
    ms_per_token: float  # from a session's token to its next one
    ms_per_token_spread: list[float]
    tokens_per_second: float  # of all sessions together
    of_plain: float | None  # the same relative to plain at equal precision
    tokens_per_second_sustained: float
    time_to_first_token: float
    first_token_of_plain: float | None  # the same relative to plain at equal precision
    exchanges_per_token: float
    bytes_per_token: float
    cpu_seconds_per_token: dict[str, float]  # by role
    cpu_seconds_per_token_sustained: dict[str, float]
    shares: dict[str, float] | None  # of the trusted worker's steps; None where they were not timed
    exchange_us: float | None  # mean, of what neither worker computed in; None where nothing was exchanged
    exchange_p50_us: float | None  # of the same
    exchange_p99_us: float | None
    bare_exchange_p50_us: float | None  # back to back, by a client that only asks; None where there is nobody to ask
    pad_seconds_per_token: float | None  # CPU time of the trusted worker, in idle time
    pad_wall_seconds_per_token: float | None
    products_inside: int  # in all decode phases together
    prompt_products_inside: int  # in all prompts together: of secure-infer those that lacked a pad
    memory_peak: int  # of the trusted worker's budget, since its start
    weights_resident: bool  # in that budget
    lookups: bool  # embeddings are masked lookups
    projections: str  # where qkv and o are multiplied, where there is a choice: gpu or trusted
    resident: dict[str, int] = field(default_factory=dict)  # by role


def rows(found: Found) -> list[Row]:
    """All rows. What a pad takes does not depend on the load, so it is that of all loads together."""
    pads: dict[Key, list[Refill]] = {key: [] for key, _ in found}
    for (key, _), taken in found.items():
        pads[key] += [sample.pad for sample in taken.samples if sample.pad]
    return _relative([row(key, load, taken, pads[key]) for (key, load), taken in found.items()])


def row(key: Key, load: Load, taken: Taken, pads: Sequence[Refill] = ()) -> Row:
    """The figures of one row, without those relative to plain. `pads`: some that were made for it."""
    samples, last = taken.samples, taken.samples[-1].after
    gaps = [1000 * statistics.median(sample.gaps) for sample in samples]
    rate = statistics.median(sum(1 / gap for gap in sample.gaps) for sample in samples)
    cpu, wall = (_median_of_some([getattr(pad, kind) for pad in pads]) for kind in ("cpu", "wall"))
    used = {role: _per_token(samples, partial(_cpu, role)) for role in samples[0].cpu}
    return Row(
        *key,
        load.context,
        load.batch,
        statistics.median(gaps),
        spread(gaps),
        rate,
        None,
        1 / (1 / rate + (wall or 0)),
        statistics.median(sample.first for sample in samples),
        None,
        _per_token(samples, lambda sample: sample.after.exchanges - sample.before.exchanges),
        _per_token(samples, _transferred),
        used,
        {role: seconds + (cpu or 0) * (role == TRUSTED) for role, seconds in used.items()},
        shares(samples),
        _exchange(samples),
        _exchange_quantile(samples, 0.5),
        _exchange_quantile(samples, 0.99),
        _bare(samples),
        cpu,
        wall,
        sum(sample.after.products_inside - sample.before.products_inside for sample in samples),
        sum(sample.prompts[1].products_inside - sample.prompts[0].products_inside for sample in samples),
        last.memory_peak,
        last.weights_resident,
        last.embedding == "lookup",
        last.projections,
        taken.resident,
    )


def spread(values: Sequence[float]) -> list[float]:
    """The least and the most."""
    return [min(values), max(values)]


def shares(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Who spent the time of the steps: the GPU worker's arithmetic, the exchange around it, the trusted worker."""
    step = _sum(samples, "step_seconds")
    exchange, worker = _sum(samples, "transport_seconds"), _sum(samples, "worker_seconds")
    if step <= 0:
        return None
    trusted = step - exchange - worker
    return {"worker": worker / step, "exchange": exchange / step, "trusted": trusted / step}


def _relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed relative to plain's at the same precision, under the same load, where that is known.

    Over the same plane; a row without one stands beside the fastest plain.
    """
    return [_beside(one, [plain for plain in rows if _is_baseline(plain, one)]) for one in rows]


def _is_baseline(plain: Row, one: Row) -> bool:
    same = (plain.precision, plain.context, plain.batch) == (one.precision, one.context, one.batch)
    return plain.scheme == "plain" and same and one.plane in (plain.plane, "-")


def _beside(one: Row, plains: Sequence[Row]) -> Row:
    if not plains:
        return one
    best = max(plains, key=lambda plain: plain.tokens_per_second)
    first = one.time_to_first_token / best.time_to_first_token
    return replace(one, of_plain=one.tokens_per_second / best.tokens_per_second, first_token_of_plain=first)


def _exchange(samples: Sequence[Sample]) -> float | None:
    """Microseconds, mean."""
    count = _sum(samples, "exchanges")
    return 1e6 * _sum(samples, "transport_seconds") / count if count else None


def _exchange_quantile(samples: Sequence[Sample], share: float) -> float | None:
    """Microseconds, of all repetitions together."""
    ends = [(one.before.transport_counts, one.after.transport_counts) for one in samples]
    took = transport_quantile([sum(more) for more in zip(*(_grown(*both) for both in ends), strict=True)], share)
    return None if took is None else 1e6 * took


def _bare(samples: Sequence[Sample]) -> float | None:
    """Microseconds, the median."""
    times = [seconds for sample in samples for seconds in sample.bare]
    return 1e6 * statistics.median(times) if times else None


def _grown(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [late - early for early, late in zip(before, after, strict=True)]


def _cpu(role: str, sample: Sample) -> float:
    return sample.cpu[role]


def _transferred(sample: Sample) -> int:
    before, after = sample.before, sample.after
    return after.wire_bytes_up + after.wire_bytes_down - before.wire_bytes_up - before.wire_bytes_down


def _per_token(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """Over all repetitions."""
    return sum(figure(sample) for sample in samples) / sum(sample.tokens for sample in samples)


def _sum(samples: Sequence[Sample], counter: str) -> float:
    return sum(float(getattr(one.after, counter) - getattr(one.before, counter)) for one in samples)


def _median_of_some(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
