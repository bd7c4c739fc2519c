"""The gate stops what it is there to stop: real secure-infer with one bug planted in it, against the same without."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.attacks.knowledge import Fact
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage import prompts, suite, table, tampering
from evaluation.leakage.prompts import Script
from evaluation.transcript import Exchange, Transcript
from gpu_worker.recording import Recording
from tests.conftest import Rig, build
from tests.evaluation.attacks.ring_views import SIZES
from tests.simulators.in_process import InProcessWorker
from trusted_worker import attention, pads
from trusted_worker.arithmetic import F32, I32
from trusted_worker.pad_bank import Bank, Pad
from trusted_worker.schemes.base import InsideDecoder, ring_matmul
from trusted_worker.schemes.secure_infer import SecureInfer
from trusted_worker.verification import Verifier
from wire.linears import Linear, LinearSpec
from wire.v1 import gpu_worker_pb2 as pb

NAMES = ("embedding", "uniformity", "pad reuse", "pad algebra", "row space", "tampering")
ATTACKS = [entry for entry in table.ATTACKS if entry.name in NAMES]
TRIALS = 2048
SECURE, INT8 = "secure-infer", pb.PRECISION_INT8


@pytest.fixture(scope="module")
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama-bf16-tied-sharded")


@pytest.fixture(scope="module")
def script(folder: Path) -> Script:
    return prompts.script(PublicModel(folder), SIZES, 0)


@pytest.fixture(scope="module")
def plain(folder: Path, script: Script, tmp_path_factory: pytest.TempPathFactory) -> View:
    rig, into = build(folder, "plain", "float32"), tmp_path_factory.mktemp("plain")
    rig.worker.worker._recording = Recording(into)
    rig.worker.close()  # the next stream is recorded
    say(rig, script)
    return View.of(Transcript.read(into), script.knowledge.lengths)


@pytest.fixture(scope="module")
def split(folder: Path, script: Script) -> View:
    """What the public program makes of the same text."""
    rig = build(folder, "split", worker=lambda *_: InProcessWorker(folder, script.knowledge.model.config, INT8))
    say(rig, script)
    return _view(rig, script)


@pytest.fixture(scope="module")
def tampered(folder: Path) -> dict[str, list[Fact]]:
    """What comes of tampering where nothing is amiss."""
    return tampering.facts(folder, folder, trials=TRIALS)


Judge = Callable[..., list[str]]


@pytest.fixture
def make(folder: Path, script: Script) -> Callable[[], Rig]:
    """Real secure-infer on a real GPU worker, in this process, with pads for the whole script."""

    def worker(*_: object) -> InProcessWorker:
        return InProcessWorker(folder, script.knowledge.model.config, INT8)

    return lambda: build(folder, SECURE, worker=worker, bank_rows=sum(script.knowledge.lengths))


@pytest.fixture(scope="module", autouse=True)
def _only_these() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BARS", "HOLDS"):  # of schemes that are not here
            patch.setattr(suite, name, ())
        yield


def say(rig: Rig, script: Script) -> None:
    for prompt in script.prompts:
        rig.logits([int(token) for token in prompt], [len(prompt)])


def _view(rig: Rig, script: Script) -> View:
    seen = tuple(Exchange(one.operation, one.request, one.answer) for one in rig.worker.seen)
    return View.of(Transcript(seen), script.knowledge.lengths)


@pytest.fixture
def gate(script: Script, plain: View, split: View, make: Callable[[], Rig], tampered: dict[str, list[Fact]]) -> Judge:
    """Why the build must not pass, for secure-infer as it is when this is called."""

    def judge(facts: dict[str, list[Fact]] = tampered) -> list[str]:
        rig = make()
        say(rig, script)
        views = {"plain": plain, "split": split, SECURE: _view(rig, script)}
        cells = suite.attacked(views, script, ATTACKS, {"tampering": facts})
        return suite.failures(cells, ATTACKS, ())

    return judge


def _other_pads(monkeypatch: pytest.MonkeyPatch, linear: Linear, change: Callable[..., None]) -> None:
    """For one linear of each layer, where pads are made as well as where they are spent."""
    write, spend = pads.PadSource.write, pads.PadSource.spend

    def other(source: pads.PadSource, of: LinearSpec, index: int, out: Any, first: int = 0) -> None:
        write(source, of, index, out, first)
        if of.linear is linear:
            change(of, out.view(np.uint32), lambda like, r: write(source, like, index, r))

    def spent(source: pads.PadSource, of: LinearSpec, indices: list[int], out: Any) -> None:
        spend(source, of, indices, out)
        for index, row in zip(indices, out, strict=True):
            other(source, of, index, row)

    monkeypatch.setattr(pads.PadSource, "write", other)
    monkeypatch.setattr(pads.PadSource, "spend", spent)


def broken(found: list[str]) -> set[str]:
    """The attacks that broke it."""
    start = f"{SECURE} is broken: "
    return {one.removeprefix(start).partition(",")[0] for one in found if one.startswith(start)}


def test_without_a_bug_the_gate_is_open(gate: Judge) -> None:
    assert gate() == []


def test_a_pad_is_used_for_two_rows(gate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its u too, so every result is right."""
    take, kept = Bank.take, list[Pad | None]()

    def again(bank: Bank) -> Pad | None:
        kept.append(take(bank))
        return Pad(bank, kept[20].index, kept[20]._slot) if len(kept) == 101 and kept[20] else kept[-1]

    def unguarded(source: pads.PadSource, of: LinearSpec, indices: list[int], out: Any) -> None:
        source._own_streams().write_rows([pads.nonce(of, index) for index in indices], out)

    monkeypatch.setattr(Bank, "take", again)
    monkeypatch.setattr(pads.PadSource, "spend", unguarded)
    assert broken(gate()) == {"pad reuse", "pad algebra"}


def test_the_address_of_a_pad_lacks_the_layer(gate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pads are made as well as where they are spent."""
    whole = pads.nonce
    monkeypatch.setattr(pads, "nonce", lambda of, index: whole(LinearSpec(0, of.linear, of.k, of.n), index))
    assert broken(gate()) >= {"pad reuse"}


def test_one_linear_takes_the_pad_of_another_and_turns_its_sign(gate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """z + z' is small, and no difference is."""

    def turned(of: LinearSpec, r: Any, whole: Callable[[LinearSpec, Any], None]) -> None:
        whole(LinearSpec(of.layer, Linear.QKV, of.k, of.n), r)
        np.negative(r, out=r)

    _other_pads(monkeypatch, Linear.O, turned)
    assert broken(gate()) == {"pad algebra"}


def test_the_pads_of_the_widest_linear_come_from_a_pool(gate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where a pool saves most; what enters the layers has pads as ever."""

    def pooled(of: LinearSpec, r: Any, whole: Callable[[LinearSpec, Any], None]) -> None:
        whole(of, r)
        pool = np.random.default_rng(of.layer).integers(0, 1 << 32, (of.k // 8, of.k), np.uint32)
        r[...] = r[: len(pool)] @ pool

    _other_pads(monkeypatch, Linear.DOWN, pooled)
    assert broken(gate()) == {"pad algebra"}


def test_scores_are_sent(gate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """In exchanges of their own, from one layer, as integers of the ring."""
    product, scores, kept = InsideDecoder.product, attention._scores, list[F32]()

    def keep(q: F32, pages: F32, scratch: Any) -> F32:
        found = scores(q, pages, scratch)
        kept.append(found.reshape(len(found), -1).copy())
        return found

    def send(scheme: SecureInfer, of: LinearSpec, x: F32, rows: I32) -> F32:
        if (of.layer, of.linear) == (1, Linear.O):
            words = np.rint(kept[-1][:, : of.k] * 2.0**16).astype(np.int32)
            scheme._worker.call(ring_matmul(of), words, np.empty((len(words), of.n), np.int32))
        return product(scheme, of, x, rows)

    monkeypatch.setattr(attention, "_scores", keep)
    monkeypatch.setattr(InsideDecoder, "product", send)
    assert "uniformity" in broken(gate())


def test_products_are_not_verified(gate: Judge, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "accepts", lambda *_: True)
    assert broken(gate(tampering.facts(folder, folder, trials=TRIALS))) == {"tampering"}


def test_one_call_leaves_before_its_mask_is_added(gate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of hundreds, and right: the rows are in the send buffer, and nothing is removed from what comes back."""
    outside, calls = SecureInfer._outside, count(1)

    def early(scheme: SecureInfer, of: LinearSpec, x_q: I32, taken: list[Pad], y_q: I32) -> None:
        if next(calls) == 100:
            scheme._worker.call(ring_matmul(of), x_q, y_q)
        else:
            outside(scheme, of, x_q, taken, y_q)

    monkeypatch.setattr(SecureInfer, "_outside", early)
    assert "uniformity" in broken(gate())
