"""Ring products have the bits that int64 gives, on the CPU kernels and through the digits of the CUDA path."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.kernels import cpu, cuda, layers
from gpu_worker.kernels.vectors import LINE

SHAPES = [
    *[(m, k, n) for m in (1, 2, 3, 4, 5, 8, 13) for k, n in ((1, 1), (7, 3), (64, 33), (33, 130))],
    (1, cpu.DEPTH, 5),
    (4, cpu.DEPTH + 1, 37),
    (6, 2 * cpu.DEPTH + 17, cpu.BLOCK),
    (1, 896, 1152),
    (64, 200, 255),
]
TABLES = [  # m rows over a table [v, d]
    *[(m, v, d) for m in (1, 3, 5, 16) for v, d in ((1, 1), (3, 7), (33, 64), (130, 33), (301, 65))],
    (2, cpu.BLOCK, cpu.DEPTH + 1),
    (5, cpu.BLOCK + 1, 2 * cpu.DEPTH + 17),
    (1, cpu.SMALL // 64 + 3, 64),
    (3, 40_003, 9),
    (16, 2003, 896),
]
EXTREMES = np.array([-(1 << 31), (1 << 31) - 1, -1, 0, 1, 127, 128, -128, -129, 0x7FFF8000], np.int32)


def _reference(z: npt.NDArray[np.int32], w: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    return (z.astype(np.int64) @ w.astype(np.int64).T).astype(np.int32)


def _operands(m: int, k: int, n: int, seed: int = 0) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    random = np.random.default_rng((seed, m, k, n))
    z = random.integers(-(1 << 31), 1 << 31, (m, k)).astype(np.int32)
    return z, random.integers(-128, 128, (n, k)).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_kernels_equal_int64(shape: tuple[int, int, int]) -> None:
    z, w = _operands(*shape)
    expected = _reference(z, w)
    np.testing.assert_array_equal(cpu.matmul(z, w), expected)
    np.testing.assert_array_equal(cuda.ring_matmul(torch.from_numpy(z), torch.from_numpy(w)).numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([-128, -127, 127, 0]),
    st.integers(0, 1 << 30),
)
def test_extreme_words_wrap_around(m: int, k: int, n: int, weight: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    z = random.choice(EXTREMES, (m, k))
    w = np.where(random.random((n, k)) < 0.5, weight, random.integers(-128, 128, (n, k))).astype(np.int8)
    expected = _reference(z, w)
    np.testing.assert_array_equal(cpu.matmul(z, w), expected)
    np.testing.assert_array_equal(cuda.ring_matmul(torch.from_numpy(z), torch.from_numpy(w)).numpy(), expected)


def _both_lookups(z: npt.NDArray[np.int32], table: npt.NDArray[np.int8]) -> list[npt.NDArray[np.int32]]:
    return [cpu.lookup(z, table), cuda.ring_lookup(torch.from_numpy(z), torch.from_numpy(table)).numpy()]


@pytest.mark.parametrize("shape", TABLES, ids=str)
def test_both_lookups_equal_int64(shape: tuple[int, int, int]) -> None:
    z, transposed = _operands(*shape)
    expected = _reference(z, transposed)
    for answer in _both_lookups(z, np.ascontiguousarray(transposed.T)):
        assert answer.dtype == np.int32
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_table_is_cut_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """And read whole where fewer rows than threads are left."""
    monkeypatch.setattr(cpu, "SMALL", 1)
    monkeypatch.setattr(cpu, "get_num_threads", lambda: threads)
    for v in (1, 3, 8, 500):
        z, transposed = _operands(3, v, 70)
        np.testing.assert_array_equal(cpu.lookup(z, np.ascontiguousarray(transposed.T)), _reference(z, transposed))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.sampled_from([-128, -127, 127, 0]), st.integers(0, 99)
)
def test_lookups_of_extreme_words_wrap_around(m: int, v: int, d: int, weight: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    z = random.choice(EXTREMES, (m, v))
    table = np.where(random.random((v, d)) < 0.5, weight, random.integers(-128, 128, (v, d))).astype(np.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_TILE", 17)
        for answer in _both_lookups(z, table):
            np.testing.assert_array_equal(answer, _reference(z, table.T))


def test_a_one_hot_row_and_a_pad_give_a_row_of_the_table() -> None:
    """What the operation is for: the pad's own lookup comes off again."""
    pad, transposed = _operands(2, 301, 64)
    table = np.ascontiguousarray(transposed.T)
    masked = pad.copy()
    masked[[0, 1], [7, 300]] += 1  # wraps
    for answer, alone in zip(_both_lookups(masked, table), _both_lookups(pad, table), strict=True):
        np.testing.assert_array_equal(answer - alone, table[[7, 300]])


def test_digits_are_balanced_and_weigh_up_to_the_word() -> None:
    words = torch.from_numpy(np.concatenate([EXTREMES, _operands(1, 500, 1)[0][0]]))[None]
    parts = cuda.digits(words)
    assert parts.dtype is torch.int8
    assert torch.equal(cuda.combine(parts.to(torch.int32)), words)


@pytest.mark.parametrize(("k", "n"), [(1, 5), (LINE, 7), (LINE + 3, 33), (cpu.DEPTH + LINE + 1, 130)])
def test_every_number_of_rows_over_every_edge_of_a_tile(k: int, n: int) -> None:
    """And whatever lay in the output before; on one core and on all."""
    for m in range(1, 34):
        z, w = _operands(m, k, n, seed=1)
        expected, poison = _reference(z, w), np.full((m, n), 0x55555555, np.int32)
        for size in (4, cpu.BLOCK):
            y = poison.copy()
            cpu.product(z, w, y, size)
            np.testing.assert_array_equal(y, expected)
            y = poison.copy()
            cpu._product_on_all_cores(z, w, y, size, np.zeros(1, np.int64), 3)
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("weights", [np.int8, np.float32])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 70), (2, 65, 3), (5, 1300, 33), (16, 96, 40), (33, 1280, 70)])
def test_float_products_are_close_to_float64(m: int, k: int, n: int, weights: type) -> None:
    w: npt.NDArray[Any] = _operands(m, k, n)[1].astype(weights)
    x = np.random.default_rng(3).standard_normal((m, k)).astype(np.float32)
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(cpu.matmul(x, w), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    table = np.ascontiguousarray(w.T)
    np.testing.assert_allclose(cpu.lookup(x, table), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("weights", [np.int8, np.float32])
def test_a_row_has_the_same_result_in_any_batch(weights: type) -> None:
    """A tile adds up in the same order, whatever its shape."""
    w: npt.NDArray[Any] = _operands(1, 1300, 37)[1].astype(weights)
    x = np.random.default_rng(3).standard_normal((9, 1300)).astype(np.float32)
    np.testing.assert_array_equal(cpu.matmul(x, w), np.concatenate([cpu.matmul(x[i : i + 1], w) for i in range(9)]))


def test_operands_that_do_not_fit_are_refused() -> None:
    z, w = _operands(2, 8, 3)
    for bad_z, bad_w in (
        (z[:, :7], w),
        (z.astype(np.int64), w),
        (z, w.astype(np.int32)),
        (z[0], w),
        (np.asfortranarray(z), w),
    ):
        with pytest.raises(ValueError, match="operands"):
            cpu.matmul(bad_z, bad_w)
    table = np.ascontiguousarray(w.T)
    for bad_z, bad_table in (
        (z[:, :7], table),
        (z.astype(np.int64), table),
        (z, table.astype(np.int32)),
        (z[0], table),
        (np.asfortranarray(z), table),
        (z, w.T),
    ):
        with pytest.raises(ValueError, match="operands"):
            cpu.lookup(bad_z, bad_table)
    with pytest.raises(ValueError, match="operands"):
        cuda.ring_lookup(torch.zeros((1, 8), dtype=torch.float32), torch.zeros((8, 3), dtype=torch.int8))
    with pytest.raises(ValueError, match="operands"):
        cuda.ring_lookup(torch.zeros((1, 9), dtype=torch.int32), torch.zeros((8, 3), dtype=torch.int8))
    with pytest.raises(ValueError, match="operands"):
        cuda.ring_matmul(torch.zeros((1, 8), dtype=torch.int64), torch.zeros((3, 8), dtype=torch.int8))
    with pytest.raises(ValueError, match="operands"):
        cuda.ring_matmul(torch.zeros((1, 9), dtype=torch.int32), torch.zeros((3, 8), dtype=torch.int8))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The self check with 5 rows at most: many take seconds on a CPU. Gives the shapes that it asks for."""
    asked: list[tuple[int, int, int]] = []

    def check(m: int, k: int, n: int, device: str, found: cuda.Products) -> bool:
        asked.append((m, k, n))
        return right(min(m, 5), min(k, 900) if m < 100 else k, min(n, 900), device, found)

    right = cuda.check_shape
    monkeypatch.setattr("sys.argv", ["check"])
    _without_triton(monkeypatch)
    monkeypatch.setattr(cuda, "check_shape", check)
    return asked


def test_self_check_passes_here(few_rows: list[tuple[int, int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main() == 0
    assert "bit for bit" in capsys.readouterr().out
    assert max(few_rows)[0] >= 256
    assert max(k for _, k, _ in few_rows) > cuda._TILE


def test_self_check_notices_a_wrong_bit(
    few_rows: list[tuple[int, int, int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cuda.combine
    monkeypatch.setattr(cuda, "combine", lambda parts: right(parts) ^ 1)
    assert cuda.main() == 1
    assert capsys.readouterr().out.count("MISMATCH") == len(few_rows)


def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpu_worker.kernels.graphs", None)


def test_without_triton_torch_computes_and_the_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_triton(monkeypatch)
    found = cuda.products("cpu")
    assert found.name == "int8 GEMM of torch (triton is not installed)"
    z, w = _operands(5, 40, 24)
    weights = torch.from_numpy(w)
    found.warm_up(weights)
    np.testing.assert_array_equal(found.matmul(z, weights), _reference(z, w))
    np.testing.assert_array_equal(found.lookup(z, weights.t().contiguous()), _reference(z, w))


class _Broken:
    """Triton on a machine where it does not work."""

    name = "triton"

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def matmul(self, z: npt.NDArray[np.int32], w: torch.Tensor) -> npt.NDArray[np.int32]:
        if self._error is not None:
            raise self._error
        return _reference(z, w.numpy()) ^ 1

    def lookup(self, z: npt.NDArray[np.int32], table: torch.Tensor) -> npt.NDArray[np.int32]:
        return _reference(z, table.numpy().T)


@pytest.mark.parametrize(
    ("error", "reason"), [(None, "triton gives wrong words here"), (OSError(), "triton fails here: OSError")]
)
def test_where_triton_does_not_work_torch_computes(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, reason: str
) -> None:
    module: Any = ModuleType("graphs")
    module.TritonProducts = lambda device: _Broken(error)
    monkeypatch.setitem(sys.modules, "gpu_worker.kernels.graphs", module)
    assert cuda.products("cpu").name == f"int8 GEMM of torch ({reason})"


def test_timing_asks_for_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _without_triton(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["check", "--time"])
    assert cuda.main() == 1
    assert "need a CUDA device" in capsys.readouterr().out


def test_the_kernels_of_a_device_need_torch_numpy_and_triton_only() -> None:
    """So that they can be copied to a machine that has nothing else: no numba, no gRPC."""
    known = {"torch", "numpy", "triton", "gpu_worker"}
    for name in ("cuda", "graphs", "timing", "triton_ring"):
        tree = ast.parse(Path(cuda.__file__).with_name(f"{name}.py").read_text())
        for node in ast.walk(tree):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in known | sys.stdlib_module_names, (name, module)
                assert not module.startswith("gpu_worker") or module.startswith("gpu_worker.kernels"), (name, module)


def test_no_two_kernels_share_a_place_in_the_cache() -> None:
    """numba keeps one compiled function for one source, parallel or not: the first one's would serve both."""
    kernels = {**vars(cpu), **vars(layers)}
    codes = [one.py_func.__code__ for one in kernels.values() if hasattr(one, "py_func")]
    assert {cpu.product.py_func.__code__, cpu._product_on_all_cores.py_func.__code__} < {*codes}
    assert len({*codes}) == len(codes)


def test_without_a_place_for_compiled_code_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **_: bool) -> Callable[[object], object]:
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(cpu, "njit", njit)
    assert cpu.kernel()(abs) == ("compiled", abs)
