"""The judge of a soak: everything that may not happen is found, and nothing else is."""

from dataclasses import replace
from typing import Any

import pytest

from evaluation import judge
from evaluation.judge import Failure, Fault, Findings, Growth, beside, explain, growth, problems
from evaluation.tables import soak_table
from wire.errors import DeadlineError, PreconditionError, UnavailableError

KILLED = Fault("GPU worker killed", 100.0, 104.0)
VANISHED = Fault("client vanished", 50.0, 54.0, client=3)


def failure(client: int, start: float, end: float, error: Exception | None = None) -> Failure:
    return Failure(client, start, end, error or UnavailableError("the GPU worker is gone"))


def good() -> Findings:
    """A soak that was passed, with faults and what they caused."""
    return Findings(
        completed=100,
        left=4,
        failures=[failure(1, 99.0, 101.0), failure(3, 51.0, 52.0, DeadlineError("too late"))],
        faults=[VANISHED, KILLED],
        growth={"client": Growth(50 << 20, 51 << 20, 60 << 20), "GPU worker": None},
        products_verified=7,
        memory_before=1000,
        memory_after=1000,
    )


def test_a_good_soak_has_no_problems_and_says_what_happened() -> None:
    found = good()
    assert problems(found) == []
    report = found.report()
    assert report["failed"] == {"GPU worker killed": 1, "client vanished": 1}
    assert report["faults"] == {"GPU worker killed": 1, "client vanished": 1}
    assert report["rss"]["client"]["flat"] is True
    assert report["rss"]["GPU worker"] is None
    assert report["pads_reused"] == report["wrong"] == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a wrong answer": ({"wrong": ["client 2 got [1]"]}, "a wrong answer: client 2 got"),
    "a reused pad": ({"pads_reused": 1}, "pads_reused is 1"),
    "a rejected product": ({"products_failed": 2}, "2 products"),
    "a process that grew": ({"growth": {"GPU worker": Growth(100 << 20, 114 << 20, 114 << 20)}}, "the GPU worker grew"),
    "a trusted worker that grew": (
        {"growth": {"trusted worker": beside(Growth(200 << 20, 209 << 20, 209 << 20), None)}},
        f"the trusted worker grew from {200 << 20} to {209 << 20} resident bytes; {208 << 20} are fine",
    ),
    "a session that stayed": ({"sessions": 1}, "1 sessions were left"),
    "secure memory that stayed": ({"memory_after": 1064}, "1064 bytes of secure memory"),
    "a client that starved": ({"silent_clients": [5]}, "client 5 got no answer"),
    "no answer at all": ({"completed": 0}, "no answer was completed"),
    "an unclear error": (
        {"failures": [failure(1, 99.0, 101.0, PreconditionError("internal error"))]},
        "1 clients were told PreconditionError: internal error",
    ),
    "a crash of a client": ({"failures": [failure(1, 99.0, 101.0, KeyError("x"))]}, "KeyError('x')"),
    "a failure without a fault": ({"failures": [failure(1, 10.0, 20.0)]}, "1 answers failed without a fault"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_thing_that_may_not_happen_is_found(case: str) -> None:
    change, words = BAD[case]
    lines = problems(replace(good(), **change))
    assert len(lines) == 1
    assert words in lines[0]


def test_a_fault_explains_what_it_overlaps_and_a_while_after() -> None:
    faults, late = [VANISHED, KILLED], judge.RECOVERY_SECONDS
    assert explain(failure(1, 90.0, 100.5), faults) == KILLED.kind
    assert explain(failure(1, 104.0 + late - 1, 200.0), faults) == KILLED.kind
    assert explain(failure(1, 104.0 + late + 1, 200.0), faults) == judge.UNEXPLAINED
    assert explain(failure(1, 90.0, 99.5), faults) == judge.UNEXPLAINED


def test_a_client_s_fault_explains_its_own_failures_only() -> None:
    assert explain(failure(3, 50.0, 51.0), [VANISHED]) == VANISHED.kind
    assert explain(failure(2, 50.0, 51.0), [VANISHED]) == judge.UNEXPLAINED


def test_the_last_fault_takes_the_blame() -> None:
    assert explain(failure(3, 40.0, 110.0), [VANISHED, KILLED]) == KILLED.kind


def series(sizes: list[int]) -> list[tuple[float, int]]:
    return [(float(time), size) for time, size in enumerate(sizes)]


def test_growth_compares_the_second_and_the_last_fifth() -> None:
    found = growth(series([900] * 20 + [100] * 20 + [500] * 40 + [130] * 20), 0.0, 100.0)
    assert found == Growth(early=100, late=130, most=900)


def test_one_outlier_is_no_growth() -> None:
    found = growth(series([100] * 90 + [100 << 30] + [100] * 9), 0.0, 100.0)
    assert found is not None
    assert found.flat


def test_too_few_samples_say_nothing() -> None:
    assert growth(series([1] * 10), 0.0, 10.0) is None
    assert growth([], 0.0, 10.0) is None


@pytest.mark.parametrize(("late", "flat"), [((100 << 20) + (13 << 20), True), ((100 << 20) + (13 << 20) + 4096, False)])
def test_the_bound_is_five_percent_and_eight_mebibytes(late: int, flat: bool) -> None:
    assert Growth(100 << 20, late, late).flat is flat


@pytest.mark.parametrize(("late", "flat"), [(8 << 20, True), ((8 << 20) + 4096, False)])
def test_a_trusted_worker_may_grow_by_eight_mebibytes_whatever_its_size(late: int, flat: bool) -> None:
    assert beside(Growth(1 << 30, (1 << 30) + late, 2 << 30), None).flat is flat


@pytest.mark.parametrize(("late", "flat"), [(48 << 20, True), ((48 << 20) + 4096, False)])
def test_what_its_arena_grew_by_is_not_counted(late: int, flat: bool) -> None:
    arena = Growth(10 << 20, 50 << 20, 64 << 20)
    found = beside(Growth(100 << 20, (100 << 20) + late, 200 << 20), arena)
    assert found.flat is flat
    assert (found.early, found.arena) == (100 << 20, 40 << 20)


def test_the_table_of_a_soak_says_what_was_allowed() -> None:
    row = {"scheme": "secure-infer", "precision": "int8", **good().report(), "problems": ["client 5 got no answer"]}
    what = {"model": "demo", "machine": "m", "clients": 8, "minutes": 0.5, "seed": 0, "tee_profile": "optee"}
    lines = soak_table(what | {"switch_us": 0, "data_plane": "grpc", "soaks": [row]}).splitlines()
    assert lines[0] == "demo, 8 clients, 0.5 minutes, seed 0, in optee"
    assert "- client: 50 MiB early, 51 MiB late (60 allowed), at most 60" in lines
    assert "- GPU worker: too few samples of its memory" in lines
    assert lines[-1] == "- PROBLEM: client 5 got no answer"
