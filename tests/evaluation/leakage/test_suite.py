"""The gate: what must come out, comes out, or the build fails."""

from collections.abc import Mapping
from typing import Any

import pytest

from evaluation.leakage import suite, table
from evaluation.leakage.cells import BROKEN, CHANCE
from evaluation.leakage.prompts import Script
from evaluation.leakage.suite import attacked, failures
from evaluation.leakage.table import Entry, Relative
from tests.evaluation.leakage.samples import ASKED, entry, view

NOBODY: Any = None  # is asked anything here
SCRIPT = Script((), (), {}, NOBODY)


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BARS", ())
    monkeypatch.setattr(suite, "HOLDS", ())


def gate(hits: Mapping[str, int], shown_by: tuple[str, ...] = (), **more: bool) -> list[str]:
    """What it says of one attack with so many hits by scheme; `shown_by` makes the scheme `weak` a relative."""
    views = {scheme: view() for scheme in ("plain", "secure-infer", "weak")}
    entries: list[Entry] = [entry("look", {id(views[scheme]): count for scheme, count in hits.items()}, **more)]
    relatives = [Relative("weak", lambda views, script: view(), shown_by)] if shown_by else []
    return failures(attacked(views, SCRIPT, entries, relatives=relatives), entries, relatives)


def test_it_is_passed_when_all_is_as_it_must_be() -> None:
    assert gate({"plain": ASKED, "secure-infer": 0, "weak": 100}, ("look",)) == []


def test_a_broken_scheme_fails_it() -> None:
    assert gate({"plain": ASKED, "secure-infer": 20}) == [
        "secure-infer is broken: look, rows",
        "look says nothing of secure-infer",
    ]


def test_an_attack_without_teeth_fails_it() -> None:
    said = gate({"plain": 100, "secure-infer": 0})
    assert said[0] == "look recovers 0.500 of plain: it proves nothing"


def test_an_attack_that_was_not_tried_fails_it() -> None:
    assert gate({"plain": ASKED}) == ["look says nothing of secure-infer"]
    assert gate({"plain": ASKED}, everywhere=False) == []


def test_a_relative_that_stands_fails_it() -> None:
    said = gate({"plain": ASKED, "secure-infer": 0, "weak": 0}, ("look",))
    assert said == ["weak is broken on purpose; not shown by look"]


def test_published_figures_are_reached_or_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BARS", (("weak", "look", 0.99),))
    assert gate({"plain": ASKED, "secure-infer": 0, "weak": ASKED}) == []
    assert gate({"plain": ASKED, "secure-infer": 0, "weak": 190}) == ["look recovers 0.950 of weak, known to give 0.99"]


def test_an_option_protects_as_it_says_or_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "HOLDS", (("weak", "look"),))
    assert gate({"plain": ASKED, "secure-infer": 0, "weak": 0}) == []
    said = ["weak does not hold against look"]
    assert gate({"plain": ASKED, "secure-infer": 0, "weak": 20}) == said
    assert gate({"plain": ASKED, "secure-infer": 0}) == said


def test_cells_come_attack_by_attack() -> None:
    views = {scheme: view() for scheme in ("plain", "secure-infer")}
    entries = [entry(name, {id(views["plain"]): ASKED, id(views["secure-infer"]): 0}) for name in ("one", "two")]
    found = attacked(views, SCRIPT, entries)
    assert [(cell.attack, cell.verdict) for cell in found] == [
        ("one", BROKEN),
        ("one", CHANCE),
        ("two", BROKEN),
        ("two", CHANCE),
    ]


def test_every_attack_of_the_table_can_be_found_in_its_file() -> None:
    assert len({one.name for one in table.ATTACKS}) == len(table.ATTACKS)
    for one in table.ATTACKS:
        assert one.attack is None or one.attack.__module__.startswith("evaluation.attacks.")
    known = {one.name for one in table.ATTACKS}
    assert {name for relative in table.RELATIVES for name in relative.shown_by} <= known
