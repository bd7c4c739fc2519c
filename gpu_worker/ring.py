"""Ring products of a loaded model: the only operations that a protected deployment asks for.

The answer has the same bits on every device: an exact product modulo 2^32.
"""

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.kernels import cpu, cuda
from gpu_worker.weights import Int8Weights, ParameterSet
from wire.errors import PreconditionError
from wire.linears import Linear, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, weight_name


class Ring:
    """Answers z.W_q^T for every linear of an int8 model, and z.E_q for its embedding table."""

    def __init__(self, config: ModelConfig, parameters: ParameterSet) -> None:
        self._config = config
        self._parameters = parameters

    def product(self, layer: int, linear: Linear, z: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """z int32[m, k] -> int32[m, n] modulo 2^32. The caller has checked layer, linear and shape."""
        w = self._find(weight_name(self._config, spec(self._config, layer, linear)))
        if w.device.type == "cpu":
            return cpu.matmul(z, w.numpy())
        return cuda.ring_matmul(torch.from_numpy(z).to(w.device), w).cpu().numpy()

    def lookup(self, z: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """z int32[m, vocabulary] -> int32[m, hidden] modulo 2^32. The caller has checked the shape."""
        table = self._find(Name(Kind.EMBEDDING))
        if table.device.type == "cpu":
            return cpu.lookup(z, table.numpy())
        return cuda.ring_lookup(torch.from_numpy(z).to(table.device), table).cpu().numpy()

    def _find(self, name: Name) -> torch.Tensor:
        weights = self._parameters.find(name)
        if not isinstance(weights, Int8Weights):
            raise PreconditionError("ring products need a model that is loaded as int8")
        return weights.quantised
