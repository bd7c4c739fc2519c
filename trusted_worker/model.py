"""The decoder, top to bottom, with a hole where each linear goes: the scheme fills the holes.

Everything here is in the clear and inside the arena: embedding, norms, RoPE, QK^T, softmax, AV, KV cache, activation
functions, residuals. `Product` is one linear for some rows of the batch; a scheme decides where and how it is computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.arithmetic import F32, I32
from trusted_worker.kv_cache import Cache, KVCache
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.linears import Linear, LinearSpec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name

# (linear, x float32[len(rows), k], which rows of the batch these are) -> float32[len(rows), n], bias included
Product = Callable[[LinearSpec, F32, I32], F32]


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one sequence: batch rows start to stop, whose first token has this position."""

    cache: Cache
    start: int
    stop: int
    position: int


@dataclass(frozen=True)
class Batch:
    """Rows of several sequences in one forward pass. `logit_rows` are ascending."""

    ids: I32
    runs: tuple[Run, ...]
    logit_rows: I32

    @property
    def positions(self) -> I32:
        """The position of every row."""
        return np.concatenate([run.position + np.arange(run.stop - run.start, dtype=np.int32) for run in self.runs])


class HeadTransform:
    """What becomes of q and k between projection and attention: QK norm and RoPE, as the model asks."""

    def __init__(self, config: ModelConfig, vectors: Mapping[Name, F32]) -> None:
        self._config, self._vectors = config, vectors
        self._frequencies = config.inverse_frequencies()

    def apply(self, layer: int, heads: F32, positions: I32) -> None:
        """In place on q beside k, float32[m, query heads + key heads, d]."""
        config = self._config
        if config.qk_norm:
            q, k = heads[:, : config.heads], heads[:, config.heads :]
            arithmetic.normalise_heads(q, self._vectors[Name(Kind.Q_NORM, layer)], config.norm_eps)
            arithmetic.normalise_heads(k, self._vectors[Name(Kind.K_NORM, layer)], config.norm_eps)
        if config.rope is not None:
            arithmetic.rotate(heads, positions, self._frequencies, config.rope.interleaved)


class Decoder:
    """A decoder over `weights`, for at most as many rows as `scratch` holds."""

    def __init__(self, weights: Weights, scratch: Scratch) -> None:
        self._weights, self._scratch = weights, scratch
        self._config = weights.config
        self._heads = HeadTransform(self._config, weights.vectors)
        self._linears = {(spec.layer, spec.linear): spec for spec in weights.specs}

    def forward(self, batch: Batch, product: Product) -> F32:
        """Logits float32[len(logit_rows), vocabulary]. Caches grow by the batch's rows only if all went well."""
        scratch, config = self._scratch, self._config
        rows = np.arange(len(batch.ids), dtype=np.int32)
        with scratch.frame():
            hidden: F32 = scratch.empty((len(rows), config.hidden), np.float32)
            self._weights.embed(batch.ids, hidden)
            if self._weights.positions is not None:
                hidden += self._weights.positions[batch.positions]
            for layer in range(config.layers):
                self._attention(layer, hidden, batch, rows, product)
                self._feed_forward(layer, hidden, rows, product)
            logits = self._head(hidden, batch.logit_rows, product)
        for run in batch.runs:
            run.cache.commit(run.stop - run.start)
        return logits

    def _head(self, hidden: F32, rows: I32, product: Product) -> F32:
        if not len(rows):  # a prefill chunk that is not the last one
            return np.empty((0, self._config.vocabulary), np.float32)
        last = np.ascontiguousarray(hidden[rows])
        normed = self._norm(Kind.FINAL_NORM, 0, last)
        return product(self._linears[0, Linear.LM_HEAD], normed, rows).copy()

    def _attention(self, layer: int, hidden: F32, batch: Batch, rows: I32, product: Product) -> None:
        scratch, config = self._scratch, self._config
        with scratch.frame():
            x = self._norm(Kind.ATTENTION_NORM, layer, hidden)
            qkv = product(self._linears[layer, Linear.QKV], x, rows)
            heads = qkv.reshape(len(rows), -1, config.head_dim)
            self._heads.apply(layer, heads[:, : config.heads + config.kv_heads], batch.positions)
            mixed: F32 = scratch.empty((len(rows), config.heads, config.head_dim), np.float32)
            for run in batch.runs:
                self._attend(layer, run, heads[run.start : run.stop], mixed[run.start : run.stop])
            hidden += product(self._linears[layer, Linear.O], mixed.reshape(len(rows), -1), rows)

    def _attend(self, layer: int, run: Run, heads: F32, out: F32) -> None:
        """Row by row, each over its own prefix: a row's bits do not depend on the chunk it came in."""
        q_heads, kv_heads = self._config.heads, self._config.kv_heads
        cache = run.cache
        if not isinstance(cache, KVCache):
            raise TypeError("the decoder runs over caches in the arena")
        cache.append(layer, heads[:, q_heads : q_heads + kv_heads], heads[:, q_heads + kv_heads :])
        for row in range(len(heads)):
            end = run.position + row + 1
            keys, values = cache.tokens(layer, max(0, end - self._config.window) if self._config.window else 0, end)
            arithmetic.attend(heads[row, :q_heads], keys, values, out[row])

    def _feed_forward(self, layer: int, hidden: F32, rows: I32, product: Product) -> None:
        scratch = self._scratch
        with scratch.frame():
            x = self._norm(Kind.FFN_NORM, layer, hidden)
            up = product(self._linears[layer, Linear.GATE_UP], x, rows)
            inner = arithmetic.silu_times(up, scratch) if self._config.gated else arithmetic.gelu(up, scratch)
            hidden += product(self._linears[layer, Linear.DOWN], inner, rows)

    def _norm(self, kind: Kind, layer: int, x: F32) -> F32:
        vectors, eps = self._weights.vectors, self._config.norm_eps
        gain = vectors[Name(kind, layer)]
        if self._config.layer_norm:
            return arithmetic.layer_norm(x, gain, vectors[Name(kind, layer, bias=True)], eps, self._scratch)
        return arithmetic.rms_norm(x, gain, eps, self._scratch)


def scratch_bytes(weights: Weights, rows: int) -> int:
    """An upper bound of what one forward pass over `rows` rows asks of its scratch."""
    config = weights.config
    widest = max(24 * spec.k + 20 * spec.n for spec in weights.specs[:-1])
    head = weights.specs[-1]
    kept = 4 * (4 * config.hidden + 3 * config.ffn + 3 * config.q_width + 2 * config.kv_width)
    return rows * (widest + kept) + head_rows(rows) * (24 * head.k + 20 * head.n) + (1 << 16)


def head_rows(rows: int) -> int:
    """How many rows of a batch may ask for logits: one for each sequence in it."""
    return min(rows, 16)
