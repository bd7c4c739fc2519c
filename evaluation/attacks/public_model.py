"""The public checkpoint, as an attacker has it: every parameter, and a forward pass that shows what each layer holds.

Written apart from both workers, from the published architecture: RMSNorm, RoPE, grouped attention, gated feed-forward
(the Llama family). `m` sequences of `t` tokens; H query heads, K key heads, d per head.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wire import parameters
from wire.checkpoint import Checkpoint
from wire.errors import PreconditionError
from wire.linears import Linear, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name
from wire.quantize import quantize_rows

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """What one layer holds of m sequences' last t tokens. Queries and keys are before RoPE unless they say so."""

    residual: F32  # [m, t, hidden], what enters the layer
    input: F32  # [m, t, hidden], normed: what enters qkv
    q: F32  # [m, t, H, d]
    k: F32  # [m, t, K, d]
    v: F32  # [m, t, K, d]
    q_rotated: F32
    k_rotated: F32
    attention: F32  # [m, t, H.d], what enters o


@dataclass(frozen=True)
class Past:
    """Rotated keys and values [T, K, d] of a prefix that all sequences share, for each layer."""

    keys: tuple[F32, ...]
    values: tuple[F32, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.keys[0]) if self.keys else 0


class PublicModel:
    """A model folder. Parameters are read once, when they are first used."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a folder that cannot be read, PreconditionError for another architecture."""
        self.config = ModelConfig.from_hf(folder)
        if self.config.rope is None or self.config.layer_norm or not self.config.gated or self.config.window:
            raise PreconditionError(f"{self.config.name}: the attacks know models of the Llama family only")
        self._checkpoint = Checkpoint(folder)
        self._found = parameters.parameters(self.config)
        self._read: dict[Name, F32] = {}

    def parameter(self, name: Name) -> F32:
        """float32[rows, width]; a vector has width 1."""
        if name not in self._read:
            self._read[name] = parameters.read(self._checkpoint, self._found[name])
        return self._read[name]

    def weight(self, layer: int, linear: Linear) -> F32:
        """float32[n, k]."""
        return self.parameter(parameters.weight_name(self.config, spec(self.config, layer, linear)))

    def bias(self, layer: int, linear: Linear) -> F32:
        """float32[n]; zeros where the model has none."""
        name = Name(Kind.LINEAR, layer, linear, bias=True)
        return self.parameter(name)[:, 0] if name in self._found else np.zeros(1, np.float32)

    def scales(self, layer: int, linear: Linear) -> F32:
        """float32[n]: what the public rule divides each output row of the weight by."""
        return quantize_rows(self.weight(layer, linear))[1]

    @cached_property
    def embedding(self) -> F32:
        """float32[vocabulary, hidden]."""
        return self.parameter(Name(Kind.EMBEDDING))

    @cached_property
    def first(self) -> Layer:
        """Layer 0 of every token of the vocabulary, as if it stood alone at position 0: [vocabulary, 1, ...]."""
        return self.run(np.arange(self.config.vocabulary)[:, None], layers=1)[0]

    def split(self, qkv: F32) -> tuple[F32, F32, F32]:
        """[..., (H+2K).d] -> q [..., H, d], k and v [..., K, d]."""
        c = self.config
        q, k, v = np.split(qkv, [c.q_width, c.q_width + c.kv_width], axis=-1)
        return _heads(q, c.head_dim), _heads(k, c.head_dim), _heads(v, c.head_dim)

    def rotate(self, x: F32, positions: Ids) -> F32:
        """RoPE of x [..., t, heads, d] at positions [t]; negative positions undo it."""
        rope, dims = self.config.rope, x.shape[-1] if self.config.rope is None else self.config.rope.dims
        angles = positions[:, None, None] * self.config.inverse_frequencies().astype(np.float64)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        result = x.copy()
        near, far = pairs(dims, rope is not None and rope.interleaved)
        a, b = x[..., near], x[..., far]
        result[..., near], result[..., far] = a * cos - b * sin, a * sin + b * cos
        return result

    def past(self, ids: Ids) -> Past:
        """Of a prefix [T]."""
        held = self.run(ids[None])
        return Past(tuple(one.k_rotated[0] for one in held), tuple(one.v[0] for one in held))

    def run(self, ids: Ids, past: Past | None = None, layers: int | None = None) -> list[Layer]:
        """What the first `layers` layers hold of sequences [m, t], each behind `past`."""
        past = past or Past((), ())
        x, held = self.embedding[ids], []
        positions = past.tokens + np.arange(ids.shape[1])
        for number in range(self.config.layers if layers is None else layers):
            shared = (past.keys[number], past.values[number]) if past.tokens else None
            held.append(self._hold(number, x, positions, shared))
            if number + 1 < (layers or self.config.layers):
                x = self._finish(number, x, held[-1].attention)
        return held

    def turned(self, number: int, q: F32, k: F32, positions: Ids) -> tuple[F32, F32]:
        """q and k [..., t, heads, d] of a layer as they enter attention: normed, where the model does, and rotated."""
        if self.config.qk_norm:
            q, k = self.normed(q, Name(Kind.Q_NORM, number)), self.normed(k, Name(Kind.K_NORM, number))
        return self.rotate(q, positions), self.rotate(k, positions)

    def _hold(self, number: int, x: F32, positions: Ids, shared: tuple[F32, F32] | None) -> Layer:
        normed = self.normed(x, Name(Kind.ATTENTION_NORM, number))
        q, k, v = self.split(self._linear(number, Linear.QKV, normed))
        q_rotated, k_rotated = self.turned(number, q, k, positions)
        a = attend(q_rotated, k_rotated, v, shared)
        return Layer(x, normed, q, k, v, q_rotated, k_rotated, a)

    def _finish(self, number: int, x: F32, a: F32) -> F32:
        x = x + self._linear(number, Linear.O, a)
        up = self._linear(number, Linear.GATE_UP, self.normed(x, Name(Kind.FFN_NORM, number)))
        gate, value = np.split(up, 2, axis=-1)
        return x + self._linear(number, Linear.DOWN, gate / (1 + np.exp(-gate)) * value)

    def _linear(self, number: int, linear: Linear, x: F32) -> F32:
        rows = x.reshape(-1, x.shape[-1])  # numpy multiplies a stack one by one
        y: F32 = rows @ self.weight(number, linear).T + self.bias(number, linear)
        return y.reshape(*x.shape[:-1], -1)

    def normed(self, x: F32, gain: Name) -> F32:
        """RMSNorm over the last axis, times a gain."""
        scale = np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + self.config.norm_eps)
        result: F32 = (x / scale * self.parameter(gain)[:, 0]).astype(np.float32)
        return result


def attend(q: F32, k: F32, v: F32, shared: tuple[F32, F32] | None) -> F32:
    """Causal attention of q [m, t, H, d] over a shared past [T, K, d] and k, v [m, t, K, d] -> [m, t, H.d]."""
    weights = probabilities(q, k, shared)
    tokens = q.shape[1]
    groups = q.shape[2] // k.shape[2]
    own = np.einsum("mhts,mshd->mthd", weights[..., weights.shape[-1] - tokens :], _repeat(v, groups))
    if shared is not None:
        own = own + np.einsum("mhtT,Thd->mthd", weights[..., : len(shared[1])], _repeat(shared[1], groups))
    result: F32 = own.reshape(*own.shape[:2], -1).astype(np.float32)
    return result


def scores(q: F32, k: F32, shared: tuple[F32, F32] | None) -> F32:
    """q.k / sqrt(d): [m, H, t, T + t]; what a token may not see is minus infinity."""
    groups, tokens = q.shape[2] // k.shape[2], q.shape[1]
    own = np.einsum("mthd,mshd->mhts", q, _repeat(k, groups), optimize=True)
    own[..., np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    if shared is not None:
        before = np.einsum("mthd,Thd->mhtT", q, _repeat(shared[0], groups), optimize=True)
        own = np.concatenate([before, own], axis=-1)
    result: F32 = own / np.float32(np.sqrt(q.shape[-1]))
    return result


def probabilities(q: F32, k: F32, shared: tuple[F32, F32] | None) -> F32:
    """Softmax of the scores."""
    found = scores(q, k, shared)
    powers = np.exp(found - found.max(axis=-1, keepdims=True))
    result: F32 = powers / powers.sum(axis=-1, keepdims=True)
    return result


def _heads(x: F32, dims: int) -> F32:
    return x.reshape(*x.shape[:-1], -1, dims)


def _repeat(x: F32, groups: int) -> F32:
    return np.repeat(x, groups, axis=-2)


def pairs(dims: int, interleaved: bool) -> tuple[slice, slice]:
    """Which dims of a head turn together."""
    return (slice(0, dims, 2), slice(1, dims, 2)) if interleaved else (slice(0, dims // 2), slice(dims // 2, dims))
