"""How one page of a KV cache lies in memory, in each element type; float32 goes in and comes out.

A page is PAGE_TOKENS tokens of one layer: elements [2, kv_heads, PAGE_TOKENS, head_dim], keys before values, and behind
those of int8 a float32 scale for each token and head. Its size is a multiple of a cache line for every model.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F32
from wire.errors import InvalidArgumentError
from wire.kv_pages import PAGE_TOKENS, KvType, page_words
from wire.model_config import ModelConfig
from wire.quantize import quantize_rows

U8 = npt.NDArray[np.uint8]

_DTYPES: dict[KvType, npt.DTypeLike] = {
    KvType.FLOAT32: np.float32,
    KvType.FLOAT16: np.float16,
    KvType.INT8: np.int8,
}
_HALF_LIMIT = 65520.0  # from here on float16 rounds to infinity


class PageLayout:
    """The layout of a model's pages. `pages` are uint8[n, size] everywhere, C-contiguous within a page."""

    def __init__(self, config: ModelConfig, kind: KvType) -> None:
        self.kind = kind
        self.size = 4 * page_words(config, kind)
        self.shape = (2, config.kv_heads, PAGE_TOKENS, config.head_dim)
        self._elements = math.prod(self.shape) * np.dtype(_DTYPES[kind]).itemsize
        self._limit = _HALF_LIMIT if kind is KvType.FLOAT16 else np.inf

    def write(self, pages: U8, first: int, k: F32, v: F32) -> None:
        """float32[m, kv_heads, head_dim] into the tokens from `first` on of a single page, uint8[1, size].

        Raises InvalidArgumentError for what the element type does not hold: infinities and NaN; float16 overflows at
        65,520.
        """
        place = slice(first, first + len(k))
        for half, rows in enumerate((k, v)):
            if not (-self._limit < rows.min() and rows.max() < self._limit):
                raise InvalidArgumentError(f"the model's activations do not fit a {self.kind.name.lower()} cache")
            target = self._view(pages)[0, half, :, place]
            if self.kind is KvType.INT8:
                integers, scales = quantize_rows(rows.reshape(-1, rows.shape[-1]))
                target[...] = integers.reshape(rows.shape).transpose(1, 0, 2)
                self._scales(pages)[0, half, :, place, 0] = scales.reshape(rows.shape[:2]).T
            else:
                target[...] = rows.transpose(1, 0, 2)

    def read(self, pages: U8, out: F32) -> F32:
        """float32[n, 2, kv_heads, PAGE_TOKENS, head_dim]: the pages themselves if they are float32, else in `out`."""
        if self.kind is KvType.FLOAT32:
            return self._view(pages)
        floats = out[: len(pages)]
        if self.kind is KvType.INT8:
            np.multiply(self._view(pages), self._scales(pages), out=floats)
        else:
            np.copyto(floats, self._view(pages))
        return floats

    def _view(self, pages: U8) -> npt.NDArray[Any]:
        return pages[:, : self._elements].view(_DTYPES[self.kind]).reshape(-1, *self.shape)

    def _scales(self, pages: U8) -> F32:
        return pages[:, self._elements :].view(np.float32).reshape(-1, *self.shape[:3], 1)
