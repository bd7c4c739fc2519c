"""Decoder operations over real gRPC: hostile ones end their stream only, and what a stream was given ends with it."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import numpy as np
import pytest

from tests.gpu_worker.calling import HEAD_DIM, HIDDEN, KV_WIDTH, VOCABULARY, Requests, execute, frames, load, status
from tests.gpu_worker.peer import attend, embed, finish, project
from wire.kv_pages import PAGE_TOKENS
from wire.v1 import gpu_worker_pb2 as pb

Serve = Callable[..., AbstractAsyncContextManager[Any]]

RESERVE = pb.Operation(cache=pb.Cache(sequence=4, reserve=pb.Reserve(tokens=20, type=pb.KV_TYPE_FLOAT32)))
DROP = pb.Operation(cache=pb.Cache(sequence=4, drop=pb.Drop()))
PERMUTE = pb.Operation(cache=pb.Cache(sequence=4, permute=pb.Permute()))
IDS = np.array([1, 2], np.int32)
CHAIN = frames(2, pb.Operation(chain=pb.Chain(steps=[embed({4: [1, 2]}), project(0), attend(0)])), IDS)
GO_ON = pb.Operation(chain=pb.Chain(steps=[finish(0), project(1), attend(1)]))
A = np.zeros((2, HIDDEN), np.float32)
HOSTILE: dict[str, Requests] = {
    "a chain that begins nowhere": frames(1, GO_ON, A),
    "a chain of an unknown sequence": CHAIN,
    "a chain with ids out of range": [*frames(1, RESERVE), *frames(2, CHAIN[0].operation, IDS + VOCABULARY)],
    "a pass with other rows": [*frames(1, RESERVE), *CHAIN, *frames(3, GO_ON, A[:1])],
    "a pass after a drop": [*frames(1, RESERVE), *CHAIN, *frames(3, DROP), *frames(4, GO_ON, A)],
    "a chain without tensor": [*frames(1, RESERVE), *frames(2, CHAIN[0].operation)],
    "a parameter without tensor": frames(1, pb.Operation(provision=pb.Provision(kind=pb.PARAMETER_KIND_EMBEDDING))),
    "indices out of range": [
        *frames(1, RESERVE),
        *frames(2, PERMUTE, np.full((3, 2, 2, HEAD_DIM), HEAD_DIM, np.int32)),
    ],
    "indices without tensor": [*frames(1, RESERVE), *frames(2, PERMUTE)],
    "indices of an unknown sequence": frames(1, PERMUTE, np.zeros((3, 2, 2, HEAD_DIM), np.int32)),
}


@pytest.mark.parametrize("precision", [pb.PRECISION_FLOAT32, pb.PRECISION_INT8])
async def test_hostile_calls_end_their_stream_only(serve: Serve, precision: pb.Precision.ValueType) -> None:
    async with serve() as stub:
        await load(stub, precision)
        good = [*frames(1, RESERVE), *CHAIN, *frames(3, GO_ON, A)]
        expected = await execute(stub, good)
        for name, requests in HOSTILE.items():
            code, text = await status(stub, requests)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, (name, code, text)
            again = await execute(stub, good)
            np.testing.assert_array_equal(again[2], expected[2], name)


async def test_a_page_crosses_in_frames(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.codec.FRAME_BYTES", 1000)
    write = pb.Operation(cache=pb.Cache(sequence=4, write=pb.WritePage(layer=2)))
    read = pb.Operation(cache=pb.Cache(sequence=4, read=pb.ReadPage(layer=2)))
    words = np.arange(PAGE_TOKENS * 2 * KV_WIDTH, dtype=np.int32)
    async with serve() as stub:
        await load(stub)
        requests = [*frames(1, RESERVE), *frames(2, write, words), *frames(3, read)]
        results = await execute(stub, requests)
    assert results[2] is None
    np.testing.assert_array_equal(results[3], words)


async def test_provisioned_parameters_end_with_their_stream(serve: Serve) -> None:
    table = np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    provision = pb.Operation(provision=pb.Provision(kind=pb.PARAMETER_KIND_LINEAR, linear=pb.LINEAR_LM_HEAD))
    head = pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_LM_HEAD))
    async with serve() as stub:
        await load(stub, pb.PRECISION_FLOAT32)
        before = (await execute(stub, frames(1, head, A + 1)))[1]
        results = await execute(stub, [*frames(1, provision, table), *frames(2, head, A + 1)])
        assert results[1] is None
        assert results[2] is not None
        np.testing.assert_allclose(results[2], (A + 1) @ table.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal((await execute(stub, frames(1, head, A + 1)))[1], before)
