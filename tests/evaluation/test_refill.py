"""A bank that fills while it is watched."""

import pytest

from evaluation.refill import Glimpse, Watch


def watched(*glimpses: tuple[float, int, float], capacity: int = 100) -> Watch:
    first, *others = (Glimpse(*one) for one in glimpses)
    watch = Watch(first, capacity)
    for one in others:
        watch.see(one)
    return watch


def test_a_pad_takes_what_passed_until_the_last_batch_was_there() -> None:
    watch = watched((10, 20, 1.0), (11, 20, 1.9), (12, 60, 2.8), (13, 100, 3.7), (13.1, 100, 3.71), (14, 100, 3.72))
    assert watch.resting
    assert watch.refill is not None
    assert watch.refill.wall == pytest.approx(3 / 80)
    assert watch.refill.cpu == pytest.approx(2.7 / 80)


def test_a_worker_that_computes_is_not_at_rest_although_no_pad_comes() -> None:
    assert not watched((0, 90, 0), (0.4, 90, 0.4), (0.8, 90, 0.8), (1.2, 90, 1.2)).resting
    assert watched((0, 90, 0), (0.4, 90, 0.01), (0.8, 90, 0.02)).resting


def test_a_moment_of_quiet_is_not_enough() -> None:
    assert not watched((0, 90, 0), (0.4, 90, 0)).resting


def test_half_a_bank_is_not_full_however_quiet_it_is() -> None:
    assert not watched((0, 50, 0), (9, 50, 0)).resting
    assert watched((0, 51, 0), (9, 51, 0)).resting


def test_nothing_made_is_no_refill() -> None:
    assert watched((0, 90, 0), (9, 90, 0)).refill is None
