"""What a soak found, and what is wrong with it. Pure functions: nothing here runs, waits or reads a clock."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from wire.errors import CleaveError, DeadlineError, UnavailableError

RECOVERY_SECONDS = 10.0  # an answer that begins so long after a fault must not fail any more
GROWTH_SHARE, GROWTH_BYTES = 0.05, 8 << 20  # resident memory may grow by so much; a trusted worker's by bytes only
LEAST_SAMPLES = 3
UNEXPLAINED = "no fault"
CLEAR = (UnavailableError, DeadlineError)  # what a client may be told when something broke underneath


@dataclass(frozen=True)
class Fault:
    """Something that was broken on purpose. `client`: whose; None: everybody's. Times on one monotonic clock."""

    kind: str
    start: float
    end: float
    client: int | None = None


@dataclass(frozen=True)
class Failure:
    """An answer that was not given to its end."""

    client: int
    start: float
    end: float
    error: Exception

    @property
    def clear(self) -> bool:
        """Whether the client was told what it should be told."""
        return isinstance(self.error, CLEAR)

    def __str__(self) -> str:
        told = str(self.error) if isinstance(self.error, CleaveError) else repr(self.error)
        return f"{type(self.error).__name__}: {told}"


@dataclass(frozen=True)
class Growth:
    """Resident bytes of one role: medians of the second and of the last fifth of the time, and the most."""

    early: int
    late: int
    most: int
    share: float = GROWTH_SHARE
    arena: int = 0  # by which secure memory grew meanwhile: its pages become resident at their first use

    @property
    def limit(self) -> int:
        """What `late` may be."""
        return int(self.early * (1 + self.share)) + GROWTH_BYTES + self.arena

    @property
    def flat(self) -> bool:
        """Whether it did not grow."""
        return self.late <= self.limit


@dataclass
class Findings:
    """All that is judged. Counters are those of the trusted worker at the end; memory is that of its budget."""

    completed: int = 0
    left: int = 0  # answers that a client walked away from
    wrong: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    growth: dict[str, Growth | None] = field(default_factory=dict)
    pads_reused: int = 0
    products_failed: int = 0
    products_verified: int = 0
    products_inside: int = 0
    sessions: int = 0
    memory_before: int = 0
    memory_after: int = 0
    silent_clients: list[int] = field(default_factory=list)  # without an answer after the last fault

    def failed(self) -> dict[str, int]:
        """Failures by what explains them."""
        return dict(Counter(explain(failure, self.faults) for failure in self.failures))

    def report(self) -> dict[str, Any]:
        """The figures, as they are printed."""
        return {
            "completed": self.completed,
            "left": self.left,
            "wrong": len(self.wrong),
            "failed": self.failed(),
            "faults": dict(Counter(fault.kind for fault in self.faults)),
            "rss": {role: growth and _figures(growth) for role, growth in self.growth.items()},
            "pads_reused": self.pads_reused,
            "products_verified": self.products_verified,
            "products_failed": self.products_failed,
            "products_inside": self.products_inside,
            "sessions_left": self.sessions,
            "memory_used": {"before": self.memory_before, "after": self.memory_after},
        }


def problems(found: Findings) -> list[str]:
    """Everything that is wrong, one line each; none when the soak was passed."""
    lines = [f"a wrong answer: {line}" for line in found.wrong]
    lines += _of_failures(found)
    for role, growth in found.growth.items():
        if growth is not None and not growth.flat:
            lines.append(
                f"the {role} grew from {growth.early} to {growth.late} resident bytes; {growth.limit} are fine"
            )
    if found.pads_reused:
        lines.append(f"pads_reused is {found.pads_reused}")
    if found.products_failed:
        lines.append(f"{found.products_failed} products of an honest GPU worker failed their check")
    if found.sessions or found.memory_after != found.memory_before:
        lines.append(
            f"{found.sessions} sessions were left, with {found.memory_after} bytes of secure memory in use; "
            f"it was {found.memory_before} before"
        )
    lines += [f"client {client} got no answer after the last fault" for client in found.silent_clients]
    return lines if found.completed else [*lines, "no answer was completed"]


def explain(failure: Failure, faults: Iterable[Fault]) -> str:
    """The kind of the last fault that can have caused a failure, or UNEXPLAINED."""
    causes = [fault for fault in faults if fault.client in (None, failure.client) and _overlap(failure, fault)]
    return max(causes, key=lambda fault: fault.start).kind if causes else UNEXPLAINED


def growth(samples: Sequence[tuple[float, int]], start: float, end: float) -> Growth | None:
    """From (time, resident bytes). None when there are too few samples to say."""
    fifth = (end - start) / 5
    early = [size for time, size in samples if start + fifth <= time < start + 2 * fifth]
    late = [size for time, size in samples if end - fifth <= time <= end]
    if min(len(early), len(late)) < LEAST_SAMPLES:
        return None
    most = max(size for _, size in samples)
    return Growth(int(statistics.median(early)), int(statistics.median(late)), most)


def beside(trusted: Growth, arena: Growth | None) -> Growth:
    """The trusted worker's growth, to be judged beside its secure memory: nothing else may grow with its size."""
    return replace(trusted, share=0.0, arena=arena.late - arena.early if arena else 0)


def _of_failures(found: Findings) -> list[str]:
    unclear = Counter(str(failure) for failure in found.failures if not failure.clear)
    lines = [f"{count} clients were told {text}" for text, count in unclear.items()]
    alone = Counter(str(one) for one in found.failures if explain(one, found.faults) == UNEXPLAINED)
    return lines + [f"{count} answers failed without a fault: {text}" for text, count in alone.items()]


def _overlap(failure: Failure, fault: Fault) -> bool:
    return fault.start <= failure.end and failure.start <= fault.end + RECOVERY_SECONDS


def _figures(growth: Growth) -> dict[str, Any]:
    return {name: getattr(growth, name) for name in ("early", "late", "most", "arena", "limit", "flat")}
