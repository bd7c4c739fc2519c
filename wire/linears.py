"""The offloaded linears of a decoder: sets of weight rows with one input.

q, k and v share a row of activations and so do gate and up. Which tensors of a checkpoint hold them: parameters.py.
"""

from dataclasses import dataclass
from enum import IntEnum

from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2


class Linear(IntEnum):
    """The linears by their number on the wire. LM_HEAD belongs to layer 0. Ungated models have no gate in GATE_UP."""

    QKV = gpu_worker_pb2.LINEAR_QKV
    O = gpu_worker_pb2.LINEAR_O  # noqa: E741  (the projection's standard name)
    GATE_UP = gpu_worker_pb2.LINEAR_GATE_UP
    DOWN = gpu_worker_pb2.LINEAR_DOWN
    LM_HEAD = gpu_worker_pb2.LINEAR_LM_HEAD

    @property
    def number(self) -> gpu_worker_pb2.Linear.ValueType:
        """The same number, as the generated stubs type it."""
        return self.value


LOOKUP_LAYER = 0xFFFF  # of the masked embedding lookup, which is the head turned around; no model has as many layers
BLOCK = (Linear.QKV, Linear.O, Linear.GATE_UP, Linear.DOWN)  # of one layer, in the order of a forward pass
PROJECTIONS = (Linear.QKV, Linear.O)  # those of attention


@dataclass(frozen=True)
class LinearSpec:
    """A linear of one layer: y[m, n] = x[m, k] . W[n, k]^T (+ bias[n])."""

    layer: int
    linear: Linear
    k: int
    n: int


def spec(config: ModelConfig, layer: int, linear: Linear) -> LinearSpec:
    """The shape of a linear."""
    match linear:
        case Linear.QKV:
            k, n = config.hidden, config.q_width + 2 * config.kv_width
        case Linear.O:
            k, n = config.q_width, config.hidden
        case Linear.GATE_UP:
            k, n = config.hidden, (2 if config.gated else 1) * config.ffn
        case Linear.DOWN:
            k, n = config.ffn, config.hidden
        case Linear.LM_HEAD:
            k, n = config.hidden, config.vocabulary
    return LinearSpec(layer, linear, k, n)


def all_specs(config: ModelConfig, without: tuple[Linear, ...] = ()) -> list[LinearSpec]:
    """Every linear of the model in the order of a forward pass, but for some kinds."""
    blocks = [spec(config, layer, linear) for layer in range(config.layers) for linear in BLOCK]
    return [one for one in [*blocks, spec(config, 0, Linear.LM_HEAD)] if one.linear not in without]


def kinds(config: ModelConfig) -> list[LinearSpec]:
    """One linear of each kind: sizes are the same in every layer."""
    return [spec(config, 0, linear) for linear in Linear]


def lookup_spec(config: ModelConfig) -> LinearSpec:
    """The embedding table as a product of one-hot rows: y[m, hidden] = z[m, vocabulary] . E. Never RING_MATMUL."""
    return LinearSpec(LOOKUP_LAYER, Linear.LM_HEAD, config.vocabulary, config.hidden)
