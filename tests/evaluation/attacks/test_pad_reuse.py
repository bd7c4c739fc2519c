"""One shared stretch of a pad is found, wherever it lies; fresh pads share none."""

import numpy as np
import numpy.typing as npt
import pytest

from evaluation.attacks import pad_reuse
from evaluation.attacks.crossed import recurring
from evaluation.attacks.knowledge import Fact
from evaluation.attacks.view import View
from evaluation.transcript import Transcript
from tests.evaluation.attacks.ring_views import I32, exchange, uniform

RNG = np.random.default_rng(1)


def fact(*tensors: npt.NDArray[np.generic]) -> Fact:
    events = tuple(exchange(one, layer) for layer, one in enumerate(tensors))
    (found,) = pad_reuse.attack(View(Transcript(events), ()), None)  # type: ignore[arg-type]
    assert isinstance(found, Fact)
    return found


def x_q(width: int, size: int = 1 << 18) -> I32:
    return RNG.integers(-size, size, width, np.int32)


def test_fresh_pads_share_nothing() -> None:
    found = fact(uniform(RNG, 500, 64), uniform(RNG, 500, 176))
    assert (found.hits, found.trials, found.p) == (0, 1000, 1.0)


@pytest.mark.parametrize(
    ("at", "other_at", "words"), [(0, 0, 64), (0, 0, 32), (0, 4, 40), (16, 100, 32), (44, 156, 20)]
)
def test_a_pad_of_two_rows_of_different_width_is_found(at: int, other_at: int, words: int) -> None:
    """Of different layers and linears too: what is compared does not ask where it went."""
    one, other, pad = uniform(RNG, 500, 64), uniform(RNG, 500, 176), uniform(RNG, 1, words)[0]
    one[7, at : at + words] = x_q(words) + pad
    other[400, other_at : other_at + words] = x_q(words) + pad
    found = fact(one, other)
    assert found.hits == 2
    assert found.p is not None
    assert found.p < 1e-15


def test_activations_of_full_size_do_not_hide_it() -> None:
    rows, pad = uniform(RNG, 500, 256), uniform(RNG, 1, 256)[0]
    rows[3], rows[450] = (x_q(256, 1 << 22) + pad for _ in range(2))
    assert fact(rows).hits == 2


def test_a_key_stream_that_starts_over_within_a_row_is_found() -> None:
    rows = uniform(RNG, 100, 128)
    rows[5, 64:] = rows[5, :64] + x_q(64)
    assert fact(rows).hits == 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_rows_without_pads_all_share_one(dtype: type) -> None:
    assert fact((RNG.standard_normal((300, 64)) * 1e4).astype(dtype)).hits == 300


def test_rows_shorter_than_a_stretch_say_nothing() -> None:
    view = View(Transcript((exchange(uniform(RNG, 5, 8)),)), ())
    assert pad_reuse.attack(view, None) == []  # type: ignore[arg-type]


def test_equal_keys_are_paired_with_the_next_of_their_kind() -> None:
    one, other = recurring(np.array([5, 9, 5, 7, 5], np.uint64), 32)
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == [(0, 2), (2, 4)]
