"""What lies between the products of a decoder block, on the CPU, in float32: RMSNorm, RoPE, SiLU, attention.

One call each: between two products the interpreter's caches are cold, and the many small operations that torch would
need cost more than the arithmetic. On one core, but for attention over much: waking another one takes 20 us. Every
array is C-contiguous, so that warm_up has compiled all there is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from gpu_worker.kernels import cpu
from gpu_worker.kernels.cpu import SMALL, kernel

ROWS = 16  # rows of q that go over the keys together

F32 = npt.NDArray[np.float32]


@kernel()
def rms_norm(x, gain, eps):  # type: ignore[no-untyped-def]
    """x float32[m, d], gain float32[d] -> float32[m, d]."""
    y = np.empty_like(x)
    kind, (m, d) = x.dtype.type, x.shape
    for i in range(m):
        squares = kind(0)
        for j in range(d):
            squares += x[i, j] * x[i, j]
        factor = kind(1 / np.sqrt(squares / d + eps))
        for j in range(d):
            y[i, j] = x[i, j] * factor * gain[j]
    return y


@kernel()
def rotate(x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    """RoPE of x float32[m, heads, d], cos and sin float32[m, pairs] -> float32[m, heads, d]; see decoder.rotate."""
    y = x.copy()
    (m, heads, _), pairs = x.shape, cos.shape[1]
    step, apart = (2, 1) if interleaved else (1, pairs)
    for i in range(m):
        for h in range(heads):
            for p in range(pairs):
                a, b = p * step, p * step + apart
                y[i, h, a] = x[i, h, a] * cos[i, p] - x[i, h, b] * sin[i, p]
                y[i, h, b] = x[i, h, b] * cos[i, p] + x[i, h, a] * sin[i, p]
    return y


@kernel()
def _exponentials(x, y):  # type: ignore[no-untyped-def]
    """y = e^x to rounding, in a form that LLVM vectorises: 2^(n + f) with the bits of 2^n made from n."""
    kind = x.dtype.type
    log2e, half, ln2 = kind(1.4426950408889634), kind(0.5), kind(0.6931471805599453)
    powers = np.empty(len(x), np.int32)
    for j in range(len(x)):
        t = min(max(x[j] * log2e, kind(-126)), kind(126))
        whole = np.floor(t + half)
        f = (t - whole) * ln2
        powers[j] = np.int32(np.int32(np.int32(whole) + np.int32(127)) << np.int32(23))
        tail = kind(1 / 6) + f * (kind(1 / 24) + f * (kind(1 / 120) + f * kind(1 / 720)))
        y[j] = kind(1) + f * (kind(1) + f * (half + f * tail))
    bits = powers.view(np.float32)
    for j in range(len(x)):
        y[j] *= bits[j]


@kernel()
def gate(x):  # type: ignore[no-untyped-def]
    """x float32[m, 2f], gate beside up -> silu(gate).up as float32[m, f]."""
    m, f = len(x), x.shape[1] // 2
    y = np.empty((m, f), x.dtype)
    one = x.dtype.type(1)
    for i in range(m):
        g, up, own = x[i, :f], x[i, f:], y[i]
        _exponentials(-g, own)
        for j in range(f):
            own[j] = g[j] * up[j] / (one + own[j])
    return y


@kernel()
def _softmax(scores, start):  # type: ignore[no-untyped-def]
    """In place; nothing is left of what comes before `start`."""
    kind = scores.dtype.type
    scores[:start] = 0
    seen = scores[start:]
    peak = seen[0]
    for j in range(len(seen)):
        peak = max(peak, seen[j])
    for j in range(len(seen)):
        seen[j] -= peak
    _exponentials(seen, seen)
    total = kind(0)
    for j in range(len(seen)):
        total += seen[j]
    seen *= kind(1) / total


@kernel()
def _attend(q, keys, values, out, first, last, rows, window):  # type: ignore[no-untyped-def]
    """Rows `first` to `last` of q: scores, softmax, values. Row i is one of token len(keys) - rows + i % rows."""
    tokens = len(keys)
    scores = np.empty((last - first, tokens), q.dtype)
    cpu.product(q[first:last], keys, scores, cpu.BLOCK)
    for i in range(first, last):
        end = tokens - rows + i % rows + 1
        start = max(0, end - window) if window else 0
        _softmax(scores[i - first, :end], start)
        scores[i - first, end:] = 0
    out[first:last] = 0
    cpu.sum_rows(scores, values, out[first:last], 0, tokens)


@kernel(parallel=True)
def _attend_on_all_cores(q, keys, values, out, rows, window):  # type: ignore[no-untyped-def]
    """ROWS rows of q are a task."""
    for task in prange((len(q) + ROWS - 1) // ROWS):
        first = task * ROWS
        _attend(q, keys, values, out, first, min(first + ROWS, len(q)), rows, window)


def attend(q: F32, keys: F32, values: F32, rows: int, window: int) -> F32:
    """Causal attention of one key head: q [heads.rows, d], scaled, over keys and values [tokens, d] -> [heads.rows, d].

    The rows of each query head are the last ones of the sequence; with a window W a row sees its last W tokens.
    """
    out = np.empty_like(q)
    if 2 * q.size * len(keys) < SMALL or len(q) <= ROWS:
        for first in range(0, len(q), ROWS):
            _attend(q, keys, values, out, first, min(first + ROWS, len(q)), rows, window)
    else:
        _attend_on_all_cores(q, keys, values, out, rows, window)
    return out


def warm_up() -> None:
    """Compile everything, or fetch it from disk."""
    x: Any = np.ones((ROWS + 1, 64), np.float32)
    rms_norm(x, x[0], 1e-6)
    angles = np.ones((len(x), 32), np.float32)
    rotate(x[:, None], angles, angles, False)
    gate(x)
    attend(x[:2], x, x, 2, 0)
    keys = np.ones((SMALL // x.size, 64), np.float32)
    attend(x, keys, keys, 1, 0)
