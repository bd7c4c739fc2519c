"""Metrics: text that a strict parser reads, counts that add up, and an endpoint that serves this machine only."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from wire.errors import CleaveError, DeniedError, UnavailableError
from wire.metrics import LATENCIES, Histogram, render, resident_bytes, serve

T = TypeVar("T")
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="[^"\\\n]*")(?:,[a-z_]+="[^"\\\n]*")*)\})? (\S+)')
Samples = dict[tuple[str, str], float]


def read_page(text: str) -> tuple[dict[str, str], Samples]:
    """Types by metric, values by name and labels. Strict: HELP, then TYPE, then the samples, each metric once."""
    types: dict[str, str] = {}
    samples: Samples = {}
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    while lines:
        keyword, name, words = lines.pop(0).removeprefix("# ").split(" ", 2)
        assert (keyword, name in types, words != "") == ("HELP", False, True)
        kind, type_name, types[name] = lines.pop(0).removeprefix("# ").split(" ")
        assert (kind, type_name) == ("TYPE", name)
        assert types[name] in ("counter", "gauge", "histogram")
        assert types[name] != "counter" or name.endswith("_total")
        while lines and not lines[0].startswith("#"):
            matched = SAMPLE.fullmatch(lines.pop(0))
            assert matched
            parts = ("_bucket", "_sum", "_count") if types[name] == "histogram" else ("",)
            assert matched[1] in [name + part for part in parts]
            assert (matched[1], matched[2] or "") not in samples
            samples[matched[1], matched[2] or ""] = float(matched[3])
    return types, samples


def test_numbers_and_their_types() -> None:
    types, samples = read_page(render([("a_total", "Of a.", 3), ("b_bytes", "Of b.", 0.25)]))
    assert types == {"a_total": "counter", "b_bytes": "gauge"}
    assert samples == {("a_total", ""): 3, ("b_bytes", ""): 0.25}


def test_labels_are_on_every_sample() -> None:
    histogram = Histogram((1.0,))
    _, samples = read_page(render([("a", "Of a.", 1), ("h", "Of h.", histogram)], 'scheme="x"'))
    assert all('scheme="x"' in labels for _, labels in samples)
    assert ("h_bucket", 'scheme="x",le="1.0"') in samples


def test_a_histogram_is_cumulative_and_its_bounds_belong_to_it() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 2.0, 100.0):
        histogram.observe(value)
    types, samples = read_page(render([("h_seconds", "Of h.", histogram)]))
    assert types == {"h_seconds": "histogram"}
    buckets = [samples["h_seconds_bucket", f'le="{bound}"'] for bound in ("0.1", "1.0", "+Inf")]
    assert buckets == [2, 4, 6]
    assert samples["h_seconds_count", ""] == 6
    assert samples["h_seconds_sum", ""] == pytest.approx(103.65)


def test_an_empty_histogram_has_every_bucket() -> None:
    _, samples = read_page(render([("h", "Of h.", Histogram())]))
    assert len(samples) == len(LATENCIES) + 3
    assert set(samples.values()) == {0}


def test_resident_memory() -> None:
    assert 1 << 20 < resident_bytes() < 1 << 40


async def _ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    if not request:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


def _while_serving(use: Callable[[int], Awaitable[T]]) -> T:
    async def run() -> T:
        server = await serve("127.0.0.1:0", lambda: "a 1\n")
        async with server:
            return await asyncio.wait_for(use(server.sockets[0].getsockname()[1]), 30)

    return asyncio.run(run())


def test_the_page_is_served() -> None:
    head, _, body = _while_serving(lambda port: _ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"text/plain; version=0.0.4" in head
    assert b"Content-Length: 4" in head
    assert body == b"a 1\n"


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1", b"POST /metrics HTTP/1.1", b"GET /metrics/ HTTP/1.1", b"\xff \xff"]
)
def test_there_is_nothing_else(line: bytes) -> None:
    assert _while_serving(lambda port: _ask(port, line + b"\r\n\r\n")).startswith(b"HTTP/1.1 404 ")


def test_clients_that_say_nothing_or_too_much_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.metrics.REQUEST_SECONDS", 0.05)

    async def use(port: int) -> list[bytes]:
        answers = [await _ask(port, request) for request in (b"", b"GET /metrics HTTP/1.1\r\n", b"x" * 9000)]
        return [*answers, await _ask(port, b"GET /metrics \r\n\r\n")]

    *silent, page = _while_serving(use)
    assert silent == [b"", b"", b""]
    assert page.endswith(b"a 1\n")


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("0.0.0.0:0", DeniedError),
        ("[::]:0", DeniedError),
        ("metrics.example:80", DeniedError),
        (":9090", DeniedError),
        ("unix:/tmp/x", DeniedError),
        ("127.0.0.1:many", UnavailableError),
        ("127.0.0.1:70000", UnavailableError),
        ("127.0.0.1:", UnavailableError),
    ],
)
def test_addresses_that_are_refused(address: str, kind: type[CleaveError]) -> None:
    with pytest.raises(kind, match="metrics"):
        asyncio.run(serve(address, str))


def test_an_address_in_use() -> None:
    async def twice(port: int) -> None:
        await serve(f"127.0.0.1:{port}", str)

    with pytest.raises(UnavailableError, match="in use"):
        _while_serving(twice)
