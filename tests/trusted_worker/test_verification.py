"""Freivalds' check: limbs against big integers, right rows at the edge of the ring, and every way to be wrong."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trusted_worker import traced
from trusted_worker.arithmetic import I32, X_LIMIT, Y_LIMIT
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.verification import (
    C_BITS,
    PRIME,
    S_BITS,
    SIZE_LIMIT,
    TABLE_LIMIT,
    Verifier,
    combine,
    dots,
    powers,
    residues,
    store,
)
from wire.errors import PreconditionError
from wire.linears import Linear, LinearSpec
from wire.scratch import CHECK_LIMBS, SLACK, SUM_BLOCK, SUM_LIMBS, check_bytes, prepare_bytes

CASES = settings(deadline=None, max_examples=100, derandomize=True)
EDGES = [0, 1, 2, PRIME // 2 - 1, PRIME // 2, PRIME // 2 + 1, PRIME - 2, PRIME - 1, 2**31, 2**32 - 1, 2**32]
K, N, M = 48, 70, 3
scratch = Scratch(SecureMemory(24 << 20), 23 << 20)  # a frame of its own for every use

values_below = st.one_of(st.sampled_from(EDGES), st.integers(0, PRIME - 1))


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
        self.verifier.prepare(self.spec, tiles, scratch)

    def exact(self, x: I32) -> npt.NDArray[np.int64]:
        """The right answer, in int64."""
        return x.astype(np.int64) @ self.weights.astype(np.int64).T

    def accepts(self, y: npt.NDArray[Any]) -> bool:
        """The verdict on an answer, reduced to the ring as an answer of the worker is."""
        return self.verifier.accepts(self.verifier.expect(self.spec, self.x, scratch), _words(y), scratch)


def _words(y: npt.NDArray[Any]) -> I32:
    words: I32 = (y.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32).view("<i4")
    return words


def _secret(verifier: Verifier, outputs: int) -> list[int]:
    """s, as integers."""
    found: list[int] = []
    with scratch.frame():
        for start, digits in verifier._secret(0, outputs, scratch):
            assert start == len(found)
            wide = digits.astype(object)
            found += [sum(int(digit) << (S_BITS * i) for i, digit in enumerate(column)) for column in wide.T]
    return found


def _residues(digits: npt.NDArray[Any]) -> list[int]:
    """What limbs of c stand for."""
    return [sum(int(v) << (C_BITS * i) for i, v in enumerate(column)) % PRIME for column in digits.astype(object).T]


@pytest.fixture(scope="module")
def product() -> Product:
    return Product()


@given(
    st.lists(
        st.lists(st.integers(-(2**31), 2**31 - 1), min_size=SUM_LIMBS, max_size=SUM_LIMBS), min_size=1, max_size=30
    )
)
@CASES
def test_stored_residues_are_balanced_digits_of_the_sums(columns: list[list[int]]) -> None:
    digits = np.empty((CHECK_LIMBS, len(columns)), np.int16)
    store(np.array(columns, np.int64).T, digits)
    assert np.abs(digits.astype(np.int64)).max() <= 1 << (C_BITS - 1)
    assert _residues(digits) == [sum(v << (S_BITS * i) for i, v in enumerate(column)) % PRIME for column in columns]


@given(st.lists(values_below, min_size=1, max_size=30))
@CASES
def test_every_residue_can_be_stored(values: list[int]) -> None:
    sums = np.zeros((SUM_LIMBS, len(values)), np.int64)
    sums[0] = values
    digits = np.empty((CHECK_LIMBS, len(values)), np.int16)
    store(sums, digits)
    assert _residues(digits) == values


@pytest.mark.parametrize(("bits", "count"), [(S_BITS, SUM_LIMBS), (C_BITS, CHECK_LIMBS)])
@given(st.data())
@CASES
def test_limbs_stand_for_their_weighted_sum_modulo_the_prime(bits: int, count: int, data: st.DataObject) -> None:
    exact = st.one_of(st.sampled_from([0, 2**63 - 1, -(2**63), PRIME, -PRIME]), st.integers(-(2**63), 2**63 - 1))
    columns = data.draw(st.lists(st.lists(exact, min_size=count, max_size=count), min_size=1, max_size=5))
    expected = [sum(v << (bits * i) for i, v in enumerate(column)) % PRIME for column in columns]
    sums = np.array(columns, np.int64).T
    assert residues(sums, bits) == combine(sums, powers(bits, count)).tolist() == expected


@given(st.integers(0, 5), st.sampled_from([1, 9, 2 * SUM_BLOCK + 3]), st.booleans(), st.integers(0, 1000))
@settings(CASES, max_examples=25)
def test_dots_are_exact_at_the_edge_of_their_operands(m: int, width: int, checks: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    if checks:
        digits, limit = random.choice(np.array([-(1 << 11), 1 << 11], np.int16), (CHECK_LIMBS, width)), X_LIMIT - 1
    else:
        digits, limit = random.choice(np.array([255, 254], np.uint8), (SUM_LIMBS, width)), 2**31 - 1
    values = random.choice(np.array([-limit, limit], np.int32), (m, width))
    with scratch.frame():
        parts = ((at, digits[:, at : at + SUM_BLOCK]) for at in range(0, width, SUM_BLOCK))
        sums = dots(parts, values, len(digits), scratch)
    assert sums.tolist() == (digits.astype(np.int64).astype(object) @ values.astype(np.int64).astype(object).T).tolist()


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
        expected = product.verifier.expect(product.spec, x, scratch)
        assert product.verifier.accepts(expected, np.zeros((rows, N), np.int32), scratch)


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


@pytest.mark.parametrize("n", [SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 2 * SUM_BLOCK + 5])
def test_outputs_of_several_blocks(n: int) -> None:
    one = Product(n=n, k=8, m=2)
    assert one.accepts(one.y)
    for column in (0, n // 2, n - 1):
        wrong = one.y.copy()
        wrong[1, column] += 1
        assert not one.accepts(wrong)


def test_the_longest_inputs_stay_exact() -> None:
    """k = 2^17 inputs at full width: a rounded partial sum would refuse this right row."""
    k = 1 << 17
    one = Product(k=k, n=2, m=1)
    one.weights[0, 0::2], one.weights[0, 1::2] = 127, -127
    one.weights[1] = 0
    one.prepare()
    one.x[...] = X_LIMIT - 1
    y = one.exact(one.x)
    assert int(y[0, 0]) == 0
    assert one.accepts(y)


def test_inputs_beyond_what_stays_exact_are_refused() -> None:
    for k, n in ((SIZE_LIMIT + 1, 1), (1, SIZE_LIMIT + 1)):
        with pytest.raises(PreconditionError, match=str(SIZE_LIMIT)):
            Verifier(SecureMemory(1 << 20), [LinearSpec(0, Linear.QKV, k, n)])


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
    """Each passes with a chance of 2^-32 at most: 300 trials all fail, but for a chance of 7e-8."""
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
    one = Product(n=SUM_BLOCK + 2)
    first = _secret(one.verifier, SUM_BLOCK + 2)
    one.verifier.draw()
    second = _secret(one.verifier, SUM_BLOCK + 2)
    assert all(first[place] != second[place] for place in (0, 1, SUM_BLOCK, SUM_BLOCK + 1))  # of both blocks
    assert not one.accepts(one.y)  # c is still that of the old s: nothing passes
    one.prepare()
    assert one.accepts(one.y)


@pytest.mark.parametrize("n", [5, 2 * SUM_BLOCK + 5])
def test_c_is_the_secret_times_the_weights(n: int) -> None:
    one = Product(n=n, k=4)
    s, weights = _secret(one.verifier, n), one.weights.astype(object)
    c = _residues(one.verifier._c[one.spec].array)
    assert c == [sum(s[row] * int(weights[row, column]) for row in range(n)) % PRIME for column in range(4)]


def test_all_linears_share_one_secret_whatever_part_is_asked() -> None:
    verifier = Product(n=3 * SUM_BLOCK).verifier
    s = _secret(verifier, 3 * SUM_BLOCK)
    assert _secret(verifier, 10) == s[:10]
    with scratch.frame():
        parts = [(start, part.copy()) for start, part in verifier._secret(SUM_BLOCK - 3, 2 * SUM_BLOCK + 5, scratch)]
    assert [(start, part.shape[1]) for start, part in parts] == [
        (SUM_BLOCK - 3, 3),
        (SUM_BLOCK, SUM_BLOCK),
        (2 * SUM_BLOCK, 5),
    ]
    found = np.concatenate([part for _, part in parts], axis=1).astype(np.int64)
    assert (found * powers(S_BITS, SUM_LIMBS)).sum(axis=0).tolist() == s[SUM_BLOCK - 3 : 2 * SUM_BLOCK + 5]


def test_no_two_outputs_share_a_word_and_no_byte_is_preferred() -> None:
    """s is a key stream: words are distinct but for chance, in and across blocks, and bytes are uniform."""
    s = np.array(_secret(Product(n=5 * SUM_BLOCK, k=1).verifier, 5 * SUM_BLOCK))
    assert len(np.unique(s)) > len(s) - 5  # 0.2 equal pairs are expected
    assert s.min() >= 0
    assert s.max() < 2**32
    for limb in range(SUM_LIMBS):
        counts = np.bincount(s >> (S_BITS * limb) & 255, minlength=256)
        assert ((counts - 160) ** 2 / 160).sum() < 400  # 255 degrees of freedom: one in a hundred million is above


def test_the_state_is_small() -> None:
    """Three limbs for every input, and one block of s, whatever the outputs."""
    memory = SecureMemory(1 << 20)
    Verifier(memory, [LinearSpec(0, Linear.LM_HEAD, 896, 151_936), LinearSpec(0, Linear.QKV, 896, 1152)])
    assert memory.used == 2 * 2 * CHECK_LIMBS * 896 + SUM_LIMBS * SUM_BLOCK


class Lookup:
    """A table with a verifier, and right rows of it to start from."""

    def __init__(self, vocabulary: int = 90, hidden: int = 40) -> None:
        self.random = np.random.default_rng(0)
        self.table = self.random.integers(-127, 128, (vocabulary, hidden)).astype(np.int8)
        spec = LinearSpec(0, Linear.O, 2, hidden)
        self.verifier = Verifier(SecureMemory(1 << 20), [spec], vocabulary)
        self.prepare()
        self.ids = self.random.integers(0, vocabulary, 5).astype(np.int32)
        self.y = self.table[self.ids].astype(np.int64)

    def prepare(self) -> None:
        """c', from tiles of uneven sizes."""
        cuts = [0, 1, len(self.table) // 2, len(self.table)]
        self.verifier.prepare_lookup([(a, self.table[a:b]) for a, b in pairwise(cuts)], scratch)

    def accepts(self, y: npt.NDArray[Any]) -> bool:
        """See Product."""
        return self.verifier.accepts(self.verifier.expect_lookup(self.ids), _words(y), scratch, TABLE_LIMIT)


def test_right_rows_of_the_table_are_accepted() -> None:
    one = Lookup()
    assert one.accepts(one.y)
    assert one.verifier.accepts(one.verifier.expect_lookup(one.ids[:0]), np.empty((0, 40), np.int32), scratch)
    one.verifier.draw()
    assert not one.accepts(one.y)
    one.prepare()
    assert one.accepts(one.y)


def test_wide_tables_of_long_vocabularies() -> None:
    one = Lookup(vocabulary=5, hidden=SUM_BLOCK + 100)
    assert one.accepts(one.y)
    one.y[0, SUM_BLOCK + 3] ^= 1
    assert not one.accepts(one.y)


def test_a_residue_is_that_of_its_row() -> None:
    one = Lookup(hidden=6)
    s, table = _secret(one.verifier, 6), one.table.astype(object)
    assert _residues(one.verifier._table) == [
        sum(a * int(b) for a, b in zip(s, row, strict=True)) % PRIME for row in table
    ]


def test_every_bit_and_another_row_are_rejected() -> None:
    one = Lookup()
    for bit in range(32):
        wrong = one.y.copy()
        wrong[4, 7] ^= 1 << bit
        assert not one.accepts(wrong)
    assert not one.accepts(one.y[[1, 0, 2, 3, 4]])
    assert not one.accepts(one.table[(one.ids + 1) % 90].astype(np.int64))
    assert not one.accepts(np.zeros_like(one.y))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_right_row_beyond_the_range_of_a_table_is_rejected(sign: int) -> None:
    """Our own bug: a table that is not int8 in [-127, 127]. The linear check holds, the range check must not."""
    one = Lookup()
    one.table[...] = sign * TABLE_LIMIT
    one.prepare()
    assert one.accepts(one.table[one.ids].astype(np.int64))
    one.table[...] = -128
    one.prepare()
    assert not one.accepts(one.table[one.ids].astype(np.int64))


@pytest.mark.parametrize("n", [70, SUM_BLOCK, SUM_BLOCK + 1])
@pytest.mark.parametrize("m", [1, 7, 64])
def test_checks_take_no_more_scratch_than_they_say(m: int, n: int) -> None:
    one, size = Product(n=n, k=50, m=m), check_bytes(m, max(n, 50)) + SLACK
    exact = Scratch(SecureMemory(size + (1 << 13)), size)
    expected = one.verifier.expect(one.spec, one.x, exact)
    assert one.verifier.accepts(expected, one.y.astype(np.int32), exact)
    table = Lookup(hidden=n)
    rows = np.resize(table.ids, m)
    assert table.verifier.accepts(table.verifier.expect_lookup(rows), table.table[rows].astype(np.int32), exact)


@pytest.mark.parametrize(("rows", "columns"), [(70, 50), (SUM_BLOCK + 1, 3), (3, SUM_BLOCK + 1), (300, 900)])
def test_preparations_take_no_more_scratch_than_they_say(rows: int, columns: int) -> None:
    size = prepare_bytes(rows, columns) + SLACK
    exact = Scratch(SecureMemory(size + (1 << 13)), size)
    weights = np.ones((rows, columns), np.int8)
    spec = LinearSpec(0, Linear.QKV, columns, rows)
    Verifier(SecureMemory(1 << 20), [spec]).prepare(spec, [(0, weights)], exact)
    spec = LinearSpec(0, Linear.O, 1, columns)
    Verifier(SecureMemory(1 << 20), [spec], rows).prepare_lookup([(0, weights)], exact)


def test_large_shapes_keep_their_temporaries_in_the_scratch() -> None:
    wide, long = LinearSpec(0, Linear.LM_HEAD, 896, 151_936), LinearSpec(0, Linear.DOWN, 11_008, 896)
    verifier = Verifier(SecureMemory(4 << 20), [wide, long], 151_936)
    rows, tile = np.zeros((8, 151_936), np.int32), np.ones((23, 11_008), np.int8)
    table = np.ones((292, 896), np.int8)

    def run() -> None:
        with scratch.frame():
            verifier.accepts(verifier.expect(wide, rows[:, :896], scratch), rows, scratch)
            verifier.accepts(verifier.expect(long, rows[:, :11_008], scratch), rows[:, :896], scratch)
            verifier.accepts(verifier.expect_lookup(rows[:, 0]), rows[:, :896], scratch)
            verifier.prepare(long, [(0, tile)], scratch)
            verifier.prepare_lookup([(151_600, table)], scratch)

    assert traced.peak(run) < 256 << 10
