"""Pages in the arena and outside: what is appended is found again, shares are kept, and nothing is left behind."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trusted_worker.paged import BOOT, ROWS, SHAPE, Text, advance, check, fill, look, opener, pool_of
from trusted_worker.kv_cache import KVCache, PagePool
from trusted_worker.sealed_pages import TAG_BYTES, PageStore
from trusted_worker.secure_memory import BudgetExceeded, Scratch, SecureMemory
from wire.errors import ContextError, ExhaustedError, InvalidArgumentError, ParkedError
from wire.kv_pages import PAGE_TOKENS, KvType

CASES = settings(deadline=None, max_examples=40, derandomize=True)
LAYERS = SHAPE.layers
TEXT = Text(SHAPE, 1, 2048)
OTHER = Text(SHAPE, 2, 2048)


def _found(cache: KVCache, scratch: Scratch) -> np.ndarray[Any, Any]:
    """What the cache holds, float32[layers, 2, kv_heads, length, head_dim]."""
    parts: list[list[Any]] = []
    for layer in range(LAYERS):
        with scratch.frame():
            blocks = [block.copy() for _, block in cache.blocks(layer, 0, cache.length, ROWS, scratch)]
        parts.append([block.transpose(1, 2, 0, 3, 4) for block in blocks])
    whole = [np.concatenate([p.reshape(*p.shape[:2], -1, p.shape[-1]) for p in layer], axis=2) for layer in parts]
    return np.stack(whole)[:, :, :, : cache.length]


def _appended(text: Text, length: int) -> np.ndarray[Any, Any]:
    rows = [text.rows(layer, 0, length)[1:] for layer in range(LAYERS)]
    return np.stack([np.stack([k.transpose(1, 0, 2), v.transpose(1, 0, 2)]) for k, v in rows])


@pytest.mark.parametrize("pages", [1, 2, 40])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_what_is_appended_is_found_wherever_it_lies(pages: int, chunk: int) -> None:
    pool, scratch = pool_of(pages * LAYERS)
    cache, length = pool.open(2048), 700
    while cache.length < length:
        advance(cache, TEXT, min(chunk, length - cache.length))
        check(pool)
    assert (_found(cache, scratch) == _appended(TEXT, length)).all()
    assert pool.counts["pages_sealed"] == (0 if pages == 40 else (10 - (pages - 1)) * LAYERS)
    cache.free()
    assert (pool.used, pool.spilled) == (0, 0)


def test_rows_that_were_not_committed_are_overwritten() -> None:
    pool, scratch = pool_of(4 * LAYERS)
    cache = pool.open(200)
    fill(cache, TEXT, 60)
    assert cache.wake(40) == 40
    for layer in range(LAYERS):
        cache.append(layer, *OTHER.rows(layer, 60, 100)[1:])
    assert cache.length == 60
    fill(cache, TEXT, 100)
    assert (_found(cache, scratch) == _appended(TEXT, 100)).all()


def test_a_sequence_appends_what_it_woke_for_and_no_more() -> None:
    pool, _ = pool_of(4 * LAYERS)
    cache = pool.open(70)
    with pytest.raises(ValueError, match="not woken"):
        cache.append(0, *TEXT.rows(0, 0, 1)[1:])
    assert cache.wake(1000) == 70
    with pytest.raises(ValueError, match="71"):
        cache.append(0, *TEXT.rows(0, 0, 71)[1:])
    fill(cache, TEXT, 70)
    with pytest.raises(ContextError, match="70 tokens"):
        cache.wake(1)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 65520.0, -7e4])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", KvType)
def test_numbers_that_the_element_type_does_not_hold_are_refused(kind: KvType, half: int, bad: float) -> None:
    pool, scratch = pool_of(4 * LAYERS, kind=kind)
    cache = pool.open(8)
    cache.wake(1)
    rows = np.ones((2, 1, SHAPE.kv_heads, SHAPE.head_dim), np.float32)
    rows[half, 0, 1, 3] = bad
    if kind is not KvType.FLOAT16 and np.isfinite(bad):
        cache.append(0, *rows)
    else:
        with pytest.raises(InvalidArgumentError, match=f"do not fit a {kind.name.lower()} cache"):
            cache.append(0, *rows)
    assert cache.failed == (kind is KvType.FLOAT16 or not np.isfinite(bad))
    rows[half, 0, 1, 3] = 65504
    for layer in range(LAYERS):
        cache.append(layer, *rows)
    cache.commit(1)
    assert _found(cache, scratch)[0, half, 1, 0, 3] == 65504
    assert not cache.failed


@given(st.integers(0, 1 << 16), st.sampled_from([1e-30, 1e-3, 1.0, 3e4]))
@CASES
def test_elements_are_as_close_as_their_type_allows(seed: int, size: float) -> None:
    text = Text(SHAPE, seed, 70, size if size < 3e4 else 8e3)
    for kind in KvType:
        pool, scratch = pool_of(LAYERS, kind=kind)
        cache = pool.open(70)
        fill(cache, text, 70)
        right, found = _appended(text, 70), _found(cache, scratch)
        error = np.abs(found.astype(np.float64) - right)
        if kind is KvType.FLOAT32:
            assert not error.any()
        elif kind is KvType.FLOAT16:
            assert (error <= np.maximum(np.abs(right) * 2.0**-11, 2.0**-25)).all()
        else:  # half a step, and the rounding of the scale
            assert (error <= np.abs(right).max(axis=-1, keepdims=True) * (0.5 + 1e-4) / 127).all()


def test_a_session_is_admitted_when_its_share_is_left() -> None:
    pool, _ = pool_of(2 * LAYERS + 1)
    caches = [pool.open(1000), pool.open(1000)]
    with pytest.raises(ExhaustedError, match="holds 2 sessions of this model"):
        pool.open(1)
    caches[0].free()
    caches[0].free()
    assert pool.open(1).capacity == 1
    with pytest.raises(ExhaustedError, match="holds 0 sessions"):
        pool_of(LAYERS - 1)[0].open(1)


def test_a_pool_that_does_not_fit_is_refused() -> None:
    memory = SecureMemory(1 << 14)
    with pytest.raises(BudgetExceeded):
        PagePool(memory, SHAPE, KvType.FLOAT32, 100, PageStore(BOOT, None), opener)
    assert memory.used == 0


def test_nobody_takes_what_was_promised_to_others() -> None:
    pool, _ = pool_of(2 * LAYERS + 1)
    one, two = pool.open(1000), pool.open(1000)
    assert one.wake(200) == PAGE_TOKENS  # a second page would be the other's
    assert two.wake(200) == PAGE_TOKENS
    for cache, text in ((one, TEXT), (two, OTHER)):
        fill(cache, text, 60)
    assert [one.wake(10), two.wake(10)] == [4, 4]  # to the end of the page
    two.free()
    assert one.wake(10) == 10
    third = pool.open(1000)  # between steps: what is not used is given back
    assert third.wake(1) == 1
    check(pool)


def test_the_full_tails_of_a_sequence_make_room_for_its_new_ones() -> None:
    pool, scratch = pool_of(2 * LAYERS)
    one, two = pool.open(1000), pool.open(1000)
    fill(two, OTHER, 10)
    for _ in range(5):
        fill(one, TEXT, one.length + PAGE_TOKENS)
        assert (one.resident, two.resident) == (LAYERS, LAYERS)
        check(pool)
    assert pool.counts["pages_sealed"] == 4 * LAYERS
    assert pool.spilled == 4 * LAYERS * (pool.layout.size + TAG_BYTES)
    assert (_found(one, scratch) == _appended(TEXT, 5 * PAGE_TOKENS)).all()


@pytest.mark.parametrize("head_start", [0, 300, 1300])
def test_two_sequences_that_fill_a_pool_share_it_equally(head_start: int) -> None:
    pool, _ = pool_of(21 * LAYERS)
    one, two = pool.open(2048), pool.open(2048)
    fill(one, TEXT, head_start)
    for _ in range(1400):
        for cache, text in ((one, TEXT), (two, OTHER)):
            if cache.length < 2040:
                advance(cache, text, 1)
    assert pool.used == pool.slots
    assert abs(one.resident - two.resident) <= LAYERS


def test_who_rests_gives_first_and_the_first_tokens_go_first() -> None:
    pool, _ = pool_of(10 * LAYERS)
    resting, running = pool.open(2048), pool.open(2048)
    fill(resting, TEXT, 4 * PAGE_TOKENS)
    resting.rest()
    fill(running, OTHER, 6 * PAGE_TOKENS)
    assert pool.used == pool.slots
    for pages in range(1, 5):
        fill(running, OTHER, (6 + pages) * PAGE_TOKENS)
        assert resting.resident == (4 - pages) * LAYERS
        assert sorted({page for page, _ in resting.full}) == list(range(pages, 4))
        assert running.resident == (6 + pages) * LAYERS
    fill(running, OTHER, 11 * PAGE_TOKENS)
    assert running.resident == 10 * LAYERS


def test_parked_pages_come_back_for_who_reads_them_and_leave_again_for_nothing() -> None:
    pool, scratch = pool_of(10 * LAYERS)
    one, two = pool.open(2048), pool.open(2048)
    fill(one, TEXT, 9 * PAGE_TOKENS)
    fill(two, OTHER, 9 * PAGE_TOKENS)
    assert abs(one.resident - two.resident) <= LAYERS
    two.rest()  # its slots are for whoever reads
    right = look(one, TEXT, scratch)
    assert one.resident == 9 * LAYERS
    restored = pool.counts["pages_restored"]
    assert (look(one, TEXT, scratch) == right).all()
    assert pool.counts["pages_restored"] == restored  # nothing is read outside any more
    check(pool)
    two.wake(1)
    one.rest()
    look(two, OTHER, scratch)
    look(one, TEXT, scratch)
    again = pool.counts["pages_sealed"]
    for _ in range(3):
        one.wake(1)
        two.rest()
        look(one, TEXT, scratch)
        two.wake(1)
        one.rest()
        look(two, OTHER, scratch)
        check(pool)
    assert pool.counts["pages_sealed"] - again <= 2 * LAYERS  # every page at most once


def test_who_wakes_gets_its_share_back_by_reading() -> None:
    pool, scratch = pool_of(10 * LAYERS)
    one, two = pool.open(2048), pool.open(2048)
    fill(one, TEXT, 9 * PAGE_TOKENS)
    one.rest()
    fill(two, OTHER, 10 * PAGE_TOKENS)
    assert one.resident == 0
    one.wake(1)  # a tail, and the other is as awake
    for _ in range(3):
        look(one, TEXT, scratch)
        look(two, OTHER, scratch)
        check(pool)
        assert abs(one.resident - two.resident) <= LAYERS + 1


def test_a_page_is_sealed_once_however_often_it_leaves() -> None:
    pool, scratch = pool_of(3 * LAYERS)
    one, two = pool.open(2048), pool.open(2048)
    fill(one, TEXT, 6 * PAGE_TOKENS)
    for _ in range(4):
        fill(two, OTHER, two.length + 10)
        two.rest()
        assert (_found(one, scratch) == _appended(TEXT, one.length)).all()
        one.rest()
    names = [name for cache in (one, two) for name, slot in cache._pages._slots.items() if slot.complete]
    assert pool.counts["pages_sealed"] == len(names)
    assert {slot.version for cache in (one, two) for slot in cache._pages._slots.values()} == {1}


def test_freed_slots_are_zero() -> None:
    pool, _ = pool_of(6 * LAYERS)
    one, two = pool.open(2048), pool.open(2048)
    fill(one, TEXT, 300)
    fill(two, OTHER, 300)
    one.wake(40)
    one.append(0, *TEXT.rows(0, 300, 340)[1:])
    one.rest()  # rows that were not committed
    check(pool)
    one.free()
    check(pool)
    assert pool.used == two.resident > 0
    two.free()
    assert not pool.pages.any()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped"])
def test_a_changed_file_ends_one_sequence_and_no_other(damage: str) -> None:
    pool, scratch = pool_of(2 * LAYERS)
    one, two = pool.open(2048), pool.open(2048)
    fill(two, OTHER, 3 * PAGE_TOKENS)
    fill(one, TEXT, 12 * PAGE_TOKENS)
    assert one._pages._file is not None
    file, entry = one._pages._file.fileno(), pool.layout.size + TAG_BYTES
    if damage == "truncated":
        os.ftruncate(file, entry * LAYERS)
    elif damage == "flipped":
        os.pwrite(file, bytes([os.pread(file, 1, 5 * entry)[0] ^ 1]), 5 * entry)
    else:
        first, second = os.pread(file, entry, 0), os.pread(file, entry, entry)
        os.pwrite(file, second + first, 0)
    with pytest.raises(ParkedError):
        look(one, TEXT, scratch)
    assert (one.failed, two.failed) == (True, False)
    check(pool)
    assert (_found(two, scratch) == _appended(OTHER, 3 * PAGE_TOKENS)).all()
    one.free()
    assert pool.used == two.resident
    two.free()
    assert (pool.used, pool.spilled) == (0, 0)


def _must_park() -> tuple[PagePool, Scratch, KVCache, KVCache]:
    """A pool that is full, with a sequence that rests and one at the end of its page."""
    pool, scratch = pool_of(6 * LAYERS)
    victim, asker = pool.open(2048), pool.open(2048)
    fill(victim, TEXT, 4 * PAGE_TOKENS + 10)
    victim.rest()
    fill(asker, OTHER, PAGE_TOKENS)
    return pool, scratch, victim, asker


@pytest.mark.parametrize("how", ["no space", "half a page"])
def test_a_full_disk_ends_who_asks_and_the_victim_keeps_its_pages(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, scratch, victim, asker = _must_park()
    before = victim.resident

    def full(*_: Any) -> int:
        if how == "no space":
            raise OSError(errno.ENOSPC, "full")
        return 100

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(ExhaustedError, match="folder for parked pages"):
            asker.wake(1)
    check(pool)
    assert victim.resident + asker.resident + len(pool._free) == pool.slots
    assert victim.resident == before
    assert (_found(victim, scratch) == _appended(TEXT, victim.length)).all()
    assert asker.wake(1) == 1  # there is room again
    fill(asker, OTHER, 6 * PAGE_TOKENS)
    assert (_found(asker, scratch) == _appended(OTHER, asker.length)).all()
    assert (_found(victim, scratch) == _appended(TEXT, victim.length)).all()
    check(pool)


def test_on_a_full_disk_pages_that_lie_there_already_still_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest holder no page was sealed; of another one all were, and came back since."""
    pool, scratch = pool_of(8 * LAYERS)
    sealed = pool.open(1000)
    fill(sealed, TEXT, 3 * PAGE_TOKENS)
    sealed.rest()
    other = pool.open(1000)
    fill(other, OTHER, 7 * PAGE_TOKENS)
    other.free()
    sealed.wake(1)
    assert (_found(sealed, scratch) == _appended(TEXT, sealed.length)).all()
    fill(pool.open(1000), OTHER, 5 * PAGE_TOKENS)
    asker = pool.open(1000)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    assert asker.wake(1) == 1
    check(pool)


def test_a_full_disk_leaves_what_fits_already(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, _, asker = _must_park()
    advance(asker, OTHER, 1)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    assert asker.wake(100) == PAGE_TOKENS - 1
    check(pool)


def test_reading_does_not_need_the_disk_to_take_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, scratch, victim, asker = _must_park()
    fill(asker, OTHER, 8 * PAGE_TOKENS)
    victim.wake(1)
    asker.rest()
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    assert (_found(victim, scratch) == _appended(TEXT, victim.length)).all()
    check(pool)


def test_a_folder_that_is_gone_ends_who_asks(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    pool, scratch = pool_of(2 * LAYERS, folder=str(folder))
    one, two = pool.open(2048), pool.open(2048)
    folder.rmdir()
    fill(one, TEXT, 100)
    with pytest.raises(ExhaustedError, match="folder for parked pages"):
        two.wake(1)
    two.free()
    fill(one, TEXT, 2 * PAGE_TOKENS)
    assert (_found(one, scratch) == _appended(TEXT, 2 * PAGE_TOKENS)).all()


def test_a_window_keeps_its_pages_and_parks_nothing() -> None:
    config = replace(SHAPE, window=100)
    pool, _ = pool_of(4 * LAYERS, config)
    cache = pool.open(2048)
    for length in range(1, 1000):
        fill(cache, TEXT, length)
        first = max(0, length + 1 - 100) // PAGE_TOKENS
        assert cache.resident == (-(-length // PAGE_TOKENS) - first) * LAYERS
    check(pool)
    assert pool.counts["pages_sealed"] == 0


class Players:
    """Up to four sequences in one pool, and everything that can be done with them."""

    def __init__(self, slots: int) -> None:
        self.pool, self.scratch = pool_of(slots, rows=150)
        self.texts = [Text(SHAPE, seed, 1000) for seed in range(4)]
        self.caches: dict[int, KVCache] = {}

    def open(self, number: int, _: int) -> None:
        if number in self.caches:
            return
        if len(self.caches) < self.pool.slots // LAYERS:
            self.caches[number] = self.pool.open(1000)
        else:
            with pytest.raises(ExhaustedError):
                self.pool.open(1000)

    def step(self, number: int, tokens: int) -> None:
        before = self.caches[number].length
        advance(self.caches[number], self.texts[number], tokens)
        assert self.caches[number].length > before  # the disk takes pages: there is always a way on

    def wake(self, number: int, tokens: int) -> None:
        assert 0 < self.caches[number].wake(tokens) <= tokens

    def fail(self, number: int, tokens: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *_: 0)
            try:
                self.caches[number].wake(tokens)
            except ExhaustedError:
                self.free(number, 0)

    def rest(self, number: int, _: int) -> None:
        self.caches[number].rest()

    def free(self, number: int, _: int) -> None:
        self.caches.pop(number).free()

    def read(self, number: int, _: int) -> None:
        cache = self.caches[number]
        if cache.length:
            assert (_found(cache, self.scratch) == _appended(self.texts[number], cache.length)).all()


KINDS = ("open", "step", "step", "wake", "fail", "rest", "free", "read")


@given(
    st.integers(3 * LAYERS, 9 * LAYERS),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(1, 150)), max_size=60),
)
@settings(CASES, max_examples=100)
def test_slots_are_never_lost_and_never_used_twice(slots: int, steps: list[tuple[str, int, int]]) -> None:
    players = Players(slots)
    for number in range(3):
        players.open(number, 0)
    for kind, number, tokens in steps:
        cache = players.caches.get(number)
        if kind == "open" or (cache is not None and cache.length + tokens <= 1000):
            getattr(players, kind)(number, tokens)
            check(players.pool)
    for number in list(players.caches):
        players.read(number, 0)
        check(players.pool)
        players.free(number, 0)
    assert players.pool.used == 0
    assert not players.pool.pages.any()
