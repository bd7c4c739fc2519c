"""A rotation is known from rows of known tokens."""

import numpy as np
import pytest

from evaluation.attacks import procrustes
from evaluation.attacks.knowledge import Answers
from evaluation.attacks.procrustes import decoded
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage import relative_rotations
from evaluation.leakage.prompts import Script
from evaluation.transcript import Transcript
from tests.evaluation.attacks import recorded, scenes
from tests.evaluation.attacks.recorded import Shielded

INPUT, V = "input turned back, layer 0", "V turned back, layer 0"


def shares(view: View, script: Script) -> dict[str, float]:
    found = procrustes.attack(view, script.knowledge)
    assert all(isinstance(one, Answers) for one in found)
    return {one.target: float((one.said == script.truth[one.of]).mean()) for one in found if isinstance(one, Answers)}


def test_everything_is_read_where_nothing_is_hidden(public: PublicModel, script: Script) -> None:
    for view in (recorded.plain(public, script), scenes.clear(public, script)):
        assert shares(view, script) == {INPUT: 1.0, V: 1.0}


def test_permuted_heads_are_rotated_heads(shielded: Shielded, script: Script) -> None:
    assert shares(shielded.view, script) == {INPUT: 1.0, V: 1.0}


def test_a_static_rotation_of_the_input_is_undone(public: PublicModel, script: Script) -> None:
    view = relative_rotations.static_rotation({"plain": recorded.plain(public, script)}, script)
    assert shares(view, script) == {INPUT: 1.0}


def test_nothing_is_read_of_uniform_words(public: PublicModel, script: Script) -> None:
    found = shares(scenes.masked(public, script), script)
    assert found.keys() == {INPUT, V}
    assert max(found.values()) <= 4 / 48


def test_nothing_to_read_is_said_so(script: Script) -> None:
    assert procrustes.attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


@pytest.mark.parametrize("anchors", [24, 200])
def test_fewer_known_tokens_than_dims_will_do(anchors: int) -> None:
    """What they span of 64 dims tells 300 tokens apart."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((300, 1, 64)).astype(np.float32)
    rotation = relative_rotations.orthogonal(rng, 64).astype(np.float32)
    victims, known = rng.integers(0, 300, 50), rng.integers(0, 300, anchors)
    said = decoded(table[victims] @ rotation, table[known] @ rotation, table, known)
    assert (said == victims).mean() == 1.0
