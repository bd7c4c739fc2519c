"""Frames become calls only within bounds; the ones that need no server to show."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_worker.calls import CallReader
from wire.codec import MAX_ROWS, header_of
from wire.errors import InvalidArgumentError, PreconditionError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

HEAD = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD))


@pytest.fixture
def model(model_folders: dict[str, Path]) -> Any:
    """As much of a model as the reader looks at."""
    return SimpleNamespace(config=ModelConfig.from_hf(model_folders["llama-untied"]))


def _frame(rows: int, data: bytes) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(id=1, operation=HEAD, header=header_of(np.zeros((rows, 48), np.int32)), data=data)


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
    assert reader.add(pb.ExecuteRequest(id=1, data=bytes(92)), model) is not None
    reader.finish()


def test_without_a_model_there_are_no_calls() -> None:
    with pytest.raises(PreconditionError, match="Load"):
        CallReader(ring_only=True).add(_frame(1, bytes(192)), None)


def test_a_call_keeps_the_model_that_it_was_checked_against(model: Any) -> None:
    reader, another = CallReader(ring_only=True), SimpleNamespace(config=replace(model.config, hidden=8))
    reader.add(_frame(1, bytes(100)), model)
    call = reader.add(pb.ExecuteRequest(id=1, data=bytes(92)), another)  # type: ignore[arg-type]
    assert call is not None
    assert call.model is model
