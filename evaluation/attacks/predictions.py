"""What the public model would show at the next place of a text, for each word that could stand there.

One table per place, of as many rows as there are candidates; it serves every scheme, so it is kept.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import unit
from evaluation.attacks.public_model import Layer, Past, PublicModel, scores

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Place = tuple[str, int]  # form and layer
NAMES = {"input": "hidden", "k": "K", "v": "V"}


@dataclass(frozen=True)
class Predicted:
    """For C candidates behind T tokens, by layer; H query heads."""

    rows: dict[Place, F16]  # [C, width], length 1: see `forms`
    scores: dict[int, F32]  # [C, H, T + 1]


def predict(model: PublicModel, text: Ids, candidates: Ids, layers: tuple[int, ...]) -> Predicted:
    """Behind `text` [T] each of `candidates` [C]. Layer 0 has scores only: its rows do not depend on the text."""
    past = model.past(text)
    held = model.run(candidates[:, None], past, max(layers) + 1)
    rows = {
        (name, layer): values.astype(np.float16)
        for layer in layers
        if layer
        for name, values in forms(_parts(held[layer])).items()
    }
    return Predicted(rows, {layer: _scores(held[layer], past, layer) for layer in layers})


@lru_cache(maxsize=512)
def kept(model: PublicModel, text: tuple[int, ...], candidates: bytes, layers: tuple[int, ...]) -> Predicted:
    """The same, computed once. `candidates`: bytes of int64."""
    return predict(model, np.array(text, np.int64), np.frombuffer(candidates, np.int64), layers)


def forms(parts: dict[str, F32]) -> dict[str, F32]:
    """What is compared, [rows, width] of length 1: `input` itself and its sorted values; of k and v sorted heads.

    Sorted values stay when the dims (of a head) are permuted, whichever way; the length 1 makes a row's scale void.
    """
    found = {f"sorted {NAMES[what]}": unit(_sorted(rows)) for what, rows in parts.items()}
    return found | ({"hidden": unit(parts["input"])} if "input" in parts else {})


def _sorted(rows: F32) -> F32:
    return np.sort(rows, axis=-1).reshape(len(rows), -1)


def _parts(layer: Layer) -> dict[str, F32]:
    return {"input": layer.input[:, 0], "k": layer.k[:, 0], "v": layer.v[:, 0]}


def _scores(held: Layer, past: Past, layer: int) -> F32:
    return scores(held.q_rotated, held.k_rotated, (past.keys[layer], past.values[layer]))[:, :, 0]
