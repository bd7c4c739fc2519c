"""What the engine knows of a sequence's memory, and the cache that lies in the arena.

The whole context is reserved when the session opens, and wiped when it closes: no step can run out of memory.
"""

from typing import Protocol

import numpy as np

from trusted_worker.arithmetic import F32
from trusted_worker.secure_memory import SecureMemory
from wire.errors import ContextError
from wire.model_config import ModelConfig


class Cache(Protocol):
    """A sequence's memory, wherever the scheme keeps it."""

    capacity: int
    length: int

    def commit(self, tokens: int) -> None:
        """These tokens are part of the sequence now."""
        ...

    def rest(self) -> None:
        """The turn is over: nothing will be asked of this sequence for a while."""
        ...

    def wake(self) -> None:
        """The sequence takes part in the next step. Raises what makes that impossible, for this sequence only."""
        ...

    def free(self) -> None:
        """Wipe and give back."""
        ...


class KVCache:
    """float32[layers, 2, kv_heads, tokens, head_dim]. `length` tokens are committed, for every layer."""

    def __init__(self, memory: SecureMemory, config: ModelConfig, tokens: int) -> None:
        shape = (config.layers, 2, config.kv_heads, tokens, config.head_dim)
        self._block = memory.allocate("kv", shape, np.float32)
        self.capacity = tokens
        self.length = 0

    def append(self, layer: int, k: F32, v: F32) -> None:
        """Put float32[m, kv_heads, head_dim] behind the committed tokens. Raises ContextError when they do not fit."""
        end = self.length + len(k)
        if end > self.capacity:
            raise ContextError(f"the context of {self.capacity} tokens is full")
        self._block.array[layer, 0, :, self.length : end] = k.transpose(1, 0, 2)
        self._block.array[layer, 1, :, self.length : end] = v.transpose(1, 0, 2)

    def tokens(self, layer: int, start: int, end: int) -> tuple[F32, F32]:
        """Keys and values of tokens start to end, float32[kv_heads, end - start, head_dim] each, without a copy."""
        return self._block.array[layer, 0, :, start:end], self._block.array[layer, 1, :, start:end]

    def commit(self, tokens: int) -> None:
        """The step is through: its tokens are part of the sequence now."""
        self.length += tokens

    def rest(self) -> None:
        """It stays where it is."""

    def wake(self) -> None:
        """It is where it was."""

    def free(self) -> None:
        """Wipe and give the memory back."""
        self._block.free()
