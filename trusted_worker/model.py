"""The decoder, top to bottom, with a hole where each linear goes: the scheme fills the holes.

Everything here is in the clear and inside the arena: embedding, norms, RoPE, QK^T, softmax, AV, KV cache, activation
functions, residuals. `Product` is one linear for some rows of the batch; a scheme decides where and how it is computed.
Logits are handed out row by row and never leave the arena: for a large vocabulary they are larger than a step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trusted_worker import arithmetic
from trusted_worker.adapters import Adapter
from trusted_worker.arithmetic import F32, I32
from trusted_worker.attention import attend
from trusted_worker.cache import Cache
from trusted_worker.kv_cache import KVCache
from trusted_worker.secure_memory import Scratch
from trusted_worker.weights import Weights
from wire.linears import Linear, LinearSpec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name

# (linear, x float32[len(rows), k], which rows of the batch these are) -> float32[len(rows), n], bias included
Product = Callable[[LinearSpec, F32, I32], F32]
Embed = Callable[["Batch", F32], None]  # rows of the embedding table into float32[rows, hidden]
Accept = Callable[[int, F32], None]  # (which of the logit rows, its float32[vocabulary]: gone after the call)


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one sequence: batch rows start to stop, whose first token has this position."""

    cache: Cache
    start: int
    stop: int
    position: int
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of several sequences in one forward pass. `logit_rows` are ascending."""

    ids: I32
    runs: tuple[Run, ...]
    logit_rows: I32
    embeddings: tuple[bytes, ...] = ()  # where the client embeds: little-endian float32[hidden] for each row

    @cached_property
    def positions(self) -> I32:
        """The position of every row."""
        return np.concatenate([run.position + np.arange(run.stop - run.start, dtype=np.int32) for run in self.runs])


class HeadTransform:
    """What becomes of q and k between projection and attention: QK norm and RoPE, as the model asks."""

    def __init__(self, config: ModelConfig, vectors: Mapping[Name, F32]) -> None:
        self._config, self._vectors = config, vectors
        self._frequencies = config.inverse_frequencies()
        self._positions: I32 = np.empty(0, np.int32)
        self._angles = arithmetic.angles(self._positions, self._frequencies)

    def apply(self, layer: int, heads: F32, positions: I32) -> None:
        """In place on q beside k, float32[m, query heads + key heads, d]."""
        config = self._config
        if config.qk_norm:
            q, k = heads[:, : config.heads], heads[:, config.heads :]
            arithmetic.normalise_heads(q, self._vectors[Name(Kind.Q_NORM, layer)], config.norm_eps)
            arithmetic.normalise_heads(k, self._vectors[Name(Kind.K_NORM, layer)], config.norm_eps)
        if config.rope is not None:
            if positions is not self._positions:  # a batch's positions are the same in every layer
                self._positions, self._angles = positions, arithmetic.angles(positions, self._frequencies)
            arithmetic.rotate(heads, *self._angles, config.rope.interleaved)


class Decoder:
    """A decoder over `weights`, for as many rows as `scratch` holds, `head_rows` of them with logits at once."""

    def __init__(self, weights: Weights, scratch: Scratch, head_rows: int) -> None:
        self._weights, self._scratch, self._head_rows = weights, scratch, head_rows
        self._config = weights.config
        self._heads = HeadTransform(self._config, weights.vectors)
        self._linears = {(spec.layer, spec.linear): spec for spec in weights.specs}

    def forward(self, batch: Batch, embed: Embed, product: Product, accept: Accept) -> None:
        """One pass. Caches grow by the batch's rows only if all layers went well; then `accept` gets each logit row."""
        scratch, config = self._scratch, self._config
        rows = np.arange(len(batch.ids), dtype=np.int32)
        with scratch.frame():
            hidden: F32 = scratch.empty((len(rows), config.hidden), np.float32)
            with scratch.frame():
                embed(batch, hidden)
            if self._weights.positions is not None:
                hidden += self._weights.positions[batch.positions]
            for layer in range(config.layers):
                self._attention(layer, hidden, batch, rows, product)
                self._feed_forward(layer, hidden, rows, product)
            for run in batch.runs:
                run.cache.commit(run.stop - run.start)
            for first in range(0, len(batch.logit_rows), self._head_rows):
                self._head(hidden, batch.logit_rows[first : first + self._head_rows], first, product, accept)

    def _head(self, hidden: F32, rows: I32, first: int, product: Product, accept: Accept) -> None:
        scratch = self._scratch
        with scratch.frame():
            last: F32 = scratch.empty((len(rows), hidden.shape[1]), np.float32)
            np.take(hidden, rows, axis=0, out=last, mode="clip")
            logits = product(self._linears[0, Linear.LM_HEAD], self._norm(Kind.FINAL_NORM, 0, last), rows)
            for row in range(len(rows)):
                accept(first + row, logits[row])

    def _attention(self, layer: int, hidden: F32, batch: Batch, rows: I32, product: Product) -> None:
        scratch, config = self._scratch, self._config
        with scratch.frame():
            mixed: F32 = scratch.empty((len(rows), config.heads, config.head_dim), np.float32)
            with scratch.frame():
                qkv = product(self._linears[layer, Linear.QKV], self._norm(Kind.ATTENTION_NORM, layer, hidden), rows)
                heads = qkv.reshape(len(rows), -1, config.head_dim)
                self._heads.apply(layer, heads[:, : config.heads + config.kv_heads], batch.positions)
                for run in batch.runs:
                    self._attend(layer, run, heads[run.start : run.stop], mixed[run.start : run.stop])
            hidden += product(self._linears[layer, Linear.O], mixed.reshape(len(rows), -1), rows)

    def _attend(self, layer: int, run: Run, heads: F32, out: F32) -> None:
        config, cache = self._config, run.cache
        if not isinstance(cache, KVCache):
            raise TypeError("the decoder runs over caches in the arena")
        first_k, first_v = config.heads, config.heads + config.kv_heads
        q, k, v = heads[:, :first_k], heads[:, first_k:first_v], heads[:, first_v:]
        cache.append(layer, k, v)
        attend(q, cache, layer, run.position, config.window, out, self._scratch)

    def _feed_forward(self, layer: int, hidden: F32, rows: I32, product: Product) -> None:
        scratch = self._scratch
        with scratch.frame():
            up = product(self._linears[layer, Linear.GATE_UP], self._norm(Kind.FFN_NORM, layer, hidden), rows)
            inner = arithmetic.silu_times(up, scratch) if self._config.gated else arithmetic.gelu(up, scratch)
            hidden += product(self._linears[layer, Linear.DOWN], inner, rows)

    def _norm(self, kind: Kind, layer: int, x: F32) -> F32:
        vectors, eps = self._weights.vectors, self._config.norm_eps
        gain = vectors[Name(kind, layer)]
        if self._config.layer_norm:
            return arithmetic.layer_norm(x, gain, vectors[Name(kind, layer, bias=True)], eps, self._scratch)
        return arithmetic.rms_norm(x, gain, eps, self._scratch)
