"""Weights on the trusted side: int8 (or float32) tiles of every linear, the embedding table, gains and biases.

Gains, biases, scales and learnt positions always lie in the arena. What a scheme multiplies with lies there too when
the budget allows, else it is parked as it is used, quantised, tile by tile (parked_tiles.py): each use reads a tile
into the arena, checks the copy, and uses it. Which of the two is wire/plan.py's decision.

The embedding table, when it is neither resident nor left to the client, is scanned: one pass over all tiles in fixed
order, each checked, whichever rows are wanted; so what is read from outside says nothing about the tokens. `split`,
which hides nothing, reads the wanted rows from the checkpoint instead.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F32, I32, Bound
from trusted_worker.opener import Opener
from trusted_worker.parked_tiles import TileStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.checkpoint import Checkpoint
from wire.layout import Layout, tile_rows
from wire.linears import LinearSpec, all_specs
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, Parameter, parameters, tiles, weight_name
from wire.quantize import quantize_rows

PIECE_ELEMENTS = 1 << 15  # of the checkpoint, read at a time while loading
TILE = 2  # the kind of these pages: see sealed_pages.py

Tile = npt.NDArray[Any]
Tiles = Iterable[tuple[int, Tile]]


class Weights:
    """What the trusted worker holds of a checkpoint. `int8` decides the precision of linears and embedding.

    Reading it takes one pass. Raises CheckpointError, BudgetExceeded, and ExhaustedError when tiles cannot be parked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        memory: SecureMemory,
        int8: bool,
        layout: Layout,
        store: TileStore,
        opener: Opener,
    ) -> None:
        self._checkpoint, self._memory, self.int8 = checkpoint, memory, int8
        self._store, self._opener, self.layout = store, opener, layout
        self.config, self.specs = config, all_specs(config)
        self._parameters = parameters(config)
        self._resident: dict[Name, Tile] = {}
        self._scales: dict[Name, F32] = {}
        self.tiles_read = self.table_scans = 0
        self.vectors = {name: self._keep(one)[:, 0] for name, one in self._parameters.items() if one.width == 1}
        positions = self._parameters.get(Name(Kind.POSITIONS))
        self.positions = self._keep(positions) if positions else None
        squares = {name: self._load(self._parameters[name], place) for name, place in layout.places(config).items()}
        names = {spec: weight_name(config, spec) for spec in self.specs}
        self._bounds = {spec: Bound(spec.k, squares[name]) for spec, name in names.items() if name in squares}
        biases = {spec: Name(Kind.LINEAR, spec.layer, spec.linear, bias=True) for spec in self.specs}
        self.bias = {spec: self.vectors.get(name) for spec, name in biases.items()}

    @property
    def parked_bytes(self) -> int:
        """Bytes of tiles that lie outside."""
        return self._store.size

    def scale(self, spec: LinearSpec) -> F32:
        """s_w of each output of an int8 linear, float32[n]."""
        return self._scales[weight_name(self.config, spec)]

    @property
    def table_scale(self) -> F32:
        """The same of each row of the int8 embedding table, float32[vocabulary]."""
        return self._scales[Name(Kind.EMBEDDING)]

    def bound(self, spec: LinearSpec) -> Bound:
        """What step 1 of secure-infer needs to know of an int8 linear."""
        return self._bounds[spec]

    @contextmanager
    def tiles(self, spec: LinearSpec, scratch: Scratch) -> Iterator[Tiles]:
        """(first row, weights[rows, k]) of a linear, in order; a tile is gone when the next one comes.

        Raises VerificationError when a parked tile was changed or cannot be read.
        """
        with self._tiles(weight_name(self.config, spec), scratch) as found:
            yield found

    @contextmanager
    def table(self, scratch: Scratch) -> Iterator[Tiles]:
        """The same of the embedding table, weights[rows, hidden]: always all of it, always in this order."""
        self.table_scans += 1
        with self._tiles(Name(Kind.EMBEDDING), scratch) as found:
            yield found

    def embed(self, ids: I32, out: F32, scratch: Scratch) -> None:
        """Rows of the embedding table into out float32[m, hidden], by the way that the layout says."""
        if self.layout.embed == "read":
            self._read_rows(ids, out)
            return
        resident = self._resident.get(Name(Kind.EMBEDDING))
        if resident is not None:
            for row, token in enumerate(ids):
                out[row] = resident[token]
        else:
            with self.table(scratch) as found:
                for first, tile in found:
                    for at in np.flatnonzero((ids >= first) & (ids < first + len(tile))):  # no copy outside the arena
                        out[at] = tile[ids[at] - first]
        if self.int8:
            out *= self.table_scale[ids][:, None]

    def _read_rows(self, ids: I32, out: F32) -> None:
        """One row of the checkpoint for each token: whoever watches the disk sees the tokens."""
        tensor, rows = self._parameters[Name(Kind.EMBEDDING)].tensors[0]
        for row, token in enumerate(ids):
            weight = self._checkpoint.read_rows(tensor, (rows, self.config.hidden), int(token), int(token) + 1)
            if self.int8:
                quantized, scale = quantize_rows(weight)
                np.multiply(quantized, scale[:, None], out=out[row : row + 1])
            else:
                out[row] = weight[0]

    @contextmanager
    def _tiles(self, name: Name, scratch: Scratch) -> Iterator[Tiles]:
        parameter, resident = self._parameters[name], self._resident.get(name)
        rows = tile_rows(parameter.width)
        if resident is not None:
            yield ((first, resident[first : first + rows]) for first in range(0, parameter.rows, rows))
            return
        with scratch.frame():
            shape, dtype = (min(rows, parameter.rows), parameter.width), self._dtype
            buffers = [scratch.empty(shape, dtype), scratch.empty(shape, dtype)]
            numbers = range(-(-parameter.rows // rows))
            with closing(
                self._opener.ahead(partial(self._open, parameter, n, buffers[n % 2]) for n in numbers)
            ) as found:
                yield found

    def _open(self, parameter: Parameter, number: int, buffer: Tile) -> tuple[int, Tile]:
        """One parked tile. Runs in the opener's thread while the tile before it is used."""
        first = number * tile_rows(parameter.width)
        tile = buffer[: parameter.rows - first]
        self._store.open(TILE, parameter.name.layer, _page(parameter.name, number), tile)
        self.tiles_read += 1
        return first, tile

    @property
    def _dtype(self) -> type[np.generic]:
        return np.int8 if self.int8 else np.float32

    def _load(self, parameter: Parameter, place: str) -> int:
        """Read one matrix, and put it where it belongs. The largest ||W_q row||^2 of int8, else 0."""
        name, shape = parameter.name, (parameter.rows, parameter.width)
        owner = "embedding" if name.kind is Kind.EMBEDDING else "weights"
        scale: F32 = np.empty(0, np.float32)
        if self.int8:
            scale = self._scales[name] = self._memory.allocate("scales", (parameter.rows,), np.float32).array
        parking = None
        if place == "resident":
            self._resident[name] = self._memory.allocate(owner, shape, self._dtype).array
        elif place == "parked":
            parking = _Parking(self._memory, self._store, parameter, self._dtype)
        square = 0
        for first, piece in tiles(self._checkpoint, parameter, max(1, PIECE_ELEMENTS // parameter.width)):
            rows: Tile = piece
            if self.int8:
                rows, scale[first : first + len(piece)] = quantize_rows(piece)
                square = max(square, int(np.einsum("nk,nk->n", rows, rows, dtype=np.int64, casting="unsafe").max()))
            if parking is not None:
                parking.add(rows)
            elif place == "resident":
                self._resident[name][first : first + len(piece)] = rows
        if parking is not None:
            parking.finish()
        return square

    def _keep(self, parameter: Parameter) -> F32:
        """A small parameter in the arena, float32[rows, width]."""
        shape = (parameter.rows, parameter.width)
        kept: F32 = self._memory.allocate(parameter.name.kind.name.lower(), shape, np.float32).array
        for first, piece in tiles(self._checkpoint, parameter, max(1, PIECE_ELEMENTS // parameter.width)):
            kept[first : first + len(piece)] = piece
        return kept


class _Parking:
    """Fills tiles with the rows of one matrix and parks them."""

    def __init__(self, memory: SecureMemory, store: TileStore, parameter: Parameter, dtype: type[np.generic]) -> None:
        shape = (min(tile_rows(parameter.width), parameter.rows), parameter.width)
        self._block = memory.allocate("loading", shape, dtype)
        self._store, self._name = store, parameter.name
        self._filled = self._number = 0

    def add(self, rows: Tile) -> None:
        """The next rows."""
        tile, done = self._block.array, 0
        while done < len(rows):
            count = min(len(tile) - self._filled, len(rows) - done)
            tile[self._filled : self._filled + count] = rows[done : done + count]
            self._filled, done = self._filled + count, done + count
            if self._filled == len(tile):
                self._flush()

    def finish(self) -> None:
        """No more rows."""
        if self._filled:
            self._flush()
        self._block.free()

    def _flush(self) -> None:
        page = _page(self._name, self._number)
        self._store.seal(TILE, self._name.layer, page, self._block.array[: self._filled])
        self._filled, self._number = 0, self._number + 1


def _page(name: Name, number: int) -> int:
    """The 32-bit number of a tile within its layer: injective."""
    return name.kind << 28 | (name.linear or 0) << 24 | number
