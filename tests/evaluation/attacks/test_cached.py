"""What a copy of the caches gives away: all of it, unless they were wiped."""

import numpy as np

from evaluation.attacks import cached
from evaluation.attacks.cached import spectrum
from evaluation.attacks.knowledge import Answers, Attack
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage import relative_rotations
from evaluation.leakage.prompts import Script
from tests.evaluation.attacks import recorded, scenes
from tests.evaluation.attacks.recorded import Shielded

TOKENS, TEXTS = "sorted V of the cache, layer 0", "singular values of V of the cache, layer 0"


def shares(attack: Attack, view: View, script: Script) -> dict[str, float]:
    found = attack(view, script.knowledge)
    assert all(isinstance(one, Answers) for one in found)
    return {one.target: float((one.said == script.truth[one.of]).mean()) for one in found if isinstance(one, Answers)}


def test_a_permuted_cache_is_read_renewed_or_not(shields: dict[str, Shielded], script: Script) -> None:
    for name in ("static", "renewed"):
        assert shares(cached.copied, shields[name].view, script) == {TOKENS: 1.0}
        assert shares(cached.linked, shields[name].view, script) == {TEXTS: 1.0}
        assert shares(cached.at_rest, shields[name].view, script) == {TOKENS: 1.0, TEXTS: 1.0}


def test_a_wiped_cache_says_nothing(shields: dict[str, Shielded], script: Script) -> None:
    """The same answer to every question, and so right as often as chance is."""
    view = shields["at rest"].view
    assert cached.copied(view, script.knowledge) == cached.linked(view, script.knowledge) == []
    found = shares(cached.at_rest, view, script)
    assert found == {
        TOKENS: float((script.truth["tokens"] == 0).mean()),
        TEXTS: float((script.truth["again"] == 0).mean()),
    }


def test_plain_is_its_control(public: PublicModel, script: Script) -> None:
    view = recorded.plain(public, script)
    assert shares(cached.copied, view, script) == {TOKENS: 1.0}
    assert shares(cached.at_rest, view, script) == {TOKENS: 1.0, TEXTS: 1.0}


def test_mixed_rows_are_linked_all_the_same(public: PublicModel, script: Script) -> None:
    view = relative_rotations.mixed_blocks({"plain": recorded.plain(public, script)}, script)
    assert shares(cached.linked, view, script) == {TEXTS: 1.0}


def test_who_keeps_no_cache_has_none_to_copy(public: PublicModel, script: Script) -> None:
    view = scenes.masked(public, script)
    for attack in (cached.copied, cached.linked, cached.at_rest):
        assert attack(view, script.knowledge) == []


def test_a_spectrum_survives_rotations_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 2, 16)).astype(np.float32)
    left, right = relative_rotations.orthogonal(rng, 8), relative_rotations.orthogonal(rng, 16)
    turned = np.einsum("ts,shd,de->the", left, rows, right).astype(np.float32)
    assert np.allclose(spectrum(turned), spectrum(rows), rtol=1e-4)
    assert not np.allclose(spectrum(rows[:, ::-1]), spectrum(rows), rtol=0.01)
