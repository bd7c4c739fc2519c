"""Every kind of wrong answer is wrong, in every row, and wrong in its own way."""

import numpy as np
import numpy.typing as npt
import pytest

from evaluation.leakage.wrong_answers import KINDS, Case

RNG = np.random.default_rng(0)
M, N, K = 400, 32, 48
WEIGHTS: npt.NDArray[np.int8] = RNG.integers(1, 128, (N, K)).astype(np.int8)
RIGHT: npt.NDArray[np.uint32] = RNG.integers(1, 1 << 32, (M, N), np.uint32)


def case(first: int = 0) -> Case:
    previous = RNG.integers(0, 1 << 32, RIGHT.shape, np.uint32)
    return Case(np.random.default_rng(1), RIGHT.copy(), WEIGHTS, previous, first)


def error(kind: str, first: int = 0) -> npt.NDArray[np.int64]:
    """As signed integers."""
    return (KINDS[kind](case(first)) - RIGHT).view(np.int32).astype(np.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_right_and_the_case_is_untouched(kind: str) -> None:
    mine = case()
    said = KINDS[kind](mine)
    assert said.dtype == np.uint32
    assert said.shape == RIGHT.shape
    assert (said != RIGHT).any(axis=1).all()
    assert np.array_equal(mine.right, RIGHT)


def test_single_bits_reach_every_output_and_every_bit() -> None:
    flips = {(int(j), int(error)) for first in range(0, 32 * N, M) for j, error in _single(first)}
    assert len(flips) >= 32 * N
    assert {j for j, _ in flips} == set(range(N))


def _single(first: int) -> list[tuple[int, int]]:
    flipped = KINDS["a single bit, every output"](case(first)) ^ RIGHT
    assert all(int(row[row != 0][0]).bit_count() == 1 and (row != 0).sum() == 1 for row in flipped)
    return [(int(np.flatnonzero(row)[0]), int(row.max())) for row in flipped]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("one more or less", {1}),
        ("2^31 at one output", {1 << 31}),
        ("a multiple of 2^30 at one output", {1 << 30, 1 << 31}),
        ("a multiple of P at one output", {15, 30, 45}),
    ],
)
def test_one_output_is_off_by_so_much(kind: str, sizes: set[int]) -> None:
    off = error(kind)
    assert ((off != 0).sum(axis=1) == 1).all()
    assert set(np.abs(off).max(axis=1).tolist()) == sizes


def test_errors_cancel_where_they_say() -> None:
    assert not (error("two words that cancel").sum(axis=1) % (1 << 32)).any()
    off = error("two rows that cancel")
    assert not ((off[0::2] + off[1::2]) % (1 << 32)).any()


def test_another_input_is_a_column_of_the_weights() -> None:
    columns = {tuple(column) for column in WEIGHTS.T.tolist()}
    assert {tuple(np.abs(row).tolist()) for row in error("the product of another input")} <= columns
