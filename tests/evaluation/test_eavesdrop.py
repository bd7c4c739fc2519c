"""The attack, on transcripts of a model of random weights and of its own making: what it reads, and what it cannot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.eavesdrop import PublicModel, read, rows
from evaluation.student import Pair, answer, load
from evaluation.transcript import Exchange
from tests.evaluation.overheard import overhear
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

PROMPTS = [[int(token) for token in np.random.default_rng(seed).integers(3, 300, 4 + seed)] for seed in range(6)]


@pytest.fixture(scope="module")
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Pair]:
    return [(prompt, said[:9]) for prompt, said in answer(load(folder), PROMPTS, [])]


def test_rows_in_the_clear_give_the_conversation_away(folder: Path, pairs: list[Pair]) -> None:
    found = read(overhear(load(folder), pairs, masked=False), PublicModel.read(folder))
    assert [(one.prompt, one.answer) for one in found] == pairs


def test_rows_in_the_clear_give_all_logits_away(folder: Path, pairs: list[Pair]) -> None:
    """At an unknown scale: that of each row is found."""
    import torch

    model = load(folder)
    found = read(overhear(model, pairs, masked=False), PublicModel.read(folder))
    for (prompt, said), one in zip(pairs, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].numpy()
        assert np.abs(one.logits - logits).max() < 1e-3 * np.abs(logits).max()


def test_masked_rows_give_nothing_but_counts(folder: Path, pairs: list[Pair]) -> None:
    exchanges = overhear(load(folder), pairs, masked=True)
    found = read(exchanges, PublicModel.read(folder))
    assert [(len(one.prompt), len(one.answer)) for one in found] == [(len(p), len(a)) for p, a in pairs]
    tokens = [token for one in found for token in one.prompt + one.answer]
    truth = [token for prompt, said in pairs for token in prompt + said]
    assert sum(one == other for one, other in zip(tokens, truth, strict=True)) < 0.1 * len(truth)
    assert rows(exchanges) == rows(overhear(load(folder), pairs, masked=False))


def test_a_prompt_in_several_passes_is_one_conversation(folder: Path, pairs: list[Pair]) -> None:
    exchanges = overhear(load(folder), pairs[:1], masked=False)
    first, rest = exchanges[0], exchanges[1:]
    parts = [Exchange(first.operation, first.up[at : at + 2], first.down[at : at + 2]) for at in (0, 2)]
    assert [one.prompt for one in read([*parts, *rest], PublicModel.read(folder))] == [pairs[0][0]]


def test_what_is_no_conversation_is_left_out(folder: Path) -> None:
    """A head without a prompt, a prompt without an answer, rows of zeros, other operations."""
    public = PublicModel.read(folder)
    zeros = np.zeros((3, public.head.shape[1]), np.int32)
    head = pb.Operation(ring_matmul=pb.RingMatmul(linear=Linear.LM_HEAD.number))
    qkv = pb.Operation(matmul=pb.Matmul(linear=Linear.QKV.number))
    lookup = pb.Operation(ring_lookup=pb.RingLookup())
    assert (
        read([Exchange(head, zeros, zeros), Exchange(qkv, zeros, zeros), Exchange(lookup, zeros, zeros)], public) == []
    )
    assert np.isfinite(public.logits(zeros)).all()
