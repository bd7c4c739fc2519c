"""Calls on a stream socket: the answers of gRPC, its refusals and deadlines, and no more power for a hostile peer."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from selectors import EVENT_WRITE
from typing import Any

import grpc
import numpy as np
import pytest

from gpu_worker.conversation import Conversation
from gpu_worker.traffic import Traffic
from gpu_worker.worker import Worker
from tests.gpu_worker.calling import HIDDEN, VOCABULARY, execute, frames, load
from tests.gpu_worker.on_socket import Ended, OnSocket, attached, on_wire
from tests.gpu_worker.test_server import DROP, GOOD, MALFORMED, RESERVE, RING_QKV, Z
from wire.codec import FRAME_BYTES, MAX_ROWS
from wire.kv_pages import PAGE_TOKENS
from wire.stream_socket import MAX_ENVELOPE_BYTES, pack
from wire.v1 import gpu_worker_pb2 as pb

Serve = Callable[..., AbstractAsyncContextManager[Any]]
Status = grpc.StatusCode

HEAD = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))
TOO_LONG = pb.Operation(cache=pb.Cache(sequence=9, reserve=pb.Reserve(tokens=1 << 20, type=pb.KV_TYPE_FLOAT32)))
MANY = np.zeros((MAX_ROWS, HIDDEN), np.int32)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what happens in another task or thread."""
    while not condition():
        await asyncio.sleep(0.01)


async def works(peer: OnSocket, number: int = 1) -> bool:
    return len(await peer.call(frames(number, RING_QKV, Z))) == len(Z)


async def test_answers_are_those_of_grpc_bit_for_bit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one frame and of many, each way, pipelined and not."""
    random_rows = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (MAX_ROWS, HIDDEN)).astype(np.int32)
    for frame_bytes in (FRAME_BYTES, 10_000):
        monkeypatch.setattr("wire.codec.FRAME_BYTES", frame_bytes)
        async with serve() as stub:
            await load(stub)
            calls = [frames(1, HEAD, random_rows), frames(2, RING_QKV, Z), frames(7, HEAD, random_rows[:1])]
            expected = await execute(stub, [frame for call in calls for frame in call])
            async with attached(stub) as peer:
                for number, call in zip(expected, calls, strict=True):
                    np.testing.assert_array_equal(await peer.call(call), expected[number])
            async with attached(stub) as peer:
                await peer.send(*[frame for call in calls for frame in call])
                for array in expected.values():
                    np.testing.assert_array_equal(await peer.answer(), array)


async def test_frames_may_come_byte_by_byte(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        expected = (await execute(stub, [GOOD]))[1]
        async with attached(stub) as peer:
            for byte in on_wire(GOOD):
                await peer.say(bytes([byte]))
                await asyncio.sleep(0)
            np.testing.assert_array_equal(await peer.answer(), expected)


async def test_malformed_calls_end_their_stream_with_the_status_of_grpc(serve: Serve) -> None:
    """A frame over the limit is refused by its length already."""
    async with serve() as stub:
        await load(stub)
        async with attached(stub) as healthy:
            for number, (name, requests) in enumerate(MALFORMED.items(), 1):
                async with attached(stub) as peer:
                    await peer.send(*requests)
                    peer.say_no_more()
                    first = await _first_refusal(peer)
                    assert first is Status.INVALID_ARGUMENT, name
                assert await works(healthy, number), name


async def _first_refusal(peer: OnSocket) -> grpc.StatusCode | None:
    """Of a call, or how the stream ended."""
    try:
        while True:
            response, _ = await peer.frame()
            if response.refused:
                return next(code for code in Status if code.value[0] == response.refused)
    except Ended as ended:
        return ended.code


JUNK: dict[str, bytes] = {
    "no message": struct.pack("<II", 3, 0) + b"\xff\xff\xff",
    "a message over the limit": struct.pack("<II", MAX_ENVELOPE_BYTES + 1, 0),
    "data over the limit": struct.pack("<II", 0, FRAME_BYTES + 1),
    "both as large as can be": b"\xff" * 8,
    "an empty frame": bytes(8),
    "data within the message": struct.pack("<II", GOOD.ByteSize(), 0) + GOOD.SerializeToString(),
    "half a prefix": b"\x01\x00\x00",
    "half a message": on_wire(GOOD)[:20],
    "half the data": on_wire(GOOD)[:-20],
}


@pytest.mark.parametrize("name", JUNK)
async def test_bytes_that_are_no_frame_are_refused(serve: Serve, name: str) -> None:
    async with serve() as stub:
        await load(stub)
        async with attached(stub) as peer, attached(stub) as healthy:
            await peer.say(JUNK[name])
            if name.startswith("half"):
                peer.say_no_more()
            assert await peer.how_it_ends() is Status.INVALID_ARGUMENT
            assert await works(healthy)
        await until(lambda: (stub.traffic.streams, stub.traffic.busy) == (0, 0))
        assert stub.traffic.refused == 1


async def test_flipped_bytes_end_one_stream_or_nothing(serve: Serve) -> None:
    """Whatever comes, the stream is answered or ended, and the worker serves others."""
    chance, whole = random.Random(1), on_wire(GOOD)
    async with serve(request_seconds=0.2) as stub:
        await load(stub)
        async with attached(stub) as healthy:
            for number in range(1, 60):
                changed = bytearray(whole)
                for _ in range(chance.choice((1, 2, 8))):
                    changed[chance.randrange(60)] = chance.randrange(256)
                async with attached(stub) as peer:
                    await peer.say(bytes(changed))
                    peer.say_no_more()
                    assert await _first_refusal(peer) in (None, *Status)
                assert await works(healthy, number)
        await until(lambda: (stub.traffic.streams, stub.traffic.busy) == (0, 0))


async def test_half_a_call_is_dropped_after_its_deadline_and_stalls_nobody(serve: Serve) -> None:
    async with serve(request_seconds=0.3) as stub:
        await load(stub)
        async with attached(stub) as stalled, attached(stub) as healthy:
            await stalled.say(on_wire(GOOD)[:-8])
            for number in range(1, 20):
                assert await works(healthy, number)
            assert await stalled.how_it_ends() is Status.DEADLINE_EXCEEDED
            await until(lambda: (stub.traffic.streams, stub.traffic.busy) == (1, 0))
            assert await works(healthy, 99)


async def test_an_idle_stream_has_no_deadline(serve: Serve) -> None:
    async with serve(request_seconds=0.3) as stub:
        await load(stub)
        async with attached(stub) as peer:
            for number in (1, 2):
                assert await works(peer, number)
                await asyncio.sleep(0.5)


async def test_a_peer_that_takes_no_answers_loses_what_it_reserved_and_stalls_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.worker.MAX_CACHE_BYTES", PAGE_TOKENS * 2 * 4 * 3 * HIDDEN)
    async with serve(request_seconds=0.5) as stub:
        await load(stub)
        async with attached(stub) as deaf, attached(stub) as healthy:
            await deaf.send(*frames(1, RESERVE))

            async def flood() -> None:
                for number in range(2, 1000):
                    await deaf.send(*frames(number, HEAD, MANY))

            flooding = asyncio.create_task(flood())
            number = 0
            while stub.traffic.refused == 0:
                number += 1
                assert await works(healthy, number)
            await asyncio.gather(flooding, return_exceptions=True)
            assert stub.traffic.sockets.calls - number < 50
            await until(lambda: (stub.traffic.streams, stub.traffic.busy) == (1, 0))
            assert await execute(stub, frames(1, RESERVE)) == {1: None}


def test_no_status_is_told_within_an_answer(worker: Worker) -> None:
    """The peer takes some of it in the moment in which its time is over."""
    worker.load("llama", pb.PRECISION_INT8)
    own, peer = socket.socketpair()
    for one in (own, peer):
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    talker = Conversation(own, worker, False, Traffic(), 60.0, lambda: None)
    peer.send(on_wire(frames(1, HEAD, Z)[0]))
    number = 1
    while talker.go_on() != EVENT_WRITE:
        number += 1
        peer.send(on_wire(frames(number, HEAD, Z)[0]))
    heard = peer.recv(1 << 20)
    talker.give_up()
    talker.close()
    with contextlib.suppress(BlockingIOError):
        heard += peer.recv(1 << 20)
    assert pack(pb.ExecuteResponse(ended=Status.DEADLINE_EXCEEDED.value[0])) not in heard
    peer.close()


@pytest.mark.parametrize("way", ["at rest", "within a call", "with an answer not taken"])
async def test_a_peer_that_vanishes_gives_everything_back(serve: Serve, way: str) -> None:
    async with serve() as stub:
        await load(stub)
        async with attached(stub) as peer:
            await peer.send(*frames(1, RESERVE))
            await peer.frame()
            worker = stub.compute.made
            assert worker.cache_bytes[0] > 0
            if way == "within a call":
                await peer.say(on_wire(frames(2, HEAD, Z)[0])[:-8])
            elif way == "with an answer not taken":
                await peer.send(*frames(2, HEAD, MANY))
        await until(lambda: worker.cache_bytes[0] == 0)
        await until(lambda: (stub.traffic.streams, stub.traffic.busy) == (0, 0))


async def test_a_call_that_is_refused_leaves_its_stream_alone(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        async with attached(stub) as peer:
            for number, (operation, refused) in enumerate(
                [(RESERVE, 0), (TOO_LONG, Status.OUT_OF_RANGE.value[0]), (DROP, 0)], 1
            ):
                await peer.send(*frames(number, operation))
                response, data = await peer.frame()
                assert (response.id, response.refused, data) == (number, refused, b"")
            assert await works(peer, 9)


async def test_ring_only_refuses_everything_else(serve: Serve) -> None:
    async with serve(ring_only=True) as stub:
        await load(stub)
        async with attached(stub) as peer:
            assert await works(peer)
            await peer.send(*frames(2, RESERVE))
            assert await peer.how_it_ends() is Status.PERMISSION_DENIED


async def test_nothing_is_done_before_a_model_is_loaded(serve: Serve) -> None:
    async with serve() as stub, attached(stub) as peer:
        await peer.send(GOOD)
        assert await peer.how_it_ends() is Status.FAILED_PRECONDITION


async def test_an_unforeseen_error_tells_the_peer_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"secret {4700 + 11}")

    async with serve() as stub:
        await load(stub)
        async with attached(stub) as peer:
            with monkeypatch.context() as patch:
                patch.setattr("gpu_worker.ring.Ring.product", broken)
                await peer.send(GOOD)
                assert await peer.how_it_ends() is Status.INTERNAL
        async with attached(stub) as peer:
            assert await works(peer)
    assert "RuntimeError" in caplog.text
    assert "4711" not in caplog.text


async def test_what_came_and_went_is_counted(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        async with attached(stub) as peer:
            for number in (1, 2):
                await peer.call(frames(number, HEAD, Z))
            await peer.send(*frames(3, TOO_LONG))
            await peer.frame()
            counted = stub.traffic
            await until(lambda: counted.busy == 0)
            assert (counted.calls, counted.refused, counted.streams) == (4, 1, 1)  # with the Load
            assert (counted.received, counted.sent) == (2 * Z.nbytes, 2 * 2 * VOCABULARY * 4)
