"""One token over and over: which dim of a permuted key is which."""

import numpy as np

from evaluation.attacks import repeated_token
from evaluation.attacks.knowledge import Fact
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.repeated_token import labels, luck, rotated
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Transcript
from tests.evaluation.attacks import recorded, scenes
from tests.evaluation.attacks.recorded import Shielded


def fact(view: View, script: Script) -> Fact:
    found = repeated_token.attack(view, script.knowledge)
    assert len(found) == 1
    assert isinstance(found[0], Fact)
    return found[0]


def test_every_dim_is_labelled_rightly_under_kv_shield(shields: dict[str, Shielded], script: Script) -> None:
    """Of a renewed cache the last permutation, which the whole cache is under."""
    for name in ("static", "renewed"):
        k = rotated(shields[name].view, script.knowledge)
        assert k is not None
        np.testing.assert_array_equal(labels(k, script.knowledge), shields[name].sigma)


def test_a_wiped_cache_does_not_help_who_saw_the_keys_before(shields: dict[str, Shielded], script: Script) -> None:
    assert shields["at rest"].view.rows("cache_k", 0, [0]).any() == np.False_
    assert fact(shields["at rest"].view, script).hits == fact(shields["static"].view, script).hits > 0


def test_plain_and_split_are_its_controls(public: PublicModel, script: Script) -> None:
    for view in (recorded.plain(public, script), scenes.clear(public, script)):
        found = fact(view, script)
        assert found.hits == found.trials == public.config.kv_width
        assert found.p is not None
        assert found.p < 1e-7


def test_no_dim_of_uniform_words_is_labelled(public: PublicModel, script: Script) -> None:
    """Though the model has biases, which are public and would turn like a key."""
    for seed in range(5):
        found = fact(scenes.masked(public, script, seed), script)
        assert (found.hits, found.p) == (0, 1.0)


def test_zeros_are_no_key(public: PublicModel, script: Script) -> None:
    def wiped(_: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        return {("cache_k", 0): np.zeros_like(rows["cache_k", 0])}

    found = fact(recorded.plain(public, script).changed(wiped), script)
    assert (found.hits, found.chance) == (0, 1.0)


def test_nothing_to_read_is_said_so(script: Script) -> None:
    assert repeated_token.attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


def test_luck_bounds_what_random_signs_do() -> None:
    """Two positions of a few sizes: all patterns of signs can be counted."""
    sizes = np.array([[1.0], [2.0], [3.0]])
    assert luck(sizes, 1) == min(1.0, 2 * 3 / 2**3)
    assert luck(np.array([[1e-9], [2.0], [3.0]]), 1) == 1.0  # the first value's sign may differ
    assert luck(np.ones((100, 4)), 8) == 8 * 2 * 100 * 4 / 2**100
