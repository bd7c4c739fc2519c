"""KV caches of one stream: reserved, appended to, permuted, paged out and in, dropped.

A sequence's memory is taken when it is reserved, so a step never fails for want of it. Only the compute thread
comes here.
"""

from collections.abc import Callable, Iterable

import torch

from gpu_worker.allowance import Allowance
from gpu_worker.kv_array import KvArray
from wire.errors import ContextError, InvalidArgumentError
from wire.kv_pages import PAGE_TOKENS, KvType, page_words, token_bytes
from wire.model_config import ModelConfig

MAX_CACHE_BYTES = 4 << 30  # all sequences of all streams

Witness = Callable[[int, str, torch.Tensor, torch.Tensor], None]  # told sequence, event, keys and values


class Sequence:
    """Keys and values of one sequence: whole pages for `capacity` tokens, `length` of them filled."""

    def __init__(self, config: ModelConfig, capacity: int, kind: KvType, device: str) -> None:
        self.config = config
        self.capacity = capacity
        self.kind = kind
        self.pages = -(-capacity // PAGE_TOKENS)
        self.length = 0
        self._keys = KvArray(config, self.pages * PAGE_TOKENS, kind, device)
        self._values = KvArray(config, self.pages * PAGE_TOKENS, kind, device)
        self._tables: torch.Tensor | None = None  # int64[2, layers, kv_heads, head_dim]; None: nothing is permuted

    @property
    def size(self) -> int:
        """Bytes of the elements and scales."""
        return reserved_bytes(self.config, self.capacity, self.kind)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [rows, kv_heads, head_dim] behind the cached tokens and return what their rows may attend to,
        [kv_heads, tokens, head_dim] each. The length grows only with `advance`, once per pass.
        """
        end = self.length + len(k)
        start = max(0, self.length + 1 - self.config.window) if self.config.window else 0
        self._keys.write(layer, self.length, k)
        self._values.write(layer, self.length, v)
        return self._keys.read(layer, start, end), self._values.read(layer, start, end)

    def advance(self, rows: int) -> None:
        """The pass is done: its rows count."""
        self.length += rows

    def permute(self, index: torch.Tensor) -> None:
        """Gather what is cached by index int64[layers, 2, kv_heads, head_dim], and compose the running tables.

        Raises InvalidArgumentError unless each row of it is a permutation of the dims.
        """
        order = torch.arange(index.shape[-1], device=index.device)
        if not bool((index.sort(dim=-1).values == order).all()):
            raise InvalidArgumentError("each row of the indices must be a permutation of a head's dims")
        index = index.transpose(0, 1)
        self._keys.permute(index[0], self.length)
        self._values.permute(index[1], self.length)
        self._tables = index.contiguous() if self._tables is None else self._tables.gather(-1, index)

    def arrange_qk(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [rows, heads, d] and k [rows, kv_heads, d], their dims gathered by the running table of the keys."""
        if self._tables is None:
            return q, k
        table = self._tables[0, layer]
        return _gather(q, table.repeat_interleave(self.config.heads // len(table), dim=0)), _gather(k, table)

    def arrange_v(self, layer: int, v: torch.Tensor) -> torch.Tensor:
        """v [rows, kv_heads, d], its dims gathered by the running table of the values."""
        return v if self._tables is None else _gather(v, self._tables[1, layer])

    def read_page(self, layer: int, page: int) -> torch.Tensor:
        """The words of a page, int32[page_words]. Raises InvalidArgumentError for a page that was not reserved."""
        self._check_page(page)
        return torch.cat([self._keys.page(layer, page), self._values.page(layer, page)]).view(torch.int32)

    def write_page(self, layer: int, page: int, words: torch.Tensor) -> None:
        """Set a page from words that `read_page` gave. Raises InvalidArgumentError for another number of them."""
        self._check_page(page)
        if len(words) != page_words(self.config, self.kind):
            raise InvalidArgumentError("a page of this sequence has another number of words")
        self._values.put_page(layer, page, self._keys.put_page(layer, page, words.view(torch.uint8)))

    def content(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens that count, float32[layers, kv_heads, tokens, head_dim] each."""
        layers, tokens = range(self.config.layers), self.length
        keys = torch.stack([self._keys.read(layer, 0, tokens) for layer in layers])
        return keys, torch.stack([self._values.read(layer, 0, tokens) for layer in layers])

    def wipe(self) -> None:
        """Zero the content; length and tables stay."""
        self._keys.wipe()
        self._values.wipe()

    def _check_page(self, page: int) -> None:
        if page >= self.pages:
            raise InvalidArgumentError(f"page out of range: the sequence has {self.pages}")


class CacheStore:
    """The sequences of one stream, by the numbers that the peer gave them."""

    def __init__(self, allowance: Allowance, witness: Witness | None = None) -> None:
        """`witness` sees each cache before it is dropped, and after it is wiped."""
        self._allowance, self._witness = allowance, witness
        self._sequences: dict[int, Sequence] = {}

    def reserve(self, number: int, config: ModelConfig, tokens: int, kind: KvType, device: str) -> None:
        """Raises InvalidArgumentError for a number in use, ContextError and ExhaustedError for too many tokens."""
        if number in self._sequences:
            raise InvalidArgumentError("this sequence is reserved already")
        if tokens > config.max_context:
            raise ContextError(f"{tokens} tokens were asked for; the model's context holds {config.max_context}")
        self._allowance.take(reserved_bytes(config, tokens, kind))
        self._sequences[number] = Sequence(config, tokens, kind, device)

    def drop(self, number: int) -> None:
        """Raises InvalidArgumentError for an unknown sequence."""
        if number not in self._sequences:
            raise InvalidArgumentError("unknown sequence")
        self._show(number, "drop")
        self._allowance.give(self._sequences.pop(number).size)

    def wipe(self, number: int, config: ModelConfig) -> None:
        """Zero what a sequence holds. Raises InvalidArgumentError for what `get` does not know."""
        self.get(number, config).wipe()
        self._show(number, "wipe")

    def clear(self) -> None:
        """Drop every sequence: the stream has ended."""
        for number in list(self._sequences):
            self.drop(number)

    def get(self, number: int, config: ModelConfig) -> Sequence:
        """Raises InvalidArgumentError for a sequence that is unknown or belongs to a model that was replaced since
        (every Load makes a `config` of its own).
        """
        sequence = self._sequences.get(number)
        if sequence is None or sequence.config is not config:
            raise InvalidArgumentError("unknown sequence")
        return sequence

    def find(self, spans: Iterable[tuple[int, int]], config: ModelConfig) -> list[tuple[Sequence, int]]:
        """(number, rows) -> (sequence, rows), with room for the rows.

        Raises InvalidArgumentError for what `get` does not know, ContextError for a sequence that is full.
        """
        found = [(self.get(number, config), rows) for number, rows in spans]
        for sequence, rows in found:
            if sequence.length + rows > sequence.capacity:
                raise ContextError(f"{rows} rows do not fit: the sequence holds {sequence.capacity} tokens")
        return found

    def _show(self, number: int, event: str) -> None:
        if self._witness is not None:
            self._witness(number, event, *self._sequences[number].content())


def reserved_bytes(config: ModelConfig, tokens: int, kind: KvType) -> int:
    """What a sequence of so many tokens takes: whole pages."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS * token_bytes(config, kind)


def _gather(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, d] by table int64[heads, d]: y[..., i] = x[..., table[i]]."""
    return x.gather(-1, table.expand_as(x))
