"""Procrustes: rows of known tokens, plain and as they are seen, give the rotation between them; it decodes the rest.

Source: Schoenemann's orthogonal Procrustes problem (1966), as used against rotated embeddings. Needs: public weights,
and prompts whose tokens are known. Reads: what enters layer 0, and V of layer 0 head by head. A permutation is a
rotation too; a row's own scale does not matter.

1. X: the known tokens' rows from the public model; Y: theirs as seen; all of length 1.
2. R = U V^T, of the singular value decomposition of X^T Y, is the rotation that brings X nearest to Y.
3. Turn the victims' rows back; the nearest token of the vocabulary. Where fewer tokens are known than rows have dims,
   R is known on what they span, and rows are compared there.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import nearest, unit
from evaluation.attacks.knowledge import Answers, Finding, Ints, Knowledge
from evaluation.attacks.parts import part, victims
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]
NOISE = 1e-4  # of the largest singular value


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The token whose row is nearest once the rotation is undone."""
    first = known.model.first
    found: list[Finding] = []
    tokens, numbers = np.concatenate(list(known.known.values())), list(known.known)
    for what, target, table in (("input", "input", first.input), ("v", "V", first.v[:, 0])):
        rows, seen = victims(view, known, what, 0), part(view, known, what, 0, numbers)
        if rows is not None and seen is not None:
            shape = (-1, *table.shape[1:])
            said = decoded(rows.reshape(shape), seen.reshape(shape), table, tokens)
            found.append(Answers(f"{target} turned back, layer 0", "tokens", said, len(table)))
    return found


def decoded(rows: F32, seen: F32, table: F32, tokens: Ints) -> Ints:
    """rows [n, heads, d] by those `seen` [m, heads, d] of known tokens [m]: the number in the table [v, heads, d]."""
    back, there = [], []
    for head in range(rows.shape[1]):
        u, values, vt = np.linalg.svd(unit(table[tokens, head]).T @ unit(seen[:, head]))  # (2)
        rank = int((values > NOISE * values[0]).sum())
        back.append(rows[:, head] @ vt[:rank].T)  # (3)
        there.append(table[:, head] @ u[:, :rank])
    return nearest(unit(np.hstack(back)), unit(np.hstack(there)))
