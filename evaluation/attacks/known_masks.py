"""Known masks: of a text that is known every mask is known, at every linear, so all that can be counted of it is.

Source: known plaintext, the oldest attack on stream ciphers. Needs: known prompts, and what the public program makes of
them (`Knowledge.clear`; without it, what is computed of layer 0). Reads: what enters each linear, for those prompts.
r = z - x_q modulo 2^32 is exact, and of an intact mask all words are independent and uniform, which those of z also are
when part of the mask is missing where x_q itself looks random, as its low bits do.

(1) bytes: the chi-square of uniformity.py, place by place: bits or words that are not masked;
(2) turned words: each word xor itself turned by one byte, or two: masks of fewer bits, said more than once;
(3) ranks modulo 2 of each place: masks that combine a pool;
(4) stretches of four words that recur, at any offsets, up to their sign and a constant: streams that overlap.

The p of (3) is 4 . 2^-(d (d + |n - k|)) for n rows of k words that lack d of their rank, times the places; of (4) the
birthday bound.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks import fixed_point
from evaluation.attacks.crossed import Words, as_words, recurring
from evaluation.attacks.knowledge import Fact, Finding, Knowledge
from evaluation.attacks.parts import part
from evaluation.attacks.uniformity import LEVEL, MIX, byte_facts
from evaluation.attacks.view import View

Seen = list[Words]  # [rows, width] of each place


def facts(view: View, known: Knowledge) -> list[Finding]:
    """Whether the masks of known rows are what masks should be. The view must show what enters layer 0."""
    found = masks(view, known)
    return [
        *byte_facts("known masks, bytes", found, lambda rows: rows),
        *byte_facts("known masks, words turned by a byte", found, lambda rows: rows ^ turned(rows, 8)),
        *byte_facts("known masks, words turned by two", found, lambda rows: rows ^ turned(rows, 16)),
        _ranks(found),
        _recurring(found),
    ]


def masks(view: View, known: Knowledge) -> Seen:
    """r of the known prompts, one behind the other, for each place: of ring products all, of floats layer 0."""
    if not (known.clear and in_ring(view)):
        return [first_masks(view, known, vocabulary(view, known))]
    places = [place for place in next(iter(known.clear.values())) if view.has(*place)]
    return [
        np.concatenate([as_words(view.prompts[n][at]) - as_words(x[at]) for n, x in known.clear.items()])
        for at in places
    ]


def first_masks(view: View, known: Knowledge, table: Words) -> Words:
    """r of the known prompts where they enter layer 0, one behind the other. `table`: see `vocabulary`."""
    return np.concatenate([ring_input(view, known, number) - table[ids] for number, ids in known.known.items()])


def in_ring(view: View) -> bool:
    """Whether integers enter layer 0, and not floats."""
    return view.has("input") and view.prompts[0]["input", 0].dtype == np.int32


def ring_input(view: View, known: Knowledge, number: int) -> Words:
    """The input of layer 0 as words of the ring."""
    if in_ring(view):
        return as_words(view.prompts[number]["input", 0])
    rows = part(view, known, "input", 0, [number])
    return as_words(fixed_point.integers(known.model, np.zeros((0, 0), np.float32) if rows is None else rows))


def vocabulary(view: View, known: Knowledge) -> Words:
    """Those of every token, at the precision of what is seen."""
    if in_ring(view):
        return as_words(fixed_point.vocabulary(known.model))
    return as_words(fixed_point.integers(known.model, known.model.first.input[:, 0]))


def turned(rows: Words, bits: int) -> Words:
    """(2) Each word, turned."""
    return rows << np.uint32(bits) | rows >> np.uint32(32 - bits)


def rank(rows: Words) -> int:
    """(3) Of the lowest bits, modulo 2."""
    rest, found = np.packbits((rows & np.uint32(1)).astype(bool), axis=1), 0
    for column in range(rows.shape[1]):
        byte, bit = column // 8, np.uint8(128 >> column % 8)
        odd = np.flatnonzero(rest[found:, byte] & bit) + found
        if len(odd):
            rest[[found, odd[0]]] = rest[[odd[0], found]]
            rest[odd[1:]] ^= rest[found]
            found += 1
    return found


def _ranks(found: Seen) -> Fact:
    """(3)"""
    lacks = [min(rows.shape) - rank(rows) for rows in found]
    powers = [lack * (lack + abs(rows.shape[0] - rows.shape[1])) for lack, rows in zip(lacks, found, strict=True)]
    bounds = [4 * 2.0 ** -min(power, 1000) if power else 1.0 for power in powers]
    hits, p = sum(bound < LEVEL for bound in bounds), min(1.0, len(found) * min(bounds))
    return Fact("known masks, ranks", "places that lack some", hits, len(found), LEVEL, p)


def _recurring(found: Seen) -> Fact:
    """(4)"""
    by_place = [steps(rows) for rows in found]
    every = np.concatenate(by_place)
    owner = np.repeat(np.arange(len(by_place)), [len(one) for one in by_place])
    one, other = recurring(np.concatenate([_keys(triples) for triples in by_place]), 64)
    same = (every[one] == every[other]).all(axis=1)
    hits = len({*owner[one[same]].tolist(), *owner[other[same]].tolist()})
    chance = min(1.0, float(len(every)) ** 2 * 2.0**-95)
    p = chance if hits else 1.0
    return Fact("known masks, stretches that recur", "places with one", hits, len(found), chance, p)


def _keys(triples: Words) -> npt.NDArray[np.uint64]:
    first, second, third = (triples[:, at].astype(np.uint64) for at in range(3))
    found: npt.NDArray[np.uint64] = (first << np.uint64(32) | second) * MIX + third * (MIX >> np.uint64(7))
    return found


def steps(rows: Words) -> Words:
    """(4) From each word the differences of the next four neighbours, [n, 3], those of the two signs all alike."""
    apart = rows[:, 1:] - rows[:, :-1]
    triples = np.stack([apart[:, at : apart.shape[1] - 2 + at] for at in range(3)], axis=-1).reshape(-1, 3)
    negative = triples[:, 0] >> np.uint32(31) == 1
    triples[negative] = -triples[negative]
    return triples
