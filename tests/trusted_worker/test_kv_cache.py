"""The cache in the arena: what is appended is found again, and nothing is left behind."""

import numpy as np
import pytest

from tests.trusted_worker.fakes import CONFIG
from trusted_worker.kv_cache import KVCache
from trusted_worker.secure_memory import BudgetExceeded, SecureMemory
from wire.errors import ContextError


def _rows(count: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((count, 1, 4)).astype(np.float32)


@pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_chunks_are_found_in_order(memory: SecureMemory, chunks: list[int]) -> None:
    cache = KVCache(memory, CONFIG, 8)
    k, v = _rows(5, 1), _rows(5, 2)
    for chunk in chunks:
        part = slice(cache.length, cache.length + chunk)
        cache.append(0, k[part], v[part])
        cache.commit(chunk)
    keys, values = cache.tokens(0, 0, 5)
    assert (keys == k.transpose(1, 0, 2)).all()
    assert (values == v.transpose(1, 0, 2)).all()


def test_rows_that_were_not_committed_are_overwritten(memory: SecureMemory) -> None:
    cache = KVCache(memory, CONFIG, 4)
    cache.append(0, _rows(3, 1), _rows(3, 1))
    cache.append(0, _rows(2, 7), _rows(2, 8))
    keys, values = cache.tokens(0, 0, 2)
    assert (keys == _rows(2, 7).transpose(1, 0, 2)).all()
    assert (values == _rows(2, 8).transpose(1, 0, 2)).all()
    assert cache.length == 0


def test_a_full_context_refuses_more_and_keeps_what_it_has(memory: SecureMemory) -> None:
    cache = KVCache(memory, CONFIG, 2)
    cache.append(0, _rows(2, 1), _rows(2, 1))
    cache.commit(2)
    with pytest.raises(ContextError, match="2 tokens"):
        cache.append(0, _rows(1, 2), _rows(1, 2))
    assert (cache.tokens(0, 0, 2)[0] == _rows(2, 1).transpose(1, 0, 2)).all()


def test_the_whole_context_is_reserved_at_once_and_wiped_at_the_end(memory: SecureMemory) -> None:
    cache = KVCache(memory, CONFIG, 16)
    assert memory.by_owner() == {"kv": 2 * 16 * 4 * 4}
    cache.append(0, _rows(16, 1), _rows(16, 2))
    cache.free()
    cache.free()
    assert memory.used == 0
    assert not memory._bytes.any()


def test_a_context_beyond_the_budget_is_refused(memory: SecureMemory) -> None:
    with pytest.raises(BudgetExceeded):
        KVCache(memory, CONFIG, 1 << 20)
    assert memory.used == 0
