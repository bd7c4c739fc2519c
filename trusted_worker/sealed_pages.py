"""Pages of a sequence's KV cache, parked outside the memory budget: sealed, in a file without a name.

A sequence has a key of its own, HKDF(boot key, salt = its number); numbers only move forward, and a boot key lasts for
one boot. A page is named by kind, layer and number, and every time it is sealed its version moves forward, in our
memory. The 96-bit nonce is u8 kind || u16 layer || u32 page || u40 version: injective, so no two seals share one. The
same 12 bytes are the associated data. A page is read into the caller's array, checked and opened there.

Who watches the folder or the disk sees how many pages a sequence has, their sizes, and when which of them is written
and read: its length, and where attention reads back. Who can write there can make opening fail (ParkedError): flipped
bits, other pages, pages of other sequences, older versions and a shorter file are all rejected. What breaks it: a
reader of our memory, and a process that is forked and seals with our keys and versions.
"""

import os
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

from wire.errors import ExhaustedError, ParkedError

TAG_BYTES = 16
Page = npt.NDArray[Any]


class PageStore:
    """Gives every sequence of this boot its sealed pages, in `folder` or the system's temporary folder."""

    def __init__(self, boot_key: bytes, folder: str | None) -> None:
        self._boot_key, self._folder = boot_key, folder
        self._next = 0

    def sequence(self) -> "SealedPages":
        """Room for a new sequence, under a number that is never given again."""
        number, self._next = self._next, self._next + 1
        key = HKDF(self._boot_key, 32, number.to_bytes(8, "big"), SHA256, context=b"cleave kv pages v1")
        return SealedPages(key, self._folder)


@dataclass(slots=True)
class _Slot:
    """Where a page lies, how long it is without its tag, how often it was sealed, and whether it was written whole."""

    offset: int
    size: int
    version: int = 0
    complete: bool = False


class SealedPages:
    """The pages of one sequence, in a file that is made for the first of them.

    Used from the compute thread, but for `open`, which another thread may run as long as nothing is sealed meanwhile.
    """

    def __init__(self, key: bytes, folder: str | None) -> None:
        self._key, self._folder = key, folder
        self._slots: dict[tuple[int, int, int], _Slot] = {}
        self._file: IO[bytes] | None = None
        self.size = 0  # bytes outside

    def seal(self, kind: int, layer: int, page: int, data: Page) -> None:
        """Park a page, C-contiguous; it takes the place of its last version and must have the same size.

        Raises ExhaustedError when the folder is full or gone; `data` is as it was, but what was parked is lost.
        """
        if (kind, layer, page) not in self._slots:
            self._slots[kind, layer, page] = _Slot(self.size, data.nbytes)
            self.size += data.nbytes + TAG_BYTES
        slot = self._find(kind, layer, page, data)
        # 1. A version is used once, whatever becomes of the write.
        slot.version, slot.complete = slot.version + 1, False
        # 2. Seal, and write over the version before.
        sealed = self._cipher(kind, layer, page, slot).encrypt_and_digest(data.data.cast("B"))
        with suppress(OSError):
            slot.complete = os.pwritev(self._descriptor(), sealed, slot.offset) == slot.size + TAG_BYTES
        if not slot.complete:
            raise ExhaustedError("the folder for parked pages is full or cannot be written")

    def holds(self, kind: int, layer: int, page: int) -> bool:
        """Whether the page was parked, and its last version was written whole."""
        slot = self._slots.get((kind, layer, page))
        return slot is not None and slot.complete

    def open(self, kind: int, layer: int, page: int, out: Page) -> None:
        """The last version of a page into `out`, C-contiguous and of its size; it stays parked.

        Raises ParkedError, with `out` wiped, when the file was changed; KeyError for a page never sealed.
        """
        slot, data = self._find(kind, layer, page, out), out.data.cast("B")
        tag = bytearray(TAG_BYTES)
        try:
            # 1. A copy that nobody else can change, 2. checked and decrypted; 3. what fails leaves nothing behind.
            if os.preadv(self._descriptor(), [data, tag], slot.offset) != slot.size + TAG_BYTES:
                raise ParkedError
            self._cipher(kind, layer, page, slot).decrypt_and_verify(data, tag, output=data)
        except (OSError, ValueError, ParkedError):
            np.frombuffer(data, np.uint8)[:] = 0
            raise ParkedError from None

    def free(self) -> None:
        """Give the file back and forget the key. A second call does nothing; no page can be opened afterwards."""
        self._key = b""
        self._slots.clear()
        self.size = 0
        if self._file is not None:
            self._file.close()

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="cleave-pages-")  # noqa: SIM115
        return self._file.fileno()

    def _find(self, kind: int, layer: int, page: int, data: Page) -> _Slot:
        slot = self._slots[kind, layer, page]
        if slot.size != data.nbytes:
            raise ValueError(f"this page has {slot.size} bytes, not {data.nbytes}")
        return slot

    def _cipher(self, kind: int, layer: int, page: int, slot: _Slot) -> Any:
        name = struct.pack(">BHI", kind, layer, page) + slot.version.to_bytes(5, "big")
        return AES.new(self._key, AES.MODE_GCM, nonce=name).update(name)
