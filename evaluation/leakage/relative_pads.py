"""Masks that save too much, broken on purpose: what secure-infer's pads would be worth if they were not fresh.

Each takes what split recorded, x_q of every linear, and gives what the GPU worker would have been sent instead. What it
answers is left out: it follows from what it was sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from evaluation.attacks.view import View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Exchange, Transcript
from wire.v1 import gpu_worker_pb2 as pb

U32 = npt.NDArray[np.uint32]
Change = Callable[[pb.RingMatmul, Array], Array]  # of one call: where it goes, x_q int32 [rows, k]

SAVING = 8  # a pool has d / 8 pads
LOUD = 10.0  # what real masks have more than activations


def real_pool(views: Mapping[str, View], script: Script) -> View:
    """Real masks that combine d/8 pads for each linear: precomputed noise (arXiv 2602.11088)."""
    rng = np.random.default_rng([script.knowledge.seed, 1])
    pools: dict[int, Array] = {}

    def change(of: pb.RingMatmul, x_q: Array) -> Array:
        pool = pools.setdefault(_number(of), rng.standard_normal((x_q.shape[1] // SAVING, x_q.shape[1])))
        x = x_q / np.sqrt((x_q.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
        coefficients = rng.standard_normal((len(x), len(pool))) * LOUD / len(pool) ** 0.5
        return np.asarray(x + coefficients @ pool, np.float32)

    return _sent(views, script, change)


def ring_pool(views: Mapping[str, View], script: Script) -> View:
    """The same modulo 2^32, pads and coefficients uniform."""
    rng = np.random.default_rng([script.knowledge.seed, 2])
    pools: dict[int, U32] = {}

    def change(of: pb.RingMatmul, x_q: Array) -> Array:
        pool = pools.setdefault(_number(of), _uniform(rng, x_q.shape[1] // SAVING, x_q.shape[1]))
        return x_q + (_uniform(rng, len(x_q), len(pool)) @ pool).view(np.int32)

    return _sent(views, script, change)


def reused_once(views: Mapping[str, View], script: Script) -> View:
    """A fresh pad for every row, but for the last of all: it has the first one's."""
    rng = np.random.default_rng([script.knowledge.seed, 3])
    sent = _sent(views, script, lambda of, x_q: x_q + _uniform(rng, *x_q.shape).view(np.int32))
    clear = [event for event in views["split"].transcript.exchanges if event.operation.HasField("ring_matmul")]
    masked = sent.transcript.exchanges
    width = min(masked[0].up.shape[1], masked[-1].up.shape[1])
    last = masked[-1].up.copy()
    last[-1, :width] = clear[-1].up[-1, :width] + (masked[0].up[0, :width] - clear[0].up[0, :width])
    events = (*masked[:-1], replace(masked[-1], up=last))
    return View.of(Transcript(events), script.knowledge.lengths)


def turned_rows(views: Mapping[str, View], script: Script) -> View:
    """U = A.H with a fresh orthogonal A for each call: GELO (arXiv 2603.05035)."""
    rng = np.random.default_rng([script.knowledge.seed, 4])
    return _sent(views, script, lambda of, x_q: _mixed(np.linalg.qr(rng.standard_normal((len(x_q),) * 2))[0], x_q))


def mixed_rows(views: Mapping[str, View], script: Script) -> View:
    """U = A.H with a fresh A of any kind, as DarKnight's combinations are (MICRO 2021), without its noise."""
    rng = np.random.default_rng([script.knowledge.seed, 5])
    return _sent(views, script, lambda of, x_q: _mixed(rng.standard_normal((len(x_q),) * 2), x_q))


# By name: how it is made, and the attacks that must show it.


def _sent(views: Mapping[str, View], script: Script, change: Change) -> View:
    """split's transcript with other tensors going up."""
    nothing = np.zeros((0, 0), np.int32)
    events: list[Exchange] = []
    for event in views["split"].transcript.exchanges:
        of = event.operation.ring_matmul
        if event.operation.HasField("ring_matmul"):
            events.append(replace(event, up=change(of, event.up), down=nothing))
    return View.of(Transcript(tuple(events)), script.knowledge.lengths)


def _uniform(rng: np.random.Generator, rows: int, width: int) -> U32:
    return rng.integers(0, 1 << 32, (rows, width), np.uint32)


def _mixed(a: Array, x_q: Array) -> Array:
    """Rows of one size before they are mixed."""
    h = x_q / np.maximum(np.linalg.norm(x_q, axis=1, keepdims=True), 1e-30)
    return np.asarray(a @ h, np.float32)


def _number(of: pb.RingMatmul) -> int:
    return of.layer << 8 | of.linear
