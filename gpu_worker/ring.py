"""Ring products of a loaded model: the only operations that a protected deployment asks for.

The answer has the same bits on every device: an exact product modulo 2^32.
"""

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.kernels import cpu, cuda
from gpu_worker.weights import Int8Weights, ParameterSet
from wire.errors import PreconditionError
from wire.linears import Linear, kinds, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, weight_name


class Ring:
    """Answers z.W_q^T for every linear of an int8 model, and z.E_q for its embedding table."""

    def __init__(self, config: ModelConfig, parameters: ParameterSet, device: str) -> None:
        self._config = config
        self._parameters = parameters
        self._products = None if device == "cpu" else cuda.products(device)

    @property
    def kernel(self) -> str:
        """What computes, for the log."""
        return "numba" if self._products is None else self._products.name

    def warm_up(self) -> None:
        """Compile what a device needs: a first call would wait for it."""
        if self._products is not None:
            for of in kinds(self._config):
                self._products.warm_up(self._find(weight_name(self._config, of)))
            self._products.warm_up(self._find(Name(Kind.EMBEDDING)).t())

    def product(self, layer: int, linear: Linear, z: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """z int32[m, k] -> int32[m, n] modulo 2^32. The caller has checked layer, linear and shape."""
        w = self._find(weight_name(self._config, spec(self._config, layer, linear)))
        return cpu.matmul(z, w.numpy()) if self._products is None else self._products.matmul(z, w)

    def lookup(self, z: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """z int32[m, vocabulary] -> int32[m, hidden] modulo 2^32. The caller has checked the shape."""
        table = self._find(Name(Kind.EMBEDDING))
        return cpu.lookup(z, table.numpy()) if self._products is None else self._products.lookup(z, table)

    def _find(self, name: Name) -> torch.Tensor:
        weights = self._parameters.find(name)
        if not isinstance(weights, Int8Weights):
            raise PreconditionError("ring products need a model that is loaded as int8")
        return weights.quantised
