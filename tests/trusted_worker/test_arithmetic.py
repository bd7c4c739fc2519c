"""The hot numpy against float64, int64 and Python integers, on rows chosen to break it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.trusted_worker import traced
from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I8, I32, X_LIMIT, Y_LIMIT, Bound
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.errors import InvalidArgumentError
from wire.scratch import EXACT_DEPTH, FEW, PIECE_COLUMNS, SLACK, exact_bytes

CASES = settings(deadline=None, max_examples=80, derandomize=True)
TINY = float(np.finfo(np.float32).tiny)
HUGE = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def scratch() -> Scratch:
    """Room for everything here; each use happens in a frame of its own."""
    return Scratch(SecureMemory(8 << 20), 7 << 20)


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _frequencies(dims: int, theta: float) -> F32:
    result: F32 = (theta ** (-np.arange(0, dims, 2) / dims)).astype(np.float32)
    return result


@st.composite
def rows(draw: st.DrawFn) -> F32:
    """One row float32[1, k] of an unpleasant kind."""
    k = draw(st.sampled_from([1, 2, 7, 64, 300]))
    random = _random(draw(st.integers(0, 1 << 30)))
    magnitude = 10.0 ** draw(st.integers(-37, 37))
    kind = draw(st.sampled_from(["normal", "outlier", "constant", "alternating", "spread", "one-hot", "drawn"]))
    signs = np.where(np.arange(k) % 2, -1.0, 1.0)
    row: npt.NDArray[Any]
    if kind == "normal":
        row = random.standard_normal(k)
    elif kind == "outlier":
        row = random.standard_normal(k) * 1e-6
        row[random.integers(k)] = -1.0
    elif kind == "constant":
        row = np.ones(k)
    elif kind == "alternating":
        row = signs
    elif kind == "spread":
        row = signs * np.exp(random.uniform(-20, 0, k))
    elif kind == "one-hot":
        row = np.zeros(k)
        row[random.integers(k)] = 1.0
    else:
        finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
        row, magnitude = draw(hnp.arrays(np.float32, k, elements=finite)), 1.0
    return np.clip(row * magnitude, -HUGE, HUGE).astype(np.float32)[None]


def _weights(kind: str, x: F32, random: np.random.Generator) -> npt.NDArray[np.int8]:
    """A weight matrix whose first row is aligned with x as a worst case."""
    k = x.shape[1]
    aligned = np.where(x[0] < 0, -127, 127).astype(np.int8)[None]
    if kind == "aligned":
        return np.concatenate([aligned, -aligned])
    if kind == "one-hot":
        return np.where(np.arange(k) == np.abs(x[0]).argmax(), aligned, 0).astype(np.int8)
    return random.integers(-127, 128, (3, k)).astype(np.int8)


def _bound(weights: npt.NDArray[np.int8]) -> Bound:
    return Bound(weights.shape[1], int((weights.astype(np.int64) ** 2).sum(axis=1).max()))


def _quantize(x: F32, bound: Bound, scratch: Scratch) -> tuple[I32, F32]:
    with scratch.frame():
        x_q, scale = arithmetic.quantize(x, bound, scratch)
        return x_q.copy(), scale.copy()


@given(rows(), st.sampled_from(["aligned", "one-hot", "random"]), st.integers(0, 1 << 30))
@CASES
def test_no_product_of_a_quantised_row_leaves_the_ring(scratch: Scratch, x: F32, kind: str, seed: int) -> None:
    weights = _weights(kind, x, _random(seed))
    bound = _bound(weights)
    x_q, _ = _quantize(x, bound, scratch)
    assert np.abs(x_q.astype(np.int64)).max() < X_LIMIT
    products = x_q.astype(np.int64) @ weights.astype(np.int64).T
    assert np.abs(products).max() < Y_LIMIT
    exact = [int(v) for v in x_q[0]]
    assert sum(v * v for v in exact) <= bound.square_limit or 127 * sum(map(abs, exact)) < Y_LIMIT


@given(rows())
@CASES
def test_quantisation_error_is_half_a_step(scratch: Scratch, x: F32) -> None:
    x_q, scale = _quantize(x, Bound(x.shape[1], 127**2 * x.shape[1]), scratch)
    back = x_q.astype(np.float64) * scale.astype(np.float64)
    step = float(scale[0, 0])
    assert np.all(np.abs(back - x) <= step * (0.5 + np.abs(x_q) * 1e-6) + (TINY if step == 0 else 0))


@given(rows(), st.sampled_from(["aligned", "one-hot", "random"]))
@CASES
def test_no_finer_scale_would_do(scratch: Scratch, x: F32, kind: str) -> None:
    """Twice as fine breaks a bound, unless the row is so tiny that float32 has no finer factor."""
    bound = _bound(_weights(kind, x, _random(3)))
    x_q, scale = _quantize(x, bound, scratch)
    if np.abs(x).max() < 1e-30:
        return
    doubled = [2 * abs(int(v)) for v in x_q[0]]
    assert scale[0, 0] > 0
    too_wide = max(doubled) >= X_LIMIT - 64
    too_long = sum(v * v for v in doubled) > bound.square_limit and 127 * sum(doubled) >= Y_LIMIT
    assert too_wide or too_long


def test_the_worst_case_of_both_norms_at_model_size(scratch: Scratch) -> None:
    k = 14336
    x = np.where(np.arange(k) % 3, 0.7, -0.7).astype(np.float32)[None]
    x_q, _ = _quantize(x, Bound(k, 127 * 127 * k), scratch)
    aligned = 127 * np.sign(x_q.astype(np.int64))
    product = int((x_q.astype(np.int64) * aligned).sum())
    assert Y_LIMIT * 0.99 < product < Y_LIMIT


@pytest.mark.parametrize("value", [0.0, -0.0, TINY / 2, 1e-45])
def test_a_zero_row_stays_zero(scratch: Scratch, value: float) -> None:
    x = np.full((2, 5), value, np.float32)
    x[1] = 1.0
    x_q, scale = _quantize(x, Bound(5, 127 * 127), scratch)
    assert not x_q[0].any()
    assert scale[0, 0] == 0
    assert x_q[1].all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("row", [0, 2])
def test_a_row_that_is_not_finite_is_refused(scratch: Scratch, value: float, row: int) -> None:
    x = np.ones((3, 9), np.float32)
    x[row, 4] = value
    with pytest.raises(InvalidArgumentError, match="not finite"):
        _quantize(x, Bound(9, 127), scratch)


def test_no_rows_are_fine(scratch: Scratch) -> None:
    x_q, scale = _quantize(np.empty((0, 9), np.float32), Bound(9, 127), scratch)
    assert (x_q.shape, scale.shape) == ((0, 9), (0, 1))


@given(
    hnp.arrays(np.int32, (3, 8), elements=st.integers(-(2**30) + 1, 2**30 - 1)),
    st.floats(1e-12, 1e6),
    st.floats(1e-6, 1e3),
    st.booleans(),
)
@CASES
def test_dequantisation_is_exact_to_a_few_ulps(
    scratch: Scratch, y_q: I32, x_scale: float, w_scale: float, biased: bool
) -> None:
    s_x = (np.float32(x_scale) * np.array([[1], [0.5], [3]])).astype(np.float32)
    s_w = (np.float32(w_scale) * np.arange(1, 9)).astype(np.float32)
    bias = np.linspace(-2, 2, 8, dtype=np.float32) if biased else None
    y = arithmetic.dequantize(y_q, s_x, s_w, bias, np.empty(y_q.shape, np.float32)).astype(np.float64)
    product = y_q.astype(np.float64) * s_x.astype(np.float64) * s_w.astype(np.float64)
    offset = 0.0 if bias is None else bias.astype(np.float64)
    assert np.all(np.abs(y - (product + offset)) <= 2.0**-22 * (np.abs(product) + np.abs(offset)))


def test_quantised_product_is_close_to_the_real_one(scratch: Scratch) -> None:
    random = _random(1)
    x = random.standard_normal((6, 256)).astype(np.float32)
    weights = random.integers(-127, 128, (40, 256)).astype(np.int8)
    w_scale = random.uniform(0.001, 0.01, 40).astype(np.float32)
    bound = _bound(weights)
    with scratch.frame():
        x_q, x_scale = arithmetic.quantize(x, bound, scratch)
        y_q = (x_q.astype(np.int64) @ weights.astype(np.int64).T).astype(np.int32)
        y = arithmetic.dequantize(y_q, x_scale, w_scale, None, np.empty(y_q.shape, np.float32))
    reference = x.astype(np.float64) @ (weights.astype(np.float64) * w_scale[:, None]).T
    assert np.abs(y - reference).max() < 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("k", [1, 1000, 33_000])
@pytest.mark.parametrize("kind", ["largest", "smallest", "alternating", "random"])
def test_exact_product_is_the_integer_product_modulo_the_ring(scratch: Scratch, k: int, kind: str) -> None:
    random = _random(k)
    signs = np.where(np.arange(k) % 2, -1, 1)
    weights = (127 * np.stack([np.ones(k), -np.ones(k), signs, random.choice([-1, 1], k)])).astype(np.int8)
    x = {
        "largest": np.full((2, k), 2**31),
        "smallest": np.full((2, k), -(2**31)),
        "alternating": np.stack([signs, -signs]) * 2**31,
        "random": random.integers(-(2**31), 2**31 + 1, (2, k)),
    }[kind].astype(np.int64)
    out = np.empty((2, 4), np.int32)
    with scratch.frame():
        arithmetic.exact_product(x.astype(np.float64), [(0, weights[:3]), (3, weights[3:])], out, scratch)
    expected = [[sum(map(int, row * w)) for w in weights.astype(np.int64)] for row in x]
    assert [[int(v) % 2**32 for v in row] for row in out] == [[v % 2**32 for v in row] for row in expected]


@pytest.mark.parametrize("k", [EXACT_DEPTH, EXACT_DEPTH + 1, 40_001, 2 * EXACT_DEPTH + 3])
def test_longer_inputs_are_summed_in_exact_parts(scratch: Scratch, k: int) -> None:
    """In one sum the partial sums would pass 2^53, and be rounded."""
    out = np.empty((1, 2), np.int32)
    weights = np.full((2, k), 127, np.int8)
    weights[1] = -127
    arithmetic.exact_product(np.full((1, k), 2.0**31 - 1), [(0, weights)], out, scratch)
    expected = k * 127 * (2**31 - 1)
    assert [int(v) % 2**32 for v in out[0]] == [expected % 2**32, -expected % 2**32]


def _big(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same numbers as Python's."""
    return array.astype(np.int64).astype(object)


def _same_modulo_the_ring(out: I32, expected: npt.NDArray[Any]) -> bool:
    return bool(((_big(out) - expected) % 2**32 == 0).all())


SHAPES = st.tuples(
    st.sampled_from([1, 2, FEW, FEW + 1, 70]),  # rows of activations
    st.sampled_from([1, 3, 65]),  # outputs
    st.sampled_from([1, 200, PIECE_COLUMNS, PIECE_COLUMNS + 1]),
)


@given(SHAPES, st.integers(1, 40), st.integers(0, 1000))
@settings(CASES, max_examples=40)
def test_products_and_lookups_of_any_shape_in_any_tiles(
    scratch: Scratch, shape: tuple[int, int, int], tile: int, seed: int
) -> None:
    random, (m, n, k) = _random(seed), shape
    weights: I8 = random.integers(-127, 128, (n, k)).astype(np.int8)
    tiles = [(first, weights[first : first + tile]) for first in range(0, n, tile)]
    x, z = (random.integers(-(2**31), 2**31, (m, width), dtype=np.int32) for width in (k, n))
    product, lookup = np.full((m, n), 7, np.int32), np.full((m, k), 7, np.int32)
    with scratch.frame():
        arithmetic.exact_product(x.astype(np.float64), tiles, product, scratch)
        arithmetic.exact_lookup(z, reversed(tiles), lookup, scratch)
    assert _same_modulo_the_ring(product, _big(x) @ _big(weights).T)
    assert _same_modulo_the_ring(lookup, _big(z) @ _big(weights))


def test_a_lookup_of_rows_beyond_exact_sums_is_exact(scratch: Scratch) -> None:
    rows = 2 * EXACT_DEPTH + 3
    table, out = np.full((rows, 1), 127, np.int8), np.empty((2, 1), np.int32)
    z = np.stack([np.full(rows, 2**31 - 1), np.full(rows, -(2**31))]).astype(np.int32)
    with scratch.frame():
        arithmetic.exact_lookup(z, [(0, table)], out, scratch)
    assert _same_modulo_the_ring(out, np.array([[rows * 127 * (2**31 - 1)], [-rows * 127 * 2**31]], object))


@pytest.mark.parametrize("m", [1, FEW, FEW + 1, 256])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1024, 256), (53, 4864), (292, 896), (23, 11008), (3, 40_000)])
def test_products_take_no_more_scratch_than_they_say(m: int, rows: int, columns: int) -> None:
    weights = np.ones((rows, columns), np.int8)
    size = exact_bytes(m, rows, columns) + SLACK
    memory = SecureMemory(size + (1 << 13))
    exact = Scratch(memory, size)
    product, lookup = np.empty((m, rows), np.int32), np.empty((m, columns), np.int32)
    arithmetic.exact_product(np.ones((m, columns)), [(0, weights)], product, exact)
    arithmetic.exact_lookup(np.ones((m, rows), np.int32), [(0, weights)], lookup, exact)
    assert (product == columns).all()
    assert (lookup == rows).all()


@given(st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=20), st.integers(-(2**31), 2**31 - 1))
@CASES
def test_sums_are_added_modulo_the_ring(values: list[int], start: int) -> None:
    exact = np.array([values, values[::-1]], np.float64).T.copy()
    out = np.full((2, len(values)), start, np.int32)
    arithmetic._add(exact, out)
    assert _same_modulo_the_ring(out, np.array([values, values[::-1]], object) + start)


@given(st.integers(1, 6), st.sampled_from([2, 64, 513]), st.sampled_from([1e-6, 1.0, 1e6]), st.integers(0, 1000))
@CASES
def test_rms_norm_is_the_textbook_one(scratch: Scratch, m: int, k: int, size: float, seed: int) -> None:
    random = _random(seed)
    x = (random.standard_normal((m, k)) * size).astype(np.float32)
    gain = random.standard_normal(k).astype(np.float32)
    with scratch.frame():
        out = arithmetic.rms_norm(x, gain, 1e-5, scratch).astype(np.float64)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-30)


def test_rms_norm_of_a_zero_row_is_zero(scratch: Scratch) -> None:
    with scratch.frame():
        out = arithmetic.rms_norm(np.zeros((2, 8), np.float32), np.ones(8, np.float32), 1e-6, scratch)
        assert not out.any()


@given(st.sampled_from([2, 16, 64]), st.sampled_from([1e4, 5e5, 1e6]), st.integers(0, 1000))
@CASES
def test_rotation_is_a_complex_product(head_dim: int, theta: float, seed: int) -> None:
    random = _random(seed)
    positions = random.integers(0, 300, 5).astype(np.int32)
    x = random.standard_normal((5, 3, head_dim)).astype(np.float32)
    half = head_dim // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half].astype(np.float64) + 1j * x[..., half:]) * np.exp(1j * angles)
    out = x.copy()
    arithmetic.rotate(out, *arithmetic.angles(positions, _frequencies(head_dim, theta)))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], axis=-1), atol=3e-4)


def test_rotation_at_position_zero_changes_nothing() -> None:
    x = _random(0).standard_normal((1, 2, 8)).astype(np.float32)
    out = x.copy()
    arithmetic.rotate(out, *arithmetic.angles(np.zeros(1, np.int32), _frequencies(8, 1e4)))
    assert (out == x).all()


def test_rotation_reaches_into_a_view() -> None:
    """The decoder rotates the query and key heads of a larger array, and values stay."""
    heads = _random(1).standard_normal((2, 5, 8)).astype(np.float32)
    before = heads.copy()
    arithmetic.rotate(heads[:, :3], *arithmetic.angles(np.array([4, 9], np.int32), _frequencies(8, 1e4)))
    assert (heads[:, 3:] == before[:, 3:]).all()
    assert (heads[:, :3] != before[:, :3]).any()


def test_interleaved_pairs_rotate_as_complex_numbers_and_the_dims_behind_them_stay() -> None:
    x = _random(2).standard_normal((3, 2, 16)).astype(np.float32)
    positions, frequencies = np.array([0, 5, 77], np.int32), _frequencies(8, 1e4)
    out = x.copy()
    arithmetic.rotate(out, *arithmetic.angles(positions, frequencies), interleaved=True)
    turned = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * np.exp(1j * positions[:, None, None] * frequencies)
    np.testing.assert_allclose(out[..., 0:8:2], turned.real, atol=1e-4)
    np.testing.assert_allclose(out[..., 1:8:2], turned.imag, atol=1e-4)
    assert (out[..., 8:] == x[..., 8:]).all()


@given(st.integers(1, 5), st.sampled_from([2, 64, 300]), st.integers(0, 1000))
@CASES
def test_layer_norm_and_gelu_are_those_of_torch(scratch: Scratch, m: int, k: int, seed: int) -> None:
    import torch

    random = _random(seed)
    x = (random.standard_normal((m, k)) * 3 + 1).astype(np.float32)
    gain, bias = random.standard_normal((2, k)).astype(np.float32)
    with scratch.frame():
        normed = arithmetic.layer_norm(x, gain, bias, 1e-5, scratch).copy()
        active = arithmetic.gelu(x, scratch).copy()
    wide = torch.from_numpy(x)
    expected = torch.nn.functional.layer_norm(wide, (k,), torch.from_numpy(gain), torch.from_numpy(bias), 1e-5).numpy()
    np.testing.assert_allclose(normed, expected, rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.gelu(wide, approximate="tanh").numpy()
    np.testing.assert_allclose(active, expected, rtol=1e-5, atol=1e-6)


def test_qk_norm_normalises_every_head_on_its_own_and_in_place() -> None:
    heads = _random(3).standard_normal((4, 5, 8)).astype(np.float32)
    gain = _random(4).standard_normal(8).astype(np.float32)
    wide = heads.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * gain
    arithmetic.normalise_heads(heads[:, :3], gain, 1e-6)
    np.testing.assert_allclose(heads[:, :3], expected[:, :3], rtol=1e-5)
    assert (heads[:, 3:] == wide[:, 3:]).all()


def test_a_permutation_before_rope_changes_the_scores_and_one_after_it_does_not() -> None:
    """The naive form of KV-Shield, permuting the rows of W_q and W_k under RoPE, and why q and k cross instead."""
    random = _random(5)
    q, k = random.standard_normal((2, 40, 1, 64)).astype(np.float32)
    order, frequencies = random.permutation(64), _frequencies(64, 1e4)
    positions = np.arange(40, dtype=np.int32)

    def scores(q: F32, k: F32, permuted_first: bool) -> F32:
        q, k = (one[..., order].copy() if permuted_first else one.copy() for one in (q, k))
        arithmetic.rotate(q, *arithmetic.angles(positions, frequencies))
        arithmetic.rotate(k, *arithmetic.angles(positions, frequencies))
        if not permuted_first:
            q, k = q[..., order], k[..., order]
        result: F32 = q[:, 0] @ k[:, 0].T
        return result

    plain_q, plain_k = q.copy(), k.copy()
    arithmetic.rotate(plain_q, *arithmetic.angles(positions, frequencies))
    arithmetic.rotate(plain_k, *arithmetic.angles(positions, frequencies))
    right = plain_q[:, 0] @ plain_k[:, 0].T
    error = [float(np.linalg.norm(scores(q, k, first) - right) / np.linalg.norm(right)) for first in (True, False)]
    assert error[0] > 0.5  # not a rounding error: other attention
    assert error[1] < 1e-6


@given(hnp.arrays(np.float32, (2, 12), elements=st.floats(-1e4, 1e4, width=32)))
@CASES
def test_silu_times_is_the_textbook_one(scratch: Scratch, gate_up: F32) -> None:
    with scratch.frame():
        out = arithmetic.silu_times(gate_up, scratch).astype(np.float64)
    gate, up = gate_up[:, :6].astype(np.float64), gate_up[:, 6:].astype(np.float64)
    expected = gate * np.exp(np.minimum(gate, 0)) / (1 + np.exp(-np.abs(gate))) * up
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gate", [-HUGE, -1e4, -90.0, 0.0, 90.0, 1e30])
def test_silu_of_extreme_gates_is_finite(scratch: Scratch, gate: float) -> None:
    with scratch.frame():
        out = arithmetic.silu_times(np.array([[gate, 1.0]], np.float32), scratch)
        assert out[0, 0] == pytest.approx(max(gate, 0.0), abs=1e-30)


@given(st.integers(2, 9), st.sampled_from([2, 48, 1000, 9000]), st.integers(0, 1000))
@settings(CASES, max_examples=40)
def test_a_row_does_not_depend_on_its_batch(scratch: Scratch, m: int, k: int, seed: int) -> None:
    random = _random(seed)
    x = (random.standard_normal((m, k)) * np.exp(random.standard_normal((m, k)) * 4)).astype(np.float32)
    gain, bound = random.standard_normal(k).astype(np.float32), Bound(k, 127 * 90 * k)
    positions = random.integers(0, 100, m).astype(np.int32)
    frequencies = _frequencies(k, 1e4)

    def everything(part: slice) -> list[npt.NDArray[Any]]:
        piece = np.ascontiguousarray(x[part])
        turned = piece.reshape(len(piece), 1, k).copy()
        arithmetic.rotate(turned, *arithmetic.angles(positions[part], frequencies))
        with scratch.frame():
            x_q, scale = arithmetic.quantize(piece, bound, scratch)
            y = arithmetic.dequantize(x_q, scale, gain, gain, np.empty(x_q.shape, np.float32))
            normed = arithmetic.rms_norm(piece, gain, 1e-6, scratch)
            return [a.copy() for a in (x_q, scale, y, normed, arithmetic.silu_times(piece, scratch), turned)]

    whole = everything(slice(0, m))
    cut = int(random.integers(1, m))
    for parts in ([slice(i, i + 1) for i in range(m)], [slice(0, cut), slice(cut, m)]):
        pieces = [everything(part) for part in parts]
        for index, array in enumerate(whole):
            assert np.array_equal(np.concatenate([piece[index] for piece in pieces]), array)


ROWS, WIDE, VOCABULARY = 64, 11_008, 151_936  # the largest that is meant to run
OUTSIDE = 256 << 10  # of which numpy's iterators take up to three buffers of 64 KiB


@pytest.fixture(scope="module")
def large() -> Scratch:
    """Room for the largest shapes, never used up by anything that a test keeps."""
    return Scratch(SecureMemory(64 << 20), 63 << 20)


def _framed(scratch: Scratch, work: Any) -> int:
    def run() -> None:
        with scratch.frame():
            work()

    return traced.peak(run)


def test_row_by_row_functions_keep_their_temporaries_in_the_scratch(large: Scratch) -> None:
    x = _random(0).standard_normal((ROWS, 2 * WIDE)).astype(np.float32)
    vector, half = np.ones(2 * WIDE, np.float32), x[:, :WIDE].copy()
    bound = Bound(WIDE, 127**2 * WIDE)
    works = {
        "rms_norm": lambda: arithmetic.rms_norm(x, vector, 1e-5, large),
        "layer_norm": lambda: arithmetic.layer_norm(x, vector, vector, 1e-5, large),
        "silu_times": lambda: arithmetic.silu_times(x, large),
        "gelu": lambda: arithmetic.gelu(x, large),
        "quantize": lambda: arithmetic.quantize(half, bound, large),
    }
    assert {name: size for name, work in works.items() if (size := _framed(large, work)) > OUTSIDE} == {}


def test_head_by_head_functions_work_in_place() -> None:
    heads = _random(0).standard_normal((ROWS, 72, 128)).astype(np.float32)
    gain, positions = np.ones(128, np.float32), np.arange(ROWS, dtype=np.int32)
    assert traced.peak(lambda: arithmetic.normalise_heads(heads[:, :64], gain, 1e-6)) < OUTSIDE
    for interleaved in (False, True):
        cos, sin = arithmetic.angles(positions, _frequencies(128, 1e4))
        work = lambda: arithmetic.rotate(heads[:, :70], cos, sin, interleaved)  # noqa: E731, B023
        assert traced.peak(work) < OUTSIDE


def test_products_keep_their_temporaries_in_the_scratch(large: Scratch) -> None:
    weights = np.ones((96, WIDE), np.int8)
    x, z = np.ones((ROWS, WIDE)), np.ones((ROWS, 96), np.int32)
    y, e = np.empty((ROWS, 96), np.int32), np.empty((ROWS, WIDE), np.int32)
    assert _framed(large, lambda: arithmetic.exact_product(x, [(0, weights)], y, large)) < OUTSIDE
    assert _framed(large, lambda: arithmetic.exact_lookup(z, [(0, weights)], e, large)) < OUTSIDE


def test_logits_are_scaled_without_a_temporary() -> None:
    y_q, scale, out = np.ones((4, VOCABULARY), np.int32), np.ones(VOCABULARY, np.float32), np.empty((4, 1), np.float32)
    y = np.empty(y_q.shape, np.float32)
    assert traced.peak(lambda: arithmetic.dequantize(y_q, out, scale, scale, y)) < OUTSIDE
