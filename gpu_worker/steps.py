"""The order of a pass: Embed is number 0, then come three steps for each layer, and Head is the last.

Importing this file imports no torch.
"""

from collections.abc import Sequence

from wire.errors import InvalidArgumentError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb

MAX_STEPS = 4  # of one request
OF_A_LAYER = ("project_qkv", "attend", "finish_block")
TAKING = ("embed", "attend", "finish_block")  # the steps that take a tensor
GIVING = ("project_qkv", "attend", "head")  # and those that give one


def number(step: pb.Step, config: ModelConfig) -> int:
    """Where in a pass a step stands. Raises InvalidArgumentError for a step that the model does not have."""
    match step.WhichOneof("kind"):
        case "embed":
            return 0
        case "head":
            return 1 + 3 * config.layers
        case None:
            raise InvalidArgumentError("unknown step")
        case kind:
            layer: int = getattr(step, kind).layer
            if layer >= config.layers:
                raise InvalidArgumentError("layer out of range")
            return 1 + 3 * layer + OF_A_LAYER.index(kind)


def check(steps: Sequence[pb.Step], config: ModelConfig) -> None:
    """Raises InvalidArgumentError unless these steps follow each other, take a tensor and give one."""
    if not 1 <= len(steps) <= MAX_STEPS:
        raise InvalidArgumentError(f"a chain has 1 to {MAX_STEPS} steps")
    numbers = [number(step, config) for step in steps]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise InvalidArgumentError("the steps of a chain must follow each other as those of a pass do")
    if steps[0].WhichOneof("kind") not in TAKING:
        raise InvalidArgumentError("the first step of a chain must be Embed, Attend or FinishBlock")
    if steps[-1].WhichOneof("kind") not in GIVING:
        raise InvalidArgumentError("the last step of a chain must be ProjectQkv, Attend or Head")
