"""kv-shield's side of one sequence: its permutations, their renewal, and its pages when they are parked, sealed.

The GPU worker holds K under sigma and V under nu, for each layer and KV head. `renew` sends the composition new after
inverse old, which the worker applies to what it has. `park` reads the cache back page by page, seals each page
(sealed_pages.py) and has the worker wipe it; `wake` opens and writes them back before the next step.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from trusted_worker.permutation import Table, compose, draw
from trusted_worker.remote_cache import RemoteCache
from trusted_worker.schemes.base import Worker
from trusted_worker.sealed_pages import SealedPages
from trusted_worker.secure_memory import Block, Scratch
from wire.kv_pages import PAGE_TOKENS, KvType
from wire.v1 import gpu_worker_pb2 as pb

KV = 1  # the kind of these pages


class ShieldedCache(RemoteCache):
    """`own` holds uint16[layers, 2, kv_heads, head_dim]: sigma and nu of every layer. Freed with the sequence."""

    def __init__(
        self,
        worker: Worker,
        sequence: int,
        tokens: int,
        kind: KvType,
        own: Block,
        pages: SealedPages,
        scratch: Scratch,
        words: int,
        counts: Counter[str],
    ) -> None:
        self._own, self._pages, self._scratch, self._words, self._counts = own, pages, scratch, words, counts
        self.tables: Table = own.array
        self.resting = self.parked = self.freed = False
        self.since = 0  # tokens since sigma and nu were drawn
        self._wakes = 0
        super().__init__(worker, sequence, tokens, kind)

    def commit(self, tokens: int) -> None:
        """See cache.Cache."""
        super().commit(tokens)
        self.since += tokens

    def renew(self, keep_keys: bool) -> None:
        """Draw sigma and nu again and have the worker follow. `keep_keys`: sigma is the identity and stays."""
        fresh = np.empty_like(self.tables)
        draw(fresh)
        if keep_keys:
            fresh[:, 0] = self.tables[:, 0]
        self.act(pb.Cache(permute=pb.Permute()), compose(self.tables, fresh))
        self.tables[...] = fresh
        self.since = 0
        self._counts["permutations_renewed"] += 1

    def rest(self) -> None:
        """It may be parked from now on, until it wakes."""
        self.resting = self.length > 0 and not self.parked

    def wake(self, tokens: int) -> int:
        """Bring parked pages back. Raises VerificationError for a page that was changed, UnavailableError."""
        self._wakes += 1
        self.resting = False
        super().wake(tokens)
        for layer, page in self._all_pages() if self.parked else ():
            with self._scratch.frame():
                words = self._scratch.empty((self._words,), np.int32)
                self._pages.open(KV, layer, page, words)
                self.act(pb.Cache(write=pb.WritePage(layer=layer, page=page)), words)
            self._counts["pages_restored"] += 1
        self.parked = False
        return tokens

    def park(self) -> Iterator[None]:
        """Seal one page at a time, then have the worker wipe them all; given up when the sequence wakes meanwhile."""
        return self._park(self._wakes)

    def _park(self, begun: int) -> Iterator[None]:
        for layer, page in self._all_pages():
            if self._wakes != begun:
                return
            with self._scratch.frame():
                words = self._scratch.empty((self._words,), np.int32)
                self.act(pb.Cache(read=pb.ReadPage(layer=layer, page=page)), None, words)
                self._pages.seal(KV, layer, page, words)
            self._counts["pages_sealed"] += 1
            yield
        if self._wakes == begun:
            self.act(pb.Cache(wipe=pb.Wipe()))
            self.resting, self.parked = False, True

    def free(self) -> None:
        """Wipe the permutations, forget the pages, have the worker drop the rest."""
        self._wakes += 1
        self.resting, self.freed = False, True
        super().free()
        self._pages.free()
        self._own.free()

    def _all_pages(self) -> list[tuple[int, int]]:
        pages = range(-(-self.length // PAGE_TOKENS))
        return [(layer, page) for layer in range(len(self.tables)) for page in pages]
