"""One-time pads: where they come from, and how u = r.W_q^T is made in idle time. Where it waits: pad_bank.py.

A pad index stands for one row of one forward pass: it names a pad r for every linear, from one AES-256-CTR stream
each: key = HKDF(boot key, model digest), 96-bit nonce = u32(layer, linear) || u64 index, block counter from 0. The
encoding is injective and the index only moves forward, so no two uses share a stream. The key lives in memory only.

`Refill` makes u: hundreds of rows at once through float64 BLAS, in tiles of bounded work, so that the compute
loop can do one whenever nobody waits. Where the embedding table does not fit the budget a pad has one more part, for
the masked lookup: as long as the vocabulary is large, so it is made and multiplied tile by tile of the table.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

from trusted_worker.arithmetic import F64, I8, I32, exact_lookup, exact_product
from trusted_worker.key_stream import KeyStream
from trusted_worker.pad_bank import Bank
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.errors import CleaveError
from wire.linears import LOOKUP_LAYER, LinearSpec
from wire.sheets import Piece

WORDS_OF_BLOCK = 4  # 32-bit words of a block of AES


class PadReuseError(CleaveError):
    """A pad was about to be used twice, or by a forked process. A bug, never a peer's doing."""


def nonce(spec: LinearSpec, index: int) -> bytes:
    """12 bytes, injective: u32 = layer (16 bits) | linear (16), then u64 index."""
    if not (spec.layer < 1 << 16 and spec.linear < 1 << 16 and 0 <= index < 1 << 64):
        raise PadReuseError("a pad's name is out of range")
    return (spec.layer << 16 | spec.linear).to_bytes(4, "big") + index.to_bytes(8, "big")


class PadSource:
    """The pads of this boot. Indices are reserved once and used in order."""

    def __init__(self, boot_key: bytes, model_digest: bytes) -> None:
        key = HKDF(boot_key, 32, model_digest, SHA256, context=b"cleave pads v1")
        self._streams: KeyStream | None = KeyStream(key)
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
        self._own_streams().write(nonce(spec, index), out, first // WORDS_OF_BLOCK)

    def spend(self, spec: LinearSpec, indices: list[int], out: Any) -> None:
        """r for masking, a row of `out` for each index: like `write`, once and in increasing order for each linear.

        Raises PadReuseError, and writes nothing then.
        """
        for before, index in pairwise([self._last.get(spec, -1), *indices]):
            if index <= before or index >= self._next:
                self.reused += 1
                raise PadReuseError("a pad was about to be used twice")
        streams = self._own_streams()
        self._last[spec] = indices[-1]
        streams.write_rows([nonce(spec, index) for index in indices], out)

    def _own_streams(self) -> KeyStream:
        if os.getpid() != self._pid or self._streams is None:
            raise PadReuseError("pads were asked for by a forked process")
        return self._streams

    def _poison(self) -> None:
        self._streams = None


@dataclass(frozen=True)
class Pads:
    """All of it: where pads come from, where they wait, and what makes them."""

    source: PadSource
    bank: Bank
    refill: "Refill"


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
            with self._scratch.frame():
                u: I32 = self._scratch.empty((len(slots), max(self._bank.sheets.widths)), np.int32)
                for spec in self._specs:
                    fill = self._fill_lookup if spec.layer == LOOKUP_LAYER else self._fill
                    with self._scratch.frame():
                        yield from fill(spec, first, slots, u)
        except BaseException:
            for slot in slots:
                self._bank.release(slot)
            raise
        self._bank.publish(first, slots)

    def _fill(self, spec: LinearSpec, first: int, slots: list[int], u: I32) -> Iterator[None]:
        """One linear's part of the sheet in `u`: products tile by tile; a sheet that is full is sealed."""
        r: F64 = self._scratch.empty((len(slots), spec.k), np.float64)
        self._pads(spec, first, 0, r)
        with self._weights.tiles(spec, self._scratch) as tiles:
            for piece, tile in _aligned(tiles, self._bank.sheets.pieces[spec]):
                exact_product(r, [(piece.at, tile)], u, self._scratch)
                yield
                if piece.at + len(tile) == self._bank.sheets.widths[piece.sheet]:
                    self._seal(piece.sheet, first, slots, u)
                    yield

    def _fill_lookup(self, spec: LinearSpec, first: int, slots: list[int], u: I32) -> Iterator[None]:
        """The masked lookup: summed over the tiles of the table, each with its own piece of r."""
        total: I32 = self._scratch.empty((len(slots), spec.n), np.int32)
        part: I32 = self._scratch.empty(total.shape, np.int32)
        total[...] = 0
        with self._weights.table(self._scratch) as tiles:
            for start, tile in tiles:
                with self._scratch.frame():
                    r: F64 = self._scratch.empty((len(slots), len(tile)), np.float64)
                    self._pads(spec, first, start, r)
                    exact_lookup(r, [(0, tile)], part, self._scratch)
                    total += part
                yield
        for piece in self._bank.sheets.pieces[spec]:
            u[:, : piece.width] = total[:, piece.start : piece.start + piece.width]
            self._seal(piece.sheet, first, slots, u)
        yield

    def _pads(self, spec: LinearSpec, first: int, start: int, r: F64) -> None:
        """Words `start` on of r of each pad, as signed integers in float64[rows, words]."""
        with self._scratch.frame():
            words: I32 = self._scratch.empty((r.shape[1],), np.int32)
            for row in range(len(r)):
                self._source.write(spec, first + row, words, start)
                r[row] = words

    def _seal(self, sheet: int, first: int, slots: list[int], u: I32) -> None:
        width = self._bank.sheets.widths[sheet]
        for row, slot in enumerate(slots):
            self._bank.put(sheet, first + row, slot, u[row, :width])


def _aligned(tiles: Iterable[tuple[int, I8]], pieces: list[Piece]) -> Iterator[tuple[Piece, I8]]:
    """The same tiles, cut where a sheet ends: the piece of the sheet that they fill, and its rows."""
    for first, tile in tiles:
        for sheet, at, start, width in pieces:
            low, high = max(first, start), min(first + len(tile), start + width)
            if low < high:
                yield Piece(sheet, at + low - start, low, high - low), tile[low - first : high - first]
