"""The decoder operations: a Llama-like model in torch, one method per step between two crossings.

forward = embed, then per layer project_qkv, rotate, attend, finish_block, then head. Activations are float32 in
both precisions; shapes: m rows, H query heads, K key heads, d per head. Rows of several sequences lie one behind
the other, `spans` says how many belong to which. Float32 results equal those of transformers to rounding.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from gpu_worker.cache import Sequence
from gpu_worker.weights import Weights
from wire.checkpoint import Checkpoint
from wire.linears import FINAL_NORM, Linear, norm_names, read_bias, spec
from wire.model_config import ModelConfig

Spans = list[tuple[Sequence, int]]
BIASED = (Linear.QKV, Linear.O, Linear.GATE_UP, Linear.DOWN)


class Decoder:
    """A loaded model. It keeps no state between calls: the sequences carry it."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[tuple[int, Linear], Weights], embedding: Weights, device: str
    ) -> None:
        self.config = config
        self.device = device
        self._weights = weights
        self._embedding = embedding
        self._norms: dict[str, torch.Tensor] = {}
        self._biases: dict[tuple[int, Linear], torch.Tensor] = {}
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        self._inverse_frequencies = (1.0 / config.rope_theta**steps).to(device)

    def read_small(self, checkpoint: Checkpoint) -> None:
        """Read norm gains and biases. Raises CheckpointError."""
        names = [name for layer in range(self.config.layers) for name in norm_names(layer)]
        for name in [*names, FINAL_NORM]:
            self._norms[name] = torch.from_numpy(checkpoint.read(name, (self.config.hidden,))).to(self.device)
        for layer in range(self.config.layers):
            for linear in BIASED:
                bias = read_bias(checkpoint, spec(self.config, layer, linear))
                if bias is not None:
                    self._biases[layer, linear] = torch.from_numpy(bias).to(self.device)

    def matmul(self, layer: int, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """x float32[m, k] -> x.W^T float32[m, n], without bias."""
        return self._weights[layer, linear].product(x)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64[m] -> residual stream float32[m, hidden]."""
        return self._embedding.rows(ids)

    def project_qkv(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Residual stream -> q [m, H, d], k and v [m, K, d], before RoPE."""
        c = self.config
        qkv = self._linear(layer, Linear.QKV, self._norm(norm_names(layer)[0], x))
        q, k, v = qkv.split((c.q_width, c.kv_width, c.kv_width), dim=1)
        return q.unflatten(1, (-1, c.head_dim)), k.unflatten(1, (-1, c.head_dim)), v.unflatten(1, (-1, c.head_dim))

    def rotations(self, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [m, 1, d] for the positions that come next in each sequence."""
        positions = torch.cat([torch.arange(s.length, s.length + rows, device=self.device) for s, rows in spans])
        angles = (positions[:, None].float() * self._inverse_frequencies).repeat(1, 2)[:, None]
        return angles.cos(), angles.sin()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Append rotated k and v to the caches; causal attention of rotated q over them -> [m, H.d]."""
        parts, start = [], 0
        for sequence, rows in spans:
            part = slice(start, start + rows)
            keys, values = sequence.append(layer, k[part], v[part])
            parts.append(attention(q[part], keys, values))
            start += rows
        return torch.cat(parts)

    def finish_block(self, layer: int, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Residual stream and attention [m, H.d] -> residual stream after the block."""
        x = x + self._linear(layer, Linear.O, a)
        gate, up = self._linear(layer, Linear.GATE_UP, self._norm(norm_names(layer)[1], x)).chunk(2, dim=1)
        return x + self._linear(layer, Linear.DOWN, silu(gate) * up)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream -> logits float32[m, vocabulary]."""
        return self.matmul(0, Linear.LM_HEAD, self._norm(FINAL_NORM, x))

    def forward(self, spans: Spans, ids: torch.Tensor, logit_rows: list[int]) -> torch.Tensor:
        """ids int64[m] -> logits of the rows asked for. Each sequence grows by its rows once all went well."""
        x = self.embed(ids)
        cos, sin = self.rotations(spans)
        for layer in range(self.config.layers):
            q, k, v = self.project_qkv(layer, x)
            x = self.finish_block(layer, x, self.attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v, spans))
        logits = self.head(x[logit_rows])
        for sequence, rows in spans:
            sequence.advance(rows)
        return logits

    def _linear(self, layer: int, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        y = self.matmul(layer, linear, x)
        bias = self._biases.get((layer, linear))
        return y if bias is None else y.add_(bias)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (self.config.hidden,), self._norms[name], self.config.norm_eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE as transformers does it: the two halves of each head [m, heads, d] are the coordinates."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The last rows of one sequence: q [rows, H, d] over keys and values [K, tokens, d] -> [rows, H.d].

    The query heads of a group share their keys, so they are laid out as further rows of one head.
    """
    rows, heads, d = q.shape
    kv_heads, tokens, _ = keys.shape
    grouped = q.transpose(0, 1).reshape(1, kv_heads, heads // kv_heads * rows, d)
    mask = None
    if rows > 1:
        order = torch.arange(tokens, device=q.device)
        mask = (order <= order[tokens - rows :, None]).repeat(heads // kv_heads, 1)
    out = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask)
    return out.reshape(heads, rows, d).transpose(0, 1).reshape(rows, heads * d)
