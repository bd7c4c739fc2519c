"""What the tests of small memory budgets share."""

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Rig, build, forward, one_run
from tests.faults.fleet import DEMO
from tests.pressure.processes import gpu_worker

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
