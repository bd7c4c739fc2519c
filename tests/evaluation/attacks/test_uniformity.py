"""Uniform words pass; each kind of count finds what it is for, and says so with a p that holds."""

import numpy as np
import numpy.typing as npt
import pytest

from evaluation.attacks import uniformity
from evaluation.attacks.knowledge import Fact
from evaluation.attacks.view import View
from evaluation.transcript import Held, Transcript
from tests.evaluation.attacks.ring_views import exchange, uniform
from wire.linears import Linear

RNG = np.random.default_rng(0)
BYTES, WORDS, ROWS = "bytes", "differences of neighbouring words", "differences of neighbouring rows"
BLOCKS, BARE = "blocks that recur", "stretches that look like numbers"


def facts(*tensors: npt.NDArray[np.generic]) -> dict[str, Fact]:
    events = tuple(exchange(one, layer) for layer, one in enumerate(tensors))
    found = uniformity.attack(View(Transcript(events), ()), None)  # type: ignore[arg-type]
    return {one.target: one for one in found if isinstance(one, Fact)}


def p(fact: Fact) -> float:
    from scipy.stats import binomtest

    return binomtest(fact.hits, fact.trials, fact.chance, "greater").pvalue if fact.p is None else fact.p


def test_uniform_words_pass_every_count() -> None:
    found = facts(uniform(RNG, 400, 64), uniform(RNG, 400, 176))
    assert set(found) == {BYTES, WORDS, ROWS, BLOCKS, BARE}
    assert all(fact.hits == 0 for fact in found.values())
    assert all(p(fact) > 1e-6 for fact in found.values())


def test_p_of_uniform_bytes_is_not_too_small_too_often() -> None:
    """A p that holds is below 1 % in 1 % of the cases at most: 3 of 300, and 16 once in ten million."""
    counts = [uniformity.count_bytes(uniform(RNG, 200, 64).view(np.uint32)) for _ in range(300)]
    assert sum(uniformity.chi_square(one) < 0.01 for one in counts) <= 15


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_bare_numbers_fail_every_count(dtype: type) -> None:
    rows: npt.NDArray[np.generic] = np.repeat((RNG.standard_normal((200, 64)) * 1e3).astype(dtype), 2, axis=0)
    found = facts(rows, rows)
    assert all(fact.hits >= 0.95 * fact.trials for fact in found.values())
    assert all(p(fact) < 1e-12 for fact in found.values())


def test_held_floats_are_counted_too() -> None:
    held = Held("residual", 0, RNG.standard_normal((400, 64)).astype(np.float32))
    found = uniformity.attack(View(Transcript((held,)), ()), None)  # type: ignore[arg-type]
    assert found[0].hits == 2  # type: ignore[union-attr]


def test_one_low_bit_of_bias_in_one_place_is_found() -> None:
    rows = uniform(RNG, 400, 64)
    rows[:, ::2] &= ~np.int32(1)
    found = facts(rows, uniform(RNG, 400, 64))
    assert found[BYTES].hits >= 1
    assert p(found[BYTES]) < 1e-12


def test_a_mask_that_steps_is_found() -> None:
    first = uniform(RNG, 400, 1)
    steps = RNG.integers(0, 1 << 20, (400, 64)).cumsum(axis=1).astype(np.int32)
    found = facts(first + steps)
    assert p(found[WORDS]) < 1e-12


def test_a_mask_that_two_rows_share_is_found() -> None:
    rows = np.repeat(uniform(RNG, 300, 64), 2, axis=0) + RNG.integers(-(1 << 20), 1 << 20, (600, 64), np.int32)
    found = facts(rows)
    assert p(found[ROWS]) < 1e-12


def test_one_block_that_recurs_is_found() -> None:
    one, other = uniform(RNG, 200, 64), uniform(RNG, 200, 176)
    other[17, 40:44] = one[3, 8:12]
    found = facts(one, other)
    assert (found[BLOCKS].hits, found[BLOCKS].trials) == (2, 2)
    assert p(found[BLOCKS]) < 1e-12


def test_one_bare_row_among_many_is_found() -> None:
    rows = uniform(RNG, 800, 64)
    rows[321] = RNG.integers(-(1 << 23), 1 << 23, 64)
    found = facts(rows)
    assert found[BARE].hits == 2
    assert p(found[BARE]) < 1e-12
    assert found[BYTES].hits == 0  # too little for counts of all


def test_places_that_are_too_small_count_together() -> None:
    few = [uniform(RNG, 100, 64) for _ in range(3)]
    found = facts(*few)
    assert found[BYTES].trials == 1
    assert BYTES not in facts(few[0])


def test_nothing_sent_is_nothing_found() -> None:
    assert uniformity.attack(View(Transcript(()), ()), None) == []  # type: ignore[arg-type]


def test_rows_of_one_linear_are_one_place() -> None:
    events = tuple(exchange(uniform(RNG, 150, 64), 0, linear) for linear in (Linear.QKV, Linear.QKV, Linear.O))
    (first, *_) = uniformity.attack(View(Transcript(events), ()), None)  # type: ignore[arg-type]
    assert first.trials == 2  # type: ignore[union-attr]  # QKV, and all together; O has too few alone


def test_numbers_beside_the_rows_are_found() -> None:
    """A scale for each row is narrower than any window."""
    scales = np.abs(RNG.standard_normal((64, 1))).astype(np.float32) + np.float32(0.5)
    found = facts(uniform(RNG, 400, 64), scales)
    assert found[BARE].hits == 2
    assert p(found[BARE]) < 1e-12
