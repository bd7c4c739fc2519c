"""The attacker's own forward pass is that of transformers, and a shared past changes nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.attacks.public_model import PublicModel, probabilities
from tests.model_folders import reference_model
from wire.errors import PreconditionError

IDS = np.array([[3, 77, 150, 9, 201, 44], [5, 5, 5, 250, 0, 17]])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama3-scaled"])
def test_it_holds_what_transformers_holds(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    with torch.inference_mode():
        said = reference_model(folder)(input_ids=torch.tensor(IDS), output_hidden_states=True, use_cache=True)
    held = PublicModel(folder).run(IDS)
    for layer, own in enumerate(held):
        np.testing.assert_allclose(own.residual, said.hidden_states[layer].numpy(), atol=2e-4)
        cached = said.past_key_values.layers[layer]
        np.testing.assert_allclose(own.k_rotated, cached.keys.numpy().transpose(0, 2, 1, 3), atol=2e-4)
        np.testing.assert_allclose(own.v, cached.values.numpy().transpose(0, 2, 1, 3), atol=2e-4)


def test_a_shared_past_gives_what_the_whole_gives(public: PublicModel) -> None:
    whole = public.run(IDS[:1])
    tails = np.stack([IDS[0, 4:], IDS[0, 4:] + 1])
    behind = public.run(tails, public.past(IDS[0, :4]))
    for layer, own in zip(whole, behind, strict=True):
        np.testing.assert_allclose(own.residual[0], layer.residual[0, 4:], atol=1e-5)
        np.testing.assert_allclose(own.attention[0], layer.attention[0, 4:], atol=1e-5)
        assert not np.allclose(own.residual[1], layer.residual[0, 4:], atol=1e-3)


def test_turning_back_undoes_rope(public: PublicModel) -> None:
    layer, positions = public.run(IDS)[1], np.arange(6)
    np.testing.assert_allclose(public.rotate(layer.q_rotated, -positions), layer.q, atol=1e-5)


def test_probabilities_are_causal_and_sum_to_one(public: PublicModel) -> None:
    layer = public.run(IDS)[0]
    found = probabilities(layer.q_rotated, layer.k_rotated, None)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(found, 1).any()


def test_the_first_layer_of_all_tokens(public: PublicModel) -> None:
    """V of a token at layer 0 does not depend on what stands before it."""
    np.testing.assert_allclose(public.first.v[IDS[0], 0], public.run(IDS)[0].v[0], atol=1e-5)


def test_other_architectures_are_refused(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(PreconditionError, match="models of the Llama family only"):
        PublicModel(model_folder("gpt2"))
