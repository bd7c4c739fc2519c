"""Sampling against the logits processors of transformers: the same support and the same probabilities."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.arithmetic import F32
from trusted_worker.sampling import MAX_LOGPROBS, Sampler
from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

CASES = settings(deadline=None, max_examples=80, derandomize=True)
CONTEXT = [1, 5, 5, 30]


class Recorder:
    """Stands in for the random generator: keeps the distribution that was drawn from."""

    def __init__(self) -> None:
        self.probabilities: dict[int, float] = {}

    def choice(self, order: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> int:
        """See numpy.random.Generator.choice."""
        self.probabilities = dict(zip(map(int, order), map(float, p), strict=True))
        return int(order[0])


def _logits(seed: int, size: int = 40, spread: float = 3.0) -> F32:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def _distribution(settings: pb.Sampling, logits: F32) -> dict[int, float]:
    sampler, recorder = Sampler(settings), Recorder()
    sampler._random = cast(np.random.Generator, recorder)
    sampler.choose(logits, CONTEXT)
    return recorder.probabilities


def _reference(settings: pb.Sampling, logits: F32) -> dict[int, float]:
    """The processors in the order in which transformers applies them."""
    import torch
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors: list[Any] = []
    if settings.repetition_penalty:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p:
        processors.append(TopPLogitsWarper(settings.top_p))
    ids, scores = torch.tensor([CONTEXT]), torch.tensor(logits[None].astype(np.float64))
    for processor in processors:
        scores = processor(ids, scores)
    probabilities = torch.softmax(scores, -1)[0].tolist()
    return {token: p for token, p in enumerate(probabilities) if p > 0}


@given(
    st.integers(0, 1000),
    st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 39, 40, 1000]),
    st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.999]),
    st.sampled_from([0.0, 0.5, 1.1, 3.0]),
)
@CASES
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    asked = pb.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ours, theirs = _distribution(asked, _logits(seed)), _reference(asked, _logits(seed))
    heavy = {token for token, p in theirs.items() if p > 1e-12}
    assert heavy <= set(ours)
    assert all(abs(p - theirs.get(token, 0.0)) < 1e-6 for token, p in ours.items())


@pytest.mark.parametrize("asked", [pb.Sampling(), pb.Sampling(top_k=3, top_p=0.5)])
def test_temperature_zero_is_greedy(asked: pb.Sampling) -> None:
    for seed in range(5):
        logits = _logits(seed)
        assert Sampler(asked).choose(logits, CONTEXT).token == int(logits.argmax())


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = np.zeros(10, np.float32)
    logits[[4, 7]] = 2.0
    assert Sampler(pb.Sampling()).choose(logits, CONTEXT).token == 4


def test_the_penalty_works_on_greedy_choices_too() -> None:
    logits = np.full(40, -1.0, np.float32)
    logits[5], logits[6] = 2.0, 1.5
    assert Sampler(pb.Sampling(repetition_penalty=2)).choose(logits, CONTEXT).token == 6
    assert Sampler(pb.Sampling(repetition_penalty=2)).choose(-logits, [0, 1]).token not in (0, 1)


@pytest.mark.parametrize("neutral", [pb.Sampling(), pb.Sampling(top_p=1, repetition_penalty=1, top_k=0)])
def test_neutral_values_change_nothing(neutral: pb.Sampling) -> None:
    neutral.temperature = 1.0
    logits = _logits(3).astype(np.float64)
    expected = np.exp(logits - logits.max())
    ours = _distribution(neutral, _logits(3))
    assert len(ours) == 40
    for token, p in ours.items():
        assert p == pytest.approx(expected[token] / expected.sum())


def test_a_sampler_leaves_its_inputs_alone() -> None:
    logits, context = _logits(1), list(CONTEXT)
    Sampler(pb.Sampling(temperature=1, repetition_penalty=2)).choose(logits, context)
    assert (logits == _logits(1)).all()
    assert context == CONTEXT


def _draws(asked: pb.Sampling, count: int = 60) -> list[int]:
    sampler, logits = Sampler(asked), _logits(0, spread=1.0)
    return [sampler.choose(logits, CONTEXT).token for _ in range(count)]


def test_a_seed_fixes_the_answer_and_zero_is_a_seed() -> None:
    for seed in (0, 1, 2**64 - 1):
        asked = pb.Sampling(temperature=1, seed=seed, seeded=True)
        assert _draws(asked) == _draws(asked)
    assert _draws(pb.Sampling(temperature=1, seeded=True)) != _draws(pb.Sampling(temperature=1, seed=1, seeded=True))


def test_without_a_seed_answers_differ() -> None:
    assert _draws(pb.Sampling(temperature=1)) != _draws(pb.Sampling(temperature=1))
    assert _draws(pb.Sampling(temperature=1, seed=5)) != _draws(pb.Sampling(temperature=1, seed=5))


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    sampler = Sampler(pb.Sampling(temperature=1, seed=4, seeded=True))
    counts = np.bincount([sampler.choose(logits, [0]).token for _ in range(4000)], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0.05]) * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 3 degrees of freedom


@given(st.integers(0, 1000), st.integers(0, MAX_LOGPROBS))
@CASES
def test_logprobs_are_those_of_the_model(seed: int, count: int) -> None:
    logits = _logits(seed)
    asked = pb.Sampling(temperature=1.5, top_k=3, repetition_penalty=1.7, logprobs=count, seed=seed, seeded=True)
    choice = Sampler(asked).choose(logits, CONTEXT)
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-9)
    assert [token for token, _ in choice.top] == list(np.argsort(-wide, kind="stable")[:count])
    for token, logprob in choice.top:
        assert logprob == pytest.approx(expected[token], abs=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = _logits(0)
    logits[3] = value
    with pytest.raises(InvalidArgumentError, match="not finite"):
        Sampler(pb.Sampling()).choose(logits, CONTEXT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field, above in (("temperature", 101), ("top_p", 1.01), ("repetition_penalty", 101))
        for value in (float("nan"), float("inf"), float("-inf"), -0.1, above)
    ]
    + [("logprobs", MAX_LOGPROBS + 1), ("logprobs", 2**32 - 1)],
)
def test_parameters_out_of_range_are_refused(field: str, value: float) -> None:
    asked = pb.Sampling()
    setattr(asked, field, value)
    with pytest.raises(InvalidArgumentError, match=field):
        Sampler(asked)


@pytest.mark.parametrize(
    "extreme",
    [
        pb.Sampling(temperature=1e-45),
        pb.Sampling(temperature=100),
        pb.Sampling(temperature=1, repetition_penalty=1e-45),
        pb.Sampling(temperature=1e-30, repetition_penalty=1e-30, top_p=1e-45, top_k=2**32 - 1),
    ],
)
def test_extreme_parameters_still_give_a_token(extreme: pb.Sampling) -> None:
    assert 0 <= Sampler(extreme).choose(_logits(0), CONTEXT).token < 40
