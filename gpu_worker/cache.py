"""KV caches of one stream: reserved, appended to, dropped; and the bound that all streams share.

A sequence's memory is taken when it is reserved, so a step never fails for want of it. Only the compute thread
comes here.
"""

from collections.abc import Iterable

import torch

from wire.errors import ContextError, ExhaustedError, InvalidArgumentError
from wire.model_config import ModelConfig

MAX_CACHE_BYTES = 4 << 30  # all sequences of all streams


class CacheBudget:
    """Bytes that caches may still take, for the whole process."""

    def __init__(self, limit: int = MAX_CACHE_BYTES) -> None:
        self.left = limit

    def take(self, size: int) -> None:
        """Raises ExhaustedError when `size` bytes are not left."""
        if size > self.left:
            raise ExhaustedError(f"a KV cache of {size} bytes was asked for; {self.left} bytes would fit")
        self.left -= size


class Sequence:
    """Keys and values of one sequence: float32[layers, kv_heads, capacity, head_dim] each, `length` tokens filled."""

    def __init__(self, config: ModelConfig, capacity: int, device: str) -> None:
        shape = (config.layers, config.kv_heads, capacity, config.head_dim)
        self.config = config
        self.capacity = capacity
        self.length = 0
        self.keys = torch.empty(shape, device=device)
        self.values = torch.empty(shape, device=device)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [rows, kv_heads, head_dim] behind the cached tokens and return all of them,
        [kv_heads, length + rows, head_dim] each. The length grows only with `advance`, once per step.
        """
        end = self.length + len(k)
        self.keys[layer, :, self.length : end] = k.transpose(0, 1)
        self.values[layer, :, self.length : end] = v.transpose(0, 1)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, rows: int) -> None:
        """The step is done: its rows count."""
        self.length += rows


class CacheStore:
    """The sequences of one stream, by the numbers that the peer gave them."""

    def __init__(self, budget: CacheBudget) -> None:
        self._budget = budget
        self._sequences: dict[int, Sequence] = {}

    def reserve(self, number: int, config: ModelConfig, tokens: int, device: str) -> None:
        """Raises InvalidArgumentError for a number in use, ContextError and ExhaustedError for too many tokens."""
        if number in self._sequences:
            raise InvalidArgumentError("this sequence is reserved already")
        if tokens > config.max_context:
            raise ContextError(f"{tokens} tokens were asked for; the model's context holds {config.max_context}")
        self._budget.take(_bytes(config, tokens))
        self._sequences[number] = Sequence(config, tokens, device)

    def drop(self, number: int) -> None:
        """Raises InvalidArgumentError for an unknown sequence."""
        if number not in self._sequences:
            raise InvalidArgumentError("unknown sequence")
        sequence = self._sequences.pop(number)
        self._budget.left += _bytes(sequence.config, sequence.capacity)

    def clear(self) -> None:
        """Drop every sequence: the stream has ended."""
        for number in list(self._sequences):
            self.drop(number)

    def find(self, spans: Iterable[tuple[int, int]], config: ModelConfig) -> list[tuple[Sequence, int]]:
        """(number, rows) -> (sequence, rows), with room for the rows.

        Raises InvalidArgumentError for a sequence that is unknown or belongs to a model that was replaced since
        (every Load makes a `config` of its own), ContextError for one that is full.
        """
        found = []
        for number, rows in spans:
            sequence = self._sequences.get(number)
            if sequence is None or sequence.config is not config:
                raise InvalidArgumentError("unknown sequence")
            if sequence.length + rows > sequence.capacity:
                raise ContextError(f"{rows} rows do not fit: the sequence holds {sequence.capacity} tokens")
            found.append((sequence, rows))
        return found


def _bytes(config: ModelConfig, tokens: int) -> int:
    return 2 * 4 * config.layers * config.kv_width * tokens
