"""One-time pads: where they come from, how u = r.W_q^T is made in idle time, and where it waits.

A pad index stands for one row of one forward pass: it names a pad r for every linear, from one AES-256-CTR stream
each: key = HKDF(boot key, model digest), 96-bit nonce = u32(layer, linear) || u64 index, block counter from 0. The
encoding is injective and the index only moves forward, so no two uses share a stream. The key lives in memory only.

`Bank` holds u for pads made in advance, sealed with AES-256-GCM under a second key of this boot, in a file without
a name, outside the budget. An entry is opened once. Whoever can write the file can make opening fail, no more.

`Refill` makes them: hundreds of rows at once through float64 BLAS, in tiles of bounded work, so that the compute
loop can do one whenever nobody waits.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

from trusted_worker.arithmetic import I8, I32, exact_product
from trusted_worker.secure_memory import ALIGNMENT, Scratch, SecureMemory
from trusted_worker.weights import Weights
from wire.errors import CleaveError, VerificationError
from wire.linears import LinearSpec

TAG_BYTES = 16
SEGMENT = 1 << 13  # outputs sealed together
MAX_REFILL_ROWS = 256


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

    def write(self, spec: LinearSpec, index: int, out: Any) -> None:
        """r for one row of a linear into out, a C-contiguous 32-bit array of k words."""
        if os.getpid() != self._pid or not self._key:
            raise PadReuseError("pads were asked for by a forked process")
        stream = AES.new(self._key, AES.MODE_CTR, nonce=nonce(spec, 0, index), initial_value=0)
        stream.encrypt(bytes(out.nbytes), output=out.data.cast("B"))

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
        """Seal one segment of u and park it."""
        cipher = AES.new(self._key, AES.MODE_GCM, nonce=nonce(spec, segment, index))
        sealed, tag = cipher.encrypt_and_digest(u.tobytes())
        os.pwrite(self._file.fileno(), sealed + tag, slot * self._row_bytes + self._offsets[spec, segment])

    def publish(self, first: int, slots: list[int]) -> None:
        """A refill is complete: its pads are in stock."""
        self._ready.extend(enumerate(slots, first))

    def open(self, spec: LinearSpec, index: int, slot: int, out: Any) -> None:
        """u of one row into out int32[n], C-contiguous. Raises VerificationError when the file was changed."""
        start = 0
        for segment, width in segments(spec):
            where = slot * self._row_bytes + self._offsets[spec, segment]
            sealed = os.pread(self._file.fileno(), 4 * width + TAG_BYTES, where)
            cipher = AES.new(self._key, AES.MODE_GCM, nonce=nonce(spec, segment, index))
            try:
                piece = out[start : start + width].data.cast("B")
                cipher.decrypt_and_verify(sealed[:-TAG_BYTES], sealed[-TAG_BYTES:], output=piece)
            except ValueError:
                raise VerificationError from None
            start += width

    def release(self, slot: int) -> None:
        """The pad is spent: its slot may hold another."""
        self._free.append(slot)


class Pad:
    """One pad out of the bank, for one row of one forward pass. Whatever happens next, it is spent."""

    def __init__(self, bank: Bank, index: int, slot: int) -> None:
        self._bank, self.index, self._slot = bank, index, slot
        self._burnt = False

    def open(self, spec: LinearSpec, out: Any) -> None:
        """u of one linear into out int32[n]. Raises VerificationError."""
        self._bank.open(spec, self.index, self._slot, out)

    def burn(self) -> None:
        """Give the slot back; the index is never used again. A second call does nothing."""
        if not self._burnt:
            self._burnt = True
            self._bank.release(self._slot)


def row_bytes(specs: list[LinearSpec]) -> int:
    """Bytes that one pad takes in a bank."""
    return sum(4 * width + TAG_BYTES for spec in specs for _, width in segments(spec))


def segments(spec: LinearSpec) -> list[tuple[int, int]]:
    """(number, width) of the sealed segments of one row of u."""
    return [(i, min(SEGMENT, spec.n - start)) for i, start in enumerate(range(0, spec.n, SEGMENT))]


class Refill:
    """Fills a bank in tiles. Its memory is taken when it is made: no session can take it away later."""

    def __init__(self, source: PadSource, bank: Bank, weights: Weights, memory: SecureMemory) -> None:
        self._source, self._bank, self._weights = source, bank, weights
        row = 12 * max(spec.k for spec in weights.specs) + 4 * min(SEGMENT, max(spec.n for spec in weights.specs))
        self._rows = max(1, min(MAX_REFILL_ROWS, bank.capacity, memory.budget // 8 // row))
        self._scratch = Scratch(memory, self._rows * row + 4 * ALIGNMENT)
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
            for spec in self._weights.specs:
                with self._scratch.frame():
                    yield from self._fill(spec, first, slots)
        except BaseException:
            for slot in slots:
                self._bank.release(slot)
            raise
        self._bank.publish(first, slots)

    def _fill(self, spec: LinearSpec, first: int, slots: list[int]) -> Iterator[None]:
        """u of one linear: r as signed words, products tile by tile, sealed segment by segment."""
        words = self._scratch.empty((len(slots), spec.k), np.int32)
        for row in range(len(slots)):
            self._source.write(spec, first + row, words[row])
        r = self._scratch.empty(words.shape, np.float64)
        np.copyto(r, words)
        u = self._scratch.empty((len(slots), min(SEGMENT, spec.n)), np.int32)
        for segment, offset, tile in _aligned(self._weights.tiles(spec)):
            exact_product(r, [(offset, tile)], u)
            yield
            end = offset + len(tile)
            if end == SEGMENT or segment * SEGMENT + end == spec.n:
                for row, slot in enumerate(slots):
                    self._bank.put(spec, segment, first + row, slot, u[row, :end])
                yield


def _aligned(tiles: Iterator[tuple[int, I8]]) -> Iterator[tuple[int, int, I8]]:
    """The same tiles, cut where a segment ends: (segment, first row within it, rows)."""
    for first, tile in tiles:
        start = first
        while start < first + len(tile):
            segment = start // SEGMENT
            stop = min(first + len(tile), (segment + 1) * SEGMENT)
            yield segment, start - segment * SEGMENT, tile[start - first : stop - first]
            start = stop
