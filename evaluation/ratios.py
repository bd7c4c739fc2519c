"""One row over another, paired: repetition by repetition, so that a drift of the machine cancels out."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.measure import Load, Sample
from evaluation.rounds import Found, Key
from evaluation.rows import spread

PAIRS = (  # scheme and precision, over scheme and precision
    (("secure-infer", "int8"), ("plain", "int8")),
    (("secure-infer", "int8"), ("split", "int8")),
    (("secure-infer", "int8"), ("tee-only", "int8")),
    (("secure-infer", "int8"), ("transformers", "bfloat16")),
    (("kv-shield", "float32"), ("plain", "float32")),
    (("plain", "int8"), ("transformers", "int8")),
    (("plain", "float32"), ("transformers", "float32")),
    (("tee-only", "int8"), ("plain", "int8")),
)


@dataclass(frozen=True)
class Ratio:
    """`row` over `baseline`. Medians over the repetitions, the spread from the least to the most."""

    row: str
    baseline: str
    context: int
    batch: int
    speed: float  # tokens/s, online
    speed_spread: list[float]
    first_token: float  # time


def ratios(found: Found) -> list[Ratio]:
    """Of every pair that was measured under the same load, over the same plane where both have one."""
    return [
        _ratio(row, baseline, load, found[row, load].samples, found[baseline, load].samples)
        for load in dict.fromkeys(load for _, load in found)
        for pair in PAIRS
        for row in _keys(found, pair[0])
        for baseline in _keys(found, pair[1])
        if row.plane == baseline.plane or "-" in (row.plane, baseline.plane)
    ]


def as_dicts(found: Sequence[Ratio]) -> list[dict[str, Any]]:
    """The ratios for JSON."""
    return [asdict(one) for one in found]


def _keys(found: Found, row: tuple[str, str]) -> list[Key]:
    return [key for key in dict.fromkeys(key for key, _ in found) if (key.scheme, key.precision) == row]


def _ratio(row: Key, baseline: Key, load: Load, ours: Sequence[Sample], theirs: Sequence[Sample]) -> Ratio:
    pairs = list(zip(ours, theirs, strict=True))
    speeds = [_rate(one) / _rate(other) for one, other in pairs]
    first = statistics.median(one.first / other.first for one, other in pairs)
    return Ratio(row.name, baseline.name, load.context, load.batch, statistics.median(speeds), spread(speeds), first)


def _rate(sample: Sample) -> float:
    return sum(1 / gap for gap in sample.gaps)
