"""What a trusted worker counts, as it came with Stats."""

from dataclasses import dataclass, fields
from typing import Self

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

    @classmethod
    def of(cls, message: pb.StatsResponse) -> Self:
        """The message's fields by their names."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})
