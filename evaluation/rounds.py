"""Repetitions in turns: one of every row, then again, so that a drift of the machine hits all rows alike."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from evaluation.measure import Sample
from evaluation.rows import Row, row
from wire.errors import CleaveError

Key = tuple[str, str]  # scheme, precision


class Measurer(Protocol):
    """What runs one row."""

    def repeat(self) -> Sample:
        """One repetition."""
        ...

    def resident(self) -> dict[str, int]:
        """Resident bytes by role, now."""
        ...


Start = Callable[[], AbstractContextManager[Measurer]]


def measure(rows: Mapping[Key, Start], repeat: int, together: bool) -> list[Row]:
    """The rows, in their order. `together`: all of them run all the time; else each is started anew for its turn.

    An error of a row carries its name as a note.
    """
    samples: dict[Key, list[Sample]] = {key: [] for key in rows}
    resident: dict[Key, dict[str, int]] = {}
    with ExitStack() as stack:
        running = {key: stack.enter_context(_started(key, start)) for key, start in rows.items()} if together else {}
        for _ in range(repeat):
            for key, start in rows.items():
                with ExitStack() as turn:
                    rig = running[key] if together else turn.enter_context(_started(key, start))
                    with _noting(key):
                        samples[key].append(rig.repeat())
                        resident[key] = rig.resident()
    return [row(*key, samples[key], resident[key]) for key in rows]


@contextmanager
def _started(key: Key, start: Start) -> Iterator[Measurer]:
    with ExitStack() as stack:
        with _noting(key):
            rig = stack.enter_context(start())
        yield rig


@contextmanager
def _noting(key: Key) -> Iterator[None]:
    try:
        yield
    except CleaveError as error:
        error.add_note(" ".join(key))
        raise
