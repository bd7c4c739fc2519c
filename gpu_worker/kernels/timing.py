"""What the ring product costs on a CUDA device beside torch's bfloat16 product of the same shape, as Markdown.

Weights are copied until they fill more than any cache holds, and one CUDA graph multiplies with each copy in turn: as
in a model, every product reads its weights from memory, and launching is not measured. Not run on a device yet.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import torch

from gpu_worker.kernels import graphs, triton_ring
from gpu_worker.kernels.cuda import GemmProducts, Products

LINEARS = {  # (k, n) of the shapes of Qwen2.5-0.5B and Qwen2.5-7B
    "0.5B": {"qkv": (896, 1152), "o": (896, 896), "gate_up": (896, 9728), "down": (4864, 896), "head": (896, 151_936)},
    "7B": {
        "qkv": (3584, 4608),
        "o": (3584, 3584),
        "gate_up": (3584, 37_888),
        "down": (18_944, 3584),
        "head": (3584, 152_064),
    },
}
ROWS = (1, 4, 16, 32, 64, 256, 1024)
MOST_ROWS = 256  # of one call
PARTS = (1, 2, 4, 8)
CACHE_BYTES = 256 << 20
REPLAYS = 20

Work = Callable[[], object]


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


def ring(m: int, k: int, n: int, how: triton_ring.Plan) -> float:
    """Microseconds of a ring product, words and answer on the device."""
    z = torch.randint(-(1 << 31), 1 << 31, (m, k), dtype=torch.int32, device=_device())
    planes = torch.empty((4 * m, k), dtype=torch.int8, device=z.device)
    y = torch.empty((m, n), dtype=torch.int32, device=z.device)
    weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=z.device) for _ in range(_copies(k * n))]
    return microseconds([partial(triton_ring.multiply, z, w.t(), y, planes, how) for w in weights])


def bfloat16(m: int, k: int, n: int) -> float:
    """Microseconds of torch's product."""
    x = torch.randn((m, k), dtype=torch.bfloat16, device=_device())
    y = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
    weights = [torch.randn((n, k), dtype=torch.bfloat16, device=x.device) for _ in range(_copies(2 * k * n))]
    return microseconds([partial(torch.mm, x, w.t(), out=y) for w in weights])


def exchange(m: int, k: int, n: int, found: Products) -> float:
    """Microseconds from numpy to numpy, by the clock on the wall."""
    z = np.random.default_rng().integers(-(1 << 31), 1 << 31, (m, k)).astype(np.int32)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=_device())
    taken = []
    for _ in range(REPLAYS + 2):
        start = time.perf_counter()
        found.matmul(z, w)
        taken.append((time.perf_counter() - start) * 1e6)
    return sorted(taken[2:])[REPLAYS // 4]


def table(found: Products) -> Iterator[str]:
    """Lines of Markdown: every linear of both models. `found` is what the last columns time, beside torch's GEMM."""
    yield "| model | linear | rows | tile, parts | ring us | bf16 us | ratio | GB/s | TOP/s | numpy us | by torch |"
    yield "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    above = []
    for (model, name, (k, n)), m in product(_linears(), ROWS):
        how = _plan(m, k, n)
        ours, theirs = ring(m, k, n, how), bfloat16(m, k, n)
        work = f"{k * n / ours / 1e3:.0f} | {8 * m * k * n / ours / 1e6:.1f}"  # four digits, two operations each
        whole = [f"{exchange(m, k, n, one):.0f}" if m <= MOST_ROWS else "" for one in (found, GemmProducts())]
        yield (
            f"| {model} | {name} | {m} | {_says(how, k)} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {work} "
            f"| {whole[0]} | {whole[1]} |"
        )
        if ours / theirs > _bar(m):
            above.append(f"{model} {name} {m}: {ours / theirs:.2f}")
    yield ""
    yield f"above the bar (1.0 up to 32 rows, 2.5 from 256 on): {'; '.join(above) or 'none'}"


def tiles() -> Iterator[str]:
    """Lines of Markdown: the planned tile of every linear, and the best of all."""
    yield "| model | linear | rows | planned | us | best | us |"
    yield "|---|---|---:|---|---:|---|---:|"
    for (model, name, (k, n)), m in product(_linears(), ROWS):
        planned = _plan(m, k, n)
        seconds = {how: ring(m, k, n, how) for how in {planned, *_candidates(m, k)}}
        best = min(seconds, key=seconds.__getitem__)
        yield (
            f"| {model} | {name} | {m} | {_says(planned, k)} | {seconds[planned]:.1f} | {_says(best, k)} "
            f"| {seconds[best]:.1f} |"
        )


def _linears() -> list[tuple[str, str, tuple[int, int]]]:
    return [(model, name, size) for model, linears in LINEARS.items() for name, size in linears.items()]


def _candidates(m: int, k: int) -> Iterator[triton_ring.Plan]:
    """Tiles that are not far from as many rows, with k in one part and in more."""
    device = triton_ring.device_of(torch.empty(0, device=_device()))
    for tile, parts in product((tile for kind in triton_ring.TILES.values() for tile in kind), PARTS):
        near = tile.rows <= 4 * m and (m <= 8 * tile.rows or tile.planes)
        if near and tile.shared <= device.shared and k >= parts * tile.depth:
            yield triton_ring.Plan(tile, triton_ring.share_of(k, parts, tile))


def _plan(m: int, k: int, n: int) -> triton_ring.Plan:
    return triton_ring.plan(m, k, n, triton_ring.device_of(torch.empty(0, device=_device())))


def _says(how: triton_ring.Plan, k: int) -> str:
    tile = how.tile
    kind = "planes" if tile.planes else "words"
    return f"{tile.rows}x{tile.columns}x{tile.depth} {kind}, {-(-k // how.share)}"


def _bar(m: int) -> float:
    return 1.0 if m <= 32 else 2.5 if m >= 256 else float("inf")


def _copies(size: int) -> int:
    return max(1, min(64, CACHE_BYTES // size))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
