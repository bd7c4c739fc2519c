"""What a peer that misbehaves costs: a bounded amount, for a bounded time, and nobody else's calls."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from gpu_worker.compute import Outcome
from gpu_worker.traffic import Traffic
from tests.gpu_worker.calling import HIDDEN, VOCABULARY, execute, frames, load, status
from wire.codec import MAX_ROWS
from wire.errors import UnavailableError
from wire.kv_pages import PAGE_TOKENS
from wire.metrics import render
from wire.v1 import gpu_worker_pb2 as pb

Serve = Callable[..., AbstractAsyncContextManager[Any]]

RESERVE = pb.Operation(cache=pb.Cache(sequence=4, reserve=pb.Reserve(tokens=20, type=pb.KV_TYPE_FLOAT32)))
TOO_LONG = pb.Operation(cache=pb.Cache(sequence=4, reserve=pb.Reserve(tokens=1 << 20, type=pb.KV_TYPE_FLOAT32)))
HEAD = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))
Z = np.zeros((2, HIDDEN), np.int32)
GOOD = frames(1, HEAD, Z)[0]


def half(number: int) -> pb.ExecuteRequest:
    """The first frame of a call whose second one is missing."""
    frame = frames(number, HEAD, Z)[0]
    frame.data = frame.data[:8]
    return frame


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what happens in another task or thread."""
    while not condition():
        await asyncio.sleep(0.01)


async def test_half_a_call_is_dropped_after_its_deadline(serve: Serve) -> None:
    async with serve(request_seconds=0.3) as stub:
        await load(stub)
        assert len(await execute(stub, [GOOD])) == 1
        stream = stub.Execute()
        await stream.write(half(1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (stub.traffic.streams, stub.traffic.busy) == (0, 0)


async def test_an_idle_stream_has_no_deadline(serve: Serve) -> None:
    async with serve(request_seconds=0.4) as stub:
        await load(stub)
        stream = stub.Execute()
        for number in (1, 2):
            await stream.write(frames(number, HEAD, Z)[0])
            assert (await stream.read()).id == number
            await asyncio.sleep(0.6)
        stream.cancel()


async def test_a_peer_that_takes_no_answers_loses_what_it_reserved(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is counted while its connection holds what was not taken."""
    monkeypatch.setattr("gpu_worker.worker.MAX_CACHE_BYTES", PAGE_TOKENS * 2 * 4 * 3 * HIDDEN)
    many = np.zeros((MAX_ROWS, HIDDEN), np.int32)

    async with serve(request_seconds=0.5) as stub:
        await load(stub)
        deaf = stub.Execute()

        async def flood() -> None:
            await deaf.write(frames(1, RESERVE)[0])
            for number in range(2, 1000):
                await deaf.write(frames(number, HEAD, many)[0])

        flooding = asyncio.create_task(flood())
        await until(lambda: stub.traffic.refused > 0)
        assert (stub.traffic.streams, stub.traffic.busy) == (1, 0)
        assert stub.traffic.calls < 200
        assert await execute(stub, frames(1, RESERVE)) == {1: None}
        deaf.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        await until(lambda: stub.traffic.streams == 0)


async def test_there_are_so_many_streams_and_no_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.traffic.MAX_STREAMS", 3)
    async with serve() as stub:
        await load(stub)
        streams = [stub.Execute() for _ in range(3)]
        for stream in streams:
            await stream.write(GOOD)
            await stream.read()
        assert (await status(stub, [GOOD]))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError, match="3 streams"):
            await load(stub)
        assert (await stub.Describe(pb.DescribeRequest())).device == "cpu"
        streams[0].cancel()
        await until(lambda: stub.traffic.streams == 2)
        assert len(await execute(stub, [GOOD])) == 1


@pytest.mark.parametrize("way", ["cancelled", "connection closed", "ended within a call"])
async def test_a_stream_that_breaks_off_frees_everything(serve: Serve, way: str) -> None:
    """Caches and parameters: both allowances are whole again."""
    table = np.zeros((VOCABULARY, HIDDEN), np.float32)
    provision = pb.Operation(provision=pb.Provision(kind=pb.PARAMETER_KIND_LINEAR, linear=pb.LINEAR_LM_HEAD))
    async with serve() as stub, AsyncExitStack() as connection:
        await load(stub, pb.PRECISION_FLOAT32)
        stream = (await connection.enter_async_context(stub.connect())).Execute()
        for frame in [*frames(1, RESERVE), *frames(2, provision, table)]:
            await stream.write(frame)
            await stream.read()
        worker = stub.compute.made
        assert worker.cache_bytes[0] > 0
        assert worker._overlay_allowance.used == table.nbytes
        await stream.write(half(3))
        if way == "cancelled":
            stream.cancel()
        elif way == "connection closed":
            await connection.aclose()
        else:
            await stream.done_writing()
        await until(lambda: (worker.cache_bytes[0], worker._overlay_allowance.used) == (0, 0))
        await until(lambda: (stub.traffic.streams, stub.traffic.busy) == (0, 0))


async def test_answers_say_how_long_they_were_computed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals too, and only their first frame."""
    monkeypatch.setattr("wire.codec.FRAME_BYTES", 1000)
    clock = iter(np.arange(0, 100, 0.25).tolist())
    monkeypatch.setattr(
        "gpu_worker.compute.time", SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic)
    )
    async with serve() as stub:
        await load(stub)
        stream = stub.Execute()
        await stream.write(frames(1, HEAD, Z)[0])
        answers = [await stream.read() for _ in range(-(-2 * VOCABULARY * 4 // 1000))]
        assert [answer.compute_us for answer in answers] == [250_000, *[0] * (len(answers) - 1)]
        await stream.write(frames(2, TOO_LONG)[0])
        refusal = await stream.read()
        assert (refusal.refused, refusal.compute_us) == (grpc.StatusCode.OUT_OF_RANGE.value[0], 250_000)
        stream.cancel()


async def test_what_came_and_went_is_counted(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        await execute(stub, [GOOD, *frames(2, HEAD, Z)])
        assert (await status(stub, frames(1, TOO_LONG)))[0] is grpc.StatusCode.OUT_OF_RANGE
        assert (await status(stub, [half(1)]))[0] is grpc.StatusCode.INVALID_ARGUMENT
        counted = stub.traffic
        assert (counted.calls, counted.refused, counted.streams) == (5, 2, 0)  # the Load, two, one, and half a one
        assert (counted.received, counted.sent) == (2 * Z.nbytes + 8, 2 * 2 * VOCABULARY * 4)
        assert "cleave_gpu_compute_seconds_count 3" in render(counted.metrics())


def test_a_time_that_no_uint32_holds() -> None:
    assert Outcome(None, None, 1e9).microseconds == (1 << 32) - 1


async def test_quiet_is_when_no_stream_is_left() -> None:
    await Traffic().quiet()
    counted = Traffic()
    with counted.stream():
        waiting = asyncio.create_task(counted.quiet())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting


async def test_quiet_is_when_streams_are_idle_but_never_within_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.traffic.QUIET_SECONDS", 0.1)
    monkeypatch.setattr("gpu_worker.traffic.POLL_SECONDS", 0.01)
    counted = Traffic()
    with counted.stream():
        with counted.grpc:
            waiting = asyncio.create_task(counted.quiet())
            await asyncio.sleep(0.3)
            assert not waiting.done()
        await waiting


def test_draining_admits_nothing() -> None:
    counted = Traffic()
    counted.draining = True
    with pytest.raises(UnavailableError, match="draining"), counted.stream():
        pass
    assert counted.streams == 0
