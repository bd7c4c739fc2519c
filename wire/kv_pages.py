"""Element types and page size of the KV caches on the GPU worker: what both sides must agree on."""

from enum import IntEnum

from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2

PAGE_TOKENS = 64  # a page is so many tokens of one layer, keys and values


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
