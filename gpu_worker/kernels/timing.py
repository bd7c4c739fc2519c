"""What the ring product costs on a CUDA device beside torch's bfloat16 product of the same shape, as Markdown.

Weights are copied until they fill more than any cache holds, and one CUDA graph multiplies with each copy in turn: as
in a model, every product reads its weights from memory, and launching is not measured. Not run on a device yet.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import torch

from gpu_worker.kernels import graphs, triton_ring
from gpu_worker.kernels.cuda import GemmProducts, Products
from gpu_worker.kernels.triton_ring import Plan, Tile

ROWS = (1, 4, 16, 32, 64, 256, 1024)
MOST_ROWS = 256  # of one call
LOOKUP_ROWS = 64
PARTS = (1, 2, 4, 8)
CACHE_BYTES = 256 << 20
REPLAYS = 20
OTHER_TILES = (  # that no plan takes yet
    Tile(4, 16, 256, False, 2, 4, 33 << 10),
    Tile(4, 32, 512, False, 4, 3, 81 << 10),
    Tile(4, 64, 256, False, 4, 3, 65 << 10),
    Tile(16, 32, 256, False, 4, 3, 81 << 10),
    Tile(16, 64, 256, False, 4, 3, 113 << 10),
    Tile(16, 128, 128, False, 8, 3, 81 << 10),
    Tile(16, 64, 128, True, 4, 4, 65 << 10),
    Tile(64, 64, 128, True, 8, 3, 129 << 10),
    Tile(64, 128, 128, True, 8, 3, 145 << 10),
)

Work = Callable[[], object]


class Shape(NamedTuple):
    """z[m, k] times k x n: a linear, whose weights lie output by output, or the lookup of an embedding table."""

    model: str
    name: str
    k: int
    n: int

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """k x n on the device, filled with anything."""
        lies = (self.k, self.n) if self.name == "lookup" else (self.n, self.k)
        made = torch.randint(-128, 128, lies, dtype=torch.int8, device=_device()).to(dtype)
        return made if self.name == "lookup" else made.t()

    def copies(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """So many that no cache holds them."""
        count = CACHE_BYTES // (self.k * self.n * dtype.itemsize)
        return [self.matrix(dtype) for _ in range(max(1, min(64, count)))]


SHAPES = (  # of Qwen2.5-0.5B and Qwen2.5-7B
    Shape("0.5B", "qkv", 896, 1152),
    Shape("0.5B", "o", 896, 896),
    Shape("0.5B", "gate_up", 896, 9728),
    Shape("0.5B", "down", 4864, 896),
    Shape("0.5B", "head", 896, 151_936),
    Shape("0.5B", "lookup", 151_936, 896),
    Shape("7B", "qkv", 3584, 4608),
    Shape("7B", "o", 3584, 3584),
    Shape("7B", "gate_up", 3584, 37_888),
    Shape("7B", "down", 18_944, 3584),
    Shape("7B", "head", 3584, 152_064),
)


def microseconds(works: list[Work]) -> float:
    """Of one of them, in a graph that does all in turn: the lower quartile of some replays."""
    replay = graphs.capture(partial(_all, works))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    taken: list[float] = []
    for _ in range(REPLAYS):
        start.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / len(works))
    return sorted(taken)[REPLAYS // 4]


def _all(works: list[Work]) -> None:
    for work in works:
        work()


def ring(shape: Shape, m: int, plans: list[Plan]) -> list[float]:
    """Microseconds of a ring product under each plan, words and answer on the device."""
    z = torch.randint(-(1 << 31), 1 << 31, (m, shape.k), dtype=torch.int32, device=_device())
    planes = torch.empty((4 * m, shape.k), dtype=torch.int8, device=z.device)
    y, weights = torch.empty((m, shape.n), dtype=torch.int32, device=z.device), shape.copies(torch.int8)
    return [microseconds([partial(triton_ring.multiply, z, b, y, planes, how) for b in weights]) for how in plans]


def bfloat16(shape: Shape, m: int) -> float:
    """Microseconds of torch's product."""
    x = torch.randn((m, shape.k), dtype=torch.bfloat16, device=_device())
    y = torch.empty((m, shape.n), dtype=torch.bfloat16, device=x.device)
    return microseconds([partial(torch.mm, x, b, out=y) for b in shape.copies(torch.bfloat16)])


def exchange(shape: Shape, m: int, found: Products) -> float:
    """Microseconds from numpy to numpy, by the clock on the wall."""
    z = np.random.default_rng().integers(-(1 << 31), 1 << 31, (m, shape.k)).astype(np.int32)
    b = shape.matrix(torch.int8)
    call = partial(found.lookup, z, b) if shape.name == "lookup" else partial(found.matmul, z, b.t())
    taken = []
    for _ in range(REPLAYS + 2):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e6)
    return sorted(taken[2:])[REPLAYS // 4]


def table(found: Products) -> Iterator[str]:
    """Lines of Markdown: every product of both models. `found` is what the last columns time, beside torch's GEMM."""
    yield "| model | linear | rows | tile, parts | ring us | bf16 us | ratio | GB/s | TOP/s | numpy us | by torch |"
    yield "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    above = []
    for shape, m in _cases():
        how = _plan(shape, m)
        (ours,), theirs = ring(shape, m, [how]), bfloat16(shape, m)
        read, worked = shape.k * shape.n / ours / 1e3, 8 * m * shape.k * shape.n / ours / 1e6  # 4 digits, 2 operations
        whole = [f"{exchange(shape, m, one):.0f}" if m <= MOST_ROWS else "" for one in (found, GemmProducts())]
        yield (
            f"| {shape.model} | {shape.name} | {m} | {_says(how, shape)} | {ours:.1f} | {theirs:.1f} "
            f"| {ours / theirs:.2f} | {read:.0f} | {worked:.1f} | {whole[0]} | {whole[1]} |"
        )
        if ours / theirs > _bar(m):
            above.append(f"{shape.model} {shape.name} {m}: {ours / theirs:.2f}")
    yield ""
    yield f"above the bar (1.0 up to 32 rows, 2.5 from 256 on): {'; '.join(above) or 'none'}"


def tiles() -> Iterator[str]:
    """Lines of Markdown: the planned tile of every product, and the best of all."""
    yield "| model | linear | rows | planned | us | best | us |"
    yield "|---|---|---:|---|---:|---|---:|"
    for shape, m in _cases():
        planned = _plan(shape, m)
        plans = list({planned, *_candidates(shape, m)})
        taken = dict(zip(plans, ring(shape, m, plans), strict=True))
        best = min(plans, key=taken.__getitem__)
        yield (
            f"| {shape.model} | {shape.name} | {m} | {_says(planned, shape)} | {taken[planned]:.1f} "
            f"| {_says(best, shape)} | {taken[best]:.1f} |"
        )


def _cases() -> Iterator[tuple[Shape, int]]:
    for shape, m in product(SHAPES, ROWS):
        if shape.name != "lookup" or m <= LOOKUP_ROWS:
            yield shape, m


def _candidates(shape: Shape, m: int) -> Iterator[Plan]:
    """Tiles that are not far from as many rows, with k in one part and in more."""
    device = triton_ring.device_of(torch.empty(0, device=_device()))
    for tile, parts in product(chain(*triton_ring.TILES.values(), OTHER_TILES), PARTS):
        near = tile.rows <= 4 * m and (m <= 8 * tile.rows or tile.planes)
        if near and tile.shared <= device.shared and shape.k >= parts * tile.depth:
            yield Plan(tile, triton_ring.share_of(shape.k, parts, tile))


def _plan(shape: Shape, m: int) -> Plan:
    return triton_ring.plan(m, shape.k, shape.n, triton_ring.device_of(torch.empty(0, device=_device())))


def _says(how: Plan, shape: Shape) -> str:
    tile = how.tile
    kind = "planes" if tile.planes else "words"
    return f"{tile.rows}x{tile.columns}x{tile.depth}/{tile.warps} {kind}, {-(-shape.k // how.share)}"


def _bar(m: int) -> float:
    return 1.0 if m <= 32 else 2.5 if m >= 256 else float("inf")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
