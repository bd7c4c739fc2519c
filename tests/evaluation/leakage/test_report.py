"""The report says what the cells say: exposed first, then the matrix, and every cell once."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evaluation.leakage import heatmap, report
from evaluation.leakage.cells import NOTHING_SENT, judged, not_run
from evaluation.leakage.report import best, document, least_hits, matrix
from evaluation.leakage.table import Relative
from tests.evaluation.leakage.samples import ASKED, one
from wire.errors import PreconditionError


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(report, "RELATIVES", (Relative("weak pads", lambda views, script: views["plain"], ("look",)),))
    cells = [one("plain", ASKED), one("plain", 195, target="scores"), one("secure-infer", 1)]
    cells += [one("weak pads", 100), one("plain", ASKED, attack="count"), one("secure-infer", ASKED, attack="count")]
    cells += [not_run("tee-only", name, "nothing", NOTHING_SENT) for name in ("look", "count")]
    return {
        "schema": 1,
        "machine": "here",
        "commit": "abc",
        "model": "demo",
        "model_digest": "00",
        "tier": "quick",
        "seed": 0,
        "prompts": 9,
        "tokens": 99,
        "exposed_by_design": report.EXPOSED,
        "cells": [asdict(each) for each in judged(cells, "secure-infer", "plain", frozenset({"count"}))],
        "gate": {"family_error": 1e-6, "p_below": 1e-6, "failures": []},
    }


def test_what_is_exposed_stands_above_the_matrix(result: dict[str, Any]) -> None:
    text = document(result)
    places = [text.index(part) for part in (*report.EXPOSED, "## The matrix", "## How to read it", "## Every cell")]
    assert places == sorted(places)


def test_the_matrix_shows_the_best_of_each_attack(result: dict[str, Any]) -> None:
    assert matrix(result) == [
        "| scheme | look | count |",
        "|---|---|---|",
        "| `plain` | 1 **broken** | 1 by design |",
        "| `secure-infer` | 0.005 chance | 1 by design |",
        "| `tee-only` | - | - |",
        "| *broken on purpose* |  |  |",
        "| weak pads | 0.5 **broken** | - |",
    ]


def test_a_broken_target_is_never_hidden_by_another(result: dict[str, Any]) -> None:
    found = best(result, "plain", "look")
    assert found is not None
    assert (found["verdict"], found["estimate"]) == ("broken", 1.0)
    assert best(result, "split", "look") is None


def test_every_cell_that_was_run_has_its_line(result: dict[str, Any]) -> None:
    lines = document(result).partition("## Every cell")[2].splitlines()
    assert (
        "| plain | look | scores | tokens, top-1 | 195 of 200 | 0.975 | 0.943 to 0.992 | 0.001 | 0 | broken |" in lines
    )
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 6


def test_a_gate_that_fails_is_said_at_the_top(result: dict[str, Any]) -> None:
    assert "The gate is passed." in document(result)
    result["gate"]["failures"] = ["secure-infer is broken: look, rows"]
    assert "**The gate fails:** secure-infer is broken: look, rows." in document(result).split("##")[0]


def test_the_picture_is_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    heatmap.draw(result, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PreconditionError, match="cannot be written"):
        heatmap.draw(result, tmp_path / "nowhere" / "matrix.png")


def test_colours_are_above_chance() -> None:
    def shade(verdict: str, estimate: float) -> float:
        return heatmap.above_chance({"verdict": verdict, "estimate": estimate, "chance": 0.5})

    assert shade("chance", 0.64) == 0
    assert shade("broken", 1.0) == 1
    assert shade("broken", 0.95) == pytest.approx(0.9)
    assert shade("broken", 0.6) == heatmap.BROKEN_LEAST


def test_it_says_how_small_a_leak_is_not_seen(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SMALLEST", ("look",))
    least = least_hits(ASKED, result["cells"][2]["chance"], 1e-6)
    assert f"look from {least} hits of {ASKED} on" in document(result)


def test_the_least_hits_are_those_of_the_binomial() -> None:
    assert least_hits(20, 0.5, 1.5 * 2.0**-20) == 20  # all right: 2^-20; one wrong: 21 times as much
    assert least_hits(20, 0.5, 21.5 * 2.0**-20) == 19
    assert least_hits(4, 0.5, 1e-6) == 5  # so few trials show nothing
