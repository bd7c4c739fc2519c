"""Schemes that are broken on purpose: secret rotations, permutations and scales of what a GPU worker sees.

Each is made of what plain really held, after a published scheme, and shows one place only. Fixed keys are drawn once,
fresh ones per row or block. The matrix must call every one of them broken, or the attacks are no good.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from evaluation.attacks.block_algebra import BLOCK, blocks
from evaluation.attacks.parts import part
from evaluation.attacks.public_model import pairs
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array

F64 = npt.NDArray[np.float64]


def static_rotation(views: Mapping[str, View], script: Script) -> View:
    """x Q, with a secret orthogonal matrix Q for all rows: ConjFormer ("Privacy from Symmetry", arXiv 2606.16461)."""
    rng, hidden = script.knowledge.rng, script.knowledge.model.config.hidden
    rotation = orthogonal(rng, hidden)
    return _inputs(views, script, lambda x: x @ rotation)


def scaled_permutation(views: Mapping[str, View], script: Script) -> View:
    """alpha x Pi, with a secret permutation Pi and a fresh scale alpha for each row: STIP (arXiv 2312.00025)."""
    rng, hidden = script.knowledge.rng, script.knowledge.model.config.hidden
    order = rng.permutation(hidden)
    return _inputs(views, script, lambda x: x[:, order] * rng.uniform(0.5, 2, (len(x), 1)))


def mixed_blocks(views: Mapping[str, View], script: Script) -> View:
    """S P (V M + A) for each block of rows of each head of the cached V: KV-Cloak (arXiv 2508.09442).

    S, M and the beacon in A are secret and static, P fresh. A block has 4 rows instead of 16, so that a prompt of 160
    tokens shows every place that a beacon can have.
    """
    plain, rng, c = views["plain"], script.knowledge.rng, script.knowledge.model.config
    largest = max(abs(prompt["cache_v", 0]).max() for prompt in plain.prompts)
    heads = [_cloak(rng, c.head_dim, 2.84 * largest) for _ in range(c.kv_heads)]

    def change(_: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        v = rows["cache_v", 0].astype(np.float64)
        mixed = [hide(v[:, head]) for head, hide in enumerate(heads)]
        return {("cache_v", 0): np.stack(mixed, axis=1).astype(np.float32)}

    return plain.changed(change)


def orthogonal(rng: np.random.Generator, size: int) -> F64:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    rotation: F64 = q * np.sign(np.diag(r))
    return rotation


def _inputs(views: Mapping[str, View], script: Script, hide: Callable[[F64], F64]) -> View:
    """What enters layer 0, hidden; nothing else is seen."""
    plain = views["plain"]

    def change(number: int, _: dict[Place, Array]) -> dict[Place, Array]:
        x = part(plain, script.knowledge, "input", 0, [number])
        if x is None:
            raise ValueError("plain shows what enters its layers")
        return {("input", 0): hide(x.astype(np.float64)).astype(np.float32)}

    return plain.changed(change)


def _cloak(rng: np.random.Generator, dims: int, threshold: float) -> Callable[[F64], F64]:
    """One head's secrets, and what they do to its rows [t, d]: as many as fill whole blocks."""
    mix, turn = orthogonal(rng, BLOCK), np.exp(2j * np.pi * rng.random(dims // 2))
    mark = np.zeros((BLOCK, dims))
    mark[0] = rng.uniform(3, 4, dims) * threshold
    near, far = pairs(dims, interleaved=False)

    def hide(rows: F64) -> F64:
        points = (rows[:, near] + 1j * rows[:, far]) * turn
        turned = blocks(np.concatenate([points.real, points.imag], axis=1), 1.5 * threshold) + mark
        return np.concatenate([mix @ block[rng.permutation(BLOCK)] for block in turned])

    return hide
