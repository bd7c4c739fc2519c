"""Row space: mixing the rows of a batch among themselves, U = A.H, leaves the space that they span as it was.

Source: the attacks on GELO (arXiv 2603.05035) and on DarKnight's combinations. Needs: public weights, and batches of
fewer rows than the width d: then a token's row either lies in the space or is far from it. Reads: the rows that enter
layer 0, a prompt at a time. It holds for any invertible A, orthogonal or not, fresh or not, secret all the same.

(1) An orthonormal basis of what the prompt's rows span. (2) How much of each token's direction lies in it.
(3) As many tokens as there are rows, those that lie in it most: a bag of words, with no order.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import unit
from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.parts import part
from evaluation.attacks.view import View


def attack(view: View, known: Knowledge) -> list[Finding]:
    """For each row of a prompt the same bag: whether the row's token is among them."""
    table, bags = unit(known.model.first.input[:, 0]), []
    for number in known.victims:
        rows = part(view, known, "input", 0, [number])
        if rows is None or not 0 < len(rows) < rows.shape[1]:
            return []
        basis = np.linalg.qr(unit(rows).T)[0]  # (1)
        inside = ((table @ basis) ** 2).sum(axis=1)  # (2)
        bag = np.sort(np.argsort(-inside, kind="stable")[: len(rows)])  # (3)
        bags.append(np.tile(bag, (len(rows) - len(known.prefix), 1)))
    said: npt.NDArray[np.int64] = np.concatenate(bags)
    return [Answers("bag of words, layer 0", "tokens", said, len(table))]
