"""Small transcripts of a tiny model, made by the attacker's own forward pass: in the clear, and of uniform words."""

from collections.abc import Callable, Iterator

import numpy as np

from evaluation.attacks.knowledge import Ints
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage.prompts import Script, Sizes, script
from evaluation.transcript import Array, Event, Exchange, Transcript
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

SIZES = Sizes(
    known=12,
    victims=8,
    again=8,
    told=2,
    labelled=6,
    unlabelled=30,
    known_tokens=5,
    victim_tokens=8,
    repeated_tokens=40,
    metered=8,
)
X_LIMIT = 1 << 20
Change = Callable[[Array], Array]


def said(model: PublicModel, seed: int = 3) -> Script:
    return script(model, SIZES, seed)


def clear(model: PublicModel, script: Script) -> View:
    """As under split: integers at a scale of each row's own."""
    return _view(model, script, lambda x: x)


def masked(model: PublicModel, script: Script, seed: int = 11) -> View:
    """As under secure-infer: every word is uniform."""
    rng = np.random.default_rng(seed)

    def words(x: Array) -> Array:
        return rng.integers(-(1 << 31), 1 << 31, x.shape).astype(np.int32)

    return _view(model, script, words)


def _view(model: PublicModel, script: Script, change: Change) -> View:
    events = [event for prompt in script.prompts for event in _events(model, prompt, change)]
    return View.of(Transcript(tuple(events)), script.knowledge.lengths)


def _events(model: PublicModel, prompt: Ints, change: Change) -> Iterator[Event]:
    for number, layer in enumerate(model.run(prompt[None])):
        x = _integers(layer.input[0])
        y = x @ model.weight(number, Linear.QKV).T / model.scales(number, Linear.QKV)
        yield _exchange(number, Linear.QKV, change(x), change(np.rint(y).astype(np.int32)))
    yield _exchange(0, Linear.LM_HEAD, change(x[-1:]), change(x[-1:]))


def _integers(x: Array) -> Array:
    result: Array = np.rint(x * (X_LIMIT / np.abs(x).max(axis=1, keepdims=True))).astype(np.int32)
    return result


def _exchange(layer: int, linear: Linear, up: Array, down: Array) -> Exchange:
    operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=layer, linear=linear.number))
    return Exchange(operation, up, down)
