"""RING_LOOKUP over real gRPC: the table that both workers read, exact words, bounds, what a ring-only worker needs."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
import pytest

from gpu_worker.calls import CallReader
from gpu_worker.expected import LOOKUP_ROWS
from tests.gpu_worker.calling import HIDDEN, MODEL, TIED, VOCABULARY, Requests, execute, frames, load, status
from wire.checkpoint import Checkpoint
from wire.codec import FRAME_BYTES, header_of
from wire.errors import InvalidArgumentError
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read
from wire.quantize import quantize_rows
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

Serve = Callable[..., AbstractAsyncContextManager[Any]]

LOOKUP = pb.Operation(ring_lookup=pb.RingLookup())
HEAD = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))
Z = np.random.default_rng(1).integers(-(1 << 31), 1 << 31, (5, VOCABULARY)).astype(np.int32)
GOOD = frames(1, LOOKUP, Z)[0]


def _table(folder: Path) -> npt.NDArray[np.int64]:
    """E_q as the rules of `wire` make it."""
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    table = read(checkpoint, parameters(config)[Name(Kind.EMBEDDING)])
    checkpoint.close()
    return quantize_rows(table)[0].astype(np.int64)


@pytest.mark.parametrize("ring_only", [False, True])
@pytest.mark.parametrize("model", [TIED, MODEL, "gpt2", "gpt2-untied", "chatglm3", "llama-bf16-tied-sharded"])
async def test_the_answer_is_exact(serve: Serve, model_folders: dict[str, Path], model: str, ring_only: bool) -> None:
    """Of tied and untied models alike: an untied one has another matrix for its head."""
    table = _table(model_folders[model])
    async with serve(ring_only) as stub:
        await load(stub, model=model)
        answers = await execute(
            stub, [*frames(1, LOOKUP, Z), *frames(2, LOOKUP, Z[3:4]), *frames(3, HEAD, Z[:, :HIDDEN])]
        )
    assert table.shape == (VOCABULARY, HIDDEN)
    expected = (Z.astype(np.int64) @ table).astype(np.int32)
    for number, rows in ((1, expected), (2, expected[3:4])):
        answer = answers[number]
        assert answer is not None
        assert answer.dtype == np.int32
        np.testing.assert_array_equal(answer, rows)
    head = (Z[:, :HIDDEN].astype(np.int64) @ table.T).astype(np.int32)
    assert np.array_equal(np.asarray(answers[3]), head) == (model in (TIED, "gpt2", "llama-bf16-tied-sharded"))


async def test_a_masked_row_takes_several_frames(
    serve: Serve, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wire.codec.FRAME_BYTES", 1000)
    pad = np.random.default_rng(2).integers(-(1 << 31), 1 << 31, (LOOKUP_ROWS, VOCABULARY)).astype(np.int32)
    masked, ids = pad.copy(), np.arange(LOOKUP_ROWS) * 4
    masked[np.arange(LOOKUP_ROWS), ids] += 1
    async with serve(ring_only=True) as stub:
        await load(stub)
        assert len(frames(1, LOOKUP, masked)) > 70
        answers = await execute(stub, [*frames(1, LOOKUP, masked), *frames(2, LOOKUP, pad)])
    np.testing.assert_array_equal(np.asarray(answers[1]) - np.asarray(answers[2]), _table(model_folders[MODEL])[ids])


def _announcing(*shape: int, dtype: int = tensor_pb2.DTYPE_INT32) -> Requests:
    header = tensor_pb2.TensorHeader(shape=shape)
    header.dtype = dtype  # type: ignore[assignment]
    return [pb.ExecuteRequest(id=1, operation=LOOKUP, header=header, data=Z.tobytes())]


MALFORMED: dict[str, tuple[Requests, str]] = {
    "no header": ([pb.ExecuteRequest(id=1, operation=LOOKUP, data=Z.tobytes())], "another dtype or rank"),
    "floats": (frames(1, LOOKUP, Z.astype(np.float32)), "another dtype or rank"),
    "unknown dtype": (_announcing(*Z.shape, dtype=7), "another dtype or rank"),
    "token ids": (frames(1, LOOKUP, Z[:, 0].copy()), "another dtype or rank"),
    "wrong rank": (frames(1, LOOKUP, Z[:, :, None]), "another dtype or rank"),
    "one column less": (frames(1, LOOKUP, Z[:, 1:]), "another shape"),
    "as wide as hidden": (frames(1, LOOKUP, Z[:, :HIDDEN]), "another shape"),
    "no rows": (frames(1, LOOKUP, Z[:0]), "1 to 64 rows"),
    "too many rows": (frames(1, LOOKUP, np.zeros((LOOKUP_ROWS + 1, VOCABULARY), np.int32)), "1 to 64 rows"),
    "huge": (_announcing((1 << 31) - 1, VOCABULARY), "1 to 64 rows"),
    "header announces less": (_announcing(4, VOCABULARY), "announced"),
    "frame too long": (
        [pb.ExecuteRequest(id=1, operation=LOOKUP, header=header_of(Z), data=bytes(FRAME_BYTES + 4))],
        "announced",
    ),
    "a second header": ([pb.ExecuteRequest(id=1, operation=LOOKUP, header=header_of(Z), data=b"1234"), GOOD], "follow"),
    "half a row": ([pb.ExecuteRequest(id=1, operation=LOOKUP, header=header_of(Z), data=b"1234")], "within a call"),
}


async def test_malformed_calls_end_their_stream_and_nothing_else(serve: Serve) -> None:
    async with serve() as stub:
        await load(stub)
        for name, (requests, complaint) in MALFORMED.items():
            code, text = await status(stub, requests)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, (name, code, text)
            assert complaint in text, (name, text)
            assert len(await execute(stub, [GOOD])) == 1, name


async def test_a_model_that_is_not_int8_refuses_the_call_and_the_stream_goes_on(serve: Serve) -> None:
    matmul = pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_O))
    async with serve() as stub:
        assert (await status(stub, [GOOD]))[0] is grpc.StatusCode.FAILED_PRECONDITION
        await load(stub, pb.PRECISION_FLOAT32)
        stream = stub.Execute()
        for frame in (GOOD, *frames(2, matmul, np.zeros((1, HIDDEN), np.float32))):
            await stream.write(frame)
        answers = [await stream.read() for _ in range(2)]
        assert [answer.refused for answer in answers] == [grpc.StatusCode.FAILED_PRECONDITION.value[0], 0]
        assert answers[1].HasField("header")
        stream.cancel()


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(32_000, 64), (151_936, 64), (1 << 20, 64), (1 << 21, 32), (1 << 26, 1)]
)
def test_the_most_rows_fit_a_tensor(model_folders: dict[str, Path], vocabulary: int, rows: int) -> None:
    config = replace(ModelConfig.from_hf(model_folders[MODEL]), vocabulary=vocabulary)
    model: Any = SimpleNamespace(config=config)
    header = tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_INT32, shape=(rows, vocabulary))
    frame = pb.ExecuteRequest(id=1, operation=LOOKUP, header=header, data=b"1234")
    reader = CallReader(ring_only=True)
    assert reader.add(frame, model) is None
    frame.header.shape[0] += 1
    with pytest.raises(InvalidArgumentError, match=f"1 to {rows} rows"):
        CallReader(ring_only=True).add(frame, model)
