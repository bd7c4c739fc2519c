"""Calls over gRPC, frame by frame."""

from typing import Any

import grpc
import grpc.aio
import pytest

from tests.model_folders import SIZES
from wire.codec import Array, Assembler, header_of, split
from wire.v1 import gpu_worker_pb2 as pb

Requests = list[pb.ExecuteRequest]
MODEL, TIED = "llama3-scaled", "qwen2-f16-tied"  # the first has no biases
HIDDEN, VOCABULARY, MAX_CONTEXT = SIZES["hidden_size"], SIZES["vocab_size"], SIZES["max_position_embeddings"]
HEAD_DIM = HIDDEN // SIZES["num_attention_heads"]
KV_WIDTH = SIZES["num_key_value_heads"] * HEAD_DIM
QK_WIDTH = HIDDEN + KV_WIDTH  # of q beside k


def frames(number: int, operation: pb.Operation, array: Array | None = None) -> Requests:
    if array is None:
        return [pb.ExecuteRequest(id=number, operation=operation)]
    first, *rest = split(array)
    head = pb.ExecuteRequest(id=number, operation=operation, header=header_of(array), data=first)
    return [head, *[pb.ExecuteRequest(id=number, data=data) for data in rest]]


class Refused(Exception):  # noqa: N818  (a status)
    """The worker answered a call with a status; its stream goes on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == self.number)

    def details(self) -> str:
        return ""


async def execute(stub: Any, requests: Requests) -> dict[int, Array | None]:
    """Results by id, in the order in which they came."""
    results: dict[int, Array | None] = {}
    assembler: Assembler | None = None
    async for response in stub.Execute(iter(requests)):
        if response.refused:
            raise Refused(response.refused)
        if response.HasField("header"):
            assembler = Assembler(response.header)
        if assembler is None:
            results[response.id] = None
            continue
        assembler.add(response.data)
        if assembler.done:
            results[response.id], assembler = assembler.array(), None
    return results


async def status(stub: Any, requests: Requests) -> tuple[grpc.StatusCode, str]:
    """How the stream, or a call of it, was refused."""
    with pytest.raises((grpc.aio.AioRpcError, Refused)) as caught:
        await execute(stub, requests)
    error: Any = caught.value
    return error.code(), error.details() or ""


async def load(stub: Any, precision: pb.Precision.ValueType = pb.PRECISION_INT8, model: str = MODEL) -> None:
    await stub.Load(pb.LoadRequest(model=model, precision=precision))
