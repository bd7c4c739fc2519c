"""`cleave-bench --fhe`: one linear under CKKS, which keeps a secret without a TEE, beside one under a one-time pad.

The linear is the output projection of attention of the model's first layer, with one row of random activations. CKKS is
TenSEAL's product of an encrypted vector and a clear matrix (https://github.com/OpenMined/TenSEAL), at the smallest
parameters of 128 bits of security (homomorphicencryption.org's table) whose slots hold the row twice, as that product
needs: one multiplication deep, no bootstrapping, keys made beforehand. What CKKS takes for the rest of a layer is left
out; so is transport, whose bytes are printed. Ways take turns; of a round counts the fastest of many, but for CKKS.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploy.local.child import Progress
from evaluation.masked import F32, MaskedLinear
from wire.checkpoint import Checkpoint
from wire.errors import ExhaustedError, PreconditionError
from wire.linears import Linear, spec
from wire.model_config import ModelConfig
from wire.parameters import parameters, read, weight_name

PARAMETERS = {  # degree: bits of the moduli (at most 109, 218, 438 in all), bits of the scale
    4096: ([38, 30, 38], 30),
    8192: ([60, 40, 60], 40),
    16384: ([60, 40, 60], 40),
}
SECURITY = 128
QUICK = 50  # products of a round, where they take no time
CLEAR, PADDED, MAKING, CKKS = "in the clear, float32", "one-time pad, in stock", "one-time pad, made as well", "CKKS"


class Encrypted:
    """TenSEAL's product of an encrypted row with a matrix. Raises PreconditionError without it."""

    def __init__(self, weight: F32) -> None:
        try:
            import tenseal
        except ImportError:
            raise PreconditionError("--fhe needs TenSEAL: pip install 'cleave[fhe]'") from None
        self.degree = degree_for(weight.shape[1])
        self.bits, self.scale_bits = PARAMETERS[self.degree]
        started = time.perf_counter()
        self._context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=self.degree, coeff_mod_bit_sizes=self.bits
        )
        self._context.global_scale = 2**self.scale_bits
        self._context.generate_galois_keys()
        self.key_seconds = time.perf_counter() - started
        self._tenseal, self._columns = tenseal, weight.T.tolist()
        self.bytes_up = self.bytes_down = 0
        self.version: str = tenseal.__version__

    def product(self, x: F32) -> F32:
        """float32[k] -> float32[n]; encrypts, multiplies, decrypts."""
        encrypted = self._tenseal.ckks_vector(self._context, x.tolist())
        product = encrypted.matmul(self._columns)
        y = np.array(product.decrypt(), np.float32)
        self.bytes_up = self.bytes_up or len(encrypted.serialize())
        self.bytes_down = self.bytes_down or len(product.serialize())
        return y


def degree_for(inputs: int) -> int:
    """Of the polynomials, for rows of so many values. Raises ExhaustedError for rows that are too wide."""
    found = next((degree for degree in PARAMETERS if degree // 2 >= 2 * inputs), None)
    if found is None:
        raise ExhaustedError(f"--fhe takes rows of {max(PARAMETERS) // 4} values at most; this model has {inputs}")
    return found


def measure(folder: Path, repeat: int, progress: Progress) -> dict[str, Any]:
    """Times, errors and sizes of all ways. Raises PreconditionError, ExhaustedError."""
    weight = first_projection(folder)
    encrypted, masked = Encrypted(weight), MaskedLinear(weight)
    x = np.random.default_rng(0).standard_normal((weight.shape[1],), np.float32)
    exact = np.matmul(weight, x, dtype=np.float64)
    pads = [masked.pad()]
    ways: dict[str, Callable[[], F32]] = {
        CLEAR: lambda: np.matmul(weight, x),
        PADDED: lambda: masked.product(x, pads.pop()),
        MAKING: lambda: masked.product(x, masked.pad()),
        CKKS: lambda: encrypted.product(x),
    }
    errors = {way: float(np.abs(run() - exact).max() / np.abs(exact).max()) for way, run in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeat):
        progress(f"round {number + 1} of {repeat}, of {CKKS} and a one-time pad", 0)
        pads += [masked.pad() for _ in range(QUICK)]
        for way, run in ways.items():
            times[way].append(_seconds(run, 1 if way == CKKS else QUICK))
    seconds = {way: statistics.median(taken) for way, taken in times.items()}
    n, k = weight.shape
    sizes = {PADDED: (4 * k, 4 * n), MAKING: (4 * k, 4 * n), CKKS: (encrypted.bytes_up, encrypted.bytes_down)}
    return {
        "inputs": k,
        "outputs": n,
        "ways": [_way(way, seconds, errors[way], sizes.get(way, (0, 0))) for way in seconds],
        "ckks_of_masked": seconds[CKKS] / seconds[PADDED],
        "ckks": _parameters(encrypted),
    }


def first_projection(folder: Path) -> F32:
    """The model's first output projection of attention, float32[n, k]."""
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    try:
        return read(checkpoint, parameters(config)[weight_name(config, spec(config, 0, Linear.O))])
    finally:
        checkpoint.close()


def _seconds(run: Callable[[], F32], count: int) -> float:
    """Of the fastest of some."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def _way(way: str, seconds: dict[str, float], error: float, sizes: tuple[int, int]) -> dict[str, Any]:
    figures = {"seconds": seconds[way], "of_clear": seconds[way] / seconds[CLEAR], "error": error}
    return {"way": way, **figures, "bytes_up": sizes[0], "bytes_down": sizes[1]}


def _parameters(encrypted: Encrypted) -> dict[str, Any]:
    return {
        "degree": encrypted.degree,
        "modulus_bits": encrypted.bits,
        "scale_bits": encrypted.scale_bits,
        "bits_of_security": SECURITY,
        "tenseal": encrypted.version,
        "threads": os.cpu_count(),
        "key_seconds": encrypted.key_seconds,
    }
