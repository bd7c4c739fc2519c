"""Where u = r.W_q^T of pads made in advance waits: sealed, outside the memory budget.

What is seen outside: a file of equal entries, when one is written and when it is read. What is learnt: nothing of u.
What breaks it: whoever can write the file can make opening fail, no more.

All of u of one pad is cut into sheets (wire/sheets.py). A sheet is sealed with AES-256-GCM under a key of this boot,
nonce = u32 number of the sheet || u64 index of the pad, which only moves forward: no two sheets share a nonce. A sheet
is opened once in a pass, while the worker computes the first product that needs it.
"""

import os
import tempfile
from collections import deque

import numpy as np
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

from trusted_worker.arithmetic import I32
from wire.errors import ExhaustedError, ParkedError
from wire.linears import LinearSpec
from wire.sheets import TAG_BYTES, Sheets


class Bank:
    """Pads in stock, first in first out."""

    def __init__(self, boot_key: bytes, specs: list[LinearSpec], size: int, folder: str | None) -> None:
        self._key = HKDF(boot_key, 32, b"", SHA256, context=b"cleave pad bank v1")
        self.sheets = Sheets(specs)
        self.capacity = size // self.sheets.row_bytes
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

    @property
    def size(self) -> int:
        """Bytes that lie outside when the bank is full."""
        return self.capacity * self.sheets.row_bytes

    def take(self) -> "Pad | None":
        """The oldest pad, gone from the bank for good; None when it is dry."""
        if not self._ready:
            return None
        index, slot = self._ready.popleft()
        return Pad(self, index, slot)

    def claim(self, rows: int) -> list[int]:
        """Slots for a refill of `rows` rows."""
        return [self._free.pop() for _ in range(rows)]

    def put(self, sheet: int, index: int, slot: int, u: I32) -> None:
        """Seal one sheet, C-contiguous, and park it. Raises ExhaustedError when the folder is full."""
        cipher = AES.new(self._key, AES.MODE_GCM, nonce=_nonce(sheet, index))
        sealed = cipher.encrypt_and_digest(u.data.cast("B"))
        try:
            complete = os.pwritev(self._file.fileno(), sealed, self._start(sheet, slot)) == u.nbytes + TAG_BYTES
        except OSError:
            complete = False
        if not complete:
            raise ExhaustedError("the folder for parked pads is full or cannot be written")

    def publish(self, first: int, slots: list[int]) -> None:
        """A refill is complete: its pads are in stock."""
        self._ready.extend(enumerate(slots, first))

    def open(self, sheet: int, index: int, slot: int, out: I32) -> None:
        """One sheet into out int32[width], C-contiguous. Raises ParkedError when the file was changed."""
        cipher = AES.new(self._key, AES.MODE_GCM, nonce=_nonce(sheet, index))
        try:
            sealed = memoryview(os.pread(self._file.fileno(), out.nbytes + TAG_BYTES, self._start(sheet, slot)))
            cipher.decrypt_and_verify(sealed[:-TAG_BYTES], sealed[-TAG_BYTES:], output=out.data.cast("B"))
        except (OSError, ValueError):
            raise ParkedError from None

    def release(self, slot: int) -> None:
        """The pad is spent: its slot may hold another."""
        self._free.append(slot)

    def _start(self, sheet: int, slot: int) -> int:
        return slot * self.sheets.row_bytes + self.sheets.offsets[sheet]


class Pad:
    """One pad out of the bank, for one row of one forward pass. Whatever happens next, it is spent."""

    def __init__(self, bank: Bank, index: int, slot: int) -> None:
        self._bank, self.index, self._slot = bank, index, slot
        self._burnt = False
        self._room: I32 = np.empty(0, np.int32)
        self._opened = -1

    def lay(self, room: I32) -> None:
        """Where its sheets lie when they are open, one at a time: int32[the widest sheet]."""
        self._room, self._opened = room, -1

    def open(self, spec: LinearSpec) -> None:
        """Open the first sheet that a linear needs, if it is not open yet. Raises ParkedError."""
        self._turn_to(self._bank.sheets.pieces[spec][0].sheet)

    def remove(self, spec: LinearSpec, y: I32) -> None:
        """y - u in place, int32[n] of one linear. Raises ParkedError."""
        for sheet, at, start, width in self._bank.sheets.pieces[spec]:
            self._turn_to(sheet)
            y[start : start + width] -= self._room[at : at + width]

    def burn(self) -> None:
        """Give the slot back; the index is never used again. A second call does nothing."""
        if not self._burnt:
            self._burnt = True
            self._bank.release(self._slot)

    def _turn_to(self, sheet: int) -> None:
        if sheet != self._opened:
            self._opened = -1  # what is there is junk if opening fails
            self._bank.open(sheet, self.index, self._slot, self._room[: self._bank.sheets.widths[sheet]])
            self._opened = sheet


def _nonce(sheet: int, index: int) -> bytes:
    """12 bytes, injective: u32 number of the sheet, u64 index. Raises OverflowError for what does not fit."""
    return sheet.to_bytes(4, "big") + index.to_bytes(8, "big")
