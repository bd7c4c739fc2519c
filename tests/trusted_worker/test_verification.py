"""Freivalds' check: limbs against big integers, right rows at the edge of the ring, and every way to be wrong."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.arithmetic import I32, X_LIMIT, Y_LIMIT
from trusted_worker.secure_memory import SecureMemory
from trusted_worker.verification import (
    C_BITS,
    C_LIMBS,
    INPUT_LIMIT,
    OUTPUT_BLOCK,
    PRIME,
    S_BITS,
    S_LIMBS,
    Verifier,
    combine,
    limbs,
)
from wire.errors import PreconditionError
from wire.linears import Linear, LinearSpec

CASES = settings(deadline=None, max_examples=100, derandomize=True)
EDGES = [0, 1, 2, PRIME // 2 - 1, PRIME // 2, PRIME // 2 + 1, PRIME - 2, PRIME - 1, 2**31, 2**32 - 1, 2**32]
FORMS = [(S_BITS, S_LIMBS), (C_BITS, C_LIMBS)]
K, N, M = 48, 70, 3

residues = st.one_of(st.sampled_from(EDGES), st.integers(0, PRIME - 1))


class Product:
    """One linear with a verifier, and a right answer to start from."""

    def __init__(self, n: int = N, k: int = K, m: int = M, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.spec = LinearSpec(0, Linear.QKV, k, n)
        self.weights: npt.NDArray[np.int8] = self.random.integers(-127, 128, (n, k)).astype(np.int8)
        self.verifier = Verifier(SecureMemory(8 << 20), [self.spec])
        self.prepare()
        limit = min(X_LIMIT - 1, int(Y_LIMIT / 127 / k))
        self.x: I32 = self.random.integers(-limit, limit + 1, (m, k)).astype(np.int32)
        self.y = self.exact(self.x)

    def prepare(self) -> None:
        """c, from tiles of uneven sizes."""
        cuts = [0, len(self.weights) // 3, len(self.weights) // 3 + 1, len(self.weights)]
        tiles = [(a, self.weights[a:b]) for a, b in pairwise(cuts)]
        self.verifier.prepare(self.spec, tiles)

    def exact(self, x: I32) -> npt.NDArray[np.int64]:
        """The right answer, in int64."""
        return x.astype(np.int64) @ self.weights.astype(np.int64).T

    def accepts(self, y: npt.NDArray[Any]) -> bool:
        """The verdict on an answer, reduced to the ring as an answer of the worker is."""
        return self.verifier.accepts(self.spec, self.x, (y.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32).view("<i4"))


@pytest.fixture(scope="module")
def product() -> Product:
    return Product()


@pytest.mark.parametrize(("bits", "count"), FORMS)
@given(st.lists(residues, min_size=1, max_size=30))
@CASES
def test_limbs_are_balanced_digits_of_the_value(bits: int, count: int, values: list[int]) -> None:
    digits = limbs(values, bits, count)
    assert digits.shape == (count, len(values))
    assert np.abs(digits.astype(np.int64)).max() <= 1 << (bits - 1)
    for column, value in enumerate(values):
        weighted = sum(int(digits[i, column]) << (bits * i) for i in range(count))
        assert weighted % PRIME == value


@pytest.mark.parametrize(("bits", "count"), FORMS)
@given(st.data())
@CASES
def test_combine_is_the_weighted_sum_modulo_the_prime(bits: int, count: int, data: st.DataObject) -> None:
    exact = st.one_of(st.sampled_from([0, 2**53 - 1, -(2**53) + 1, PRIME, -PRIME]), st.integers(-(2**53), 2**53))
    columns = data.draw(st.lists(st.lists(exact, min_size=count, max_size=count), min_size=1, max_size=5))
    sums = np.array(columns, np.float64).T
    expected = [sum(v << (bits * i) for i, v in enumerate(column)) % PRIME for column in columns]
    assert combine(sums, bits) == expected


def test_the_modulus_is_a_prime_above_the_ring() -> None:
    assert PRIME == 2**32 + 15
    assert all(PRIME % divisor for divisor in [2, *range(3, 65538, 2)])


@pytest.mark.parametrize("seed", range(4))
def test_right_rows_are_accepted(seed: int) -> None:
    one = Product(seed=seed, m=seed + 1)
    assert one.accepts(one.y)


def test_zero_rows_and_no_rows_are_accepted(product: Product) -> None:
    for rows in (0, 2):
        x = np.zeros((rows, K), np.int32)
        assert product.verifier.accepts(product.spec, x, np.zeros((rows, N), np.int32))


@pytest.mark.parametrize("sign", [1, -1])
def test_right_rows_at_the_edge_of_the_ring_are_accepted(sign: int) -> None:
    """The largest |x_q| and the largest |y_q| that step 1 allows: 2^24 - 1 and 2^30 - 1."""
    one = Product(k=65, n=2, m=1)
    one.weights[0, :64], one.weights[0, 64] = 1, 63
    one.weights[1] = -one.weights[0]
    one.prepare()
    one.x[0, :64], one.x[0, 64] = sign * (X_LIMIT - 1), sign
    y = one.exact(one.x)
    assert y.tolist() == [[sign * (Y_LIMIT - 1), -sign * (Y_LIMIT - 1)]]
    assert one.accepts(y)


@pytest.mark.parametrize("n", [OUTPUT_BLOCK - 1, OUTPUT_BLOCK, OUTPUT_BLOCK + 1, 2 * OUTPUT_BLOCK + 5])
def test_outputs_of_several_blocks(n: int) -> None:
    one = Product(n=n, k=8, m=2)
    assert one.accepts(one.y)
    for column in (0, n // 2, n - 1):
        wrong = one.y.copy()
        wrong[1, column] += 1
        assert not one.accepts(wrong)


def test_the_longest_inputs_stay_exact() -> None:
    """k = 2^17 inputs at full width: a rounded partial sum would refuse this right row."""
    k = INPUT_LIMIT
    one = Product(k=k, n=2, m=1)
    one.weights[0, 0::2], one.weights[0, 1::2] = 127, -127
    one.weights[1] = 0
    one.prepare()
    one.x[...] = X_LIMIT - 1
    y = one.exact(one.x)
    assert int(y[0, 0]) == 0
    assert one.accepts(y)


def test_inputs_beyond_what_stays_exact_are_refused() -> None:
    with pytest.raises(PreconditionError, match=str(INPUT_LIMIT)):
        Product(k=INPUT_LIMIT + 1, n=1, m=1)


def test_every_single_bit_counts(product: Product) -> None:
    for row in range(M):
        for column in (0, 1, N // 2, N - 1):
            for bit in range(32):
                wrong = product.y.copy()
                wrong[row, column] ^= 1 << bit
                assert not product.accepts(wrong), (row, column, bit)


# Two int32 values differ by at most 2^32 - 1 in magnitude, so +-(2^32 + 15) = +-P, the only difference that the check
# cannot see, is not representable: that is why P is larger than the ring. Differences modulo 2^32 that correspond to
# it are +-15, and they are seen. An error of +-2^32 is no error: it is the same word.
ERRORS = [1, -1, 15, -15, 2**31, -(2**31), 2**31 - 1, -(2**31 - 1), 2**30, -(2**30), PRIME, -PRIME, 2**32 - 1]


@pytest.mark.parametrize("error", ERRORS)
def test_an_added_error_is_rejected(product: Product, error: int) -> None:
    for row, column in ((0, 0), (M - 1, N - 1)):
        wrong = product.y.copy()
        wrong[row, column] += error
        assert not product.accepts(wrong)


def test_the_largest_difference_of_two_words_is_rejected() -> None:
    """-2^31 against 2^31 - 1: the integers differ by 2^32 - 1, less than P."""
    one = Product(n=1, k=1, m=1)
    one.weights[...] = 1
    one.prepare()
    one.x[...] = -(2**31)  # beyond step 1; the linear part of the check must hold by itself
    assert not one.accepts(np.array([[2**31 - 1]]))


def test_a_value_that_recovers_to_the_least_integer_is_rejected(product: Product) -> None:
    """abs(-2^31) is negative in int32: the range check must not go through it."""
    wrong = product.y.copy()
    wrong[1, 2] = -(2**31)
    assert not product.accepts(wrong)


@pytest.mark.parametrize("value", [Y_LIMIT, -Y_LIMIT, 2**31 - 1, -(2**31)])
def test_a_right_product_out_of_range_is_rejected(value: int) -> None:
    """Our own bug: x_q that step 1 would never make. The linear check holds, the range check must not."""
    one = Product(n=1, k=1, m=1)
    one.weights[...] = 1
    one.prepare()
    one.x[...] = value
    assert not one.accepts(np.array([[value]]))


def test_swapped_rows_are_rejected(product: Product) -> None:
    assert not product.accepts(product.y[[1, 0, 2]])


def test_another_rows_answer_is_rejected(product: Product) -> None:
    wrong = product.y.copy()
    wrong[0] = wrong[2]
    assert not product.accepts(wrong)


def test_errors_that_cancel_across_rows_are_rejected(product: Product) -> None:
    wrong = product.y.copy()
    wrong[0, 5] += 1
    wrong[1, 5] -= 1
    assert not product.accepts(wrong)


def test_errors_that_cancel_across_columns_are_rejected(product: Product) -> None:
    wrong = product.y.copy()
    wrong[0, 5] += 1
    wrong[0, 6] -= 1
    assert not product.accepts(wrong)


def test_the_answer_for_other_weights_is_rejected(product: Product) -> None:
    product_y = product.x.astype(np.int64) @ np.roll(product.weights, 1, axis=0).astype(np.int64).T
    assert not product.accepts(product_y)


def test_a_zero_answer_and_a_negated_answer_are_rejected(product: Product) -> None:
    assert not product.accepts(np.zeros_like(product.y))
    assert not product.accepts(-product.y)


@given(st.integers(0, 1 << 60))
@settings(CASES, max_examples=300)
def test_errors_of_an_adversary_without_the_secret_are_rejected(product: Product, seed: int) -> None:
    """P(accept) = 1/P for each: 300 trials all fail, but for a chance of 7e-8."""
    random = np.random.default_rng(seed)
    wrong = product.y.copy()
    dense = random.integers(0, 2)
    places = random.integers(0, wrong.size, wrong.size if dense else 2)
    wrong.flat[places] += random.integers(1, 2 ** int(random.integers(1, 31)), len(places))
    if (wrong == product.y).all():
        return
    assert not product.accepts(wrong)


def test_one_bad_row_among_many_right_ones_is_rejected() -> None:
    one = Product(m=64)
    for row in (0, 31, 63):
        wrong = one.y.copy()
        wrong[row, 3] -= 1
        assert not one.accepts(wrong)


def test_the_secret_is_fresh_and_c_follows_it() -> None:
    one = Product()
    first = one.verifier._s.array.copy()
    one.verifier.draw()
    assert (one.verifier._s.array != first).any()
    assert not one.accepts(one.y)  # c is still that of the old s: nothing passes
    one.prepare()
    assert one.accepts(one.y)


def test_c_is_the_secret_times_the_weights() -> None:
    one = Product(n=5, k=4)
    digits = one.verifier._s.array.astype(object)
    s = [sum(int(digits[i, j]) << (S_BITS * i) for i in range(S_LIMBS)) % PRIME for j in range(5)]
    parts = one.verifier._c[one.spec].array.astype(object)
    c = [sum(int(parts[i, j]) << (C_BITS * i) for i in range(C_LIMBS)) % PRIME for j in range(4)]
    weights = one.weights.astype(object)
    assert c == [sum(s[row] * int(weights[row, column]) for row in range(5)) % PRIME for column in range(4)]


def test_the_secret_is_uniform_enough() -> None:
    """Each limb pattern of s stands for one residue; their mean and spread are those of a uniform residue."""
    verifier = Verifier(SecureMemory(1 << 20), [LinearSpec(0, Linear.O, 1, 20_000)])
    digits = verifier._s.array.astype(np.int64)
    values = sum(digits[i] << (S_BITS * i) for i in range(S_LIMBS)) / PRIME
    assert abs(float(np.mean(values))) < 0.012  # 6 sigma
    assert abs(float(np.var(values)) - 1 / 12) < 0.004
