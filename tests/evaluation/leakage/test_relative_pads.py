"""The relatives of secure-infer that are broken on purpose come out broken, by the attack that is named for each."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks.view import View
from evaluation.leakage import relative_pads, suite, table
from evaluation.leakage.cells import BROKEN, Cell
from evaluation.leakage.prompts import Script
from evaluation.transcript import Transcript
from tests.evaluation.attacks.ring_views import clear, exchange, tiny_script
from wire.linears import Linear

NAMES = {"pad reuse", "pad algebra", "row space"}
RELATIVES = {one.name: one for one in table.RELATIVES if one.made.__module__ == relative_pads.__name__}
ENTRIES = [entry for entry in table.ATTACKS if entry.name in NAMES]


@pytest.fixture(scope="module")
def script(model_folder: Callable[[str], Path]) -> Script:
    return tiny_script(model_folder("llama-bf16-tied-sharded"))


@pytest.fixture(scope="module")
def split(script: Script) -> View:
    """Layer 0's inputs, and rows of another width, as split sends them."""
    wider = np.random.default_rng(0).integers(-(1 << 18), 1 << 18, (200, 176), np.int32)
    events = [exchange(x_q) for x_q in clear(script)]
    events += [exchange(wider[at : at + 10], 1, Linear.DOWN) for at in range(0, len(wider), 10)]
    return View.of(Transcript(tuple(events)), script.knowledge.lengths)


@pytest.fixture(scope="module")
def cells(script: Script, split: View) -> list[Cell]:
    views = {name: one.made({"split": split}, script) for name, one in RELATIVES.items()}
    return suite.attacked({table.CONTROL: split} | views, script, ENTRIES, relatives=())


@pytest.mark.parametrize("name", RELATIVES)
def test_each_is_broken_by_what_is_named(name: str, cells: list[Cell]) -> None:
    shown_by = RELATIVES[name].shown_by
    assert set(shown_by) <= NAMES
    found = [cell for cell in cells if cell.scheme == name and cell.attack in shown_by]
    assert any(cell.verdict == BROKEN for cell in found)
    if name != "a pad reused once":
        assert max(cell.estimate for cell in found) >= 0.95


def test_a_pad_reused_once_is_two_rows_and_no_more(cells: list[Cell]) -> None:
    mine = [cell for cell in cells if cell.scheme == "a pad reused once"]
    assert [cell.hits for cell in mine if cell.attack == "pad reuse"] == [2]
    assert all(cell.verdict != BROKEN for cell in mine if cell.attack != "pad reuse")


@pytest.mark.parametrize("name", RELATIVES)
def test_each_is_the_same_again_and_shows_no_answers(name: str, script: Script, split: View) -> None:
    make = RELATIVES[name].made
    one, other = (make({"split": split}, script).transcript.exchanges for _ in range(2))
    assert len(one) == len(split.transcript.exchanges)
    for a, b, bare in zip(one, other, split.transcript.exchanges, strict=True):
        assert np.array_equal(a.up, b.up)
        assert a.up.shape == bare.up.shape
        assert not np.array_equal(a.up, bare.up)
        assert not a.down.size
