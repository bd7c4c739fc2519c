"""The opener: one job ahead and never two, in order, and nothing runs on when the caller has left."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from trusted_worker.opener import Opener, Ready


@pytest.fixture
def opener() -> Iterator[Opener]:
    one = Opener()
    yield one
    one._thread.shutdown()


def test_results_come_in_order(opener: Opener) -> None:
    jobs: list[Callable[[], int] | Ready[int]] = [
        Ready(-i) if i % 3 == 0 else lambda i=i: i  # type: ignore[misc]
        for i in range(20)
    ]
    assert list(opener.ahead(jobs)) == [-i if i % 3 == 0 else i for i in range(20)]
    assert list(opener.ahead([])) == []


def test_the_next_job_runs_while_the_caller_works_and_no_other(opener: Opener) -> None:
    began = [threading.Event() for _ in range(6)]

    def job(i: int) -> int:
        began[i].set()
        return i

    for i in opener.ahead([lambda i=i: job(i) for i in range(6)]):  # type: ignore[misc]
        if i < 5:
            assert began[i + 1].wait(5)
        assert not any(one.is_set() for one in began[i + 2 :])


def test_jobs_run_in_one_other_thread_and_what_is_ready_in_none(opener: Opener) -> None:
    threads = set(opener.ahead([threading.get_ident] * 5))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    untouched = Opener()
    assert list(untouched.ahead([Ready(1), Ready(2)])) == [1, 2]
    assert not untouched._thread._threads
    untouched._thread.shutdown()


def test_an_error_takes_the_place_of_its_result_and_ends_the_series(opener: Opener) -> None:
    ran = []

    def job(i: int) -> int:
        ran.append(i)
        return 6 // (2 - i)

    results = opener.ahead([lambda i=i: job(i) for i in range(5)])  # type: ignore[misc]
    assert [next(results), next(results)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []
    assert ran == [0, 1, 2]
    assert list(opener.ahead([lambda: 7])) == [7]  # the thread lives


@pytest.mark.parametrize("how", ["left", "error", "source"])
def test_whoever_leaves_early_waits_for_the_job_that_runs(opener: Opener, how: str) -> None:
    begun, release, finished = threading.Event(), threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        assert release.wait(5)
        finished.set()
        return 1

    def jobs() -> Iterator[Callable[[], int]]:
        yield lambda: 0
        yield slow
        if how == "source":
            raise ValueError
        yield lambda: 2

    def leave() -> None:
        try:
            with closing(opener.ahead(jobs())) as results:
                next(results)
                if how == "source":
                    next(results)
                if how == "error":
                    raise ValueError
        except ValueError:
            pass

    caller = threading.Thread(target=leave)
    caller.start()
    assert begun.wait(5)
    caller.join(0.1)
    assert caller.is_alive()
    release.set()
    caller.join(5)
    assert finished.is_set()
    assert not caller.is_alive()
