"""Nearest embeddings and invariants: everything in the clear, nothing of uniform words."""

import numpy as np
import pytest

from evaluation.attacks import embedding, invariants
from evaluation.attacks.knowledge import Answers, Attack
from evaluation.attacks.parts import part
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Transcript
from tests.evaluation.attacks import scenes

ATTACKS = pytest.mark.parametrize("attack", [embedding.attack, invariants.attack], ids=["embedding", "invariants"])


def shares(attack: Attack, view: View, script: Script) -> dict[str, float]:
    found = attack(view, script.knowledge)
    assert all(isinstance(one, Answers) for one in found)
    return {one.target: float((one.said == script.truth[one.of]).mean()) for one in found if isinstance(one, Answers)}


@ATTACKS
def test_all_is_read_in_the_clear(attack: Attack, public: PublicModel, script: Script) -> None:
    found = shares(attack, scenes.clear(public, script), script)
    assert found
    assert found.pop("norm of the input, layer 0", 1.0) > 0.3  # one number of a row; split's integers round it
    assert min(found.values()) == 1.0


@ATTACKS
def test_nothing_is_read_of_uniform_words(attack: Attack, public: PublicModel, script: Script) -> None:
    """The same targets, and of 48 tokens hardly one by luck."""
    found = shares(attack, scenes.masked(public, script), script)
    assert found.keys() == shares(attack, scenes.clear(public, script), script).keys()
    assert max(found.values()) <= 4 / 48


@ATTACKS
def test_nothing_to_read_is_said_so(attack: Attack, script: Script) -> None:
    assert attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


def test_a_secret_permutation_of_heads_changes_no_answer(public: PublicModel, script: Script) -> None:
    """What kv-shield hides of V at layer 0: nothing, for who sorts."""
    order, clear = np.random.default_rng(1).permutation(public.config.head_dim), scenes.clear(public, script)

    def permuted(number: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        v = part(clear, script.knowledge, "v", 0, [number])
        assert v is not None
        return {("v", 0): v[..., order]}

    found = shares(invariants.attack, clear.changed(permuted), script)
    assert found == {"sorted V, layer 0": 1.0}
