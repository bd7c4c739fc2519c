"""One-time pads: where they come from, how u = r.W_q^T is made in idle time, and where it waits.

A pad index stands for one row of one forward pass: it names a pad r for every linear, from one AES-256-CTR stream
each: key = HKDF(boot key, model digest), 96-bit nonce = u32(layer, linear) || u64 index, block counter from 0. The
encoding is injective and the index only moves forward, so no two uses share a stream. The key lives in memory only.

`Bank` holds u for pads made in advance, sealed with AES-256-GCM under a second key of this boot, in a file without
a name, outside the budget. An entry is opened once. Whoever can write the file can make opening fail, no more.

`Refill` makes them: hundreds of rows at once through float64 BLAS, in tiles of bounded work, so that the compute
loop can do one whenever nobody waits. Where the embedding table does not fit the budget a pad has one more part, for
the masked lookup: as long as the vocabulary is large, so it is made and multiplied tile by tile of the table.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

from trusted_worker.arithmetic import F64, I8, I32, exact_lookup, exact_product
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.errors import CleaveError, ExhaustedError, ParkedError
from wire.linears import LOOKUP_LAYER, LinearSpec
from wire.scratch import SEGMENT

TAG_BYTES = 16
WORDS_OF_BLOCK = 4  # 32-bit words of a block of AES


class PadReuseError(CleaveError):
    """A pad was about to be used twice, or by a forked process. A bug, never a peer's doing."""


def nonce(spec: LinearSpec, segment: int, index: int) -> bytes:
    """12 bytes, injective: u32 = layer (16 bits) | linear (4) | segment (12), then u64 index."""
    if not (spec.layer < 1 << 16 and spec.linear < 1 << 4 and segment < 1 << 12 and 0 <= index < 1 << 64):
        raise PadReuseError("a pad's name is out of range")
    word = spec.layer << 16 | spec.linear << 12 | segment
    return word.to_bytes(4, "big") + index.to_bytes(8, "big")


class PadSource:
    """The pads of this boot. Indices are reserved once and used in order."""

    def __init__(self, boot_key: bytes, model_digest: bytes) -> None:
        self._key = HKDF(boot_key, 32, model_digest, SHA256, context=b"cleave pads v1")
        self._next = 0
        self._last: dict[LinearSpec, int] = {}
        self._pid = os.getpid()
        self.reused = 0
        os.register_at_fork(after_in_child=self._poison)

    def reserve(self, count: int) -> int:
        """The first of `count` fresh indices; none of them is ever given again."""
        first = self._next
        self._next += count
        return first

    def write(self, spec: LinearSpec, index: int, out: Any, first: int = 0) -> None:
        """r for one row of a linear into out, a C-contiguous 32-bit array: words `first` on, a multiple of 4."""
        if os.getpid() != self._pid or not self._key:
            raise PadReuseError("pads were asked for by a forked process")
        stream = AES.new(self._key, AES.MODE_CTR, nonce=nonce(spec, 0, index), initial_value=first // WORDS_OF_BLOCK)
        out[...] = 0
        view = out.data.cast("B")
        stream.encrypt(view, output=view)

    def spend(self, spec: LinearSpec, index: int, out: Any) -> None:
        """r for masking: like `write`, once and in increasing order for each linear. Raises PadReuseError."""
        if index <= self._last.get(spec, -1) or index >= self._next:
            self.reused += 1
            raise PadReuseError("a pad was about to be used twice")
        self._last[spec] = index
        self.write(spec, index, out)

    def _poison(self) -> None:
        self._key = b""


class Bank:
    """Sealed u for pads in stock, first in first out. An entry of `row_bytes` bytes holds every linear of one pad."""

    def __init__(self, boot_key: bytes, specs: list[LinearSpec], size: int, folder: str | None) -> None:
        self._key = HKDF(boot_key, 32, b"", SHA256, context=b"cleave pad bank v1")
        self._offsets: dict[tuple[LinearSpec, int], int] = {}
        end = 0
        for spec in specs:
            for segment, width in segments(spec):
                self._offsets[spec, segment] = end
                end += 4 * width + TAG_BYTES
        self._row_bytes = row_bytes(specs)
        self.capacity = size // self._row_bytes
        self._free = list(range(self.capacity))
        self._ready: deque[tuple[int, int]] = deque()
        self._file = tempfile.TemporaryFile(dir=folder, prefix="cleave-pads-")  # noqa: SIM115

    @property
    def stock(self) -> int:
        """Pads that `take` can give."""
        return len(self._ready)

    @property
    def room(self) -> int:
        """Pads that could be added."""
        return len(self._free)

    def take(self) -> "Pad | None":
        """The oldest pad, gone from the bank for good; None when it is dry."""
        if not self._ready:
            return None
        index, slot = self._ready.popleft()
        return Pad(self, index, slot)

    def claim(self, rows: int) -> list[int]:
        """Slots for a refill of `rows` rows."""
        return [self._free.pop() for _ in range(rows)]

    def put(self, spec: LinearSpec, segment: int, index: int, slot: int, u: I32) -> None:
        """Seal one segment of u, C-contiguous, and park it. Raises ExhaustedError when the folder is full."""
        cipher = AES.new(self._key, AES.MODE_GCM, nonce=nonce(spec, segment, index))
        sealed = cipher.encrypt_and_digest(u.data.cast("B"))
        start = slot * self._row_bytes + self._offsets[spec, segment]
        try:
            complete = os.pwritev(self._file.fileno(), sealed, start) == u.nbytes + TAG_BYTES
        except OSError:
            complete = False
        if not complete:
            raise ExhaustedError("the folder for parked pads is full or cannot be written")

    def publish(self, first: int, slots: list[int]) -> None:
        """A refill is complete: its pads are in stock."""
        self._ready.extend(enumerate(slots, first))

    @property
    def size(self) -> int:
        """Bytes that lie outside when the bank is full."""
        return self.capacity * self._row_bytes

    def open(self, spec: LinearSpec, segment: int, index: int, slot: int, out: I32) -> None:
        """One segment of u into out int32[width], C-contiguous. Raises ParkedError when the file was changed."""
        start = slot * self._row_bytes + self._offsets[spec, segment]
        cipher = AES.new(self._key, AES.MODE_GCM, nonce=nonce(spec, segment, index))
        try:
            sealed = memoryview(os.pread(self._file.fileno(), out.nbytes + TAG_BYTES, start))
            cipher.decrypt_and_verify(sealed[:-TAG_BYTES], sealed[-TAG_BYTES:], output=out.data.cast("B"))
        except (OSError, ValueError):
            raise ParkedError from None

    def release(self, slot: int) -> None:
        """The pad is spent: its slot may hold another."""
        self._free.append(slot)


class Pad:
    """One pad out of the bank, for one row of one forward pass. Whatever happens next, it is spent."""

    def __init__(self, bank: Bank, index: int, slot: int) -> None:
        self._bank, self.index, self._slot = bank, index, slot
        self._burnt = False

    def remove(self, spec: LinearSpec, y: I32, scratch: Scratch) -> None:
        """y - u in place, int32[n] of one linear; u is opened segment by segment. Raises ParkedError."""
        with scratch.frame():
            u: I32 = scratch.empty((min(SEGMENT, spec.n),), np.int32)
            for segment, width in segments(spec):
                self._bank.open(spec, segment, self.index, self._slot, u[:width])
                y[segment * SEGMENT : segment * SEGMENT + width] -= u[:width]

    def burn(self) -> None:
        """Give the slot back; the index is never used again. A second call does nothing."""
        if not self._burnt:
            self._burnt = True
            self._bank.release(self._slot)


@dataclass(frozen=True)
class Pads:
    """All of it: where pads come from, where they wait, and what makes them."""

    source: PadSource
    bank: Bank
    refill: "Refill"


def row_bytes(specs: list[LinearSpec]) -> int:
    """Bytes that one pad takes in a bank."""
    return sum(4 * width + TAG_BYTES for spec in specs for _, width in segments(spec))


def segments(spec: LinearSpec) -> list[tuple[int, int]]:
    """(number, width) of the sealed segments of one row of u."""
    return [(i, min(SEGMENT, spec.n - start)) for i, start in enumerate(range(0, spec.n, SEGMENT))]


class Refill:
    """Fills a bank in tiles, `rows` pads at a time. Its memory is taken when it is made, and never by a session."""

    def __init__(
        self, source: PadSource, bank: Bank, weights: Weights, specs: list[LinearSpec], scratch: Scratch, rows: int
    ) -> None:
        """`specs`: those of the bank. `scratch`: its own, for `rows` rows; see wire.plan.refill_bytes."""
        self._source, self._bank, self._weights, self._specs = source, bank, weights, specs
        self._scratch, self._rows = scratch, min(rows, bank.capacity)
        self._tiles: Iterator[None] = iter(())

    def tile(self) -> bool:
        """One bounded piece of work. False when the bank is full. After an error the next tile starts a new batch."""
        for _ in self._tiles:
            return True
        if 2 * self._bank.room < self._rows or not self._bank.room:
            return False
        self._tiles = self._batch()
        return True

    def _batch(self) -> Iterator[None]:
        """Pads for a set of slots. If it is given up half-way, its indices are burnt and its slots are free again."""
        slots = self._bank.claim(min(self._rows, self._bank.room))
        first = self._source.reserve(len(slots))
        try:
            for spec in self._specs:
                fill = self._fill_lookup if spec.layer == LOOKUP_LAYER else self._fill
                with self._scratch.frame():
                    yield from fill(spec, first, slots)
        except BaseException:
            for slot in slots:
                self._bank.release(slot)
            raise
        self._bank.publish(first, slots)

    def _fill(self, spec: LinearSpec, first: int, slots: list[int]) -> Iterator[None]:
        """u of one linear: products tile by tile, sealed segment by segment."""
        r: F64 = self._scratch.empty((len(slots), spec.k), np.float64)
        self._pads(spec, first, 0, r)
        u: I32 = self._scratch.empty((len(slots), min(SEGMENT, spec.n)), np.int32)
        with self._weights.tiles(spec, self._scratch) as tiles:
            for segment, offset, tile in _aligned(tiles):
                exact_product(r, [(offset, tile)], u, self._scratch)
                yield
                end = offset + len(tile)
                if end == SEGMENT or segment * SEGMENT + end == spec.n:
                    self._seal(spec, segment, first, slots, u[:, :end])
                    yield

    def _fill_lookup(self, spec: LinearSpec, first: int, slots: list[int]) -> Iterator[None]:
        """u of the masked lookup: summed over the tiles of the table, each with its own piece of r."""
        u: I32 = self._scratch.empty((len(slots), spec.n), np.int32)
        part: I32 = self._scratch.empty(u.shape, np.int32)
        u[...] = 0
        with self._weights.table(self._scratch) as tiles:
            for start, tile in tiles:
                with self._scratch.frame():
                    r: F64 = self._scratch.empty((len(slots), len(tile)), np.float64)
                    self._pads(spec, first, start, r)
                    exact_lookup(r, [(0, tile)], part, self._scratch)
                    u += part
                yield
        for segment, width in segments(spec):
            self._seal(spec, segment, first, slots, u[:, segment * SEGMENT : segment * SEGMENT + width])
        yield

    def _pads(self, spec: LinearSpec, first: int, start: int, r: F64) -> None:
        """Words `start` on of r of each pad, as signed integers in float64[rows, words]."""
        with self._scratch.frame():
            words: I32 = self._scratch.empty((r.shape[1],), np.int32)
            for row in range(len(r)):
                self._source.write(spec, first + row, words, start)
                r[row] = words

    def _seal(self, spec: LinearSpec, segment: int, first: int, slots: list[int], u: I32) -> None:
        for row, slot in enumerate(slots):
            self._bank.put(spec, segment, first + row, slot, u[row])


def _aligned(tiles: Iterable[tuple[int, I8]]) -> Iterator[tuple[int, int, I8]]:
    """The same tiles, cut where a segment ends: (segment, first row within it, rows)."""
    for first, tile in tiles:
        start = first
        while start < first + len(tile):
            segment = start // SEGMENT
            stop = min(first + len(tile), (segment + 1) * SEGMENT)
            yield segment, start - segment * SEGMENT, tile[start - first : stop - first]
            start = stop
