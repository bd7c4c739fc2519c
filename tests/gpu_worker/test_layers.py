"""The steps between products, on the CPU: equal to torch's in float64, to rounding."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from gpu_worker.kernels import layers

F32 = npt.NDArray[np.float32]


def _normal(*shape: int) -> F32:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def _double(x: F32) -> torch.Tensor:
    return torch.from_numpy(x).double()


def _assert_close(got: F32, expected: torch.Tensor) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("m", "d"), [(1, 64), (3, 97), (17, 896)])
def test_norm(m: int, d: int) -> None:
    x, gain = _normal(m, d), _normal(d)
    _assert_close(layers.rms_norm(x, gain, 1e-6), rms_norm(_double(x), (d,), _double(gain), 1e-6))
    np.testing.assert_array_equal(layers.rms_norm(np.zeros_like(x), gain, 1e-6), 0)


@pytest.mark.parametrize(("m", "f"), [(1, 5), (3, 97), (2, 4864)])
def test_gate(m: int, f: int) -> None:
    x = 5 * _normal(m, 2 * f)
    x[0, :5] = (0, 80, -80, 300, -300)
    gates, up = _double(x).chunk(2, dim=1)
    _assert_close(layers.gate(x), silu(gates) * up)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [16, 8])
def test_rotation_turns_the_pairs_and_leaves_the_rest(pairs: int, interleaved: bool) -> None:
    x, angles = _normal(3, 5, 32), _normal(3, pairs)
    turned = layers.rotate(x, np.cos(angles), np.sin(angles), interleaved)
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    numbers = _double(x[..., first]) + 1j * _double(x[..., second])
    expected = numbers * torch.exp(1j * _double(angles)[:, None])
    _assert_close(turned[..., first], expected.real)
    _assert_close(turned[..., second], expected.imag)
    np.testing.assert_array_equal(turned[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize(("rows", "tokens", "d"), [(1, 1, 64), (1, 300, 64), (5, 5, 128), (6, 133, 80), (64, 700, 64)])
def test_attention(rows: int, tokens: int, d: int, window: int) -> None:
    heads = 7
    q, keys, values = _normal(heads * rows, d), _normal(tokens, d), _normal(tokens, d)
    order = torch.arange(tokens)
    own = order[tokens - rows :, None]
    seen = (order <= own) & ((order > own - window) if window else torch.tensor(True))
    expected = scaled_dot_product_attention(
        _double(q).view(heads, rows, d), _double(keys)[None], _double(values)[None], seen, scale=1.0
    )
    _assert_close(layers.attend(q, keys, values, rows, window), expected.view(heads * rows, d))


def test_attention_of_far_scores_does_not_overflow() -> None:
    q, keys, values = 1000 * _normal(2, 64), _normal(50, 64), _normal(50, 64)
    best = (q @ keys.T).argmax(1)
    np.testing.assert_allclose(layers.attend(q, keys, values, 1, 0), values[best], rtol=1e-5)
