"""The offloaded linears of a decoder, and the rows of the checkpoint that each is made of.

A linear is a set of weight rows with one input: q, k and v share a row of activations and so do gate and up.
Both workers build them from the same checkpoint through this file, so no weights and no digests cross.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from wire.checkpoint import Checkpoint
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


class Linear(IntEnum):
    """The linears by their number on the wire. LM_HEAD belongs to layer 0."""

    QKV = gpu_worker_pb2.LINEAR_QKV
    O = gpu_worker_pb2.LINEAR_O  # noqa: E741  (the projection's standard name)
    GATE_UP = gpu_worker_pb2.LINEAR_GATE_UP
    DOWN = gpu_worker_pb2.LINEAR_DOWN
    LM_HEAD = gpu_worker_pb2.LINEAR_LM_HEAD

    @property
    def number(self) -> gpu_worker_pb2.Linear.ValueType:
        """The same number, as the generated stubs type it."""
        return self.value


@dataclass(frozen=True)
class Part:
    """One tensor of a linear: `rows` outputs, with a bias of its own or without."""

    tensor: str
    rows: int
    bias: str | None


@dataclass(frozen=True)
class LinearSpec:
    """A linear of one layer: y[m, n] = x[m, k] . W[n, k]^T (+ bias[n])."""

    layer: int
    linear: Linear
    k: int
    n: int
    parts: tuple[Part, ...]


def norm_names(layer: int) -> tuple[str, str]:
    """Tensors of the gains before attention and before the feed-forward part."""
    prefix = f"model.layers.{layer}"
    return f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"


def spec(config: ModelConfig, layer: int, linear: Linear) -> LinearSpec:
    """What a linear is made of."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"

    def part(name: str, rows: int, bias: bool) -> Part:
        return Part(f"{name}.weight", rows, f"{name}.bias" if bias else None)

    match linear:
        case Linear.QKV:
            widths = {"q": config.q_width, "k": config.kv_width, "v": config.kv_width}
            parts = [part(f"{attention}.{p}_proj", rows, config.qkv_bias) for p, rows in widths.items()]
            k = config.hidden
        case Linear.O:
            parts, k = [part(f"{attention}.o_proj", config.hidden, config.o_bias)], config.q_width
        case Linear.GATE_UP:
            parts = [part(f"{mlp}.{p}_proj", config.ffn, config.mlp_bias) for p in ("gate", "up")]
            k = config.hidden
        case Linear.DOWN:
            parts, k = [part(f"{mlp}.down_proj", config.hidden, config.mlp_bias)], config.ffn
        case Linear.LM_HEAD:
            parts = [Part(EMBEDDING if config.tied else "lm_head.weight", config.vocabulary, None)]
            k = config.hidden
    return LinearSpec(layer, linear, k, sum(p.rows for p in parts), tuple(parts))


def all_specs(config: ModelConfig) -> list[LinearSpec]:
    """Every linear of the model in the order of a forward pass."""
    block = (Linear.QKV, Linear.O, Linear.GATE_UP, Linear.DOWN)
    specs = [spec(config, layer, linear) for layer in range(config.layers) for linear in block]
    return [*specs, spec(config, 0, Linear.LM_HEAD)]


def read_tiles(checkpoint: Checkpoint, of: LinearSpec, rows: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """The weight rows as (first row, float32[at most `rows`, k]), in order; a tile never spans two tensors."""
    first = 0
    for part in of.parts:
        for start in range(0, part.rows, rows):
            stop = min(start + rows, part.rows)
            yield first + start, checkpoint.read_rows(part.tensor, (part.rows, of.k), start, stop)
        first += part.rows


def read_bias(checkpoint: Checkpoint, of: LinearSpec) -> npt.NDArray[np.float32] | None:
    """The bias as float32[n], or None when no part has one."""
    if all(part.bias is None for part in of.parts):
        return None
    return np.concatenate(
        [checkpoint.read(p.bias, (p.rows,)) if p.bias else np.zeros(p.rows, np.float32) for p in of.parts]
    )
