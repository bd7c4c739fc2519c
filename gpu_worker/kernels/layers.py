"""What lies between the products of a decoder block, on the CPU, in float32: RMSNorm, RoPE, SiLU, attention.

One call each: between two products the interpreter's caches are cold, and the many small operations that torch would
need cost more than the arithmetic. They stay on one core: waking another takes 20 us. Every array is C-contiguous, so
that warm_up has compiled all there is.
"""

import numpy as np
import numpy.typing as npt

from gpu_worker.kernels import cpu
from gpu_worker.kernels.cpu import BLOCK, SMALL, kernel, lookup, matmul, product, sum_rows

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
def _softmax(scores, rows, window):  # type: ignore[no-untyped-def]
    """In place, causal: row i of scores [heads.rows, tokens] is one of token tokens - rows + i % rows."""
    tokens, kind = scores.shape[1], scores.dtype.type
    for i in range(len(scores)):
        end = tokens - rows + i % rows + 1
        start = max(0, end - window) if window else 0
        scores[i, :start] = 0
        scores[i, end:] = 0
        seen = scores[i, start:end]
        peak, total = seen[0], kind(0)
        for j in range(len(seen)):
            peak = max(peak, seen[j])
        for j in range(len(seen)):
            seen[j] -= peak
        _exponentials(seen, seen)
        for j in range(len(seen)):
            total += seen[j]
        for j in range(len(seen)):
            seen[j] /= total


@kernel()
def _attend(q, keys, values, rows, window):  # type: ignore[no-untyped-def]
    scores, out = np.empty((len(q), len(keys)), q.dtype), np.zeros_like(q)
    product(q, keys, scores, BLOCK)
    _softmax(scores, rows, window)
    sum_rows(scores, values, out, 0, len(keys))
    return out


def attend(q: F32, keys: F32, values: F32, rows: int, window: int) -> F32:
    """Causal attention of one key head: q [heads.rows, d], scaled, over keys and values [tokens, d] -> [heads.rows, d].

    The rows of each query head are the last ones of the sequence; with a window W a row sees its last W tokens.
    """
    if q.size * len(keys) < SMALL:
        few: F32 = _attend(q, keys, values, rows, window)
        return few
    scores = matmul(q, keys)
    _softmax(scores, rows, window)
    return lookup(scores, values)


def attention(q: F32, keys: F32, values: F32, window: int) -> F32:
    """q [rows, H, d], the last rows of a sequence, over keys and values [K, tokens, d] -> [rows, H.d]."""
    rows, heads, d = q.shape
    grouped = np.multiply(q.transpose(1, 0, 2), d**-0.5, order="C").reshape(len(keys), -1, d)
    out = np.empty_like(grouped)
    for own, own_keys, own_values, result in zip(grouped, keys, values, out, strict=True):
        result[:] = attend(own, own_keys, own_values, rows, window)
    joined: F32 = out.reshape(heads, rows, d).transpose(1, 0, 2).reshape(rows, heads * d)
    return joined


def warm_up(int8: bool, ring_only: bool) -> None:
    """Compile all that a model of this precision needs, or fetch it from disk."""
    if int8:
        cpu.warm_up(np.int32, np.int8, lookups=True)
    if ring_only:
        return
    if int8:
        cpu.warm_up(np.float32, np.int8, lookups=False)
    cpu.warm_up(np.float32, np.float32, lookups=True)
    x, angles = np.ones((2, 64), np.float32), np.ones((2, 32), np.float32)
    rms_norm(x, x[0], 1e-6)
    rotate(x[:, None], angles, angles, False)
    gate(x)
    attend(x, x, x, 2, 0)
    _softmax(x, 2, 0)
