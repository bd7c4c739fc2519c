"""Relatives hide what they say they hide, from those who look for nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks import cached, embedding, invariants
from evaluation.attacks.knowledge import Answers, Attack
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage import relative_rotations
from evaluation.leakage.prompts import Script
from tests.evaluation.attacks import recorded, scenes


@pytest.fixture(scope="module")
def script(model_folder: Callable[[str], Path]) -> Script:
    return scenes.said(PublicModel(model_folder("qwen2")))


@pytest.fixture(scope="module")
def views(script: Script) -> dict[str, View]:
    return {"plain": recorded.plain(script.knowledge.model, script)}


def shares(attack: Attack, view: View, script: Script) -> dict[str, float]:
    found = [one for one in attack(view, script.knowledge) if isinstance(one, Answers)]
    return {one.target: float((one.said == script.truth[one.of]).mean()) for one in found}


def test_a_rotation_hides_all_but_norms_and_inner_products(views: dict[str, View], script: Script) -> None:
    view = relative_rotations.static_rotation(views, script)
    assert max(shares(embedding.attack, view, script).values()) <= 4 / 48
    found = shares(invariants.attack, view, script)
    assert found.pop("inner products with known rows, layer 0") == 1.0
    assert found.pop("norm of the input, layer 0") > 0.9
    assert max(found.values()) <= 4 / 48


def test_a_scaled_permutation_hides_all_but_sorted_values(views: dict[str, View], script: Script) -> None:
    view = relative_rotations.scaled_permutation(views, script)
    assert max(shares(embedding.attack, view, script).values()) <= 4 / 48
    assert shares(invariants.attack, view, script)["sorted input, layer 0"] == 1.0


def test_mixed_blocks_hide_rows(views: dict[str, View], script: Script) -> None:
    assert max(shares(cached.copied, relative_rotations.mixed_blocks(views, script), script).values()) <= 4 / 48


def test_the_same_seed_makes_the_same(views: dict[str, View], script: Script) -> None:
    for made in (relative_rotations.static_rotation, relative_rotations.mixed_blocks):
        for one, other in zip(made(views, script).prompts, made(views, script).prompts, strict=True):
            assert len(one) == 1
            for place in one:
                np.testing.assert_array_equal(one[place], other[place])
