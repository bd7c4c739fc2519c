"""Repetitions in turns: one of every row, then again, so that a drift of the machine hits all rows alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from evaluation.measure import Load, Sample
from wire.errors import CleaveError


class Key(NamedTuple):
    """What runs. `plane`: between the workers, grpc or stream; "-" where nothing crosses between two workers."""

    scheme: str
    precision: str
    plane: str

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(part for part in self if part != "-")


class Measurer(Protocol):
    """What runs one row."""

    def repeat(self, load: Load) -> Sample:
        """One repetition."""
        ...

    def resident(self) -> dict[str, int]:
        """Resident bytes by role, now."""
        ...


@dataclass
class Taken:
    """All repetitions of one row under one load, and the resident bytes by role after the last of them."""

    samples: list[Sample] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)


Start = Callable[[], AbstractContextManager[Measurer]]
Found = dict[tuple[Key, Load], Taken]


def measure(rows: Mapping[Key, Start], loads: Sequence[Load], repeat: int, together: bool) -> Found:
    """Every row under every load. `together`: all of them run all the time; else each is started anew for its turn.

    An error of a row carries its name as a note.
    """
    found: Found = {(key, load): Taken() for load in loads for key in rows}
    with ExitStack() as stack:
        running = {key: stack.enter_context(_started(key, start)) for key, start in rows.items()} if together else {}
        for _ in range(repeat):
            if together:
                for key, load in found:
                    _take(found, key, load, running[key])
            else:
                _take_anew(found, rows, loads)
    return found


def _take_anew(found: Found, rows: Mapping[Key, Start], loads: Sequence[Load]) -> None:
    for key, start in rows.items():
        with _started(key, start) as rig:
            for load in loads:
                _take(found, key, load, rig)


def _take(found: Found, key: Key, load: Load, rig: Measurer) -> None:
    with _noting(key):
        found[key, load].samples.append(rig.repeat(load))
        found[key, load].resident = rig.resident()


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
        error.add_note(key.name)
        raise
