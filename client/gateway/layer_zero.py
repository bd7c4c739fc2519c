"""What anybody can compute of a model's first product from its public checkpoint, and read from the rows that enter it.

What enters layer 0's query, key and value is the norm of a token's embedding times a gain: a function of the token
alone. Without a mask each row therefore names its token: `nearest` looks it up. `sent` makes the rows that the scheme
`split` would send, bit for bit, by its rule (step 1 of secure-infer).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.embedding import EmbeddingTable
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError
from wire.linears import Linear
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, Parameter, parameters, read, tiles
from wire.quantize import quantize_rows

F32 = npt.NDArray[np.float32]
TILE_ROWS = 1024
X_LIMIT, Y_LIMIT = 1 << 24, 1 << 30  # of |x_q|, of a product
_MARGIN = 1 - 1e-6  # of rounding


class LayerZero:
    """Of a model folder, at a precision. Raises CheckpointError for a model that it cannot serve."""

    def __init__(self, folder: Path, precision: str) -> None:
        self._config = ModelConfig.from_hf(folder)
        if self._config.layer_norm or self._config.names.positions:
            raise CheckpointError("models with learned positions are not compared")
        self._int8 = precision == "int8"
        self._table = EmbeddingTable(folder, precision)
        self._checkpoint, self._parameters = Checkpoint(folder), parameters(self._config)
        self._gain = read(self._checkpoint, self._parameters[Name(Kind.ATTENTION_NORM)])[:, 0]
        self._row_square = self._largest_square() if self._int8 else 0

    def sent(self, token_ids: Sequence[int]) -> npt.NDArray[Any]:
        """int32[tokens, hidden] at int8, else float32. Raises InvalidArgumentError for an id that cannot exist."""
        rows = np.frombuffer(self._table.rows(token_ids), np.float32).reshape(len(token_ids), -1)
        return np.stack([self._quantise(row) for row in self._norm(rows)]) if self._int8 else self._norm(rows)

    def nearest(self, rows: npt.NDArray[Any]) -> list[int]:
        """For each row the token whose own row points the same way, more than any other's."""
        wide = rows.astype(np.float32)
        best, found = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64)
        for first, tile in self._tiles(self._parameters[Name(Kind.EMBEDDING)]):
            table = self._norm(tile)
            table /= np.linalg.norm(table, axis=1, keepdims=True) + np.float32(1e-30)
            cosines = wide @ table.T
            here = cosines.max(axis=1)
            found = np.where(here > best, first + cosines.argmax(axis=1), found)
            best = np.maximum(here, best)
        return [int(token_id) for token_id in found]

    def _norm(self, x: F32) -> F32:
        inverse = 1.0 / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(self._config.norm_eps))
        normed: F32 = x * inverse * self._gain
        return normed

    def _quantise(self, row: F32) -> npt.NDArray[np.int32]:
        """As fine as keeps |x_q| below X_LIMIT, and every product below Y_LIMIT by one of two bounds."""
        wide, k = row.astype(np.float64), len(row)
        peak, ones, square = float(np.abs(wide).max()), float(np.abs(wide).sum()), float(np.vecdot(wide, wide))
        if not peak:
            return np.zeros(k, np.int32)
        root = math.sqrt((Y_LIMIT**2 - 1) // max(self._row_square, 1))
        by_one = (Y_LIMIT / 127 - 0.5 * k - 1) / ones
        by_two = (root - 0.5 * math.sqrt(k) - 1) / math.sqrt(square)
        factor = min((X_LIMIT - 1) / peak, max(by_one, by_two)) * _MARGIN
        return np.rint(wide * factor).astype(np.int32)

    def _largest_square(self) -> int:
        """max ||W_q row||^2 of layer 0's query, key and value."""
        weights = self._parameters[Name(Kind.LINEAR, 0, Linear.QKV)]
        pieces = (quantize_rows(tile)[0].astype(np.int64) for _, tile in tiles(self._checkpoint, weights, TILE_ROWS))
        return max(int(np.vecdot(piece, piece).max()) for piece in pieces)

    def _tiles(self, table: Parameter) -> Iterator[tuple[int, F32]]:
        """The embedding table as the trusted worker uses it."""
        for first, tile in tiles(self._checkpoint, table, TILE_ROWS):
            if not self._int8:
                yield first, tile
                continue
            quantised, scale = quantize_rows(tile)
            yield first, np.multiply(quantised, scale[:, None], dtype=np.float32)
