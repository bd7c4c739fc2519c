"""The hot numpy: everything that touches a whole row of activations.

Every function treats rows one by one, so a row's result does not depend on what shares its batch: prefill and
decode agree bit for bit in any chunking. Matrix products of activations with weights are not here (see the
schemes), with two exceptions: `exact_product` and `exact_lookup`, the integer products that replace an exchange.

Whatever grows with rows or widths lies in the caller's scratch; numpy's own temporaries stay below 64 KiB.

Shapes: m rows, k inputs, n outputs; h query heads, g key/value heads, d = head_dim.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trusted_worker.secure_memory import Scratch
from wire.errors import InvalidArgumentError
from wire.scratch import SUMS, piece

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]

X_LIMIT = 1 << 24  # |x_q| stays below: exact in float32
Y_LIMIT = 1 << 30  # |y_q| stays below: the ring never wraps
_ROTATED = 1 << 11  # pairs that are rotated at a time
_MARGIN = 1.0 - 1e-6  # float32 rounding of x/s_x, before the integers are checked


def rms_norm(x: F32, gain: F32, eps: float, scratch: Scratch) -> F32:
    """x / rms(x) * gain, row by row: float32[m, k] (Zhang and Sennrich 2019; Llama's form)."""
    out: F32 = scratch.empty(x.shape, np.float32)
    np.multiply(x, x, out=out)
    inverse = 1.0 / np.sqrt(out.mean(axis=1, keepdims=True) + np.float32(eps))
    np.multiply(x, inverse, out=out)
    return np.multiply(out, gain, out=out)


def layer_norm(x: F32, gain: F32, bias: F32, eps: float, scratch: Scratch) -> F32:
    """(x - mean) / standard deviation * gain + bias, row by row: float32[m, k] (Ba et al. 2016; GPT-2's form)."""
    out: F32 = scratch.empty(x.shape, np.float32)
    np.subtract(x, x.mean(axis=1, keepdims=True), out=out)
    with scratch.frame():
        squares: F32 = scratch.empty(x.shape, np.float32)
        variance = np.square(out, out=squares).mean(axis=1, keepdims=True)
    out *= 1.0 / np.sqrt(variance + np.float32(eps))
    out *= gain
    return np.add(out, bias, out=out)


def normalise_heads(x: F32, gain: F32, eps: float) -> None:
    """RMSNorm in place over each head of float32[m, heads, d], gain float32[d] (Qwen3's QK norm)."""
    for row in x:  # one at a time: squares are a temporary
        np.multiply(row, 1.0 / np.sqrt(np.square(row).mean(axis=-1, keepdims=True) + np.float32(eps)), out=row)
    x *= gain


def rotate(x: F32, positions: I32, frequencies: F32, interleaved: bool = False) -> None:
    """Rotate the first 2 * len(frequencies) dims of float32[m, heads, d] in place by position (Su et al. 2021).

    Pairs are (2i, 2i + 1) when interleaved, else (i, i + half of the rotated dims), as Hugging Face stores Llama.
    """
    half = len(frequencies)
    low = x[..., 0 : 2 * half : 2] if interleaved else x[..., :half]
    high = x[..., 1 : 2 * half : 2] if interleaved else x[..., half : 2 * half]
    block = max(1, _ROTATED // (x.shape[1] * half))
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        angles = positions[rows].astype(np.float32)[:, None, None] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        x_low, x_high = low[rows], high[rows]
        before = x_low.copy()
        x_low *= cos
        x_low -= x_high * sin
        x_high *= cos
        x_high += before * sin


def silu_times(gate_up: F32, scratch: Scratch) -> F32:
    """silu(gate) * up for float32[m, 2f] = gate beside up: float32[m, f]."""
    width = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    out: F32 = scratch.empty((len(gate_up), width), np.float32)
    with np.errstate(over="ignore"):  # exp(-x) may reach infinity: x / inf is the right 0
        np.exp(np.negative(gate, out=out), out=out)
    out += 1.0
    np.divide(gate, out, out=out)
    return np.multiply(out, up, out=out)


def gelu(x: F32, scratch: Scratch) -> F32:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))): GPT-2's gelu_new, float32[m, f]."""
    out: F32 = scratch.empty(x.shape, np.float32)
    np.multiply(x, x, out=out)
    out *= np.float32(0.044715)
    out += 1.0
    out *= x
    out *= np.float32((2 / np.pi) ** 0.5)
    np.tanh(out, out=out)
    out += 1.0
    out *= x
    out *= np.float32(0.5)
    return out


@dataclass(frozen=True)
class Bound:
    """What step 1 of secure-infer needs to know of one weight matrix: k, and the largest int64 ||W_q row||^2."""

    k: int
    row_square: int

    @property
    def square_limit(self) -> int:
        """Largest sum of squares of x_q for which ||x_q||_2 * max ||W_q row||_2 < 2^30 holds, exactly."""
        return (Y_LIMIT**2 - 1) // max(self.row_square, 1)


def quantize(x: F32, bound: Bound, scratch: Scratch) -> tuple[I32, F32]:
    """Step 1: int32[m, k] and the scale of each row, float32[m, 1], as fine as the ring allows.

    |x_q| < 2^24, and ||x_q||_2 * max||W_q row||_2 < 2^30 or 127 * ||x_q||_1 < 2^30, so no product reaches 2^30.
    The scale is chosen in floating point; that it holds is checked on the integers. A zero row stays zero.
    Raises InvalidArgumentError for a row that is not finite.
    """
    magnitude: F32 = scratch.empty(x.shape, np.float32)
    np.abs(x, out=magnitude)
    peak = magnitude.max(axis=1).astype(np.float64)
    if not np.isfinite(peak).all():
        raise InvalidArgumentError("the model's activations are not finite")
    one_norm = magnitude.sum(axis=1, dtype=np.float64)
    two_norm = np.sqrt(np.einsum("ij,ij->i", magnitude, magnitude, dtype=np.float64))
    with np.errstate(divide="ignore"):  # a zero row may be scaled by anything
        by_peak = (X_LIMIT - 1) / peak
        by_one = (Y_LIMIT / 127 - 0.5 * bound.k - 1) / one_norm
        by_two = (bound.square_limit**0.5 - 0.5 * bound.k**0.5 - 1) / two_norm
    factor = np.minimum(by_peak, np.maximum(by_one, by_two)) * _MARGIN
    factor = np.clip(factor, 0, np.finfo(np.float32).max / 2)
    factor[peak < np.finfo(np.float32).tiny] = 0
    scaled = np.multiply(x, factor.astype(np.float32)[:, None], out=magnitude)
    x_q: I32 = scratch.empty(x.shape, np.int32)
    np.copyto(x_q, np.rint(scaled, out=scaled), casting="unsafe")
    _check_bound(x_q, bound, magnitude.view(np.int32))
    scale = np.divide(1.0, factor, out=np.zeros_like(factor), where=factor > 0)
    return x_q, scale.astype(np.float32)[:, None]


def _check_bound(x_q: I32, bound: Bound, spare: I32) -> None:
    """The promise of step 1, on the integers themselves. `spare` has their shape and is written over."""
    squares = np.einsum("ij,ij->i", x_q, x_q, dtype=np.int64)
    ones = np.abs(x_q, out=spare).sum(axis=1, dtype=np.int64)
    fits = (squares <= bound.square_limit) | (127 * ones < Y_LIMIT)
    if not (fits.all() and x_q.max(initial=0) < X_LIMIT and x_q.min(initial=0) > -X_LIMIT):
        raise InvalidArgumentError("the model's activations do not fit the ring")


def dequantize(y_q: I32, x_scale: F32, w_scale: F32, bias: F32 | None, out: F32) -> F32:
    """Step 6: y_q * s_x * s_w (+ bias) into out float32[m, n], which shares no memory with y_q."""
    np.multiply(y_q, w_scale, out=out, casting="unsafe", dtype=np.float32)
    out *= x_scale
    if bias is not None:
        out += bias
    return out


def exact_product(x: F64, tiles: Iterable[tuple[int, I8]], out: I32, scratch: Scratch) -> None:
    """x . W_q^T modulo 2^32 for integers in float64[m, k], |x| <= 2^31: BLAS, exact as partial sums stay below 2^53.

    Weights come as (first row, int8[rows, k]) tiles. Inputs beyond scratch.EXACT_DEPTH are summed in parts.
    """
    m, k = x.shape
    most, (height, width) = max(1, SUMS // max(m, 1)), piece(out.shape[1], k, m)
    with scratch.frame():
        copy: F64 = scratch.empty((height, width), np.float64)
        sums: F64 = scratch.empty((min(most, out.shape[1]), m), np.float64)
        for first, tile in _cut(tiles, most):
            exact, part = sums[: len(tile)], out[:, first : first + len(tile)]
            part[...] = 0
            for left in range(0, k, width):
                x_part = x[:, left : left + width].T
                for top, weights in _float64(tile[:, left : left + width], copy):
                    np.matmul(weights, x_part, out=exact[top : top + len(weights)])
                _add(exact, part)


def exact_lookup(z: npt.NDArray[Any], tiles: Iterable[tuple[int, I8]], out: I32, scratch: Scratch) -> None:
    """z . E_q modulo 2^32 for integers [m, V] of any dtype, |z| <= 2^31, and a table [V, d]: out int32[m, d], exact.

    The table comes as (first row, int8[rows, d]) tiles, in any order; rows that do not come count as zero.
    """
    m, (height, width) = len(z), piece(z.shape[1], out.shape[1], len(z))
    out[...] = 0
    with scratch.frame():
        copy: F64 = scratch.empty((height, width), np.float64)
        z_copy: F64 = scratch.empty((height, m), np.float64)
        sums: F64 = scratch.empty((width, m), np.float64)
        for first, tile in tiles:
            for left in range(0, out.shape[1], width):
                part = out[:, left : left + width]
                for top, rows in _float64(tile[:, left : left + width], copy):
                    z_part, exact = z_copy[: len(rows)], sums[: part.shape[1]]
                    np.copyto(z_part, z[:, first + top : first + top + len(rows)].T)
                    np.matmul(rows.T, z_part, out=exact)
                    _add(exact, part)


def _cut(tiles: Iterable[tuple[int, I8]], most: int) -> Iterator[tuple[int, I8]]:
    """The same tiles, of at most so many rows."""
    for first, tile in tiles:
        for start in range(0, len(tile), most):
            yield first + start, tile[start : start + most]


def _float64(tile: I8, copy: F64) -> Iterator[tuple[int, F64]]:
    """(first row, float64[rows, columns]) of a tile, piece by piece, each in the memory of `copy`."""
    for top in range(0, len(tile), len(copy)):
        source = tile[top : top + len(copy)]
        target = copy[: len(source), : source.shape[1]]
        np.copyto(target, source)
        yield top, target


def _add(exact: F64, out: I32) -> None:
    """Add integers below 2^63, held in contiguous float64[n, m], to int32[m, n] modulo 2^32. They are written over."""
    flat = exact.reshape(-1)
    np.copyto(flat.view(np.int64), flat, casting="unsafe")
    out += exact.view(np.int32)[:, ::2].T  # the low halves: little-endian, as the wire is
