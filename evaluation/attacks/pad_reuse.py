"""Pad reuse: two rows under one pad differ by z - z' = x_q - x_q', which is small modulo 2^32.

Source: the two-time pad. Needs: nothing. Reads: every row that was sent or is held. Any two stretches of any two rows
are tried that begin at blocks of 16 bytes, as key streams do: of whichever linears, layers and prompts, at whichever
places of the rows, and of one row with itself.

(1) Float rows become integers, each at a scale of its own, as the scheme would make them.
(2) A key of each block: the top bits of its words. Blocks under one pad mostly share it, as |x_q| is far below.
(3) Blocks of one key, each with the next: whether all words of the stretches that begin there are close.

Where pads are fresh a pair is close with probability 2^-96, and any pair at all with less than 2^-50.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.crossed import crossed, recurring
from evaluation.attacks.knowledge import Fact, Finding, Knowledge
from evaluation.attacks.view import View
from evaluation.transcript import Array

I32 = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

BLOCK, STRETCH = 4, 16  # words
CLOSE = 1 << 25  # |x_q - x_q'| stays below
COARSE = 24  # low bits that a key leaves out
FINE = float(1 << 20)  # the largest element of a float row, once it is of integers
AT_ONCE = 1 << 17  # pairs


def attack(view: View, known: Knowledge) -> list[Finding]:
    """How many rows share a stretch."""
    places = [rows for rows in map(ring, crossed(view.transcript)) if rows.shape[1] >= STRETCH]
    if not places:
        return []
    words = np.concatenate([rows.reshape(-1) for rows in places])
    starts, owners = _stretches(places)
    one, other = recurring(keys(words, starts), 32)
    hit = np.zeros(int(owners[-1]) + 1, bool)
    turns = len(one) // AT_ONCE + 1
    for turn in range(turns):
        a, b = one[turn::turns], other[turn::turns]  # of all rows some in each turn
        new = ~(hit[owners[a]] & hit[owners[b]])  # what is known by now need not be compared
        a, b = a[new], b[new]
        near = close(words, starts[a], starts[b])
        hit[owners[a[near]]] = hit[owners[b[near]]] = True
    chance = min(1.0, float(len(starts)) ** 2 * (2 * CLOSE / 2.0**32) ** STRETCH)
    return [Fact("rows that share a pad", "of all", int(hit.sum()), len(hit), chance, chance if hit.any() else 1.0)]


def ring(rows: Array) -> I32:
    """(1) int32 [rows, width], cut to whole blocks."""
    rows = rows[:, : rows.shape[1] // BLOCK * BLOCK]
    if rows.dtype == np.int32:
        return rows
    peak = np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0), np.float32(1e-30))
    result: I32 = np.rint(rows / peak * np.float32(FINE)).astype(np.int32)
    return result


def keys(words: I32, starts: Ints) -> npt.NDArray[np.uint64]:
    """(2) Of 32 bits: 8 of each word, so rounded that small words of either sign have the same."""
    tops = ((words.view(np.uint32) + np.uint32(1 << (COARSE - 1))) >> np.uint32(COARSE)).astype(np.uint8)
    found: npt.NDArray[np.uint64] = tops.view(np.uint32)[starts // BLOCK].astype(np.uint64)
    return found


def close(words: I32, one: Ints, other: Ints) -> npt.NDArray[np.bool_]:
    """(3) For pairs of stretches."""
    along = np.arange(STRETCH)
    apart = words[one[:, None] + along] - words[other[:, None] + along]
    near: npt.NDArray[np.bool_] = ((apart > -CLOSE) & (apart < CLOSE)).all(axis=1)
    return near


def _stretches(places: list[I32]) -> tuple[Ints, Ints]:
    """Where each begins among all words, and the number of its row."""
    starts, owners, words, above = [], [], 0, 0
    for rows in places:
        height, width = rows.shape
        at = np.arange(0, width - STRETCH + 1, BLOCK)
        starts.append((words + np.arange(height)[:, None] * width + at).reshape(-1))
        owners.append(np.repeat(np.arange(above, above + height), len(at)))
        words, above = words + rows.size, above + height
    return np.concatenate(starts), np.concatenate(owners)
