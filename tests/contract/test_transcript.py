"""What a curious GPU worker sees of secure-infer: uniform words, never the same pad twice, never a plaintext row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import Rig, build, forward, one_run
from tests.simulators.workers import RecordingWorker
from trusted_worker import arithmetic
from wire.errors import VerificationError

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 300, 24)]


@pytest.fixture
def rig(model_folder: Callable[[str], Path]) -> Rig:
    return build(model_folder("llama"), "secure-infer", worker=RecordingWorker, bank_rows=72)


@pytest.fixture
def rows_in(monkeypatch: pytest.MonkeyPatch) -> list[npt.NDArray[np.int32]]:
    """Every x_q of the run, in order of the products."""
    seen: list[npt.NDArray[np.int32]] = []
    quantize = arithmetic.quantize

    def spy(*args: Any) -> Any:
        result = quantize(*args)
        seen.append(result[0].copy())
        return result

    monkeypatch.setattr(arithmetic, "quantize", spy)
    return seen


def converse(rig: Rig) -> None:
    """Two sessions side by side, one of them twice with the same words; a session that is dropped; decode steps."""
    rig.logits(PROMPT, [24])
    rig.logits(PROMPT, [24])  # the same conversation again
    first, second = rig.scheme.open(32), rig.scheme.open(32)
    for position in range(8):
        for cache in (first, second):
            forward(rig.scheme, one_run(cache, PROMPT[position : position + 1], position))
    first.free()


def pads(rig: Rig, rows_in: list[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int32]]:
    """r = z - x_q of every masked row."""
    seen = cast(RecordingWorker, rig.worker).seen
    assert len(seen) == len(rows_in)
    return [z - x for (_, _, words), xs in zip(seen, rows_in, strict=True) for z, x in zip(words, xs, strict=True)]


def test_ring_words_are_uniform(rig: Rig, rows_in: list[npt.NDArray[np.int32]]) -> None:
    converse(rig)
    words = np.concatenate([z.reshape(-1) for _, _, z in cast(RecordingWorker, rig.worker).seen])
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words.view(np.uint32) >> shift) & 255, minlength=256)
        expected = len(words) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 140 < chi_square < 400  # 255 degrees of freedom: each side is beyond one in a million


def test_words_do_not_correlate_with_the_activations(rig: Rig, rows_in: list[npt.NDArray[np.int32]]) -> None:
    converse(rig)
    words = np.concatenate([z.reshape(-1) for _, _, z in cast(RecordingWorker, rig.worker).seen]).astype(np.float64)
    activations = np.concatenate([x.reshape(-1) for x in rows_in]).astype(np.float64)
    assert abs(np.corrcoef(words, activations)[0, 1]) < 6 / len(words) ** 0.5


def test_no_plaintext_row_is_sent(rig: Rig, rows_in: list[npt.NDArray[np.int32]]) -> None:
    converse(rig)
    sent = b"".join(z.tobytes() for _, _, z in cast(RecordingWorker, rig.worker).seen)
    for x_q in rows_in:
        for row in x_q:
            for start in range(0, len(row) - 4, 16):
                piece = row[start : start + 4]
                assert piece.tobytes() not in sent or not piece.any()


def test_no_pad_is_ever_used_twice(rig: Rig, rows_in: list[npt.NDArray[np.int32]]) -> None:
    converse(rig)
    pieces = [row[i : i + 4].tobytes() for row in pads(rig, rows_in) for i in range(0, len(row), 4)]
    assert len(set(pieces)) == len(pieces)
    assert rig.scheme.counters()["pads_reused"] == 0


@pytest.mark.parametrize("failing_call", [0, 3, 12])
def test_an_aborted_step_and_its_retry_share_no_pad(
    rig: Rig, rows_in: list[npt.NDArray[np.int32]], monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    call, calls = rig.worker.call, iter(range(10_000))

    def failing(*args: Any) -> Any:
        answer = call(*args)
        if next(calls) == failing_call:
            raise VerificationError
        return answer

    monkeypatch.setattr(rig.worker, "call", failing)
    with pytest.raises(VerificationError):
        rig.logits(PROMPT, [24])
    stock = rig.scheme.counters()["pads_in_stock"]
    rig.logits(PROMPT, [24])
    assert rig.scheme.counters()["pads_in_stock"] == stock - 24  # the aborted step's pads did not come back
    pieces = [row[i : i + 4].tobytes() for row in pads(rig, rows_in) for i in range(0, len(row), 4)]
    assert len(set(pieces)) == len(pieces)


def test_no_pad_comes_again_after_a_lie_or_on_a_new_stream(rig: Rig, rows_in: list[npt.NDArray[np.int32]]) -> None:
    """Pads belong to the boot, not to the stream."""
    for end in (rig.scheme.distrust, rig.worker.close, lambda: None):
        rig.logits(PROMPT, [24])
        end()
        rig.fill()
    pieces = [row[i : i + 4].tobytes() for row in pads(rig, rows_in) for i in range(0, len(row), 4)]
    assert len(set(pieces)) == len(pieces)
    assert len(pieces) > 3 * 24 * 4


def test_the_same_words_under_another_boot_key_look_different(model_folder: Callable[[str], Path]) -> None:
    seen = []
    for _ in range(2):
        rig = build(model_folder("qwen2"), "secure-infer", worker=RecordingWorker)
        rig.logits(PROMPT[:4], [4])
        seen.append(cast(RecordingWorker, rig.worker).seen)
    for (_, _, one), (_, _, other) in zip(*seen, strict=True):
        assert (one != other).mean() > 0.99
