"""Pads: their names, their streams, their bank. The streams are checked against AES and HMAC put together by hand."""

import hashlib
import hmac
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.arithmetic import I8, I32
from trusted_worker.pad_bank import Bank, Pad
from trusted_worker.pads import PadReuseError, PadSource, Refill, nonce
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.errors import VerificationError
from wire.linears import LOOKUP_LAYER, Linear, LinearSpec
from wire.plan import REFILL_ROWS
from wire.scratch import SHEET
from wire.sheets import TAG_BYTES, row_bytes

CASES = settings(deadline=None, max_examples=200, derandomize=True)
BOOT, DIGEST = bytes(range(32)), hashlib.sha256(b"model").digest()

layers = st.one_of(st.integers(0, 3), st.integers(0, (1 << 16) - 1))
indices = st.one_of(st.integers(0, 3), st.integers(0, (1 << 64) - 1))
names = st.tuples(layers, st.sampled_from(Linear), indices)


def _spec(layer: int = 0, linear: Linear = Linear.QKV, k: int = 24, n: int = 40) -> LinearSpec:
    return LinearSpec(layer, linear, k, n)


class Shelf:
    """Random int8 weights, as much of `Weights` as refill uses. Tiles have uneven sizes, as those from disk do."""

    def __init__(self, specs: list[LinearSpec], tile_rows: int = 37) -> None:
        random = np.random.default_rng(5)
        self.specs, self._rows = specs, tile_rows
        self.breaks_at: LinearSpec | None = None
        self.matrix: dict[LinearSpec, I8] = {
            spec: random.integers(-127, 128, (spec.n, spec.k)).astype(np.int8) for spec in specs
        }

    @contextmanager
    def tiles(self, spec: LinearSpec, scratch: Scratch) -> Iterator[Iterator[tuple[int, I8]]]:
        """See Weights.tiles."""
        with scratch.frame():
            yield self._cut(spec, spec.n, self._rows)

    @contextmanager
    def table(self, scratch: Scratch) -> Iterator[Iterator[tuple[int, I8]]]:
        """See Weights.table. The matrix of a lookup is kept as the linear that it is: [hidden, vocabulary]."""
        spec = self.specs[-1]
        with scratch.frame():
            yield self._cut(spec, spec.k, self._rows // 4 * 4)

    def _cut(self, spec: LinearSpec, end: int, rows: int) -> Iterator[tuple[int, I8]]:
        matrix = self.matrix[spec].T if spec.layer == LOOKUP_LAYER else self.matrix[spec]
        for first in range(0, end, rows):
            if spec == self.breaks_at:
                raise VerificationError
            yield first, matrix[first : first + rows]


class Stock:
    """A source, a bank for `rows` pads and the refill between them."""

    def __init__(
        self, rows: int, specs: list[LinearSpec] | None = None, tile_rows: int = 37, key: bytes = BOOT
    ) -> None:
        self.specs = specs or [_spec(), _spec(1, Linear.DOWN, 30, 7), _spec(0, Linear.LM_HEAD, 24, 100)]
        self.shelf = Shelf(self.specs, tile_rows)
        self.source = PadSource(key, DIGEST)
        self.bank = Bank(key, self.specs, rows * row_bytes(self.specs), None)
        self.memory = SecureMemory(8 << 20)
        widest = max(1 << 16, *(12 * max(rows, 1) * (spec.k + min(spec.n, SHEET)) for spec in self.specs))
        scratch = Scratch(self.memory, widest + (3 << 20))
        self.refill = Refill(self.source, self.bank, cast(Weights, self.shelf), self.specs, scratch, REFILL_ROWS)

    def fill(self) -> int:
        """Steps until the refill has nothing to do."""
        return sum(1 for _ in iter(self.refill.tile, False))

    def take(self) -> Pad:
        """A pad that must be there."""
        pad = self.bank.take()
        assert pad is not None
        return pad

    def expected(self, spec: LinearSpec, index: int) -> I32:
        """u = r . W_q^T modulo 2^32 in int64."""
        r = np.empty(spec.k, np.int32)
        self.source.write(spec, index, r)
        wide = self.shelf.matrix[spec].astype(np.int64) @ r.astype(np.int64)
        return wide.astype(np.int32)

    def opened(self, pad: Pad, spec: LinearSpec) -> I32:
        """u as the bank gives it."""
        out = np.zeros(spec.n, np.int32)
        pad.lay(np.zeros(max(self.bank.sheets.widths), np.int32))
        pad.remove(spec, out)
        return -out

    @property
    def file(self) -> int:
        """The descriptor of the bank's file."""
        return self.bank._file.fileno()


def _hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for one block of SHA-256, from the standard library."""
    extracted = hmac.new(salt or bytes(32), key, "sha256").digest()
    return hmac.new(extracted, info + b"\x01", "sha256").digest()


def _stream(key: bytes, name: bytes, words: int) -> I32:
    """AES-256-CTR spelled out: the cipher of nonce and block number, block by block."""
    blocks = b"".join(name + number.to_bytes(4, "big") for number in range(-(-words // 4)))
    return np.frombuffer(AES.new(key, AES.MODE_ECB).encrypt(blocks), "<i4")[:words].astype(np.int32)


def _write(source: PadSource, spec: LinearSpec, index: int) -> I32:
    out = np.empty(spec.k, np.int32)
    source.write(spec, index, out)
    return out


@given(names, names)
@CASES
def test_names_of_pads_are_injective(one: tuple[int, Linear, int], two: tuple[int, Linear, int]) -> None:
    first, second = (nonce(_spec(layer, linear), index) for layer, linear, index in (one, two))
    assert len(first) == 12
    assert (first == second) == (one == two)


@given(names)
@CASES
def test_names_of_pads_can_be_read_back(name: tuple[int, Linear, int]) -> None:
    layer, linear, index = name
    word = int.from_bytes(nonce(_spec(layer, linear), index)[:4], "big")
    assert (word >> 16, word & 0xFFFF) == (layer, linear)
    assert int.from_bytes(nonce(_spec(layer, linear), index)[4:], "big") == index


@pytest.mark.parametrize(("layer", "index"), [(1 << 16, 0), (0, -1), (0, 1 << 64)])
def test_names_out_of_range_are_refused(layer: int, index: int) -> None:
    with pytest.raises(PadReuseError):
        nonce(_spec(layer), index)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 64, 14336])
@pytest.mark.parametrize("index", [0, 1, 255, 1 << 40])
def test_pads_are_aes_256_counter_mode_under_a_derived_key(k: int, index: int) -> None:
    spec = _spec(layer=9, linear=Linear.GATE_UP, k=k)
    key = _hkdf(BOOT, DIGEST, b"cleave pads v1")
    assert (_write(PadSource(BOOT, DIGEST), spec, index) == _stream(key, nonce(spec, index), k)).all()


def test_pads_overwrite_what_was_there_and_reach_into_a_row() -> None:
    source, spec = PadSource(BOOT, DIGEST), _spec()
    rows = np.full((3, spec.k), 77, np.int32)
    source.write(spec, 4, rows[1])
    assert (rows[1] == _write(source, spec, 4)).all()
    assert (rows[[0, 2]] == 77).all()


def test_pads_of_other_keys_models_linears_and_indices_differ() -> None:
    spec, seen = _spec(k=64), set()
    for key in (BOOT, bytes(32)):
        for digest in (DIGEST, bytes(32)):
            source = PadSource(key, digest)
            for other in (spec, _spec(1, k=64), _spec(0, Linear.O, k=64)):
                seen |= {_write(source, other, index).tobytes() for index in range(3)}
    assert len(seen) == 2 * 2 * 3 * 3


def test_pad_words_are_uniform() -> None:
    words = _write(PadSource(BOOT, DIGEST), _spec(k=1 << 16), 3)
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom: beyond 6 sigma


@given(st.lists(st.integers(0, 300), max_size=30))
@CASES
def test_reserved_indices_never_overlap(counts: list[int]) -> None:
    source, following = PadSource(BOOT, DIGEST), 0
    for count in counts:
        assert source.reserve(count) == following
        following += count


def test_spending_goes_forward_once() -> None:
    source, spec, other = PadSource(BOOT, DIGEST), _spec(), _spec(1)
    out = np.zeros(spec.k, np.int32)
    source.reserve(4)
    source.spend(spec, [0], out[None])
    assert (out == _write(source, spec, 0)).all()
    source.spend(other, [0], out[None])  # another linear has a stream of its own
    source.spend(spec, [2], out[None])
    kept = out.copy()
    for index in (2, 1, 0, -1, 4, 1 << 64):  # again, backwards, not reserved
        with pytest.raises(PadReuseError):
            source.spend(spec, [index], out[None])
    assert source.reused == 6
    assert (out == kept).all()
    source.spend(spec, [3], out[None])
    assert source.reused == 6


def test_rows_are_spent_together_or_not_at_all() -> None:
    source, spec = PadSource(BOOT, DIGEST), _spec()
    source.reserve(9)
    out = np.zeros((3, spec.k), np.int32)
    for indices in ([0, 2, 2], [1, 0, 2], [0, 1, 9]):
        with pytest.raises(PadReuseError):
            source.spend(spec, indices, out)
    assert not out.any()
    source.spend(spec, [0, 3, 7], out)
    assert (out == [_write(source, spec, index) for index in (0, 3, 7)]).all()
    with pytest.raises(PadReuseError):
        source.spend(spec, [7, 8], out[:2])
    source.spend(spec, [8], out[:1])


def test_a_refused_pad_tells_nothing_to_a_peer() -> None:
    assert "twice" in str(PadReuseError("a pad was about to be used twice"))
    with pytest.raises(PadReuseError) as caught:
        PadSource(BOOT, DIGEST).spend(_spec(), [5], np.zeros((1, 24), np.int32))
    assert not any(character.isdigit() for character in str(caught.value))


def test_a_forked_child_gets_no_pads(in_child: Callable[[Callable[[], bool]], bool]) -> None:
    source, spec = PadSource(BOOT, DIGEST), _spec()
    source.reserve(2)
    out = np.zeros(spec.k, np.int32)

    def refused() -> bool:
        for ask in (lambda: source.write(spec, 0, out), lambda: source.spend(spec, [0], out[None])):
            try:
                ask()
            except PadReuseError:
                continue
            return False
        return not out.any() and source._streams is None

    assert in_child(refused)
    source.spend(spec, [0], out[None])
    assert out.any()


@pytest.mark.parametrize("first", [0, 4, 8, 60])
def test_a_piece_of_a_pad_is_that_piece_of_the_whole(first: int) -> None:
    source, spec = PadSource(BOOT, DIGEST), _spec(k=64)
    whole, piece = _write(source, spec, 7), np.empty(64 - first, np.int32)
    source.write(spec, 7, piece, first)
    assert (piece == whole[first:]).all()


@pytest.mark.parametrize("tile_rows", [4, 37, 1000])
def test_u_of_a_lookup_is_made_tile_by_tile_of_the_table(tile_rows: int) -> None:
    """As long as the vocabulary, which is longer than a pad of any linear."""
    stock = Stock(5, [_spec(), LinearSpec(LOOKUP_LAYER, Linear.LM_HEAD, 1003, 24)], tile_rows)
    stock.fill()
    while (pad := stock.bank.take()) is not None:
        for spec in stock.specs:
            assert (stock.opened(pad, spec) == stock.expected(spec, pad.index)).all()


@pytest.mark.parametrize("tile_rows", [1, 37, 1000])
def test_opened_u_is_the_integer_product_modulo_the_ring(tile_rows: int) -> None:
    stock = Stock(5, tile_rows=tile_rows)
    stock.fill()
    assert stock.bank.stock == 5
    while (pad := stock.bank.take()) is not None:
        for spec in stock.specs:
            assert (stock.opened(pad, spec) == stock.expected(spec, pad.index)).all()


@pytest.mark.parametrize("n", [SHEET - 1, SHEET, SHEET + 1, 2 * SHEET + 11])
@pytest.mark.parametrize("tile_rows", [3000, 1 << 20])
def test_outputs_of_several_sheets(n: int, tile_rows: int) -> None:
    stock = Stock(2, [_spec(k=3, n=n), _spec(1, k=5, n=10)], tile_rows)
    stock.fill()
    pad = stock.take()
    for spec in stock.specs:
        assert (stock.opened(pad, spec) == stock.expected(spec, pad.index)).all()


def test_extreme_words_stay_exact() -> None:
    """k at the proven limit, over weights of +-127."""
    stock = Stock(1, [_spec(k=33_000, n=2)])
    stock.shelf.matrix[stock.specs[0]][...] = [[127], [-127]]
    stock.fill()
    assert (stock.opened(stock.take(), stock.specs[0]) == stock.expected(stock.specs[0], 0)).all()


def test_pads_come_first_in_first_out_and_indices_never_return() -> None:
    stock = Stock(4)
    stock.fill()
    indices = []
    for _ in range(6):
        for _ in range(3):
            pad = stock.take()
            indices.append(pad.index)
            assert (stock.opened(pad, stock.specs[0]) == stock.expected(stock.specs[0], pad.index)).all()
            pad.burn()
        stock.fill()
    assert indices == sorted(set(indices))


def test_every_taken_pad_can_be_spent_in_order() -> None:
    stock = Stock(3)
    out = np.empty(stock.specs[0].k, np.int32)
    for _ in range(4):
        stock.fill()
        for _ in range(2):
            pad = stock.take()
            stock.source.spend(stock.specs[0], [pad.index], out[None])
            pad.burn()
    assert stock.source.reused == 0


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7])
def test_tiny_banks_fill_and_empty(rows: int) -> None:
    stock = Stock(rows)
    for _ in range(3):
        stock.fill()
        assert stock.refill.tile() is False
        assert (stock.bank.capacity, stock.bank.stock, stock.bank.room) == (rows, rows, 0)
        pads = [stock.take() for _ in range(rows)]
        assert stock.bank.take() is None
        assert stock.bank.room == 0  # a taken pad keeps its slot until it is burnt
        assert stock.refill.tile() is False
        for pad in pads:
            assert (stock.opened(pad, stock.specs[1]) == stock.expected(stock.specs[1], pad.index)).all()
            pad.burn()


def test_a_bank_that_is_not_a_whole_number_of_rows_rounds_down() -> None:
    specs = [_spec()]
    size = row_bytes(specs)
    for extra, capacity in ((-1, 2), (0, 3), (size - 1, 3)):
        assert Bank(BOOT, specs, 3 * size + extra, None).capacity == capacity


def test_the_file_stays_within_its_size() -> None:
    stock = Stock(3)
    for _ in range(3):
        stock.fill()
        stock.take().burn()
        stock.take().burn()
    assert os.fstat(stock.file).st_size <= 3 * row_bytes(stock.specs)


def test_pads_are_in_stock_only_when_all_of_their_linears_are_sealed() -> None:
    stock = Stock(4)
    steps = stock.fill()
    assert steps > len(stock.specs)
    fresh = Stock(4)
    for _ in range(steps):
        assert fresh.bank.take() is None
        assert fresh.refill.tile() is True
    assert fresh.refill.tile() is False
    assert fresh.bank.stock == 4


def test_a_refill_starts_when_half_a_batch_fits() -> None:
    stock = Stock(4)
    stock.fill()
    stock.take().burn()
    assert stock.refill.tile() is False
    stock.take().burn()
    stock.fill()
    assert stock.bank.stock == 4


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_refill_that_fails_burns_its_indices_and_frees_its_slots(broken: int) -> None:
    stock = Stock(4)
    stock.fill()
    for _ in range(3):
        stock.take().burn()
    stock.shelf.breaks_at = stock.specs[broken]
    for _ in range(2):
        with pytest.raises(VerificationError):
            stock.fill()
        assert (stock.bank.stock, stock.bank.room) == (1, 3)
    assert not stock.memory._bytes.any()
    stock.shelf.breaks_at = None
    stock.fill()
    indices = []
    while (pad := stock.bank.take()) is not None:
        indices.append(pad.index)
        assert (stock.opened(pad, stock.specs[2]) == stock.expected(stock.specs[2], pad.index)).all()
    assert indices == [3, 10, 11, 12]  # 4 to 9 are burnt


def test_the_memory_of_a_refill_is_taken_when_it_is_made() -> None:
    stock = Stock(4)
    used = stock.memory.used
    stock.fill()
    assert stock.memory.used == stock.memory.peak == used > 0


def test_neither_r_nor_u_stays_behind_in_the_arena() -> None:
    stock = Stock(3)
    stock.fill()
    left = stock.memory._bytes.tobytes()
    for index in range(3):
        for spec in stock.specs:
            r = _write(stock.source, spec, index)
            for secret in (r, r.astype(np.float64), stock.expected(spec, index)):
                assert secret[:3].tobytes() not in left
    assert list(stock.memory.by_owner()) == ["scratch"]


def test_u_is_not_in_the_file_in_clear() -> None:
    stock = Stock(2)
    stock.fill()
    content = os.pread(stock.file, 1 << 20, 0)
    for index in range(2):
        for spec in stock.specs:
            assert stock.expected(spec, index)[:3].tobytes() not in content


def test_every_changed_byte_is_noticed() -> None:
    specs = [_spec(k=4, n=6), _spec(1, k=4, n=3)]
    stock = Stock(1, specs)
    stock.fill()
    pad = stock.take()
    first = 4 * 6 + TAG_BYTES
    for position in range(row_bytes(specs)):
        original = os.pread(stock.file, 1, position)
        os.pwrite(stock.file, bytes([original[0] ^ 1]), position)
        hit, spared = (specs[0], specs[1]) if position < first else (specs[1], specs[0])
        with pytest.raises(VerificationError):
            stock.opened(pad, hit)
        assert (stock.opened(pad, spared) == stock.expected(spared, 0)).all()
        os.pwrite(stock.file, original, position)
    assert (stock.opened(pad, specs[0]) == stock.expected(specs[0], 0)).all()


@pytest.mark.parametrize("length", [0, 1, TAG_BYTES - 1, TAG_BYTES, 30])
def test_a_truncated_file_is_noticed(length: int) -> None:
    stock = Stock(1, [_spec(k=4, n=6)])
    stock.fill()
    os.ftruncate(stock.file, length)
    with pytest.raises(VerificationError):
        stock.opened(stock.take(), stock.specs[0])


def _parts(stock: Stock, slot: int) -> tuple[bytes, int]:
    size = row_bytes(stock.specs)
    return os.pread(stock.file, size, slot * size), slot * size


def test_swapped_slots_are_noticed() -> None:
    stock = Stock(2)
    stock.fill()
    (one, at_one), (two, at_two) = _parts(stock, 0), _parts(stock, 1)
    os.pwrite(stock.file, two, at_one)
    os.pwrite(stock.file, one, at_two)
    for _ in range(2):
        pad = stock.take()
        for spec in stock.specs:
            with pytest.raises(VerificationError):
                stock.opened(pad, spec)


def test_swapped_linears_of_equal_width_are_noticed() -> None:
    stock = Stock(1, [_spec(0), _spec(1)])
    stock.fill()
    content, _ = _parts(stock, 0)
    half = len(content) // 2
    os.pwrite(stock.file, content[half:] + content[:half], 0)
    pad = stock.take()
    for spec in stock.specs:
        with pytest.raises(VerificationError):
            stock.opened(pad, spec)


def test_swapped_sheets_are_noticed() -> None:
    stock = Stock(1, [_spec(k=2, n=2 * SHEET)])
    stock.fill()
    content, _ = _parts(stock, 0)
    half = len(content) // 2
    os.pwrite(stock.file, content[half:] + content[:half], 0)
    with pytest.raises(VerificationError):
        stock.opened(stock.take(), stock.specs[0])


def test_an_older_pad_in_the_same_slot_is_noticed() -> None:
    stock = Stock(1)
    stock.fill()
    old, where = _parts(stock, 0)
    stock.take().burn()
    stock.fill()
    os.pwrite(stock.file, old, where)
    with pytest.raises(VerificationError):
        stock.opened(stock.take(), stock.specs[0])


def test_a_bank_of_another_boot_cannot_be_opened() -> None:
    stock, later = Stock(1), Stock(1, key=b"\x01" * 32)
    stock.fill()
    later.fill()
    os.pwrite(later.file, os.pread(stock.file, 1 << 20, 0), 0)
    pad = later.take()
    for spec in later.specs:
        with pytest.raises(VerificationError):
            later.opened(pad, spec)


def test_the_bank_has_a_key_of_its_own() -> None:
    stock = Stock(1)
    assert stock.bank._key == _hkdf(BOOT, b"", b"cleave pad bank v1")
    assert stock.bank._key != _hkdf(BOOT, DIGEST, b"cleave pads v1")


def test_the_file_has_no_name(tmp_path: Any) -> None:
    bank = Bank(BOOT, [_spec()], 1000, str(tmp_path))
    assert os.fstat(bank._file.fileno()).st_nlink == 0
    assert list(tmp_path.iterdir()) == []


def test_an_answer_under_a_pad_is_recovered_exactly() -> None:
    """Steps 2 to 4 of the scheme: (x + r) . W^T - u = x . W^T modulo 2^32."""
    stock = Stock(2)
    stock.fill()
    spec, pad = stock.specs[0], stock.take()
    x = np.random.default_rng(0).integers(-(2**24) + 1, 2**24, spec.k).astype(np.int32)
    z = np.empty(spec.k, np.int32)
    stock.source.spend(spec, [pad.index], z[None])
    z += x
    weights: npt.NDArray[np.int64] = stock.shelf.matrix[spec].astype(np.int64)
    answer = (weights @ z.astype(np.int64)).astype(np.int32)
    recovered = answer - stock.opened(pad, spec)
    assert (recovered == (weights @ x.astype(np.int64)).astype(np.int32)).all()
