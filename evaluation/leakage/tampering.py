"""Active tampering: how often a wrong answer of the GPU worker is believed.

The only measurement that runs the trusted worker's own code in this process: what is tried is its check, and a check
written here would prove nothing. Two ways, for every kind of wrong answer (wrong_answers.py):

(1) step 5's Freivalds check on a hundred thousand wrong rows, which must refuse by itself, whatever their range: theory
    says that it believes one row in 2^32;
(2) whole passes of each scheme, put together as the trusted worker does it, with a GPU worker that lies once, at each
    kind of linear in turn: a pass that hands out logits after a lie has believed it. Only secure-infer refuses any.

Rows that share a secret s do not fail independently of each other: s may be unlucky for all of them. So s is drawn anew
for every batch and every pass, and p counts those, each with the sum of its rows' chances, which holds whatever they
share. One row that is believed is what theory allows once in forty thousand runs; two are not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Fact
from evaluation.attacks.public_model import PublicModel
from evaluation.leakage.stage import SECURE, STAGED, Staged
from evaluation.leakage.wrong_answers import KINDS, U32, Case
from trusted_worker import verification
from trusted_worker.arithmetic import I32
from trusted_worker.assembly import assemble
from trusted_worker.config import parse
from trusted_worker.model import Batch, Run
from trusted_worker.offload import GpuWorker
from trusted_worker.schemes.base import Scheme
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.errors import VerificationError
from wire.linears import BLOCK, Linear, LinearSpec, spec
from wire.quantize import quantize_rows
from wire.scratch import SUM_LIMBS
from wire.v1 import gpu_worker_pb2 as pb

TRIALS = 102_400  # rows of each kind
TOGETHER = 4096
CHANCE = 2.0**-32
ROWS = 3  # of a pass
BUDGET, BANK = 48 << 20, 16 << 20  # bytes, for a small model

Array = npt.NDArray[Any]


class Count(NamedTuple):
    """Wrong rows or passes that were believed, of so many; and how many secrets believed any, of so many."""

    hits: int = 0
    tried: int = 0
    unlucky: int = 0
    secrets: int = 0

    def plus(self, hits: int, tried: int) -> "Count":
        """With those under one more secret."""
        return Count(self.hits + hits, self.tried + tried, self.unlucky + bool(hits), self.secrets + 1)

    def fact(self, kind: str) -> Fact:
        """How likely so many unlucky secrets are, if each row is believed once in 2^32."""
        from scipy.stats import binom

        most = CHANCE * min(self.tried, TOGETHER) if self.tried > self.secrets else CHANCE
        p = float(binom.sf(self.unlucky - 1, self.secrets, most))
        return Fact(kind, "wrong answers believed", self.hits, self.tried, CHANCE, p)


Counts = dict[str, Count]  # by kind


def facts(folder: Path, small: Path, seed: int = 0, trials: int = TRIALS) -> dict[str, list[Fact]]:
    """For each scheme, of every kind of wrong answer, how many were believed. Passes are of a `small` model."""
    counts: dict[str, Counts] = {staged.name: dict.fromkeys(KINDS, Count()) for staged in STAGED}
    checked(PublicModel(folder), seed, trials, counts[SECURE.name])
    for staged in STAGED:
        passes(small, staged, seed, counts[staged.name])
    return {scheme: [count.fact(kind) for kind, count in mine.items()] for scheme, mine in counts.items()}


def checked(model: PublicModel, seed: int, trials: int, counts: Counts) -> None:
    """(1) On the smallest linear of a layer. Right rows must pass."""
    rng = np.random.default_rng([seed, 6])
    of = min((spec(model.config, 0, linear) for linear in BLOCK), key=lambda one: one.k * one.n)
    w_q = quantize_rows(model.weight(0, of.linear))[0]
    check = Check(of, w_q)
    for first in range(0, trials, TOGETHER):
        x_q = rows_within(rng, w_q, min(TOGETHER, trials - first))
        right, strange = product(x_q, w_q), rng.integers(-(1 << 31), 1 << 31, x_q.shape, np.int32)
        previous = np.roll(right, 1, axis=0) + product(strange, w_q)  # the difference of two pads, through the weights
        check.draw()
        expected = check.expect(x_q)
        if not check.passed(expected, right).all():
            raise RuntimeError("the check refuses right products: nothing was measured")
        for kind, wrong in KINDS.items():
            said = wrong(Case(rng, right, w_q, previous, first))
            changed = (said != right).any(axis=1)
            passed = check.passed(expected, said) & changed
            counts[kind] = counts[kind].plus(int(passed.sum()), int(changed.sum()))


class Check:
    """The verifier's own sums and residues, with a verdict for each row instead of one for all of them."""

    def __init__(self, of: LinearSpec, w_q: npt.NDArray[np.int8]) -> None:
        memory = SecureMemory(BUDGET)
        self._of, self._w_q, self._verifier = of, w_q, verification.Verifier(memory, [of])
        self._scratch = Scratch(memory, BUDGET // 2)

    def draw(self) -> None:
        """A fresh s."""
        self._verifier.draw()
        with self._scratch.frame():
            self._verifier.prepare(self._of, [(0, self._w_q)], self._scratch)

    def expect(self, x_q: I32) -> list[int]:
        """What right products of these rows give."""
        return self._verifier.expect(self._of, x_q, self._scratch)

    def passed(self, expected: list[int], y_q: U32) -> npt.NDArray[np.bool_]:
        """Which rows give that."""
        with self._scratch.frame():
            secret = self._verifier._secret(0, y_q.shape[1], self._scratch)
            sums = verification.dots(secret, y_q.view(np.int32), SUM_LIMBS, self._scratch)
        given = verification.residues(sums, verification.S_BITS)
        return np.array([one == other for one, other in zip(given, expected, strict=True)])


def rows_within(rng: np.random.Generator, w_q: npt.NDArray[np.int8], rows: int) -> I32:
    """Rows [rows, k] as large as step 1 makes them, so that no product reaches 2^30."""
    limit = (1 << 30) // 128 // w_q.shape[1]
    return rng.integers(-limit, limit + 1, (rows, w_q.shape[1]), np.int32)


def product(z: I32, w_q: Array) -> U32:
    """z . W_q^T modulo 2^32, exact in float64."""
    return (z.astype(np.float64) @ w_q.T.astype(np.float64, copy=False)).astype(np.int64).astype(np.uint32)


def passes(folder: Path, staged: Staged, seed: int, counts: Counts) -> None:
    """(2) Which passes believe it. An honest one must come to its end."""
    model = PublicModel(folder)
    liar = Liar(model, np.random.default_rng([seed, 7]))
    settings = parse([*_flags(staged), "--model", str(folder), "--memory-budget", str(BUDGET)])
    built = assemble(settings, model.config, SecureMemory(BUDGET), cast(GpuWorker, liar)).scheme
    ids = np.random.default_rng([seed, 8]).integers(0, model.config.vocabulary, ROWS).astype(np.int32)
    if not believes(built, liar, ids):
        raise RuntimeError(f"{staged.name} refuses right products: nothing was measured")
    answers = liar.answers
    calls = sorted({0, 1, 2, 3, answers - 1} & set(range(answers)))  # each kind of linear
    for number, kind in enumerate(KINDS):  # where nothing is checked, one lie of a kind is enough
        for call in calls if staged is SECURE else [calls[number % len(calls)]]:
            liar.lie(kind, call)
            counts[kind] = counts[kind].plus(believes(built, liar, ids), 1)


def believes(scheme: Scheme, liar: "Liar", ids: I32) -> bool:
    """Whether a pass over a prompt comes to its end, or hands out logits after a lie and refuses then.

    secure-infer has pads for all of it, and a fresh s after a lie.
    """
    while scheme.idle():
        pass
    cache, every, late = scheme.open(len(ids)), np.arange(len(ids), dtype=np.int32), list[bool]()
    cache.wake(len(ids))
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # a lie about floats need not be a number
            batch = Batch(ids, (Run(cache, 0, len(ids), 0),), every)
            scheme.forward(batch, lambda index, logits: late.append(liar.lied))
    except VerificationError:
        scheme.distrust()
        return any(late)
    finally:
        cache.free()
    return True


def _flags(staged: Staged) -> list[str]:
    return ["--scheme", staged.scheme, "--precision", staged.precision, *staged.more, "--pad-bank", str(BANK)]


class Liar:
    """A GPU worker that answers rightly but once a pass, with noise for floats: schemes.base.Worker."""

    stream = 1

    def __init__(self, model: PublicModel, rng: np.random.Generator) -> None:
        self._model, self._rng = model, rng
        self._weights: dict[tuple[int, int], Array] = {}  # W_q as float64
        self._old: dict[tuple[int, ...], U32] = {}
        self.answers = 0  # so far in this pass
        self._kind, self._call = "", -1

    @property
    def lied(self) -> bool:
        """In this pass."""
        return 0 <= self._call < self.answers

    def lie(self, kind: str, call: int) -> None:
        """In the next pass, in the answer of this number."""
        self.answers, self._kind, self._call = 0, kind, call

    def call(
        self,
        operation: pb.Operation,
        array: Array | None,
        into: Array | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """See schemes.base.Worker."""
        if meanwhile:
            meanwhile()
        if into is None:
            return
        ring = operation.ring_matmul
        place = ring.layer, ring.linear
        w_q = self._weight(*place) if operation.HasField("ring_matmul") else np.ones((into.shape[1], 8), np.int8)
        noise = self._rng.standard_normal(into.shape).astype(np.float32).view(np.uint32)
        right = product(array, w_q) if operation.HasField("ring_matmul") and array is not None else noise
        said, like = right, (*place, *into.shape)
        if self.answers == self._call:
            said = KINDS[self._kind](Case(self._rng, right, w_q, self._old.get(like, right[::-1]), self.answers))
        self.answers, self._old[like] = self.answers + 1, right
        into[...] = said.view(into.dtype)

    def close(self) -> None:
        """There is no stream."""

    def _weight(self, layer: int, number: int) -> Array:
        if (layer, number) not in self._weights:
            w_q = quantize_rows(self._model.weight(layer, Linear(number)))[0]
            self._weights[layer, number] = w_q.astype(np.float64)
        return self._weights[layer, number]
