"""A sequence whose KV cache the GPU worker holds. It lives as long as the stream that reserved it."""

from contextlib import suppress

from trusted_worker.model import Batch
from trusted_worker.schemes.base import Worker
from wire import codec
from wire.errors import CleaveError, UnavailableError
from wire.kv_pages import KvType
from wire.v1 import gpu_worker_pb2 as pb


class RemoteCache:
    """Reserved when it is made. Raises ExhaustedError when the GPU worker has no room, UnavailableError."""

    def __init__(self, worker: Worker, sequence: int, tokens: int, kind: KvType) -> None:
        self._worker, self.sequence, self._kind = worker, sequence, kind
        self.capacity, self.length, self.failed = tokens, 0, False
        self.reserve()

    def reserve(self) -> None:
        """Have the worker set the memory aside, on the stream that is open now."""
        self.act(pb.Cache(reserve=pb.Reserve(tokens=self.capacity, type=self._kind.number)))
        self._stream = self._worker.stream

    @property
    def lost(self) -> bool:
        """Whether the stream that held the cache has ended, and the cache with it."""
        return self._stream != self._worker.stream

    def commit(self, tokens: int) -> None:
        """The worker has appended them."""
        self.length += tokens

    def rest(self) -> None:
        """Nothing to do."""

    def wake(self, tokens: int) -> int:
        """All tokens have room since the cache was reserved. Raises UnavailableError when it is lost."""
        self._require()
        return tokens

    def free(self) -> None:
        """Have the worker drop it; one that is gone has dropped it already."""
        with suppress(CleaveError):
            self.act(pb.Cache(drop=pb.Drop()))

    def act(self, action: pb.Cache, array: codec.Array | None = None, into: codec.Array | None = None) -> None:
        """One thing about this sequence's cache. See schemes.base.Worker.call."""
        if not action.HasField("reserve"):
            self._require()
        action.sequence = self.sequence
        self._worker.call(pb.Operation(cache=action), array, into)

    def _require(self) -> None:
        """An operation that names a lost cache would end the new stream, for everybody."""
        if self.lost:
            raise UnavailableError("the GPU worker lost this conversation's cache: open a new session")


def sequence_rows(batch: Batch) -> list[pb.SequenceRows]:
    """The sequences of a batch whose caches the GPU worker holds."""
    found = []
    for run in batch.runs:
        if not isinstance(run.cache, RemoteCache):
            raise TypeError("this scheme runs over caches on the GPU worker")
        found.append(pb.SequenceRows(sequence=run.cache.sequence, rows=run.stop - run.start))
    return found
