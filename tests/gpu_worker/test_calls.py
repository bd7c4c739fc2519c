"""Frames become calls only within bounds; the ones that need no server to show."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_worker.calls import Call, CallReader
from tests.gpu_worker.calling import HIDDEN, MODEL, QK_WIDTH
from tests.gpu_worker.peer import attend, embed, finish, head, project
from wire.codec import MAX_ROWS, Array, header_of
from wire.errors import DeniedError, InvalidArgumentError, PreconditionError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

LM_HEAD = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))


@pytest.fixture
def model(model_folders: dict[str, Path]) -> Any:
    """As much of a model as the reader looks at."""
    return SimpleNamespace(config=ModelConfig.from_hf(model_folders[MODEL]))


def _frame(rows: int, data: bytes) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(id=1, operation=LM_HEAD, header=header_of(np.zeros((rows, HIDDEN), np.int32)), data=data)


def test_an_answer_that_no_tensor_holds_is_refused(model: Any) -> None:
    model.config = replace(model.config, vocabulary=400_000)
    with pytest.raises(InvalidArgumentError, match="fewer rows"):
        CallReader(ring_only=True).add(_frame(MAX_ROWS, b"0" * 4), model)
    spans = [pb.SequenceRows(sequence=1, rows=MAX_ROWS)]
    operation = pb.Operation(forward=pb.Forward(sequences=spans, logit_rows=range(MAX_ROWS)))
    frame = pb.ExecuteRequest(id=1, operation=operation, header=header_of(np.zeros(MAX_ROWS, np.int32)))
    with pytest.raises(InvalidArgumentError, match="fewer rows"):
        CallReader(ring_only=False).add(frame, model)


def test_a_stream_that_ends_within_a_call_is_malformed(model: Any) -> None:
    reader = CallReader(ring_only=True)
    reader.finish()
    assert reader.add(_frame(1, bytes(100)), model) is None
    with pytest.raises(InvalidArgumentError, match="within a call"):
        reader.finish()
    assert reader.add(pb.ExecuteRequest(id=1, data=bytes(4 * HIDDEN - 100)), model) is not None
    reader.finish()


def test_without_a_model_there_are_no_calls() -> None:
    with pytest.raises(PreconditionError, match="Load"):
        CallReader(ring_only=True).add(_frame(1, bytes(4 * HIDDEN)), None)


def test_a_call_keeps_the_model_that_it_was_checked_against(model: Any) -> None:
    reader, another = CallReader(ring_only=True), SimpleNamespace(config=replace(model.config, hidden=8))
    reader.add(_frame(1, bytes(100)), model)
    call = reader.add(pb.ExecuteRequest(id=1, data=bytes(4 * HIDDEN - 100)), another)  # type: ignore[arg-type]
    assert call is not None
    assert call.model is model


def _chain(model: Any, steps: list[pb.Step], array: Array) -> Call | None:
    """One frame with a chain, and all of its tensor."""
    operation = pb.Operation(chain=pb.Chain(steps=steps))
    frame = pb.ExecuteRequest(id=1, operation=operation, header=header_of(array), data=array.tobytes())
    return CallReader(ring_only=False).add(frame, model)


IDS, A, QK = np.zeros(2, np.int32), np.zeros((2, HIDDEN), np.float32), np.zeros((2, QK_WIDTH), np.float32)
EMBED = embed({1: [0], 7: [0]})
TWICE = pb.Step(embed=pb.Embed(sequences=[*EMBED.embed.sequences] * 2))
CHAINS: dict[str, tuple[list[pb.Step], Array]] = {
    "no step": ([], IDS),
    "an empty step": ([pb.Step()], IDS),
    "an empty step behind": ([EMBED, pb.Step()], IDS),
    "too many steps": ([attend(0), finish(0), project(1), attend(1), finish(1)], QK),
    "only embed": ([EMBED], IDS),
    "a first step that takes nothing": ([project(0)], A),
    "head alone": ([head([0])], A),
    "a last step that gives nothing": ([attend(0), finish(0)], QK),
    "a step left out": ([EMBED, attend(0)], IDS),
    "another layer": ([finish(0), project(2)], A),
    "a layer twice": ([finish(0), project(0)], A),
    "backwards": ([attend(0), project(0)], QK),
    "embed behind": ([finish(2), EMBED], A),
    "head before its time": ([finish(1), head([0])], A),
    "layer out of range": ([attend(3)], QK),
    "huge layer": ([attend((1 << 32) - 1)], QK),
    "ids of another dtype": ([EMBED, project(0)], IDS.astype(np.float32)),
    "ids of another rank": ([EMBED, project(0)], IDS[:, None]),
    "fewer ids than rows": ([EMBED, project(0)], IDS[:1]),
    "embed without sequences": ([embed({}), project(0)], IDS[:0]),
    "embed of a sequence without rows": ([embed({1: [0, 0], 2: []}), project(0)], IDS),
    "embed of more rows than a call has": ([embed({1: [0] * (MAX_ROWS + 1)}), project(0)], np.zeros(257, np.int32)),
    "a sequence twice": ([TWICE, project(0)], np.zeros(4, np.int32)),
    "attention where q and k belong": ([attend(0)], A),
    "q and k where attention belongs": ([finish(0), project(1)], QK),
    "integers": ([attend(0)], QK.astype(np.int32)),
    "no rows": ([attend(0)], QK[:0]),
    "logits of a row that is not there": ([finish(2), head([2])], A),
    "more logits than rows": ([finish(2), head([0, 0, 1])], A),
}


@pytest.mark.parametrize(("steps", "array"), CHAINS.values(), ids=CHAINS)
def test_chains_that_make_no_sense(model: Any, steps: list[pb.Step], array: Array) -> None:
    with pytest.raises(InvalidArgumentError):
        _chain(model, steps, array)


def test_chains_that_make_sense(model: Any) -> None:
    for steps, array in (
        ([EMBED, project(0), attend(0)], IDS),
        ([attend(0)], QK),
        ([attend(1), finish(1), project(2), attend(2)], QK),
        ([attend(2), finish(2), head([])], QK),
        ([finish(2), head([1, 1])], A),
    ):
        assert _chain(model, steps, array) is not None


def test_logits_that_no_tensor_holds_are_refused(model: Any) -> None:
    model.config = replace(model.config, vocabulary=1 << 20)
    assert _chain(model, [finish(2), head(range(64))], np.zeros((256, HIDDEN), np.float32)) is not None
    with pytest.raises(InvalidArgumentError, match="fewer rows"):
        _chain(model, [finish(2), head(range(65))], np.zeros((256, HIDDEN), np.float32))


def test_a_provisioned_parameter_bounds_its_rows_and_nothing_else_does(model: Any) -> None:
    model.config = replace(model.config, vocabulary=2000)
    provision = pb.Provision(kind=pb.PARAMETER_KIND_EMBEDDING, first_row=500)
    for rows, fits in ((1500, True), (1501, False)):
        array = np.zeros((rows, HIDDEN), np.float32)
        frame = pb.ExecuteRequest(id=1, operation=pb.Operation(provision=provision), header=header_of(array))
        frame.data = array.tobytes()
        if fits:
            assert CallReader(ring_only=False).add(frame, model) is not None
        else:
            with pytest.raises(InvalidArgumentError, match="1500 rows"):
                CallReader(ring_only=False).add(frame, model)


@pytest.mark.parametrize(
    "operation",
    [
        pb.Operation(matmul=pb.Matmul()),
        pb.Operation(forward=pb.Forward()),
        pb.Operation(chain=pb.Chain()),
        pb.Operation(provision=pb.Provision()),
        pb.Operation(cache=pb.Cache()),
    ],
)
def test_ring_only_denies_before_it_looks(model: Any, operation: pb.Operation) -> None:
    with pytest.raises(DeniedError):
        CallReader(ring_only=True).add(pb.ExecuteRequest(id=1, operation=operation), model)
