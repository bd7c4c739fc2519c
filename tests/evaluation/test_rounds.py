"""The order of repetitions, with measurers that only write down what happens to them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from evaluation.measure import Sample
from evaluation.rounds import Key, Measurer, measure
from tests.evaluation.samples import sample
from wire.errors import UnavailableError

PLAIN, SPLIT = ("plain", "int8"), ("split", "int8")


class Fake:
    """A measurer; `diary` is everybody's."""

    def __init__(self, name: str, diary: list[str], failing: bool) -> None:
        self._name, self._diary, self._failing = name, diary, failing

    def repeat(self) -> Sample:
        if self._failing:
            raise UnavailableError("the GPU worker stopped")
        self._diary.append(self._name)
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

    return {key: start(key[0]) for key in (PLAIN, SPLIT)}


def test_rows_take_turns_while_all_of_them_run() -> None:
    diary: list[str] = []
    rows = measure(starts(diary), 2, together=True)
    assert diary == ["+plain", "+split", "plain", "split", "plain", "split", "-split", "-plain"]
    assert [(row.scheme, row.precision) for row in rows] == [PLAIN, SPLIT]
    assert rows[0].ms_per_token_spread == pytest.approx([3, 5])
    assert rows[1].ms_per_token_spread == pytest.approx([4, 6])


def test_rows_take_turns_when_each_starts_anew() -> None:
    diary: list[str] = []
    measure(starts(diary), 2, together=False)
    assert diary == 2 * ["+plain", "plain", "-plain", "+split", "split", "-split"]


@pytest.mark.parametrize("together", [True, False])
def test_a_row_that_fails_is_named_and_everything_stops(together: bool) -> None:
    diary: list[str] = []
    with pytest.raises(UnavailableError) as failed:
        measure(starts(diary, failing="split"), 2, together)
    assert failed.value.__notes__ == ["split int8"]
    assert diary.count("plain") == 1
    assert {"-plain", "-split"} <= set(diary)
