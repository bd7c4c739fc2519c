"""Products of int8 weights on the CPU: y = z.W^T, exact modulo 2^32 for int32 z, ordinary float32 for float32 z.

One source serves both element types: numba compiles it once per type and keeps the result on disk. A tile of rows
x outputs lives in scalar accumulators over one loop along k, which LLVM vectorises. Three things make it fast: rows
are sliced first and the loop runs over range(len(slice)); a block of weights is read from memory once for all rows;
and GOMP_SPINCOUNT is small (the command line sets it), or OpenMP threads wait actively and starve each other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

BLOCK = 32  # outputs of one parallel task; a multiple of every tile's width
LINE = 64  # bytes, and so weights, of a cache line
SMALL = 1 << 20  # multiplications below which waking another core costs more than it saves
DEPTH = 1216  # inputs at a time, so that a tile's rows stay in the first cache


def _kernel(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """njit without the GIL; compiled code is kept on disk where there is a writable place for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, nogil=True, fastmath=True, parallel=parallel)(function)
        except RuntimeError:  # no folder that numba could write to
            return njit(nogil=True, fastmath=True, parallel=parallel)(function)

    return decorate


@_kernel()
def _tile_1x4(z, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    kind = z.dtype.type
    a, b, c, d = kind(0), kind(0), kind(0), kind(0)
    for j in range(len(z)):
        x = z[j]
        a = kind(a + x * kind(w0[j]))
        b = kind(b + x * kind(w1[j]))
        c = kind(c + x * kind(w2[j]))
        d = kind(d + x * kind(w3[j]))
    return a, b, c, d


@_kernel()
def _tile_4x2(z0, z1, z2, z3, w0, w1):  # type: ignore[no-untyped-def]
    kind = z0.dtype.type
    a, b, c, d = kind(0), kind(0), kind(0), kind(0)
    e, f, g, h = kind(0), kind(0), kind(0), kind(0)
    for j in range(len(w0)):
        u, v = kind(w0[j]), kind(w1[j])
        x0, x1, x2, x3 = z0[j], z1[j], z2[j], z3[j]
        a = kind(a + x0 * u)
        b = kind(b + x1 * u)
        c = kind(c + x2 * u)
        d = kind(d + x3 * u)
        e = kind(e + x0 * v)
        f = kind(f + x1 * v)
        g = kind(g + x2 * v)
        h = kind(h + x3 * v)
    return (a, b, c, d), (e, f, g, h)


@_kernel()
def _one_row(z, w, y, i, o0, o1, k0, k1):  # type: ignore[no-untyped-def]
    """y[i, o] += z[i, k0:k1].w[o, k0:k1] for o0 <= o < o1."""
    row = z[i, k0:k1]
    rest = o1 - (o1 - o0) % 4
    for o in range(o0, rest, 4):
        sums = _tile_1x4(row, w[o, k0:k1], w[o + 1, k0:k1], w[o + 2, k0:k1], w[o + 3, k0:k1])
        for j in range(4):
            y[i, o + j] += sums[j]
    for o in range(rest, o1):
        last = w[o, k0:k1]
        y[i, o] += _tile_1x4(row, last, last, last, last)[0]


@_kernel()
def _four_rows(z, w, y, i, o0, o1, k0, k1):  # type: ignore[no-untyped-def]
    """The same for rows i to i + 3."""
    z0, z1, z2, z3 = z[i, k0:k1], z[i + 1, k0:k1], z[i + 2, k0:k1], z[i + 3, k0:k1]
    for o in range(o0, o1, 2):
        p = min(o + 1, o1 - 1)  # an odd last output is computed twice and stored once
        first, second = _tile_4x2(z0, z1, z2, z3, w[o, k0:k1], w[p, k0:k1])
        for j in range(4):
            y[i + j, o] += first[j]
            if p > o:
                y[i + j, p] += second[j]


@_kernel()
def _fetch(w, o0, o1, k0, k1):  # type: ignore[no-untyped-def]
    """Touch every cache line of a block of weights, so that many wait for memory at once: the tiles have few in flight.

    Weights in the cache already lose a tenth, weights that come from memory gain half as much again and more.
    """
    seen = np.int8(0)
    for o in range(o0, o1):
        for j in range(k0, k1, LINE):
            seen = np.int8(seen ^ w[o, j])
    return seen


def _product(z, w, y):  # type: ignore[no-untyped-def]
    m, k = z.shape
    n = len(w)
    blocks = (n + BLOCK - 1) // BLOCK
    seen = np.zeros(blocks, np.int8)
    for block in prange(blocks):
        o0, o1 = block * BLOCK, min(block * BLOCK + BLOCK, n)
        y[:, o0:o1] = 0
        for k0 in range(0, k, DEPTH):
            k1 = min(k0 + DEPTH, k)
            seen[block] ^= _fetch(w, o0, o1, k0, k1)
            for i in range(0, m - m % 4, 4):
                _four_rows(z, w, y, i, o0, o1, k0, k1)
            for i in range(m - m % 4, m):
                _one_row(z, w, y, i, o0, o1, k0, k1)
    return seen  # or the compiler would leave the fetching out


_on_one_core = _kernel()(_product)  # prange is range there
_on_all_cores = _kernel(parallel=True)(_product)


def matmul(z: npt.NDArray[Any], w: npt.NDArray[np.int8]) -> npt.NDArray[Any]:
    """z[m, k] of int32 or float32, w int8[n, k], both C-contiguous -> z.w^T as [m, n] of z's type.

    int32 wraps around: the product modulo 2^32. Raises ValueError for operands that do not fit.
    """
    if z.ndim != 2 or w.ndim != 2 or z.shape[1] != w.shape[1] or w.dtype != np.int8:
        raise ValueError("operands do not fit")
    if z.dtype not in (np.int32, np.float32) or not (z.flags.c_contiguous and w.flags.c_contiguous):
        raise ValueError("operands have the wrong type or layout")
    y = np.empty((len(z), len(w)), z.dtype)
    small = len(z) * w.size < SMALL
    (_on_one_core if small else _on_all_cores)(z, w, y)
    return y


def warm_up() -> None:
    """Compile for both types, or fetch from disk: seconds the first time on a machine, else milliseconds."""
    for kind in (np.int32, np.float32):
        matmul(np.zeros((5, 3), kind), np.zeros((5, 3), np.int8))
        matmul(np.zeros((1, 1024), kind), np.zeros((SMALL // 1024, 1024), np.int8))
