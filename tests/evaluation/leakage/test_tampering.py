"""The trial of the check: nothing passes it, everything passes where there is none, and a broken one is noticed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks.public_model import PublicModel
from evaluation.leakage import tampering
from evaluation.leakage.stage import SECURE, STAGED
from evaluation.leakage.wrong_answers import KINDS
from trusted_worker import verification
from trusted_worker.model import Accept, Batch
from trusted_worker.schemes.secure_infer import SecureInfer
from wire.errors import VerificationError

TRIALS = 512


@pytest.fixture(scope="module")
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama-bf16-tied-sharded")


def test_secure_infer_believes_nothing_and_the_others_everything(folder: Path) -> None:
    found = tampering.facts(folder, folder, trials=TRIALS)
    assert list(found) == [staged.name for staged in STAGED]
    for scheme in found:
        share = scheme != "secure-infer"
        assert [fact.target for fact in found[scheme]] == list(KINDS)
        assert all(fact.hits == share * fact.trials for fact in found[scheme])
    assert all(fact.trials == TRIALS + 5 for fact in found["secure-infer"])  # a lie at each kind of linear


def counted() -> tampering.Counts:
    return dict.fromkeys(KINDS, tampering.Count())


def test_a_check_in_the_ring_is_seen_to_let_top_bits_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freivalds modulo 2^32 instead of a prime: 2^31 e_j passes half of the time."""
    monkeypatch.setattr(verification, "PRIME", 1 << 32)
    counts = counted()
    tampering.checked(PublicModel(folder), 0, TRIALS, counts)
    passed, tried, *_ = counts["2^31 at one output"]
    assert 0.1 < passed / tried < 0.9  # as many of the 64 words of s are even
    assert counts["one more or less"].hits == 0


def test_a_check_that_refuses_everything_measures_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tampering.Check, "expect", lambda check, x_q: [0] * len(x_q))
    with pytest.raises(RuntimeError, match="refuses right products"):
        tampering.checked(PublicModel(folder), 0, TRIALS, counted())

    def refuse(*_: object) -> bool:
        raise VerificationError

    monkeypatch.setattr(verification.Verifier, "accepts", refuse)
    with pytest.raises(RuntimeError, match="refuses right products"):
        tampering.passes(folder, SECURE, 0, counted())


def test_a_scheme_that_does_not_ask_the_check_is_caught_by_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification.Verifier, "accepts", lambda *_: True)
    counts = counted()
    tampering.passes(folder, SECURE, 0, counts)
    assert all(count.hits == count.tried == 5 for count in counts.values())


def test_logits_before_the_verdict_are_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing afterwards is too late."""
    forward = SecureInfer.forward

    def early(scheme: SecureInfer, batch: Batch, accept: Accept) -> None:
        try:
            forward(scheme, batch, accept)
        except VerificationError:
            accept(0, np.zeros(1, np.float32))
            raise

    monkeypatch.setattr(SecureInfer, "forward", early)
    counts = counted()
    tampering.passes(folder, SECURE, 0, counts)
    assert all(count.hits == count.tried == 5 for count in counts.values())


def test_one_unlucky_secret_is_theory_and_two_are_not() -> None:
    none = tampering.Count()
    for _ in range(24):
        none = none.plus(0, 4096)
    once = none.plus(17, 4096)
    assert none.fact("a").p == 1.0
    assert 1e-5 < (once.fact("a").p or 0) < 1e-4
    assert (once.plus(1, 4096).fact("a").p or 1) < 1e-8
    assert (tampering.Count().plus(1, 1).fact("a").p or 1) < 1e-9  # a pass of its own is no theory's
