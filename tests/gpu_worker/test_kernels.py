"""The ring product has the bits that int64 gives, on the CPU kernel and through the digits of the CUDA path."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.kernels import cpu, cuda

SHAPES = [
    *[(m, k, n) for m in (1, 2, 3, 4, 5, 8, 13) for k, n in ((1, 1), (7, 3), (64, 33), (33, 130))],
    (1, cpu.DEPTH, 5),
    (4, cpu.DEPTH + 1, 37),
    (6, 2 * cpu.DEPTH + 17, cpu.BLOCK),
    (1, 896, 1152),
    (64, 200, 255),
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


def test_digits_are_balanced_and_weigh_up_to_the_word() -> None:
    words = torch.from_numpy(np.concatenate([EXTREMES, _operands(1, 500, 1)[0][0]]))[None]
    parts = cuda.digits(words)
    assert parts.dtype is torch.int8
    assert torch.equal(cuda.combine(parts.to(torch.int32)), words)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 70), (2, 65, 3), (5, 1300, 33), (16, 96, 40)])
def test_float_product_is_close_to_float64(m: int, k: int, n: int) -> None:
    _, w = _operands(m, k, n)
    x = np.random.default_rng(3).standard_normal((m, k)).astype(np.float32)
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(cpu.matmul(x, w), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


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
            cpu.matmul(bad_z, bad_w)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="operands"):
        cuda.ring_matmul(torch.zeros((1, 8), dtype=torch.int64), torch.zeros((3, 8), dtype=torch.int8))
    with pytest.raises(ValueError, match="operands"):
        cuda.ring_matmul(torch.zeros((1, 9), dtype=torch.int32), torch.zeros((3, 8), dtype=torch.int8))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The self check with 5 rows at most: many take seconds on a CPU. Gives the shapes that it asks for."""
    asked: list[tuple[int, int, int]] = []

    def check(m: int, k: int, n: int, device: str) -> bool:
        asked.append((m, k, n))
        return right(min(m, 5), k, n, device)

    right = cuda.check_shape
    monkeypatch.setattr("sys.argv", ["check"])
    monkeypatch.setattr(cuda, "check_shape", check)
    return asked


def test_self_check_passes_here(few_rows: list[tuple[int, int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main() == 0
    assert "bit for bit" in capsys.readouterr().out
    assert max(few_rows)[0] >= 256


def test_self_check_notices_a_wrong_bit(
    few_rows: list[tuple[int, int, int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cuda.combine
    monkeypatch.setattr(cuda, "combine", lambda parts: right(parts) ^ 1)
    assert cuda.main() == 1
    assert capsys.readouterr().out.count("MISMATCH") == len(few_rows)


def test_without_a_place_for_compiled_code_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **_: bool) -> Callable[[object], object]:
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(cpu, "njit", njit)
    assert cpu._kernel()(abs) == ("compiled", abs)
