"""Output perturbation: its bound in the worst case, the law of its noise, and what that depends on."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.trusted_worker import traced
from trusted_worker.arithmetic import F32, F64
from trusted_worker.config import MOST_PERTURBATION as MOST
from trusted_worker.perturbation import BLOCK, Perturbation
from trusted_worker.sampling import Choice, Sampler
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.errors import InvalidArgumentError
from wire.scratch import sampling_bytes
from wire.v1 import trusted_worker_pb2 as pb

CASES = settings(deadline=None, max_examples=80, derandomize=True)
KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
CONTEXT = [1, 5, 5, 30]
SIZE = 3 * BLOCK + 11
LOGITS = hnp.arrays(np.float32, st.integers(2, 300), elements=st.floats(-100, 100, width=32))

scratch = Scratch(SecureMemory(1 << 20), 1 << 19)


def _released(perturbation: Perturbation, logits: F32, context: list[int] = CONTEXT) -> F32:
    result = logits.copy()
    perturbation.apply(result, context)
    return result


def _noise(perturbation: Perturbation, context: list[int] = CONTEXT) -> F64:
    """Of logits that are zero: as it was drawn, but for its rounding."""
    return _released(perturbation, np.zeros(SIZE, np.float32), context).astype(np.float64)


def _choose(asked: pb.Sampling, logits: F32, key: bytes = KEY, least: float = 0.0) -> Choice:
    with scratch.frame():
        return Sampler(asked, key, least).choose(logits.copy(), CONTEXT, scratch)


def _log_softmax(logits: F32) -> F64:
    wide = logits.astype(np.float64) - float(logits.max())
    result: F64 = wide - math.log(np.exp(wide).sum())
    return result


def _divergence(one: F32, other: F32) -> float:
    """KL of the distributions of two rows of logits, in nats."""
    p, q = _log_softmax(one), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum())


@given(LOGITS, st.floats(0, MOST), st.floats(0, MOST), st.integers(0, 1000))
@CASES
def test_the_divergence_is_never_above_its_bound(logits: F32, asked: float, least: float, token: int) -> None:
    perturbation = Perturbation(asked, least, KEY)
    released = _released(perturbation, logits, [token])
    assert perturbation.bound == max(asked, least)
    most = perturbation.bound**2 / 2
    assert _divergence(logits, released) <= most * (1 + 1e-9) + 1e-12
    assert _divergence(released, logits) <= most * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(("bound", "reached"), [(0.5, 0.9), (2.0, 0.4), (8.0, 0.2)])
def test_the_bound_is_that_of_the_worst_noise_and_not_of_ours(bound: float, reached: float) -> None:
    """Noise that is b, up for one of two tokens and down for the other, at all odds. Small b come close."""
    odds = np.linspace(-3 * bound, 3 * bound, 601).astype(np.float32)
    worst = max(
        _divergence(np.array([gap, 0], np.float32), np.array([gap + sign * bound, -sign * bound], np.float32))
        for gap in odds
        for sign in (-1, 1)
    )
    assert reached * bound**2 / 2 <= worst <= bound**2 / 2


@given(LOGITS, st.floats(0, MOST), st.floats(0, MOST))
@CASES
def test_noise_is_at_most_b_to_the_last_bit(logits: F32, asked: float, least: float) -> None:
    """Beside large logits float32 is coarse: rounding away from the logit would go beyond."""
    for scale in (1, 1 << 12, 1 << 22):
        scaled = logits * np.float32(scale)
        released = _released(Perturbation(asked, least, KEY), scaled)
        off = np.abs(released.astype(np.float64) - scaled)
        assert (off <= max(asked, least)).all()


@pytest.mark.parametrize("parts", [(0.7, 0.0), (0.0, 0.7), (0.5, 0.7)])
def test_noise_is_uniform(parts: tuple[float, float]) -> None:
    """Asked by the session or by the worker alone. Bins of equal odds, over many contexts; deterministic."""
    perturbation = Perturbation(*parts, KEY)
    noise = np.concatenate([_noise(perturbation, [one]) for one in range(20)])
    counts, _ = np.histogram(noise, 64, (-0.7, 0.7))
    expected = len(noise) / 64
    assert counts.sum() == len(noise)
    assert 20 < ((counts - expected) ** 2 / expected).sum() < 130  # 63 degrees of freedom


def test_noise_of_one_token_tells_nothing_of_the_next() -> None:
    noise = np.concatenate([_noise(Perturbation(1.0, key=KEY), [one]) for one in range(20)])
    for lag in (1, 2, 4, BLOCK):
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 6 / len(noise) ** 0.5


def test_the_same_context_has_the_same_noise_whoever_asks() -> None:
    logits = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    one, other = Perturbation(0.5, key=KEY), Perturbation(0.5, key=KEY)
    assert (_released(one, logits) == _released(other, logits)).all()
    assert (_released(one, logits) == _released(one, logits)).all()


@pytest.mark.parametrize("context", [[], [1, 5, 5], [1, 5, 5, 31], [30, 5, 5, 1], [*CONTEXT, 0], [*CONTEXT * BLOCK]])
def test_other_contexts_have_other_noise(context: list[int]) -> None:
    perturbation = Perturbation(0.5, key=KEY)
    one, other = _noise(perturbation), _noise(perturbation, context)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


def test_contexts_that_differ_behind_many_tokens_differ() -> None:
    perturbation, long = Perturbation(0.5, key=KEY), [7] * (2 * BLOCK)
    assert (_noise(perturbation, long) != _noise(perturbation, [*long[:-1], 8])).mean() > 0.99


def test_other_keys_and_other_sizes_have_other_noise() -> None:
    """Of one stream at two sizes, two answers would give away the exact logits."""
    one = _noise(Perturbation(0.5, key=KEY))
    for other in (Perturbation(0.5, key=OTHER_KEY), Perturbation(1.0, key=KEY), Perturbation(0.0, 0.5, KEY)):
        assert abs(np.corrcoef(one, _noise(other))[0, 1]) < 0.08


def test_what_a_session_asks_does_not_change_the_workers_own_noise() -> None:
    """Answers at many sizes average the session's part out, and leave the worker's."""
    least = _noise(Perturbation(0.0, 0.5, KEY))
    asked = [_noise(Perturbation(0.5 + step / 400, 0.5, KEY)) for step in range(1, 201)]
    left = np.mean(asked, axis=0)
    assert np.corrcoef(left, least)[0, 1] > 0.99
    assert np.abs(left - least).max() < 0.2


def test_without_perturbation_nothing_changes_bit_for_bit() -> None:
    logits = np.random.default_rng(1).standard_normal(400).astype(np.float32) * 3
    for asked in (
        pb.Sampling(logprobs=5),
        pb.Sampling(temperature=1, top_p=0.9, repetition_penalty=1.2, logprobs=3, seed=4, seeded=True),
    ):
        assert _choose(asked, logits) == _choose(asked, logits, b"")
        kept = logits.copy()
        with scratch.frame():
            Sampler(asked, KEY).choose(kept, CONTEXT, scratch)
        assert kept.tobytes() == logits.tobytes()


def test_sampling_and_log_probabilities_are_of_the_released_logits() -> None:
    """The same as if the model had said these logits, whatever the parameters."""
    logits = np.random.default_rng(2).standard_normal(400).astype(np.float32)
    released = _released(Perturbation(2.0, key=KEY), logits)
    for seed in range(20):
        asked = pb.Sampling(temperature=1, repetition_penalty=1.3, logprobs=7, seed=seed, seeded=True)
        expected = _choose(asked, released)
        asked.perturbation = 2.0
        assert _choose(asked, logits) == expected
    assert _choose(pb.Sampling(perturbation=1.0), logits, least=2.0) == _choose(
        pb.Sampling(perturbation=1.0), logits, least=2.0
    )


def test_a_worker_that_insists_is_obeyed_and_says_so() -> None:
    logits = np.random.default_rng(3).standard_normal(400).astype(np.float32)
    assert Sampler(pb.Sampling(), KEY, 0.5).perturbation == 0.5
    assert Sampler(pb.Sampling(perturbation=2), KEY, 0.5).perturbation == 2
    assert Sampler(pb.Sampling()).perturbation == 0
    expected = _choose(pb.Sampling(logprobs=3), _released(Perturbation(0.0, 0.5, KEY), logits))
    assert _choose(pb.Sampling(logprobs=3), logits, least=0.5) == expected
    assert expected != _choose(pb.Sampling(logprobs=3), logits)


@given(st.integers(0, 10_000), st.floats(0.0625, 4, width=32))
@CASES
def test_a_greedy_token_that_leads_by_more_than_2b_stays(seed: int, bound: float) -> None:
    random = np.random.default_rng(seed)
    logits = random.standard_normal(50).astype(np.float32)
    best = int(random.integers(50))
    logits[best] = 0
    logits[best] = logits.max() + np.float32(2.001 * bound + 1e-4)
    assert _choose(pb.Sampling(perturbation=bound), logits).token == best


def test_a_greedy_token_that_leads_by_less_may_change() -> None:
    logits = np.array([0.5, 0.0], np.float32)
    with scratch.frame():
        sampler = Sampler(pb.Sampling(perturbation=1.0), KEY)
        tokens = {sampler.choose(logits.copy(), [one], scratch).token for one in range(50)}
    assert tokens == {0, 1}


@pytest.mark.parametrize("asked", [-0.1, 8.01, float("nan"), float("inf")])
def test_what_is_out_of_range_is_refused(asked: float) -> None:
    with pytest.raises(InvalidArgumentError, match="perturbation must be between 0 and 8"):
        Sampler(pb.Sampling(perturbation=asked), KEY)
    with pytest.raises(ValueError, match="least perturbation"):
        Perturbation(0.0, asked, KEY)


@pytest.mark.parametrize("key", [b"", bytes(31)])
def test_noise_without_a_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="key of 32 bytes"):
        Sampler(pb.Sampling(perturbation=0.1), key)
    with pytest.raises(ValueError, match="key of 32 bytes"):
        Sampler(pb.Sampling(), key, 0.1)


def test_it_needs_no_scratch_and_little_memory() -> None:
    vocabulary = 151_936
    exact = Scratch(SecureMemory(sampling_bytes(vocabulary) + (1 << 13)), sampling_bytes(vocabulary))
    sampler = Sampler(pb.Sampling(perturbation=1.0, logprobs=5), KEY, 0.5)
    logits = np.random.default_rng(0).standard_normal(vocabulary).astype(np.float32)
    context = [int(token) for token in np.random.default_rng(1).integers(0, vocabulary, 30_000)]
    assert traced.peak(lambda: sampler.choose(logits, context, exact)) < 160 << 10
