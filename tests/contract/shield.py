"""kv-shield over the real GPU worker's operations, in this process: what its tests need."""

import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.rows import forward
from tests.simulators.in_process import InProcessWorker
from trusted_worker.arithmetic import F32
from trusted_worker.model import Batch, Run
from trusted_worker.schemes.kv_shield import KvShield, Options, scratch_bytes
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.shielded_cache import ShieldedCache
from wire.checkpoint import Checkpoint
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

ROWS = 64


@dataclass
class Shield:
    """A scheme and its worker, provisioned; what initialisation sent is not in `worker.seen`."""

    scheme: KvShield
    worker: InProcessWorker
    config: ModelConfig
    memory: SecureMemory
    scratch: Scratch

    def step(self, wanted: list[tuple[ShieldedCache, list[int]]]) -> list[F32]:
        """One forward pass over rows of several sequences: logits float32[rows, vocabulary] for each."""
        runs, ids = [], list[int]()
        for cache, more in wanted:
            assert cache.wake(len(more)) == len(more)
            runs.append(Run(cache, len(ids), len(ids) + len(more), cache.length))
            ids.extend(more)
        batch = Batch(np.array(ids, np.int32), tuple(runs), np.arange(len(ids), dtype=np.int32))
        logits = forward(self.scheme, batch)
        return [logits[run.start : run.stop] for run in runs]

    def logits(self, ids: list[int], chunks: list[int]) -> F32:
        """Logits of every position of one sequence."""
        cache, out, start = self.scheme.open(len(ids)), [], 0
        for size in chunks:
            out += self.step([(cache, ids[start : start + size])])
            start += size
        cache.free()
        return np.concatenate(out)

    def park(self, cache: ShieldedCache) -> None:
        """The turn is over, and there is time."""
        cache.rest()
        while self.scheme.idle():
            pass
        assert cache.parked


def build_shield(folder: Path, options: Options | None = None, budget: int = 1 << 20) -> Shield:
    """A provisioned rig."""
    options = options or Options()
    config, memory = ModelConfig.from_hf(folder), SecureMemory(budget)
    worker = InProcessWorker(folder, config, pb.PRECISION_FLOAT32)
    scratch = Scratch(memory, scratch_bytes(config, options.kv_type, ROWS))
    pages = PageStore(secrets.token_bytes(32), None)
    scheme = KvShield(Checkpoint(folder), config, memory, scratch, worker, pages, options)
    scheme.provision()
    worker.seen.clear()
    return Shield(scheme, worker, config, memory, scratch)
