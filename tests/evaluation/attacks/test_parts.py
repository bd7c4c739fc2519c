"""What a scheme shows of inputs, queries, keys and values, to float precision where it shows them at all."""

import numpy as np

from evaluation.attacks.parts import part, victims
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Held, Transcript
from tests.evaluation.attacks import scenes


def test_integers_of_split_are_the_floats_they_came_from(public: PublicModel, script: Script) -> None:
    """Scales and biases stay in the trusted worker, and are found again."""
    view, number = scenes.clear(public, script), script.knowledge.victims[0]
    for layer, held in enumerate(public.run(script.prompts[number][None])):
        for what, truth in (("input", held.input), ("q", held.q), ("k", held.k), ("v", held.v)):
            found = part(view, script.knowledge, what, layer, [number])
            assert found is not None
            np.testing.assert_allclose(found, truth[0], atol=0.03 * np.abs(truth).max())


def test_held_tensors_are_taken_as_they_are(public: PublicModel, script: Script) -> None:
    ids = script.prompts[0]
    held = public.run(ids[None], layers=1)[0]
    qk = np.concatenate([held.q[0].reshape(len(ids), -1), held.k[0].reshape(len(ids), -1)], axis=1)
    tensors = (("residual", held.residual[0]), ("qk", qk), ("v", held.v[0]))
    events = tuple(Held(name, 0, tensor) for name, tensor in tensors)
    view = View.of(Transcript(events), [len(ids)])
    for what, truth in (("input", held.input), ("q", held.q), ("k", held.k), ("v", held.v)):
        found = part(view, script.knowledge, what, 0, [0])
        assert found is not None
        np.testing.assert_allclose(found, truth[0], atol=1e-5)


def test_rows_of_the_prefix_are_left_out(public: PublicModel, script: Script) -> None:
    rows = victims(scenes.clear(public, script), script.knowledge, "input", 0)
    assert rows is not None
    assert len(rows) == len(script.truth["tokens"])


def test_what_is_not_there_is_none(script: Script) -> None:
    view = View.of(Transcript(()), script.knowledge.lengths)
    assert all(victims(view, script.knowledge, what, 0) is None for what in ("input", "q", "k", "v"))
