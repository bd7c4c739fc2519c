"""When a bank of pads is full, and what making a pad takes, as it looks from outside: stock and CPU time over time.

Pads come into stock a batch at a time. A trusted worker at rest uses almost no CPU time; one that makes pads uses all
it can. So the last batch counts from when the idle time began until its pads were there, and nothing after that.
"""

from dataclasses import dataclass

QUIET_SECONDS = 0.5  # a trusted worker that rests for so long makes no more pads
IDLE_SHARE = 0.1  # of a core: one that uses less rests


@dataclass(frozen=True)
class Refill:
    """Seconds for one pad, of those that were made in one go."""

    cpu: float  # of the trusted worker
    wall: float


@dataclass(frozen=True)
class Glimpse:
    """The bank and its trusted worker at a time. `cpu`: seconds since its start."""

    now: float
    stock: int
    cpu: float


class Watch:
    """What was seen of a bank, from the first glimpse on."""

    def __init__(self, first: Glimpse, capacity: int) -> None:
        self._first = self._grown = self._busy = self._last = first
        self._capacity = capacity

    def see(self, one: Glimpse) -> None:
        """One more glimpse."""
        if one.stock > self._last.stock:
            self._grown = self._busy = one
        elif one.cpu - self._busy.cpu > IDLE_SHARE * QUIET_SECONDS:
            self._busy = one
        self._last = one

    @property
    def resting(self) -> bool:
        """Whether no more pads are made: more than half of them are there, and the trusted worker rests."""
        quiet = self._last.now - self._busy.now >= QUIET_SECONDS
        return quiet and 2 * self._last.stock > self._capacity

    @property
    def refill(self) -> Refill | None:
        """What one pad took; None where none was made."""
        made = self._grown.stock - self._first.stock
        if made <= 0:
            return None
        return Refill((self._grown.cpu - self._first.cpu) / made, (self._grown.now - self._first.now) / made)
