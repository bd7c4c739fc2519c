"""One linear under a one-time pad, in one process: the arithmetic of secure-infer, written out once more.

Measurements see no internals, so this shares no code with the workers; it has their steps and their numbers. W_q are
int8 weights, P = 2^32 + 15. (0) Before: a secret s, c = W_q^T s modulo P; a pad r, u = r W_q^T modulo 2^32.
(1) x_q = round(x / s_x), as fine as |x_q| < 2^24 and a true product within (-2^30, 2^30) allow. (2) z = x_q + r.
(3) y' = z W_q^T modulo 2^32: the GPU worker's part. (4) y_q = y' - u. (5) s y_q = c x_q modulo P, and |y_q| < 2^30.
(6) y = y_q s_x s_w. Here r is made in the measured time, as it is in the trusted worker.
"""

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from Crypto.Cipher import AES

from wire.errors import PreconditionError, VerificationError
from wire.quantize import quantize_rows

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

PRIME = (1 << 32) + 15
LIMB, LIMBS = 9, 4  # bits and number: their products with y_q add up exactly in float64 for 16,000 outputs
PRODUCT_BOUND, INPUT_BOUND = float(1 << 30), float((1 << 24) - 1)


class MaskedLinear:
    """y = x W^T for one row, as both workers compute it together. Raises PreconditionError without numba."""

    def __init__(self, weight: F32) -> None:
        """`weight`: float32[n, k]."""
        self._weight, self._scale = quantize_rows(weight)
        self._matmul = _ring_product()
        self._longest = float(np.linalg.norm(self._weight.astype(np.float64), axis=1).max())
        secret = [secrets.randbelow(PRIME) for _ in range(len(weight))]
        self._sum = _limbs(secret)
        self._check = _limbs([_mod_prime(column) for column in (self._sum @ self._weight.astype(np.float64)).T])
        self._key, self._index = secrets.token_bytes(32), 0

    def pad(self) -> tuple[int, I32]:
        """A fresh pad: its index, and u = r W_q^T, int32[n]."""
        self._index += 1
        return self._index, self._matmul(self._random(self._index), self._weight)

    def product(self, x: F32, pad: tuple[int, I32]) -> F32:
        """float32[k] -> float32[n]. Raises VerificationError for a wrong product."""
        index, u = pad
        bound = min(self._longest * float(np.linalg.norm(x)), 127 * float(np.abs(x).sum())) * (1 + 1e-6)
        step = max(bound / PRODUCT_BOUND, float(np.abs(x).max()) / INPUT_BOUND)
        x_q = np.rint(x / step).astype(np.int32)  # (1)
        z = x_q + self._random(index)  # (2)
        y_q = self._matmul(z, self._weight) - u  # (3), (4)
        ours, theirs = _mod_prime(self._check @ x_q), _mod_prime(self._sum @ y_q)  # (5)
        if ours != theirs or max(int(y_q.max()), -int(y_q.min())) >= PRODUCT_BOUND:
            raise VerificationError
        return y_q * (self._scale * np.float32(step))  # (6)

    def _random(self, index: int) -> I32:
        """r of a pad, int32[k]."""
        cipher = AES.new(self._key, AES.MODE_CTR, nonce=index.to_bytes(12, "big"))
        return np.frombuffer(cipher.encrypt(bytes(4 * self._weight.shape[1])), np.int32)


def _limbs(numbers: list[int]) -> npt.NDArray[np.float64]:
    """Numbers modulo P as float64[LIMBS, count]."""
    mask = (1 << LIMB) - 1
    return np.array([[number >> LIMB * place & mask for number in numbers] for place in range(LIMBS)], np.float64)


def _mod_prime(sums: npt.NDArray[np.float64]) -> int:
    """The number whose limbs gave these sums, modulo P."""
    return sum(int(part) << LIMB * place for place, part in enumerate(sums)) % PRIME


def _ring_product() -> Callable[[I32, Any], I32]:
    """z W_q^T modulo 2^32 for one row, compiled."""
    try:
        import numba
    except ImportError:
        raise PreconditionError("--fhe needs numba for the product under a pad: pip install 'cleave[gpu]'") from None

    def product(z: Any, weight: Any) -> Any:
        y = np.empty(len(weight), np.int32)
        for row in range(len(weight)):
            total, line = np.int32(0), weight[row]
            for i in range(len(line)):
                total = np.int32(total + z[i] * np.int32(line[i]))
            y[row] = total
        return y

    compiled: Callable[[I32, Any], I32] = numba.njit(product)
    return compiled
