"""A cheating GPU worker is caught before the value is used, whatever it changes, with one and the same error."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import Rig, build, forward, one_run
from tests.simulators.workers import CheatingWorker, Words
from trusted_worker import arithmetic
from trusted_worker.verification import PRIME
from wire.errors import VerificationError

Cheat = Callable[[Words, Words], Words]
PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 300, 8)]
RANDOM = np.random.default_rng()


def add(amount: int) -> Cheat:
    """Add modulo 2^32 at a random place."""

    def cheat(answer: Words, previous: Words) -> Words:
        place = RANDOM.integers(len(answer)), RANDOM.integers(answer.shape[1])
        answer[place] = np.array([int(answer[place]) + amount], np.int64).astype(np.int32)[0]
        return answer

    return cheat


def flip_bit(answer: Words, previous: Words) -> Words:
    answer[RANDOM.integers(len(answer)), RANDOM.integers(answer.shape[1])] ^= np.int32(1 << RANDOM.integers(31))
    return answer


def noise(answer: Words, previous: Words) -> Words:
    return answer + RANDOM.integers(-3, 4, answer.shape, dtype=np.int32) * (RANDOM.random(answer.shape) < 0.01) + 1


def swap_rows(answer: Words, previous: Words) -> Words:
    return answer[::-1].copy()


def replay(answer: Words, previous: Words) -> Words:
    return previous if previous.shape == answer.shape else np.roll(answer, 1, axis=1)


CHEATS: dict[str, Cheat] = {
    "one": add(1),
    "minus one": add(-1),
    "2^31": add(1 << 31),
    "2^31-1": add((1 << 31) - 1),
    "-(2^31-1)": add(-((1 << 31) - 1)),
    "P (15 modulo 2^32)": add(PRIME),
    "-P": add(-PRIME),
    "2P": add(2 * PRIME),
    "bit": flip_bit,
    "noise": noise,
    "swapped rows": swap_rows,
    "replay": replay,
    "zeros": lambda answer, previous: np.zeros_like(answer),
    "constant": lambda answer, previous: np.full_like(answer, -(1 << 31)),
}


@pytest.fixture(scope="module")
def shared(model_folder: Callable[[str], Path]) -> Rig:
    return build(model_folder("llama"), "secure-infer", worker=CheatingWorker, bank_rows=32)


@pytest.fixture
def rig(shared: Rig) -> Rig:
    """The same rig for every test, with its bank full and its worker honest."""
    worker = cast(CheatingWorker, shared.worker)
    worker.cheat, worker.calls = None, 0
    shared.fill()
    return shared


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("honest_calls", [0, 1, 2, 3, 12])
def test_a_wrong_product_is_never_used(rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str, honest_calls: int) -> None:
    """The lie comes at each kind of linear in turn; nothing after step 5 may see it."""
    worker, used = cast(CheatingWorker, rig.worker), 0
    dequantize = arithmetic.dequantize

    def count(*args: object) -> object:
        nonlocal used
        used += 1
        return dequantize(*args)  # type: ignore[arg-type]

    def cheat(answer: Words, previous: Words) -> Words:
        return answer if worker.calls <= honest_calls else CHEATS[name](answer, previous)

    monkeypatch.setattr(arithmetic, "dequantize", count)
    worker.cheat = cheat
    cache, before = rig.scheme.open(16), rig.scheme.counters()
    with pytest.raises(VerificationError) as caught:
        forward(rig.scheme, one_run(cache, PROMPT, 0))
    assert used == honest_calls
    assert cache.length == (0 if honest_calls < 12 else len(PROMPT))  # the head comes after all keys and values
    assert str(caught.value) == str(VerificationError())
    counters = rig.scheme.counters()
    assert counters["products_verified"] - before["products_verified"] == honest_calls * len(PROMPT)
    assert counters["products_failed"] - before["products_failed"] == len(PROMPT)
    cache.free()


def test_a_result_that_recovers_to_the_smallest_int32_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """abs(-2^31) wraps to -2^31 in int32: the range check must not be built on it."""
    worker, bank = cast(CheatingWorker, rig.worker), rig.bank
    opened: list[Words] = []
    original = bank.open

    def spy(sheet: int, index: int, slot: int, out: Words) -> None:
        original(sheet, index, slot, out)
        opened.append(out.copy())

    def cheat(answer: Words, previous: Words) -> Words:
        u = np.zeros((len(answer), bank.sheets.widths[0]), np.int32)
        for row, pad in enumerate(rig.scheme._pads):
            original(0, pad.index, pad._slot, u[row])
        answer[0, 0] = (u[0, 0].astype(np.int64) - (1 << 31)).astype(np.int32)
        return answer

    monkeypatch.setattr(bank, "open", spy)
    worker.cheat = cheat
    with pytest.raises(VerificationError):
        forward(rig.scheme, one_run(rig.scheme.open(16), PROMPT, 0))
    assert opened


def test_after_a_lie_the_secret_is_new_and_an_honest_worker_is_believed_again(rig: Rig) -> None:
    worker = cast(CheatingWorker, rig.worker)
    verifier = rig.scheme._verifier
    before = verifier._s.array.copy()
    worker.cheat = flip_bit
    with pytest.raises(VerificationError):
        rig.logits(PROMPT, [8])
    worker.cheat = None
    rig.scheme.distrust()
    assert not np.array_equal(before, verifier._s.array)
    honest = build_like(rig)
    assert np.array_equal(rig.logits(PROMPT, [8]), honest)


def build_like(rig: Rig) -> npt.NDArray[np.float32]:
    """Logits of the same prompt computed inside, without any worker."""
    from trusted_worker.schemes.tee_only import TeeOnly

    scheme = TeeOnly(rig.weights, rig.scheme._pages, rig.scratch, 16)
    return forward(scheme, one_run(scheme.open(16), PROMPT, 0))


def test_a_tampered_bank_is_the_same_error(model_folder: Callable[[str], Path]) -> None:
    rig = build(model_folder("llama"), "secure-infer", bank_rows=8)
    bank = rig.bank
    size = bank._file.seek(0, 2)
    bank._file.seek(0)
    bank._file.write(bytes(size))
    bank._file.flush()
    with pytest.raises(VerificationError):
        rig.logits(PROMPT, [8])
