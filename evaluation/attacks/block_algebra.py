"""Block algebra: caches of which blocks of rows are mixed, shuffled and marked, undone with one chosen prompt.

Source: published cryptanalysis of KV-Cloak (arXiv 2508.09442). Needs: public weights, and a chosen prompt of one token,
repeated. Reads: the first head of V at layer 0, BLOCK rows at a time: C = S P (V M + A), with S orthogonal, A a beacon
a in one row, M rotations within RoPE pairs, all static, and P a fresh permutation of the rows. The order of the tokens
in a block stays hidden: each is said to be one of its block.

Of the chosen prompt all rows of V are one v, so P only moves the beacon and a block is in one of BLOCK states:
C_j = u w^T + s_j a^T, with w = v M, s_j a column of S and u the sum of all.

1. Find the states. If there is only one, nothing is mixed: rows are read as they are.
2. Their mean is u (w + a/b)^T, of rank one, and |u|^2 = b. What they differ by is of rank one too: a, up to its sign.
3. The right sign gives a w whose energies by RoPE pair are some token's: that gives v, and the angles of M.
4. s_j = (C_j - mean) a / |a|^2 + u/b.
5. Of the victims' blocks: undo S, take the beacon out of the row that has it, undo M; the nearest token.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.parts import part
from evaluation.attacks.public_model import pairs
from evaluation.attacks.view import View

F64 = npt.NDArray[np.float64]
C128 = npt.NDArray[np.complex128]
BLOCK = 4
SAME = 1e-4  # relative distance of blocks that are in one state


@dataclass(frozen=True)
class Key:
    """S [b, b], a [d], and the angles of M [d / 2]."""

    mix: F64
    beacon: F64
    angles: F64


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The victims' tokens, those of a block for each token of it."""
    rope = known.model.config.rope
    chosen = None if known.repeated is None else _first_head(view, known, known.repeated)
    if chosen is None or known.repeated is None or rope is None or rope.dims != known.model.config.head_dim:
        return []
    near, far = (np.arange(rope.dims)[half] for half in pairs(rope.dims, rope.interleaved))
    table = known.model.first.v[:, 0, 0].astype(np.float64)
    whole = known.lengths[known.repeated] // BLOCK
    points, found = table[:, near] + 1j * table[:, far], states(blocks(chosen)[:whole])
    key = None if len(found) == 1 else solved(found[:BLOCK], near, far, points)
    said, table = [], table / np.linalg.norm(table, axis=1, keepdims=True)
    for number in known.victims:
        opened = _opened(_first_head(view, known, number), key, near, far)
        each = np.repeat((opened @ table.T).argmax(axis=-1), BLOCK, axis=0)
        said.append(each[len(known.prefix) : known.lengths[number]])
    return [Answers("V unmixed, layer 0", "tokens", np.concatenate(said), len(table))]


def blocks(rows: F64, fill: float = 0.0) -> F64:
    """[t, d] -> [blocks, b, d]; rows of `fill` make the last one whole."""
    filled = np.pad(rows, ((0, -len(rows) % BLOCK), (0, 0)), constant_values=fill)
    return filled.reshape(-1, BLOCK, rows.shape[1])


def states(found: F64) -> F64:
    """Step 1: one block of each state, [states, b, d]."""
    kept: list[F64] = []
    for block in found:
        if all(np.linalg.norm(block - one) > SAME * np.linalg.norm(one) for one in kept):
            kept.append(block)
    return np.stack(kept)


def solved(found: F64, near: npt.NDArray[np.int64], far: npt.NDArray[np.int64], points: C128) -> Key:
    """Steps 2 to 4, from all states [b, b, d]; `points` [v, d / 2]: each token's V, a complex number for each pair."""
    b, mean = len(found), found.mean(axis=0)
    left, values, right = np.linalg.svd(mean, full_matrices=False)
    u, g = left[:, 0] * np.sqrt(b), right[0] * values[0] / np.sqrt(b)  # (2)
    differ = (found - mean).reshape(-1, found.shape[-1])
    a = np.linalg.svd(differ, full_matrices=False)[2][0] * np.linalg.norm(differ) / np.sqrt(b - 1)
    guesses = []
    for beacon in (a, -a):  # (3)
        w = (g - beacon / b)[near] + 1j * (g - beacon / b)[far]
        distances = np.linalg.norm(abs(points) - abs(w), axis=1)
        guesses.append((distances.min(), beacon, np.angle(w) - np.angle(points[distances.argmin()])))
    _, beacon, angles = min(guesses, key=lambda guess: guess[0])
    mix = (found - mean) @ beacon / (beacon @ beacon) + u / b  # (4)
    return Key(mix.T, beacon, angles)


def _opened(rows: F64 | None, key: Key | None, near: npt.NDArray[np.int64], far: npt.NDArray[np.int64]) -> F64:
    """Step 5: [t, d] -> [blocks, b, d]."""
    if rows is None:
        raise ValueError("a victim's rows are not seen")
    if key is None:
        return blocks(rows)
    opened = np.linalg.pinv(key.mix) @ blocks(rows)
    marked = (opened @ key.beacon).argmax(axis=1)
    opened[np.arange(len(opened)), marked] -= key.beacon
    points = (opened[..., near] + 1j * opened[..., far]) * np.exp(-1j * key.angles)
    opened[..., near], opened[..., far] = points.real, points.imag
    return opened


def _first_head(view: View, known: Knowledge, prompt: int) -> F64 | None:
    cached = view.has("cache_v") and not view.has("wiped_v")
    v = view.rows("cache_v", 0, [prompt]) if cached else part(view, known, "v", 0, [prompt])
    return None if v is None else v[:, 0].astype(np.float64)
