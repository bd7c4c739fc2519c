"""Parked pages: what comes back is the last version of the right page of the right sequence, or an error."""

import errno
import hashlib
import hmac
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.sealed_pages import TAG_BYTES, PageStore, SealedPages
from wire.errors import ExhaustedError, ParkedError

CASES = settings(deadline=None, max_examples=100, derandomize=True)
BOOT = bytes(range(32))
Name = tuple[int, int, int]
WORDS = 24

names = st.tuples(st.integers(0, 255), st.integers(0, 65_535), st.integers(0, (1 << 32) - 1))
few_names = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2))


def _data(seed: int, dtype: Any = np.int32) -> npt.NDArray[Any]:
    return np.frombuffer(np.random.default_rng(seed).bytes(4 * WORDS), dtype).copy()


def _opened(pages: SealedPages, name: Name, size: int = WORDS) -> npt.NDArray[Any]:
    out = np.full(size, 0x5A5A5A5A, np.int32)
    pages.open(*name, out)
    return out


def _rejected(pages: SealedPages, name: Name) -> None:
    """Opening fails, and leaves nothing in the caller's array."""
    out = np.full(WORDS, 0x5A5A5A5A, np.int32)
    with pytest.raises(ParkedError):
        pages.open(*name, out)
    assert not out.any()


def _content(pages: SealedPages) -> bytes:
    return os.pread(pages._descriptor(), 1 << 20, 0)


def _overwrite(pages: SealedPages, content: bytes, offset: int = 0) -> None:
    os.pwrite(pages._descriptor(), content, offset)


@CASES
@given(st.lists(st.tuples(st.integers(0, 2), few_names, st.integers(0, 1 << 32)), max_size=40))
def test_every_page_comes_back_as_it_was_sealed_last(writes: list[tuple[int, Name, int]]) -> None:
    store = PageStore(BOOT, None)
    sequences = [store.sequence() for _ in range(3)]
    expected: dict[tuple[int, Name], npt.NDArray[Any]] = {}
    for number, name, seed in writes:
        expected[number, name] = _data(seed)
        sequences[number].seal(*name, expected[number, name])
    for (number, name), data in expected.items():
        for _ in range(2):
            assert (_opened(sequences[number], name) == data).all()
    for number, pages in enumerate(sequences):
        sealed = sum(1 for other, _ in expected if other == number)
        assert len(_content(pages)) == pages.size == sealed * (4 * WORDS + TAG_BYTES)
        pages.free()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_pages_of_any_type_and_shape(dtype: Any) -> None:
    pages = PageStore(BOOT, None).sequence()
    data = _data(3, dtype).reshape(2, 4, -1)
    pages.seal(0, 0, 0, data)
    out = np.empty_like(data)
    pages.open(0, 0, 0, out)
    assert out.tobytes() == data.tobytes()


def test_kinds_may_have_sizes_of_their_own() -> None:
    pages = PageStore(BOOT, None).sequence()
    small, large = np.arange(3, dtype=np.int32), np.arange(50, dtype=np.int32)
    for page in range(2):
        pages.seal(0, 0, page, small + page)
        pages.seal(1, 0, page, large + page)
    for page in range(2):
        assert (_opened(pages, (0, 0, page), 3) == small + page).all()
        assert (_opened(pages, (1, 0, page), 50) == large + page).all()


def test_a_page_keeps_its_size() -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))
    with pytest.raises(ValueError, match="96 bytes, not 8"):
        pages.seal(0, 0, 0, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="96 bytes, not 100"):
        _opened(pages, (0, 0, 0), 25)
    assert (_opened(pages, (0, 0, 0)) == _data(1)).all()


def test_a_page_never_sealed_is_a_bug_of_the_caller() -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 1, 2, _data(1))
    with pytest.raises(KeyError):
        _opened(pages, (0, 1, 3))


@pytest.mark.parametrize("name", [(256, 0, 0), (0, 1 << 16, 0), (0, 0, 1 << 32), (-1, 0, 0)])
def test_names_that_do_not_fit_their_field_are_refused(name: Name) -> None:
    with pytest.raises(struct.error):
        PageStore(BOOT, None).sequence().seal(*name, _data(1))


def test_every_flipped_bit_is_noticed() -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))
    pages.seal(0, 0, 1, _data(2))
    content = _content(pages)
    for position in range(len(content)):
        hit = position // (4 * WORDS + TAG_BYTES)
        for bit in range(8):
            _overwrite(pages, bytes([content[position] ^ 1 << bit]), position)
            _rejected(pages, (0, 0, hit))
        assert (_opened(pages, (0, 0, 1 - hit)) == _data(2 - hit)).all()
        _overwrite(pages, content)
    assert (_opened(pages, (0, 0, 0)) == _data(1)).all()


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_another_page_of_the_sequence_is_noticed(other: Name) -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))
    pages.seal(*other, _data(1))
    content = _content(pages)
    half = len(content) // 2
    assert content[:half] != content[half:]  # equal pages do not look equal
    _overwrite(pages, content[half:] + content[:half])
    _rejected(pages, (0, 0, 0))
    _rejected(pages, other)


def test_the_same_page_of_another_sequence_is_noticed() -> None:
    store = PageStore(BOOT, None)
    one, two = store.sequence(), store.sequence()
    for pages in (one, two):
        pages.seal(0, 0, 0, _data(1))
    assert _content(one) != _content(two)
    _overwrite(one, _content(two))
    _rejected(one, (0, 0, 0))
    assert (_opened(two, (0, 0, 0)) == _data(1)).all()


def test_an_older_version_is_noticed() -> None:
    pages = PageStore(BOOT, None).sequence()
    versions = []
    for _ in range(3):
        pages.seal(0, 0, 0, _data(1))
        versions.append(_content(pages))
    assert len(set(versions)) == 3  # also of the same content
    for old in versions[:2]:
        _overwrite(pages, old)
        _rejected(pages, (0, 0, 0))
    _overwrite(pages, versions[2])
    assert (_opened(pages, (0, 0, 0)) == _data(1)).all()


@pytest.mark.parametrize("left", [0, 1, TAG_BYTES - 1, TAG_BYTES, 4 * WORDS, 4 * WORDS + TAG_BYTES - 1])
def test_a_truncated_file_is_noticed(left: int) -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))
    os.ftruncate(pages._descriptor(), left)
    _rejected(pages, (0, 0, 0))


def test_a_disk_that_cannot_be_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    _rejected(pages, (0, 0, 0))


@pytest.mark.parametrize("written", [None, 0, 7, 4 * WORDS])
def test_a_full_folder_costs_the_page_and_never_a_nonce(written: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))

    def full(*_: Any) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, "full")
        return written

    data = _data(2)
    assert pages.holds(0, 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(ExhaustedError, match="folder for parked pages"):
            pages.seal(0, 0, 0, data)
    assert pages._slots[0, 0, 0].version == 2
    assert not pages.holds(0, 0, 0)
    assert (data == _data(2)).all()
    _rejected(pages, (0, 0, 0))
    pages.seal(0, 0, 0, _data(3))
    assert pages.holds(0, 0, 0)
    assert (_opened(pages, (0, 0, 0)) == _data(3)).all()


@CASES
@given(names, names, st.integers(1, (1 << 40) - 1), st.integers(1, (1 << 40) - 1))
def test_nonces_are_injective(one: Name, two: Name, first: int, second: int) -> None:
    pages = PageStore(BOOT, None).sequence()
    nonces = set()
    for name, version in ((one, first), (two, second), (one, second)):
        pages.seal(*one, _data(0))
        slot = pages._slots[one]
        slot.version = version
        nonces.add(pages._cipher(*name, slot).nonce)
    assert {len(nonce) for nonce in nonces} == {12}
    assert len(nonces) == len({(one, first), (two, second), (one, second)})


def test_a_page_is_sealed_as_its_description_says() -> None:
    pages = PageStore(BOOT, None).sequence()
    for seed in range(2):
        pages.seal(3, 500, 70_000, _data(seed))
    name = bytes([3]) + (500).to_bytes(2, "big") + (70_000).to_bytes(4, "big") + (2).to_bytes(5, "big")
    cipher: Any = AES.new(pages._key, AES.MODE_GCM, nonce=name)
    cipher.update(name)
    content = _content(pages)
    assert cipher.decrypt_and_verify(content[:-TAG_BYTES], content[-TAG_BYTES:]) == _data(1).tobytes()


def test_versions_end_before_a_nonce_comes_again() -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))
    pages._slots[0, 0, 0].version = (1 << 40) - 1
    with pytest.raises(OverflowError):
        pages.seal(0, 0, 0, _data(1))


def test_every_sequence_has_a_key_of_its_own() -> None:
    store, keys = PageStore(BOOT, None), []
    for number in range(5):
        pages = store.sequence()
        extracted = hmac.digest(number.to_bytes(8, "big"), BOOT, hashlib.sha256)
        assert pages._key == hmac.digest(extracted, b"cleave kv pages v1\x01", hashlib.sha256)
        keys.append(pages._key)
        pages.free()  # numbers are not given again
    assert len(set(keys)) == 5


def test_pages_of_another_boot_are_noticed() -> None:
    old, new = PageStore(BOOT, None).sequence(), PageStore(b"\x01" * 32, None).sequence()
    for pages in (old, new):
        pages.seal(0, 0, 0, _data(1))
    _overwrite(new, _content(old))
    _rejected(new, (0, 0, 0))


def test_a_freed_sequence_has_no_file_key_or_pages() -> None:
    pages = PageStore(BOOT, None).sequence()
    pages.seal(0, 0, 0, _data(1))
    file = pages._file
    pages.free()
    pages.free()
    assert file is not None
    assert (file.closed, pages._key, pages.size, pages.holds(0, 0, 0)) == (True, b"", 0, False)
    with pytest.raises(KeyError):
        _opened(pages, (0, 0, 0))
    with pytest.raises(ValueError, match="key"):
        pages.seal(0, 0, 0, _data(1))


def test_the_file_has_no_name_and_shows_no_content(tmp_path: Path) -> None:
    pages = PageStore(BOOT, str(tmp_path)).sequence()
    data = _data(1)
    for layer in range(3):
        pages.seal(0, layer, 0, data)
    assert os.fstat(pages._descriptor()).st_nlink == 0
    assert os.fstat(pages._descriptor()).st_dev == tmp_path.stat().st_dev
    assert list(tmp_path.iterdir()) == []
    plain, content = data.tobytes(), _content(pages)
    assert all(plain[start : start + 4] not in content for start in range(len(plain) - 3))


def test_a_sequence_that_parks_nothing_has_no_file(tmp_path: Path) -> None:
    pages = PageStore(BOOT, str(tmp_path)).sequence()
    assert (pages._file, pages.size, pages.holds(0, 0, 0)) == (None, 0, False)
    pages.free()
    assert pages._file is None


def test_a_folder_that_went_away_takes_no_pages(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    store = PageStore(BOOT, str(folder))
    before, after, data = store.sequence(), store.sequence(), _data(1)
    before.seal(0, 0, 0, data)
    folder.rmdir()
    assert (_opened(before, (0, 0, 0)) == data).all()  # the file lives as long as it is open
    with pytest.raises(ExhaustedError, match="folder for parked pages"):
        after.seal(0, 0, 0, data)
    assert not after.holds(0, 0, 0)


def test_what_is_opened_lies_nowhere_else() -> None:
    pages, data = PageStore(BOOT, None).sequence(), np.arange(1 << 18, dtype=np.int32)
    pages.seal(0, 0, 0, data)
    out = np.empty_like(data)
    tracemalloc.start()
    try:
        pages.open(0, 0, 0, out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 14  # of 1 MiB
    finally:
        tracemalloc.stop()
    assert (out == data).all()
