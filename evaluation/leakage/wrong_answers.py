"""Every way of being wrong that a GPU worker's answers are tried with, as words modulo 2^32.

What is added to an answer is added to what the trusted worker recovers from it, so all but a replay can be tried on
the products themselves. A multiple of 2^31 passes Freivalds' check in the ring itself half of the time; one of P would
pass it modulo P, if an answer could hold one; errors that cancel in a row or between rows pass sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]

PRIME_MOD_RING = 15  # of P = 2^32 + 15


@dataclass(frozen=True)
class Case:
    """Right products uint32 [m, n] of int8 weights [n, k], and what a replayed answer would be recovered as.

    `first`: how many rows were tried before, so that places can be gone through in order.
    """

    rng: np.random.Generator
    right: U32
    weights: npt.NDArray[Any]
    previous: U32
    first: int = 0


Wrong = Callable[[Case], U32]


def _random(case: Case) -> U32:
    return case.rng.integers(0, 1 << 32, case.right.shape, np.uint32)


def _one_bit(case: Case) -> U32:
    """Of every output in turn, and of all of them every bit in turn."""
    outputs = case.right.shape[1]
    turn = case.first + np.arange(len(case.right))
    wrong, bit = case.right.copy(), (turn // outputs % 32).astype(np.uint32)
    wrong[np.arange(len(wrong)), turn % outputs] ^= np.uint32(1) << bit
    return wrong


def _added(case: Case, amounts: tuple[int, ...]) -> U32:
    """One of some amounts at one place of each row."""
    wrong, rows = case.right.copy(), np.arange(len(case.right))
    choices = np.array([amount % (1 << 32) for amount in amounts], np.uint32)
    wrong[rows, case.rng.integers(0, wrong.shape[1], len(wrong))] += case.rng.choice(choices, len(wrong))
    return wrong


def _sparse(case: Case) -> U32:
    """About one word in a hundred, at least one."""
    wrong = np.where(case.rng.random(case.right.shape) < 0.01, _random(case), case.right)
    same = np.flatnonzero((wrong == case.right).all(axis=1))
    wrong[same, 0] += np.uint32(1)
    return wrong


def _within_a_row(case: Case) -> U32:
    """One amount at one place, its opposite at the next: the row's sum stays."""
    wrong, rows = case.right.copy(), np.arange(len(case.right))
    place = case.rng.integers(0, wrong.shape[1], len(wrong))
    amount = case.rng.integers(1, 1 << 32, len(wrong), np.uint32)
    wrong[rows, place] += amount
    wrong[rows, (place + 1) % wrong.shape[1]] -= amount
    return wrong


def _between_rows(case: Case) -> U32:
    """A row of noise added to one row and taken from the next: the sums over rows stay."""
    wrong, even = case.right.copy(), len(case.right) // 2 * 2
    noise = _random(case)[0:even:2]
    wrong[0:even:2] += noise
    wrong[1:even:2] -= noise
    return wrong


def _other_input(case: Case) -> U32:
    """The right product of another row: one input is one more, or less."""
    columns = case.weights[:, case.rng.integers(0, case.weights.shape[1], len(case.right))].T
    signs = case.rng.choice(np.array([-1, 1], np.int32), len(case.right))[:, None]
    wrong: U32 = case.right + (columns * signs).astype(np.int32).view(np.uint32)
    return wrong


KINDS: dict[str, Wrong] = {
    "random words": _random,
    "a single bit, every output": _one_bit,
    "one more or less": partial(_added, amounts=(1, -1)),
    "2^31 at one output": partial(_added, amounts=(1 << 31,)),
    "a multiple of 2^30 at one output": partial(_added, amounts=(1 << 30, 2 << 30, 3 << 30)),
    "a multiple of P at one output": partial(_added, amounts=tuple(PRIME_MOD_RING * k for k in (-2, -1, 1, 2, 3))),
    "one word in a hundred": _sparse,
    "two words that cancel": _within_a_row,
    "two rows that cancel": _between_rows,
    "the product of another input": _other_input,
    "rows swapped": lambda case: np.roll(case.right, 1, axis=0),
    "an old answer": lambda case: case.previous,
    "zeros": lambda case: np.zeros_like(case.right),
}
