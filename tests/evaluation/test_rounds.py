"""The order of repetitions, with measurers that only write down what happens to them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from evaluation.measure import Load, Sample
from evaluation.rounds import Key, Measurer, measure
from tests.evaluation.samples import sample
from wire.errors import UnavailableError

PLAIN, SPLIT = Key("plain", "int8", "grpc"), Key("split", "int8", "grpc")
SHORT, LONG = Load(8, 4, 1), Load(99, 4, 1)


class Fake:
    """A measurer; `diary` is everybody's."""

    def __init__(self, name: str, diary: list[str], failing: bool) -> None:
        self._name, self._diary, self._failing = name, diary, failing

    def repeat(self, load: Load) -> Sample:
        if self._failing:
            raise UnavailableError("the GPU worker stopped")
        self._diary.append(self._name if load == SHORT else f"{self._name} {load.context}")
        return sample([0.001 * len(self._diary)])

    def resident(self) -> dict[str, int]:
        return {"client": 1}


def starts(diary: list[str], failing: str = "") -> dict[Key, Callable[[], AbstractContextManager[Measurer]]]:
    def start(name: str) -> Callable[[], AbstractContextManager[Measurer]]:
        @contextmanager
        def run() -> Iterator[Measurer]:
            diary.append(f"+{name}")
            try:
                yield Fake(name, diary, name == failing)
            finally:
                diary.append(f"-{name}")

        return run

    return {key: start(key.scheme) for key in (PLAIN, SPLIT)}


def test_rows_take_turns_while_all_of_them_run() -> None:
    diary: list[str] = []
    found = measure(starts(diary), [SHORT], 2, together=True)
    assert diary == ["+plain", "+split", "plain", "split", "plain", "split", "-split", "-plain"]
    assert list(found) == [(PLAIN, SHORT), (SPLIT, SHORT)]
    assert [one.gaps for one in found[PLAIN, SHORT].samples] == [[pytest.approx(0.003)], [pytest.approx(0.005)]]
    assert found[SPLIT, SHORT].resident == {"client": 1}


def test_every_load_has_its_turn_with_all_rows() -> None:
    diary: list[str] = []
    found = measure(starts(diary), [SHORT, LONG], 2, together=True)
    assert diary[2:-2] == 2 * ["plain", "split", "plain 99", "split 99"]
    assert list(found) == [(PLAIN, SHORT), (SPLIT, SHORT), (PLAIN, LONG), (SPLIT, LONG)]
    assert all(len(taken.samples) == 2 for taken in found.values())


def test_rows_take_turns_when_each_starts_anew() -> None:
    diary: list[str] = []
    measure(starts(diary), [SHORT, LONG], 2, together=False)
    assert diary == 2 * ["+plain", "plain", "plain 99", "-plain", "+split", "split", "split 99", "-split"]


@pytest.mark.parametrize("together", [True, False])
def test_a_row_that_fails_is_named_and_everything_stops(together: bool) -> None:
    diary: list[str] = []
    with pytest.raises(UnavailableError) as failed:
        measure(starts(diary, failing="split"), [SHORT], 2, together)
    assert failed.value.__notes__ == ["split int8 grpc"]
    assert diary.count("plain") == 1
    assert {"-plain", "-split"} <= set(diary)
