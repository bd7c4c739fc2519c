"""Pools of pages of a model with two layers, and tokens whose keys and values follow from a seed."""

from dataclasses import replace
from typing import Any

import numpy as np

from tests.trusted_worker.fakes import CONFIG
from trusted_worker.arithmetic import F32
from trusted_worker.attention import attend
from trusted_worker.kv_cache import KVCache, PagePool
from trusted_worker.opener import Opener
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.kv_pages import PAGE_TOKENS, KvType, attention_bytes, page_words
from wire.model_config import ModelConfig

SHAPE = replace(CONFIG, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32, max_context=1 << 14)
BOOT = bytes(range(32))
ROWS = 64
opener = Opener()


def pool_of(
    slots: int,
    config: ModelConfig = SHAPE,
    kind: KvType = KvType.FLOAT32,
    folder: str | None = None,
    rows: int = ROWS,
) -> tuple[PagePool, Scratch]:
    """A pool in an arena that holds nothing else but scratch for exactly `rows` rows."""
    memory = SecureMemory(slots * 4 * page_words(config, kind) + attention_bytes(config, rows) + (1 << 12))
    scratch = Scratch(memory, attention_bytes(config, rows))
    return PagePool(memory, config, kind, slots, PageStore(BOOT, folder), opener), scratch


class Text:
    """A sequence of random tokens: `rows` gives q, k and v of any of them, whatever was asked before."""

    def __init__(self, config: ModelConfig, seed: int, tokens: int, size: float = 1.0) -> None:
        random = np.random.default_rng(seed)
        heads = config.heads + 2 * config.kv_heads
        shape = (config.layers, tokens, heads, config.head_dim)
        self.length = tokens
        self._config, self._all = config, (random.standard_normal(shape) * size).astype(np.float32)

    def rows(self, layer: int, start: int, end: int) -> tuple[F32, F32, F32]:
        """q float32[m, heads, d], k and v float32[m, kv_heads, d], none of them contiguous."""
        q, k, v = np.split(
            self._all[layer, start:end], [self._config.heads, self._config.heads + self._config.kv_heads], axis=1
        )
        return q, k, v


def advance(cache: KVCache, text: Text, tokens: int, scratch: Scratch | None = None) -> F32:
    """One step of at most `tokens` tokens; attention of all layers, float32[layers, m, heads, d], given a scratch."""
    config, start = cache.config, cache.length
    end = start + cache.wake(tokens)
    out = np.zeros((config.layers, end - start, config.heads, config.head_dim), np.float32)
    for layer in range(config.layers):
        q, k, v = text.rows(layer, start, end)
        cache.append(layer, k, v)
        if scratch is not None:
            attend(q, cache, layer, start, config.window, out[layer], scratch)
    cache.commit(end - start)
    return out


def fill(cache: KVCache, text: Text, length: int) -> None:
    """Tokens without attention, until there are `length`."""
    while cache.length < length:
        advance(cache, text, min(ROWS, length - cache.length))


def look(cache: KVCache, text: Text, scratch: Scratch) -> F32:
    """Attention of the last token of the cache over all that it sees, float32[layers, heads, d]."""
    config, last = cache.config, cache.length - 1
    out = np.empty((config.layers, 1, config.heads, config.head_dim), np.float32)
    for layer in range(config.layers):
        q, _, _ = text.rows(layer, last, last + 1)
        attend(q, cache, layer, last, config.window, out[layer], scratch)
    return out[:, 0]


def expected(config: ModelConfig, text: Text, last: int) -> Any:
    """What `look` should see, in float64: softmax over the tokens up to `last`, float64[layers, heads, d]."""
    first = max(0, last + 1 - config.window) if config.window else 0
    out = np.empty((config.layers, config.heads, config.head_dim))
    for layer in range(config.layers):
        q = text.rows(layer, last, last + 1)[0][0].astype(np.float64)
        _, k, v = text.rows(layer, first, last + 1)
        for head in range(config.heads):
            group = head // (config.heads // config.kv_heads)
            scores = k[:, group].astype(np.float64) @ q[head] / config.head_dim**0.5
            weights = np.exp(scores - scores.max())
            out[layer, head] = weights / weights.sum() @ v[:, group].astype(np.float64)
    return out


def check(pool: PagePool) -> None:
    """Every slot is free, and zero, or holds one page of one sequence; and every sequence can have its share."""
    held = [slot for cache in pool._open for slots in cache._slots for slot in slots if slot >= 0]
    assert sorted(held + pool._free) == list(range(pool.slots))
    assert pool.used == len(held)
    assert not pool.pages[pool._free].any()
    for cache in pool._open:
        held_here = sorted(
            (page, layer) for layer, slots in enumerate(cache._slots) for page, slot in enumerate(slots) if slot >= 0
        )
        full = cache.length // PAGE_TOKENS
        assert sorted(cache.full) == [name for name in held_here if name[0] < full]
        assert cache.resident == len(held_here)
    assert sum(max(cache.pinned, 1) for cache in pool._open) <= pool.slots // pool.layers
