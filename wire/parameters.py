"""Every parameter of a decoder, where a checkpoint keeps it, and how it is read: float32 rows, tile by tile.

A parameter is a matrix [rows, width] made of the rows of one or more tensors; a vector is a matrix of width 1. Both
workers read a checkpoint through this file, so no weights and no digests cross, and what one provisions to the other
is named by the same four fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from wire.checkpoint import Checkpoint
from wire.linears import BLOCK, Linear, LinearSpec, spec
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2

F32 = npt.NDArray[np.float32]


class Kind(IntEnum):
    """What a parameter is, by its number on the wire. Kinds without a layer belong to layer 0."""

    LINEAR = gpu_worker_pb2.PARAMETER_KIND_LINEAR
    EMBEDDING = gpu_worker_pb2.PARAMETER_KIND_EMBEDDING
    POSITIONS = gpu_worker_pb2.PARAMETER_KIND_POSITIONS
    ATTENTION_NORM = gpu_worker_pb2.PARAMETER_KIND_ATTENTION_NORM
    FFN_NORM = gpu_worker_pb2.PARAMETER_KIND_FFN_NORM
    FINAL_NORM = gpu_worker_pb2.PARAMETER_KIND_FINAL_NORM
    Q_NORM = gpu_worker_pb2.PARAMETER_KIND_Q_NORM
    K_NORM = gpu_worker_pb2.PARAMETER_KIND_K_NORM

    @property
    def number(self) -> gpu_worker_pb2.ParameterKind.ValueType:
        """The same number, as the generated stubs type it."""
        return self.value


@dataclass(frozen=True)
class Name:
    """Which parameter: the fields that name it on the wire. `linear` is for Kind.LINEAR only."""

    kind: Kind
    layer: int = 0
    linear: Linear | None = None
    bias: bool = False


@dataclass(frozen=True)
class Parameter:
    """float32[rows, width] from the rows of `tensors`, (name, rows) each."""

    name: Name
    rows: int
    width: int
    tensors: tuple[tuple[str, int], ...]
    transposed: bool = False  # the tensors hold columns


def parameters(config: ModelConfig) -> dict[Name, Parameter]:
    """All of them. A tied model has no head: its embedding is used."""
    found = [_table(config, Kind.EMBEDDING, config.names.embedding, config.vocabulary)]
    if config.names.positions:
        found.append(_table(config, Kind.POSITIONS, config.names.positions, config.max_context))
    for layer in range(config.layers):
        found += _norm(config, Kind.ATTENTION_NORM, layer, config.names.attention_norm)
        found += _norm(config, Kind.FFN_NORM, layer, config.names.ffn_norm)
        if config.qk_norm:
            for kind, tensor in ((Kind.Q_NORM, config.names.q_norm), (Kind.K_NORM, config.names.k_norm)):
                found.append(_vector(Name(kind, layer), tensor.format(layer) + ".weight", config.head_dim))
        for linear in BLOCK:
            found += _linear(config, layer, linear)
    found += _norm(config, Kind.FINAL_NORM, 0, config.names.final_norm)
    if not config.tied:
        found += _linear(config, 0, Linear.LM_HEAD)
    return {parameter.name: parameter for parameter in found}


def weight_name(config: ModelConfig, of: LinearSpec) -> Name:
    """The parameter that holds the rows of a linear."""
    if of.linear is Linear.LM_HEAD and config.tied:
        return Name(Kind.EMBEDDING)
    return Name(Kind.LINEAR, of.layer, of.linear)


def tiles(checkpoint: Checkpoint, parameter: Parameter, rows: int) -> Iterator[tuple[int, F32]]:
    """(first row, float32[at most `rows`, width]) in order; a tile never spans two tensors. Raises CheckpointError."""
    first, width = 0, parameter.width
    for tensor, count in parameter.tensors:
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            if width == 1:
                tile = checkpoint.read(tensor, (count,))[start:stop, None]
            elif parameter.transposed:
                tile = checkpoint.read_columns(tensor, (width, count), start, stop)
            else:
                tile = checkpoint.read_rows(tensor, (count, width), start, stop)
            yield first + start, tile
        first += count


def read(checkpoint: Checkpoint, parameter: Parameter) -> F32:
    """The whole parameter, float32[rows, width]. Raises CheckpointError."""
    return np.concatenate([tile for _, tile in tiles(checkpoint, parameter, parameter.rows)])


def _table(config: ModelConfig, kind: Kind, tensor: str, rows: int) -> Parameter:
    return Parameter(Name(kind), rows, config.hidden, ((tensor + ".weight", rows),))


def _vector(name: Name, tensor: str, size: int) -> Parameter:
    return Parameter(name, size, 1, ((tensor, size),))


def _norm(config: ModelConfig, kind: Kind, layer: int, tensor: str) -> list[Parameter]:
    endings = {False: ".weight", True: ".bias"} if config.layer_norm else {False: ".weight"}
    return [
        _vector(Name(kind, layer, bias=bias), tensor.format(layer) + ending, config.hidden)
        for bias, ending in endings.items()
    ]


def _linear(config: ModelConfig, layer: int, linear: Linear) -> list[Parameter]:
    names, of = config.names, spec(config, layer, linear)
    groups = {
        Linear.QKV: (names.qkv, config.qkv_bias, [config.q_width, config.kv_width, config.kv_width]),
        Linear.O: ((names.o,), config.o_bias, [of.n]),
        Linear.GATE_UP: (names.gate_up, config.mlp_bias, [config.ffn] * len(names.gate_up)),
        Linear.DOWN: ((names.down,), config.mlp_bias, [of.n]),
        Linear.LM_HEAD: ((names.lm_head,), False, [of.n]),
    }
    tensors, biased, widths = groups[linear]
    if len(tensors) == 1:  # q, k and v, or gate and up, lie in one tensor already
        widths = [of.n]
    pairs = [(tensor.format(layer), rows) for tensor, rows in zip(tensors, widths, strict=True)]
    transposed = names.transposed and linear is not Linear.LM_HEAD
    weights = tuple((f"{tensor}.weight", rows) for tensor, rows in pairs)
    biases = tuple((f"{tensor}.bias", rows) for tensor, rows in pairs)
    name = Name(Kind.LINEAR, layer, linear)
    found = [Parameter(name, of.n, of.k, weights, transposed)]
    if biased:
        found.append(Parameter(Name(Kind.LINEAR, layer, linear, bias=True), of.n, 1, biases))
    return found
