"""Step 5 of secure-infer: Freivalds' check modulo the prime P = 2^32 + 15, row by row, on the recovered integers.

For a secret s in [0, P)^n and c = W_q^T s mod P, computed inside from our own weights: s.y_q = c.x_q (mod P).
P > 2^32, so two different int32 values never agree modulo P; a wrong row passes with probability 1/P, and after Q
failed attempts at most Q/P. One s serves every linear: what the worker learns from an accepted row is nothing, and
from a rejected row one excluded hyperplane; s is redrawn after a rejection, before the worker is trusted again.

Exactness: all sums are float64 BLAS on integers with every partial sum below 2^53.
    s: four balanced 9-bit limbs, |limb| <= 2^8; |y_q| <= 2^31, so blocks of 2^13 outputs stay below 2^52.
    c: three balanced 12-bit limbs, |limb| <= 2^11; |x_q| < 2^24, so k up to 2^17 stays below 2^52.
"""

import secrets
from collections.abc import Iterable

import numpy as np

from trusted_worker.arithmetic import F64, I8, I32, Y_LIMIT
from trusted_worker.secure_memory import Block, SecureMemory
from wire.errors import PreconditionError
from wire.linears import LinearSpec

PRIME = (1 << 32) + 15
S_BITS, S_LIMBS = 9, 4
C_BITS, C_LIMBS = 12, 3
OUTPUT_BLOCK = 1 << 13
INPUT_LIMIT = 1 << 17


def limbs(values: list[int], bits: int, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.int16]]:
    """Values in [0, P) as int16[count, len]: balanced digits of base 2^bits whose weighted sum is the value mod P."""
    rest = np.array(values, np.int64)
    rest[rest > PRIME // 2] -= PRIME
    out = np.empty((count, len(values)), np.int16)
    half, base = 1 << (bits - 1), 1 << bits
    for index in range(count):
        digit = ((rest + half) & (base - 1)) - half
        out[index] = digit
        rest = (rest - digit) >> bits
    return out


def combine(sums: F64, bits: int) -> list[int]:
    """float64[limbs, m] of exact integers below 2^53 -> the m weighted sums, modulo P."""
    residues = sums.astype(np.int64) % PRIME
    total = np.zeros(sums.shape[1], np.int64)
    for index in range(len(sums)):
        total += residues[index] * (1 << (bits * index)) % PRIME
    return [int(value) for value in total % PRIME]


class Verifier:
    """The secret s, and c for every linear, in the arena."""

    def __init__(self, memory: SecureMemory, specs: list[LinearSpec]) -> None:
        if max(spec.k for spec in specs) > INPUT_LIMIT:
            raise PreconditionError(f"linears of more than {INPUT_LIMIT} inputs cannot be verified exactly")
        self._s = memory.allocate("verification", (S_LIMBS, max(spec.n for spec in specs)), np.int16)
        self._c: dict[LinearSpec, Block] = {
            spec: memory.allocate("verification", (C_LIMBS, spec.k), np.int16) for spec in specs
        }
        self.draw()

    def draw(self) -> None:
        """A fresh s from the operating system's CSPRNG; every `prepare` must run again."""
        self._s.array[...] = limbs([secrets.randbelow(PRIME) for _ in range(self._s.array.shape[1])], S_BITS, S_LIMBS)

    def prepare(self, spec: LinearSpec, tiles: Iterable[tuple[int, I8]]) -> None:
        """c = W_q^T s mod P from the weights of one linear, (first row, int8[rows, k]) at a time."""
        sums = np.zeros((S_LIMBS, spec.k), np.float64)
        for first, tile in tiles:
            sums += self._s.array[:, first : first + len(tile)].astype(np.float64) @ tile.astype(np.float64)
        self._c[spec].array[...] = limbs(combine(sums, S_BITS), C_BITS, C_LIMBS)

    def accepts(self, spec: LinearSpec, x_q: I32, y_q: I32) -> bool:
        """Whether every row of y_q int32[m, n] is x_q . W_q^T and in range. Both checks always run; one verdict."""
        sums = self._c[spec].array.astype(np.float64) @ x_q.T.astype(np.float64)
        expected = combine(sums, C_BITS)
        sound = self._project(y_q) == expected
        in_range = int(y_q.max(initial=0)) < Y_LIMIT and int(y_q.min(initial=0)) > -Y_LIMIT
        return sound & in_range

    def _project(self, y_q: I32) -> list[int]:
        """s . y_q mod P for each row."""
        total = [0] * len(y_q)
        for start in range(0, y_q.shape[1], OUTPUT_BLOCK):
            block = y_q[:, start : start + OUTPUT_BLOCK]
            s = self._s.array[:, start : start + block.shape[1]].astype(np.float64)
            part = combine(s @ block.T.astype(np.float64), S_BITS)
            total = [(a + b) % PRIME for a, b in zip(total, part, strict=True)]
        return total
