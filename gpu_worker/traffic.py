"""Streams and calls as they come and go: how many there may be, what was counted, and when the worker is quiet.

Streams are opened and closed in the asyncio thread, on both planes.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from wire.errors import ExhaustedError, UnavailableError
from wire.metrics import Histogram, Metric

MAX_STREAMS = 64  # and Loads, of all peers together
QUIET_SECONDS = 0.5  # a peer between two calls of one step is not done
POLL_SECONDS = 0.05


class Counts:
    """What crossed on one plane. Written by the thread that serves it, read by any.

    `with counts:` while a call is in flight: from its first frame until its answer is handed over.
    """

    def __init__(self) -> None:
        self.calls = self.busy = self.refused = self.received = self.sent = 0

    def __enter__(self) -> None:
        self.calls += 1
        self.busy += 1

    def __exit__(self, *_: object) -> None:
        self.busy -= 1


class Traffic:
    """Counters of this process, and its last word about what may begin."""

    def __init__(self) -> None:
        self.streams = 0  # on both planes
        self.grpc, self.sockets = Counts(), Counts()  # of the asyncio thread, of the compute thread
        self.compute = Histogram()  # of the compute thread
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

    @property
    def calls(self) -> int:
        """Calls and Loads that began."""
        return self.grpc.calls + self.sockets.calls

    @property
    def busy(self) -> int:
        """Calls and Loads in flight."""
        return self.grpc.busy + self.sockets.busy

    @property
    def refused(self) -> int:
        """Calls and streams."""
        return self.grpc.refused + self.sockets.refused

    @property
    def received(self) -> int:
        """Bytes of tensors."""
        return self.grpc.received + self.sockets.received

    @property
    def sent(self) -> int:
        """Bytes of tensors."""
        return self.grpc.sent + self.sockets.sent

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
