"""Attention over a cache that comes block by block: the softmax is computed online, so a context may be of any length.

For each row and head it keeps the largest score so far, the sum of exp(score - largest) and the sum of the values so
weighted; when a larger score comes, what was summed shrinks (Milakov and Gimelshein 2018; FlashAttention, Dao et al.
2022). Products are made page by page, each of one row, and added in the order of pages; what a row does not see counts
as zero. So a row's bits depend on the tokens it sees alone: not on the chunk it came in, nor on where pages lie.
"""

from contextlib import closing

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.kv_cache import KVCache
from trusted_worker.secure_memory import Scratch
from wire.kv_pages import PAGE_TOKENS, block_rows

_LOWEST = np.finfo(np.float32).min  # instead of -inf, so that differences are numbers


def attend(q: F32, cache: KVCache, layer: int, position: int, window: int, out: F32, scratch: Scratch) -> None:
    """Attention of q float32[m, heads, d] into `out` of the same shape; row i stands at token position + i.

    It sees itself and the tokens before it, `window` of them in all unless that is 0. The cache holds position + m
    tokens. Raises ParkedError when a parked page was changed.
    """
    rows, heads, dim = q.shape
    with scratch.frame():
        scaled: F32 = scratch.empty((rows, heads, dim), np.float32)
        np.multiply(q, np.float32(dim**-0.5), out=scaled)
        largest: F32 = scratch.empty((rows, heads), np.float32)
        total: F32 = scratch.empty((rows, heads), np.float32)
        first = max(0, position + 1 - window) if window else 0
        group, fresh = block_rows(cache.config), True
        with closing(cache.blocks(layer, first, position + rows, rows, scratch)) as blocks:
            for start, pages in blocks:
                for row in range(0, rows, group):
                    part = slice(row, min(row + group, rows))
                    with scratch.frame():
                        scores = _scores(scaled[part], pages, scratch)
                        for i in range(len(scores)):
                            _hide(scores[i], position + row + i + 1 - start, window)
                        _add(scores, pages, largest[part], total[part], out[part], scratch, fresh)
                fresh = False
        out /= total[:, :, None]


def _scores(q: F32, pages: F32, scratch: Scratch) -> F32:
    """q . K^T: float32[rows, pages, kv_heads, heads of each, PAGE_TOKENS]."""
    count, _, groups, _, dim = pages.shape
    grouped = q.reshape(len(q), 1, groups, -1, dim)
    scores: F32 = scratch.empty((len(q), count, *grouped.shape[2:4], PAGE_TOKENS), np.float32)
    return np.matmul(grouped, pages[:, 0].transpose(0, 1, 3, 2), out=scores)


def _hide(scores: F32, end: int, window: int) -> None:
    """What one row does not see: tokens from `end` on, counted from the first here, and those before its window."""
    page, token = divmod(max(end, 0), PAGE_TOKENS)
    if page < len(scores):
        scores[page, ..., token:] = -np.inf
        scores[page + 1 :] = -np.inf
    if window and end > window:
        page, token = divmod(end - window, PAGE_TOKENS)
        scores[:page] = -np.inf
        if page < len(scores):
            scores[page, ..., :token] = -np.inf


def _add(scores: F32, pages: F32, largest: F32, total: F32, out: F32, scratch: Scratch, fresh: bool) -> None:
    """Take one block into the state of its rows. `fresh`: there is none yet."""
    weighted: F32 = scratch.empty((*scores.shape[:4], pages.shape[-1]), np.float32)
    top = scores.max(axis=(1, 4), initial=_LOWEST)
    # 1. What was summed so far shrinks, where a larger score came.
    if not fresh:
        np.maximum(largest.reshape(top.shape), top, out=top)
        shrink = np.exp(largest - top.reshape(largest.shape))
        total *= shrink
        out *= shrink[:, :, None]
    largest[...] = top.reshape(largest.shape)
    # 2. Weights, their sums, and the weighted values.
    scores -= top[:, None, :, :, None]
    np.exp(scores, out=scores)
    np.matmul(scores, pages[:, 1], out=weighted)
    # 3. Added page by page: numpy sums in another order only along the axis that is fastest in memory.
    sums = np.add.accumulate(scores.sum(axis=-1), axis=1)[:, -1].reshape(total.shape)
    values = np.add.reduce(weighted, axis=1).reshape(out.shape)
    if fresh:
        total[...], out[...] = sums, values
    else:
        total += sums
        out += values
