"""Attention block by block: softmax over what a row sees, with bits that depend on nothing but that."""

import tracemalloc
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trusted_worker.paged import ROWS, SHAPE, Text, advance, check, expected, fill, look, pool_of
from trusted_worker import attention, kv_cache
from trusted_worker.kv_cache import KVCache
from wire.errors import ParkedError
from wire.kv_pages import PAGE_TOKENS, KvType, attention_bytes, block_pages
from wire.model_config import ModelConfig

CASES = settings(deadline=None, max_examples=30, derandomize=True)
LENGTH = 1100  # three blocks, the last one not full
SHAPES = {
    "grouped": SHAPE,
    "single heads": replace(SHAPE, heads=3, kv_heads=3, head_dim=6),
    "one head": replace(SHAPE, heads=1, kv_heads=1, head_dim=4),
    "window": replace(SHAPE, window=90),
    "wide window": replace(SHAPE, window=700),
    "one page a block": replace(SHAPE, heads=8, kv_heads=8, head_dim=256, layers=1),
}
HALF = replace(SHAPE, layers=1, heads=14, kv_heads=2, head_dim=64, hidden=896)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parked pages are opened in the opener's thread, however little there is to do."""
    monkeypatch.setattr(kv_cache, "_WORTHWHILE", 0)


def _run(config: ModelConfig, kind: KvType, slots: int, text: Text, chunks: list[int]) -> bytes:
    """Attention of every token, by layer, in the given chunks; the last chunk is repeated."""
    pool, scratch = pool_of(slots, config, kind, rows=max(chunks))
    cache, parts, sizes = pool.open(text.length), [], iter(chunks)
    while cache.length < text.length:
        parts.append(advance(cache, text, min(next(sizes, chunks[-1]), text.length - cache.length), scratch))
    return np.concatenate(parts, axis=1).tobytes()


@pytest.mark.parametrize("kind", KvType)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_depend_neither_on_chunks_nor_on_where_pages_lie(
    name: str, kind: KvType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SHAPES[name]
    text = Text(config, 5, 300 if block_pages(config) == 1 else LENGTH)
    pages = -(-text.length // PAGE_TOKENS)
    right = _run(config, kind, (pages + 1) * config.layers, text, [64])
    assert _run(config, kind, 9 * config.layers + 1, text, [1, 63, 64, 2, 17]) == right
    if kind is KvType.FLOAT32:
        assert _run(config, kind, 3 * config.layers, text, [1]) == right
    monkeypatch.setattr(kv_cache, "_WORTHWHILE", 0)
    assert _run(config, kind, config.layers, text, [50, 100, 64]) == right
    assert _run(config, kind, 2 * config.layers, text, [150]) == right


@given(st.sampled_from(list(KvType)), st.integers(3, 30), st.data())
@CASES
def test_sequences_beside_each_other_do_not_change_each_others_bits(
    kind: KvType, pages: int, data: st.DataObject
) -> None:
    texts = [Text(SHAPE, seed, 700) for seed in range(3)]
    small, scratch = pool_of(pages * SHAPE.layers, kind=kind)
    large, room = pool_of(40 * SHAPE.layers, kind=kind)
    caches = [(small.open(700), large.open(700), text) for text in texts]
    for _ in range(data.draw(st.integers(1, 30))):
        paged, whole, text = caches[data.draw(st.integers(0, 2))]
        tokens = min(data.draw(st.sampled_from([1, 20, 64])), 700 - paged.length)
        if tokens:
            out = advance(paged, text, tokens, scratch)
            parts = []
            while whole.length < paged.length:
                parts.append(advance(whole, text, paged.length - whole.length, room))
            assert np.concatenate(parts, axis=1).tobytes() == out.tobytes()
        if data.draw(st.booleans()):
            paged.rest()
        check(small)
    assert large.counts["pages_sealed"] == 0


@pytest.mark.parametrize(("kind", "tolerance"), [(KvType.FLOAT32, 2e-6), (KvType.FLOAT16, 2e-3), (KvType.INT8, 4e-2)])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_softmax_of_scaled_scores(name: str, kind: KvType, tolerance: float) -> None:
    config = SHAPES[name]
    text = Text(config, 9, 700)
    pool, scratch = pool_of(3 * config.layers, config, kind)
    cache = pool.open(700)
    for length in (1, 2, 63, 64, 65, 128, 130, 512, 513, 700):
        fill(cache, text, length)
        np.testing.assert_allclose(look(cache, text, scratch), expected(config, text, length - 1), atol=tolerance)


@pytest.mark.parametrize("size", [1e-20, 30.0, 1e4])
def test_scores_of_any_size(size: float) -> None:
    text = Text(SHAPE, 3, 600, size)
    pool, scratch = pool_of(12 * SHAPE.layers)
    cache = pool.open(600)
    fill(cache, text, 600)
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(look(cache, text, scratch), expected(SHAPE, text, 599), atol=1e-3 * size)


@pytest.mark.usefixtures("ahead")
def test_ten_thousand_tokens_at_the_smallest_budget() -> None:
    text = Text(SHAPE, 4, 10_000)
    results = []
    for slots in (SHAPE.layers, 158 * SHAPE.layers):
        pool, scratch = pool_of(slots)
        cache = pool.open(10_000)
        fill(cache, text, 9_900)
        parts = []
        while cache.length < 10_000:
            parts.append(advance(cache, text, min(ROWS, 10_000 - cache.length), scratch))
        results.append(np.concatenate(parts, axis=1))
        assert pool.used == (SHAPE.layers if slots == SHAPE.layers else 157 * SHAPE.layers)
        np.testing.assert_allclose(look(cache, text, scratch), expected(SHAPE, text, 9_999), atol=2e-6)
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.usefixtures("ahead")
def test_a_rejected_page_leaves_nothing_in_the_scratch() -> None:
    text = Text(SHAPE, 4, LENGTH)
    pool, scratch = pool_of(SHAPE.layers)
    cache = pool.open(LENGTH)
    fill(cache, text, LENGTH)
    assert cache._pages._file is not None
    cache._pages._file.truncate(20 * (pool.layout.size + 16))
    with pytest.raises(ParkedError):
        look(cache, text, scratch)
    assert not scratch._block.array.any()
    assert cache.failed


@pytest.mark.usefixtures("ahead")
def test_who_fails_on_a_block_leaves_nothing_in_the_scratch() -> None:
    text = Text(SHAPE, 4, LENGTH)
    pool, scratch = pool_of(SHAPE.layers)
    cache = pool.open(LENGTH)
    fill(cache, text, LENGTH)

    def fail() -> None:
        with scratch.frame(), closing(cache.blocks(0, 0, LENGTH, ROWS, scratch)) as blocks:
            next(blocks)
            raise ValueError

    for _ in range(20):
        with pytest.raises(ValueError):  # noqa: PT011
            fail()
        assert not scratch._block.array.any()


@pytest.mark.parametrize("kind", KvType)
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_everything_large_lies_in_the_scratch_and_it_suffices(kind: KvType, rows: int) -> None:
    text = Text(HALF, 6, LENGTH)
    pool, scratch = pool_of(8, HALF, kind, rows=rows)  # its size is exactly attention_bytes
    cache = pool.open(LENGTH)
    fill(cache, text, LENGTH - rows)
    out = np.empty((rows, HALF.heads, HALF.head_dim), np.float32)
    q, k, v = text.rows(0, LENGTH - rows, LENGTH)
    assert cache.wake(rows) == rows
    tracemalloc.start()
    try:
        cache.append(0, k, v)
        attention.attend(q, cache, 0, LENGTH - rows, 0, out, scratch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 96 << 10


def test_a_block_has_the_pages_that_the_model_says() -> None:
    assert [block_pages(config) for config in (SHAPE, HALF, SHAPES["one page a block"])] == [8, 8, 1]
    assert attention_bytes(HALF, 1) < 1.2 * (1 << 20)
    text = Text(HALF, 6, LENGTH)
    found: list[list[tuple[int, int]]] = []
    for slots in (1, 40):
        pool, scratch = pool_of(slots, HALF)
        cache: KVCache = pool.open(LENGTH)
        fill(cache, text, LENGTH)
        with scratch.frame():
            found.append([(start, len(pages)) for start, pages in cache.blocks(0, 600, LENGTH, 1, scratch)])
    assert found[0] == found[1] == [(576, 7), (1024, 2)]
