"""Prometheus metrics: counters, gauges and histograms as text, served over HTTP to whoever may ask.

Nothing here is about one prompt: histograms have fixed buckets, and labels are names of schemes and models. Per-request
timings are a side channel, so the endpoint is off unless it is asked for, and refuses to listen beyond this machine.
"""

import asyncio
import bisect
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from wire import channel
from wire.errors import DeniedError, UnavailableError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_BYTES, REQUEST_SECONDS = 8192, 5.0
LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MICROSECONDS = (
    *(20, 30, 40, 50, 60, 70, 80, 90, 100, 120, 140, 160, 180, 200, 250, 300, 350, 400, 450, 500),
    *(600, 700, 800, 1000, 1200, 1500, 2000, 3000, 5000, 10_000, 30_000, 100_000),
)
TRANSPORTS = tuple(bound / 1e6 for bound in _MICROSECONDS)  # what exchanges between two workers take


class Histogram:
    """Observations in cumulative buckets with these upper bounds. Written by one thread, read by any."""

    def __init__(self, bounds: Iterable[float] = LATENCIES) -> None:
        self._bounds = tuple(bounds)
        self.counts = [0] * (len(self._bounds) + 1)  # of each bucket alone; the last one has no bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(self._bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        """The samples. `labels` is `key="value"` pairs, or empty."""
        counts, total, lines = list(self.counts), 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
            total += count
            pairs = ",".join(filter(None, (labels, f'le="{bound}"')))
            lines.append(f"{name}_bucket{{{pairs}}} {total}")
        return [*lines, f"{name}_sum{_braced(labels)} {self.sum}", f"{name}_count{_braced(labels)} {total}"]


Metric = tuple[str, str, float | Histogram]  # name, help, value; a name that ends in _total is a counter


def render(metrics: Iterable[Metric], labels: str = "") -> str:
    """The text format of Prometheus, version 0.0.4."""
    lines: list[str] = []
    for name, text, value in metrics:
        histogram = isinstance(value, Histogram)
        kind = "histogram" if histogram else "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += value.lines(name, labels) if isinstance(value, Histogram) else [f"{name}{_braced(labels)} {value}"]
    return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Of the whole process: interpreter, libraries and data. 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


async def serve(address: str, text: Callable[[], str]) -> asyncio.Server:
    """GET /metrics on HOST:PORT of this machine. Raises DeniedError, UnavailableError."""
    if address.startswith("unix:") or not channel.is_local(address):
        raise DeniedError(f"--metrics {address}: give a loopback HOST:PORT; a proxy of yours may publish it")
    host, _, port = address.rpartition(":")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                found = head.split(b" ", 2)[:2] == [b"GET", b"/metrics"]
                body = text() if found else "there is only GET /metrics\n"
                status = "200 OK" if found else "404 Not Found"
                fields = f"Content-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body.encode())}\r\nConnection: close"
                writer.write(f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n{body}".encode())
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a client that says too little, too much or nothing
        finally:
            writer.close()

    try:
        return await asyncio.start_server(answer, host.strip("[]"), int(port), limit=REQUEST_BYTES)
    except (OSError, ValueError, OverflowError):
        raise UnavailableError(f"cannot listen on {address} for metrics: is the address in use?") from None


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""
