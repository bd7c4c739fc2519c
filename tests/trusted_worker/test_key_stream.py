"""Key streams: those of the library's AES-256-CTR, byte for byte, wherever they begin and end."""

import numpy as np
import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.key_stream import BLOCK_BYTES, KeyStream

CASES = settings(deadline=None, max_examples=200, derandomize=True)
KEY = bytes(range(32))
sizes = st.one_of(st.integers(1, 80), st.sampled_from([1 << 16, (1 << 16) + 1, (1 << 17) + 40, 200_003]))
blocks = st.one_of(st.integers(0, 5), st.integers(4000, 4200), st.integers(0, (1 << 32) - 20_000))


def library(nonce: bytes, first: int, size: int) -> bytes:
    return AES.new(KEY, AES.MODE_CTR, nonce=nonce, initial_value=first).encrypt(bytes(size))


@given(st.lists(st.tuples(st.binary(min_size=12, max_size=12), blocks, sizes), min_size=1, max_size=4))
@CASES
def test_it_is_the_librarys_counter_mode(asked: list[tuple[bytes, int, int]]) -> None:
    """One object for all of them: nothing of one stream stays for the next."""
    stream = KeyStream(KEY)
    for nonce, first, size in asked:
        out = np.full(size, 77, np.uint8)
        stream.write(nonce, out, first)
        assert out.tobytes() == library(nonce, first, size)


def test_it_writes_words_where_they_belong() -> None:
    rows = np.full((3, 5), 7, np.int32)
    KeyStream(KEY).write(bytes(12), rows[1])
    assert rows[1].tobytes() == library(bytes(12), 0, 20)
    assert (rows[[0, 2]] == 7).all()


@pytest.mark.parametrize("width", [4, 5, 64, 4864, 1 << 14, 1 << 15])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_are_streams_of_their_own(rows: int, width: int) -> None:
    stream, nonces = KeyStream(KEY), [bytes([row]) * 12 for row in range(rows)]
    for _ in range(2):
        out = np.full((rows, width), 7, np.int32)
        stream.write_rows(nonces, out)
        assert [row.tobytes() for row in out] == [library(nonce, 0, 4 * width) for nonce in nonces]
        stream.write(nonces[0], out[0], 3)
        assert out[0].tobytes() == library(nonces[0], 3, 4 * width)


def test_the_last_block_is_the_last() -> None:
    stream, out = KeyStream(KEY), np.empty(2 * BLOCK_BYTES, np.uint8)
    stream.write(bytes(12), out, (1 << 32) - 2)
    assert out.tobytes() == library(bytes(12), (1 << 32) - 2, 32)
    with pytest.raises(ValueError, match="2\\^32"):
        stream.write(bytes(12), out, (1 << 32) - 1)


def test_other_keys_and_nonces_give_other_streams() -> None:
    seen = set()
    for key in (KEY, bytes(32)):
        stream = KeyStream(key)
        for nonce in (bytes(12), bytes(11) + b"\x01", b"\x01" + bytes(11)):
            out = np.empty(64, np.uint8)
            stream.write(nonce, out)
            seen.add(out.tobytes())
    assert len(seen) == 6
