"""The script: always the same, uniform where chance has to be known, and its truths are those of its prompts."""

import numpy as np

from evaluation.attacks.public_model import PublicModel
from evaluation.leakage.prompts import FULL, KINDS, QUICK, script
from wire.model_config import ModelConfig


class Model:
    """No weights are needed to write a script."""

    config = ModelConfig.from_dict(
        "m",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 2048,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
        },
        {},
    )


MODEL: PublicModel = Model()  # type: ignore[assignment]


def test_the_same_seed_is_the_same_script() -> None:
    one, other, third = script(MODEL, QUICK, 4), script(MODEL, QUICK, 4), script(MODEL, QUICK, 5)
    assert all((a == b).all() for a, b in zip(one.prompts, other.prompts, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(one.prompts, third.prompts, strict=True))


def test_the_truth_is_in_the_prompts() -> None:
    for sizes in (QUICK, FULL):
        said = script(MODEL, sizes, 0)
        known = said.knowledge
        wanted = [said.prompts[number][len(known.prefix) :] for number in known.victims]
        np.testing.assert_array_equal(said.truth["tokens"], np.concatenate(wanted))
        assert all((said.prompts[number][: len(known.prefix)] == known.prefix).all() for number in known.victims)
        for place, again in zip(known.again, said.truth["again"], strict=True):
            np.testing.assert_array_equal(said.prompts[place], known.known[int(again)])
        messages = {label: said.prompts[place] for place, label in known.labels.items()}
        for place, label in zip(known.unlabelled, said.truth["unlabelled"], strict=True):
            np.testing.assert_array_equal(said.prompts[place], messages[label])
        told = [said.prompts[place][len(known.prefix) :] for place in known.told]
        np.testing.assert_array_equal(said.truth["told"], np.concatenate(told))
        secret = said.truth["unlabelled"]
        np.testing.assert_array_equal(said.truth["linked"], secret[1:] == secret[:-1])
        assert len(set(said.prompts[known.repeated or 0])) == 1
        assert known.lengths == tuple(map(len, said.prompts))
        assert min(known.lengths) > 1  # single rows are an answer's


def test_each_told_token_is_one_of_its_candidates() -> None:
    """Once, among as many words as were asked for, and neither first nor last more often than others."""
    for sizes, pool in ((QUICK, 2048), (FULL, FULL.candidates)):
        for told in script(MODEL, sizes, 0).knowledge.told.values():
            assert told.candidates.shape == (sizes.victim_tokens - sizes.prefix, pool)
            assert all(len(set(row)) == pool for row in told.candidates)
            assert (told.candidates == told.text[sizes.prefix :, None]).sum(axis=1).tolist() == [1] * len(
                told.candidates
            )
    every = [one for seed in range(20) for one in script(MODEL, FULL, seed).knowledge.told.values()]
    ranks = np.concatenate([(one.candidates < one.text[FULL.prefix :, None]).sum(axis=1) for one in every])
    assert abs(ranks.mean() / FULL.candidates - 0.5) < 0.06  # 560 ranks: five standard deviations


def test_labelled_messages_are_of_both_classes() -> None:
    for seed in range(20):
        assert set(script(MODEL, FULL, seed).knowledge.labels.values()) == {0, 1}


def test_no_victim_is_known() -> None:
    """Places do not overlap, so no truth is among what the attacker is told."""
    known = script(MODEL, QUICK, 0).knowledge
    groups = [known.known, known.victims, known.again, known.labels, known.unlabelled, known.metered, known.unmetered]
    places = [place for group in groups for place in group]
    assert len(places) == len(set(places)) == len(known.lengths) - 1


def test_lengths_are_those_of_their_kinds() -> None:
    said = script(MODEL, QUICK, 0)
    for place, kind in said.knowledge.metered.items():
        (least, most), (fewest, longest) = KINDS[kind]
        assert least <= len(said.prompts[place]) <= most
        assert fewest <= said.answers[place] <= longest
    assert set(said.answers[: -QUICK.metered]) == {1}


def test_tokens_are_uniform() -> None:
    """Every sixteenth of the vocabulary is drawn about as often."""
    drawn = np.concatenate([script(MODEL, QUICK, seed).truth["tokens"] for seed in range(20)])
    counts = np.bincount(drawn // 128, minlength=16)
    assert ((counts - len(drawn) / 16) ** 2 / (len(drawn) / 16)).sum() < 45  # chi-square with 15 degrees: p = 1e-4
