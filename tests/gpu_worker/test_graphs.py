"""Rooms and replays around the Triton kernel, with torch's product in the kernel's place: triton need not be there."""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import gpu_worker.kernels
from gpu_worker.kernels import cuda

I32 = npt.NDArray[np.int32]
NAME = "gpu_worker.kernels.triton_ring"


class Kernel(ModuleType):
    """What graphs.py needs of triton_ring; counts its launches."""

    launches = 0

    def device_of(self, b: torch.Tensor) -> None:
        """No device."""

    def plan(self, m: int, k: int, n: int, device: None) -> str:
        return f"{m}x{k}x{n}"

    def multiply(self, z: torch.Tensor, b: torch.Tensor, y: torch.Tensor, planes: torch.Tensor, how: str) -> None:
        assert how == f"{len(z)}x{b.shape[0]}x{b.shape[1]}"
        assert planes.shape == (4 * len(z), len(b))
        assert y.is_contiguous()
        self.launches += 1
        y.copy_(cuda.ring_matmul(z, b.t()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(NAME)
    monkeypatch.setitem(sys.modules, NAME, made)
    monkeypatch.setattr(gpu_worker.kernels, "triton_ring", made, raising=False)
    return made


@pytest.fixture
def graphs(kernel: Kernel) -> Any:
    """graphs.py under another name, so that nobody else finds this one."""
    spec = importlib.util.spec_from_file_location("graphs_over_torch", Path(cuda.__file__).with_name("graphs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _operands(m: int, k: int, n: int, seed: int = 0) -> tuple[I32, torch.Tensor, I32]:
    random = np.random.default_rng((seed, m, k, n))
    z = random.integers(-(1 << 31), 1 << 31, (m, k)).astype(np.int32)
    w = random.integers(-128, 128, (n, k)).astype(np.int8)
    return z, torch.from_numpy(w), (z.astype(np.int64) @ w.astype(np.int64).T).astype(np.int32)


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 33, 64])
def test_products_are_exact_and_answers_stay(graphs: Any, m: int) -> None:
    """An answer is not overwritten by the next one, which takes the same room."""
    found = graphs.TritonProducts("cpu")
    answers = []
    for seed in range(3):
        z, w, expected = _operands(m, 40, 24, seed)
        z.setflags(write=False)  # as it comes off the wire
        answers += [(found.matmul(z, w), expected), (found.lookup(z, w.t().contiguous()), expected)]
    for answer, expected in answers:
        assert answer.dtype == np.int32
        np.testing.assert_array_equal(answer, expected)


def test_few_rows_are_captured_once_for_each_matrix_and_number_of_rows(
    graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        return work

    monkeypatch.setattr(graphs, "_repeat", capture)
    found = graphs.TritonProducts("cpu")
    (z, w, _), (_, other, _) = _operands(4, 40, 24), _operands(4, 40, 24, seed=1)
    for _ in range(3):
        for weights in (w, other):
            found.matmul(z, weights)
            found.matmul(z[:2], weights)
    assert len(captured) == 4
    found.lookup(z[:, :24].copy(), w)  # the same memory as a table: another product
    assert len(captured) == 5
    found.matmul(np.zeros((graphs.GRAPH_ROWS + 1, 40), np.int32), w)
    assert len(captured) == 5


def test_graphs_are_bounded_and_the_one_in_use_stays(
    graphs: Any, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    found = graphs.TritonProducts("cpu")
    operands = [_operands(1, 16, 8, seed) for seed in range(3)]
    for turn in (0, 1, 0, 2, 0, 1):
        z, w, expected = operands[turn]
        np.testing.assert_array_equal(found.matmul(z, w), expected)
        assert len(found._replays) <= 2
        assert operands[0][1].data_ptr() in {key[0] for key in found._replays}
    assert kernel.launches == 6


def test_rooms_are_few(graphs: Any) -> None:
    found = graphs.TritonProducts("cpu")
    for m in range(1, 65):
        z, w, expected = _operands(m, 16, 8)
        np.testing.assert_array_equal(found.matmul(z, w), expected)
    assert sorted(found._rooms) == [(16, 16, 8), (32, 16, 8), (64, 16, 8)]


def test_a_replay_keeps_its_weights(graphs: Any) -> None:
    """Else their address could become another matrix's."""
    found = graphs.TritonProducts("cpu")
    z, w, _ = _operands(1, 16, 8)
    found.matmul(z, w)
    ((_, kept),) = found._replays.values()
    assert kept.data_ptr() == w.data_ptr()


def test_rooms_serve_inside_inference_mode_and_outside(graphs: Any) -> None:
    """The self-check runs outside, the compute thread inside; either may be first."""
    for first in (True, False):
        found = graphs.TritonProducts("cpu")
        for m in (1, 17):
            for inside in (first, not first):
                z, w, expected = _operands(m, 16, 8)
                with torch.inference_mode(inside):
                    np.testing.assert_array_equal(found.matmul(z, w), expected)


class Graph:
    """A CUDA graph that keeps what was done, and what the work did."""

    def __init__(self, story: list[str]) -> None:
        self._story = story

    def capture_begin(self, capture_error_mode: str) -> None:
        self._story.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        self._story.append("end")

    def replay(self) -> None:
        self._story.append("replay")


def test_work_is_done_once_before_it_is_captured(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling and loading a kernel would end a capture. One that fails does not stay open."""
    story: list[str] = []

    def work() -> None:
        if "begin thread_local" in story and story[0] == "fails":
            raise RuntimeError
        story.append("work")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(story))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graphs.capture(work)()
    assert story == ["work", "begin thread_local", "work", "end", "replay"]
    story[:] = ["fails"]
    with pytest.raises(RuntimeError):
        graphs.capture(work)
    assert story == ["fails", "work", "begin thread_local", "end"]
