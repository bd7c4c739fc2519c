"""Bare exchanges with the real GPU worker, over both planes, and with none."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evaluation.bare import WARM, measure
from tests.simulators.served import Served
from wire.errors import UnavailableError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb


@pytest.fixture
def model(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Served]:
    one = Served(model, tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize("plane", ["grpc", "stream"])
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_every_exchange_is_one_call(served: Served, model: Path, plane: str, precision: str) -> None:
    worker = served.client(plane, pb.PRECISION_INT8 if precision == "int8" else pb.PRECISION_FLOAT32)
    worker.connect()
    before = served.traffic.calls
    times = measure(served.target, plane, ModelConfig.from_hf(model), precision, count=5)
    worker.close()
    assert len(times) == 5
    assert all(0 < one < 10 for one in times)
    assert served.traffic.calls - before == WARM + 5


@pytest.mark.parametrize("plane", ["grpc", "stream"])
def test_who_does_not_answer_is_not_available(served: Served, model: Path, tmp_path: Path, plane: str) -> None:
    config = ModelConfig.from_hf(model)
    with pytest.raises(UnavailableError):  # no model is loaded
        measure(served.target, plane, config, "int8", count=1)
    with pytest.raises(UnavailableError):
        measure(f"unix:{tmp_path}/nobody", plane, config, "int8", count=1)
