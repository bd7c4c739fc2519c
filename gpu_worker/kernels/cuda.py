"""Ring products on a CUDA device: z.W^T and z.E modulo 2^32. `products` chooses between two ways to the same bits:

- the Triton kernel of triton_ring.py, launched through graphs.py, where triton is installed and right on this device;
- int8 GEMMs of torch, here, on any device that torch._int_mm knows. z is written in base 256 with balanced digits,
  z = d0 + 256.d1 + 256^2.d2 + 256^3.d3 modulo 2^32, -128 <= d < 128. The digits of all rows are stacked as rows of one
  int8 x int8 -> int32 product and weighted together again afterwards. Every step is exact for k < 2^17.

Needs torch, numpy and, for the first way, triton: no other package, so that the folder can be copied to a bare machine.

    python -m gpu_worker.kernels.cuda --check   random shapes on the device at hand against int64, both ways
    python -m gpu_worker.kernels.cuda --time    the linears of two models beside bfloat16, as a Markdown table
    python -m gpu_worker.kernels.cuda --tune    every tile at every linear: where triton_ring.TILES is not the best
"""

import argparse
import sys
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

MAX_K = (1 << 17) - 1  # (k.128.128) must stay below 2^31
_BIAS = -0x7F7F7F80  # 0x80808080 as int32: turns unsigned bytes into balanced digits and back
_ALIGNMENT = 8  # what the int8 GEMM asks of k and n
_LEAST_ROWS = 32  # it refuses 16 rows and fewer
_TILE = 1 << 15  # rows of an embedding table that are turned around at once

I32 = npt.NDArray[np.int32]


class Products(Protocol):
    """Ring products of a device, with numpy in and out. Callers check shapes."""

    name: str  # which kernel runs

    def matmul(self, z: I32, w: torch.Tensor) -> I32:
        """z int32[m, k], w int8[n, k] on the device -> z.w^T modulo 2^32 as int32[m, n]."""
        ...

    def lookup(self, z: I32, table: torch.Tensor) -> I32:
        """z int32[m, v], table int8[v, d] on the device -> z.table modulo 2^32 as int32[m, d]."""
        ...

    def warm_up(self, w: torch.Tensor) -> None:
        """Make ready whatever products with w need."""
        ...


def products(device: str) -> Products:
    """Triton where it is installed and right on this device, else torch; the name says why."""
    try:
        from gpu_worker.kernels.graphs import TritonProducts

        found = TritonProducts(device)
        right = all(check_shape(m, 160, 48, device, found) for m in (1, 16, 32, 64))
        return found if right else GemmProducts("triton gives wrong words here")
    except ImportError:
        return GemmProducts("triton is not installed")
    except Exception as error:  # no C compiler, no memory, another vendor's device: whatever it is, torch remains
        return GemmProducts(f"triton fails here: {type(error).__name__}")


def digits(z: torch.Tensor) -> torch.Tensor:
    """int32[m, k] -> int8[4, m, k], least significant digit first."""
    unsigned = (z + _BIAS).view(torch.uint8).reshape(*z.shape, 4)
    return (unsigned ^ 0x80).view(torch.int8).permute(2, 0, 1)


def combine(parts: torch.Tensor) -> torch.Tensor:
    """int32[4, m, n], a product per digit -> int32[m, n], their weighted sum modulo 2^32."""
    total = parts[3].to(torch.int64)
    for part in (parts[2], parts[1], parts[0]):
        total = total * 256 + part  # below 2^56 in all
    return total.to(torch.int32)


def ring_matmul(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """z int32[m, k], w int8[n, k], on one device -> z.w^T modulo 2^32 as int32[m, n].

    Raises ValueError for operands that do not fit. k and n that are no multiples of 8 cost a copy of w.
    """
    if z.dim() != 2 or w.dim() != 2 or z.shape[1] != w.shape[1] or z.shape[1] > MAX_K:
        raise ValueError("operands do not fit")
    if z.dtype is not torch.int32 or w.dtype is not torch.int8:
        raise ValueError("operands have the wrong type")
    (m, k), n = z.shape, len(w)
    rows = _round_up(max(4 * m, _LEAST_ROWS))
    left = pad(digits(z.contiguous()).reshape(4 * m, k), (0, _round_up(k) - k, 0, rows - 4 * m))
    if k % _ALIGNMENT or n % _ALIGNMENT:
        w = pad(w, (0, _round_up(k) - k, 0, _round_up(n) - n))
    product = torch._int_mm(left, w.t())
    return combine(product[: 4 * m, :n].reshape(4, m, n))


def ring_lookup(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """z int32[m, v], table int8[v, d], on one device -> z.table modulo 2^32 as int32[m, d].

    The GEMM wants the digits beside the summed index of both operands, and has no kernel for a table that lies row by
    row on most devices; and v may be over MAX_K. So the table is multiplied tile by tile, each tile a transposed copy
    that lives for its product only. Raises ValueError for operands that do not fit.
    """
    if z.dim() != 2 or table.dim() != 2 or z.shape[1] != len(table):
        raise ValueError("operands do not fit")
    total = torch.zeros((len(z), table.shape[1]), dtype=torch.int64, device=z.device)  # below 2^31 a tile
    for rows, tile in zip(z.split(_TILE, dim=1), table.split(_TILE), strict=True):
        total += ring_matmul(rows, tile.t().contiguous())
    return total.to(torch.int32)


def _round_up(extent: int) -> int:
    return -(-extent // _ALIGNMENT) * _ALIGNMENT


class GemmProducts:
    """Products of torch's int8 GEMM."""

    def __init__(self, reason: str = "") -> None:
        """`reason`: why it is not Triton."""
        self.name = "int8 GEMM of torch" + f" ({reason})" * bool(reason)

    def matmul(self, z: I32, w: torch.Tensor) -> I32:
        """As Products says."""
        return ring_matmul(torch.from_numpy(z).to(w.device), w).cpu().numpy()

    def lookup(self, z: I32, table: torch.Tensor) -> I32:
        """As Products says."""
        return ring_lookup(torch.from_numpy(z).to(table.device), table).cpu().numpy()

    def warm_up(self, w: torch.Tensor) -> None:
        """There is nothing to compile."""


def check_shape(m: int, k: int, n: int, device: str, found: Products) -> bool:
    """Whether products of fresh random operands, extreme words among them, have the bits that int64 gives.

    Twice over the same weights: the second time a graph is replayed, and its buffers hold the first answer.
    """
    random = np.random.default_rng()
    w = random.integers(-128, 128, (n, k)).astype(np.int8)
    right = torch.from_numpy(w).to(device)
    table = right.t().contiguous()
    for _ in range(2):
        z = random.integers(-(1 << 31), 1 << 31, (m, k)).astype(np.int32)
        z.flat[:: max(k // 3, 1)] = random.choice(np.array([-(1 << 31), (1 << 31) - 1, -1, 128, -128], np.int32))
        expected = (z.astype(np.int64) @ w.astype(np.int64).T).astype(np.int32)
        if not all(np.array_equal(y, expected) for y in (found.matmul(z, right), found.lookup(z, table))):
            return False
    return True


def _shapes() -> list[tuple[int, int, int]]:
    """(m, k, n): linears of common models, awkward ones, sums that do not fit one block."""
    linears = ((896, 1152), (4864, 896), (63, 65), (1, 1), (7, 9))
    shapes = [(m, k, n) for m in (1, 4, 5, 16, 17, 32, 33, 64, 256) for k, n in linears]
    return [*shapes, (4, 3584, 4608), (32, 18944, 3584), (5, 2 * _TILE + 4465, 72), (3, MAX_K + 9, 33)]


def _check(device: str, found: Products) -> bool:
    shapes = [shape for shape in _shapes() if isinstance(found, GemmProducts) <= (shape[1] <= MAX_K)]
    wrong = [shape for shape in shapes if not check_shape(*shape, device, found)]
    for shape in wrong:
        print(f"MISMATCH at (m, k, n) = {shape}")
    print(f"{found.name}: {len(shapes) - len(wrong)} of {len(shapes)} shapes equal int64 bit for bit")
    return not wrong


def _measure(device: str, found: Products, time: bool, tune: bool) -> bool:
    """Print the tables that were asked for. Whether that is possible here."""
    if device == "cpu" or isinstance(found, GemmProducts):
        print("--time and --tune need a CUDA device and triton")
        return False
    from gpu_worker.kernels import timing

    for lines in [timing.table(found)] * time + [timing.tiles()] * tune:
        for line in lines:
            print(line, flush=True)
    return True


def main() -> int:
    """Check the shapes of common models and awkward ones, or measure. Exit code 1 when any bit differs."""
    parser = argparse.ArgumentParser(prog="python -m gpu_worker.kernels.cuda", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="what it does without a flag")
    parser.add_argument("--time", action="store_true", help="time the linears of two models beside bfloat16")
    parser.add_argument("--tune", action="store_true", help="time every tile at every linear")
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU: there is no CUDA device here"
    found, right = products(device), True
    print(f"ring products on {name}: {found.name}", flush=True)
    if flags.check or not (flags.time or flags.tune):
        others = [] if isinstance(found, GemmProducts) else [GemmProducts()]
        right = all([_check(device, one) for one in (found, *others)])  # noqa: C419  # both, whatever the first says
    if flags.time or flags.tune:
        right &= _measure(device, found, flags.time, flags.tune)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
