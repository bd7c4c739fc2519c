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
Bools = npt.NDArray[np.bool_]


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
    own, rest = alike[: len(labels), : len(labels)], alike[len(labels) :, : len(labels)]
    same, two = _pairs(labels)
    zero, one = (labels == which for which in (0, 1))
    bias = own[same & two & one].mean() - own[same & two & zero].mean()
    said: Ints = np.where(rest[:, one].mean(axis=1) - rest[:, zero].mean(axis=1) > bias / 2, 1, 0)
    return said


def links(alike: F32, labels: Ints) -> Ints:
    """(2) Of the messages behind the labelled ones, from the second on: whether it is the one before over again."""
    own = alike[: len(labels), : len(labels)]
    same, two = _pairs(labels)
    limit = (own[same & two].mean() + own[~same].mean()) / 2
    rows = np.arange(len(labels) + 1, len(alike))
    said: Ints = np.where(alike[rows, rows - 1] > limit, 1, 0)
    return said


def _pairs(labels: Ints) -> tuple[Bools, Bools]:
    """[n, n]: which pairs of labelled messages are of one class, and which are not a message and itself."""
    return labels[:, None] == labels[None], ~np.eye(len(labels), dtype=bool)
