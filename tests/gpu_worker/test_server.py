"""Execute over real gRPC: right answers, malformed frames, policy, and caches that end with their stream."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from gpu_worker.cache import CacheBudget
from wire.codec import FRAME_BYTES, MAX_ROWS, Array, Assembler, header_of, split
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

Serve = Callable[..., AbstractAsyncContextManager[Any]]
Requests = list[pb.ExecuteRequest]

MODEL = "llama-untied"
RING_QKV = pb.Operation(ring_matmul=pb.RingMatmul(layer=1, linear=pb.LINEAR_QKV))
MATMUL_O = pb.Operation(matmul=pb.Matmul(layer=0, linear=pb.LINEAR_O))
RESERVE = pb.Operation(cache=pb.Cache(sequence=4, reserve_tokens=20))
Z = np.arange(2 * 48, dtype=np.int32).reshape(2, 48)
INT32, FLOAT32 = tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_FLOAT32


def _frames(number: int, operation: pb.Operation, array: Array | None = None) -> Requests:
    if array is None:
        return [pb.ExecuteRequest(id=number, operation=operation)]
    first, *rest = split(array)
    head = pb.ExecuteRequest(id=number, operation=operation, header=header_of(array), data=first)
    return [head, *[pb.ExecuteRequest(id=number, data=data) for data in rest]]


def _forward(ids: list[int], rows: list[tuple[int, int]], logit_rows: list[int]) -> tuple[pb.Operation, Array]:
    spans = [pb.SequenceRows(sequence=s, rows=r) for s, r in rows]
    return pb.Operation(forward=pb.Forward(sequences=spans, logit_rows=logit_rows)), np.array(ids, np.int32)


async def _execute(stub: Any, requests: Requests) -> dict[int, Array | None]:
    """Results by id, in the order in which they came."""
    results: dict[int, Array | None] = {}
    assembler: Assembler | None = None
    async for response in stub.Execute(iter(requests)):
        if response.HasField("header"):
            assembler = Assembler(response.header)
        if assembler is None:
            results[response.id] = None
            continue
        assembler.add(response.data)
        if assembler.done:
            results[response.id], assembler = assembler.array(), None
    return results


async def _status(stub: Any, requests: Requests) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _execute(stub, requests)
    return caught.value.code(), caught.value.details() or ""


async def _load(stub: Any, precision: pb.Precision.ValueType = pb.PRECISION_INT8, model: str = MODEL) -> None:
    await stub.Load(pb.LoadRequest(model=model, precision=precision))


async def test_describe_and_load(serve: Serve) -> None:
    async with serve() as stub:
        described = await stub.Describe(pb.DescribeRequest())
        assert (described.device, described.ring_only, described.max_rows) == ("cpu", False, MAX_ROWS)
        assert MODEL in described.models
        code, text = await _status(stub, _frames(1, RING_QKV, Z))
        assert (code, "Load" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _load(stub, model="another")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _load(stub, precision=pb.PRECISION_UNSPECIFIED)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await _load(stub)
        await _load(stub)


async def test_pipelined_calls_are_answered_in_order(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub)
        requests = [frame for i in (3, 5, 9, 10) for frame in _frames(i, RING_QKV, Z * i)]
        results = await _execute(stub, requests)
        assert list(results) == [3, 5, 9, 10]
        one, ten = results[3], results[10]
        assert one is not None
        assert ten is not None
        np.testing.assert_array_equal(ten * 3, one * 10)


async def test_a_call_may_take_several_frames_each_way(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.codec.FRAME_BYTES", 10_000)
    head = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))
    z = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (MAX_ROWS, 48)).astype(np.int32)
    async with serve() as stub:
        await _load(stub)
        assert len(_frames(1, head, z)) > 1
        whole = (await _execute(stub, _frames(1, head, z)))[1]
        last = (await _execute(stub, _frames(1, head, z[-1:])))[1]
    assert whole is not None
    assert last is not None
    assert whole.nbytes > 10_000
    np.testing.assert_array_equal(whole[-1:], last)


async def test_forward_over_the_wire(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub, pb.PRECISION_FLOAT32)
        requests = [
            *_frames(1, RESERVE),
            *_frames(2, *_forward([1, 2, 3, 4], [(4, 4)], [3])),
            *_frames(3, pb.Operation(cache=pb.Cache(sequence=4))),
            *_frames(4, RESERVE),
            *_frames(5, *_forward([1, 2], [(4, 2)], [])),
            *_frames(6, *_forward([3, 4], [(4, 2)], [0, 1])),
        ]
        results = await _execute(stub, requests)
        assert results[1] is None
        assert results[5] is not None
        assert results[5].shape == (0, 261)
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


GOOD = _frames(1, RING_QKV, Z)[0]
MALFORMED: dict[str, Requests] = {
    "no operation": [pb.ExecuteRequest(id=1, header=header_of(Z), data=Z.tobytes())],
    "empty operation": _frames(1, pb.Operation(), Z),
    "no header": [pb.ExecuteRequest(id=1, operation=RING_QKV, data=Z.tobytes())],
    "wrong dtype": _frames(1, RING_QKV, Z.astype(np.float32)),
    "unknown dtype": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=7, shape=Z.shape)),  # type: ignore[arg-type]
    "wrong width": _frames(1, RING_QKV, np.zeros((2, 47), np.int32)),
    "wrong rank": _frames(1, RING_QKV, np.zeros((2, 48, 1), np.int32)),
    "no rows": _frames(1, RING_QKV, np.zeros((0, 48), np.int32)),
    "too many rows": _frames(1, RING_QKV, np.zeros((MAX_ROWS + 1, 48), np.int32)),
    "oversize": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(1 << 31, 48))),
    "overflowing": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(1 << 31, 1 << 31, 1 << 31, 48))),
    "header announces less": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(1, 48))),
    "header announces more": _with(GOOD, header=tensor_pb2.TensorHeader(dtype=INT32, shape=(3, 48))),
    "no data": _with(GOOD, data=b""),
    "superfluous data": [GOOD, pb.ExecuteRequest(id=1, data=b"1234")],
    "frame too long": _with(GOOD, data=bytes(FRAME_BYTES + 4)),
    "another call within a call": [*_with(GOOD, data=Z.tobytes()[:8]), *_with(GOOD, id=2)],
    "header within a call": [*_with(GOOD, data=Z.tobytes()[:8]), *_with(GOOD, data=Z.tobytes()[8:])],
    "id used twice": [GOOD, GOOD],
    "id going back": [*_with(GOOD, id=9), *_with(GOOD, id=8)],
    "unknown linear": _frames(1, _ring(0, 77), Z),
    "unspecified linear": _frames(1, _ring(0, 0), Z),
    "layer out of range": _frames(1, _ring(3, pb.LINEAR_QKV), Z),
    "huge layer": _frames(1, _ring((1 << 32) - 1, pb.LINEAR_QKV), Z),
    "head of another layer": _frames(1, _ring(1, pb.LINEAR_LM_HEAD), Z),
    "matmul of integers": _frames(1, MATMUL_O, Z),
    "cache with a tensor": _frames(1, RESERVE, Z),
    "dropping nothing": _frames(1, pb.Operation(cache=pb.Cache(sequence=4))),
    "unknown sequence": _frames(1, *_forward([1], [(4, 1)], [0])),
    "sequence named twice": [*_frames(1, RESERVE), *_frames(2, *_forward([1, 2], [(4, 1), (4, 1)], [0]))],
    "rows and ids differ": [*_frames(1, RESERVE), *_frames(2, *_forward([1, 2], [(4, 1)], [0]))],
    "a sequence without rows": [*_frames(1, RESERVE), *_frames(2, *_forward([1], [(4, 1), (5, 0)], [0]))],
    "logit row out of range": [*_frames(1, RESERVE), *_frames(2, *_forward([1], [(4, 1)], [1]))],
    "too many logit rows": [*_frames(1, RESERVE), *_frames(2, *_forward([1], [(4, 1)], [0, 0]))],
    "token id too large": [*_frames(1, RESERVE), *_frames(2, *_forward([261], [(4, 1)], [0]))],
    "token id negative": [*_frames(1, RESERVE), *_frames(2, *_forward([-1], [(4, 1)], [0]))],
}


async def test_malformed_frames_are_refused_and_the_worker_lives_on(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub)
        for name, requests in MALFORMED.items():
            code, text = await _status(stub, requests)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, (name, code, text)
            assert len(await _execute(stub, [GOOD])) == 1, name


async def test_bytes_that_are_no_message_are_refused(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub)
        raw = stub.raw_execute
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in raw(iter([b"\xff\xff\xff"])):
                pass
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert len(await _execute(stub, [GOOD])) == 1


async def test_more_than_the_context_is_out_of_range(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub, pb.PRECISION_FLOAT32)
        too_long = [*_frames(1, RESERVE), *_frames(2, *_forward([1] * 21, [(4, 21)], []))]
        assert (await _status(stub, too_long))[0] is grpc.StatusCode.OUT_OF_RANGE
        too_large = _frames(1, pb.Operation(cache=pb.Cache(sequence=1, reserve_tokens=129)))
        assert (await _status(stub, too_large))[0] is grpc.StatusCode.OUT_OF_RANGE


async def test_ring_products_need_int8(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub, pb.PRECISION_FLOAT32)
        assert (await _status(stub, [GOOD]))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert len(await _execute(stub, _frames(1, MATMUL_O, Z.astype(np.float32)))) == 1
        await _load(stub, pb.PRECISION_INT8)
        assert len(await _execute(stub, [GOOD])) == 1


async def test_ring_only_refuses_everything_else(serve: Serve) -> None:
    async with serve(ring_only=True) as stub:
        await _load(stub)
        assert (await stub.Describe(pb.DescribeRequest())).ring_only
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _load(stub, pb.PRECISION_FLOAT32)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        for requests in (
            _frames(1, MATMUL_O, Z.astype(np.float32)),
            _frames(1, RESERVE),
            _frames(1, *_forward([1], [(4, 1)], [0])),
        ):
            assert (await _status(stub, requests))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert len(await _execute(stub, [GOOD])) == 1


async def test_sequences_belong_to_their_stream(serve: Serve) -> None:
    async with serve() as stub:
        await _load(stub, pb.PRECISION_FLOAT32)
        await _execute(stub, _frames(1, RESERVE))
        code, _ = await _status(stub, _frames(1, *_forward([1], [(4, 1)], [0])))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_vanished_peer_gives_its_caches_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    one_sequence = 20 * 2 * 4 * 3 * 16
    monkeypatch.setattr("gpu_worker.worker.CacheBudget", lambda: CacheBudget(one_sequence))

    async with serve() as stub:
        await _load(stub)
        stream = stub.Execute()
        await stream.write(_frames(1, RESERVE)[0])
        await stream.read()
        code, text = await _status(stub, _frames(1, RESERVE))
        assert (code, "would fit" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        stream.cancel()
        while True:
            try:
                assert await _execute(stub, _frames(1, RESERVE)) == {1: None}
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
        await _load(stub)
        code, text = await _status(stub, [GOOD])
        assert (code, "4711" in text) == (grpc.StatusCode.INTERNAL, False)
    assert "RuntimeError" in caplog.text
    assert "4711" not in caplog.text
