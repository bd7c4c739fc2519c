"""Codebook, distinguisher and linkability: right about everything in the clear, about nothing in uniform words."""

import numpy as np
import pytest

from evaluation.attacks import codebook, distinguisher
from evaluation.attacks.knowledge import Answers, Attack
from evaluation.attacks.likeness import FORMS
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Transcript
from tests.evaluation.attacks import scenes

TARGETS: dict[Attack, set[str]] = {
    codebook.attack: set(FORMS),
    distinguisher.attack: {f"{form}, {what}" for form in FORMS for what in ("class", "link")},
}
BOTH = pytest.mark.parametrize("attack", TARGETS, ids=["codebook", "distinguisher"])
LABELS = np.array([0, 1, 0, 1])


def shares(attack: Attack, view: View, script: Script) -> dict[str, float]:
    found = [one for one in attack(view, script.knowledge) if isinstance(one, Answers)]
    return {one.target: float((one.said == script.truth[one.of]).mean()) for one in found}


@BOTH
def test_everything_is_known_again_in_the_clear(attack: Attack, public: PublicModel, script: Script) -> None:
    assert shares(attack, scenes.clear(public, script), script) == dict.fromkeys(TARGETS[attack], 1.0)


@BOTH
def test_nothing_is_known_again_of_uniform_words(attack: Attack, public: PublicModel, script: Script) -> None:
    found = shares(attack, scenes.masked(public, script), script)
    assert found.keys() == TARGETS[attack]
    assert max(found.values()) < 0.9  # of 30 and 29 bits: by luck once in 10,000


@BOTH
def test_nothing_to_read_is_said_so(attack: Attack, script: Script) -> None:
    assert attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


def alike(classes: list[int], within: tuple[float, float], between: float) -> np.ndarray:
    """Of messages of these classes: how alike two of class 0 are, two of class 1, and one of each."""
    kinds = np.array(classes)
    found = np.where(kinds[:, None] == kinds, np.array(within)[kinds], between)
    np.fill_diagonal(found, 1e6)  # a message and itself say nothing
    return found.astype(np.float32)


def test_a_class_more_like_itself_than_the_other_draws_no_message() -> None:
    """Messages between the two classes go to the nearer, not to the one whose members are close together."""
    table = alike([*LABELS, 0, 1, 1, 0], (0.2, 0.9), 0.1)
    assert distinguisher.classes(table, LABELS).tolist() == [0, 1, 1, 0]


def test_a_link_is_nearer_to_pairs_of_one_class() -> None:
    table = alike([*LABELS, 0, 0, 1, 1, 1, 0], (0.5, 0.9), 0.1)
    assert distinguisher.links(table, LABELS).tolist() == [1, 0, 1, 1, 0]
