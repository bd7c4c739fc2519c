"""kv-shield: the GPU worker runs the model over a KV cache whose head dims are secretly permuted.

Paper: KV-Shield (arXiv 2409.04040), with one permutation per layer and KV head instead of its single-head formulas,
biases included, and corrected for RoPE: a permutation does not commute with a rotation, so on RoPE models q and k
cross to be rotated here and go back under a permutation of their own for each session.

What the GPU worker sees: everything but the order of the dims inside the heads of q, k and v: token ids, residual
stream, attention vectors after their restoration, logits. What it learns: the conversation. From the crossing it also
learns the permutation in a few tokens (it sees q and k before and after their rotation), and against public weights
the permuted rows of W give it away at once. Results are not verified.
In the first layer of a RoPE model V depends on the token alone, so equal tokens have equal rows in the cache.
What it protects: a KV cache that somebody reads who does not know the model and saw nothing else. `--seal-idle` is the
one option that protects more: what is parked was sealed here. `--rotate-every` separates two snapshots of the cache
for a reader who saw neither the composition nor the worker.
What breaks it: public weights, one known prompt, the worker itself (docs/threat-model.md).

Initialisation: 1. draw a permutation pi for each layer and KV head; 2. read the rows and biases of W_q, W_k, W_v of one
head at a time into the arena, in the order pi, and provision them by value.
Steps of one layer, by the numbers beside the code:
 1. Worker: project q, k, v with permuted rows; v goes into the cache of its sequence as it is.
 2. RoPE models: q and k cross. Un-permute by pi, norm and rotate, permute by the sequence's own sigma, send back.
 3. Worker: attention over the permuted cache.
 4. The attention vector crosses. Un-permute by the sequence's nu (pi, and every renewal since), send back.
 5. Worker: output projection, feed-forward part, next layer.
Models without RoPE, and the V-only form (`--rope worker`: q and k unpermuted), have no step 2: one crossing per layer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.model import Accept, Batch, HeadTransform, Run
from trusted_worker.permutation import Indices, Table, columns, draw, gather, scatter
from trusted_worker.remote_cache import sequence_rows
from trusted_worker.schemes.base import Worker
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.shielded_cache import ShieldedCache
from wire import codec
from wire.checkpoint import Checkpoint
from wire.kv_pages import KvType, page_words
from wire.linears import Linear
from wire.model_config import ModelConfig
from wire.parameters import Kind, Parameter, parameters, read, tiles
from wire.v1 import gpu_worker_pb2 as pb

TILE_ELEMENTS = 1 << 18  # of a parameter that is provisioned as it is


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    rope_on_worker: bool = False
    kv_type: KvType = KvType.FLOAT32
    rotate_every: int = 0  # tokens of a sequence; 0: never
    seal_idle: bool = False
    provision_all: bool = False  # the checkpoint is sealed: the worker cannot read it


class KvShield:
    """The scheme. `provision` must run on every new stream, before a sequence is opened on it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        memory: SecureMemory,
        scratch: Scratch,
        worker: Worker,
        pages: PageStore,
        options: Options,
    ) -> None:
        self._checkpoint, self._config, self._memory, self._scratch = checkpoint, config, memory, scratch
        self._worker, self._pages, self._options = worker, pages, options
        self._v_only = config.rope is not None and options.rope_on_worker
        self._crosses = config.rope is not None and not self._v_only
        norms = [one for one in parameters(config).values() if one.name.kind in (Kind.Q_NORM, Kind.K_NORM)]
        self._transform = HeadTransform(config, {one.name: self._keep(one) for one in norms if self._crosses})
        self._pi: Table = memory.allocate("permutations", self._shape(2), np.uint16).array
        draw(self._pi)
        self._pi[:, 0] = np.arange(config.head_dim) if self._v_only else self._pi[:, 1]
        self._sequences = count(1)
        self._caches: list[ShieldedCache] = []
        self._parking: Iterator[None] = iter(())
        self._counts: Counter[str] = Counter()

    def provision(self) -> None:
        """Initialisation, step 2. Raises CheckpointError, UnavailableError."""
        for parameter in parameters(self._config).values():
            if parameter.name.linear is Linear.QKV:
                self._provision_heads(parameter)
            elif self._options.provision_all:
                for first, tile in tiles(self._checkpoint, parameter, max(1, TILE_ELEMENTS // parameter.width)):
                    self._send(parameter, first, tile)

    def open(self, tokens: int) -> ShieldedCache:
        """A cache on the GPU worker, and the sequence's permutations here. Raises BudgetExceeded, UnavailableError."""
        own = self._memory.allocate("permutations", self._shape(2), np.uint16)
        own.array[...] = self._pi
        if self._crosses:
            draw(own.array[:, 0])
        kind, words = self._options.kv_type, page_words(self._config, self._options.kv_type)
        pages = self._pages.sequence()
        try:
            cache = ShieldedCache(
                self._worker, next(self._sequences), tokens, kind, own, pages, self._scratch, words, self._counts
            )
        except BaseException:
            pages.free()
            own.free()
            raise
        self._caches = [one for one in self._caches if not one.freed] + [cache]
        return cache

    def forward(self, batch: Batch, accept: Accept) -> None:
        """See base.Scheme. The logits lie in ordinary memory: the worker has them anyway."""
        config, scratch = self._config, self._scratch
        runs = [(run, _shielded(run)) for run in batch.runs]
        for _, cache in runs:
            if self._options.rotate_every and cache.since >= self._options.rotate_every:
                cache.renew(keep_keys=self._v_only)
        logits: F32 = np.empty((len(batch.logit_rows), config.vocabulary), np.float32)
        with scratch.frame():
            mixed: F32 = scratch.empty((len(batch.ids), config.q_width), np.float32)
            heads: F32 = scratch.empty((2, len(batch.ids), config.q_width + config.kv_width), np.float32)
            attention: F32 = heads.reshape(-1)[: mixed.size].reshape(mixed.shape)  # heads[0] is free by then
            tensor: codec.Array = batch.ids
            steps = [pb.Step(embed=pb.Embed(sequences=sequence_rows(batch)))]
            for layer in range(config.layers):
                steps.append(pb.Step(project_qkv=pb.ProjectQkv(layer=layer)))
                if self._crosses:
                    self._chain(steps, tensor, heads[1])  # (1)
                    self._turn(layer, heads, batch, runs)  # (2)
                    steps, tensor = [], heads[1]
                steps.append(pb.Step(attend=pb.Attend(layer=layer)))
                self._chain(steps, tensor, attention)  # (3), and (1) without a crossing
                for run, cache in runs:  # (4)
                    nu = columns(cache.tables[layer, 1], config.heads)
                    scatter(attention[run.start : run.stop], nu, mixed[run.start : run.stop])
                steps, tensor = [pb.Step(finish_block=pb.FinishBlock(layer=layer))], mixed  # (5)
            steps.append(pb.Step(head=pb.Head(logit_rows=[int(row) for row in batch.logit_rows])))
            self._chain(steps, tensor, logits)
        for run in batch.runs:
            run.cache.commit(run.stop - run.start)
        for index, row in enumerate(logits):
            accept(index, row)

    def idle(self) -> bool:
        """With --seal-idle: park one page of a sequence that rests."""
        for _ in self._parking:
            return True
        resting = (one for one in self._caches if one.resting and not one.lost) if self._options.seal_idle else iter(())
        cache = next(resting, None)
        if cache is None:
            return False
        self._parking = cache.park()
        return True

    def distrust(self) -> None:
        """A sealed page failed its check; the worker has learnt nothing from it."""

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return dict(self._counts)

    def _turn(self, layer: int, heads: F32, batch: Batch, runs: list[tuple[Run, ShieldedCache]]) -> None:
        """Step 2, in heads[1]: q beside k under pi in, normed and rotated under each sequence's sigma out."""
        plain, turned = heads
        scatter(turned, self._q_beside_k(self._pi[layer, 0]), plain)
        self._transform.apply(layer, plain.reshape(len(plain), -1, self._config.head_dim), batch.positions)
        for run, cache in runs:
            rows = slice(run.start, run.stop)
            gather(plain[rows], self._q_beside_k(cache.tables[layer, 0]), turned[rows])

    def _q_beside_k(self, table: Table) -> Indices:
        config = self._config
        return np.concatenate([columns(table, config.heads), config.q_width + columns(table, config.kv_heads)])

    def _chain(self, steps: list[pb.Step], tensor: codec.Array, into: F32) -> None:
        self._worker.call(pb.Operation(chain=pb.Chain(steps=steps)), tensor, into)

    def _provision_heads(self, parameter: Parameter) -> None:
        """The rows of each head in the order of its permutation; a tile is one head."""
        dim = self._config.head_dim
        for first, tile in tiles(self._checkpoint, parameter, dim):
            with self._scratch.frame():
                block: F32 = self._scratch.empty(tile.shape, np.float32)
                np.take(tile, self._order(parameter.name.layer, first // dim), axis=0, out=block, mode="clip")
                self._send(parameter, first, block)

    def _order(self, layer: int, head: int) -> Table:
        """pi of a head among q, k and v, counted through."""
        config = self._config
        which, group = divmod(head - config.heads, config.kv_heads)
        if head < config.heads:
            which, group = 0, head * config.kv_heads // config.heads
        order: Table = self._pi[layer, which, group]
        return order

    def _send(self, parameter: Parameter, first: int, rows: F32) -> None:
        name = parameter.name
        provision = pb.Provision(
            kind=name.kind.number,
            layer=name.layer,
            linear=name.linear.number if name.linear else pb.LINEAR_UNSPECIFIED,
            bias=name.bias,
            first_row=first,
        )
        self._worker.call(pb.Operation(provision=provision), rows, None)

    def _keep(self, parameter: Parameter) -> F32:
        kept: F32 = self._memory.allocate("norms", (parameter.rows,), np.float32).array
        kept[...] = read(self._checkpoint, parameter)[:, 0]
        return kept

    def _shape(self, tables: int) -> tuple[int, int, int, int]:
        return (self._config.layers, tables, self._config.kv_heads, self._config.head_dim)


def scratch_bytes(config: ModelConfig, kv_type: KvType, rows: int) -> int:
    """What a step over `rows` rows asks of its scratch, one head at the start, a page that comes back, or a sampler."""
    step = rows * 4 * (3 * config.q_width + 2 * config.kv_width)
    others = 4 * config.head_dim * config.hidden, 4 * page_words(config, kv_type), 8 * config.vocabulary
    return max(step, *others) + (1 << 12)


def _shielded(run: Run) -> ShieldedCache:
    if not isinstance(run.cache, ShieldedCache):
        raise TypeError("kv-shield runs over caches of its own")
    return run.cache
