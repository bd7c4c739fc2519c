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


def crossed(transcript: Transcript) -> list[Array]:
    """One array [rows, width] of int32 or float32 for each place, its rows in their order."""
    found: dict[tuple[str, int, str], list[Array]] = defaultdict(list)
    for event in transcript.events:
        if isinstance(event, Exchange) and event.up.size and event.up.dtype.itemsize == 4:
            name, tensor = _name(event), event.up
        elif isinstance(event, Held):
            name, tensor = f"{event.name} {event.layer}", event.tensor
        else:
            continue
        rows = tensor.reshape(len(tensor), -1)
        found[name, rows.shape[1], rows.dtype.name].append(rows)
    return [np.concatenate(rows) for rows in found.values()]


def as_words(rows: Array) -> Words:
    """The same bits."""
    return np.ascontiguousarray(rows).view(np.uint32)


def recurring(keys: npt.NDArray[np.uint64], bits: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of places whose keys of so many bits agree, each with the next of its kind. One sort.

    Of 64 bits as many count as the number of a place leaves room for: the caller compares what was found.
    """
    numbered = max(len(keys) - 1, 1).bit_length()
    kept = min(bits, 64 - numbered)
    tagged = (keys >> np.uint64(bits - kept) << np.uint64(64 - kept)) | np.arange(len(keys), dtype=np.uint64)
    tagged.sort()
    same = np.flatnonzero(tagged[1:] >> np.uint64(64 - kept) == tagged[:-1] >> np.uint64(64 - kept))
    place = (tagged & np.uint64((1 << numbered) - 1)).astype(np.int64)
    return place[same], place[same + 1]


def _name(event: Exchange) -> str:
    kind = event.operation.WhichOneof("kind") or "nothing"
    if kind not in ("ring_matmul", "matmul"):
        return kind
    of = event.operation.ring_matmul if kind == "ring_matmul" else event.operation.matmul
    return f"{Linear(of.linear).name} {of.layer}"
