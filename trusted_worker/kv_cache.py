"""Caches that lie in the arena, page by page.

All pages are equally large, and lie in the slots of one pool: nothing is ever lost to gaps. A page is full and never
changes again, or it is the tail, which stays in the arena as long as its sequence lives. When the pool has no free
slot, full pages are sealed and parked outside (sealed_pages.py), each sealed at most once: of sequences that rest
first, then of the one that has most in the arena; of that, the first tokens first. Attention reads all pages in order
at every step, so what is gained by keeping some does not depend on which.

A sequence can go on as long as it has one slot for each layer. So many are promised to every open sequence, and none
is opened for which they are not left: no sequence ends because others need memory.
"""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, suppress
from functools import partial
from heapq import heappop, heappush
from itertools import repeat

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.kv_page import U8, PageLayout
from trusted_worker.opener import Opener, Ready
from trusted_worker.sealed_pages import PageStore, SealedPages
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.errors import ContextError, ExhaustedError
from wire.kv_pages import PAGE_TOKENS, KvType, block_spans
from wire.model_config import ModelConfig

KV = 1  # the kind of these pages
_PARKED = -1  # in the place of a slot; also of pages that no token sees any more
_PIECE = 16  # tokens converted at once: what bounds their temporaries
_WORTHWHILE = 1 << 20  # rows that attend, times bytes of a page: below, a second thread costs more than it saves


class PagePool:
    """`slots` pages in the arena, and the sequences that share them. Used from the compute thread only."""

    def __init__(
        self, memory: SecureMemory, config: ModelConfig, kind: KvType, slots: int, store: PageStore, opener: Opener
    ) -> None:
        """Raises BudgetExceeded."""
        self.config, self.layout, self.opener = config, PageLayout(config, kind), opener
        self.slots, self.layers, self._store = slots, config.layers, store
        self.pages: U8 = memory.allocate("kv", (slots, self.layout.size), np.uint8).array
        self.pages[...] = 0
        self._free = list(range(slots))  # a heap
        self._open: list[KVCache] = []
        self.counts: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """Slots that hold a page."""
        return self.slots - len(self._free)

    @property
    def spilled(self) -> int:
        """Bytes parked outside the budget."""
        return sum(cache.spilled for cache in list(self._open))

    def open(self, tokens: int) -> "KVCache":
        """A sequence of at most `tokens` tokens. Between steps. Raises ExhaustedError when its share is not left."""
        most = self.slots // self.layers
        for cache in self._open:  # what one woke for and did not use is nobody's
            cache.trim()
        if len(self._open) >= most:
            raise ExhaustedError(f"the memory budget holds {most} sessions of this model; try again later")
        self._open.append(KVCache(self, tokens, self._store.sequence()))
        return self._open[-1]

    def close(self, cache: "KVCache") -> None:
        """The sequence is gone, and what was promised to it is left again."""
        self._open.remove(cache)

    def allows(self, asker: "KVCache") -> bool:
        """Whether another page for each layer leaves everybody else what was promised. The first one always does."""
        promised = sum(max(one.pinned, 1) for one in self._open if one is not asker)
        return not asker.pinned or promised + asker.pinned < self.slots // self.layers

    def take(self, asker: "KVCache") -> list[int]:
        """An empty slot for each layer. Raises ExhaustedError when the folder takes no page; nobody loses any then."""
        while len(self._free) < self.layers:
            for victim in self._victims(asker):  # a full folder takes no page, but what lies there already may leave
                with suppress(ExhaustedError):
                    victim.park()
                    break
            else:
                raise ExhaustedError("the folder for parked pages is full or cannot be written")
        return [heappop(self._free) for _ in range(self.layers)]

    def spare(self, asker: "KVCache") -> int | None:
        """A slot for a page that came in: a free one, or of a sequence that rests or has clearly more than `asker`."""
        if not self._free:
            victim = next(iter(self._victims(asker)), asker)
            if victim is not asker and (victim.resting or victim.resident > asker.resident + self.layers):
                with suppress(ExhaustedError):
                    victim.park()
        return heappop(self._free) if self._free else None

    def give(self, slot: int) -> None:
        """Wipe a slot; it is free."""
        if slot != _PARKED:
            self.pages[slot] = 0
            heappush(self._free, slot)

    def _victims(self, asker: "KVCache") -> list["KVCache"]:
        """Who can give a page, who has to first. There is one, as long as `asker` takes no more than `allows` says."""
        able = (one for one in self._open if one.full)
        return sorted(able, key=lambda one: (one.resting, one.resident, one is asker), reverse=True)


class KVCache:
    """A sequence's pages, of which the pool gives and takes slots. `length` tokens are committed, for every layer."""

    def __init__(self, pool: PagePool, tokens: int, pages: SealedPages) -> None:
        self._pool, self._pages = pool, pages
        self.config = pool.config
        self.capacity, self.length = tokens, 0
        self.resting = False
        self.failed = False  # an error of `append` or `blocks` was about this sequence, not about others in its batch
        self.full: list[tuple[int, int]] = []  # (page, layer) of full pages that are in the arena: a heap
        self._slots: list[list[int]] = [[] for _ in range(pool.layers)]

    @property
    def pinned(self) -> int:
        """Pages of each layer that cannot be parked: those with room, or with tokens that are not committed."""
        return len(self._slots[0]) - self.length // PAGE_TOKENS

    @property
    def resident(self) -> int:
        """Slots that the sequence holds."""
        return len(self.full) + self.pinned * self._pool.layers

    @property
    def spilled(self) -> int:
        """Bytes parked outside the budget."""
        return self._pages.size

    def wake(self, tokens: int) -> int:
        """See Cache. Raises ContextError when the context is full, ExhaustedError when the folder takes no page."""
        self.resting = False
        tokens = min(tokens, self.capacity - self.length)
        if not tokens:
            raise ContextError(f"the context of {self.capacity} tokens is full")
        while self._room < tokens and self._pool.allows(self):
            try:
                taken = self._pool.take(self)
            except ExhaustedError:
                if not self._room:
                    raise
                break
            for slots, slot in zip(self._slots, taken, strict=True):
                slots.append(slot)
        return min(tokens, self._room)

    def append(self, layer: int, k: F32, v: F32) -> None:
        """Put float32[m, kv_heads, head_dim] behind the committed tokens, for which the sequence has woken.

        Raises InvalidArgumentError for what the element type does not hold.
        """
        if len(k) > min(self._room, self.capacity - self.length):
            raise ValueError(f"the sequence has not woken for {len(k)} tokens")
        done, self.failed = 0, True
        while done < len(k):
            page, first = divmod(self.length + done, PAGE_TOKENS)
            end = min(done + _PIECE, done + PAGE_TOKENS - first, len(k))
            slot = self._slots[layer][page]
            self._pool.layout.write(self._pool.pages[slot : slot + 1], first, k[done:end], v[done:end])
            done = end
        self.failed = False

    def blocks(
        self, layer: int, first: int, end: int, rows: int, scratch: Scratch
    ) -> Generator[tuple[int, F32], None, None]:
        """Tokens `first` to `end`, whole pages at a time: where the pages begin, and the pages,
        float32[n, 2, kv_heads, PAGE_TOKENS, head_dim], keys before values, until the next is asked for.

        While one block is used, parked pages of the next are opened, if `rows` make it last. Behind the last token
        there are finite numbers. Use it inside `contextlib.closing`, in a frame. Raises ParkedError for a changed page.
        """
        spans = block_spans(self.config, first, end)
        layout, most = self._pool.layout, max(map(len, spans))
        raw: U8 = scratch.empty((2, most, layout.size), np.uint8)
        floats: F32 = scratch.empty((0 if layout.kind is KvType.FLOAT32 else most, *layout.shape), np.float32)
        ahead = rows * layout.size >= _WORTHWHILE
        jobs = (self._opening(layer, span, raw[turn % 2], ahead) for turn, span in enumerate(spans))
        parked = _PARKED in self._slots[layer][spans[0].start : spans[-1].stop]
        with closing(self._pool.opener.ahead(jobs)) if parked else nullcontext(repeat(None)) as opened:
            for turn, span in enumerate(spans):
                self.failed = True
                next(opened)
                self.failed = False
                pages = self._in_place(layer, span)
                if pages is None:
                    pages = raw[turn % 2, : len(span)]
                    self._gather(layer, span, pages)
                yield span.start * PAGE_TOKENS, layout.read(pages, floats)

    def commit(self, tokens: int) -> None:
        """The step is through: its tokens are part of the sequence now."""
        before, self.length = self.length // PAGE_TOKENS, self.length + tokens
        for page in range(before, self.length // PAGE_TOKENS):
            for layer in range(self._pool.layers):
                heappush(self.full, (page, layer))
        self.trim()
        window = self.config.window
        seen = max(0, self.length + 1 - window) // PAGE_TOKENS if window else 0
        while self.full and self.full[0][0] < seen:
            self._leave()

    def rest(self) -> None:
        """Its full pages are parked before those of others, until it wakes."""
        self.resting = True
        self.trim()

    def trim(self) -> None:
        """Give pages back that hold no committed token."""
        kept = -(-self.length // PAGE_TOKENS)
        for slots in self._slots:
            while len(slots) > kept:
                self._pool.give(slots.pop())

    def park(self) -> None:
        """Park the first full page that is in the arena. Raises ExhaustedError; the page stays where it is then."""
        page, layer = self.full[0]
        if not self._pages.holds(KV, layer, page):
            self._pages.seal(KV, layer, page, self._pool.pages[self._slots[layer][page]])
            self._pool.counts["pages_sealed"] += 1
        self._leave()

    def free(self) -> None:
        """Wipe, give the slots back, forget what was parked. A second call does nothing."""
        if self._slots:
            for slot in (slot for slots in self._slots for slot in slots):
                self._pool.give(slot)
            self._slots, self.full = [], []
            self._pages.free()
            self._pool.close(self)

    @property
    def _room(self) -> int:
        return len(self._slots[0]) * PAGE_TOKENS - self.length

    def _leave(self) -> None:
        """The first full page leaves the arena."""
        page, layer = heappop(self.full)
        self._pool.give(self._slots[layer][page])
        self._slots[layer][page] = _PARKED

    def _opening(self, layer: int, span: range, raw: U8, ahead: bool) -> Callable[[], None] | Ready[None]:
        """What the opener has to do for a block; what is not worth its while is done here."""
        parked = [page for page in span if self._slots[layer][page] == _PARKED]
        bring = partial(self._bring, layer, span.start, parked, raw)
        return bring if ahead and parked else Ready(bring())

    def _bring(self, layer: int, first: int, parked: list[int], raw: U8) -> None:
        for page in parked:
            self._pages.open(KV, layer, page, raw[page - first])

    def _in_place(self, layer: int, span: range) -> U8 | None:
        """A block whose pages lie in the arena at even distances, which is usual, without a copy."""
        slots = self._slots[layer][span.start : span.stop]
        step = slots[1] - slots[0] if len(slots) > 1 else 1
        even = step > 0 and slots == list(range(slots[0], slots[-1] + 1, step))
        return self._pool.pages[slots[0] : slots[-1] + 1 : step] if even and slots[0] != _PARKED else None

    def _gather(self, layer: int, span: range, raw: U8) -> None:
        """Copy what is in the arena to what was opened, and keep of that what finds a slot."""
        pool, slots = self._pool, self._slots[layer]
        for page, target in zip(span, raw, strict=True):
            if slots[page] != _PARKED:
                target[...] = pool.pages[slots[page]]
                continue
            pool.counts["pages_restored"] += 1
            slot = pool.spare(self)
            if slot is not None:
                pool.pages[slot] = target
                slots[page] = slot
                heappush(self.full, (page, layer))
