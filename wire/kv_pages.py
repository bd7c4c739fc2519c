"""Element types and page size of KV caches: what both sides must agree on for those of the GPU worker.

And the sizes of attention over the caches of the trusted worker, which a memory budget is planned with.
"""

from enum import IntEnum

from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2

PAGE_TOKENS = 64  # a page is so many tokens of one layer, keys and values
_BLOCK_BYTES, _BLOCK_PAGES = 1 << 19, 8  # float32 of the pages that attention looks at together, and most of them
_SCORE_BYTES = 1 << 18  # of their scores, for a few rows


class KvType(IntEnum):
    """Element types by their number on the wire. INT8 is symmetric per token and head, with a float32 scale."""

    FLOAT32 = gpu_worker_pb2.KV_TYPE_FLOAT32
    FLOAT16 = gpu_worker_pb2.KV_TYPE_FLOAT16
    INT8 = gpu_worker_pb2.KV_TYPE_INT8

    @property
    def number(self) -> gpu_worker_pb2.KvType.ValueType:
        """The same number, as the generated stubs type it."""
        return self.value


_ELEMENT = {KvType.FLOAT32: 4, KvType.FLOAT16: 2, KvType.INT8: 1}


def token_bytes(config: ModelConfig, kind: KvType) -> int:
    """Bytes of one token's keys and values over all layers."""
    scale = 4 if kind is KvType.INT8 else 0
    return 2 * config.layers * config.kv_heads * (config.head_dim * _ELEMENT[kind] + scale)


def page_words(config: ModelConfig, kind: KvType) -> int:
    """32-bit words of one page of one layer."""
    return PAGE_TOKENS * token_bytes(config, kind) // config.layers // 4


def block_pages(config: ModelConfig) -> int:
    """Consecutive pages that attention looks at together. It decides how sums are rounded: by the model alone."""
    return min(max(_BLOCK_BYTES // (4 * page_words(config, KvType.FLOAT32)), 1), _BLOCK_PAGES)


def block_spans(config: ModelConfig, first: int, end: int) -> list[range]:
    """The pages of tokens `first` to `end`, cut where blocks end."""
    start, stop, size = first // PAGE_TOKENS, -(-end // PAGE_TOKENS), block_pages(config)
    return [range(max(at, start), min(at + size, stop)) for at in range(start // size * size, stop, size)]


def block_rows(config: ModelConfig) -> int:
    """Rows whose scores over one block are computed together."""
    return max(_SCORE_BYTES // _row_bytes(config), 1)


def attention_bytes(config: ModelConfig, rows: int) -> int:
    """Scratch for the attention of `rows` rows of one sequence: two blocks, the rows' state, and scores of a block."""
    blocks = 2 * block_pages(config) * 4 * page_words(config, KvType.FLOAT32)
    state = 4 * rows * config.heads * (config.head_dim + 2)
    return blocks + state + min(rows, block_rows(config)) * _row_bytes(config) + (1 << 10)


def _row_bytes(config: ModelConfig) -> int:
    """Scores and products of one row over one block."""
    return 4 * block_pages(config) * config.heads * (PAGE_TOKENS + config.head_dim)
