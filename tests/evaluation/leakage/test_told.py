"""Facts that no transcript holds: among the cells, judged with them, and missed where they are missing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks.knowledge import Answers, Fact
from evaluation.leakage import suite
from evaluation.leakage.cells import BROKEN, CHANCE, NOT_RUN, cell
from evaluation.leakage.prompts import Script
from evaluation.leakage.table import Entry
from tests.evaluation.attacks.ring_views import tiny_script

TOLD, OPTIONAL = Entry("tampering", None, ""), Entry("residue", None, "", optional=True)
ALL, NONE = Fact("a lie", "believed", 5, 5, 2.0**-32), Fact("a lie", "believed", 0, 100_000, 2.0**-32)


@pytest.fixture(scope="module")
def script(model_folder: Callable[[str], Path]) -> Script:
    return tiny_script(model_folder("llama-bf16-tied-sharded"))


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BARS", "HOLDS"):
        monkeypatch.setattr(suite, name, ())


def judged(script: Script, entry: Entry, facts: dict[str, list[Fact] | str]) -> tuple[list[str], list[str]]:
    """Verdicts, and what the gate says."""
    cells = suite.attacked({}, script, [entry], {entry.name: facts})
    return [one.verdict for one in cells], suite.failures(cells, [entry], ())


def test_none_of_many_is_chance_where_the_control_has_all(script: Script) -> None:
    assert judged(script, TOLD, {"plain": [ALL], "secure-infer": [NONE]}) == ([BROKEN, CHANCE], [])


def test_one_lie_that_is_believed_stops_the_build(script: Script) -> None:
    one = Fact("a lie", "believed", 1, 100_000, 2.0**-32, 1e-9)
    verdicts, found = judged(script, TOLD, {"plain": [ALL], "secure-infer": [one]})
    assert verdicts == [BROKEN, BROKEN]
    assert found[0] == "secure-infer is broken: tampering, a lie"


@pytest.mark.parametrize("facts", [{}, {"secure-infer": [NONE]}, {"plain": "no", "secure-infer": "no"}])
def test_what_must_be_told_is_missed(script: Script, facts: dict[str, list[Fact] | str]) -> None:
    assert judged(script, TOLD, facts)[1]


def test_what_a_machine_does_not_allow_is_not_asked_for(script: Script) -> None:
    assert judged(script, OPTIONAL, {"plain": "no", "secure-infer": "no"}) == ([NOT_RUN, NOT_RUN], [])
    assert judged(script, OPTIONAL, {"plain": [ALL], "secure-infer": "no"})[1]


def test_several_guesses_are_right_if_one_is_and_chance_as_many_times(script: Script) -> None:
    truth = script.truth["tokens"]
    guesses = np.stack([(truth + 1) % 301, truth, (truth + 2) % 301], axis=1)
    guesses[:40, 1] = (truth[:40] + 3) % 301
    found = cell("plain", "bags", "", Answers("a bag", "tokens", guesses, 301), script.truth, 0.0)
    assert (found.hits, found.trials, found.chance, found.metric) == (40, 80, 3 / 301, "tokens, top-3")
    with pytest.raises(ValueError, match="answers to"):
        cell("plain", "bags", "", Answers("a bag", "tokens", guesses[:-1], 301), script.truth, 0.0)
