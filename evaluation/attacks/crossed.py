"""All words that a GPU worker was sent or held, place by place: what attacks on the masks themselves read.

A place is one linear of one layer, one kind of operation, or one tensor of a pass. Every element is a 32-bit word: of
the ring, or of a float32.
"""

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from evaluation.transcript import Array, Exchange, Held, Transcript
from wire.linears import Linear

Words = npt.NDArray[np.uint32]


def crossed(transcript: Transcript) -> dict[str, list[Array]]:
    """Tensors [rows, width] of int32 or float32 by place, in their order."""
    found: dict[str, list[Array]] = defaultdict(list)
    for event in transcript.events:
        if isinstance(event, Exchange) and event.up.size and event.up.dtype.itemsize == 4:
            found[_name(event)].append(_rows(event.up))
        elif isinstance(event, Held):
            found[f"{event.name}, layer {event.layer}"].append(_rows(event.tensor))
    return dict(found)


def words(tensors: list[Array]) -> list[Words]:
    """The same, as words uint32[rows, width]."""
    return [np.ascontiguousarray(one).view(np.uint32) for one in tensors]


def _name(event: Exchange) -> str:
    kind = event.operation.WhichOneof("kind") or "nothing"
    if kind not in ("ring_matmul", "matmul"):
        return kind
    of = event.operation.ring_matmul if kind == "ring_matmul" else event.operation.matmul
    return f"{Linear(of.linear).name.lower()}, layer {of.layer}"


def _rows(tensor: Array) -> Array:
    """[rows, ...] -> [rows, width]; a list of ids is one row."""
    return tensor[None] if tensor.ndim == 1 else tensor.reshape(len(tensor), -1)
