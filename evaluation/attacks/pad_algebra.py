"""Pad algebra: additive masks that combine a pool of K < d pads, instead of being fresh.

Source: the attacks on precomputed noise (arXiv 2602.11088), turned on inputs. Needs: public weights; (2) also prompts
that are known. Reads: the rows that enter layer 0; (3) those that enter any linear.

(1) Masks over floats fill K directions, and with much more than activations have. Without those directions (principal
    components, up to where the spectrum falls) the activation is left in d - K dimensions, to be compared with every
    token's. No known text is needed.
(2) Masks in the ring: geometry is void modulo 2^32, linear algebra is not. The scale of a row is a public rule of the
    token (fixed_point.py), so a row of a known token gives its mask, exactly. Known masks span the pool; modulo that
    span any other row's mask is 0, and what is left of it is its token's. Some K known rows are enough.
(3) Whatever else is wrong with masks that are known: known_masks.py.

Fresh masks leave (1) a spectrum that does not fall, (2) a span that is everything, or has no other mask in it.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import nearest, unit
from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.known_masks import facts, first_masks, ring_input, vocabulary
from evaluation.attacks.parts import part, victims
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]

CHECKED = 16  # words that are compared modulo a span
FLOOR = 1e-6  # of the loudest direction: below, rounding


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The token that fits best, for each row."""
    every = part(view, known, "input", 0, range(len(known.lengths)))
    rows = victims(view, known, "input", 0)
    if every is None or rows is None:
        return []
    table = known.model.first.input[:, 0]
    rest = without_masks(every)
    projected = nearest(unit(rows @ rest), unit(table @ rest))
    modulo = _modulo(view, known)
    return [
        Answers("input, layer 0, without the masks' directions", "tokens", projected, len(table)),
        Answers("input, layer 0, modulo the known masks", "tokens", modulo, len(table)),
        *facts(view, known),
    ]


def without_masks(rows: F32) -> F32:
    """(1) What takes the masks' directions away, [d, d]: up to where the spectrum falls most, at most half of them."""
    wide = rows.astype(np.float64)
    squares, directions = np.linalg.eigh(wide.T @ wide)
    loudest = np.sqrt(np.maximum(squares[::-1], 1e-30))[: len(squares) // 2 + 1]
    loudest = loudest[: max(int((loudest > FLOOR * loudest[0]).sum()), 2)]  # a fall to nothing is where rows end
    first = directions[:, ::-1][:, : int((loudest[:-1] / loudest[1:]).argmax()) + 1]
    result: F32 = (np.eye(len(first)) - first @ first.T).astype(np.float32)
    return result


def _modulo(view: View, known: Knowledge) -> npt.NDArray[np.int64]:
    """(2)"""
    table = vocabulary(view, known)
    wanted = np.concatenate([ring_input(view, known, number)[len(known.prefix) :] for number in known.victims])
    basis, pivots = span(first_masks(view, known, table))
    free = np.setdiff1d(np.arange(table.shape[1]), pivots)[:CHECKED]
    left, candidates = (reduced(rows, basis, pivots, free) for rows in (wanted, table))
    agree = np.array([(candidates == row).sum(axis=1) for row in left])
    said: npt.NDArray[np.int64] = agree.argmax(axis=1)
    return said


def span(rows: U32) -> tuple[U32, list[int]]:
    """A basis of what rows span modulo 2^32, [K, d], and K columns of which it is the identity. Odd pivots only."""
    rest, basis, pivots = rows.copy(), np.empty((0, rows.shape[1]), np.uint32), list[int]()
    while len(pivots) < min(rows.shape):
        odd = np.flatnonzero((rest & np.uint32(1)).any(axis=1))
        if not len(odd):
            break
        row = rest[odd[0]]
        column = int((row & np.uint32(1)).argmax())
        row = row * np.uint32(pow(int(row[column]), -1, 1 << 32))
        rest -= rest[:, column : column + 1] * row
        basis -= basis[:, column : column + 1] * row
        basis, pivots = np.concatenate([basis, row[None]]), [*pivots, column]
    return basis, pivots


def reduced(rows: U32, basis: U32, pivots: list[int], columns: npt.NDArray[np.int64]) -> U32:
    """Some columns of the same rows modulo the span, which is 0 at its pivots."""
    result: U32 = rows[:, columns] - rows[:, pivots] @ basis[:, columns]
    return result
