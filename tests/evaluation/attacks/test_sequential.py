"""Sequential matching: every observable in the clear, none in uniform words; nothing of what comes later is used."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from evaluation.attacks import sequential
from evaluation.attacks.knowledge import Answers, Attack, Knowledge, Told
from evaluation.attacks.parts import part
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import Place, View
from evaluation.leakage import relative_scores
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Transcript
from tests.evaluation.attacks import scenes

FORMS = ("hidden", "sorted hidden", "sorted K", "sorted V")
ATTENTION = ("scores", "probabilities")
EVERY = {f"{form}, layer {layer}" for form in FORMS for layer in (1, 2)} | {
    f"{form}, layer {layer}" for form in ATTENTION for layer in (0, 1, 2)
}
BOTH = pytest.mark.parametrize("attack", [sequential.attack, sequential.free_running], ids=["told", "free"])


def said(attack: Attack, view: View, known: Knowledge) -> dict[str, list[int]]:
    found = attack(view, known)
    return {one.target: one.said.tolist() for one in found if isinstance(one, Answers)}


def shares(attack: Attack, view: View, script: Script) -> dict[str, float]:
    truth = script.truth["told"]
    return {target: float((truth == tokens).mean()) for target, tokens in said(attack, view, script.knowledge).items()}


@BOTH
def test_all_is_read_in_the_clear(attack: Attack, public: PublicModel, script: Script) -> None:
    """Of integers at scales of their own: 12 tokens by every target, and of free-running so both exact prompts."""
    found = shares(attack, scenes.clear(public, script), script)
    assert found.keys() == (EVERY if attack is sequential.attack else {"sorted V, layer 1"})
    assert min(found.values()) == 1.0


@BOTH
def test_nothing_is_read_of_uniform_words(attack: Attack, public: PublicModel, script: Script) -> None:
    """The same targets, and of 12 tokens hardly one by luck."""
    found = shares(attack, scenes.masked(public, script), script)
    assert found.keys() == shares(attack, scenes.clear(public, script), script).keys()
    assert max(found.values()) <= 2 / 12


@BOTH
def test_nothing_to_read_is_said_so(attack: Attack, script: Script) -> None:
    assert attack(View.of(Transcript(()), script.knowledge.lengths), script.knowledge) == []


def test_permuted_heads_returned_after_rotation_change_no_answer(public: PublicModel, script: Script) -> None:
    """As kv-shield: V in a secret order, rotated q and k in another; no hidden states, q or k before rotation."""
    clear = scenes.clear(public, script)

    def permuted(number: int, rows: dict[Place, Array]) -> dict[Place, Array]:
        rng = np.random.default_rng(number)
        order, again = (rng.permutation(public.config.head_dim) for _ in range(2))
        return {
            place: values
            for layer in range(public.config.layers)
            for place, values in _shielded(clear, script, number, layer, order, again).items()
        }

    found = shares(sequential.attack, clear.changed(permuted), script)
    expected = {one for one in EVERY if one.split(",")[0] in ("sorted V", *ATTENTION)}
    assert found == dict.fromkeys(expected, 1.0)


def _shielded(view: View, script: Script, number: int, layer: int, order: Array, again: Array) -> dict[Place, Array]:
    known = script.knowledge
    q, k, v = (part(view, known, what, layer, [number]) for what in ("q", "k", "v"))
    assert q is not None
    assert k is not None
    assert v is not None
    heads = np.concatenate(known.model.turned(layer, q, k, np.arange(len(q))), axis=1)[..., again]
    return {("v", layer): v[..., order], ("qk_returned", layer): heads.reshape(len(heads), -1)}


@pytest.mark.parametrize(
    ("relative", "read"),
    [
        (relative_scores.scores_on_gpu, {"scores", "probabilities"}),
        (relative_scores.probabilities_on_gpu, {"probabilities"}),
    ],
    ids=["scores", "probabilities"],
)
def test_attention_alone_gives_the_text_away(
    relative: Callable[[Mapping[str, View], Script], View], read: set[str], public: PublicModel, script: Script
) -> None:
    views = {"plain": scenes.clear(public, script), "secure-infer": scenes.masked(public, script)}
    found = shares(sequential.attack, relative(views, script), script)
    attention = {target: share for target, share in found.items() if target.split(",")[0] in ATTENTION}
    assert attention == {f"{form}, layer {layer}": 1.0 for form in read for layer in range(3)}
    assert max(share for target, share in found.items() if target not in attention) <= 2 / 12


def test_no_answer_depends_on_the_text_from_there_on(public: PublicModel, script: Script) -> None:
    """Teacher-forced is not told the answer: with another second half of the text, the first half's answers stay."""
    known, view, half = script.knowledge, scenes.clear(public, script), 5
    behind = len(script.truth["told"]) // len(known.told)

    def forged(told: Told) -> Told:
        return replace(told, text=np.concatenate([told.text[:half], (told.text[half:] + 7) % public.config.vocabulary]))

    other = replace(known, told={number: forged(told) for number, told in known.told.items()})
    first, changed = said(sequential.attack, view, known), said(sequential.attack, view, other)
    asked = np.arange(len(script.truth["told"])) % behind
    for target, tokens in first.items():
        stays = asked <= half - len(known.prefix)
        assert np.array(changed[target])[stays].tolist() == np.array(tokens)[stays].tolist()
    assert changed != first  # what stands before is used


def test_candidates_are_the_only_answers(public: PublicModel, script: Script) -> None:
    """A pool of 20: the truth is found among them, and chance is one in 20."""
    known, rng = script.knowledge, np.random.default_rng(5)

    def fewer(told: Told) -> Told:
        truths = told.text[len(known.prefix) :]
        others = [
            rng.choice(np.setdiff1d(pool, [truth]), 19, False)
            for pool, truth in zip(told.candidates, truths, strict=True)
        ]
        return replace(told, candidates=np.sort(np.column_stack([others, truths]), axis=1))

    pooled = replace(known, told={number: fewer(told) for number, told in known.told.items()})
    for attack in (sequential.attack, sequential.free_running):
        found = attack(scenes.clear(public, script), pooled)
        assert found
        for one in found:
            assert isinstance(one, Answers)
            assert one.pool == 20
            np.testing.assert_array_equal(one.said, script.truth["told"])
        for one in attack(scenes.masked(public, script), pooled):
            assert isinstance(one, Answers)
            allowed = np.concatenate([told.candidates for told in pooled.told.values()])
            assert (allowed == one.said[:, None]).any(axis=1).all()
