"""Sequential vocabulary matching: try each word at the next place of the text, keep the one that explains what is seen.

Source: "Hidden No More" (arXiv 2505.18332), for any observable at any depth. Needs: public weights, and how the prompt
begins. Layer 0 in the trusted worker does not stop it; attention scores alone, or probabilities alone, suffice.

(1) Hidden states, sorted hidden states, sorted K, sorted V: the forms that permutations leave (predictions.py).
(2) Scores q.k: a permutation of a head, or a rotation, common to q and k leaves them. Whoever sees q and k computes
    them.
(3) Probabilities: those that are seen, or come of (2). Their logarithms are scores up to a constant per head and row,
    which is taken off: small probabilities tell as much as large ones.

`attack` is teacher-forced: he is told each token after his answer, so an error does not spread. It is an upper bound of
what he reads, and what a protected scheme is held to. `free_running` goes on from his own answers: where all of them
are right, he has the exact prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Answers, Finding, Ints, Knowledge
from evaluation.attacks.parts import part
from evaluation.attacks.predictions import Predicted, forms, kept
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]
FREE_LAYER = 1  # the first whose rows depend on the text
SMALLEST = np.float32(1e-30)  # probability


@dataclass(frozen=True)
class Seen:
    """Of one prompt of t tokens, at one layer: what the view shows of it, or can be computed from what it shows."""

    rows: dict[str, F32]  # by form: [t, width], of length 1
    scores: F32 | None  # [t, H, t]
    probabilities: F32 | None  # [t, H, t]


def attack(view: View, known: Knowledge) -> list[Finding]:
    """Teacher-forced: one answer per token and target."""
    layers, said = looked_at(known.model.config.layers), dict[str, list[int]]()
    for number, told in known.told.items():
        seen = {layer: _seen(view, known, layer, number) for layer in layers}
        for place, candidates in enumerate(told.candidates, len(known.prefix)):
            text = tuple(map(int, told.text[:place]))
            predicted = kept(known.model, text, candidates.tobytes(), layers)
            for target, likeness in _likenesses(seen, predicted, place):
                said.setdefault(target, []).append(int(candidates[likeness.argmax()]))
    return [Answers(target, "told", np.array(tokens), _pool(known)) for target, tokens in said.items()]


def free_running(view: View, known: Knowledge) -> list[Finding]:
    """By sorted V of layer 1, from the prefix on. Of what he was told only the candidates are used."""
    said: list[Ints] = []
    for number, told in known.told.items():
        v = part(view, known, "v", FREE_LAYER, [number])
        if v is None:
            return []
        said.append(_decoded(known, forms({"v": v})["sorted V"], told.candidates))
    return [Answers(f"sorted V, layer {FREE_LAYER}", "told", np.concatenate(said), _pool(known))] if said else []


def looked_at(layers: int) -> tuple[int, ...]:
    """The first, the middle and the last."""
    return tuple(sorted({0, layers // 2, layers - 1}))


def _decoded(known: Knowledge, v: F32, candidates: Ints) -> Ints:
    text = known.prefix
    for pool in candidates:
        predicted = kept(known.model, tuple(map(int, text)), pool.tobytes(), (FREE_LAYER,))
        table = predicted.rows["sorted V", FREE_LAYER].astype(np.float32)
        text = np.append(text, pool[(table @ v[len(text)]).argmax()])
    return text[len(known.prefix) :]


def _pool(known: Knowledge) -> int:
    return min(len(told.candidates[0]) for told in known.told.values())


def _seen(view: View, known: Knowledge, layer: int, number: int) -> Seen:
    parts = {what: part(view, known, what, layer, [number]) for what in ("input", "k", "v")}
    rows = forms({what: rows for what, rows in parts.items() if rows is not None}) if layer else {}
    if view.has("probabilities", layer):
        return Seen(rows, None, view.rows("probabilities", layer, [number]))
    if view.has("scores", layer):
        return Seen(rows, view.rows("scores", layer, [number]), None)
    return Seen(rows, _products(view, known, layer, number), None)


def _products(view: View, known: Knowledge, layer: int, number: int) -> F32 | None:
    """(2) Scores from q and k, rotated by whoever did it: the trusted worker sent them back, or this function does."""
    config = known.model.config
    if view.has("qk_returned", layer):
        returned = view.rows("qk_returned", layer, [number])
        heads = returned.reshape(len(returned), -1, config.head_dim)
        q, k = heads[:, : config.heads], heads[:, config.heads :]
    else:
        plain_q, plain_k = (part(view, known, what, layer, [number]) for what in ("q", "k"))
        if plain_q is None or plain_k is None:
            return None
        q, k = known.model.turned(layer, plain_q, plain_k, np.arange(len(plain_q)))
    every = np.repeat(k, config.heads // config.kv_heads, axis=1)
    result: F32 = np.einsum("thd,shd->ths", q, every, optimize=True) / np.float32(np.sqrt(config.head_dim))
    return result


def _likenesses(seen: dict[int, Seen], predicted: Predicted, place: int) -> Iterator[tuple[str, F32]]:
    """Targets, and how well each candidate explains what is seen at a place: [C]."""
    for (form, layer), table in predicted.rows.items():
        if form in seen[layer].rows:
            yield f"{form}, layer {layer}", table.astype(np.float32) @ seen[layer].rows[form][place]
    for layer, one in seen.items():
        yield from _of_attention(one, predicted, layer, place)


def _of_attention(seen: Seen, predicted: Predicted, layer: int, place: int) -> Iterator[tuple[str, F32]]:
    """(2) and (3)."""
    table, target = predicted.scores[layer], f"probabilities, layer {layer}"
    if seen.probabilities is not None:
        shown = seen.probabilities[None, place, :, : place + 1]
        yield target, _cosine(_centred(np.log(np.maximum(shown, SMALLEST))), _centred(table))
    elif seen.scores is not None:
        shown = seen.scores[None, place, :, : place + 1]
        yield f"scores, layer {layer}", _cosine(shown, table)
        yield target, _cosine(_centred(shown), _centred(table))


def _centred(logs: F32) -> F32:
    """(3) [..., T], what is too small beside the largest to be told from 0 all alike."""
    kept = np.maximum(logs - logs.max(axis=-1, keepdims=True), np.log(SMALLEST))
    result: F32 = kept - kept.mean(axis=-1, keepdims=True)
    return result


def _cosine(a: F32, b: F32) -> F32:
    """Of [1, H, T] and [C, H, T] -> [C]."""
    lengths = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    result: F32 = (a * b).sum(axis=(1, 2)) / np.maximum(lengths, SMALLEST)
    return result
