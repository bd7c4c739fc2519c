"""Broken on purpose: one-time pads on every linear, and attention left to the GPU worker.

Shaped after systems that mask linear layers and have the accelerator see q.k, or its softmax, in the clear, such as the
split of Amulet (arXiv 2512.07495), or the permuted non-linear steps of Centaur (2412.10652) and PermLLM (2405.18744).
All that secure-infer sends is as it was; the scores, or only the probabilities, of each prompt are added, as the GPU
worker would have them. Sequential matching must read the text from them alone.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Knowledge
from evaluation.attacks.parts import part
from evaluation.attacks.public_model import probabilities, scores
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array

F32 = npt.NDArray[np.float32]
Attention = Callable[[F32, F32, None], F32]  # q and k [1, t, heads, d], rotated -> [1, H, t, t]


def scores_on_gpu(views: Mapping[str, View], script: Script) -> View:
    """Places ("scores", layer), [t, H, t] of each prompt; a score that is not used is 0."""
    return _with("scores", lambda q, k, past: np.nan_to_num(scores(q, k, past), neginf=0.0), views, script)


def probabilities_on_gpu(views: Mapping[str, View], script: Script) -> View:
    """Places ("probabilities", layer), [t, H, t] of each prompt."""
    return _with("probabilities", probabilities, views, script)


def _with(name: str, attention: Attention, views: Mapping[str, View], script: Script) -> View:
    """secure-infer's view and one thing more, made of the true q and k that plain shows."""
    plain, known = views["plain"], script.knowledge
    layers = range(known.model.config.layers)

    def change(number: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        return rows | {(name, layer): _of(plain, known, attention, layer, number) for layer in layers}

    return views["secure-infer"].changed(change)


def _of(plain: View, known: Knowledge, attention: Attention, layer: int, number: int) -> F32:
    """Raises LookupError where plain does not show q and k."""
    q, k = (part(plain, known, what, layer, [number]) for what in ("q", "k"))
    if q is None or k is None:
        raise LookupError(f"plain shows no q and k of layer {layer}")
    turned = known.model.turned(layer, q, k, np.arange(len(q)))
    return np.moveaxis(attention(turned[0][None], turned[1][None], None)[0], 0, 1)
