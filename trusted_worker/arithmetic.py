"""The hot numpy: everything that touches a whole row of activations.

Every function treats rows one by one, so a row's result does not depend on what shares its batch: prefill and
decode agree bit for bit in any chunking. Matrix products of activations with weights are not here (see the
schemes), with two exceptions: `exact_product` and `exact_lookup`, the integer products that replace an exchange.

Whatever grows with rows or widths lies in the caller's scratch; numpy's own temporaries stay below 64 KiB.

Shapes: m rows, k inputs, n outputs; h query heads, g key/value heads, d = head_dim.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trusted_worker.secure_memory import Scratch
from wire.errors import InvalidArgumentError
from wire.scratch import QUANTIZED, SUMS, piece

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]

X_LIMIT = 1 << 24  # |x_q| stays below: exact in float32
Y_LIMIT = 1 << 30  # |y_q| stays below: the ring never wraps
_ROTATED = 1 << 11  # pairs that are rotated at a time
_MARGIN = 1.0 - 1e-6  # of rounding, before the integers are checked
_SURELY = 1.0 - 2.0**-20  # what a float64 sum of squares may be below the true one, for k < 2^32
_TINY, _LARGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max) / 2


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


def angles(positions: I32, frequencies: F32) -> tuple[F32, F32]:
    """cos and sin float32[m, 1, pairs] of the turns of each position."""
    turns = positions.astype(np.float32)[:, None, None] * frequencies
    return np.cos(turns), np.sin(turns)


def rotate(x: F32, cos: F32, sin: F32, interleaved: bool = False) -> None:
    """Turn the first 2 * pairs dims of each head in place, float32[m, heads, d] (RoPE; Su et al. 2021).

    Pairs are (2i, 2i + 1) when interleaved, else (i, i + half of the turned dims), as Hugging Face stores Llama.
    """
    half = cos.shape[-1]
    low = x[..., 0 : 2 * half : 2] if interleaved else x[..., :half]
    high = x[..., 1 : 2 * half : 2] if interleaved else x[..., half : 2 * half]
    block = max(1, _ROTATED // (x.shape[1] * half))
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        x_low, x_high, x_cos, x_sin = low[rows], high[rows], cos[rows], sin[rows]
        before = x_low.copy()
        x_low *= x_cos
        x_low -= x_high * x_sin
        x_high *= x_cos
        x_high += before * x_sin


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

    @cached_property
    def square_limit(self) -> int:
        """Largest sum of squares of x_q for which ||x_q||_2 * max ||W_q row||_2 < 2^30 holds, exactly."""
        return (Y_LIMIT**2 - 1) // max(self.row_square, 1)

    @cached_property
    def reach(self) -> tuple[float, float]:
        """How long a row may be before it is rounded: the sum of its |elements|, or the root of that of its squares."""
        return Y_LIMIT / 127 - 0.5 * self.k - 1, math.sqrt(self.square_limit) - 0.5 * math.sqrt(self.k) - 1

    def factor(self, peak: float, ones: float, squares: float) -> float:
        """1 / s_x for a row, from its norms. 0 for a zero row, and where the ring would not hold even ones."""
        if peak < _TINY:
            return 0.0
        by_one, by_two = self.reach
        finest = min((X_LIMIT - 1) / peak, max(by_one / ones, by_two / math.sqrt(squares)))
        return min(max(finest * _MARGIN, 0.0), _LARGE)

    def holds(self, x_q: F64, peaks: list[float], spare: F64) -> bool:
        """The promise of step 1, on the integers: sums of |x_q| are exact, of squares to k * 2^-53. `peaks` are the
        largest |x_q|. `spare` is written over.
        """
        if max(peaks, default=0) >= X_LIMIT:
            return False
        fits = np.vecdot(x_q, x_q) <= self.square_limit * _SURELY
        if not fits.all():  # rows with a few large elements
            fits |= 127 * np.abs(x_q, out=spare).sum(axis=1) < Y_LIMIT
        return bool(fits.all())


def quantize(x: F32, bound: Bound, scratch: Scratch) -> tuple[I32, F32]:
    """Step 1: int32[m, k] and the scale of each row, float32[m, 1], as fine as the ring allows.

    |x_q| < 2^24, and ||x_q||_2 * max||W_q row||_2 < 2^30 or 127 * ||x_q||_1 < 2^30, so no product reaches 2^30.
    The scale is chosen in floating point; that it holds is checked on the integers. A zero row stays zero.
    Raises InvalidArgumentError for a row that is not finite.
    """
    x_q: I32 = scratch.empty(x.shape, np.int32)
    factors: list[float] = []
    block = max(1, QUANTIZED // bound.k)
    with scratch.frame():
        work: F64 = scratch.empty((2, min(block, len(x)), bound.k), np.float64)
        for start in range(0, len(x), block):
            rows = slice(start, start + block)
            wide, spare = work[:, : len(x[rows])]
            np.copyto(wide, x[rows])
            factors += _quantize(wide, spare, bound)
            np.copyto(x_q[rows], wide, casting="unsafe")
    return x_q, np.array([1 / factor if factor else 0.0 for factor in factors], np.float32)[:, None]


def _quantize(x: F64, spare: F64, bound: Bound) -> list[float]:
    """Rows of float64[m, k] become integers in place: the factor of each. `spare` is written over."""
    np.abs(x, out=spare)
    peaks, ones, squares = spare.max(axis=1).tolist(), spare.sum(axis=1).tolist(), np.vecdot(x, x).tolist()
    if not all(peak < np.inf for peak in peaks):
        raise InvalidArgumentError("the model's activations are not finite")
    factors = [bound.factor(*norms) for norms in zip(peaks, ones, squares, strict=True)]
    np.multiply(x, np.array(factors)[:, None], out=x)
    np.rint(x, out=x)
    rounded = [round(peak * factor) for peak, factor in zip(peaks, factors, strict=True)]  # as each element was
    if not bound.holds(x, rounded, spare):
        raise InvalidArgumentError("the model's activations do not fit the ring")
    return factors


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
