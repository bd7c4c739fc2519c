"""Calls over gRPC, frame by frame."""

from typing import Any

import grpc
import grpc.aio
import pytest

from wire.codec import Array, Assembler, header_of, split
from wire.v1 import gpu_worker_pb2 as pb

Requests = list[pb.ExecuteRequest]
MODEL = "llama-untied"


def frames(number: int, operation: pb.Operation, array: Array | None = None) -> Requests:
    if array is None:
        return [pb.ExecuteRequest(id=number, operation=operation)]
    first, *rest = split(array)
    head = pb.ExecuteRequest(id=number, operation=operation, header=header_of(array), data=first)
    return [head, *[pb.ExecuteRequest(id=number, data=data) for data in rest]]


async def execute(stub: Any, requests: Requests) -> dict[int, Array | None]:
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


async def status(stub: Any, requests: Requests) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await execute(stub, requests)
    return caught.value.code(), caught.value.details() or ""


async def load(stub: Any, precision: pb.Precision.ValueType = pb.PRECISION_INT8, model: str = MODEL) -> None:
    await stub.Load(pb.LoadRequest(model=model, precision=precision))
