"""Mixed rows keep their space; masked ones have another."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks import row_space
from evaluation.attacks.knowledge import Answers
from evaluation.attacks.view import View
from evaluation.leakage.cells import cell
from evaluation.leakage.prompts import Script
from evaluation.transcript import Transcript
from tests.evaluation.attacks.ring_views import I32, one_time_pad, tiny_script, view


@pytest.fixture(scope="module")
def script(model_folder: Callable[[str], Path]) -> Script:
    return tiny_script(model_folder("llama-bf16-tied-sharded"))


def recalled(script: Script, seen: View) -> float:
    """As the matrix counts it: of each token whether it is in the bag."""
    (found,) = row_space.attack(seen, script.knowledge)
    assert isinstance(found, Answers)
    said = cell("a scheme", "row space", "", found, script.truth, 0.0)
    assert said.trials == 80
    assert said.chance == 12 / 301
    return said.estimate


def test_bare_rows_are_a_bag_of_their_tokens(script: Script) -> None:
    assert recalled(script, view(script, lambda x_q: x_q)) == 1.0


@pytest.mark.parametrize("orthogonal", [True, False])
def test_mixing_rows_hides_their_order_and_no_more(script: Script, orthogonal: bool) -> None:
    rng = np.random.default_rng(1)

    def mix(x_q: I32) -> np.ndarray:
        a = rng.standard_normal((len(x_q), len(x_q)))
        return np.asarray((np.linalg.qr(a)[0] if orthogonal else a) @ x_q, np.float32)

    assert recalled(script, view(script, mix)) >= 0.95


def test_pads_leave_chance(script: Script) -> None:
    assert recalled(script, view(script, one_time_pad(2))) <= 0.2  # 80 of 12 in 301: beyond one in a million


def test_a_transcript_without_inputs_says_nothing(script: Script) -> None:
    assert row_space.attack(View(Transcript(()), ({},) * len(script.prompts)), script.knowledge) == []
