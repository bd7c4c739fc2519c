"""Embedding nearest neighbour: the row that enters layer 0 is a token's embedding, normed, at some scale.

Source: the first step of every attack on split inference; as in "Shadow in the Cache" (arXiv 2508.09442), inversion.
Needs: public weights. Reads: the rows that enter layer 0. A permutation, a rotation or a mask makes it fail: for those
see invariants.py.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Answers, Finding, Ints, Knowledge
from evaluation.attacks.parts import victims
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The token whose direction is nearest, for each row."""
    rows, table = victims(view, known, "input", 0), unit(known.model.first.input[:, 0])
    if rows is None:
        return []
    return [Answers("input, layer 0", "tokens", nearest(rows, table), len(table))]


def nearest(rows: F32, table: F32) -> Ints:
    """For each row of length 1 the nearest of the table's."""
    said: Ints = (rows @ table.T).argmax(axis=1)
    return said


def unit(rows: F32) -> F32:
    """Rows of length 1; a row of zeros stays."""
    result: F32 = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.float32(1e-30))
    return result
