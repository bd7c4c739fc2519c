"""Blocks of mixed, shuffled and marked rows: one chosen prompt undoes them."""

import numpy as np

from evaluation.attacks import block_algebra
from evaluation.attacks.block_algebra import BLOCK, blocks, states
from evaluation.attacks.knowledge import Answers
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import Place, View
from evaluation.leakage import relative_rotations
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Transcript
from tests.evaluation.attacks import recorded, scenes


def share(view: View, script: Script) -> float:
    """Of tokens that are among those said of their block."""
    found = block_algebra.attack(view, script.knowledge)
    assert len(found) == 1
    assert isinstance(found[0], Answers)
    return float((found[0].said == script.truth["tokens"][:, None]).any(axis=1).mean())


def test_mixed_blocks_are_read(public: PublicModel, script: Script) -> None:
    mixed = relative_rotations.mixed_blocks({"plain": recorded.plain(public, script)}, script)
    assert share(mixed, script) == 1.0


def test_plain_and_split_are_its_controls(public: PublicModel, script: Script) -> None:
    assert share(recorded.plain(public, script), script) == 1.0
    assert share(scenes.clear(public, script), script) == 1.0


def test_nothing_is_read_of_uniform_words(public: PublicModel, script: Script) -> None:
    assert share(scenes.masked(public, script), script) <= 6 / 48


def test_secrets_drawn_again_for_every_block_would_hold(public: PublicModel, script: Script) -> None:
    """What KV-Cloak would need, and cannot afford: then one prompt says nothing of the next."""
    rng, plain = np.random.default_rng(5), recorded.plain(public, script)

    def change(_: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        turned = blocks(rows["cache_v", 0][:, 0]) @ relative_rotations.orthogonal(rng, public.config.head_dim)
        mixed = np.concatenate([relative_rotations.orthogonal(rng, BLOCK) @ block for block in turned])
        return {("cache_v", 0): mixed[:, None].astype(np.float32)}

    assert share(plain.changed(change), script) <= 6 / 48


def test_nothing_to_read_is_said_so(script: Script) -> None:
    assert block_algebra.attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


def test_states_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    two = rng.standard_normal((2, BLOCK, 8))
    assert len(states(two[[0, 1, 1, 0, 1]])) == 2
    assert len(states(two[[0]] + 1e-7 * rng.standard_normal((6, BLOCK, 8)))) == 1


def test_the_last_block_is_filled() -> None:
    found = blocks(np.ones((BLOCK + 1, 3)), 7.0)
    assert found.shape == (2, BLOCK, 3)
    assert found[1, :, 0].tolist() == [1.0, 7.0, 7.0, 7.0]
