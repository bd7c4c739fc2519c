"""What the GPU worker sees of this gateway's chats, for a person to look at: /v1/exposure.

What is seen: the end of the GPU worker's own recording, and the tokens of the latest answer, which this process holds
anyway. What is learnt: under secure-infer uniform words; beside them, computed here and sent to nobody, the words that
`split` would send for the same tokens, which name every one of them. What breaks it: nothing to break; who may ask the
gateway for an answer may ask for this.

The recording does not tell which token a row belongs to; both sides are the last ones there are, so they are the same
tokens while one client talks and there are pads for every token.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.gateway import recording
from client.gateway.errors import INVALID, ApiError
from client.gateway.generation import End, Event, Model
from client.gateway.layer_zero import LayerZero
from client.gateway.requests import Order
from wire.errors import CheckpointError
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

ROWS = 32  # of the comparison
WORDS = 24  # of its last row, and
FIRST_WORDS = 3  # of each exchange, that are told one by one
EXCHANGES = 8
NO_RECORDING = (
    "There is no recording of what the GPU worker sees. `make gateway` makes one, or `cleave gateway --record` with a "
    "cluster of its own; a GPU worker elsewhere is not this gateway's to record."
)

_WHY = {  # there are no rows to compare
    "tee-only": "Under tee-only there is no GPU worker: nobody sees anything.",
    "plain": "Under plain the GPU worker gets the tokens themselves, and runs the whole model.",
    "kv-shield": "Under kv-shield the GPU worker gets the tokens themselves; only its cache is permuted.",
}


class Trail:
    """The tokens of one answer, in the order in which they enter the model."""

    def __init__(self, order: Order | None = None) -> None:
        self._order = order
        self._answer: list[int] = []

    def add(self, event: Event) -> None:
        """What came out of the model. The last token of an answer that was cut off did not enter it again."""
        self._answer += [token.token_id for token in event.tokens]
        if isinstance(event, End) and event.reason != "eos":
            del self._answer[-1:]

    def last(self, count: int, model: Model) -> list[int]:
        """At most the last `count` tokens, those of the prompt included."""
        prompt = self._order.tokens(model.tokenizer) if self._order else []
        return [*prompt, *self._answer][-count:]


class Exposure:
    """`folder`: the recording; None: there is none, and nothing is kept. `read` may run in any thread."""

    def __init__(self, model: Model, folder: Path | None = None) -> None:
        self._model, self._folder = model, folder
        self._trail = Trail()
        self._lock = threading.Lock()
        self._layer_zero: LayerZero | None = None

    def begin(self, order: Order) -> Trail:
        """For the tokens of an answer that begins: the latest one is shown."""
        trail = Trail(order)
        if self._folder is not None:
            self._trail = trail
        return trail

    def read(self) -> dict[str, Any]:
        """The JSON of /v1/exposure. Raises ApiError when there is no recording."""
        if self._folder is None:
            raise ApiError(404, NO_RECORDING, INVALID, "no_recording")
        with self._lock:  # one at a time: each costs a look at the whole embedding table
            return self._read(self._folder)

    def _read(self, folder: Path) -> dict[str, Any]:
        base = self._model.base
        exchanges = [_exchange(sent) for sent in recording.last(folder, EXCHANGES)]
        told = {"scheme": base.scheme, "precision": base.precision, "exchanges": exchanges}
        try:
            recorded, computed = self._compare(folder)
        except CheckpointError as error:
            return told | {"recorded": None, "computed": None, "why": f"This model is not compared: {error}."}
        why = _WHY.get(base.scheme) if recorded is None else None
        return told | {"recorded": recorded, "computed": computed, "why": why}

    def _compare(self, folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The last rows that entered layer 0 as they were sent, and as `split` sends them."""
        base = self._model.base
        if base.model_folder is None:
            raise CheckpointError("its folder is not known")
        self._layer_zero = self._layer_zero or LayerZero(base.model_folder, base.precision)
        rows = recording.last_rows(folder, _layer_zero(base.precision), ROWS)
        if rows is None:
            return None, None
        token_ids = self._trail.last(len(rows), self._model)
        rows = rows[-len(token_ids) :]  # all, where there are no tokens
        sent = self._layer_zero.sent(token_ids) if token_ids else rows[:0]
        nearest = self._layer_zero.nearest(np.concatenate([rows, sent]))
        recorded, computed = nearest[: len(rows)], nearest[len(rows) :]
        return self._words(rows, recorded), self._words(sent, computed) if token_ids else None

    def _words(self, rows: npt.NDArray[Any], nearest: Sequence[int]) -> dict[str, Any]:
        words = np.ascontiguousarray(rows).view(np.uint32)
        return {
            "rows": len(rows),
            "words": words.size,
            "first": _hexadecimal(words[-1, :WORDS]),
            "top_bytes": np.bincount((words >> 24).ravel(), minlength=256).tolist(),
            "reading": [self._model.tokenizer.spelling(token_id) for token_id in nearest],
        }


def _layer_zero(precision: str) -> pb.Operation:
    if precision == "int8":
        return pb.Operation(ring_matmul=pb.RingMatmul(layer=0, linear=Linear.QKV.number))
    return pb.Operation(matmul=pb.Matmul(layer=0, linear=Linear.QKV.number))


def _exchange(sent: recording.Sent) -> dict[str, Any]:
    content = sent.up.read(4 * FIRST_WORDS)
    return {
        "product": _product(sent.operation),
        "rows": sent.up.shape[0] if sent.up.shape else 1,
        "bytes_up": sent.up.size,
        "bytes_down": sent.bytes_down,
        "first": _hexadecimal(np.frombuffer(content[: len(content) // 4 * 4], np.uint32)),
    }


def _product(operation: pb.Operation) -> str:
    kind = operation.WhichOneof("kind") or "nothing"
    if kind not in ("ring_matmul", "matmul"):
        return kind
    of = getattr(operation, kind)
    name = Linear(of.linear).name.lower() if of.linear in Linear.__members__.values() else str(of.linear)
    return name if of.linear == Linear.LM_HEAD else f"layer {of.layer}, {name}"


def _hexadecimal(words: npt.NDArray[np.uint32]) -> list[str]:
    return [f"{word:08x}" for word in words.tolist()]
