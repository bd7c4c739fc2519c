"""Every fault of every party at every moment, on real processes: the others report it, and service resumes."""

from collections.abc import Iterator, Sequence

import pytest

from tests.faults.cells import (
    COUNT,
    CUT,
    DECODE,
    FAULTS,
    IDLE,
    KILL,
    LONG,
    MOMENTS,
    PREFILL,
    SHORT,
    STOP,
    VICTIMS,
    Cell,
    Trial,
)
from tests.faults.fleet import CLIENT, GPU, TRUSTED, Fleet
from tests.faults.table import SHIELDED, Table

# Each pair of victim and fault, and each pair of victim and moment.
ALWAYS = {
    Cell(GPU, IDLE, CUT),
    Cell(GPU, PREFILL, KILL),
    Cell(GPU, DECODE, STOP),
    Cell(TRUSTED, IDLE, CUT),
    Cell(TRUSTED, PREFILL, STOP),
    Cell(TRUSTED, DECODE, KILL),
    Cell(CLIENT, IDLE, KILL),
    Cell(CLIENT, PREFILL, STOP),
    Cell(CLIENT, DECODE, CUT),
}


def cells(*victims: str) -> Sequence[object]:
    """Parameters: those not in ALWAYS are for `make soak`."""
    found = []
    for cell in (Cell(victim, moment, fault) for victim in victims for moment in MOMENTS for fault in FAULTS):
        found.append(pytest.param(cell, marks=[] if cell in ALWAYS else [pytest.mark.soak], id=str(cell)))
    return found


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    table = Table()
    yield table
    table.end()


def answers(fleet: Fleet) -> dict[str, list[int]]:
    """Answers without a fault; `idle` is the second turn after a first one of one token."""
    found = {"short": fleet.ask(SHORT, COUNT), PREFILL: fleet.ask(LONG, COUNT)}
    puppet = fleet.puppet()
    for count in (1, COUNT):
        puppet.do("say", ids=SHORT, count=count, credit=8, timeout=4)
        found[IDLE] = puppet.do("rest")["tokens"]
    fleet.dismiss()
    return found | {DECODE: found["short"]}


@pytest.fixture(scope="module")
def unharmed(running: Fleet) -> dict[str, list[int]]:
    return answers(running)


@pytest.fixture(scope="module")
def unharmed_shielded(shielding: Fleet) -> dict[str, list[int]]:
    return answers(shielding)


@pytest.mark.parametrize("cell", cells(*VICTIMS))
def test_the_others_report_and_service_resumes(
    fleet: Fleet, cell: Cell, unharmed: dict[str, list[int]], table: Table
) -> None:
    table.note(cell, Trial(fleet, cell, unharmed).run())


@pytest.mark.parametrize("cell", cells(SHIELDED))
def test_caches_on_the_gpu_worker_are_lost_with_it_and_new_sessions_work(
    shielded: Fleet, cell: Cell, unharmed_shielded: dict[str, list[int]], table: Table
) -> None:
    trial = Trial(shielded, Cell(GPU, cell.moment, cell.fault), unharmed_shielded)
    table.note(cell, trial.run())
