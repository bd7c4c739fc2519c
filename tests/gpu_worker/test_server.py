"""Execute over real gRPC: right answers, malformed frames, policy, and caches that end with their stream."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from gpu_worker.calls import Call
from gpu_worker.stream import Stream
from gpu_worker.worker import Result, Worker
from tests.gpu_worker.calling import (
    HIDDEN,
    KV_WIDTH,
    MAX_CONTEXT,
    MODEL,
    VOCABULARY,
    Requests,
    execute,
    frames,
    load,
    status,
)
from wire.codec import FRAME_BYTES, MAX_ROWS, Array, header_of
from wire.kv_pages import PAGE_TOKENS
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

Serve = Callable[..., AbstractAsyncContextManager[Any]]

RING_QKV = pb.Operation(ring_matmul=pb.RingMatmul(layer=1, linear=pb.LINEAR_QKV))
MATMUL_O = pb.Operation(matmul=pb.Matmul(layer=0, linear=pb.LINEAR_O))
RESERVE = pb.Operation(cache=pb.Cache(sequence=4, reserve=pb.Reserve(tokens=20, type=pb.KV_TYPE_FLOAT32)))
DROP = pb.Operation(cache=pb.Cache(sequence=4, drop=pb.Drop()))
Z = np.arange(2 * HIDDEN, dtype=np.int32).reshape(2, HIDDEN)
INT32, FLOAT32 = tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_FLOAT32


def _forward(ids: list[int], rows: list[tuple[int, int]], logit_rows: list[int]) -> tuple[pb.Operation, Array]:
    spans = [pb.SequenceRows(sequence=s, rows=r) for s, r in rows]
    return pb.Operation(forward=pb.Forward(sequences=spans, logit_rows=logit_rows)), np.array(ids, np.int32)


async def test_describe_and_load(serve: Serve) -> None:
    async with serve() as stub:
        described = await stub.Describe(pb.DescribeRequest())
        assert (described.device, described.ring_only, described.max_rows) == ("cpu", False, MAX_ROWS)
        assert MODEL in described.models
        code, text = await status(stub, frames(1, RING_QKV, Z))
        assert (code, "Load" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await load(stub, model="another")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await load(stub, precision=pb.PRECISION_UNSPECIFIED)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await load(stub)
        await load(stub)


async def test_pipelined_calls_are_answered_in_order(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        requests = [frame for i in (3, 5, 9, 10) for frame in frames(i, RING_QKV, Z * i)]
        results = await execute(stub, requests)
        assert list(results) == [3, 5, 9, 10]
        one, ten = results[3], results[10]
        assert one is not None
        assert ten is not None
        np.testing.assert_array_equal(ten * 3, one * 10)


async def test_brief_calls_are_carried_out_where_they_are_read_unless_the_compute_thread_is_at_work(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    real = Worker.execute

    def execute_and_tell(self: Worker, call: Call, stream: Stream) -> Result:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(self, call, stream)

    monkeypatch.setattr(Worker, "execute", execute_and_tell)
    async with serve() as stub:
        await load(stub)
        await execute(stub, frames(1, MATMUL_O, np.ones((1, HIDDEN), np.float32)))
        while stub.compute.at_once(lambda: True) is None:
            await asyncio.sleep(0.001)
        alone = await execute(stub, frames(1, RING_QKV, Z))
        go = threading.Event()
        stub.compute.submit(go.wait, 10)
        while stub.compute.at_once(lambda: True):
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(execute(stub, frames(1, RING_QKV, Z)))
        while not stub.traffic.grpc.busy:
            await asyncio.sleep(0.001)
        go.set()
        beside = await waiting
        monkeypatch.setattr("gpu_worker.worker.BRIEF", 0)
        long = await execute(stub, frames(1, RING_QKV, Z))
    assert threads == [False, True, False, False]
    answers = [np.asarray(one[1]).tobytes() for one in (alone, beside, long)]
    assert answers[0] == answers[1] == answers[2] != b""


async def test_a_call_may_take_several_frames_each_way(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.codec.FRAME_BYTES", 10_000)
    head = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))
    z = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (MAX_ROWS, HIDDEN)).astype(np.int32)
    async with serve() as stub:
        await load(stub)
        assert len(frames(1, head, z)) > 1
        whole = (await execute(stub, frames(1, head, z)))[1]
        last = (await execute(stub, frames(1, head, z[-1:])))[1]
    assert whole is not None
    assert last is not None
    assert whole.nbytes > 10_000
    np.testing.assert_array_equal(whole[-1:], last)


async def test_forward_over_the_wire(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub, pb.PRECISION_FLOAT32)
        requests = [
            *frames(1, RESERVE),
            *frames(2, *_forward([1, 2, 3, 4], [(4, 4)], [3])),
            *frames(3, DROP),
            *frames(4, RESERVE),
            *frames(5, *_forward([1, 2], [(4, 2)], [])),
            *frames(6, *_forward([3, 4], [(4, 2)], [0, 1])),
        ]
        results = await execute(stub, requests)
        assert results[1] is None
        assert results[5] is not None
        assert results[5].shape == (0, VOCABULARY)
        assert results[2] is not None
        assert results[6] is not None
        np.testing.assert_allclose(results[6][1], results[2][0], rtol=1e-4, atol=1e-4)


def _with(frame: pb.ExecuteRequest, **fields: Any) -> Requests:
    changed = pb.ExecuteRequest()
    changed.CopyFrom(frame)
    for name, value in fields.items():
        if name == "header":
            changed.header.CopyFrom(value)
        else:
            setattr(changed, name, value)
    return [changed]


def _ring(layer: int, linear: int) -> pb.Operation:
    operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=layer))
    operation.ring_matmul.linear = linear  # type: ignore[assignment]
    return operation


GOOD = frames(1, RING_QKV, Z)[0]
MALFORMED: dict[str, Requests] = {
    "no operation": [pb.ExecuteRequest(id=1, header=header_of(Z), data=Z.tobytes())],
    "empty operation": frames(1, pb.Operation(), Z),
    "no header": [pb.ExecuteRequest(id=1, operation=RING_QKV, data=Z.tobytes())],
    "wrong dtype": frames(1, RING_QKV, Z.astype(np.float32)),
    "unknown dtype": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=7, shape=Z.shape)),  # type: ignore[arg-type]
    "wrong width": frames(1, RING_QKV, np.zeros((2, HIDDEN - 1), np.int32)),
    "wrong rank": frames(1, RING_QKV, np.zeros((2, HIDDEN, 1), np.int32)),
    "no rows": frames(1, RING_QKV, np.zeros((0, HIDDEN), np.int32)),
    "too many rows": frames(1, RING_QKV, np.zeros((MAX_ROWS + 1, HIDDEN), np.int32)),
    "oversize": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(1 << 31, HIDDEN))),
    "overflowing": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(1 << 31, 1 << 31, 1 << 31, HIDDEN))),
    "header announces less": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(1, HIDDEN))),
    "header announces more": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(3, HIDDEN))),
    "no data": _with(GOOD, data=b""),
    "superfluous data": [GOOD, pb.ExecuteRequest(id=1, data=b"1234")],
    "frame too long": _with(GOOD, data=bytes(FRAME_BYTES + 4)),
    "another call within a call": [*_with(GOOD, data=Z.tobytes()[:8]), *_with(GOOD, id=2)],
    "header within a call": [*_with(GOOD, data=Z.tobytes()[:8]), *_with(GOOD, data=Z.tobytes()[8:])],
    "id used twice": [GOOD, GOOD],
    "id going back": [*_with(GOOD, id=9), *_with(GOOD, id=8)],
    "unknown linear": frames(1, _ring(0, 77), Z),
    "unspecified linear": frames(1, _ring(0, 0), Z),
    "layer out of range": frames(1, _ring(3, pb.LINEAR_QKV), Z),
    "huge layer": frames(1, _ring((1 << 32) - 1, pb.LINEAR_QKV), Z),
    "head of another layer": frames(1, _ring(1, pb.LINEAR_LM_HEAD), Z),
    "matmul of integers": frames(1, MATMUL_O, Z),
    "cache with a tensor": frames(1, RESERVE, Z),
    "dropping nothing": frames(1, DROP),
    "unknown sequence": frames(1, *_forward([1], [(4, 1)], [0])),
    "sequence named twice": [*frames(1, RESERVE), *frames(2, *_forward([1, 2], [(4, 1), (4, 1)], [0]))],
    "rows and ids differ": [*frames(1, RESERVE), *frames(2, *_forward([1, 2], [(4, 1)], [0]))],
    "a sequence without rows": [*frames(1, RESERVE), *frames(2, *_forward([1], [(4, 1), (5, 0)], [0]))],
    "logit row out of range": [*frames(1, RESERVE), *frames(2, *_forward([1], [(4, 1)], [1]))],
    "too many logit rows": [*frames(1, RESERVE), *frames(2, *_forward([1], [(4, 1)], [0, 0]))],
    "token id too large": [*frames(1, RESERVE), *frames(2, *_forward([VOCABULARY], [(4, 1)], [0]))],
    "token id negative": [*frames(1, RESERVE), *frames(2, *_forward([-1], [(4, 1)], [0]))],
}


async def test_malformed_frames_are_refused_and_the_worker_lives_on(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        for name, requests in MALFORMED.items():
            code, text = await status(stub, requests)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, (name, code, text)
            assert len(await execute(stub, [GOOD])) == 1, name


async def test_bytes_that_are_no_message_are_refused(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        raw = stub.raw_execute
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in raw(iter([b"\xff\xff\xff"])):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(await execute(stub, [GOOD])) == 1


async def test_more_than_the_context_is_out_of_range(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub, pb.PRECISION_FLOAT32)
        too_long = [*frames(1, RESERVE), *frames(2, *_forward([1] * 21, [(4, 21)], []))]
        assert (await status(stub, too_long))[0] is grpc.StatusCode.OUT_OF_RANGE
        reserve = pb.Reserve(tokens=MAX_CONTEXT + 1, type=pb.KV_TYPE_INT8)
        too_large = frames(1, pb.Operation(cache=pb.Cache(sequence=1, reserve=reserve)))
        assert (await status(stub, too_large))[0] is grpc.StatusCode.OUT_OF_RANGE


async def test_a_call_that_is_refused_leaves_its_stream_and_its_caches_alone(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub, pb.PRECISION_FLOAT32)
        stream = stub.Execute()
        greedy = pb.Operation(cache=pb.Cache(sequence=9, reserve=pb.Reserve(tokens=1 << 20, type=pb.KV_TYPE_INT8)))
        first, refused, last = frames(1, RESERVE), frames(2, greedy), frames(3, *_forward([1], [(4, 1)], [0]))
        for request in (first, refused, last):
            await stream.write(request[0])
        answers = [await stream.read() for _ in range(3)]
        assert [answer.refused for answer in answers] == [0, grpc.StatusCode.OUT_OF_RANGE.value[0], 0]
        assert answers[2].HasField("header")
        stream.cancel()


async def test_ring_products_need_int8(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub, pb.PRECISION_FLOAT32)
        assert (await status(stub, [GOOD]))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert len(await execute(stub, frames(1, MATMUL_O, Z.astype(np.float32)))) == 1
        await load(stub, pb.PRECISION_INT8)
        assert len(await execute(stub, [GOOD])) == 1


async def test_ring_only_refuses_everything_else(serve: Serve) -> None:
    async with serve(ring_only=True) as stub:
        await load(stub)
        assert (await stub.Describe(pb.DescribeRequest())).ring_only
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await load(stub, pb.PRECISION_FLOAT32)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        for requests in (
            frames(1, MATMUL_O, Z.astype(np.float32)),
            frames(1, RESERVE),
            frames(1, *_forward([1], [(4, 1)], [0])),
        ):
            assert (await status(stub, requests))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert len(await execute(stub, [GOOD])) == 1


async def test_sequences_belong_to_their_stream(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub, pb.PRECISION_FLOAT32)
        await execute(stub, frames(1, RESERVE))
        code, _ = await status(stub, frames(1, *_forward([1], [(4, 1)], [0])))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_vanished_peer_gives_its_caches_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    one_page_of_three_layers = PAGE_TOKENS * 2 * 4 * 3 * KV_WIDTH
    monkeypatch.setattr("gpu_worker.worker.MAX_CACHE_BYTES", one_page_of_three_layers)

    async with serve() as stub:
        await load(stub)
        stream = stub.Execute()
        await stream.write(frames(1, RESERVE)[0])
        await stream.read()
        assert (await status(stub, frames(1, RESERVE)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.cancel()
        while True:
            try:
                assert await execute(stub, frames(1, RESERVE)) == {1: None}
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)


async def test_an_unforeseen_error_tells_the_peer_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"secret {4700 + 11}")

    monkeypatch.setattr("gpu_worker.ring.Ring.product", broken)

    async with serve() as stub:
        await load(stub)
        code, text = await status(stub, [GOOD])
        assert (code, "4711" in text) == (grpc.StatusCode.INTERNAL, False)
    assert "RuntimeError" in caplog.text
    assert "4711" not in caplog.text
