"""The arithmetic of the decoder operations, in torch: one method per step between two crossings.

embed, then per layer project_qkv, finish_qk, attend, finish_block, then head. Activations are float32 in both
precisions; shapes: m rows, H query heads, K key heads, d per head. Rows of several sequences lie one behind the
other, `spans` says how many belong to which. Float32 results equal those of transformers to rounding.
"""

from typing import cast

import torch
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention, silu

from gpu_worker.cache import Sequence
from gpu_worker.kernels import layers
from gpu_worker.weights import Float32Weights, ParameterSet, Weights
from wire.errors import PreconditionError
from wire.linears import Linear, all_specs
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, weight_name

Spans = list[tuple[Sequence, int]]
Rotations = tuple[torch.Tensor, torch.Tensor]  # cos and sin


class Decoder:
    """A model over its parameters. It keeps no state between calls: passes and sequences carry it."""

    def __init__(self, config: ModelConfig, sources: tuple[ParameterSet, ...], device: str) -> None:
        """`sources`: where parameters are looked for, the first one that has a parameter wins."""
        self.config = config
        self.device = device
        self._sources = sources
        self._names = {(of.layer, of.linear): weight_name(config, of) for of in all_specs(config)}
        self._biased = dict.fromkeys(Linear, config.mlp_bias) | {Linear.QKV: config.qkv_bias, Linear.O: config.o_bias}
        self._frequencies = torch.from_numpy(config.inverse_frequencies()).to(device)

    def over(self, overlay: ParameterSet) -> "Decoder":
        """The same model, with parameters of `overlay` in place of its own."""
        return Decoder(self.config, (overlay, *self._sources), self.device)

    def matmul(self, layer: int, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """x float32[m, k] -> x.W^T float32[m, n], without bias. Raises PreconditionError for weights that are not here,
        as every other step does.
        """
        return self._find(self._names[layer, linear]).product(x)

    def positions(self, spans: Spans) -> torch.Tensor:
        """int64[m]: those that come next in each sequence."""
        return torch.cat([torch.arange(s.length, s.length + rows, device=self.device) for s, rows in spans])

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """ids int64[m] -> residual stream float32[m, hidden]."""
        x = self._find(Name(Kind.EMBEDDING)).rows(ids)
        return x if self.config.rope is not None else x + self._find(Name(Kind.POSITIONS)).rows(positions)

    def project_qkv(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream -> q beside k [m, (H+K).d] before norm and RoPE, and v [m, K, d]."""
        c = self.config
        qkv = self._linear(layer, Linear.QKV, self._norm(Kind.ATTENTION_NORM, layer, x))
        qk, v = qkv.split_with_sizes((c.q_width + c.kv_width, c.kv_width), dim=1)
        return qk, v.unflatten(1, (-1, c.head_dim))

    def split_qk(self, qk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q beside k [m, (H+K).d] -> q [m, H, d] and k [m, K, d]."""
        heads = qk.unflatten(1, (-1, self.config.head_dim))
        return heads[:, : self.config.heads], heads[:, self.config.heads :]

    def rotations(self, positions: torch.Tensor) -> Rotations:
        """cos and sin [m, 1, pairs]."""
        angles = (positions[:, None].float() * self._frequencies)[:, None]
        return angles.cos(), angles.sin()

    def finish_qk(self, layer: int, qk: torch.Tensor, rotations: Rotations) -> tuple[torch.Tensor, torch.Tensor]:
        """What project_qkv gave -> q [m, H, d] and k [m, K, d], normed and rotated as the model asks."""
        c = self.config
        if c.qk_norm:
            q, k = self.split_qk(qk)
            normed = self._head_norm(Kind.Q_NORM, layer, q), self._head_norm(Kind.K_NORM, layer, k)
            qk = torch.cat(normed, 1).flatten(1)
        if c.rope is not None:
            qk = rotate(qk.unflatten(1, (-1, c.head_dim)), rotations, c.rope.interleaved).flatten(1)
        return self.split_qk(qk)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, permute_qk: bool
    ) -> torch.Tensor:
        """Append normed and rotated k, and v, to the caches; causal attention of q over them -> [m, H.d].

        The running tables of a sequence permute its v, and with `permute_qk` its q and k.
        """
        parts, first = [], 0
        for sequence, rows in spans:
            own_q, own_k, own_v = (one[first : first + rows] for one in (q, k, v)) if len(spans) > 1 else (q, k, v)
            final_q, final_k = sequence.arrange_qk(layer, own_q, own_k) if permute_qk else (own_q, own_k)
            keys, values = sequence.append(layer, final_k, sequence.arrange_v(layer, own_v))
            parts.append(attention(final_q, keys, values, self.config.window))
            first += rows
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def finish_block(self, layer: int, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Residual stream and attention [m, H.d] -> residual stream after the block."""
        x = x + self._linear(layer, Linear.O, a)
        up = self._linear(layer, Linear.GATE_UP, self._norm(Kind.FFN_NORM, layer, x))
        if self.config.gated:
            return x + self._linear(layer, Linear.DOWN, gate(up))
        return x + self._linear(layer, Linear.DOWN, gelu(up, approximate="tanh"))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream -> logits float32[m, vocabulary]."""
        return self.matmul(0, Linear.LM_HEAD, self._norm(Kind.FINAL_NORM, 0, x))

    def _find(self, name: Name) -> Weights:
        for source in self._sources:
            found = source.find(name)
            if found is not None:
                return found
        raise PreconditionError("the model is sealed: this worker holds no weights until they are provisioned")

    def _vector(self, name: Name) -> torch.Tensor:
        return cast(Float32Weights, self._find(name)).vector()  # in both precisions

    def _linear(self, layer: int, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        y = self.matmul(layer, linear, x)
        return y.add_(self._vector(Name(Kind.LINEAR, layer, linear, bias=True))) if self._biased[linear] else y

    def _norm(self, kind: Kind, layer: int, x: torch.Tensor) -> torch.Tensor:
        gain, eps = self._vector(Name(kind, layer)), self.config.norm_eps
        if not self.config.layer_norm:
            return norm(x, gain, eps)
        return layer_norm(x, gain.shape, gain, self._vector(Name(kind, layer, bias=True)), eps)

    def _head_norm(self, kind: Kind, layer: int, x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(-1, self.config.head_dim)
        return norm(heads, self._vector(Name(kind, layer)), self.config.norm_eps).view(x.shape)


def norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the rows of x [m, d]."""
    if x.device.type == "cpu":
        return torch.from_numpy(layers.rms_norm(x.numpy(), gain.numpy(), eps))
    return rms_norm(x, gain.shape, gain, eps)


def gate(x: torch.Tensor) -> torch.Tensor:
    """gate beside up [m, 2f] -> silu(gate).up [m, f]."""
    if x.device.type == "cpu":
        return torch.from_numpy(layers.gate(x.numpy()))
    gates, up = x.chunk(2, dim=1)
    return silu(gates) * up


def rotate(x: torch.Tensor, rotations: Rotations, interleaved: bool) -> torch.Tensor:
    """RoPE of the first 2.pairs dims of each head [m, heads, d]: coordinates are (2i, 2i + 1) or (i, i + pairs)."""
    cos, sin = rotations
    if x.device.type == "cpu":
        turned = layers.rotate(x.contiguous().numpy(), cos[:, 0].numpy(), sin[:, 0].numpy(), interleaved)
        return torch.from_numpy(turned)
    turning, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    pairs = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2), rest), dim=-1)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int = 0) -> torch.Tensor:
    """The last rows of one sequence: q [rows, H, d] over keys and values [K, tokens, d] -> [rows, H.d].

    The query heads of a group share their keys, so they are laid out as further rows of one head. With a window W a
    row sees its last W tokens; a single row is given no others.
    """
    if q.device.type == "cpu":
        return torch.from_numpy(layers.attention(q.numpy(), keys.numpy(), values.numpy(), window))
    rows, heads, d = q.shape
    kv_heads, tokens, _ = keys.shape
    grouped = q.transpose(0, 1).reshape(1, kv_heads, heads // kv_heads * rows, d)
    mask = None if rows == 1 else _mask(tokens, rows, window, q.device).repeat(heads // kv_heads, 1)
    out = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask)
    return out.reshape(heads, rows, d).transpose(0, 1).reshape(rows, heads * d)


def _mask(tokens: int, rows: int, window: int, device: torch.device) -> torch.Tensor:
    """bool[rows, tokens]: which tokens each of the last rows sees."""
    order = torch.arange(tokens, device=device)
    own = order[tokens - rows :, None]
    return (order <= own) & (order > own - window) if window else order <= own
