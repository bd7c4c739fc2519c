"""Verdicts: chance is exact, a control is needed, and one sound build in a million is called broken."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation.attacks.knowledge import Answers, Fact
from evaluation.leakage.cells import BROKEN, CHANCE, DESIGN, NOT_RUN, Cell, cell, judged, not_run, threshold
from tests.evaluation.leakage.samples import ASKED, POOL, TRUTH, one


def verdicts(*cells: Cell) -> list[str]:
    return [each.verdict for each in judged(list(cells), "secure-infer", "plain", frozenset({"count"}))]


def test_hits_are_counted_against_the_truth() -> None:
    found = one("plain", 190)
    assert (found.hits, found.trials, found.estimate, found.chance) == (190, ASKED, 0.95, 1 / POOL)
    assert 0.9 < found.low < 0.95 < found.high < 0.98


def test_p_is_that_of_guessing() -> None:
    """At least one of 200 with 1/1000 each: 1 - 0.999^200."""
    assert one("plain", 1).p == pytest.approx(1 - 0.999**200)
    assert one("plain", 0).p == 1


def test_a_fact_may_bring_its_own_p() -> None:
    assert cell("plain", "look", "", Fact("words", "p", 3, 10, 0.1, p=1e-12), TRUTH, 0.0).p == 1e-12


def test_answers_to_other_questions_are_an_error() -> None:
    with pytest.raises(ValueError, match="answers to"):
        cell("plain", "look", "", Answers("rows", "tokens", np.arange(3), POOL), TRUTH, 0.0)


def test_verdicts_need_a_control_that_broke() -> None:
    assert verdicts(one("plain", 200), one("secure-infer", 0)) == [BROKEN, CHANCE]
    assert verdicts(one("plain", 150), one("secure-infer", 0)) == [BROKEN, NOT_RUN]
    assert verdicts(one("secure-infer", 0)) == [NOT_RUN]
    assert verdicts(one("plain", 200, attack="other"), one("secure-infer", 0)) == [BROKEN, NOT_RUN]


def test_the_control_is_the_same_target_where_there_is_one() -> None:
    control = one("plain", 200, target="hidden"), one("plain", 0, target="scores")
    assert verdicts(*control, one("secure-infer", 0, target="scores"))[-1] == NOT_RUN
    assert verdicts(*control, one("secure-infer", 0, target="hidden"))[-1] == CHANCE
    assert verdicts(*control, one("secure-infer", 0, target="pads"))[-1] == CHANCE  # plain has no such target


def test_what_every_scheme_shows_is_not_called_broken() -> None:
    assert verdicts(one("plain", 200, attack="count"), one("secure-infer", 200, attack="count")) == [DESIGN, DESIGN]


def test_a_few_hits_by_luck_break_nothing() -> None:
    """Three of 200 come once in a thousand runs; eight never do."""
    assert verdicts(one("plain", 200), one("secure-infer", 3)) == [BROKEN, CHANCE]
    assert verdicts(one("plain", 200), one("secure-infer", 8)) == [BROKEN, BROKEN]


def test_the_error_is_shared_by_the_cells_of_the_protected_scheme_alone() -> None:
    cells = [one("plain", 200), one("split", 0), *[one("secure-infer", 0)] * 4]
    cells += [not_run("secure-infer", "gone", "", "nothing"), replace(one("secure-infer", 0), attack="count")]
    assert threshold(cells, "secure-infer", frozenset({"count"})) == 1e-6 / 4


def test_sound_builds_pass() -> None:
    """Uniform guesses, many times over: no cell is broken."""
    rng, cells = np.random.default_rng(0), [one("plain", 200)]
    for _ in range(2000):
        said = rng.integers(0, POOL, ASKED)
        cells.append(cell("secure-infer", "look", "", Answers("rows", "tokens", said, POOL), TRUTH, 0.0))
    assert set(verdicts(*cells)[1:]) == {CHANCE}


def test_what_was_not_run_says_why() -> None:
    (found,) = judged([not_run("tee-only", "look", "", "nothing is sent")], "secure-infer", "plain", frozenset())
    assert (found.verdict, found.reason) == (NOT_RUN, "nothing is sent")
