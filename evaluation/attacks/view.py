"""A transcript as rows: everything that went into and came out of each place of the model, prompt by prompt.

Rows per call are always visible. A call of many rows is a prompt's; single rows, an answer's, are left out here. How
long the prompts were, and in which order they came, is therefore the attacker's to see.

Names of what may be had, by layer: of ring products and of split `input` and `qkv`, `attention` and `o`, `ffn_input`
and `gate_up`, `ffn_inner` and `down` (what enters and what leaves each linear); of a worker that runs whole layers
`residual`, `qk`, `v`, `attention`, and `qk_returned`, q beside k as the trusted worker sent them back; and `cache_k`,
`cache_v`. Arrays are as they crossed: int32 words, or float32.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.transcript import Array, Cache, Exchange, Held, Transcript
from wire.linears import Linear

PLACES = {
    Linear.QKV: ("input", "qkv"),
    Linear.O: ("attention", "o"),
    Linear.GATE_UP: ("ffn_input", "gate_up"),
    Linear.DOWN: ("ffn_inner", "down"),
}
CACHED = ("cache_k", "cache_v", "wiped_k", "wiped_v")
Place = tuple[str, int]  # name and layer
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """What there is: for each place one array [rows, ...] per prompt. `transcript` has the rest."""

    transcript: Transcript
    prompts: tuple[dict[Place, Array], ...]

    @classmethod
    def of(cls, transcript: Transcript, lengths: Sequence[int]) -> "View":
        """Prompts of so many rows, one after the other. A place that has not a row for each is left out."""
        cut = {place: _cut(place[0], found, lengths) for place, found in _rows(transcript).items()}
        whole = {place: prompts for place, prompts in cut.items() if prompts}
        return cls(transcript, tuple({place: of[n] for place, of in whole.items()} for n in range(len(lengths))))

    def has(self, name: str, layer: int = 0) -> bool:
        """Whether this place can be seen."""
        return bool(self.prompts) and (name, layer) in self.prompts[0]

    def rows(self, name: str, layer: int, prompts: Sequence[int]) -> Array:
        """[rows, ...] of some prompts, one behind the other."""
        return np.concatenate([self.prompts[number][name, layer] for number in prompts])

    def changed(self, change: Callable[[int, dict[Place, Array]], dict[Place, Array]]) -> "View":
        """With other rows: `change` is told each prompt's number and rows."""
        return View(self.transcript, tuple(change(number, rows) for number, rows in enumerate(self.prompts)))


def _rows(transcript: Transcript) -> dict[Place, list[Array]]:
    found: dict[Place, list[Array]] = defaultdict(list)
    for event in transcript.events:
        for place, rows in _places(event):
            if len(rows) > 1:
                found[place].append(rows)
    return found


def _cut(name: str, calls: list[Array], lengths: Sequence[int]) -> list[Array]:
    """The rows of each prompt, which came in one call or in several; nothing when they are not those of the prompts.

    A cache holds its answer's rows, too: they are left out.
    """
    if name in CACHED:
        fit = len(calls) == len(lengths) and all(len(rows) >= n for rows, n in zip(calls, lengths, strict=True))
        return [rows[:n] for rows, n in zip(calls, lengths, strict=True)] if fit else []
    prompts, left = [], iter(calls)
    for length in lengths:
        rows: list[Array] = []
        while sum(map(len, rows)) < length and (call := next(left, None)) is not None:
            rows.append(call)
        if sum(map(len, rows)) != length:
            return []
        prompts.append(rows[0] if len(rows) == 1 else np.concatenate(rows))
    return prompts if next(left, None) is None else []


def _places(event: Exchange | Held | Cache) -> list[tuple[Place, Array]]:
    if isinstance(event, Held):
        return [((event.name, event.layer), event.tensor)]
    if isinstance(event, Cache):
        by_token = [(name, np.moveaxis(half, 2, 1)) for name, half in (("k", event.keys), ("v", event.values))]
        names = [(f"{'cache' if event.event == 'drop' else 'wiped'}_{name}", half) for name, half in by_token]
        return [((name, layer), rows) for name, half in names for layer, rows in enumerate(half)]
    match None if event.refused else event.operation.WhichOneof("kind"):
        case "ring_matmul":
            return _product(event, event.operation.ring_matmul.layer, event.operation.ring_matmul.linear)
        case "matmul":
            return _product(event, event.operation.matmul.layer, event.operation.matmul.linear)
        case "chain" if event.operation.chain.steps[0].HasField("attend"):
            return [(("qk_returned", event.operation.chain.steps[0].attend.layer), event.up)]
        case _:
            return []


def _product(event: Exchange, layer: int, number: int) -> list[tuple[Place, Array]]:
    if number not in PLACES:
        return []
    name_in, name_out = PLACES[Linear(number)]
    return [((name_in, layer), event.up), ((name_out, layer), event.down)]
