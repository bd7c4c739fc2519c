"""Two-message distinguisher, and linkability: which of two messages was it, and was it the same as the one before?

Source: the game by which encryption is judged (indistinguishability), and the linkage that is left of deterministic
masks. Needs: some labelled messages of his own. Reads: every place, by the forms of likeness.py. The messages have the
same length, which every scheme shows.

(1) Distinguisher: a message is of the class whose labelled messages are more like it, by the mean; that a class may be
    more like itself than the other is taken off.
(2) Linkability: two messages are the same when they are more alike than halfway between labelled pairs of one class
    and of both.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Answers, Finding, Ints, Knowledge
from evaluation.attacks.likeness import likeness
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]


def attack(view: View, known: Knowledge) -> list[Finding]:
    """Both, by each form."""
    labels = np.array(list(known.labels.values()))
    messages = [*known.labels, *known.unlabelled]
    found: list[Finding] = []
    for form, alike in likeness(view, messages, messages).items():
        found.append(Answers(f"{form}, class", "unlabelled", classes(alike, labels), 2))
        found.append(Answers(f"{form}, link", "linked", links(alike, labels), 2))
    return found


def classes(alike: F32, labels: Ints) -> Ints:
    """(1) Of the messages behind the labelled ones: 0 or 1. `alike`: all against all, labelled ones first."""
    own, one, zero = alike[: len(labels)], labels == 1, labels == 0
    (same, pairs), rest = _pairs(labels), alike[len(labels) :]
    within = [own[: len(labels), : len(labels)][same & pairs & which[:, None]].mean() for which in (one, zero)]
    drawn = rest[:, : len(labels)]
    return (drawn[:, one].mean(axis=1) - drawn[:, zero].mean(axis=1) > (within[0] - within[1]) / 2).astype(np.int64)


def links(alike: F32, labels: Ints) -> Ints:
    """(2) Of the messages behind the labelled ones, from the second on: whether it is the one before over again."""
    start = len(labels)
    same, pairs = _pairs(labels)
    own = alike[:start, :start]
    limit = (own[same & pairs].mean() + own[~same].mean()) / 2
    rows = np.arange(start + 1, len(alike))
    return (alike[rows, rows - 1] > limit).astype(np.int64)


def _pairs(labels: Ints) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which pairs of labelled messages are of one class, and which are two messages."""
    return labels[:, None] == labels[None], ~np.eye(len(labels), dtype=bool)
