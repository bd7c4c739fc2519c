"""Invariant matching at layer 0: what a secret transform leaves as it is, compared with every token's.

Source: the orbit view of permuted inference ("Hidden No More", arXiv 2505.18332, and its relatives). Needs: public
weights. For each group of transforms its canonical form:

(1) permutations of a head's dims, one and the same for all rows: the sorted values of each head of V;
(2) those of the whole input: its sorted values, per row, at an unknown scale;
(3) rotations of the input: inner products with rows of known tokens, and the norm alone, where rows keep their scale;
(4) rotations within RoPE pairs, of K: the energy of each pair.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import nearest, unit
from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.parts import part, scale, victims
from evaluation.attacks.public_model import pairs
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The token whose form is nearest, for each form."""
    first, found = known.model.first, []
    forms = (
        ("v", "sorted V, layer 0", first.v[:, 0], sorted_heads),
        ("input", "sorted input, layer 0", first.input[:, 0], sorted_values),
        ("k", "pair energies of K, layer 0", first.k[:, 0], lambda k: pair_energies(k, known)),
    )
    for what, target, table, form in forms:
        rows = victims(view, known, what, 0)
        if rows is not None:
            said = nearest(form(rows), form(table))
            found.append(Answers(target, "tokens", said, len(table)))
    return [*found, *_gram(view, known), *_norms(view, known)]


def sorted_heads(x: F32) -> F32:
    """(1) [rows, K, d] -> [rows, K.d], each head sorted, all of one row at one scale."""
    return unit(np.sort(x, axis=-1).reshape(len(x), -1))


def sorted_values(x: F32) -> F32:
    """(2) [rows, width] -> the same, sorted."""
    return unit(np.sort(x, axis=-1))


def pair_energies(k: F32, known: Knowledge) -> F32:
    """(4) [rows, K, d] -> [rows, K.d/2]."""
    rope = known.model.config.rope
    near, far = pairs(k.shape[-1], interleaved=rope is not None and rope.interleaved)
    return unit(np.sqrt(k[..., near] ** 2 + k[..., far] ** 2).reshape(len(k), -1))


def _gram(view: View, known: Knowledge) -> list[Finding]:
    """(3) A row's products with rows of known tokens, and their directions: where they agree for one token only."""
    rows, numbers = victims(view, known, "input", 0), list(known.known)
    anchors = part(view, known, "input", 0, numbers)
    if rows is None or anchors is None:
        return []
    table = unit(known.model.first.input[:, 0])
    plain = table[np.concatenate([known.known[number] for number in numbers])]
    said = nearest(unit(unit(rows) @ unit(anchors).T), unit(table @ plain.T))
    return [Answers("inner products with known rows, layer 0", "tokens", said, len(table))]


def _norms(view: View, known: Knowledge) -> list[Finding]:
    """(3) One number for each row, as it is or at the scale of integers: enough where few tokens share it."""
    rows, table = victims(view, known, "input", 0), known.model.first.input[:, 0].astype(np.float64)
    if rows is None:
        return []
    either = np.linalg.norm([table, table * scale(table, known, 0)], axis=2)
    said = [np.abs(either - own).min(axis=0).argmin() for own in np.linalg.norm(rows.astype(np.float64), axis=1)]
    return [Answers("norm of the input, layer 0", "tokens", np.array(said), len(table))]
