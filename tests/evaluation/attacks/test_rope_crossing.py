"""Keys before and after their rotation: the secret permutation without a weight."""

import numpy as np

from evaluation.attacks import rope_crossing, weight_matching
from evaluation.attacks.knowledge import Fact
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array
from tests.evaluation.attacks import recorded, scenes
from tests.evaluation.attacks.recorded import Shielded
from wire.families import Rope
from wire.linears import Linear


def share(view: View, script: Script) -> float:
    found = rope_crossing.attack(view, script.knowledge)
    assert [one.target for one in found] == ["order of the dims of k"]
    assert isinstance(found[0], Fact)
    return found[0].hits / found[0].trials


def test_every_dim_is_foretold_under_kv_shield_and_its_options(shielded: Shielded, script: Script) -> None:
    assert share(shielded.view, script) == 1.0


def test_it_is_the_secret_permutation(shielded: Shielded, script: Script) -> None:
    for layer, pi in enumerate(shielded.pi):
        np.testing.assert_array_equal(rope_crossing.orders(shielded.view, script.knowledge, layer), pi)


def test_weights_say_the_same(shields: dict[str, Shielded], script: Script) -> None:
    view, known = shields["static"].view, script.knowledge
    c = known.model.config
    for layer, rows in enumerate(weight_matching.held(view, known)):
        by_weights = weight_matching.orders(rows, known.model.weight(layer, Linear.QKV).reshape(rows.shape))
        keys = by_weights[c.heads : c.heads + c.kv_heads]
        np.testing.assert_array_equal(rope_crossing.orders(view, known, layer), keys)


def test_plain_is_its_control(public: PublicModel, script: Script) -> None:
    view = recorded.plain(public, script)
    assert share(view, script) == 1.0
    identity = np.broadcast_to(np.arange(public.config.head_dim), (public.config.kv_heads, public.config.head_dim))
    np.testing.assert_array_equal(rope_crossing.orders(view, script.knowledge, 0), identity)


def test_keys_under_fresh_permutations_of_every_row_say_nothing(public: PublicModel, script: Script) -> None:
    """What would be needed: then no two positions can be compared."""
    rng = np.random.default_rng(0)

    def fresh(_: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        keys = {place: rng.permuted(k, axis=-1) for place, k in rows.items() if place[0] == "cache_k"}
        return rows | keys

    assert share(recorded.plain(public, script).changed(fresh), script) < 0.1


def test_ring_products_do_not_cross_so(public: PublicModel, script: Script) -> None:
    for view in (scenes.clear(public, script), scenes.masked(public, script)):
        assert rope_crossing.attack(view, script.knowledge) == []


def test_dims_that_do_not_rotate_are_left() -> None:
    """A head of 6 dims of which 4 rotate."""
    rng, rope = np.random.default_rng(1), Rope(dims=4, interleaved=True, theta=100.0)
    angles = np.arange(20)[:, None] * np.array([1.0, 0.1])
    x, turn = rng.standard_normal((20, 6)), np.exp(1j * angles)
    points = (x[:, [0, 2]] + 1j * x[:, [1, 3]]) * turn
    y = x.copy()
    y[:, [0, 2]], y[:, [1, 3]] = points.real, points.imag
    order = rng.permutation(6)
    said = rope_crossing.order(x[:, order], y[:, order], angles, rope)
    assert sorted(said) == list(range(6))
    assert said[order < 4].tolist() == order[order < 4].tolist()
