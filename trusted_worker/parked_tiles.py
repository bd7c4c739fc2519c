"""Tiles of public weights, parked outside the memory budget: in the clear, in a file without a name, each checked.

A tile is read into the caller's array, which lies in the arena; what is hashed is that copy, and that copy is used:
never a mapping, never a second read. Digests are those of the tiles as they were made in this boot, and lie in
ordinary memory.

Who watches the disk sees which tiles are read and when: an order that depends on nothing but the scheme and the number
of steps. Who writes there can make a step fail (ParkedError), no more. Weights of a sealed model are parked sealed
instead: sealed_pages.py has the same two methods.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from typing import Any, Protocol

import numpy.typing as npt

from wire.errors import ExhaustedError, ParkedError

Tile = npt.NDArray[Any]


class TileStore(Protocol):
    """Where tiles are parked, by kind, layer and number."""

    def seal(self, kind: int, layer: int, page: int, data: Tile) -> None:
        """Park a C-contiguous tile. Raises ExhaustedError when the folder is full."""
        ...

    def open(self, kind: int, layer: int, page: int, out: Tile) -> None:
        """The tile into `out`, of its size. Raises VerificationError when it was changed. Safe in another thread."""
        ...

    @property
    def size(self) -> int:
        """Bytes that lie outside."""
        ...


class DigestedTiles:
    """A TileStore by SHA-256. `unchecked` leaves the comparison out, to measure what it costs."""

    def __init__(self, folder: str | None, unchecked: bool = False) -> None:
        """Raises OSError for a folder that takes no files."""
        self._file = tempfile.TemporaryFile(dir=folder, prefix="cleave-tiles-")  # noqa: SIM115
        self._unchecked = unchecked
        self._places: dict[tuple[int, int, int], tuple[int, bytes]] = {}
        self.size = 0

    def seal(self, kind: int, layer: int, page: int, data: Tile) -> None:
        """See TileStore."""
        view, complete = data.data.cast("B"), False
        with suppress(OSError):
            complete = os.pwrite(self._file.fileno(), view, self.size) == len(view)
        if not complete:
            raise ExhaustedError("the folder for parked weights is full or cannot be written")
        self._places[kind, layer, page] = self.size, hashlib.sha256(view).digest()
        self.size += len(view)

    def open(self, kind: int, layer: int, page: int, out: Tile) -> None:
        """See TileStore."""
        view, complete = out.data.cast("B"), False
        offset, digest = self._places[kind, layer, page]
        with suppress(OSError):
            complete = os.preadv(self._file.fileno(), [view], offset) == len(view)
        if not complete or (not self._unchecked and hashlib.sha256(view).digest() != digest):
            raise ParkedError
