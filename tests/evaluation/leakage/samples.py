"""Cells and attacks by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.attacks.knowledge import Answers, Fact, Finding, Knowledge
from evaluation.attacks.view import View
from evaluation.leakage.cells import Cell, cell
from evaluation.leakage.table import Entry
from evaluation.transcript import Transcript

POOL, ASKED = 1000, 200
TRUTH = {"tokens": np.arange(ASKED)}


def view() -> View:
    return View(Transcript(()), ())


def one(scheme: str, hits: int, attack: str = "look", target: str = "rows") -> Cell:
    """An attack with so many right answers of ASKED, from a pool of POOL."""
    said = np.where(np.arange(ASKED) < hits, np.arange(ASKED), -1)
    return cell(scheme, attack, "nothing", Answers(target, "tokens", said, POOL), TRUTH, 0.1)


def entry(name: str, hits: Mapping[int, int], **more: Any) -> Entry:
    """An attack that says so many right answers of a view, by its identity; nothing of others."""

    def attack(view: View, known: Knowledge) -> list[Finding]:
        return [Fact("rows", "tokens", hits[id(view)], ASKED, 1 / POOL)] if id(view) in hits else []

    return Entry(name, attack, "nothing", **more)
