"""The ring product as one Triton kernel: z.B modulo 2^32 for int32 z and int8 B, on the tensor cores of a CUDA device.

Written and checked without a GPU: every edge ran in Triton's interpreter (3.9, and 3.6 with numpy 2.2) against int64,
and every tile compiles for sm_80, sm_86, sm_90 and sm_120 to tensor-core instructions, on sm_80 and sm_90 without
spilling registers where k is a multiple of 16. Nothing here has run on a device yet; the tiles below are a guess from
instruction counts, which `python -m gpu_worker.kernels.cuda --tune` compares with all others.

A block of the answer is ROWS rows of z by COLUMNS columns of B.
(1) A word of z becomes four balanced digits of 8 bits, z = d0 + 256.d1 + 256^2.d2 + 256^3.d3 modulo 2^32.
(2) The digits are rows of an int8 product: row i of z is lines 4i to 4i + 3, so that one row fills a quarter of the
    smallest tensor-core tile, and a tile of B is read from memory once for all its rows.
(3) The four sums of a row are shifted, added modulo 2^32, and stored: nothing but the answer is written.

With many rows, every block of columns would repeat (1): then a small kernel does it once, before. Where there are too
few blocks for the device, several share k and add to the answer: the order does not matter modulo 2^32.

The tensor cores saturate sums instead of wrapping around, so none may reach 2^31: no block sums more than MAX_SHARE
products of at most 2^14.

Imports torch and triton and nothing else, so that it can be copied to a machine with a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

MAX_SHARE = 1 << 16
BLOCKS_PER_PROCESSOR = 2  # to have loads in flight
STEPS = 4  # of depth, that a block should do at least: fewer would not be worth adding up
SPLIT_BLOCK = 1024


class Tile(NamedTuple):
    """How a product is cut. `shared` is what the widest copy of it takes of a processor's shared memory, in bytes."""

    rows: int
    columns: int
    depth: int
    planes: bool  # whether z is split into digits beforehand
    warps: int
    stages: int
    shared: int


TILES = {  # by the most rows, the widest tile first
    4: (Tile(4, 32, 256, False, 4, 4, 49 << 10),),
    16: (Tile(16, 64, 128, False, 4, 4, 65 << 10), Tile(16, 32, 128, False, 4, 4, 49 << 10)),
    32: (
        Tile(32, 128, 128, False, 8, 3, 97 << 10),
        Tile(32, 64, 128, False, 4, 3, 73 << 10),
        Tile(32, 32, 128, False, 4, 3, 65 << 10),
    ),
    1 << 31: (
        Tile(32, 256, 128, True, 8, 3, 200 << 10),  # takes 144 KiB; sm_80 has that, but not the registers
        Tile(32, 128, 128, True, 8, 3, 97 << 10),
        Tile(32, 64, 128, True, 4, 3, 73 << 10),
    ),
}


class Device(NamedTuple):
    """What the choice of a tile depends on."""

    processors: int
    shared: int  # bytes of shared memory that a block may have


class Plan(NamedTuple):
    """A tile, and how many inputs fall to a block: fewer than k where blocks share it."""

    tile: Tile
    share: int


@triton.jit
def _balanced(words):  # type: ignore[no-untyped-def]
    """int32 -> int32 whose bytes are the balanced digits: 0x80808080 is added, and taken off byte by byte."""
    return (words + -0x7F7F7F80) ^ -0x7F7F7F80


@triton.jit
def _split(z, planes, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """planes[4 i + d] = digits d of z[i]."""
    row = tl.program_id(0).to(tl.int64)
    inputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = _balanced(tl.load(z + row * k + inputs, mask=inputs < k, other=0))
    for digit in tl.static_range(4):
        tl.store(planes + (4 * row + digit) * k + inputs, (words >> (8 * digit)).to(tl.int8), mask=inputs < k)


@triton.jit(do_not_specialize=["m"])
def _multiply(  # type: ignore[no-untyped-def]
    z,
    b,
    y,
    m,
    k,
    n,
    b_inputs,
    b_columns,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PLANES: tl.constexpr,
    ADD: tl.constexpr,
):
    """One block of y[m, n], or with ADD its part from `share` inputs. z is int32[m, k], or with PLANES int8[4m, k]."""
    row_blocks = tl.cdiv(m, ROWS)  # neighbours take the same weights, so that these are read from memory once
    row = (tl.program_id(0) % row_blocks) * ROWS
    rows = row + tl.arange(0, ROWS)
    lines = 4 * row + tl.arange(0, 4 * ROWS)
    columns = (tl.program_id(0) // row_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    shifts = (8 * tl.arange(0, 4))[None, :, None]
    weights = b + columns[None, :].to(tl.int64) * b_columns
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, k)
    sums = tl.zeros((4 * ROWS, COLUMNS), tl.int32)
    for start in range(first, last, DEPTH):
        inputs = start + tl.arange(0, DEPTH)
        inside = inputs < last
        if PLANES:
            mask = (lines < 4 * m)[:, None] & inside[None, :]
            left = tl.load(z + lines[:, None].to(tl.int64) * k + inputs[None, :], mask=mask, other=0)
        else:
            mask = (rows < m)[:, None] & inside[None, :]
            words = tl.load(z + rows[:, None].to(tl.int64) * k + inputs[None, :], mask=mask, other=0)
            digits = (_balanced(words)[:, None, :] >> shifts).to(tl.int8)  # (1)
            left = tl.reshape(digits, (4 * ROWS, DEPTH))
        mask = inside[:, None] & (columns < n)[None, :]
        right = tl.load(weights + inputs[:, None].to(tl.int64) * b_inputs, mask=mask, other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)  # (2)
    total = tl.sum(tl.reshape(sums, (ROWS, 4, COLUMNS)) << shifts, axis=1)  # (3)
    to = y + rows[:, None].to(tl.int64) * n + columns[None, :]
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    if ADD:
        tl.atomic_add(to, total, mask=mask, sem="relaxed")
    else:
        tl.store(to, total, mask=mask)


def device_of(tensor: torch.Tensor) -> Device:
    """The CPU, where the interpreter runs, has no limits: a small device is made up for it."""
    if tensor.device.type == "cpu":
        return Device(8, 1 << 20)
    known = torch.cuda.get_device_properties(tensor.device)
    return Device(known.multi_processor_count, getattr(known, "shared_memory_per_block_optin", 97 << 10))


def plan(m: int, k: int, n: int, device: Device) -> Plan:
    """The widest tile that gives every processor a block, else the narrowest; and k shared where that is not enough."""
    fitting = [tile for tile in TILES[min(most for most in TILES if m <= most)] if tile.shared <= device.shared]
    tile = next((tile for tile in fitting if _blocks(m, n, tile) >= device.processors), fitting[-1])
    wanted = BLOCKS_PER_PROCESSOR * device.processors // _blocks(m, n, tile)
    return Plan(tile, share_of(k, min(wanted, k // (STEPS * tile.depth)), tile))


def share_of(k: int, parts: int, tile: Tile) -> int:
    """Inputs of a block when k is cut into about so many parts: whole steps, and never more than MAX_SHARE."""
    share = -(-k // max(parts, 1))
    return min(-(-share // tile.depth) * tile.depth, MAX_SHARE)


def _blocks(m: int, n: int, tile: Tile) -> int:
    return -(-m // tile.rows) * -(-n // tile.columns)


def multiply(z: torch.Tensor, b: torch.Tensor, y: torch.Tensor, planes: torch.Tensor, how: Plan) -> None:
    """z int32[m, k] and contiguous, b int8[k, n] with any strides -> y int32[m, n], contiguous, is z.b modulo 2^32.

    `planes`, int8[4m, k] and contiguous, is overwritten if the tile asks for it, and may be empty if it does not.
    Nothing is allocated: it can be captured in a CUDA graph, once the same call has run before. Operands are not
    checked.
    """
    (m, k), n, tile = z.shape, b.shape[1], how.tile
    parts = triton.cdiv(k, how.share)
    if tile.planes:
        _split[(m, triton.cdiv(k, SPLIT_BLOCK))](z, planes, k, BLOCK=SPLIT_BLOCK)
    if parts > 1:
        y.zero_()
    launch: Any = _multiply[(_blocks(m, n, tile), parts)]
    launch(
        planes if tile.planes else z,
        b,
        y,
        m,
        k,
        n,
        b.stride(0),
        b.stride(1),
        how.share,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PLANES=tile.planes,
        ADD=parts > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def ring_product(z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """z int32[m, k], b int8[k, n] with any strides, on one device -> z.b modulo 2^32 as int32[m, n].

    Raises ValueError for operands that do not fit.
    """
    if z.dim() != 2 or b.dim() != 2 or z.shape[1] != len(b) or 0 in (*z.shape, *b.shape):
        raise ValueError("operands do not fit")
    if z.dtype is not torch.int32 or b.dtype is not torch.int8:
        raise ValueError("operands have the wrong type")
    (m, k), n = z.shape, b.shape[1]
    how = plan(m, k, n, device_of(z))
    y = torch.empty((m, n), dtype=torch.int32, device=z.device)
    planes = torch.empty((4 * m if how.tile.planes else 0, k), dtype=torch.int8, device=z.device)
    multiply(z.contiguous(), b, y, planes, how)
    return y
