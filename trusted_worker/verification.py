"""Step 5 of secure-infer: Freivalds' check modulo the prime P = 2^32 + 15, row by row, on the recovered integers.

For a secret s of n uniform 32-bit words and c = W_q^T s mod P, computed inside from our own weights, a right row has
s.y_q = c.x_q (mod P). A wrong one differs from it by d != 0, whose entries are below 2^32 < P in magnitude. Take one
that is not 0: whatever the rest of s, at most one residue of its s_j gives s.d = 0, and s_j is uniform on 2^32 of them,
all different. So a wrong row passes with probability at most 2^-32, and after Q failed attempts at most Q / 2^32. One s
serves every linear: what the worker learns from an accepted row is nothing, and from a rejected row one excluded
hyperplane; s is redrawn after a rejection, before the worker is trusted again.

s is not stored: it is the AES-256-CTR key stream of a key from the CSPRNG, expanded SUM_BLOCK outputs at a time; only
the first block is kept. c is kept as integers.

Exactness: all sums are float64 BLAS on integers with every partial sum below 2^53.
    s: four bytes; |y_q| <= 2^31, so blocks of 2^13 outputs stay below 2^52. Blocks are summed in int64.
    c: three balanced 12-bit limbs, |limb| <= 2^11; |x_q| < 2^24, so blocks of 2^13 inputs stay below 2^48.
"""

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F64, I8, I32, Y_LIMIT, exact_lookup, exact_product
from trusted_worker.key_stream import BLOCK_BYTES, NONCE_BYTES, KeyStream
from trusted_worker.secure_memory import Block, Scratch, SecureMemory
from wire.errors import PreconditionError
from wire.linears import LinearSpec
from wire.scratch import CHECK_LIMBS, SUM_BLOCK, SUM_LIMBS, WORK

PRIME = (1 << 32) + 15
S_BITS, C_BITS = 8, 12  # of a limb
COLUMNS = 1 << 10  # of c that are made at a time
SIZE_LIMIT = 1 << 24  # inputs or outputs of a linear: sums of blocks stay below 2^63
TABLE_LIMIT = 127  # |elements| of a row of the embedding table

I64 = npt.NDArray[np.int64]
Digits = npt.NDArray[np.uint8] | npt.NDArray[np.int16]  # [limbs, width]


class Verifier:
    """The secret s, and c for every linear. `vocabulary`: rows of the embedding table, when lookups are verified."""

    def __init__(self, memory: SecureMemory, specs: list[LinearSpec], vocabulary: int = 0) -> None:
        widest = max(spec.n for spec in specs)
        if max(widest, *(spec.k for spec in specs)) > SIZE_LIMIT:
            raise PreconditionError(f"linears of more than {SIZE_LIMIT} inputs or outputs cannot be verified exactly")
        self._s = memory.allocate("verification", (SUM_LIMBS, min(SUM_BLOCK, widest)), np.uint8)
        self._c: dict[LinearSpec, Block] = {
            spec: memory.allocate("verification", (CHECK_LIMBS, spec.k), np.int16) for spec in specs
        }
        self._table: npt.NDArray[np.int16] = np.empty((CHECK_LIMBS, 0), np.int16)
        if vocabulary:
            self._table = memory.allocate("verification", (CHECK_LIMBS, vocabulary), np.int16).array
        self.draw()

    def draw(self) -> None:
        """A fresh s from the operating system's CSPRNG; every `prepare` must run again."""
        self._stream = KeyStream(secrets.token_bytes(32))
        self._expand(0, self._s.array)

    def prepare(self, spec: LinearSpec, tiles: Iterable[tuple[int, I8]], scratch: Scratch) -> None:
        """c = W_q^T s mod P from the weights of one linear, (first row, int8[rows, k]) at a time."""
        with scratch.frame():
            sums: I64 = scratch.empty((SUM_LIMBS, spec.k), np.int64)
            part: I32 = scratch.empty(sums.shape, np.int32)
            sums[...] = 0
            for first, tile in tiles:
                with scratch.frame():
                    for start, digits in self._secret(first, first + len(tile), scratch):
                        rows = tile[start - first : start - first + digits.shape[1]]
                        exact_lookup(digits, [(0, rows)], part, scratch)  # below 2^8 * 2^7 * 2^13: nothing wraps
                        sums += part
            store(sums, self._c[spec].array)

    def prepare_lookup(self, tiles: Iterable[tuple[int, I8]], scratch: Scratch) -> None:
        """c' = E_q s mod P, one residue for each row of the table: (first row, int8[rows, hidden]) at a time."""
        for first, tile in tiles:
            with scratch.frame():
                wide: F64 = scratch.empty((SUM_LIMBS, tile.shape[1]), np.float64)
                for start, digits in self._secret(0, tile.shape[1], scratch):
                    wide[:, start : start + digits.shape[1]] = digits
                sums: I32 = scratch.empty((SUM_LIMBS, len(tile)), np.int32)
                exact_product(wide, [(0, tile)], sums, scratch)  # below 2^8 * 2^7 * 2^16: nothing wraps
                store(sums, self._table[:, first : first + len(tile)])

    def expect(self, spec: LinearSpec, x_q: I32, scratch: Scratch) -> list[int]:
        """c . x_q mod P of every row: what s . y_q must be. Needs no answer, so it is made before one."""
        c = self._c[spec].array
        parts = ((at, c[:, at : at + SUM_BLOCK]) for at in range(0, spec.k, SUM_BLOCK))
        return residues(dots(parts, x_q, CHECK_LIMBS, scratch), C_BITS)

    def expect_lookup(self, ids: I32) -> list[int]:
        """The same for the rows of the table that ids int32[m] name."""
        return residues(self._table[:, ids], C_BITS)

    def accepts(self, expected: list[int], y_q: I32, scratch: Scratch, limit: int = Y_LIMIT - 1) -> bool:
        """Whether every row of y_q int32[m, n] is as expected, and no |element| above the limit: TABLE_LIMIT for rows
        of the table. Both checks always run; one verdict.
        """
        with scratch.frame():
            sums = dots(self._secret(0, y_q.shape[1], scratch), y_q, SUM_LIMBS, scratch)
        sound = residues(sums, S_BITS) == expected
        in_range = int(y_q.max(initial=0)) <= limit and int(y_q.min(initial=0)) >= -limit
        return sound & in_range

    def _secret(self, start: int, stop: int, scratch: Scratch) -> Iterator[tuple[int, Digits]]:
        """s from output `start` to `stop`: (first output, its bytes uint8[4, outputs]), no part across blocks."""
        buffer = scratch.empty(self._s.array.shape, np.uint8) if stop > SUM_BLOCK else None
        while start < stop:
            block, offset = divmod(start, SUM_BLOCK)
            end = min(stop, (block + 1) * SUM_BLOCK)
            digits = self._s.array if buffer is None or not block else self._expand(block, buffer)
            yield start, digits[:, offset : offset + end - start]
            start = end

    def _expand(self, block: int, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The bytes of s_j for the outputs of one block, the lowest of all of them first."""
        self._stream.write(bytes(NONCE_BYTES), out, block * (SUM_LIMBS * SUM_BLOCK // BLOCK_BYTES))
        return out


def dots(parts: Iterable[tuple[int, Digits]], values: I32, limbs: int, scratch: Scratch) -> I64:
    """digits . values^T as int64[limbs, m], from (first column, digits[limbs, at most SUM_BLOCK]) and int32[m, n]."""
    sums: I64 = np.zeros((limbs, len(values)), np.int64)
    for first, digits in parts:
        width = digits.shape[1]
        block = max(1, WORK // width)
        with scratch.frame():
            work: F64 = scratch.empty((limbs + min(block, len(values)), width), np.float64)
            wide, copy = work[:limbs], work[limbs:]
            np.copyto(wide, digits)
            for top in range(0, len(values), block):
                rows = values[top : top + block, first : first + width]
                part = copy[: len(rows)]
                np.copyto(part, rows)
                sums[:, top : top + block] += np.matmul(wide, part.T).astype(np.int64)
    return sums


def residues(sums: npt.NDArray[Any], bits: int) -> list[int]:
    """What limbs of so many bits, integers [limbs, m], stand for modulo P: one integer for each row."""
    return [sum(limb << bits * i for i, limb in enumerate(row)) % PRIME for row in sums.T.tolist()]


def combine(sums: npt.NDArray[Any], weights: I64) -> I64:
    """Integers [limbs, m] -> their sums weighted by |int64[limbs, 1]| <= 2^24, int64[m] in [0, P)."""
    residues = sums.astype(np.int64, copy=False) % PRIME
    total: I64 = (residues * weights).sum(axis=0) % PRIME  # below 2^33 * 2^24 * 4
    return total


def store(sums: npt.NDArray[Any], out: npt.NDArray[np.int16]) -> None:
    """Byte-weighted sums [SUM_LIMBS, k] modulo P into int16[CHECK_LIMBS, k]: balanced digits of base 2^C_BITS."""
    half, base, weights = 1 << (C_BITS - 1), 1 << C_BITS, powers(S_BITS, SUM_LIMBS)
    for start in range(0, out.shape[1], COLUMNS):
        rest = combine(sums[:, start : start + COLUMNS], weights)
        rest[rest > PRIME // 2] -= PRIME
        for limb in out[:, start : start + COLUMNS]:
            limb[...] = (rest + half) % base - half
            rest = (rest - limb) >> C_BITS


def powers(bits: int, limbs: int) -> I64:
    """What limbs of so many bits stand for, int64[limbs, 1]."""
    return 1 << np.arange(0, bits * limbs, bits)[:, None]
