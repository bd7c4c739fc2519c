"""AES-256-CTR (NIST SP 800-38A) under one key, for many short streams.

The stream of a 96-bit nonce is AES(key, nonce || u32 block number), block after block. It is made as what it is, the
block cipher over counters, because making a CTR object of the library costs more than most streams are long.
The counters are no secret; the stream is written where it is wanted and nowhere else.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from Crypto.Cipher import AES

BLOCK_BYTES = 16
NONCE_BYTES = 12
_AT_ONCE = 1 << 13  # blocks


class KeyStream:
    """The streams of one key, 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AES.new(key, AES.MODE_ECB)
        self._counters = np.empty((_AT_ONCE, 4), ">u4")
        self._bytes = self._counters.data.cast("B")
        self._steps = np.arange(_AT_ONCE, dtype=np.uint32)

    def write(self, nonce: bytes, out: npt.NDArray[Any], first: int = 0) -> None:
        """The stream of a 12-byte nonce into `out`, C-contiguous: its bytes from block `first` on.

        Raises ValueError for a stream beyond 2^32 blocks.
        """
        room = out.data.cast("B")
        blocks = -(-len(room) // BLOCK_BYTES)
        if first + blocks > 1 << 32:
            raise ValueError("a key stream has at most 2^32 blocks")
        for start in range(0, blocks, _AT_ONCE):
            counters = self._counters[: blocks - start]
            counters[:, :3] = np.frombuffer(nonce, ">u4")
            counters[:, 3] = self._steps[: blocks - start] + np.uint32(first + start)
            part = room[start * BLOCK_BYTES : (start + _AT_ONCE) * BLOCK_BYTES]
            whole = len(part) // BLOCK_BYTES * BLOCK_BYTES
            self._cipher.encrypt(self._bytes[:whole], output=part[:whole])
            if rest := part[whole:]:
                rest[:] = self._cipher.encrypt(self._bytes[whole : whole + BLOCK_BYTES])[: len(rest)]

    def write_rows(self, nonces: list[bytes], out: npt.NDArray[Any]) -> None:
        """The streams of these nonces, from their beginnings, into the rows of `out`, C-contiguous."""
        blocks, rest = divmod(out[:1].nbytes, BLOCK_BYTES)
        together = _AT_ONCE // blocks if blocks and not rest else 0
        if len(nonces) == 1 or together < 2:
            for nonce, row in zip(nonces, out, strict=True):
                self.write(nonce, row)
            return
        for top in range(0, len(nonces), together):
            names = np.frombuffer(b"".join(nonces[top : top + together]), ">u4").reshape(-1, 1, 3)
            counters = self._counters[: len(names) * blocks].reshape(len(names), blocks, 4)
            counters[:, :, :3] = names
            counters[:, :, 3] = self._steps[:blocks]
            place = out[top : top + together].data.cast("B")
            self._cipher.encrypt(self._bytes[: len(place)], output=place)
