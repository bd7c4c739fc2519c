"""What a trusted worker counts, as it came with Stats."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Self

from wire.metrics import TRANSPORTS
from wire.v1 import trusted_worker_pb2 as pb


@dataclass(frozen=True)
class Counters:
    """What Stats says, but for scheme and precision. Counts are since the start, and of all sessions."""

    exchanges: int
    wire_bytes_up: int
    wire_bytes_down: int
    pads_issued: int
    pads_reused: int
    pads_in_stock: int
    pads_capacity: int
    products_verified: int
    products_failed: int
    products_inside: int
    pages_sealed: int
    pages_restored: int
    permutations_renewed: int
    memory_budget: int
    memory_used: int
    memory_peak: int
    memory_locked: bool
    rss: int
    sessions: int
    tokens: int
    step_seconds: float
    exchange_seconds: float
    worker_seconds: float
    tee_profile: str
    memory_wiped_on_fork: bool
    memory_not_dumped: bool
    process_limit: str
    process_limit_bytes: int
    switch_us: int
    embedding: str
    weights_resident: bool
    tiles_unchecked: bool
    tiles_read: int
    table_scans: int
    kv_pages_capacity: int
    kv_pages_used: int
    spill_bytes: int
    adapters: int
    adapter_bytes: int
    adapter_capacity: int
    projections: str
    projections_outside_seconds: float
    projections_inside_seconds: float
    transport_seconds: float
    transport_counts: tuple[int, ...]

    @classmethod
    def of(cls, message: pb.StatsResponse) -> Self:
        """The message's fields by their names."""
        values = {field.name: getattr(message, field.name) for field in fields(cls)}
        return cls(**values | {"transport_counts": tuple(message.transport_counts)})


def transport_quantile(counts: Sequence[int], share: float) -> float | None:
    """Seconds that this share of the exchanges took at most, from `transport_counts` or a difference of two of them.

    Between the bounds of a bucket its exchanges count as evenly spread; the last bound stands for all beyond it. None
    without exchanges, and for buckets that are not ours.
    """
    if len(counts) != len(TRANSPORTS) + 1 or not sum(counts):
        return None
    wanted, bounds = share * sum(counts), (0.0, *TRANSPORTS, TRANSPORTS[-1])
    for (low, high), count, total in zip(pairwise(bounds), counts, accumulate(counts), strict=True):
        if count and total >= wanted:
            return high - (high - low) * (total - wanted) / count
    return TRANSPORTS[-1]
