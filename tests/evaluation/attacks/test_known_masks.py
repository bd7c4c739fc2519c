"""Masks of known rows: fresh ones pass every count, and each kind of mistake fails the one that is for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks import known_masks
from evaluation.attacks.crossed import Words
from evaluation.attacks.knowledge import Fact
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Transcript
from tests.evaluation.attacks.ring_views import I32, clear, exchange, one_time_pad, tiny_script, uniform, view
from wire.linears import Linear

START = "known masks, "
BYTES, BY_ONE, BY_TWO = (START + name for name in ("bytes", "words turned by a byte", "words turned by two"))
RANKS, RECUR = START + "ranks", START + "stretches that recur"
LIMIT = 1e-8


@pytest.fixture(scope="module")
def script(model_folder: Callable[[str], Path]) -> Script:
    said = tiny_script(model_folder("llama-bf16-tied-sharded"))
    return told(said, lambda x_q: {("input", 0): x_q})


def told(said: Script, places: Callable[[I32], dict[Place, I32]]) -> Script:
    """The attacker knows what enters these places for his prompts."""
    numbers = [*said.knowledge.known, said.knowledge.repeated or 0]
    found = {number: places(clear(said)[number]) for number in numbers}
    return replace(said, knowledge=replace(said.knowledge, clear=found))


def failed(seen: View, script: Script) -> set[str]:
    found = known_masks.facts(seen, script.knowledge)
    assert len(found) == 5
    return {one.target for one in found if isinstance(one, Fact) and one.p is not None and one.p < LIMIT}


def masked(script: Script, change: Callable[[Words], Words]) -> View:
    """Fresh pads with a mistake in them."""
    rng = np.random.default_rng(7)
    return view(script, lambda x_q: x_q + change(uniform(rng, *x_q.shape).view(np.uint32)).view(np.int32))


def test_fresh_pads_pass(script: Script) -> None:
    assert failed(view(script, one_time_pad(1)), script) == set()


def test_no_pads_fail_all_of_it(script: Script) -> None:
    assert failed(view(script, lambda x_q: x_q), script) == {BYTES, BY_ONE, BY_TWO, RANKS, RECUR}


def test_a_bit_that_is_not_masked_is_found(script: Script) -> None:
    """Where x_q itself looks random, z does, too."""
    assert BYTES in failed(masked(script, lambda r: r & np.uint32(0xFFFFFFEF)), script)


def test_half_a_word_said_twice_is_found(script: Script) -> None:
    """Each byte is uniform."""
    assert failed(masked(script, lambda r: (r & np.uint32(0xFFFF)) * np.uint32(65537)), script) == {BY_TWO}


def test_a_pool_is_found(script: Script) -> None:
    rng = np.random.default_rng(3)
    pool = uniform(rng, 8, 64).view(np.uint32)
    found = failed(masked(script, lambda r: r[:, :8] @ pool), script)
    assert found == {RANKS}


@pytest.mark.parametrize("again", [lambda r: r, lambda r: -r, lambda r: ~r], ids=["same", "negated", "complement"])
def test_streams_that_overlap_at_another_linear_are_found(script: Script, again: Callable[[Words], Words]) -> None:
    """Two words later, which is no place where a block begins, and whatever its sign."""
    rng, events = np.random.default_rng(5), []
    for x_q in clear(script):
        r = uniform(rng, len(x_q), 66).view(np.uint32)
        other = again(r[:, 2:].copy()).view(np.int32)
        events += [exchange(x_q + r[:, :64].view(np.int32)), exchange(x_q + other, linear=Linear.O)]
    seen = View.of(Transcript(tuple(events)), script.knowledge.lengths)
    assert RECUR in failed(seen, told(script, lambda x_q: {("input", 0): x_q, ("attention", 0): x_q}))


def test_the_rank_is_that_of_the_lowest_bits() -> None:
    rows = np.array([[1, 2, 3], [3, 4, 5], [2, 7, 2], [0, 0, 0]], np.uint32)
    assert known_masks.rank(rows) == 2
    assert known_masks.rank(np.eye(19, dtype=np.uint32) * np.uint32(7)) == 19
