"""Products of int8 weights on the CPU: y = z.W^T, exact modulo 2^32 for int32 z, ordinary float32 for float32 z, and
z.E for an embedding table E that lies row by row, for int32 only.

One source serves both element types: numba compiles it once per type and keeps the result on disk. A tile of rows
x outputs lives in scalar accumulators over one loop along k, which LLVM vectorises; z.E, whose loop runs along the
outputs, keeps them in the first cache. Three things make it fast: rows are sliced first and the loop runs over
range(len(slice)); a block of weights is read from memory once for all rows; and GOMP_SPINCOUNT is small (the command
line sets it), or OpenMP threads wait actively and starve each other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import get_num_threads, njit, prange

BLOCK = 32  # rows of weights that are read together; a multiple of every tile's width
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


@_kernel()
def _product(z, w, y, first, last):  # type: ignore[no-untyped-def]
    """One task: y[:, o] = z.w[o]^T for first <= o < last. Without its answer the compiler would leave _fetch out."""
    (m, k), seen = z.shape, np.int8(0)
    for o0 in range(first, last, BLOCK):
        o1 = min(o0 + BLOCK, last)
        y[:, o0:o1] = 0
        for k0 in range(0, k, DEPTH):
            k1 = min(k0 + DEPTH, k)
            seen = np.int8(seen ^ _fetch(w, o0, o1, k0, k1))
            for i in range(0, m - m % 4, 4):
                _four_rows(z, w, y, i, o0, o1, k0, k1)
            for i in range(m - m % 4, m):
                _one_row(z, w, y, i, o0, o1, k0, k1)
    return seen


@_kernel(parallel=True)
def _product_on_all_cores(z, w, y):  # type: ignore[no-untyped-def]
    """A function of its own: numba's cache would take _product, compiled in parallel, for the serial one."""
    blocks = (len(w) + BLOCK - 1) // BLOCK
    seen = np.zeros(blocks, np.int8)
    for block in prange(blocks):
        seen[block] = _product(z, w, y, block * BLOCK, min(block * BLOCK + BLOCK, len(w)))
    return seen


@_kernel()
def _add_four(y, x0, x1, x2, x3, e0, e1, e2, e3):  # type: ignore[no-untyped-def]
    """y += x0.e0 + x1.e1 + x2.e2 + x3.e3. Each step is cut to y's type: numba would widen it, at twice the time."""
    kind = y.dtype.type
    for j in range(len(y)):
        first = kind(kind(x0 * kind(e0[j])) + kind(x1 * kind(e1[j])))
        second = kind(kind(x2 * kind(e2[j])) + kind(x3 * kind(e3[j])))
        y[j] = kind(y[j] + kind(first + second))


@_kernel()
def _add_rows(z, e, y, v0, v1, d0, d1):  # type: ignore[no-untyped-def]
    """y[d0:d1] += z[v0:v1].e[v0:v1, d0:d1], four rows of e at a time: y is loaded and stored once for them."""
    out, none = y[d0:d1], z.dtype.type(0)
    rest = v1 - (v1 - v0) % 4
    for v in range(v0, rest, 4):
        e0, e1, e2, e3 = e[v, d0:d1], e[v + 1, d0:d1], e[v + 2, d0:d1], e[v + 3, d0:d1]
        _add_four(out, z[v], z[v + 1], z[v + 2], z[v + 3], e0, e1, e2, e3)
    for v in range(rest, v1):
        last = e[v, d0:d1]
        _add_four(out, z[v], none, none, none, last, last, last, last)


@_kernel()
def _lookup(z, e, y, first, last):  # type: ignore[no-untyped-def]
    """One task: y[m, d] += z[:, first:last].e[first:last]."""
    m, d, seen = len(z), e.shape[1], np.int8(0)
    for v0 in range(first, last, BLOCK):
        v1 = min(v0 + BLOCK, last)
        for d0 in range(0, d, DEPTH):
            d1 = min(d0 + DEPTH, d)
            seen = np.int8(seen ^ _fetch(e, v0, v1, d0, d1))
            for i in range(m):
                _add_rows(z[i], e, y[i], v0, v1, d0, d1)
    return seen


@_kernel(parallel=True)
def _lookup_on_all_cores(z, e, parts):  # type: ignore[no-untyped-def]
    """parts[tasks, m, d]: each task adds up the rows of e that fall to it."""
    rows, tasks = len(e), len(parts)
    seen = np.zeros(tasks, np.int8)
    for task in prange(tasks):
        seen[task] = _lookup(z, e, parts[task], task * rows // tasks, (task + 1) * rows // tasks)
    return seen


def matmul(z: npt.NDArray[Any], w: npt.NDArray[np.int8]) -> npt.NDArray[Any]:
    """z[m, k] of int32 or float32, w int8[n, k], both C-contiguous -> z.w^T as [m, n] of z's type.

    int32 wraps around: the product modulo 2^32. Raises ValueError for operands that do not fit.
    """
    if z.ndim != 2 or w.ndim != 2 or z.shape[1] != w.shape[1] or w.dtype != np.int8:
        raise ValueError("operands do not fit")
    if z.dtype not in (np.int32, np.float32) or not (z.flags.c_contiguous and w.flags.c_contiguous):
        raise ValueError("operands have the wrong type or layout")
    y = np.empty((len(z), len(w)), z.dtype)
    if len(z) * w.size < SMALL:
        _product(z, w, y, 0, len(w))
    else:
        _product_on_all_cores(z, w, y)
    return y


def lookup(z: npt.NDArray[np.int32], table: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """z int32[m, v], table int8[v, d], both C-contiguous -> z.table modulo 2^32 as int32[m, d].

    Raises ValueError for operands that do not fit.
    """
    if z.ndim != 2 or table.ndim != 2 or z.shape[1] != len(table) or table.dtype != np.int8:
        raise ValueError("operands do not fit")
    if z.dtype != np.int32 or not (z.flags.c_contiguous and table.flags.c_contiguous):
        raise ValueError("operands have the wrong type or layout")
    if len(z) * table.size < SMALL:
        y = np.zeros((len(z), table.shape[1]), np.int32)
        _lookup(z, table, y, 0, len(table))
        return y
    parts = np.zeros((get_num_threads(), len(z), table.shape[1]), np.int32)
    _lookup_on_all_cores(z, table, parts)
    summed: npt.NDArray[np.int32] = parts.sum(axis=0, dtype=np.int32)
    return summed


def warm_up() -> None:
    """Compile for both types, or fetch from disk: seconds the first time on a machine, else milliseconds."""
    for kind in (np.int32, np.float32):
        matmul(np.zeros((5, 3), kind), np.zeros((5, 3), np.int8))
        matmul(np.zeros((1, 1024), kind), np.zeros((SMALL // 1024, 1024), np.int8))
    lookup(np.zeros((5, 3), np.int32), np.zeros((3, 5), np.int8))
    lookup(np.zeros((1, SMALL // 1024), np.int32), np.zeros((SMALL // 1024, 1024), np.int8))
