"""The parameters of a model on a device, in either precision, filled row by row: from a checkpoint or by a peer.

float32 keeps float32 only. int8 keeps linears and the embedding table as int8 and one scale per row only: no
precision holds a copy of the other. Norms, biases and positions are float32 in both.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.kernels import cpu
from wire.checkpoint import Checkpoint
from wire.errors import InvalidArgumentError, PreconditionError
from wire.parameters import Kind, Name, Parameter, tiles
from wire.quantize import quantize_rows

TILE_BYTES = 8 << 20  # of float32 in memory while a matrix is read

F32 = npt.NDArray[np.float32]


class Weights(Protocol):
    """W[n, k] of a linear, or an embedding table."""

    def put(self, first: int, tile: F32) -> None:
        """Set the rows from `first` on: float32[rows, k]."""
        ...

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x float32[m, k] -> x.W^T as float32[m, n]."""
        ...

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64[m] -> rows of W as float32[m, k]: W as an embedding table."""
        ...


class Float32Weights:
    """W as it is in the checkpoint. With k = 1 it is a vector."""

    def __init__(self, n: int, k: int, device: str) -> None:
        self.weight = _matrix(n, k, torch.float32, device)

    def put(self, first: int, tile: F32) -> None:
        """A copy."""
        self.weight[first : first + len(tile)] = torch.from_numpy(tile)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """float32 matrix product."""
        return _on_cpu(x, self.weight) if x.device.type == "cpu" else x @ self.weight.t()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """A plain lookup."""
        return self.weight[ids]

    def vector(self) -> torch.Tensor:
        """float32[n] of a W with k = 1."""
        return self.weight.view(-1)


class Int8Weights:
    """W = quantised int8[n, k] times scale float32[n]. The ring products use the same `quantised`."""

    def __init__(self, n: int, k: int, device: str) -> None:
        self.quantised = _matrix(n, k, torch.int8, device)
        self.scale = torch.empty(n, device=device)

    def put(self, first: int, tile: F32) -> None:
        """Quantised with the rule that both workers share."""
        quantised, scale = quantize_rows(tile)
        rows = slice(first, first + len(tile))
        self.quantised[rows], self.scale[rows] = torch.from_numpy(quantised), torch.from_numpy(scale)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Float activations times int8 weights, scaled per output afterwards."""
        if x.device.type != "cpu":
            return (x @ self.quantised.t().to(x.dtype)).mul_(self.scale)
        y = _on_cpu(x, self.quantised)
        cpu.scale(y.numpy(), self.scale.numpy())  # torch would wake another core for the head
        return y

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows, dequantised."""
        return self.quantised[ids].to(torch.float32) * self.scale[ids, None]


def _matrix(n: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Uninitialised. On the CPU it is numpy's memory, which asks for huge pages: a fifth faster to read."""
    if device != "cpu":
        return torch.empty((n, k), dtype=dtype, device=device)
    return torch.from_numpy(np.empty((n, k), np.int8 if dtype is torch.int8 else np.float32))


def _on_cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cpu.matmul(x.contiguous().numpy(), weight.numpy()))


class ParameterSet:
    """Parameters by name, on one device. One is found when all its rows are there."""

    def __init__(self, device: str, int8: bool) -> None:
        self._device = device
        self._int8 = int8
        self._weights: dict[Name, Weights] = {}
        self._missing: dict[Name, int] = {}  # rows that have not come yet

    def __contains__(self, name: Name) -> bool:
        return name in self._weights

    def put(self, parameter: Parameter, first: int, tile: F32) -> None:
        """Rows float32[rows, width] in order; from 0 on it begins anew.

        Raises InvalidArgumentError for rows out of order or beyond the end.
        """
        name = parameter.name
        filled = parameter.rows - self._missing.get(name, parameter.rows) if first else 0
        if first != filled or first + len(tile) > parameter.rows:
            raise InvalidArgumentError(f"the rows of a parameter come in order, from 0 to {parameter.rows}")
        if name not in self._weights:
            self._weights[name] = self._make(parameter)
        self._missing[name] = parameter.rows - first
        self._weights[name].put(first, tile)
        self._missing[name] -= len(tile)

    def read(self, checkpoint: Checkpoint, parameters: Iterable[Parameter]) -> None:
        """Put all of these from disk. Raises CheckpointError when the checkpoint does not hold them."""
        for parameter in parameters:
            for first, tile in tiles(checkpoint, parameter, max(1, TILE_BYTES // (4 * parameter.width))):
                self.put(parameter, first, tile)

    def find(self, name: Name) -> Weights | None:
        """None for a parameter that never came. Raises PreconditionError for one that came in part."""
        if self._missing.get(name):
            raise PreconditionError("a parameter is provisioned in part: its last rows are missing")
        return self._weights.get(name)

    def _make(self, parameter: Parameter) -> Weights:
        name = parameter.name
        if self._int8 and name.kind in (Kind.LINEAR, Kind.EMBEDDING) and not name.bias:
            return Int8Weights(parameter.rows, parameter.width, self._device)
        return Float32Weights(parameter.rows, parameter.width, self._device)
