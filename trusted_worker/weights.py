"""Weights on the trusted side: int8 (or float32) tiles of every linear, the embedding table, gains and biases.

Resident in the arena when at most half of it suffices; otherwise streamed: each tile is read again from disk when it
is used, and the copy that will be used is hashed and compared with the digest taken when the model was loaded in
this boot, so a disk that changes its mind is caught (VerificationError).
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F32, I8, I32
from trusted_worker.secure_memory import SecureMemory
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, VerificationError
from wire.linears import LinearSpec, all_specs
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, Parameter, parameters, read, tiles, weight_name
from wire.quantize import quantize_rows

TILE_ELEMENTS = 1 << 18  # weights of one tile: 2 MiB as float64

Tile = npt.NDArray[Any]


class Weights:
    """What the trusted worker holds of a checkpoint. `int8` decides the precision of linears and embedding."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, memory: SecureMemory, int8: bool) -> None:
        self._checkpoint, self._memory, self._int8 = checkpoint, memory, int8
        self.config = config
        self.specs = all_specs(config)
        self._parameters = parameters(config)
        self.vectors = {name: self._keep(one)[:, 0] for name, one in self._parameters.items() if one.width == 1}
        self.bias = {
            spec: self.vectors.get(Name(Kind.LINEAR, spec.layer, spec.linear, bias=True)) for spec in self.specs
        }
        self.scale: dict[LinearSpec, F32] = {}
        self._resident: dict[LinearSpec, Tile] = {}
        self._digests: dict[tuple[LinearSpec, int], bytes] = {}
        self._load_embedding()

    def load_linears(self) -> None:
        """Read every linear once: keep it if it fits, else its digests. Needed by `tiles`. Raises CheckpointError."""
        dtype = np.int8 if self._int8 else np.float32
        missing = [spec for spec in self.specs if spec not in self._resident]
        fits = sum(spec.n * spec.k for spec in missing) * np.dtype(dtype).itemsize <= self._memory.budget // 2
        for spec in missing:
            keep = self._memory.allocate("weights", (spec.n, spec.k), dtype).array if fits else None
            scale = np.empty(spec.n, np.float32)
            for first, tile in self._read(spec, scale):
                if keep is None:
                    self._digests[spec, first] = hashlib.sha256(tile.tobytes()).digest()
                else:
                    keep[first : first + len(tile)] = tile
            self.scale[spec] = self._memory.allocate("scales", (spec.n,), np.float32).array
            self.scale[spec][...] = scale
            if keep is not None:
                self._resident[spec] = keep

    def tiles(self, spec: LinearSpec) -> Iterator[tuple[int, Tile]]:
        """(first row, weights[rows, k]) in order. Raises VerificationError when the disk no longer holds the model."""
        resident = self._resident.get(spec)
        if resident is not None:
            rows = _tile_rows(spec)
            yield from ((first, resident[first : first + rows]) for first in range(0, spec.n, rows))
            return
        try:
            for first, tile in self._read(spec, np.empty(spec.n, np.float32)):
                if hashlib.sha256(tile.tobytes()).digest() != self._digests[spec, first]:
                    raise VerificationError
                yield first, tile
        except CheckpointError:
            raise VerificationError from None

    def row_square(self, spec: LinearSpec) -> int:
        """max over rows of ||W_q row||^2, an exact integer."""
        return max(
            int(np.einsum("nk,nk->n", tile, tile, dtype=np.int64, casting="unsafe").max())
            for _, tile in self.tiles(spec)
        )

    def embed(self, ids: I32, out: F32) -> None:
        """Rows of the embedding table into out float32[m, hidden]. The table is resident: no read leaves the arena."""
        rows = self._embedding[ids]
        np.copyto(out, rows, casting="unsafe")
        if self._int8:
            out *= self._embedding_scale[ids][:, None]

    def _load_embedding(self) -> None:
        config = self.config
        head = self.specs[-1]
        dtype = np.int8 if self._int8 else np.float32
        table = self._memory.allocate("embedding", (config.vocabulary, config.hidden), dtype).array
        scale = self._memory.allocate("scales", (config.vocabulary,), np.float32).array
        embedding = self._parameters[Name(Kind.EMBEDDING)]
        for first, tile in tiles(self._checkpoint, embedding, max(1, TILE_ELEMENTS // config.hidden)):
            stop = first + len(tile)
            if self._int8:
                table[first:stop], scale[first:stop] = quantize_rows(tile)
            else:
                table[first:stop] = tile
        self._embedding, self._embedding_scale = table, scale
        if config.tied:
            self._resident[head], self.scale[head] = table, scale
        positions = self._parameters.get(Name(Kind.POSITIONS))
        self.positions = self._keep(positions) if positions else None

    def _read(self, spec: LinearSpec, scale: F32) -> Iterator[tuple[int, Tile]]:
        """Tiles from disk in the working precision; their scales go to `scale`."""
        parameter = self._parameters[weight_name(self.config, spec)]
        for first, tile in tiles(self._checkpoint, parameter, _tile_rows(spec)):
            if self._int8:
                quantized: I8
                quantized, scale[first : first + len(tile)] = quantize_rows(tile)
                yield first, quantized
            else:
                yield first, tile

    def _keep(self, parameter: Parameter) -> F32:
        """A small parameter in the arena, float32[rows, width]."""
        shape = (parameter.rows, parameter.width)
        kept: F32 = self._memory.allocate(parameter.name.kind.name.lower(), shape, np.float32).array
        kept[...] = read(self._checkpoint, parameter)
        return kept


def _tile_rows(spec: LinearSpec) -> int:
    return max(1, TILE_ELEMENTS // spec.k)
