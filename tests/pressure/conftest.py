"""What the tests of small memory budgets share."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evaluation.shapes import make
from tests.conftest import Rig, build, forward, one_run
from tests.faults.fleet import DEMO
from tests.pressure.processes import gpu_worker
from wire.model_config import ModelConfig

Answer = Callable[..., list[int]]


@pytest.fixture(scope="package")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the GPU worker of the demo model listens."""
    with gpu_worker(tmp_path_factory.mktemp("gpu")) as address:
        yield address


@pytest.fixture(scope="package")
def answer() -> Answer:
    """`answer(prompt, count, kv)`: what the demo model says when memory is plentiful. Every scheme says the same."""
    rigs: dict[str, Rig] = {}

    def find(prompt: list[int], count: int, kv: str = "float32") -> list[int]:
        if kv not in rigs:
            rigs[kv] = build(DEMO, "tee-only", budget=64 << 20, flags=("--kv-dtype", kv))
        rig = rigs[kv]
        cache, said = rig.scheme.open(len(prompt) + count), list[int]()
        for start in range(0, len(prompt), rig.rows):
            logits = forward(rig.scheme, one_run(cache, prompt[start : start + rig.rows], start))
        while len(said) < count and not set(rig.config.eos).intersection(said):
            said.append(int(logits[-1].argmax()))
            logits = forward(rig.scheme, one_run(cache, said[-1:], cache.length))
        cache.free()
        return said

    return find


@pytest.fixture(scope="package")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the demo model's sizes, with random weights, for a context of 16,384 tokens."""
    folder = tmp_path_factory.mktemp("long") / "long"
    raw = json.loads((DEMO / "config.json").read_text()) | {"max_position_embeddings": 16384}
    make(folder, raw, ModelConfig.from_dict("long", raw, {}), lambda *_: None)
    return folder
