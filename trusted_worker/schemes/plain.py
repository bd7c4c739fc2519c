"""plain: the whole model on the GPU worker. The baseline of speed, and of what happens without protection.

What the GPU worker sees: the token ids, the KV cache, the logits: everything. It can change any result unnoticed.
"""

from itertools import count

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.model import Accept, Batch
from trusted_worker.remote_cache import RemoteCache, sequence_rows
from trusted_worker.schemes.base import Worker
from wire.kv_pages import KvType
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb


class Plain:
    """Forward the ids, receive the logits."""

    def __init__(self, config: ModelConfig, worker: Worker, kv_type: KvType = KvType.FLOAT32) -> None:
        self._config, self._worker, self._kv_type = config, worker, kv_type
        self._sequences = count(1)

    def open(self, tokens: int) -> RemoteCache:
        """A cache on the GPU worker."""
        return RemoteCache(self._worker, next(self._sequences), tokens, self._kv_type)

    def forward(self, batch: Batch, accept: Accept) -> None:
        """See base.Scheme. The logits lie in ordinary memory: the worker has them anyway."""
        rows = [int(row) for row in batch.logit_rows]
        forward = pb.Forward(sequences=sequence_rows(batch), logit_rows=rows)
        logits: F32 = np.empty((len(rows), self._config.vocabulary), np.float32)
        self._worker.call(pb.Operation(forward=forward), batch.ids, logits)
        for run in batch.runs:
            run.cache.commit(run.stop - run.start)
        for index, row in enumerate(logits):
            accept(index, row)

    def idle(self) -> bool:
        """Nothing to prepare."""
        return False

    def distrust(self) -> None:
        """There is no secret to renew."""

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return {}
