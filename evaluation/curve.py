"""`cleave-bench --budget-curve`: speed and longest context of a scheme, by the memory budget of its trusted worker.

A point is one scheme in one budget, on a cluster of its own. A trusted worker that reads tiles of weights from disk is
measured beside a second one that does not compare their digests, in turns: the difference is what checking costs. A
budget that a scheme does not run in is a point, too.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from client.counters import Counters
from client.terminal import one_line
from evaluation.measure import Load, Sample
from evaluation.rows import spread
from wire.errors import CleaveError
from wire.kv_pages import PAGE_TOKENS
from wire.profiles import PROFILES


class Meter(Protocol):
    """What runs a point: measure.Rig."""

    def repeat(self, load: Load) -> Sample:
        """One repetition."""
        ...

    def admitted(self) -> int:
        """The longest context that a session can be opened with."""
        ...


Start = Callable[[bool], AbstractContextManager[Meter]]  # whether digests of tiles are compared


@dataclass(frozen=True)
class Trial:
    """What every point is asked: `load` for `repeat` times, and `long` once, behind a longer prompt."""

    load: Load
    repeat: int
    long: Load | None = None


@dataclass(frozen=True)
class Place:
    """A point that is to be measured. `least`: the smallest budget that this scheme runs in, as far as we know."""

    scheme: str
    precision: str
    budget: int
    least: int


@dataclass(frozen=True)
class Speed:
    """One load on one trusted worker. Medians over repetitions; per token: means, of any session. Times in seconds."""

    digests: str  # of tiles: on, off; none where no tile was ever read
    context: int  # tokens of the prompt
    repeat: int
    tokens_per_second: float  # decoding, of all sessions together
    tokens_per_second_spread: list[float]
    time_to_first_token: float
    tiles_per_token: float
    tiles_per_prompt: float  # per repetition: the prompts of a batch share steps
    scans_per_token: float  # of the whole embedding table
    scans_per_prompt: float
    pages_restored_per_token: float  # of KV caches, from outside the budget
    pads_in_stock: int  # when decoding began, at least
    seconds_per_pad: float | None  # CPU time of the trusted worker, in idle time; None where none was made
    products_inside: int  # while decoding: under tee-only all of them, under secure-infer those that lacked a pad


@dataclass(frozen=True)
class Point:
    """One scheme in one budget. `error`: why there are no figures. Sizes in bytes, contexts in tokens."""

    scheme: str
    precision: str
    budget: int
    profiles: list[str]  # TEEs of exactly this size
    least: int
    error: str | None = None
    weights: str = ""  # resident, streamed, or absent: under split the GPU worker alone has them
    embedding: str = ""  # see StatsResponse
    context_inside: int = 0  # that one session's KV cache could hold without leaving the budget
    context_admitted: int = 0
    memory_peak: int = 0
    spilled: int = 0  # outside the budget at the end: pads, pages, tiles
    speeds: tuple[Speed, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it has no figures, although the budget is large enough."""
        return self.error is not None and self.budget >= self.least


def measure_point(place: Place, layers: int, start: Start, trial: Trial) -> Point:
    """The point. An error of the workers is part of it; after one, nothing more is tried."""
    names = [name for name, profile in PROFILES.items() if profile.bytes == place.budget]
    point = Point(place.scheme, place.precision, place.budget, names, place.least)
    try:
        return _measured(point, layers, start, trial)
    except CleaveError as error:
        return replace(point, error=one_line(str(error)))


def speed(context: int, samples: Sequence[Sample]) -> Speed:
    """The figures of some repetitions."""
    rates = [sum(1 / gap for gap in sample.gaps) for sample in samples]
    pads = [sample.pad.cpu for sample in samples if sample.pad is not None]
    return Speed(
        _digests(samples[-1].after),
        context,
        len(samples),
        statistics.median(rates),
        spread(rates),
        statistics.median(sample.first for sample in samples),
        _per_token(samples, "tiles_read"),
        _per_prompt(samples, "tiles_read"),
        _per_token(samples, "table_scans"),
        _per_prompt(samples, "table_scans"),
        _per_token(samples, "pages_restored"),
        min(sample.before.pads_in_stock for sample in samples),
        statistics.median(pads) if pads else None,
        sum(sample.after.products_inside - sample.before.products_inside for sample in samples),
    )


def as_dicts(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points for JSON."""
    return [asdict(point) | {"failed": point.failed} for point in points]


def _measured(point: Point, layers: int, start: Start, trial: Trial) -> Point:
    with ExitStack() as stack:
        meters = [stack.enter_context(start(True))]
        samples = [[meters[0].repeat(trial.load)]]
        if samples[0][0].after.tiles_read:
            meters.append(stack.enter_context(start(False)))
            samples.append([meters[1].repeat(trial.load)])
        for _ in range(trial.repeat - 1):
            for meter, taken in zip(meters, samples, strict=True):
                taken.append(meter.repeat(trial.load))
        speeds = [speed(trial.load.context, taken) for taken in samples]
        if trial.long is not None:
            speeds += [speed(trial.long.context, [meter.repeat(trial.long)]) for meter in meters]
        admitted, seen = meters[0].admitted(), samples[0][-1].after
    return replace(
        point,
        weights="absent" if point.scheme == "split" else "resident" if seen.weights_resident else "streamed",
        embedding=seen.embedding,
        context_inside=seen.kv_pages_capacity // layers * PAGE_TOKENS,
        context_admitted=admitted,
        memory_peak=seen.memory_peak,
        spilled=seen.spill_bytes,
        speeds=tuple(speeds),
    )


def _digests(seen: Counters) -> str:
    if not seen.tiles_read:
        return "none"
    return "off" if seen.tiles_unchecked else "on"


def _per_token(samples: Sequence[Sample], counter: str) -> float:
    counts = sum(getattr(sample.after, counter) - getattr(sample.before, counter) for sample in samples)
    return float(counts / sum(sample.tokens for sample in samples))


def _per_prompt(samples: Sequence[Sample], counter: str) -> float:
    counts = sum(getattr(sample.prompts[1], counter) - getattr(sample.prompts[0], counter) for sample in samples)
    return float(counts / len(samples))
