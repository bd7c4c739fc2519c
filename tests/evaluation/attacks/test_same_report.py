"""The same transcripts and the same seed give the same cells: no attack takes its chances from elsewhere."""

from dataclasses import replace

from evaluation.attacks.public_model import PublicModel
from evaluation.leakage.cells import Cell
from evaluation.leakage.prompts import Script
from evaluation.leakage.suite import tried
from evaluation.leakage.table import ATTACKS
from tests.evaluation.attacks import scenes


def test_every_attack_says_the_same_again(public: PublicModel, script: Script) -> None:
    views = {"plain": scenes.clear(public, script), "secure-infer": scenes.masked(public, script)}
    entries = [entry for entry in ATTACKS if entry.attack is not None]

    def cells() -> list[Cell]:
        return [replace(cell, seconds=0.0) for cell in tried(views, script, entries)]

    first = cells()
    assert len({cell.attack for cell in first if cell.trials}) > 8
    assert cells() == first
