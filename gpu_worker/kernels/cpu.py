"""Products with weights on the CPU: y = z.W^T and, for an embedding table E that lies row by row, y = z.E.

For int32 z and int8 weights exact modulo 2^32, the ring product; for float32 z and int8 or float32 weights ordinary
float32. One source serves all of them: numba compiles it once per types and keeps the result on disk. A tile of rows
x outputs lives in vector registers over one loop along k (vectors.py). Four things make it fast:

- a block of weights is read from memory once, for all rows, and the next block is prefetched meanwhile;
- k is cut, so that a tile's rows of z stay in the first cache;
- cores take blocks as they get ready, so that one that is busy otherwise holds nobody up;
- GOMP_SPINCOUNT is small (the command line sets it), or OpenMP threads wait actively and starve each other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import get_num_threads, njit, prange

from gpu_worker.kernels.vectors import LINE, dot_tile, row_tile, take

BLOCK = 32  # rows of weights that are read together, at most; a multiple of every tile's width
BLOCK_BYTES = 1 << 15  # and for few rows of z about so many bytes: nothing prefetches the first block
SMALL = 1 << 21  # multiplications below which waking another core costs more than it saves
DEPTH = 1216  # inputs at a time; a multiple of LINE

Matrix = npt.NDArray[Any]


def kernel(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """njit without the GIL; compiled code is kept on disk where there is a writable place for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, nogil=True, fastmath=True, parallel=parallel)(function)
        except RuntimeError:  # no folder that numba could write to
            return njit(nogil=True, fastmath=True, parallel=parallel)(function)

    return decorate


@kernel()
def _one_row(z, w, y, i, o0, o1, k0, k1, ahead):  # type: ignore[no-untyped-def]
    """y[i, o] += z[i, k0:k1].w[o, k0:k1] for o0 <= o < o1; prefetches as many weights from element `ahead` on."""
    rest = o1 - (o1 - o0) % 4
    for o in range(o0, rest, 4):
        dot_tile(z, w, y, i, o, k0, k1, ahead + (o - o0) * (k1 - k0), 1, 4)
    for o in range(rest, o1):
        dot_tile(z, w, y, i, o, k0, k1, ahead + (o - o0) * (k1 - k0), 1, 1)


@kernel()
def _four_rows(z, w, y, i, o0, o1, k0, k1, ahead):  # type: ignore[no-untyped-def]
    """The same for rows i to i + 3."""
    rest = o1 - (o1 - o0) % 2
    for o in range(o0, rest, 2):
        dot_tile(z, w, y, i, o, k0, k1, ahead + (o - o0) * (k1 - k0), 4, 2)
    for o in range(rest, o1):
        dot_tile(z, w, y, i, o, k0, k1, ahead + (o - o0) * (k1 - k0), 4, 1)


@kernel()
def _last_inputs(z, w, y, o0, o1, k0):  # type: ignore[no-untyped-def]
    """y[:, o] += z[:, k0:].w[o, k0:] for o0 <= o < o1: inputs that fill no tile."""
    kind = z.dtype.type
    for i in range(len(z)):
        for o in range(o0, o1):
            total = y[i, o]
            for j in range(k0, w.shape[1]):
                total = kind(total + z[i, j] * kind(w[o, j]))
            y[i, o] = total


@kernel()
def _block(z, w, y, o0, o1, following):  # type: ignore[no-untyped-def]
    """y[:, o] = z.w[o]^T for o0 <= o < o1. The rows of w from `following` on come next."""
    m, k = z.shape
    whole = k - k % LINE
    y[:, o0:o1] = 0
    for k0 in range(0, whole, DEPTH):
        k1 = min(k0 + DEPTH, whole)
        ahead = following * k + (o1 - o0) * k0
        for i in range(0, m - m % 4, 4):
            _four_rows(z, w, y, i, o0, o1, k0, k1, ahead if i == 0 else o0 * k)
        for i in range(m - m % 4, m):
            _one_row(z, w, y, i, o0, o1, k0, k1, ahead if i == 0 else o0 * k)
    _last_inputs(z, w, y, o0, o1, whole)


@kernel()
def product(z, w, y, size):  # type: ignore[no-untyped-def]
    """y = z.w^T, `size` rows of w at a time."""
    n = len(w)
    for o in range(0, n, size):
        _block(z, w, y, o, min(o + size, n), o + size)


@kernel(parallel=True)
def _product_on_all_cores(z, w, y, size, counter, threads):  # type: ignore[no-untyped-def]
    """A function of its own: numba's cache would take product, compiled in parallel, for the serial one.

    A thread knows its next block before it starts on one.
    """
    for _ in prange(threads):
        n, o = len(w), take(counter) * size
        while o < n:
            following = take(counter) * size
            _block(z, w, y, o, min(o + size, n), following)
            o = following


@kernel()
def _add_rows(z, e, y, v0, v1, ahead):  # type: ignore[no-untyped-def]
    """y += z[:, v0:v1].e[v0:v1]; prefetches as many elements of e from `ahead` on."""
    m, d = len(z), e.shape[1]
    kind, whole = z.dtype.type, d - d % LINE
    for i in range(0, m - m % 2, 2):
        for d0 in range(0, whole, LINE):
            row_tile(z, e, y, i, v0, v1, d0, ahead + (v1 - v0) * d0 if i == 0 else v0 * d, 2)
    for i in range(m - m % 2, m):
        for d0 in range(0, whole, LINE):
            row_tile(z, e, y, i, v0, v1, d0, ahead + (v1 - v0) * d0 if i == 0 else v0 * d, 1)
    for i in range(m):
        for v in range(v0, v1):
            for j in range(whole, d):
                y[i, j] = kind(y[i, j] + z[i, v] * kind(e[v, j]))


@kernel()
def sum_rows(z, e, y, first, last):  # type: ignore[no-untyped-def]
    """y += z[:, first:last].e[first:last]."""
    for v0 in range(first, last, BLOCK):
        v1 = min(v0 + BLOCK, last)
        _add_rows(z, e, y, v0, v1, v1 * e.shape[1])


@kernel(parallel=True)
def _lookup_on_all_cores(z, e, parts):  # type: ignore[no-untyped-def]
    """parts[tasks, m, d]: each task adds up the rows of e that fall to it."""
    rows, tasks = len(e), len(parts)
    for task in prange(tasks):
        sum_rows(z, e, parts[task], task * rows // tasks, (task + 1) * rows // tasks)


def matmul(z: Matrix, w: Matrix) -> Matrix:
    """z[m, k] of int32 or float32, w[n, k] of int8, or of float32 as z, both C-contiguous -> z.w^T, [m, n] of z's type.

    int32 wraps around: the product modulo 2^32. Raises ValueError for operands that do not fit.
    """
    if z.ndim != 2 or w.ndim != 2 or z.shape[1] != w.shape[1]:
        raise ValueError("operands do not fit")
    _check(z, w)
    y, size = np.empty((len(z), len(w)), z.dtype), _block_rows(len(z), w)
    if len(z) * w.size < SMALL:
        product(z, w, y, size)
    else:
        _product_on_all_cores(z, w, y, size, np.zeros(1, np.int64), get_num_threads())
    return y


@kernel()
def scale(y, factors):  # type: ignore[no-untyped-def]
    """y[m, n] of float32 times factors[n], in place."""
    for i in range(len(y)):
        for j in range(y.shape[1]):
            y[i, j] *= factors[j]


def lookup(z: Matrix, table: Matrix) -> Matrix:
    """z[m, v], table[v, d], of types as in `matmul`, both C-contiguous -> z.table, [m, d] of z's type.

    int32 wraps around. Raises ValueError for operands that do not fit.
    """
    if z.ndim != 2 or table.ndim != 2 or z.shape[1] != len(table):
        raise ValueError("operands do not fit")
    _check(z, table)
    if len(z) * table.size < SMALL:
        y = np.zeros((len(z), table.shape[1]), z.dtype)
        sum_rows(z, table, y, 0, len(table))
        return y
    parts = np.zeros((get_num_threads(), len(z), table.shape[1]), z.dtype)
    _lookup_on_all_cores(z, table, parts)
    summed: Matrix = parts.sum(axis=0, dtype=z.dtype)
    return summed


def warm_up(kind: type, weights: type, *, lookups: bool) -> None:
    """Compile for these types, or fetch from disk: seconds the first time on a machine, else milliseconds."""
    few, row, many = (5, 3), (1, 1024), (SMALL // 1024, 1024)
    matmul(np.zeros(few, kind), np.zeros(few, weights))
    matmul(np.zeros(row, kind), np.zeros(many, weights))
    if kind is np.float32:
        scale(np.zeros(few, kind), np.zeros(3, kind))
    if lookups:
        lookup(np.zeros(few, kind), np.zeros(few[::-1], weights))
        lookup(np.zeros((1, many[0]), kind), np.zeros(many, weights))


def _check(z: Matrix, w: Matrix) -> None:
    if z.dtype not in (np.int32, np.float32) or (w.dtype != np.int8 and not z.dtype == w.dtype == np.float32):
        raise ValueError("operands have the wrong type")
    if not (z.flags.c_contiguous and w.flags.c_contiguous):
        raise ValueError("operands lie in the wrong order")


def _block_rows(m: int, w: Matrix) -> int:
    row_bytes: int = w.shape[1] * w.itemsize
    return BLOCK if m >= 16 else min(max(BLOCK_BYTES // row_bytes // 8 * 8, 8), BLOCK)
