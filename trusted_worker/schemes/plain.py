"""plain: the whole model on the GPU worker. The baseline of speed, and of what happens without protection.

What the GPU worker sees: the token ids, the KV cache, the logits: everything. It can change any result unnoticed.
"""

from contextlib import suppress
from itertools import count

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.model import Batch
from trusted_worker.schemes.base import Worker
from wire.errors import CleaveError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb


class RemoteCache:
    """A sequence whose cache the GPU worker holds."""

    def __init__(self, worker: Worker, sequence: int, tokens: int) -> None:
        self._worker, self.sequence = worker, sequence
        self.capacity, self.length = tokens, 0
        self._cache(tokens)

    def commit(self, tokens: int) -> None:
        """The worker has appended them."""
        self.length += tokens

    def free(self) -> None:
        """Have the worker drop it; one that is gone has dropped it already."""
        with suppress(CleaveError):
            self._cache(0)

    def _cache(self, tokens: int) -> None:
        self._worker.call(pb.Operation(cache=pb.Cache(sequence=self.sequence, reserve_tokens=tokens)), None, None)


class Plain:
    """Forward the ids, receive the logits."""

    def __init__(self, config: ModelConfig, worker: Worker) -> None:
        self._config, self._worker = config, worker
        self._sequences = count(1)

    def open(self, tokens: int) -> RemoteCache:
        """A cache on the GPU worker."""
        return RemoteCache(self._worker, next(self._sequences), tokens)

    def forward(self, batch: Batch) -> F32:
        """See base.Scheme."""
        forward = pb.Forward(logit_rows=[int(row) for row in batch.logit_rows])
        for run in batch.runs:
            if not isinstance(run.cache, RemoteCache):
                raise TypeError("plain runs over remote caches")
            forward.sequences.add(sequence=run.cache.sequence, rows=run.stop - run.start)
        shape = (len(batch.logit_rows), self._config.vocabulary)
        logits = self._worker.call(pb.Operation(forward=forward), batch.ids, shape)
        for run in batch.runs:
            run.cache.commit(run.stop - run.start)
        return logits.astype(np.float32, copy=False)

    def idle(self) -> bool:
        """Nothing to prepare."""
        return False

    def distrust(self) -> None:
        """There is no secret to renew."""

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return {}
