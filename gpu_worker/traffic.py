"""Streams and calls as they come and go: how many there may be, what was counted, and when the worker is quiet.

Only the asyncio thread comes here.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from wire.errors import ExhaustedError, UnavailableError
from wire.metrics import Histogram, Metric

MAX_STREAMS = 64  # and Loads, of all peers together
QUIET_SECONDS = 0.5  # a peer between two calls of one step is not done
POLL_SECONDS = 0.05


class Traffic:
    """Counters of this process, and its last word about what may begin."""

    def __init__(self) -> None:
        self.streams = self.busy = 0
        self.calls = self.refused = self.received = self.sent = 0
        self.compute = Histogram()
        self.draining = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        """While a stream or a Load is open. Raises UnavailableError when draining, ExhaustedError for too many."""
        if self.draining:
            raise UnavailableError("draining: this worker ends soon")
        if self.streams == MAX_STREAMS:
            raise ExhaustedError(f"{MAX_STREAMS} streams are open, which is all that would fit")
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    @contextmanager
    def call(self) -> Iterator[None]:
        """While a call is in flight: from its first frame until its answer is handed over."""
        self.calls += 1
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def quiet(self) -> None:
        """Returns when no stream is left, or when no call was in flight for QUIET_SECONDS."""
        clock = asyncio.get_running_loop().time
        calls, since = self.calls, clock()
        while self.busy or (self.streams and clock() - since < QUIET_SECONDS):
            await asyncio.sleep(POLL_SECONDS)
            if self.busy or self.calls != calls:
                calls, since = self.calls, clock()

    def metrics(self) -> list[Metric]:
        """What an operator may watch. Nothing about one prompt."""
        return [
            ("cleave_gpu_calls_total", "Calls and Loads that began.", self.calls),
            ("cleave_gpu_calls_refused_total", "Calls and streams that were refused.", self.refused),
            ("cleave_gpu_streams", "Streams and Loads that are open.", self.streams),
            ("cleave_gpu_bytes_received_total", "Bytes of tensors that came.", self.received),
            ("cleave_gpu_bytes_sent_total", "Bytes of tensors that were sent.", self.sent),
            ("cleave_gpu_compute_seconds", "One call in the compute thread.", self.compute),
        ]
