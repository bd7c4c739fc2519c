"""The stream socket's door: tickets, how many strangers may wait, drain and end."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from gpu_worker.stream_plane import TICKET_SECONDS
from tests.gpu_worker.calling import frames, load
from tests.gpu_worker.on_socket import attached, connect
from tests.gpu_worker.test_server import RING_QKV, Z
from wire.stream_socket import TICKET_BYTES
from wire.v1 import gpu_worker_pb2 as pb

Serve = Callable[..., AbstractAsyncContextManager[Any]]
Status = grpc.StatusCode
ATTACH = pb.AttachRequest()


async def refusal(stub: Any) -> grpc.StatusCode:
    """Of Attach."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Attach(ATTACH)
    return caught.value.code()


async def test_tickets_are_random_and_long(serve: Serve) -> None:
    async with serve() as stub:
        tickets = {(await stub.Attach(ATTACH)).ticket for _ in range(5)}
        assert [len(ticket) for ticket in tickets] == [TICKET_BYTES] * 5


async def test_a_ticket_that_nobody_gave_out_is_refused(serve: Serve) -> None:
    async with serve() as stub:
        good = (await stub.Attach(ATTACH)).ticket
        for ticket in (bytes(TICKET_BYTES), good[:-1] + bytes([good[-1] ^ 1])):
            peer = await connect(stub.socket)
            await peer.say(ticket)
            assert await peer.how_it_ends() is Status.UNAUTHENTICATED
        assert stub.traffic.sockets.calls == 0


async def test_a_ticket_is_good_once(serve: Serve) -> None:
    """Also while its stream is open, and also when its stream was refused."""
    async with serve() as stub:
        await load(stub)
        ticket = (await stub.Attach(ATTACH)).ticket
        first, second = await connect(stub.socket), await connect(stub.socket)
        await first.say(ticket)
        assert (await first.frame())[0] == pb.ExecuteResponse()
        await second.say(ticket)
        assert await second.how_it_ends() is Status.UNAUTHENTICATED
        assert (await first.call(frames(1, RING_QKV, Z))).shape[0] == 2
        first.close()
        third = await connect(stub.socket)
        await third.say(ticket)
        assert await third.how_it_ends() is Status.UNAUTHENTICATED


async def test_a_late_ticket_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.stream_plane.TICKET_SECONDS", 0.05)
    async with serve() as stub:
        ticket = (await stub.Attach(ATTACH)).ticket
        await asyncio.sleep(0.1)
        peer = await connect(stub.socket)
        await peer.say(ticket)
        assert await peer.how_it_ends() is Status.UNAUTHENTICATED


@pytest.mark.parametrize("said", [b"", b"x" * 31])
async def test_who_shows_no_ticket_is_sent_away_and_keeps_nobody_out(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("gpu_worker.stream_plane.SHOW_SECONDS", 0.3)
    async with serve() as stub:
        strangers = [await connect(stub.socket) for _ in range(20)]
        for one in strangers:
            await one.say(said)
        async with attached(stub):
            assert stub.traffic.streams == 1
        for one in strangers:
            assert await one.how_it_ends() is Status.DEADLINE_EXCEEDED


async def test_who_leaves_without_a_ticket_is_no_error(serve: Serve) -> None:
    async with serve() as stub:
        (await connect(stub.socket)).close()
        async with attached(stub):
            assert stub.traffic.streams == 1


async def test_there_are_so_many_tickets_and_no_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.stream_plane.MAX_STREAMS", 3)
    async with serve() as stub:
        tickets = [(await stub.Attach(ATTACH)).ticket for _ in range(3)]
        assert await refusal(stub) is Status.RESOURCE_EXHAUSTED
        peer = await connect(stub.socket)
        await peer.say(tickets[0])
        await peer.frame()
        await stub.Attach(ATTACH)
        assert await refusal(stub) is Status.RESOURCE_EXHAUSTED
        clock = time.monotonic
        monkeypatch.setattr("gpu_worker.stream_plane.time.monotonic", lambda: clock() + TICKET_SECONDS)
        await stub.Attach(ATTACH)
        peer.close()


async def test_streams_of_both_planes_are_counted_together(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.traffic.MAX_STREAMS", 3)
    async with serve() as stub, AsyncExitStack() as open_ones:
        await load(stub)
        stream = stub.Execute()
        await stream.write(frames(1, RING_QKV, Z)[0])
        await stream.read()
        for _ in range(2):
            await open_ones.enter_async_context(attached(stub))
        peer = await connect(stub.socket)
        await peer.say((await stub.Attach(ATTACH)).ticket)
        assert await peer.how_it_ends() is Status.RESOURCE_EXHAUSTED
        stream.cancel()


async def test_draining_admits_nobody_and_waits_for_nobody_idle(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.traffic.QUIET_SECONDS", 0.1)
    async with serve() as stub:
        await load(stub)
        ticket = (await stub.Attach(ATTACH)).ticket
        async with attached(stub) as peer:
            stub.traffic.draining = True
            assert await refusal(stub) is Status.UNAVAILABLE
            late = await connect(stub.socket)
            await late.say(ticket)
            assert await late.how_it_ends() is Status.UNAVAILABLE
            assert (await peer.call(frames(1, RING_QKV, Z))).shape[0] == 2
            await stub.traffic.quiet()
            await stub.plane.stop()
            assert await peer.how_it_ends() is None
            assert not Path(stub.socket).exists()


async def test_a_worker_without_stream_socket_says_so() -> None:
    from gpu_worker.server import Servicer

    class Context:
        async def abort(self, code: grpc.StatusCode, text: str) -> None:
            raise grpc.aio.AbortError(code, text)

    with pytest.raises(grpc.aio.AbortError) as caught:
        await Servicer(Any, [], False).Attach(ATTACH, Context())  # type: ignore[arg-type]
    assert caught.value.args[0] is Status.FAILED_PRECONDITION
    assert "--stream" in caught.value.args[1]
