"""The arithmetic of one masked linear: right, checked, and never twice under the same pad."""

import numpy as np
import pytest

from evaluation.masked import PRIME, MaskedLinear, _limbs, _mod_prime
from wire.errors import VerificationError

pytest.importorskip("numba")
RANDOM = np.random.default_rng(3)


@pytest.fixture(scope="module")
def linear() -> MaskedLinear:
    return MaskedLinear(RANDOM.standard_normal((70, 96)).astype(np.float32))


@pytest.mark.parametrize("peak", [1.0, 1e4])
def test_a_product_is_that_of_the_int8_weights(linear: MaskedLinear, peak: float) -> None:
    x = RANDOM.standard_normal(96).astype(np.float32)
    x[5] = peak
    exact = (linear._weight * linear._scale[:, None]).astype(np.float64) @ x
    assert np.abs(linear.product(x, linear.pad()) - exact).max() < 1e-4 * np.abs(exact).max()


def test_one_changed_word_is_refused(linear: MaskedLinear) -> None:
    x = RANDOM.standard_normal(96).astype(np.float32)
    index, u = linear.pad()
    for word in (0, 69):
        wrong = u.copy()
        wrong[word] += 1
        with pytest.raises(VerificationError):
            linear.product(x, (index, wrong))


def test_every_pad_is_another(linear: MaskedLinear) -> None:
    (first, u), (second, v) = linear.pad(), linear.pad()
    assert first != second
    assert not np.array_equal(u, v)
    assert not np.array_equal(linear._random(first), linear._random(second))


def test_limbs_are_the_number_again() -> None:
    numbers = [0, 1, PRIME - 1, 1 << 32, 123456789]
    assert [_mod_prime(column) for column in _limbs(numbers).T] == numbers
