"""Uniformity: whether what was sent is as random as a one-time pad makes it, wherever that can be counted.

Source: the statistical tests of key streams (NIST SP 800-22 in spirit), on what crossed. Needs: nothing. Reads: every
word that was sent to the GPU worker or that it held. Under an intact mask all of them are independent and uniform:

(1) bytes: Pearson's chi-square of each byte of the words of each place, and of all places together;
(2) neighbours: the same of the differences between neighbouring words of a row, and
(3) between neighbouring rows, pairs that share no word: a mask that steps, or that a row shares with the next;
(4) blocks of 16 bytes, AES's, that recur anywhere;
(5) stretches of 32 words that look like numbers: a row, or a part of one, that went out bare.

Every p holds as far out as the gate asks. (1) to (3): the best of so many chi-squares, times their number, and times 2
for the approximation, which counts of at least LEAST words keep below that at 1e-12. (4): the birthday bound. (5): the
binomial tail, windows share no word.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from evaluation.attacks.crossed import Words, as_words, crossed, recurring
from evaluation.attacks.knowledge import Fact, Finding, Knowledge
from evaluation.attacks.view import View

LEAST = 50 * 256  # words that a place must have to be counted by itself
LEVEL = 1e-9  # below: this place is not uniform
WINDOW, NUMBERS = 32, 30  # of the words of a window, so many look like numbers
SMALL = 1 << 24  # |x_q| stays below
EXPONENTS = range(127 - 30, 127 + 15)  # of float32: from 2^-30 to 2^15
LIKELY = 2.0**-7 + len(EXPONENTS) / 256  # that a uniform word looks like a number, at most
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: of two halves of a block, one key

Counts = npt.NDArray[np.int64]  # [4, 256]: of each byte


def attack(view: View, known: Knowledge) -> list[Finding]:
    """Facts, one for each kind of count."""
    places = [as_words(rows) for rows in crossed(view.transcript)]
    if not places:
        return []
    return [
        *byte_facts("bytes", places, lambda rows: rows),
        *byte_facts("differences of neighbouring words", places, across),
        *byte_facts("differences of neighbouring rows", places, along),
        *_recurring(places),
        *_bare(places),
    ]


def across(rows: Words) -> Words:
    """(2) Of words 0 and 1, 2 and 3, ..."""
    even = rows.shape[1] // 2 * 2
    return rows[:, 1:even:2] - rows[:, 0:even:2]


def along(rows: Words) -> Words:
    """(3) Of rows 0 and 1, 2 and 3, ..."""
    even = len(rows) // 2 * 2
    return rows[1:even:2] - rows[0:even:2]


def byte_facts(target: str, places: list[Words], seen: Callable[[Words], Words]) -> list[Finding]:
    """The chi-square of what is `seen` of each place, and of all; nothing where there are too few words."""
    counts = [count_bytes(seen(rows)) for rows in places]
    tested = [one for one in (*counts, np.sum(counts, axis=0)) if one[0].sum() >= LEAST]
    if not tested:
        return []
    each = [chi_square(one) for one in tested]
    hits = sum(p < LEVEL for p in each)
    return [Fact(target, "places not uniform", hits, len(each), LEVEL, min(1.0, len(each) * min(each)))]


def count_bytes(rows: Words) -> Counts:
    """How often each byte has each value, by its place in the word."""
    halves = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 2)
    pairs = [np.bincount(halves[:, half], minlength=1 << 16).reshape(256, 256) for half in (0, 1)]
    return np.array([pair.sum(axis=axis) for pair in pairs for axis in (0, 1)])


def chi_square(counts: Counts) -> float:
    """A bound on the p of the four bytes of as many words."""
    from scipy.stats import chi2

    expected = counts.sum(axis=1, keepdims=True) / 256
    statistics = ((counts - expected) ** 2 / expected).sum(axis=1)
    return min(1.0, 2 * 4 * float(chi2.sf(statistics.max(), 255)))


def _recurring(places: list[Words]) -> list[Finding]:
    """(4)"""
    by_place = [found for found in map(blocks, places) if len(found)]
    if not by_place:
        return []
    every = np.concatenate(by_place)
    owner = np.repeat(np.arange(len(by_place)), [len(one) for one in by_place])
    one, other = recurring(every[:, 0] * MIX + every[:, 1], 64)
    same = (every[one] == every[other]).all(axis=1)
    hits = len({*owner[one[same]].tolist(), *owner[other[same]].tolist()})
    chance = min(1.0, len(every) ** 2 * 2.0**-129)
    return [Fact("blocks that recur", "places with one", hits, len(by_place), chance, chance if hits else 1.0)]


def blocks(rows: Words) -> npt.NDArray[np.uint64]:
    """[n, 2] from words [rows, width]; what a row has beyond whole blocks is left out."""
    return np.ascontiguousarray(rows[:, : rows.shape[1] // 4 * 4]).view(np.uint64).reshape(-1, 2)


def _bare(places: list[Words]) -> list[Finding]:
    """(5)"""
    from scipy.stats import binom

    many = np.concatenate([window_numbers(rows) for rows in places])
    if not len(many):
        return []
    chance = float(binom.sf(NUMBERS - 1, WINDOW, LIKELY))
    return [Fact("stretches that look like numbers", "of all", int((many >= NUMBERS).sum()), len(many), chance)]


def window_numbers(rows: Words) -> npt.NDArray[np.int64]:
    """How many words of each whole window of each row look like numbers: integers of the ring, or float32."""
    rows = rows if rows.shape[1] >= WINDOW else rows.reshape(1, -1)  # narrow ones as one
    rows = rows[:, : rows.shape[1] // WINDOW * WINDOW]
    exponent = (rows >> np.uint32(23)) & np.uint32(255)
    number = (exponent >= EXPONENTS.start) & (exponent < EXPONENTS.stop)
    number |= rows + np.uint32(SMALL) < np.uint32(2 * SMALL)
    many: npt.NDArray[np.int64] = number.reshape(-1, WINDOW).sum(axis=1, dtype=np.int64)
    return many
