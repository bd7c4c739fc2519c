"""Ring products of a loaded model: the only operations that a protected deployment asks for.

The answer has the same bits on every device: an exact product modulo 2^32.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.kernels import cpu, cuda
from gpu_worker.weights import Int8Weights
from wire.linears import Linear


class Ring:
    """Answers z.W_q^T for every linear of an int8 model."""

    def __init__(self, weights: Mapping[tuple[int, Linear], Int8Weights]) -> None:
        self._weights = weights

    def product(self, layer: int, linear: Linear, z: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """z int32[m, k] -> int32[m, n] modulo 2^32. The caller has checked layer, linear and shape."""
        w = self._weights[layer, linear].quantised
        if w.device.type == "cpu":
            return cpu.matmul(z, w.numpy())
        return cuda.ring_matmul(torch.from_numpy(z).to(w.device), w).cpu().numpy()
