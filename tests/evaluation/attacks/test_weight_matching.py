"""Permuted weights against public ones: the secret permutation, and every token."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation.attacks import weight_matching
from evaluation.attacks.knowledge import Answers, Fact
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import Place, View
from evaluation.attacks.weight_matching import Match, by_direction, by_hash, by_sorted_hash, held, orders
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Exchange, Transcript
from tests.evaluation.attacks import recorded, scenes
from tests.evaluation.attacks.recorded import Shielded
from wire.linears import Linear

MATCHES = pytest.mark.parametrize("match", [by_hash, by_direction, by_sorted_hash])


def figures(view: View, script: Script) -> dict[str, float]:
    """The share found, by target."""
    shares: dict[str, float] = {}
    for one in weight_matching.attack(view, script.knowledge):
        if isinstance(one, Answers):
            shares[one.target] = float((one.said == script.truth[one.of]).mean())
        else:
            shares[one.target] = one.hits / one.trials
    return shares


def test_everything_is_found_under_kv_shield_and_its_options(shielded: Shielded, script: Script) -> None:
    assert figures(shielded.view, script) == {
        "rows of W by hash": 1.0,
        "rows of W by direction": 1.0,
        "rows of W by sorted hash": 1.0,
        "V in the public order, layer 0": 1.0,
        "input solved from q, k and v, layer 0": 1.0,
    }


@MATCHES
def test_it_is_the_secret_permutation(match: Match, shields: dict[str, Shielded], script: Script) -> None:
    shielded, model = shields["static"], script.knowledge.model
    c = model.config
    for layer, rows in enumerate(held(shielded.view, script.knowledge)):
        public = model.weight(layer, Linear.QKV).reshape(rows.shape)
        said = orders(rows, public, match)
        pi = shielded.pi[layer]
        np.testing.assert_array_equal(said, np.concatenate([np.repeat(pi, c.heads // c.kv_heads, axis=0), pi, pi]))


def test_plain_is_its_control(public: PublicModel, script: Script) -> None:
    assert set(figures(recorded.plain(public, script), script).values()) == {1.0}
    assert len(figures(recorded.plain(public, script), script)) == 5


def test_split_has_no_order_and_no_secret(public: PublicModel, script: Script) -> None:
    found = figures(scenes.clear(public, script), script)
    assert found == {"V in the public order, layer 0": 1.0, "input solved from q, k and v, layer 0": 1.0}


def test_uniform_words_say_nothing(public: PublicModel, script: Script) -> None:
    found = figures(scenes.masked(public, script), script)
    assert found.keys() == figures(scenes.clear(public, script), script).keys()
    assert max(found.values()) <= 4 / 48


def test_nothing_to_read_is_said_so(script: Script) -> None:
    assert weight_matching.attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


def test_values_alone_are_left_to_others(public: PublicModel, script: Script) -> None:
    def values(_: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        return {("v", 0): rows["v", 0]}

    assert weight_matching.attack(recorded.plain(public, script).changed(values), script.knowledge) == []


def test_other_weights_are_not_the_public_ones(shields: dict[str, Shielded], script: Script) -> None:
    """A provisioned row that is in no checkpoint is not found, whatever it is near to."""
    view = shields["static"].view
    events = list(view.transcript.events)
    first = next(n for n, one in enumerate(events) if isinstance(one, Exchange) and one.operation.HasField("provision"))
    exchange = events[first]
    assert isinstance(exchange, Exchange)
    events[first] = replace(exchange, up=exchange.up + np.float32(1e-3) * (np.arange(len(exchange.up)) == 0)[:, None])
    other = View(Transcript(tuple(events)), view.prompts)
    facts = [one for one in weight_matching.attack(other, script.knowledge) if isinstance(one, Fact)]
    assert [one.trials - one.hits for one in facts] == [1, 1, 1]


def test_direction_survives_what_hashes_do_not() -> None:
    """Scales and noise, as a fine-tune or int8 would leave them."""
    rng = np.random.default_rng(0)
    public = rng.standard_normal((16, 64)).astype(np.float32)
    order = rng.permutation(16)
    noisy = (2 * public[order] + 0.3 * rng.standard_normal((16, 64))).astype(np.float32)
    assert by_direction(noisy, public).tolist() == order.tolist()
    assert by_hash(noisy, public).tolist() == by_sorted_hash(noisy, public).tolist() == [-1] * 16


def test_the_sorted_hash_survives_a_permutation_of_the_inputs() -> None:
    rng = np.random.default_rng(0)
    public = rng.standard_normal((16, 64)).astype(np.float32)
    order, inputs = rng.permutation(16), rng.permutation(64)
    assert by_sorted_hash(public[order][:, inputs], public).tolist() == order.tolist()
    assert by_hash(public[order][:, inputs], public).tolist() == [-1] * 16
