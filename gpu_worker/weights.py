"""The weights of one linear on a device, in either precision, and how they are read from a checkpoint.

float32 keeps float32 only, int8 keeps int8 and one scale per row only: no precision holds a copy of the other.
"""

from typing import Protocol

import numpy as np
import torch

from gpu_worker.kernels import cpu
from wire.checkpoint import Checkpoint
from wire.linears import EMBEDDING, Linear, LinearSpec, Part, read_tiles
from wire.model_config import ModelConfig
from wire.quantize import quantize_rows

TILE_BYTES = 8 << 20  # of float32 in memory while a matrix is read


class Weights(Protocol):
    """W[n, k] of one linear."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x float32[m, k] -> x.W^T as float32[m, n]."""
        ...

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64[m] -> rows of W as float32[m, k]: W as an embedding table."""
        ...


class Float32Weights:
    """W as it is in the checkpoint."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """float32 matrix product."""
        return x @ self.weight.t()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """A plain lookup."""
        return self.weight[ids]


class Int8Weights:
    """W = quantised int8[n, k] times scale float32[n]. The ring products use the same `quantised`."""

    def __init__(self, quantised: torch.Tensor, scale: torch.Tensor) -> None:
        self.quantised = quantised
        self.scale = scale

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Float activations times int8 weights, scaled per output afterwards."""
        if x.device.type == "cpu":
            y = torch.from_numpy(cpu.matmul(x.contiguous().numpy(), self.quantised.numpy()))
        else:
            y = x @ self.quantised.t().to(x.dtype)
        return y.mul_(self.scale)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows, dequantised."""
        return self.quantised[ids].to(torch.float32) * self.scale[ids, None]


def embedding_spec(config: ModelConfig) -> LinearSpec:
    """The embedding table of a model whose head is another matrix, as if it were a linear."""
    return LinearSpec(0, Linear.LM_HEAD, config.hidden, config.vocabulary, (Part(EMBEDDING, config.vocabulary, None),))


def read_float32(checkpoint: Checkpoint, of: LinearSpec, device: str) -> Float32Weights:
    """Raises CheckpointError when the checkpoint does not hold what `of` names."""
    weight = np.empty((of.n, of.k), np.float32)
    for first, tile in read_tiles(checkpoint, of, _tile_rows(of)):
        weight[first : first + len(tile)] = tile
    return Float32Weights(torch.from_numpy(weight).to(device))


def read_int8(checkpoint: Checkpoint, of: LinearSpec, device: str) -> Int8Weights:
    """The same, quantised tile by tile with the rule that both workers share."""
    quantised = np.empty((of.n, of.k), np.int8)
    scale = np.empty(of.n, np.float32)
    for first, tile in read_tiles(checkpoint, of, _tile_rows(of)):
        rows = slice(first, first + len(tile))
        quantised[rows], scale[rows] = quantize_rows(tile)
    return Int8Weights(torch.from_numpy(quantised).to(device), torch.from_numpy(scale).to(device))


def _tile_rows(of: LinearSpec) -> int:
    return max(1, TILE_BYTES // (4 * of.k))
