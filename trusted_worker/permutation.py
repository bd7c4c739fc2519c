"""Secret permutations of the dims inside attention heads, and their use on rows of heads laid side by side.

A table p (uint16[..., d]) permutes x to x_p with x_p[i] = x[p[i]]: `gather` does that, `scatter` undoes it.
"""

import os

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F32

Table = npt.NDArray[np.uint16]
Indices = npt.NDArray[np.int64]


def draw(out: Table) -> None:
    """Fill uint16[layers, ..., d] with independent, uniform permutations from the operating system's CSPRNG."""
    for layer in out:  # sorting 64-bit words: two are equal with a chance below 2^-40
        layer[...] = np.argsort(np.frombuffer(os.urandom(8 * layer.size), np.uint64).reshape(layer.shape), axis=-1)


def columns(table: Table, heads: int) -> Indices:
    """Where each column of float32[m, heads . d] comes from: table uint16[groups, d], shared within a group."""
    groups, dim = table.shape
    within = np.repeat(table.astype(np.int64), heads // groups, axis=0)
    within += np.arange(heads)[:, None] * dim
    return within.reshape(-1)


def gather(x: F32, index: Indices, out: F32) -> None:
    """Permute columns: out[:, i] = x[:, index[i]]."""
    np.take(x, index, axis=1, out=out, mode="clip")  # "clip" writes straight into out


def scatter(x: F32, index: Indices, out: F32) -> None:
    """Undo `gather`: out[:, index[i]] = x[:, i]."""
    out[:, index] = x


def compose(old: Table, new: Table) -> npt.NDArray[np.int32]:
    """new after the inverse of old: what turns rows permuted by old into rows permuted by new, int32."""
    inverse = np.argsort(old, axis=-1)
    return np.take_along_axis(inverse, new.astype(np.int64), axis=-1).astype(np.int32)
