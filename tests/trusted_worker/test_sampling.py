"""Sampling against the logits processors of transformers: the same support and the same probabilities."""

from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.trusted_worker import traced
from trusted_worker.arithmetic import F32, F64
from trusted_worker.sampling import BLOCK, MAX_LOGPROBS, Choice, Sampler, rank
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.errors import InvalidArgumentError
from wire.scratch import sampling_bytes
from wire.v1 import trusted_worker_pb2 as pb

CASES = settings(deadline=None, max_examples=80, derandomize=True)
CONTEXT = [1, 5, 5, 30]
DRAWS = 2000


scratch = Scratch(SecureMemory(2 << 20), 3 << 19)


def _logits(seed: int, size: int = 40, spread: float = 3.0) -> F32:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def _choose(sampler: Sampler, logits: F32, context: list[int]) -> Choice:
    with scratch.frame():
        return sampler.choose(logits, context, scratch)


class Sweep:
    """Stands in for the random generator: every number of [0, 1) once, evenly."""

    def __init__(self, count: int) -> None:
        self._numbers = iter((np.arange(count) + 0.5) / count)

    def random(self) -> float:
        """See numpy.random.Generator.random."""
        return float(next(self._numbers))


def _distribution(settings: pb.Sampling, logits: F32, count: int) -> dict[int, float]:
    """Probabilities, as accurate as `count` draws are dense."""
    sampler = Sampler(settings)
    sampler._random = cast(np.random.Generator, Sweep(count))
    counts = Counter(_choose(sampler, logits, CONTEXT).token for _ in range(count))
    return {token: times / count for token, times in counts.items()}


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
    ours, theirs = _distribution(asked, _logits(seed), DRAWS), _reference(asked, _logits(seed))
    assert set(ours) <= set(theirs)
    assert all(abs(p - ours.get(token, 0.0)) <= 1 / DRAWS for token, p in theirs.items())


@given(st.integers(0, 1000), st.floats(0, 1, exclude_max=True), st.sampled_from([1.0, 0.3]))
@CASES
def test_a_draw_is_where_the_summed_probabilities_pass_the_number(seed: int, uniform: float, top_p: float) -> None:
    """Across blocks, against one sum over everything."""
    logits = _logits(seed, 2 * BLOCK + 77, 1.0)
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    sums = np.cumsum(np.exp(logits[order].astype(np.float64) - logits.max()))
    kept = int(np.searchsorted(sums, top_p * sums[-1])) if top_p < 1 else len(sums) - 1
    place = int(np.searchsorted(sums, uniform * sums[kept]))
    with scratch.frame():
        scores = scratch.empty(logits.shape, np.float64)
        scores[...] = logits
        token = rank(scores, 0).draw(1.0, top_p, uniform)
    assert token in order[max(place - 1, 0) : place + 2]  # rounding may move a sum over the number
    assert token == order[place] or min(abs(sums[place - 1 : place + 1] / sums[kept] - uniform)) < 1e-12


@given(
    hnp.arrays(np.float64, st.integers(1, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.integers(0, 300),
)
@CASES
def test_ranks_are_those_of_a_stable_sort_and_scores_come_back_bit_for_bit(scores: F64, count: int) -> None:
    expected = np.argsort(-scores, kind="stable")[: count or None]
    found = rank(scores.copy(), count)
    assert found.tokens(0, len(scores)).tolist() == expected.tolist()
    assert (found.scores(0, len(scores)) == scores[expected]).all()


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=50))
@CASES
def test_scores_beyond_float32_lose_only_their_last_bits(scores: list[float]) -> None:
    wide = np.array(scores)
    found = rank(wide.copy(), 0)
    tokens = found.tokens(0, len(wide))
    np.testing.assert_allclose(found.scores(0, len(wide)), wide[tokens], rtol=2.0**-45, atol=1e-300)
    assert sorted(tokens.tolist()) == list(range(len(wide)))


@pytest.mark.parametrize("asked", [pb.Sampling(), pb.Sampling(top_k=3, top_p=0.5)])
def test_temperature_zero_is_greedy(asked: pb.Sampling) -> None:
    for seed in range(5):
        logits = _logits(seed)
        assert _choose(Sampler(asked), logits, CONTEXT).token == int(logits.argmax())


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = np.zeros(10, np.float32)
    logits[[4, 7]] = 2.0
    assert _choose(Sampler(pb.Sampling()), logits, CONTEXT).token == 4


def test_the_penalty_works_on_greedy_choices_too() -> None:
    logits = np.full(40, -1.0, np.float32)
    logits[5], logits[6] = 2.0, 1.5
    assert _choose(Sampler(pb.Sampling(repetition_penalty=2)), logits, CONTEXT).token == 6
    assert _choose(Sampler(pb.Sampling(repetition_penalty=2)), -logits, [0, 1]).token not in (0, 1)


@pytest.mark.parametrize("neutral", [pb.Sampling(), pb.Sampling(top_p=1, repetition_penalty=1, top_k=0)])
def test_neutral_values_change_nothing(neutral: pb.Sampling) -> None:
    neutral.temperature = 1.0
    logits = _logits(3).astype(np.float64)
    expected = np.exp(logits - logits.max())
    ours = _distribution(neutral, _logits(3), 10_000)
    for token, p in enumerate(expected / expected.sum()):
        assert ours.get(token, 0.0) == pytest.approx(p, abs=1e-4)


def test_a_sampler_leaves_its_inputs_alone() -> None:
    logits, context = _logits(1), list(CONTEXT)
    _choose(Sampler(pb.Sampling(temperature=1, repetition_penalty=2)), logits, context)
    assert (logits == _logits(1)).all()
    assert context == CONTEXT


def _draws(asked: pb.Sampling, count: int = 60) -> list[int]:
    sampler, logits = Sampler(asked), _logits(0, spread=1.0)
    return [_choose(sampler, logits, CONTEXT).token for _ in range(count)]


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
    counts = np.bincount([_choose(sampler, logits, [0]).token for _ in range(4000)], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0.05]) * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 3 degrees of freedom


@given(st.integers(0, 1000), st.integers(0, MAX_LOGPROBS))
@CASES
def test_logprobs_are_those_of_the_model(seed: int, count: int) -> None:
    logits = _logits(seed)
    asked = pb.Sampling(temperature=1.5, top_k=3, repetition_penalty=1.7, logprobs=count, seed=seed, seeded=True)
    choice = _choose(Sampler(asked), logits, CONTEXT)
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
        _choose(Sampler(pb.Sampling()), logits, CONTEXT)


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
    assert 0 <= _choose(Sampler(extreme), _logits(0), CONTEXT).token < 40


VOCABULARY = 151_936
LARGE = [
    pb.Sampling(),
    pb.Sampling(logprobs=100, repetition_penalty=1.1),
    pb.Sampling(temperature=1, top_p=0.9, logprobs=3),
    pb.Sampling(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1),
]


@pytest.mark.parametrize("asked", LARGE)
def test_a_large_vocabulary_needs_its_scratch_and_little_else(asked: pb.Sampling) -> None:
    exact = Scratch(SecureMemory(sampling_bytes(VOCABULARY) + (1 << 13)), sampling_bytes(VOCABULARY))
    sampler, logits = Sampler(asked), _logits(0, VOCABULARY)
    context = [int(token) for token in np.random.default_rng(1).integers(0, VOCABULARY, 30_000)]
    assert traced.peak(lambda: sampler.choose(logits, context, exact)) < 160 << 10


def test_a_penalty_counts_once_however_often_a_token_came() -> None:
    logits = _logits(4)
    for times in (1, 2, BLOCK + 1, 3 * BLOCK):
        asked = pb.Sampling(repetition_penalty=1.5, temperature=1, seed=3, seeded=True)
        sampler = Sampler(asked)
        assert [_choose(sampler, logits, [5] * times).token for _ in range(20)] == _once(logits, asked)


def _once(logits: F32, asked: pb.Sampling) -> list[int]:
    sampler = Sampler(asked)
    return [_choose(sampler, logits, [5]).token for _ in range(20)]
