"""One half of a sequence's cache, keys or values, in one of the element types of the wire; float32 in and out."""

import torch

from wire.kv_pages import PAGE_TOKENS, KvType
from wire.model_config import ModelConfig
from wire.quantize import SMALLEST_PEAK

_DTYPES = {KvType.FLOAT32: torch.float32, KvType.FLOAT16: torch.float16, KvType.INT8: torch.int8}


class KvArray:
    """[layers, kv_heads, tokens, head_dim] of one element type, and beside int8 a float32 scale per token and head.

    It starts as zeros: a page that is read holds nothing of anybody else.
    """

    def __init__(self, config: ModelConfig, tokens: int, kind: KvType, device: str) -> None:
        shape = (config.layers, config.kv_heads, tokens, config.head_dim)
        self._elements = torch.zeros(shape, dtype=_DTYPES[kind], device=device)
        self._scales = torch.zeros(shape[:3], device=device) if kind is KvType.INT8 else None

    def write(self, layer: int, start: int, rows: torch.Tensor) -> None:
        """float32[rows, kv_heads, head_dim] for the tokens from `start` on."""
        rows, place = rows.transpose(0, 1), slice(start, start + len(rows))
        if self._scales is None:
            self._elements[layer, :, place] = rows
        else:
            self._elements[layer, :, place], self._scales[layer, :, place] = quantize(rows)

    def read(self, layer: int, start: int, end: int) -> torch.Tensor:
        """The tokens from `start` to `end`, float32[kv_heads, tokens, head_dim]; float32 is not copied."""
        elements = self._elements[layer, :, start:end].to(torch.float32)
        return elements if self._scales is None else elements.mul_(self._scales[layer, :, start:end, None])

    def permute(self, index: torch.Tensor, tokens: int) -> None:
        """Gather the dims of the first `tokens` tokens by int64[layers, kv_heads, head_dim]: new[i] = old[index[i]]."""
        for elements, dims in zip(self._elements[:, :, :tokens], index, strict=True):
            elements.copy_(elements.gather(-1, dims[:, None].expand_as(elements)))

    def wipe(self) -> None:
        """Zeros again."""
        for part in self._parts():
            part.zero_()

    def page(self, layer: int, page: int) -> torch.Tensor:
        """One page as uint8[bytes]."""
        parts = [part[layer, :, _tokens(page)].contiguous() for part in self._parts()]
        return torch.cat([part.view(torch.uint8).flatten() for part in parts])

    def put_page(self, layer: int, page: int, data: torch.Tensor) -> torch.Tensor:
        """Set one page from the first bytes of uint8[bytes], as `page` gave them; returns the bytes that follow."""
        for part in self._parts():
            place = part[layer, :, _tokens(page)]
            size = place.numel() * place.element_size()
            place.copy_(data[:size].clone().view(part.dtype).view(place.shape))
            data = data[size:]
        return data

    def _parts(self) -> list[torch.Tensor]:
        return [self._elements] if self._scales is None else [self._elements, self._scales]


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32[..., d] -> int8[..., d] and scales float32[...] = peak / 127; a row below SMALLEST_PEAK is zero."""
    peak = rows.abs().amax(-1)
    counts = peak > float(SMALLEST_PEAK)
    inverse = torch.where(counts, 127 / peak, 0.0)
    return (rows * inverse[..., None]).round().to(torch.int8), torch.where(counts, peak / 127, 0.0)


def _tokens(page: int) -> slice:
    return slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
