"""The memory budget: one private anonymous mapping of exactly the budget.

It holds weights, KV pages, verification vectors, what makes pads, and the scratch of a step, logits included; how it is
divided is wire/plan.py's rule. Not inside: keys, token ids, embeddings that a client sent, and numpy's temporaries,
below 1 MiB.

`allocate` hands out blocks first-fit, tagged with their owner; `free` wipes a block before anyone can get it again.
`Scratch` is one such block, bump-allocated: what a step asks for is gone when its frame ends.

The mapping is MAP_PRIVATE | MAP_ANONYMOUS, wiped in a forked child (MADV_WIPEONFORK), left out of core dumps
(MADV_DONTDUMP) and locked as it is touched (mlock2) where the kernel allows; `protections` says which of these hold.
"""

import bisect
import ctypes
import math
import mmap
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.errors import ExhaustedError

ALIGNMENT = 64  # bytes; a cache line
_MADV = {"wiped on fork": 18, "not dumped": 16}
_MLOCK_ONFAULT = 1
_MOST_KNOWN = 1 << 10  # views of a scratch that are kept


class BudgetExceeded(ExhaustedError):  # noqa: N818  (the design's name)
    """The arena cannot give what was asked. `by_owner` is for the local log, never for a peer."""

    def __init__(self, asked: int, free: int, by_owner: dict[str, int]) -> None:
        super().__init__(f"the memory budget does not hold this: {asked} bytes asked, at most {free} would fit")
        self.asked, self.free, self.by_owner = asked, free, by_owner


class Block:
    """A live piece of the arena. `array` must not be used after `free`."""

    def __init__(self, memory: "SecureMemory", owner: str, offset: int, size: int, array: npt.NDArray[Any]) -> None:
        self._memory, self.owner, self.offset, self.size = memory, owner, offset, size
        self.array = array

    def free(self) -> None:
        """Wipe the bytes and give them back. A second call does nothing."""
        if self.size:
            self._memory._release(self)
            self.size = 0


class SecureMemory:
    """An arena of `budget` bytes. Used from the compute thread only; the counters may be read from anywhere."""

    def __init__(self, budget: int) -> None:
        if budget < mmap.PAGESIZE:
            raise ExhaustedError(f"a memory budget of {budget} bytes is less than one page")
        self.budget = budget
        self.used = 0
        self.peak = 0
        self._map = mmap.mmap(-1, budget, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._free = [(0, budget)]  # (offset, size), sorted, never adjacent
        self._owners: Counter[str] = Counter()
        self.protections = self._protect()

    def allocate(self, owner: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Block:
        """A block holding an uninitialised array. Raises BudgetExceeded when no gap is large enough."""
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        size = max(-(-wanted // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        for index, (offset, gap) in enumerate(self._free):
            if gap >= size:
                self._free[index : index + 1] = [(offset + size, gap - size)] if gap > size else []
                break
        else:
            raise BudgetExceeded(size, self.largest_free(), dict(self._owners))
        self.used += size
        self.peak = max(self.peak, self.used)
        self._owners[owner] += size
        array = self._bytes[offset : offset + wanted].view(dtype).reshape(shape)
        return Block(self, owner, offset, size, array)

    def largest_free(self) -> int:
        """Bytes of the largest gap: what one allocation could get."""
        return max((gap for _, gap in self._free), default=0)

    def by_owner(self) -> dict[str, int]:
        """Bytes in use by owner."""
        return {owner: size for owner, size in self._owners.items() if size}

    def _release(self, block: Block) -> None:
        self._bytes[block.offset : block.offset + block.size] = 0
        self.used -= block.size
        self._owners[block.owner] -= block.size
        start, end = block.offset, block.offset + block.size
        index = bisect.bisect(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            start = self._free.pop(index - 1)[0]
            index -= 1
        self._free.insert(index, (start, end - start))

    def _protect(self) -> dict[str, bool]:
        results = {}
        for name, advice in _MADV.items():
            try:
                self._map.madvise(advice)
                results[name] = True
            except (OSError, ValueError):
                results[name] = False
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self._bytes.ctypes.data)
        locked = hasattr(libc, "mlock2") and libc.mlock2(address, ctypes.c_size_t(self.budget), _MLOCK_ONFAULT) == 0
        return {**results, "locked": bool(locked)}


class Scratch:
    """One step's temporaries, bump-allocated inside nested frames; the last frame's end wipes what was used."""

    def __init__(self, memory: SecureMemory, size: int) -> None:
        self._block = memory.allocate("scratch", (-(-size // ALIGNMENT) * ALIGNMENT,), np.uint8)
        self._top = 0
        self._high = 0
        self._known: dict[tuple[Any, ...], npt.NDArray[Any]] = {}  # steps ask for the same again and again

    def free(self) -> None:
        """Wipe it and give it back."""
        self._block.free()

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An uninitialised array that lives until the enclosing frame ends. Raises BudgetExceeded."""
        array = self._known.get((self._top, shape, dtype))
        if array is None:
            array = self._view(shape, dtype)
        end = self._top + array.nbytes
        self._top = -(-end // ALIGNMENT) * ALIGNMENT
        self._high = max(self._high, end)
        return array

    def frame(self) -> "_Frame":
        """Everything allocated inside is gone at the end, also when an error passes through."""
        return _Frame(self)

    def _view(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._top + size > self._block.size:
            raise BudgetExceeded(size, self._block.size - self._top, {"scratch": self._top})
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        array: npt.NDArray[Any] = self._block.array[self._top : self._top + size].view(dtype).reshape(shape)
        self._known[self._top, shape, dtype] = array
        return array

    def _back_to(self, base: int) -> None:
        self._top = base
        if base == 0:
            self._block.array[: self._high] = 0
            self._high = 0


class _Frame:
    """Not a generator: there are a thousand in a step."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch, self._base = scratch, scratch._top

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._scratch._back_to(self._base)
