"""Pools of pads give way, in the reals and in the ring; fresh pads do not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks import fixed_point, pad_algebra
from evaluation.attacks.knowledge import Answers
from evaluation.attacks.view import View
from evaluation.leakage.prompts import Script
from tests.conftest import build
from tests.evaluation.attacks.ring_views import I32, clear, one_time_pad, tiny_script, uniform, view
from tests.simulators.workers import RecordingWorker

REAL, RING = "input, layer 0, without the masks' directions", "input, layer 0, modulo the known masks"
POOL = 8  # of 64 dimensions


@pytest.fixture(scope="module")
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama-bf16-tied-sharded")


@pytest.fixture(scope="module")
def script(folder: Path) -> Script:
    return tiny_script(folder)


def right(script: Script, seen: View) -> dict[str, float]:
    """The share of right answers."""
    found = pad_algebra.attack(seen, script.knowledge)
    return {one.target: float((one.said == script.truth["tokens"]).mean()) for one in found if isinstance(one, Answers)}


def test_rows_without_masks_are_read(script: Script) -> None:
    assert right(script, view(script, lambda x_q: x_q)) == {REAL: 1.0, RING: 1.0}


def test_fresh_pads_leave_chance(script: Script) -> None:
    assert all(share <= 0.08 for share in right(script, view(script, one_time_pad(1))).values())  # 80 of 1 in 301


def test_a_real_pool_is_projected_out(script: Script) -> None:
    rng = np.random.default_rng(2)
    pool = rng.standard_normal((POOL, 64)) * 20

    def mask(x_q: I32) -> np.ndarray:
        x = x_q / np.linalg.norm(x_q, axis=1, keepdims=True)
        return np.asarray(x + rng.standard_normal((len(x), POOL)) @ pool, np.float32)

    assert right(script, view(script, mask))[REAL] >= 0.95


def test_where_rows_end_is_no_fall() -> None:
    """Few rows, some of them said again, fill few directions; behind these the spectrum falls once more, to nothing."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((20, 64))[rng.integers(0, 20, 40)]
    masks = rng.standard_normal((40, POOL)) @ rng.standard_normal((POOL, 64)) * 10
    rest = pad_algebra.without_masks((x + masks).astype(np.float32))
    assert round(64 - float(np.trace(rest))) == POOL


def test_a_pool_in_the_ring_is_spanned_by_known_rows(script: Script) -> None:
    rng = np.random.default_rng(3)
    pool = uniform(rng, POOL, 64)
    shares = right(script, view(script, lambda x_q: x_q + uniform(rng, len(x_q), POOL) @ pool))
    assert shares[RING] == 1.0
    assert shares[REAL] <= 0.08  # real geometry is void


def test_a_pool_as_large_as_the_width_is_safe_from_this(script: Script) -> None:
    rng = np.random.default_rng(4)
    pool = uniform(rng, 64, 64)
    assert right(script, view(script, lambda x_q: x_q + uniform(rng, len(x_q), 64) @ pool))[RING] <= 0.08


def test_the_integers_of_a_known_token_are_those_that_are_sent(folder: Path, script: Script) -> None:
    """The public rule as an attacker writes it down, against the trusted worker's."""
    rig = build(folder, "split", worker=RecordingWorker)
    prompt = script.prompts[0]
    rig.logits([int(token) for token in prompt], [len(prompt)])
    assert np.array_equal(rig.worker.seen[0][2], clear(script)[0])


def test_integers_of_a_zero_row_are_zero(script: Script) -> None:
    assert not fixed_point.integers(script.knowledge.model, np.zeros((2, 64), np.float32)).any()


@pytest.mark.parametrize("rows", [3, 8, 40])
def test_a_span_holds_what_it_is_made_of(rows: int) -> None:
    rng = np.random.default_rng(rows)
    pool = uniform(rng, 5, 24).view(np.uint32)
    combined = uniform(rng, rows, 5).view(np.uint32) @ pool
    basis, pivots = pad_algebra.span(combined)
    assert len(pivots) <= 5
    assert np.array_equal(basis[:, pivots], np.eye(len(pivots), dtype=np.uint32))
    more = uniform(rng, 4, rows).view(np.uint32) @ combined
    if len(pivots) == 5:
        assert not pad_algebra.reduced(more, basis, pivots, np.arange(24)).any()
    assert pad_algebra.reduced(uniform(rng, 1, 24).view(np.uint32), basis, pivots, np.arange(24)).any()
