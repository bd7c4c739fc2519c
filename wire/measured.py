"""The digest of a model, and reads that are held to it: what was measured is what is used.

The disk may belong to somebody hostile, who changes a file between one read and the next.
 1. Measure: read every file once, chunk by chunk, into memory of ours, and keep the SHA-256 of each chunk.
 2. model digest = SHA-256(LABEL || digest of the configuration || for each file, in the order of their names:
    lp(name) || u64 size, big-endian || its chunks' digests). Sealing a model does not change it.
 3. Every later read brings in whole chunks, hashes the copy, compares, and uses the copy: never a mapping, never a
    second read.

Who watches the disk learns which chunks are read and when. Who writes there can make a read fail, no more. The digests
lie in ordinary memory: 32 bytes for each 256 KiB.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wire.binding import lp
from wire.checkpoint import Checkpoint, FileSource, Source
from wire.errors import CheckpointError
from wire.model_config import ModelConfig

LABEL = b"cleave model v1\0"
CHUNK = 1 << 18
_DIGEST_BYTES = 32
U8 = npt.NDArray[np.uint8]


class _Window:
    """The one chunk that a checkpoint keeps, and whose it is."""

    def __init__(self) -> None:
        self.buffer: U8 = np.empty(CHUNK, np.uint8)
        self.holds: tuple[Source, int] | None = None


class MeasuredSource:
    """Any Source, measured when this is made. One thread at a time, for all that share a window."""

    def __init__(self, inner: Source, window: _Window) -> None:
        """Reads everything. Raises what `inner` raises."""
        self._inner, self._window, self.size = inner, window, inner.size
        chunks = (self._copy(number) for number in range(-(-self.size // CHUNK)))
        self.digests = b"".join(hashlib.sha256(piece.data).digest() for piece in chunks)  # step 1

    def read(self, offset: int, into: U8) -> None:
        """See Source. Raises CheckpointError when the file is not what was measured."""
        if offset + len(into) > self.size:
            raise CheckpointError("the checkpoint is shorter than what is read of it")
        done = 0
        while done < len(into):
            number, start = divmod(offset + done, CHUNK)
            piece = self._checked(number)[start : start + len(into) - done]
            into[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """See Source."""
        self._window.holds = None
        self._window.buffer.fill(0)  # the opened model may be secret
        self._inner.close()

    def _checked(self, number: int) -> U8:
        """Step 3, for one chunk. The copy is gone when the next one comes."""
        if self._window.holds == (self, number):
            return self._window.buffer[: self.size - number * CHUNK]
        piece = self._copy(number)
        at = number * _DIGEST_BYTES
        if hashlib.sha256(piece.data).digest() != self.digests[at : at + _DIGEST_BYTES]:
            raise CheckpointError(
                "the checkpoint changed on disk after it was measured: start again with what is meant"
            )
        self._window.holds = self, number
        return piece

    def _copy(self, number: int) -> U8:
        """One chunk in memory of ours; not checked."""
        self._window.holds = None
        piece = self._window.buffer[: self.size - number * CHUNK]
        self._inner.read(number * CHUNK, piece)
        return piece


class MeasuredCheckpoint(Checkpoint):
    """A Checkpoint that cannot change once it was measured. `model_digest`: 32 bytes."""

    def __init__(
        self, folder: Path, config: ModelConfig, suffix: str = "", open_source: Callable[[Path], Source] = FileSource
    ) -> None:
        """`config` as it was read from the folder; the rest, and errors, as for Checkpoint."""
        window, total = _Window(), hashlib.sha256(LABEL + config.digest)

        def measure(path: Path) -> Source:
            inner = open_source(path)
            try:
                measured = MeasuredSource(inner, window)
            except BaseException:
                inner.close()
                raise
            name = os.fsencode(path.name.removesuffix(suffix))
            total.update(lp(name) + measured.size.to_bytes(8, "big") + measured.digests)  # step 2
            return measured

        super().__init__(folder, suffix, measure)
        self.model_digest = total.digest()
