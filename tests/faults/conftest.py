"""Running workers that the fault tests share; each test repairs what it broke."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.cells import COUNT, SHORT
from tests.faults.fleet import Fleet


@contextmanager
def _fleet(factory: pytest.TempPathFactory, scheme: str, *more: str) -> Iterator[Fleet]:
    with Fleet(factory.mktemp(scheme), scheme, more) as fleet:
        yield fleet
    assert not fleet.processes(), "a process was left behind"


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """secure-infer, with few pads, for prompts too."""
    with _fleet(tmp_path_factory, "secure-infer", "--pad-bank", "4MiB", "--prefill", "worker") as fleet:
        yield fleet


@pytest.fixture(scope="package")
def shielding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """kv-shield."""
    with _fleet(tmp_path_factory, "kv-shield") as fleet:
        yield fleet


@pytest.fixture(scope="package")
def expected(running: Fleet) -> list[int]:
    """The answer to SHORT."""
    return running.ask(SHORT, COUNT)


@pytest.fixture
def fleet(running: Fleet) -> Iterator[Fleet]:
    """secure-infer."""
    yield running
    running.dismiss()
    running.heal()


@pytest.fixture
def shielded(shielding: Fleet) -> Iterator[Fleet]:
    """kv-shield."""
    yield shielding
    shielding.dismiss()
    shielding.heal()
