"""Views of nothing but ring products, made of rows that a test chose."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evaluation.attacks import fixed_point
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage import prompts
from evaluation.leakage.prompts import Script
from evaluation.transcript import Exchange, Transcript
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

I32 = npt.NDArray[np.int32]
SIZES = prompts.Sizes(
    known=24,
    victims=8,
    again=4,
    told=1,
    labelled=4,
    unlabelled=4,
    known_tokens=8,
    victim_tokens=12,
    repeated_tokens=40,
    metered=2,
)


def tiny_script(folder: Path) -> Script:
    return prompts.script(PublicModel(folder), SIZES, 0)


def exchange(up: npt.NDArray[np.generic], layer: int = 0, linear: Linear = Linear.QKV) -> Exchange:
    operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=layer, linear=linear.number))
    return Exchange(operation, up, np.zeros((0, 0), np.int32))


def clear(script: Script) -> list[I32]:
    """x_q of layer 0's input, prompt by prompt, as split sends it."""
    table = fixed_point.vocabulary(script.knowledge.model)
    return [table[prompt] for prompt in script.prompts]


def view(script: Script, mask: Callable[[I32], npt.NDArray[np.generic]]) -> View:
    """Those rows under a mask."""
    events = tuple(exchange(mask(x_q)) for x_q in clear(script))
    return View.of(Transcript(events), script.knowledge.lengths)


def one_time_pad(seed: int) -> Callable[[I32], I32]:
    rng = np.random.default_rng(seed)
    return lambda x_q: x_q + uniform(rng, *x_q.shape)


def uniform(rng: np.random.Generator, rows: int, width: int) -> I32:
    return rng.integers(0, 1 << 32, (rows, width), np.uint32).view(np.int32)
