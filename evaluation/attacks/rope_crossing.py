"""The RoPE crossing: who sees keys before and after their rotation learns in which order their dims lie.

Source: our own reading of KV-Shield (arXiv 2409.04040), corrected for RoPE. Needs: no weights, only the public rule of
rotation. Reads: k as the worker projects it (under a static permutation pi), and rotated as it comes back (under sigma,
the session's own), or as it lies in the cache. Models with a norm between the two are left alone.

1. Position 0 is not rotated: the same numbers in both, so sigma follows pi, prompt by prompt.
2. Elsewhere, in the order pi, with x before and y after: if dim j is the near one of the pair of frequency f and i is
   the far one, then y_j = x_j cos(tf) - x_i sin(tf); if j is the far one, y_j = x_j cos(tf) + x_i sin(tf). The best i
   for each j, f and side leaves a residual; the assignment of least residuals is pi. The longest prompts will do.
3. Foretell how the victims' keys come back: a dim is confirmed when every row does, to float precision.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Fact, Finding, Ints, Knowledge
from evaluation.attacks.parts import part, rotated_keys
from evaluation.attacks.public_model import pairs
from evaluation.attacks.view import View
from wire.families import Rope

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
PROMPTS = 16  # that step 2 is taken with
PRECISION = 1e-5  # relative to a head's size: two rotations in float32 differ by less


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The order of the dims of every key head in every layer."""
    c, layers = known.model.config, range(known.model.config.layers)
    if c.rope is None or c.qk_norm or not view.has("qk") or rotated_keys(view, known, 0, known.victims) is None:
        return []
    hits = sum(_confirmed(view, known, layer, orders(view, known, layer)) for layer in layers)
    return [Fact("order of the dims of k", "dims foretold", hits, c.layers * c.kv_width, 1 / c.head_dim)]


def orders(view: View, known: Knowledge, layer: int) -> Ints:
    """Steps 1 and 2: [K, d], the public number of each dim of each key head as the worker projects it."""
    c = known.model.config
    others = [number for number in range(len(known.lengths)) if number not in known.victims]
    others = sorted(others, key=lambda number: -known.lengths[number])[:PROMPTS]
    both = [aligned(view, known, layer, number) for number in others]
    before, after = (np.concatenate(rows).astype(np.float64) for rows in zip(*both, strict=True))
    positions = np.concatenate([np.arange(known.lengths[number]) for number in others])
    angles = positions[:, None] * c.inverse_frequencies().astype(np.float64)
    if c.rope is None:
        raise ValueError("there is no rotation")
    return np.stack([order(before[:, head], after[:, head], angles, c.rope) for head in range(c.kv_heads)])


def aligned(view: View, known: Knowledge, layer: int, prompt: int) -> tuple[F32, F32]:
    """Step 1: a prompt's keys before and after [t, K, d], both in the order of those before."""
    before, after = part(view, known, "k", layer, [prompt]), rotated_keys(view, known, layer, [prompt])
    if before is None or after is None:
        raise ValueError("keys are not seen on both sides of their rotation")
    follows = np.empty(before.shape[1:], np.int64)
    np.put_along_axis(follows, before[0].argsort(axis=-1), after[0].argsort(axis=-1), axis=-1)
    return before, np.take_along_axis(after, np.broadcast_to(follows, after.shape), axis=-1)


def order(x: F64, y: F64, angles: F64, rope: Rope) -> Ints:
    """Step 2 for one head: x and y [t, d], angles [t, pairs] -> [d]. Dims that do not rotate keep what is left."""
    from scipy.optimize import linear_sum_assignment

    near, far = (np.arange(rope.dims)[half] for half in pairs(rope.dims, rope.interleaved))
    cost = np.empty((x.shape[1], rope.dims))
    for pair, angle in enumerate(angles.T):
        cost[:, near[pair]], cost[:, far[pair]] = _residuals(x, y, np.cos(angle)[:, None], np.sin(angle)[:, None])
    said = np.arange(x.shape[1])
    rows, dims = linear_sum_assignment(cost)
    said[np.setdiff1d(said, rows)] = np.arange(rope.dims, x.shape[1])
    said[rows] = dims
    return said


def _residuals(x: F64, y: F64, cos: F64, sin: F64) -> tuple[F64, F64]:
    """[d] if each dim is the near one, [d] if it is the far one, with the best partner."""
    a, b = x * cos - y, x * sin
    squares = (a**2).sum(axis=0)[:, None] + (b**2).sum(axis=0)
    np.fill_diagonal(squares, np.inf)
    product = 2 * a.T @ b
    return (squares - product).min(axis=1), (squares + product).min(axis=1)


def foretold(before: F32 | F64, said: Ints, known: Knowledge) -> F32:
    """Keys [t, K, d] at positions 0 on, rotated, if `said` [K, d] are the public numbers of their dims."""
    index, plain = np.broadcast_to(said, before.shape), np.empty(before.shape, np.float32)
    np.put_along_axis(plain, index, before.astype(np.float32), axis=-1)
    rotated: F32 = np.take_along_axis(known.model.rotate(plain, np.arange(len(plain))), index, axis=-1)
    return rotated


def _confirmed(view: View, known: Knowledge, layer: int, said: Ints) -> int:
    """Step 3: how many dims."""
    fits = np.ones(said.shape, bool)
    for prompt in known.victims:
        before, after = aligned(view, known, layer, prompt)
        size = np.sqrt((after**2).mean(axis=-1, keepdims=True))
        fits &= (abs(foretold(before, said, known) - after) <= PRECISION * size).all(axis=0)
    return int(fits.sum())
